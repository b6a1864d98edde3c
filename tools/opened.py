"""From what a model gives to `open` (an id, a title, a URL) to a document; what was opened is kept for the run."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from weakref import WeakValueDictionary

import anyio
import anyio.to_thread
from thinkloop.tools.corpus import Corpus, Document, Hit
from thinkloop.tools.extract_text import Text, bounded, clean_line
from thinkloop.tools.pages import Pages
from thinkloop.tools.tool import ToolError
from thinkloop.tools.web_search import MAX_TITLE_CHARS, Library, Source, is_web_url
from thinkloop.traces.events import ThinkloopError

KEPT_CHARS = 20_000_000
"""Of all documents that are kept, a line counting 100 at least: many short ones take more memory than their text."""
KEPT_TITLES = 10_000


@dataclass(frozen=True, slots=True)
class Opened:
    """A document, the heading that its pages get, and for the record the URL that it came from where that is another."""

    document: Document
    heading: str
    url: str = ""


class Documents:
    """What can be opened in one run. The corpus comes first, then what results have named, then any web page."""

    def __init__(self, corpus: Corpus | None, sources: Sequence[Source], pages: Pages | None) -> None:
        self._corpus, self._pages = corpus, pages
        self._libraries = [source for source in sources if isinstance(source, Library)]
        self._kept: OrderedDict[str, Opened] = OrderedDict()
        self._chars = 0
        self._ids: OrderedDict[str, None] = OrderedDict()
        self._titles: OrderedDict[str, dict[str, None]] = OrderedDict()
        self._turns: WeakValueDictionary[str, anyio.Lock] = WeakValueDictionary()

    def note(self, hits: Iterable[Hit]) -> None:
        """Takes in results that the model was shown: it may open them by their title."""
        for hit in hits:
            self._ids[hit.id] = None
            if hit.title:
                self._titles.setdefault(hit.title, {})[hit.id] = None
        for names in (self._titles, self._ids):
            while len(names) > KEPT_TITLES:
                names.popitem(last=False)

    async def get(self, name: str) -> Opened:
        """The document meant by `name`. Raises `ToolError` when there is none, or when it can't be read."""
        if self._corpus is not None:
            document = await anyio.to_thread.run_sync(self._corpus.document, name)
            if document is not None:
                return Opened(document, document.id)
        if self._pages is None and not self._libraries:
            raise ToolError(f'there is no document "{name}"; search for it')
        id = self._id_of(name.strip())
        async with self._turns.setdefault(id, anyio.Lock()):  # the second of two calls for a page finds it kept
            return await self._from_elsewhere(id)

    def _id_of(self, name: str) -> str:
        """An id or address stands for itself, whatever else bears it as a title: titles are what pages make of them."""
        ids = list(self._titles.get(name, {}))
        if name in self._kept or name in self._ids or is_web_url(name) or not ids:
            return name
        if len(ids) > 1:
            raise ToolError(f'several results have the title "{name}": open one by its id: {", ".join(ids[:5])}')
        return ids[0]

    async def _from_elsewhere(self, id: str) -> Opened:
        if id in self._kept:
            self._kept.move_to_end(id)
            return self._kept[id]
        try:
            found = await self._from_library(id) or await self._from_web(id)
        except ToolError:
            raise
        except ThinkloopError as error:
            raise ToolError(str(error)) from error
        self._kept[id] = found
        self._chars += _weight(found)
        while len(self._kept) > 1 and self._chars > KEPT_CHARS:
            self._chars -= _weight(self._kept.popitem(last=False)[1])
        return found

    async def _from_library(self, id: str) -> Opened | None:
        for source in self._libraries:
            document = await source.document(id)
            if document is not None:
                return await _opened(id, document.title, document.lines)
        return None

    async def _from_web(self, id: str) -> Opened:
        if self._pages is None or not is_web_url(id):
            how = "; search for it" + (", or give a whole URL with https://" if self._pages else "")
            raise ToolError(f'there is no document "{clean_line(id, 200)}"{how}')
        url, title, lines = await self._pages.document(id)
        return await _opened(id, title, lines, url)


def _weight(opened: Opened) -> int:
    return sum(max(len(line), 100) for line in opened.document.lines)


async def _opened(id: str, title: str, lines: Sequence[str], url: str = "") -> Opened:
    title = clean_line(title, MAX_TITLE_CHARS)
    text = await anyio.to_thread.run_sync(_text, lines)
    if not text.lines:
        raise ToolError(f"{id} holds no text that can be read here; try another result")
    moved = clean_line(url, 500) if url and url != id else ""
    named = "" if text.lines[0].lstrip("# ") == title else title  # the page says it itself
    heading = f"{id}{moved and f', moved to {moved}'}{named and f': {named}'}{text.note and f', {text.note}'}"
    return Opened(Document(id, title or id, tuple(text.lines)), heading, moved)


def _text(lines: Sequence[str]) -> Text:
    return bounded("\n".join(lines))
