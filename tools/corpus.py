"""Search over folders of text, code, web pages and JSON lines, in an index that is kept up to date.

Ids are paths below the folder, so they stay the same from run to run. A search result names the line that matches best.
"""

from __future__ import annotations

import hashlib
import os
import sqlite3
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from thinkloop.tools.corpus_files import PROSE, File, walk
from thinkloop.tools.corpus_snippet import best_line
from thinkloop.tools.index import FORMAT, SCHEMA, Changes, Index, Progress, TextIndex
from thinkloop.tools.index_database import BUSY_SECONDS, QUERY_SECONDS, Busy, Damaged, Database, is_damage, remove
from thinkloop.tools.index_fts import FtsIndex
from thinkloop.tools.index_terms import Stemmer, query_words
from thinkloop.traces.events import ThinkloopError

MAX_LIMIT = 1000
SMALL_FILES = 2_000
SMALL_BYTES = 8 << 20

T = TypeVar("T")

Engine = Literal["sqlite", "tantivy"]


class CorpusError(ThinkloopError):
    """The corpus can't be searched: a folder is missing or holds no text, the index can't be used, or a query is too slow."""


@dataclass(frozen=True, slots=True)
class Document:
    """One text: its id (path below the corpus folder), title (first heading, else the file's name) and lines."""

    id: str
    title: str
    lines: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Hit:
    """One search result: the document, and its best line (numbered from 1)."""

    id: str
    title: str
    line: int
    text: str


