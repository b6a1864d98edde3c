"""The `search` and `open` tools over folders of text and the web.

A result has an id that `open` takes, and its line where it has lines. `open` numbers every line, so that an answer can cite
`[id:L12-L15]`; a long document comes in pages: read on with `line`, or look inside with `find`.
"""

from __future__ import annotations

import math
import sqlite3
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
from thinkloop.tools.corpus import Corpus, CorpusError, Document, Hit
from thinkloop.tools.extract_bounds import LINE_CHARS
from thinkloop.tools.extract_text import clean_line
from thinkloop.tools.opened import Documents
from thinkloop.tools.pages import Pages, WebPages
from thinkloop.tools.tool import Effect, Output, Tool, ToolError, object_schema
from thinkloop.tools.web_search import MAX_REASON_CHARS, Failure, Found, RetryPolicy, Source, WebSearch
from thinkloop.traces.events import Json, ThinkloopError

__all__ = ["Pages", "Search", "Shown", "Source", "format_hits", "format_page", "show_page"]

MAX_LIMIT = 50
WEB_DEADLINE = 60.0
"""Seconds for one call that may reach the web; a search itself ends after `RetryPolicy.total`."""


def format_hits(query: str, hits: Sequence[Hit]) -> str:
    """Search results as the model reads them, best first: `1. id:line: text`, or `1. url: title: snippet` for a result
    that has no lines."""
    if not hits:
        return f'No results for "{query}".'
    return "\n".join(f"{rank}. {_format_hit(hit)}" for rank, hit in enumerate(hits, 1))


def _format_hit(hit: Hit) -> str:
    if hit.line:
        return f"{hit.id}:{hit.line}: {hit.text}"
    return ": ".join(part for part in (hit.id, hit.title, hit.text) if part)


@dataclass(frozen=True, slots=True)
class Shown:
    """Text for the model, and which lines of the document it shows, as `[first, last]` pairs."""

    text: str
    lines: list[list[int]]


def format_page(document: Document, line: int = 1, find: str = "", max_chars: int = 6000) -> str:
    """A document from `line` on, or only its lines with `find`, each numbered, within `max_chars` characters.

    Raises `ToolError` when there is no such line or no line has the text.
    """
    return show_page(document, line, find, max_chars=max_chars).text


def show_page(document: Document, line: int = 1, find: str = "", *, max_chars: int = 6000, heading: str = "") -> Shown:
    """As `format_page`, with the lines that are shown; `heading` stands in for the id in the first line."""
    heading, total = heading or document.id, len(document.lines)
    if not 1 <= line <= total:
        raise ToolError(f"{document.id} has lines 1 to {total}; there is no line {line}")
    numbered = [(number, text) for number, text in enumerate(document.lines, 1) if number >= line]
    if find:
        numbered = [(number, text) for number, text in numbered if find.lower() in text.lower()]
        if not numbered:
            raise ToolError(f'no line of {document.id} from line {line} on has "{find}"')
    head, rows, numbers = f"{heading} ({total} lines)", list[str](), list[int]()
    for number, text in numbered:
        row = f"{number}: {text[:LINE_CHARS]}".rstrip()
        max_chars -= len(row) + 1
        if rows and max_chars < 0:
            head = f"{heading} ({total} lines; more from line {number} on)"
            break
        rows.append(row)
        numbers.append(number)
    return Shown("\n".join([head, *rows]), _pairs(numbers))


def _pairs(numbers: Iterable[int]) -> list[list[int]]:
    pairs: list[list[int]] = []
    for number in numbers:
        if pairs and pairs[-1][1] == number - 1:
            pairs[-1][1] = number
        else:
            pairs.append([number, number])
    return pairs


def merge(groups: Sequence[Sequence[Hit]], limit: int) -> list[Hit]:
    """The first of every group, in the order of the groups: each gets an equal share of `limit`, and what others leave."""
    share = [0] * len(groups)
    for _ in range(min(limit, sum(map(len, groups)))):
        open_groups = [index for index, group in enumerate(groups) if share[index] < len(group)]
        share[min(open_groups, key=lambda index: share[index])] += 1
    return [hit for group, count in zip(groups, share, strict=True) for hit in group[:count]]


