"""From the names and options of a command to the tools of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from thinkloop.traces.events import Json, ThinkloopError

if TYPE_CHECKING:
    from thinkloop.tools.browser import Browser
    from thinkloop.tools.search import Pages, Search
    from thinkloop.tools.tool import Tool, Toolset
    from thinkloop.tools.web_search import Source

NAMES = ("search", "open", "python", "browser")
"""Tools that come with thinkloop; anything with a `:` or a `.` names a function of the user's."""
PROVIDERS = ("searxng=URL", "brave", "tavily", "serper")


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolRequest:
    """Which tools a run gets, and with what.

    `engine` indexes the corpus. `web` names search providers in fallback order, `pages` is what reads web pages for
    `open` (None: `fetch` where there is web search, else nothing does). `files` are given to python, `keep` takes the
    files that it writes. `allow_hosts` are private hosts that pages may come from. `servers` are MCP servers as
    `name=command` or `name=URL`, `server_tables` the tables of the settings file.
    """

    tools: tuple[str, ...] = ("search", "open", "python")
    corpus: tuple[Path, ...] = ()
    engine: Literal["sqlite", "tantivy"] = "sqlite"
    web: tuple[str, ...] = ()
    pages: Literal["fetch", "browser"] | None = None
    files: tuple[Path, ...] = ()
    keep: Path | None = None
    allow_hosts: tuple[str, ...] = ()
    unsafe_python: bool = False
    servers: tuple[str, ...] = ()
    server_tables: Mapping[str, Json] = field(default_factory=dict)


def open_toolsets(request: ToolRequest, sample: Path | None = None) -> list[Tool | Toolset]:
    """The tools, not entered yet. `sample` is searched when neither corpus nor web search is named.

    Raises `ThinkloopError` for whatever can't be had.
    """
    names = set(request.tools)
    browser = _browser(request) if "browser" in names or request.pages == "browser" else None
    found: list[Tool | Toolset] = []
    if names & {"search", "open"}:
        found.append(Chosen(_search(request, browser, sample), names))
    if "python" in names:
        from thinkloop.tools.python import Python

        found.append(Python(files=request.files, keep=request.keep, unsafe=request.unsafe_python))
    if browser is not None and "browser" in names:
        found.append(browser)
    for name in request.tools:
        if name not in NAMES:
            from thinkloop.tools.named import load_tools

            found += load_tools(name)
    return [*found, *_servers(request)]


class Chosen:
    """A toolset of which only the tools with these names are offered."""

    def __init__(self, inner: Toolset, names: set[str]) -> None:
        self._inner, self._names = inner, names

    @property
    def notes(self) -> Sequence[str]:
        return getattr(self._inner, "notes", ())

    def tools(self) -> Sequence[Tool]:
        return [tool for tool in self._inner.tools() if tool.name in self._names]

    async def __aenter__(self) -> Any:
        return await self._inner.__aenter__()

    async def __aexit__(self, *exc: Any) -> None:
        await self._inner.__aexit__(*exc)


def _browser(request: ToolRequest) -> Browser:
    from thinkloop.tools.browser import Browser

    return Browser(allow_hosts=request.allow_hosts)


def _search(request: ToolRequest, browser: Browser | None, sample: Path | None) -> Search:
    from thinkloop.tools.corpus import Corpus
    from thinkloop.tools.search import Search

    web = [_provider(name) for name in request.web]
    folders: Sequence[Path] = request.corpus
    if not (folders or web or request.pages) and sample is not None:
        folders = [sample]
    corpus = [Corpus(*folders, engine=request.engine)] if folders else []
    return Search(*corpus, *web, pages=_pages(request, browser))


def _pages(request: ToolRequest, browser: Browser | None) -> Pages | None:
    if request.pages == "browser":
        return browser
    if request.pages is None and not request.web:
        return None
    from thinkloop.tools.pages import WebPages

    return WebPages(allow_hosts=request.allow_hosts)


def _provider(text: str) -> Source:
    from thinkloop.tools import web_providers

    name, _, address = text.partition("=")
    if name == "searxng" and address:
        return web_providers.SearXNG(address)
    makers: dict[str, Callable[[], Source]] = {
        "brave": web_providers.Brave,
        "tavily": web_providers.Tavily,
        "serper": web_providers.Serper,
    }
    if name not in makers or address:
        raise ThinkloopError(f"There is no search provider {text!r}. `--web` takes {', '.join(PROVIDERS)}.")
    return makers[name]()


def _servers(request: ToolRequest) -> list[Toolset]:
    if not (request.servers or request.server_tables):
        return []
    from thinkloop.tools.mcp_client import parse_server, servers_from

    named = [parse_server(text, allow_hosts=request.allow_hosts) for text in request.servers]
    return [*servers_from(request.server_tables), *named]
