"""What models are told of the browser tools: names, descriptions, parameters."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from thinkloop.tools.browser_process import END_SECONDS, START_SECONDS
from thinkloop.tools.tool import Effect, Output, object_schema
from thinkloop.traces.events import Json

if TYPE_CHECKING:
    from thinkloop.tools.browser import Browser


@dataclass(frozen=True, slots=True)
class Verb:
    """One tool's declaration."""

    name: str
    description: str
    parameters: Json
    effect: Effect = "write"  # all of them: there is one page, and calls of one turn mean it in their order


_REF: Json = {"type": "string", "maxLength": 40, "description": 'Which element, such as "e12" from [ref=e12].'}

OPEN = Verb(
    "browser_open",
    "Open a web page. Shows numbered lines, with refs for what can be clicked or filled. Only lines of the article form, "
    "and of PDFs, can be cited by number.",
    object_schema(
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
    object_schema(
        ["text"], text={"type": "string", "minLength": 1, "maxLength": 500, "description": "Text to look for."}
    ),
)
READ = Verb(
    "browser_read",
    "Read on in the open page. One line past the end scrolls down, for pages that load more.",
    object_schema(["cursor"], cursor={"type": "integer", "minimum": 1, "description": "First line to show."}),
)
CLICK = Verb("browser_click", "Click an element of the open page.", object_schema(["ref"], ref=_REF))
TYPE = Verb(
    "browser_type",
    "Fill a field of the open page, in place of what it holds.",
    object_schema(
        ["ref", "text"],
        ref=_REF,
        text={"type": "string", "maxLength": 20000, "description": "What to fill in."},
        submit={"type": "boolean", "description": "Press Enter after it; false if not given."},
    ),
)
SELECT = Verb(
    "browser_select",
    "Choose an option of a select field of the open page.",
    object_schema(
        ["ref", "value"], ref=_REF, value={"type": "string", "maxLength": 500, "description": "Its label or value."}
    ),
)
BACK = Verb("browser_back", "Go back to the page before.", object_schema([]))
SCREENSHOT = Verb(
    "browser_screenshot", "Take a picture of the open page for the person; it isn't shown to you.", object_schema([])
)


@dataclass(frozen=True, slots=True)
class BrowserTool:
    """What the model may call: one verb."""

    browser: Browser
    verb: Verb
    act: Callable[[Browser, Json], Awaitable[Output]]
    paged: ClassVar[bool] = True

    @property
    def name(self) -> str:
        return self.verb.name

    @property
    def description(self) -> str:
        return self.verb.description

    @property
    def parameters(self) -> Json:
        return self.verb.parameters

    @property
    def effect(self) -> Effect:
        return self.verb.effect

    @property
    def deadline(self) -> float:
        """Later than the tool's own limit, which leaves the browser in order."""
        return self.browser.timeout + START_SECONDS + 4 * END_SECONDS

    @property
    def budget(self) -> int:
        return self.browser.budget

    async def call(self, arguments: Json) -> Output:
        """Raises `ToolError` for what went wrong."""
        return await self.browser.call(self.act, arguments)