class Search:
    """`search` and `open` over folders of text and the web, as a toolset.

        Search("docs")
        Search("docs", SearXNG("http://localhost:8080"), Brave())

    Folders are one corpus (`Corpus` says what it reads). Of the other sources the next is asked only when the one before
    failed or is to be left alone. `open` takes ids, titles of results, and URLs where there is a web source or `pages`,
    which reads them (`WebPages` where none is given).
    """

    def __init__(
        self, *sources: str | Path | Corpus | Source, pages: Pages | None = None, retry: RetryPolicy | None = None
    ) -> None:
        """Indexes folders now. Raises `CorpusError` for one without text, `ThinkloopError` for what is no source."""
        if not sources and pages is None:
            raise ThinkloopError("Search has nothing to search: give a folder of texts, or a source such as `SearXNG`.")
        self._folders = [Path(source) for source in sources if isinstance(source, str | Path)]
        self._sources = [_checked(source) for source in sources if not isinstance(source, str | Path | Corpus)]
        self._corpus = _one_corpus(self._folders, [source for source in sources if isinstance(source, Corpus)])
        self._pages = pages or (WebPages() if self._sources else None)
        self._web = WebSearch(self._sources, retry)
        self._documents = self._nothing_opened()
        self._users, self._closed, self._stack, self._entering = 0, False, AsyncExitStack(), anyio.Lock()

    @property
    def corpus(self) -> Corpus:
        """The index of the folders. Raises `ThinkloopError` where there are none."""
        if self._corpus is None:
            raise ThinkloopError("This search has no folders: it searches the web alone.")
        return self._corpus

    @property
    def notes(self) -> Sequence[str]:
        """What the person is to know of the folders: files that can't be searched, an index that can't be kept."""
        if self._corpus is None:
            return []
        reasons = Counter(self._corpus.skipped.values())
        skipped = [f"not searched: {count:,} files ({reason})" for reason, count in reasons.most_common(5)]
        return [note for note in (self._corpus.note, *skipped) if note]

    def tools(self) -> Sequence[Tool]:
        if not self._sources and self._corpus is None:
            return (_OpenTool(self, _OPEN_URL, WEB_DEADLINE, _ID),)
        if self._pages is None:
            return (_SearchTool(self), _OpenTool(self))
        find = _SearchTool(self)
        if self._sources:
            find = _SearchTool(self, _SEARCH_WEB if self._corpus is None else _SEARCH_BOTH, WEB_DEADLINE)
        return (find, _OpenTool(self, _OPEN_WEB if self._corpus is None else _OPEN_BOTH, WEB_DEADLINE, _ID))

    async def __aenter__(self) -> Search:
        async with self._entering:
            if self._users == 0:
                await self._start()
            self._users += 1
        return self

    async def __aexit__(self, *exc: Any) -> None:
        with anyio.CancelScope(shield=True):  # nobody holds this for long
            await self._entering.acquire()
        try:
            self._users -= 1
            if self._users == 0:
                await self._stack.aclose()
        finally:
            self._entering.release()

    async def find(self, query: str, limit: int = 5) -> Output:
        """The results as the model reads them. Raises `ToolError` when nothing that was asked could answer."""
        limit = min(max(1, limit), MAX_LIMIT)
        if self._sources and not query.strip():
            raise ToolError("the query is empty; give words to look for")
        found = await self._ask(query, limit)
        hits = merge([one.hits for one in found], limit)
        if not hits and not all(one.source for one in found):
            raise ToolError(_nothing(query, found))
        self._documents.note(hits)
        failures = [failure for one in found for failure in one.failures]
        notes = [f"({'; '.join(map(str, failures))})"] if failures else []
        record: Json = {"hits": [hit.id for hit in hits], "sources": [one.source for one in found if one.source]}
        record["cached"] = any(one.cached for one in found)
        if failures:
            record["failed"] = {failure.source: failure.reason for failure in failures}
        return Output("\n".join([format_hits(query, hits), *notes]), record=record)

    async def read(self, name: str, line: int = 1, find: str = "") -> Output:
        """A page of the document meant by `name`. Raises `ToolError`."""
        opened = await self._documents.get(name)
        document = opened.document
        shown = show_page(document, line, find, heading=opened.heading)
        record: Json = {"document": document.id, "title": document.title, "lines": shown.lines}
        return Output(shown.text, record=record | ({"url": opened.url} if opened.url else {}))

    async def _start(self) -> None:
        async with AsyncExitStack() as stack:
            if self._folders:
                stack.push_async_callback(self._close_corpus)
            if self._closed:  # files that changed since are seen
                self._corpus, self._closed = await anyio.to_thread.run_sync(partial(Corpus, *self._folders)), False
            for resource in (*self._sources, self._pages):
                if isinstance(resource, AbstractAsyncContextManager):
                    await stack.enter_async_context(resource)
            self._documents = self._nothing_opened()
            self._stack = stack.pop_all()

    async def _close_corpus(self) -> None:
        if self._corpus is not None and not self._closed:
            self._closed = True
            with anyio.CancelScope(shield=True):
                await anyio.to_thread.run_sync(self._corpus.close)

    async def _ask(self, query: str, limit: int) -> list[Found]:
        """What the corpus has and what the web has, asked for side by side, in this order."""
        found: list[Found] = []
        async with anyio.create_task_group() as group:
            if self._sources:
                group.start_soon(self._ask_web, query, limit, found)
            local = [await anyio.to_thread.run_sync(_in_corpus, corpus, query, limit) for corpus in self._corpora()]
        return local + found

    async def _ask_web(self, query: str, limit: int, found: list[Found]) -> None:
        found.append(await self._web.search(query, limit))

    def _corpora(self) -> list[Corpus]:
        return [] if self._corpus is None else [self._corpus]

    def _nothing_opened(self) -> Documents:
        return Documents(self._corpus, self._sources, self._pages)


