"""What models are told of the browser tools: names, descriptions, parameters."""

from __future__ import annotations

from dataclasses import dataclass

from thinkloop.tools.tool import Effect
from thinkloop.traces.events import Json


@dataclass(frozen=True, slots=True)
class Verb:
    """One tool's declaration."""

    name: str
    description: str
    parameters: Json
    effect: Effect = "write"  # all of them: there is one page, and calls of one turn mean it in their order


def _schema(required: list[str], **properties: Json) -> Json:
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


_REF: Json = {"type": "string", "maxLength": 40, "description": 'Which element, such as "e12" from [ref=e12].'}

OPEN = Verb(
    "browser_open",
    "Open a web page. Shows numbered lines, with refs for what can be clicked or filled.",
    _schema(
        ["url"],
        url={"type": "string", "maxLength": 8000, "description": "http or https address."},
        form={
            "type": "string",
            "enum": ["page", "article"],
            "description": "page (default): everything, with refs; article: the main text alone, for reading.",
        },
    ),
)
FIND = Verb(
    "browser_find",
    "Find text on the open page. Shows the lines that have it.",
    _schema(["text"], text={"type": "string", "minLength": 1, "maxLength": 500, "description": "Text to look for."}),
)
READ = Verb(
    "browser_read",
    "Read on in the open page. One line past the end scrolls down, for pages that load more.",
    _schema(["cursor"], cursor={"type": "integer", "minimum": 1, "description": "First line to show."}),
)
CLICK = Verb("browser_click", "Click an element of the open page.", _schema(["ref"], ref=_REF))
TYPE = Verb(
    "browser_type",
    "Fill a field of the open page, in place of what it holds.",
    _schema(
        ["ref", "text"],
        ref=_REF,
        text={"type": "string", "maxLength": 20000, "description": "What to fill in."},
        submit={"type": "boolean", "description": "Press Enter after it; false if not given."},
    ),
)
SELECT = Verb(
    "browser_select",
    "Choose an option of a select field of the open page.",
    _schema(
        ["ref", "value"], ref=_REF, value={"type": "string", "maxLength": 500, "description": "Its label or value."}
    ),
)
BACK = Verb("browser_back", "Go back to the page before.", _schema([]))
SCREENSHOT = Verb(
    "browser_screenshot", "Take a picture of the open page for the person; it isn't shown to you.", _schema([])
)
VERBS = (OPEN, FIND, READ, CLICK, TYPE, SELECT, BACK, SCREENSHOT)
