"""The index of a corpus: which files it has seen, the documents in them, and a text index that ranks the documents.

An update reads only files whose size or time changed, and replaces only documents whose text changed, all in one
transaction: a crash in the middle leaves the index as it was.
"""

from __future__ import annotations

import hashlib
import sqlite3
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol

from thinkloop.tools.corpus_files import File, SkipFile, read
from thinkloop.tools.corpus_text import Text, TextReader
from thinkloop.tools.index_database import Database

FORMAT = 2  # counts up when what is stored, or how text is made of files, changes
SCHEMA = (
    "CREATE TABLE meta (key TEXT PRIMARY KEY, value)",
    "CREATE TABLE files (id TEXT PRIMARY KEY, size INTEGER, mtime_ns INTEGER, hash BLOB, skipped TEXT)",
    "CREATE TABLE documents (row INTEGER PRIMARY KEY, id TEXT UNIQUE, file TEXT, title TEXT, text TEXT)",
    "CREATE INDEX by_title ON documents (title)",
    "CREATE INDEX by_file ON documents (file)",
)
_SETTLED_NS = 2_000_000_000  # a file changed less than this before it was read may change again within one clock tick
_SPARSE = 4  # rows are numbered without gaps again when the numbers pass this many times the documents (and 1,000)

_SCAN_SECONDS = 600.0
_MOST_REASONS = 20

Progress = Callable[[int, int], None]
"""Told before each file is read, and at the end: how many are done, and how many there are to read."""


@dataclass(frozen=True, slots=True)
class Changes:
    """What an update did, in documents, and the time it took. `skipped` counts the files that can't be indexed, by reason."""

    added: int = 0
    changed: int = 0
    removed: int = 0
    unchanged: int = 0
    skipped: Mapping[str, int] = field(default_factory=dict)
    seconds: float = 0.0


class TextIndex(Protocol):
    """Ranks documents by the words in them. A row is the number of a document; `db` is in a transaction."""

    name: str
    schema: tuple[str, ...]
    """Tables that it keeps in the database."""
    outside: bool
    """Whether it keeps terms outside the database, so that a crash can leave the two out of step."""

    def stale(self, db: sqlite3.Connection) -> bool:
        """Whether it must be filled again from the documents."""
        ...

    def clear(self, db: sqlite3.Connection) -> None: ...
    def add(self, db: sqlite3.Connection, row: int, title: str, text: str) -> None: ...
    def remove(self, db: sqlite3.Connection, row: int, title: str, text: str) -> None: ...

    def finish(self, db: sqlite3.Connection, removed: Sequence[int], first_new: int) -> None:
        """Called before the commit, with the rows that went and the first of the new ones."""

    def abort(self) -> None:
        """Forget what was added and removed since the last `finish`: the transaction is rolled back."""

    def best(self, db: sqlite3.Connection, words: Sequence[str], limit: int) -> list[int]:
        """Rows of the best documents for `words`: those with all of them, or else with any. `db` is a snapshot."""
        ...

    def close(self) -> None: ...


class Index:
    """Documents of files, kept in `database` and ranked by `engine`. Safe to use from several threads."""

    def __init__(self, database: Database, engine: TextIndex) -> None:
        self._database, self._engine = database, engine

    def __len__(self) -> int:
        with self._database.reading() as db:
            return _count(db)

    def update(self, files: Sequence[File], progress: Progress | None = None) -> Changes:
        """Make the index one of exactly `files`. Raises `sqlite3.Error` when the database can't be written."""
        start = time.monotonic()
        with self._database.reading(_SCAN_SECONDS) as db:
            todo, stale = _todo(db, files), self._stale(db)
            changes = Changes(unchanged=_count(db), skipped=_reasons(db))
        if todo.read or todo.gone or stale:
            if self._engine.outside:
                with self._database.writing() as db:
                    _set(db, "unfinished", 1)
            try:
                with self._database.writing() as db:
                    changes = _Update(db, self._engine).run(files, progress or _quiet, refill=stale)
            except BaseException:
                self._engine.abort()
                raise
        return replace(changes, seconds=time.monotonic() - start)

    def best(self, words: Sequence[str], limit: int) -> list[Text]:
        """The best documents for `words`, best first."""
        with self._database.reading() as db:
            rows = self._engine.best(db, words, limit) if words else []
            query = "SELECT id, title, text FROM documents WHERE row = ?"
            found = [db.execute(query, (row,)).fetchone() for row in rows]
        return [Text(*row) for row in found if row]

    def document(self, name: str) -> Text | None:
        """The document with this id, or else the only one with exactly this title."""
        with self._database.reading() as db:
            for column in ("id", "title"):
                query = f"SELECT id, title, text FROM documents WHERE {column} = ? LIMIT 2"
                rows = db.execute(query, (name,)).fetchall()
                if rows:
                    return Text(*rows[0]) if len(rows) == 1 else None
        return None

    def skipped(self) -> dict[str, str]:
        """Files that can't be indexed, by id, each with the reason."""
        with self._database.reading() as db:
            return _skipped(db)

    def close(self) -> None:
        self._engine.close()
        self._database.close()

    def _stale(self, db: sqlite3.Connection) -> bool:
        return self._engine.stale(db) or _get(db, "unfinished") == 1


class _Todo(NamedTuple):
    read: list[File]
    gone: list[str]


