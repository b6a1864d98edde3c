"""Search over a folder of text: an SQLite FTS5 index in memory, and the `search` and `open` tools that read it.

Ids are paths below the folder, so they stay the same from run to run. A search result names the line that matches best,
`open` numbers every line, and a long document comes in pages: read on with `line`, or look inside with `find`.
"""

from __future__ import annotations

import re
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import anyio.to_thread
from thinkloop.tools.tool import Effect, Output, Tool, ToolError
from thinkloop.traces.events import Json, ThinkloopError

SUFFIXES = frozenset(
    {".md", ".markdown", ".txt", ".rst", ".org", ".csv", ".json", ".jsonl", ".toml", ".yaml", ".yml", ".py"}
)
MAX_FILE_BYTES = 8 << 20
MAX_LINE_CHARS = 500
MAX_HIT_CHARS = 200
WORD = re.compile(r"\w+")


class CorpusError(ThinkloopError):
    """The folder can't be searched: it is missing, not a folder, unreadable, or holds no text."""


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
    """The documents below a folder. Safe to use from several threads."""

    def __init__(self, folder: str | Path) -> None:
        """Read and index `folder`. Raises `CorpusError` when there is nothing there to search."""
        self.folder = Path(folder)
        self._lock = threading.Lock()
        self._db = sqlite3.connect(":memory:", check_same_thread=False)
        self._db.execute("CREATE TABLE documents (id TEXT UNIQUE, title TEXT, text TEXT)")
        self._db.execute("CREATE INDEX by_title ON documents (title)")
        self._db.execute(
            "CREATE VIRTUAL TABLE words USING fts5 "
            "(title, text, content='documents', tokenize='porter unicode61 remove_diacritics 2')"
        )
        self._db.executemany("INSERT INTO documents VALUES (?, ?, ?)", _read_folder(self.folder))
        self._db.execute("INSERT INTO words (words) VALUES ('rebuild')")
        if not len(self):
            kinds = " ".join(sorted(SUFFIXES))
            raise CorpusError(f"the corpus folder `{self.folder}` holds no readable text; put files there ({kinds})")

    def __len__(self) -> int:
        with self._lock:
            return int(self._db.execute("SELECT count(*) FROM documents").fetchone()[0])

    def search(self, query: str, limit: int = 5) -> list[Hit]:
        """The best documents for the words of `query`: those with all of them, or else with any of them."""
        words = WORD.findall(query)[:64]
        for joiner in (" ", " OR "):
            rows = self._match(joiner.join(f'"{word}"' for word in words), limit) if words else []
            if rows:
                return [_hit(doc, title, text, words) for doc, title, text in rows]
        return []

    def document(self, name: str) -> Document | None:
        """The document with this id, or else the only one with exactly this title."""
        with self._lock:
            rows = self._db.execute("SELECT id, title, text FROM documents WHERE id = ?", (name,)).fetchall()
            if not rows:
                rows = self._db.execute(
                    "SELECT id, title, text FROM documents WHERE title = ? LIMIT 2", (name,)
                ).fetchall()
        return Document(rows[0][0], rows[0][1], tuple(rows[0][2].split("\n"))) if len(rows) == 1 else None

    def close(self) -> None:
        with self._lock:
            self._db.close()

    def _match(self, expression: str, limit: int) -> list[tuple[str, str, str]]:
        with self._lock:
            return self._db.execute(
                "SELECT d.id, d.title, d.text FROM words JOIN documents d ON d.rowid = words.rowid "
                "WHERE words MATCH ? ORDER BY bm25(words, 8.0, 1.0), d.id LIMIT ?",
                (expression, limit),
            ).fetchall()


def _read_folder(folder: Path) -> Iterator[tuple[str, str, str]]:
    if not folder.is_dir():
        raise CorpusError(
            f"the corpus folder `{folder}` does not exist or is not a folder; give --corpus an existing one"
        )
    inside = folder.resolve()
    for path in sorted(folder.rglob("*")):
        if not path.resolve().is_relative_to(inside):  # a link must not carry the rest of the disk into the context
            continue
        if path.suffix.lower() not in SUFFIXES or not path.is_file() or path.stat().st_size > MAX_FILE_BYTES:
            continue
        try:
            text = path.read_text(encoding="utf-8", errors="replace").rstrip("\n")
        except OSError as error:
            raise CorpusError(
                f"`{path}` can't be read ({error.strerror}); fix its permissions or move it away"
            ) from error
        if text.strip():
            yield path.relative_to(folder).as_posix(), _title(path, text), text