def _one_corpus(folders: Sequence[Path], made: Sequence[Corpus]) -> Corpus | None:
    if len(made) + bool(folders) > 1:
        raise ThinkloopError('Search takes one `Corpus`: give it all folders, as in Corpus("docs", "notes").')
    return Corpus(*folders) if folders else next(iter(made), None)


def _in_corpus(corpus: Corpus, query: str, limit: int) -> Found:
    try:
        return Found(tuple(corpus.search(query, limit)), corpus.name)
    except (CorpusError, sqlite3.Error) as error:
        return Found(failures=(Failure(corpus.name, clean_line(str(error), MAX_REASON_CHARS)),))


def _checked(source: object) -> Source:
    if isinstance(source, Source) and not isinstance(source, type):
        return source
    name = source.__name__ if isinstance(source, type) else type(source).__name__
    raise ThinkloopError(f"`{name}` can't be searched: give folders, or objects with a `name` and an async `search`.")


def _nothing(query: str, found: Sequence[Found]) -> str:
    failures = [failure for one in found for failure in one.failures]
    empty = [one.source for one in found if one.source]
    waits = [failure.seconds for failure in failures if failure.seconds is not None]
    again = f"search again in {math.ceil(min(waits))} s" if len(waits) == len(failures) else "search again"
    nothing = f'no results for "{query}" in {", ".join(empty)}, and ' if empty else ""
    return f"{nothing}{'; '.join(map(str, failures))}. You can {again}, or go on without it."


_SEARCH = "Search the documents. Each result is an id, a line number and the line that matches best."
_SEARCH_WEB = "Search the web. Each result is a URL, a title and a snippet; open the URL to read the page."
_SEARCH_BOTH = (
    "Search the documents and the web. Each result is an id, a line number and the line that matches best, "
    "or a URL, a title and a snippet."
)
_OPEN = "Read a document with line numbers. Takes an id from search, or an exact title."
_OPEN_WEB = "Read a web page with line numbers. Takes a URL, or the exact title of a search result."
_OPEN_BOTH = "Read a document or web page with line numbers. Takes an id from search, an exact title, or a URL."
_ID = "Id, title or URL."
_OPEN_URL = "Read a web page with line numbers. Takes a URL."


@dataclass(frozen=True, slots=True)
class _SearchTool:
    search: Search
    description: str = _SEARCH
    deadline: float = 30.0
    name: str = "search"
    parameters: Json = field(
        default_factory=lambda: object_schema(
            ["query"],
            query={"type": "string", "description": "Words to look for."},
            limit={"type": "integer", "minimum": 1, "maximum": 50, "description": "How many results, 5 if not given."},
        )
    )
    effect: Effect = "read"
    budget: int = 2000
    paged: bool = True

    async def call(self, arguments: Json) -> Output:
        return await self.search.find(str(arguments["query"]), int(arguments.get("limit", 5)))


@dataclass(frozen=True, slots=True)
class _OpenTool:
    search: Search
    description: str = _OPEN
    deadline: float = 30.0
    id: str = "Id or title."
    name: str = "open"
    effect: Effect = "read"
    budget: int = 2000
    paged: bool = True

    @property
    def parameters(self) -> Json:
        return object_schema(
            ["id"],
            id={"type": "string", "description": self.id},
            line={"type": "integer", "minimum": 1, "description": "First line to show."},
            find={"type": "string", "description": "Show only the lines with this text."},
        )

    async def call(self, arguments: Json) -> Output:
        line, find = int(arguments.get("line", 1)), str(arguments.get("find", ""))
        return await self.search.read(str(arguments["id"]), line, find)
