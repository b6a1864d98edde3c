"""Ranking by SQLite's FTS5: bm25, where a word in the title counts eight times.

FTS5 computes bm25 for every document that matches, about 1.5 µs each: a word that is in half of 100,000 documents takes
75 ms. So words in more than 300 documents have their scores computed once, when the index is written, and kept
as lists (`index_lists`); a query with such a word adds lists up, which gives the same scores.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from typing import TYPE_CHECKING

from thinkloop.tools.index_terms import TOKENIZE, Stemmer, indexable, quoted

if TYPE_CHECKING:
    from thinkloop.tools.index_lists import Lists

MANY = 2_000  # documents from which on there are lists
MANY_TERMS = 5_000  # different terms in what changed, from which on all lists are looked at
COMMON = 300  # documents with a word, above which it has a list
BM25 = "bm25(words, 8.0, 1.0)"
_BEST = (
    f"SELECT d.row FROM words JOIN documents d ON d.row = words.rowid WHERE words MATCH ? ORDER BY {BM25}, d.id LIMIT ?"
)


class FtsIndex:
    """A `TextIndex` in the database itself."""

    name = "sqlite"
    outside = False
    schema: tuple[str, ...] = (
        f"CREATE VIRTUAL TABLE words USING fts5 (title, text, content='', tokenize='{TOKENIZE}')",
        "CREATE VIRTUAL TABLE vocabulary USING fts5vocab (words, row)",
        "CREATE VIRTUAL TABLE places USING fts5vocab (words, instance)",
        "CREATE TABLE common (term TEXT PRIMARY KEY, rows BLOB, scores BLOB)",
    )

    def __init__(self, stems: Stemmer) -> None:
        self._stems = stems
        self._last: Lists | None = None
        self._touched: set[str] = set()  # terms of the documents added and removed, while they are few

    def stale(self, db: sqlite3.Connection) -> bool:
        return False

    def clear(self, db: sqlite3.Connection) -> None:
        db.execute("INSERT INTO words (words) VALUES ('delete-all')")
        db.execute("DELETE FROM common")
        self._touched.clear()

    def add(self, db: sqlite3.Connection, row: int, title: str, text: str) -> None:
        self._touch(title, text)
        db.execute("INSERT INTO words (rowid, title, text) VALUES (?, ?, ?)", (row, indexable(title), indexable(text)))

    def remove(self, db: sqlite3.Connection, row: int, title: str, text: str) -> None:
        self._touch(title, text)
        values = (row, indexable(title), indexable(text))
        db.execute("INSERT INTO words (words, rowid, title, text) VALUES ('delete', ?, ?, ?)", values)

    def finish(self, db: sqlite3.Connection, removed: Sequence[int], first_new: int) -> None:
        touched, self._touched = self._touched, set()
        count = db.execute("SELECT count(*) FROM documents").fetchone()[0]
        if count < MANY:
            db.execute("DELETE FROM common")
            return
        from thinkloop.tools.index_lists import refresh

        few = touched if len(touched) < MANY_TERMS else None
        refresh(db, self._stems, count, removed, first_new, few)

    def abort(self) -> None:
        self._touched.clear()

    def best(self, db: sqlite3.Connection, words: Sequence[str], limit: int) -> list[int]:
        asked = [(word, terms) for word, terms in zip(words, self._stems(words), strict=True) if terms]
        phrases = [quoted(word) for word, _ in asked]
        listed = [terms[0] if len(terms) == 1 else "" for _, terms in asked]
        lists = self._lists(db)
        if lists is not None and not lists.terms.isdisjoint(listed):
            return lists.best(db, list(zip(phrases, listed, strict=True)), limit)
        for joiner in (" ", " OR "):
            rows = db.execute(_BEST, (joiner.join(phrases), limit)).fetchall() if phrases else []
            if rows:
                return [row for (row,) in rows]
        return []

    def close(self) -> None:
        self._last = None

    def _touch(self, title: str, text: str) -> None:
        if len(self._touched) < MANY_TERMS:
            self._touched |= self._stems.of(f"{title}\n{text}")

    def _lists(self, db: sqlite3.Connection) -> Lists | None:
        """The lists of the state that `db` sees; none for small collections."""
        row = db.execute("SELECT value FROM meta WHERE key = 'generation'").fetchone()
        last = self._last
        if row is None or (last is not None and last.generation == row[0]):
            return last
        terms = frozenset(term for (term,) in db.execute("SELECT term FROM common"))
        if not terms:
            return None
        from thinkloop.tools.index_lists import Lists

        self._last = Lists(row[0], terms)
        return self._last