def _title(path: Path, text: str) -> str:
    heading = re.search(r"^#+ +(.+?)\s*$", text, re.MULTILINE)
    return heading.group(1) if heading else path.stem


def _hit(doc: str, title: str, text: str, words: Sequence[str]) -> Hit:
    wanted = {word.lower() for word in words}
    best_line, best_count, best_text = 1, -1, ""
    for number, line in enumerate(text.split("\n"), 1):
        count = len(wanted & {word.lower() for word in WORD.findall(line)})
        if count > best_count:
            best_line, best_count, best_text = number, count, line
    return Hit(doc, title, best_line, best_text.strip()[:MAX_HIT_CHARS])


def format_hits(query: str, hits: Sequence[Hit]) -> str:
    """Search results as the model reads them: `1. id:line: text`, best first."""
    if not hits:
        return f'No results for "{query}".'
    return "\n".join(f"{rank}. {hit.id}:{hit.line}: {hit.text}" for rank, hit in enumerate(hits, 1))


def format_page(document: Document, line: int = 1, find: str = "", max_chars: int = 6000) -> str:
    """A document from `line` on, or only its lines with `find`, each numbered, within `max_chars` characters.

    Raises `ToolError` when there is no such line or no line has the text.
    """
    total = len(document.lines)
    if not 1 <= line <= total:
        raise ToolError(f"{document.id} has lines 1 to {total}; there is no line {line}")
    numbered = [(number, text) for number, text in enumerate(document.lines, 1) if number >= line]
    if find:
        numbered = [(number, text) for number, text in numbered if find.lower() in text.lower()]
        if not numbered:
            raise ToolError(f'no line of {document.id} from line {line} on has "{find}"')
    shown: list[str] = []
    for number, text in numbered:
        row = f"{number}: {text[:MAX_LINE_CHARS]}".rstrip()
        max_chars -= len(row) + 1
        if shown and max_chars < 0:
            head = f"{document.id} ({total} lines; more from line {number} on)"
            return "\n".join([head, *shown])
        shown.append(row)
    return "\n".join([f"{document.id} ({total} lines)", *shown])


@dataclass(frozen=True, slots=True)
class _SearchTool:
    corpus: Corpus
    name: str = "search"
    description: str = "Search the documents. Each result is an id, a line number and the line that matches best."
    parameters: Json = field(
        default_factory=lambda: _schema(
            ["query"],
            query={"type": "string", "description": "Words to look for."},
            limit={"type": "integer", "minimum": 1, "maximum": 50, "description": "How many results, 5 if not given."},
        )
    )
    effect: Effect = "read"
    deadline: float = 30.0
    budget: int = 2000

    async def call(self, arguments: Json) -> Output:
        query = str(arguments["query"])
        hits = await anyio.to_thread.run_sync(partial(self.corpus.search, query, int(arguments.get("limit", 5))))
        return Output(format_hits(query, hits), record={"hits": [hit.id for hit in hits]})


@dataclass(frozen=True, slots=True)
class _OpenTool:
    corpus: Corpus
    name: str = "open"
    description: str = "Read a document with line numbers. Takes an id from search, or an exact title."
    parameters: Json = field(
        default_factory=lambda: _schema(
            ["id"],
            id={"type": "string", "description": "Id or title."},
            line={"type": "integer", "minimum": 1, "description": "First line to show."},
            find={"type": "string", "description": "Show only the lines with this text."},
        )
    )
    effect: Effect = "read"
    deadline: float = 30.0
    budget: int = 2000

    async def call(self, arguments: Json) -> Output:
        name = str(arguments["id"])
        document = await anyio.to_thread.run_sync(self.corpus.document, name)
        if document is None:
            raise ToolError(f'there is no document "{name}"; search for it')
        page = format_page(document, int(arguments.get("line", 1)), str(arguments.get("find", "")))
        return Output(page, record={"document": document.id})


def _schema(required: list[str], **properties: Json) -> Json:
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


class Search:
    """`search` and `open` over the text files below `folder`, as a toolset."""

    def __init__(self, folder: str | Path) -> None:
        """Index `folder` now. Raises `CorpusError` when there is nothing there to search."""
        self.corpus = Corpus(folder)

    def tools(self) -> Sequence[Tool]:
        return (_SearchTool(self.corpus), _OpenTool(self.corpus))

    async def __aenter__(self) -> Search:
        return self

    async def __aexit__(self, *exc: Any) -> None:
        return None
