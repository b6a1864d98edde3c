"""The options that say which tools there are: the same for every command that offers tools."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from thinkloop.agent.toolsets import NAMES, PROVIDERS


def option(name: str, text: str, **more: Any) -> Any:
    """An option that can also come from `THINKLOOP_<NAME>`."""
    variable = name.partition("/")[0].upper().replace("-", "_")
    return typer.Option(f"--{name}", envvar=f"THINKLOOP_{variable}", help=text, **more)


Tools = Annotated[
    str, option("tools", f"Which tools, comma-separated: {', '.join(NAMES)}, module:function; none for none.")
]
CorpusFolders = Annotated[
    list[Path] | None, option("corpus", "Folder of texts to search; may be given again.", show_default="sample world")
]
IndexEngine = Annotated[
    Literal["sqlite", "tantivy"],
    option("engine", "What indexes the corpus; tantivy (an extra) for 300,000 texts and more."),
]
Web = Annotated[
    str | None, option("web", f"Web search, in order of preference: {', '.join(PROVIDERS)}. Keys from <NAME>_API_KEY.")
]
PagesBy = Annotated[
    Literal["fetch", "browser"] | None,
    option("pages", "What reads web pages for open.", show_default="fetch, where there is web search"),
]
Files = Annotated[list[Path] | None, option("file", "File that python may read; may be given again.")]
Keep = Annotated[Path | None, option("keep", "Folder that takes the files which python writes.")]
AllowHost = Annotated[
    list[str] | None, option("allow-host", "Private HOST or HOST:PORT that pages may come from; may be given again.")
]
UnsafePython = Annotated[  # neither from the file nor from the environment: only a person who types it
    bool, typer.Option("--unsafe-python", help="Run python WITHOUT a sandbox, as yourself.")
]
Servers = Annotated[
    list[str] | None,
    typer.Option("--mcp", metavar="NAME=COMMAND|URL", help="MCP server to use; may be given again."),
]


def names(given: str) -> tuple[str, ...]:
    """The tools in a comma-separated list. Raises `typer.BadParameter` for a name that stands for nothing."""
    found = tuple(dict.fromkeys(name.strip() for name in given.split(",") if name.strip()))
    if found == ("none",):
        return ()
    if unknown := [name for name in found if name not in NAMES and ":" not in name and "." not in name]:
        raise typer.BadParameter(
            f"there is no tool {unknown[0]!r}; there are {', '.join(NAMES)}, your own as module:function, or none",
            param_hint="--tools",
        )
    return found


def listed(given: str | None) -> tuple[str, ...]:
    """The entries of a comma-separated option."""
    return tuple(part.strip() for part in (given or "").split(",") if part.strip())