@dataclass(slots=True)
class _Update:
    """One transaction: the work of `Index.update`."""

    db: sqlite3.Connection
    engine: TextIndex
    added: int = 0
    changed: int = 0
    removed: list[int] = field(default_factory=list)
    next_row: int = 1

    def run(self, files: Sequence[File], progress: Progress, *, refill: bool) -> Changes:
        refill = self._renumber() or refill
        if refill:
            self._refill()
        first_new = self.next_row = _last_row(self.db) + 1
        self._read(files, progress)
        if refill or self.added or self.removed:
            self.engine.finish(self.db, self.removed, 1 if refill else first_new)
            _set(self.db, "generation", _get(self.db, "generation") + 1)
        _set(self.db, "unfinished", 0)
        unchanged = _count(self.db) - self.added - self.changed
        removed = len(self.removed) - self.changed
        return Changes(self.added, self.changed, removed, unchanged, _reasons(self.db))

    def _read(self, files: Sequence[File], progress: Progress) -> None:
        todo = _todo(self.db, files)  # again: another process may have been here
        for name in todo.gone:
            self._replace(name, ())
            self.db.execute("DELETE FROM files WHERE id = ?", (name,))
        with TextReader() as reader:
            for done, file in enumerate(todo.read):
                progress(done, len(todo.read))
                self._file(file, reader)
        progress(len(todo.read), len(todo.read))

    def _file(self, file: File, reader: TextReader) -> None:
        known = self.db.execute("SELECT hash, skipped FROM files WHERE id = ?", (file.id,)).fetchone()
        mark: bytes | None = b""
        try:
            body = read(file)
            mark = hashlib.sha256(body).digest()
            if known and known[0] == mark:
                reason = known[1]
            else:
                reason = ""
                self._replace(file.id, reader.texts(file, body))
        except SkipFile as skip:
            reason = str(skip)
            mark = None if skip.again else mark
            self._replace(file.id, ())
        settled = file.mtime_ns if time.time_ns() - file.mtime_ns > _SETTLED_NS else 0
        row = (file.id, file.size, settled, mark, reason)
        self.db.execute("INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?)", row)

    def _replace(self, file: str, texts: Iterable[Text]) -> None:
        """Make the documents of `file` be `texts`, leaving alone those that are the same."""
        kept: set[int] = set()
        for text in texts:
            query = "SELECT row, title, text FROM documents WHERE id = ?"
            old = self.db.execute(query, (text.id,)).fetchone()
            if old is None or old[1:] != text[1:]:
                if old is not None:
                    self._remove(*old)
                    self.changed += 1
                else:
                    self.added += 1
                kept.add(self._add(file, text))
            else:
                kept.add(old[0])
        rows = self.db.execute("SELECT row FROM documents WHERE file = ?", (file,)).fetchall()
        for (row,) in rows:
            if row not in kept:
                query = "SELECT row, title, text FROM documents WHERE row = ?"
                self._remove(*self.db.execute(query, (row,)).fetchone())

    def _add(self, file: str, text: Text) -> int:
        row, self.next_row = self.next_row, self.next_row + 1
        self.db.execute("INSERT INTO documents VALUES (?, ?, ?, ?, ?)", (row, text.id, file, text.title, text.text))
        self.engine.add(self.db, row, text.title, text.text)
        return row

    def _remove(self, row: int, title: str, text: str) -> None:
        self.engine.remove(self.db, row, title, text)
        self.db.execute("DELETE FROM documents WHERE row = ?", (row,))
        self.removed.append(row)

    def _renumber(self) -> bool:
        """Take the gaps out of the row numbers where there are many: what ranks by row needs room for each number."""
        if _last_row(self.db) <= _SPARSE * _count(self.db) + 1_000:
            return False
        rows = self.db.execute("SELECT row FROM documents ORDER BY row").fetchall()
        self.db.executemany(
            "UPDATE documents SET row = ? WHERE row = ?", ((new, old) for new, (old,) in enumerate(rows, 1))
        )
        return True

    def _refill(self) -> None:
        self.engine.clear(self.db)
        for row, title, text in self.db.execute("SELECT row, title, text FROM documents ORDER BY row"):
            self.engine.add(self.db, row, title, text)


def _todo(db: sqlite3.Connection, files: Sequence[File]) -> _Todo:
    known = {row[0]: row[1:] for row in db.execute("SELECT id, size, mtime_ns, hash, skipped FROM files")}
    changed = [file for file in files if _differs(file, known.get(file.id))]
    return _Todo(changed, sorted(known.keys() - {file.id for file in files}))


def _differs(file: File, known: tuple[int, int, bytes | None, str] | None) -> bool:
    if known is None:
        return True
    size, mtime_ns, mark, skipped = known
    if file.problem:
        return file.problem != skipped
    return mark is None or (size, mtime_ns) != (file.size, file.mtime_ns)


def _count(db: sqlite3.Connection) -> int:
    return int(db.execute("SELECT count(*) FROM documents").fetchone()[0])


def _last_row(db: sqlite3.Connection) -> int:
    return int(db.execute("SELECT coalesce(max(row), 0) FROM documents").fetchone()[0])


def _skipped(db: sqlite3.Connection) -> dict[str, str]:
    return dict(db.execute("SELECT id, skipped FROM files WHERE skipped != '' ORDER BY id"))


def _reasons(db: sqlite3.Connection) -> dict[str, int]:
    query = "SELECT skipped, count(*) FROM files WHERE skipped != '' GROUP BY skipped ORDER BY 2 DESC, 1"
    found = db.execute(query).fetchall()
    counts = dict(found[:_MOST_REASONS])
    rest = sum(count for _, count in found[_MOST_REASONS:])
    return counts | {"for other reasons": rest} if rest else counts


def _get(db: sqlite3.Connection, key: str) -> int:
    row = db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
    return int(row[0]) if row else 0


def _set(db: sqlite3.Connection, key: str, value: int) -> None:
    db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))


def _quiet(done: int, total: int) -> None:
    pass