class Corpus:
    """The documents in folders and files. Safe to use from several threads; calls block for milliseconds.

    Ids are paths below the folder, with the folder's name before them when there are several sources; a line of a
    `.jsonl` file is a document of its own, `file.jsonl#12`.

    The index is kept in memory when there is little to read (under 2,000 files and 8 MB), else in a file in
    `$XDG_CACHE_HOME/thinkloop/index`; a file that is there is used in any case. `cache` is another folder to keep it in
    always, or `"memory"`. `engine` is FTS5 of SQLite, or tantivy for collections of more than some 300,000 documents.

    `changes` is what the last update did, `skipped` the files that couldn't be indexed, each with its reason, and `note`
    says where the index is when not where it was asked for.
    """

    def __init__(
        self,
        *sources: str | Path,
        cache: Path | Literal["memory"] | None = None,
        engine: Engine = "sqlite",
        progress: Progress | None = None,
    ) -> None:
        """Index `sources`, or bring their index up to date. Raises `CorpusError` when there is nothing to search."""
        if not sources:
            raise CorpusError("a corpus needs a folder or a file to index")
        self.sources = tuple(Path(source) for source in sources)
        self.folder = self.sources[0]
        self.name = ", ".join(source.resolve().name or str(source) for source in self.sources)
        self.note, self._engine, self._stems = "", engine, Stemmer()
        self._mending = threading.Lock()
        files = self._files()
        self._path = self._place(files, cache)
        self._index = self._opened()
        try:
            self.changes = self._updated(files, progress)
            if not len(self):
                raise CorpusError(self._nothing())
        except BaseException:
            self.close()
            raise

    def __len__(self) -> int:
        return self._healed(lambda: len(self._index))

    @property
    def skipped(self) -> dict[str, str]:
        """Files that can't be indexed, by id, each with the reason."""
        return self._healed(lambda: self._index.skipped())

    def update(self, progress: Progress | None = None) -> Changes:
        """Read what is new or changed, forget what is gone. Searches go on meanwhile, on the state before."""
        self.changes = self._updated(self._files(), progress)
        return self.changes

    def search(self, query: str, limit: int = 5) -> list[Hit]:
        """The best documents for the words of `query`: those with all of them, or else with any of them.

        Nothing in `query` is syntax. Raises `CorpusError` when it takes more than 2 s.
        """
        words = query_words(query)
        texts = self._healed(lambda: self._index.best(words, max(1, min(limit, MAX_LIMIT))))
        return [Hit(text.id, text.title, *best_line(text.text, words, self._stems)) for text in texts]

    def document(self, name: str) -> Document | None:
        """The document with this id, or else the only one with exactly this title."""
        clean = name.encode("utf-8", "replace").decode("utf-8")
        text = self._healed(lambda: self._index.document(clean))
        return Document(text.id, text.title, tuple(text.text.split("\n"))) if text else None

    def close(self) -> None:
        self._index.close()
        self._stems.close()

    def _files(self) -> list[File]:
        for source in self.sources:
            if not source.exists():
                raise CorpusError(f"the corpus folder `{source}` does not exist; give --corpus an existing one")
        return list(walk(self.sources))

    def _place(self, files: list[File], cache: Path | Literal["memory"] | None) -> Path | None:
        """The file to keep the index in, if any."""
        if cache == "memory":
            return None
        path = (cache or default_cache()) / f"{self._kind()[:24]}.db"
        small = len(files) < SMALL_FILES and sum(file.size for file in files) < SMALL_BYTES
        return None if cache is None and small and not path.exists() else path

    def _kind(self) -> str:
        """Tells indexes of other sources, engines and versions apart."""
        names = "\0".join([str(FORMAT), self._engine, *(str(source.resolve()) for source in self.sources)])
        return hashlib.sha256(names.encode("utf-8", "surrogateescape")).hexdigest()

    def _opened(self) -> Index:
        if self._path is not None:
            try:
                return self._at(self._path)
            except (OSError, sqlite3.Error) as error:
                self.note = f"the index is kept in memory: `{self._path}` can't be used ({error})"
                self._path = None
        return self._at(None)

    def _at(self, path: Path | None) -> Index:
        engine = self._text_index()
        try:
            return Index(Database(path, self._kind(), (*SCHEMA, *engine.schema)), engine)
        except Damaged:
            if path is None:
                raise
            remove(path)
        return Index(Database(path, self._kind(), (*SCHEMA, *engine.schema)), engine)

    def _text_index(self) -> TextIndex:
        if self._engine == "sqlite":
            return FtsIndex(self._stems)
        from thinkloop.tools.tantivy_index import TantivyIndex

        try:
            return TantivyIndex(self._path and self._path.with_suffix(".tantivy"))
        except ImportError as error:
            raise CorpusError("tantivy isn't installed; run `pip install 'thinkloop[search]'`") from error

    def _updated(self, files: list[File], progress: Progress | None) -> Changes:
        try:
            return self._healed(lambda: self._index.update(files, progress))
        except Busy as error:
            if not len(self):
                raise CorpusError(
                    f"another process is building the index `{self._path}`; wait until it is done"
                ) from error
            self.note = f"the index is not up to date: another process has been writing it for {BUSY_SECONDS:.0f} s"
            return Changes(unchanged=len(self))

    def _healed(self, work: Callable[[], T]) -> T:
        """`work`, again on a new index when the file turns out to be damaged. Raises `CorpusError`, or `Busy`."""
        index = self._index
        try:
            return work()
        except Busy:
            raise
        except sqlite3.Error as error:
            if "interrupted" in str(error):
                raise CorpusError(
                    f"the search took more than {QUERY_SECONDS:.0f} s; use fewer or rarer words"
                ) from error
            if self._path is None or not is_damage(error):
                raise CorpusError(f"the index `{self._path or 'in memory'}` can't be used ({error})") from error
            self._mend(index)
            return work()

    def _mend(self, damaged: Index) -> None:
        with self._mending:
            if self._index is damaged and self._path is not None:
                damaged.close()
                remove(self._path)
                self._index = self._opened()
                self._index.update(self._files())

    def _nothing(self) -> str:
        names = ", ".join(f"`{source}`" for source in self.sources)
        kinds = " ".join(sorted(PROSE))
        reasons = "; ".join(self.changes.skipped)
        return (
            f"the corpus folder {names} holds no readable text; put files there ({kinds}, code, web pages, PDFs, JSON)"
            f"{f' (skipped: {reasons})' * bool(reasons)}"
        )


def index_folder(folder: str | Path, progress: Progress | None = None, *, engine: Engine = "sqlite") -> Changes:
    """Write the index of `folder` into the cache folder, or bring it up to date. Raises `CorpusError`."""
    corpus = Corpus(folder, cache=default_cache(), engine=engine, progress=progress)
    corpus.close()
    if corpus.note:
        raise CorpusError(f"{corpus.note}; set XDG_CACHE_HOME to a folder that can be written")
    return corpus.changes


def default_cache() -> Path:
    """Where indexes are kept: `thinkloop/index` in `$XDG_CACHE_HOME`, else in `~/.cache`."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if base.startswith("/") else Path.home() / ".cache") / "thinkloop" / "index"
