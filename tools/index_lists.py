"""Kept scores of common words: for each, the rows that have it and what bm25 gives them for it.

bm25 of a query is the sum over its words, so adding up lists ranks as FTS5 would: 8 bytes for each document and word,
and about 0.3 ms for a word that is in 100,000 documents.
"""

from __future__ import annotations

import sqlite3
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from thinkloop.tools.index_fts import BM25, COMMON
from thinkloop.tools.index_terms import WORD, Stemmer, indexable, quoted

_CACHE_BYTES = 64 << 20
_DRIFT = 0.2  # change of the number of documents after which all scores are computed again
_TRIES = 8
_BLOCK = 256
_ALL = f"SELECT rowid, -{BM25} FROM words WHERE words MATCH ?"
_NEW = f"{_ALL} AND rowid >= ?"


class Postings(NamedTuple):
    """Rows in rising order (uint32) [n] and their scores (float32) [n]."""

    rows: NDArray[np.uint32]
    scores: NDArray[np.float32]


class Lists:
    """The lists of one state of the index (`generation`), the latest used kept in memory. Safe to use from threads."""

    def __init__(self, generation: int, terms: frozenset[str]) -> None:
        self.generation, self.terms = generation, terms
        self._guard = threading.Lock()
        self._kept: OrderedDict[str, Postings] = OrderedDict()
        self._bytes = 0

    def best(self, db: sqlite3.Connection, words: Sequence[tuple[str, str]], limit: int) -> list[int]:
        """Rows of the best documents for `words`, each as FTS5 phrase and term."""
        last = db.execute("SELECT max(row) FROM documents").fetchone()[0]
        size = (last // _BLOCK + 1) * _BLOCK
        total = np.zeros(size, np.float32)  # [rows]
        found = np.zeros(size, np.uint8)  # how many of the words each row has
        for phrase, term in words:
            postings = self._postings(db, term) if term in self.terms else _scored(db, _ALL, phrase)
            total[postings.rows] += postings.scores
            found[postings.rows] += 1
        every = found == len(words)
        if every.any():
            total *= every
        return _top(db, total, limit)

    def _postings(self, db: sqlite3.Connection, term: str) -> Postings:
        with self._guard:
            if term in self._kept:
                self._kept.move_to_end(term)
                return self._kept[term]
        postings = _load(db, term)
        with self._guard:
            if term not in self._kept:
                self._kept[term] = postings
                self._bytes += _size(postings)
            while self._bytes > _CACHE_BYTES:
                self._bytes -= _size(self._kept.popitem(last=False)[1])
        return postings


def refresh(
    db: sqlite3.Connection,
    stems: Stemmer,
    count: int,
    removed: Sequence[int],
    first_new: int,
    touched: set[str] | None,
) -> None:
    """Make the lists fit the index of `count` documents: without the rows `removed`, with those from `first_new` on.

    `touched` are the terms in those documents; None when they are too many to tell.
    """
    if _drifted(db, count):
        db.execute("DELETE FROM common")
        db.execute("INSERT OR REPLACE INTO meta VALUES ('listed', ?)", (count,))
        touched = None
    have = {term for (term,) in db.execute("SELECT term FROM common")}
    gone = np.array(removed, np.uint32)
    for term, word in _spelt(db, stems, sorted(_wanted(db, have, touched))):
        if term in have:
            _extend(db, term, _load(db, term), gone, _scored(db, _NEW, quoted(word), first_new))
        else:
            _keep(db, term, _scored(db, _ALL, quoted(word)))


def _drifted(db: sqlite3.Connection, count: int) -> bool:
    row = db.execute("SELECT value FROM meta WHERE key = 'listed'").fetchone()
    return row is None or abs(count - row[0]) > _DRIFT * row[0]


def _wanted(db: sqlite3.Connection, have: set[str], touched: set[str] | None) -> set[str]:
    """Terms whose lists must be looked at: those that have one, and those that need one."""
    if touched is None:
        return have | {term for (term,) in db.execute("SELECT term FROM vocabulary WHERE doc > ?", (COMMON,))}
    query = "SELECT doc FROM vocabulary WHERE term = ?"
    return {term for term in touched if term in have or (db.execute(query, (term,)).fetchone() or (0,))[0] > COMMON}


def _extend(db: sqlite3.Connection, term: str, old: Postings, gone: NDArray[np.uint32], new: Postings) -> None:
    stays = ~np.isin(old.rows, gone)
    if len(new.rows) or not stays.all():
        rows, scores = np.append(old.rows[stays], new.rows), np.append(old.scores[stays], new.scores)
        _keep(db, term, Postings(rows, scores))


def _spelt(db: sqlite3.Connection, stems: Stemmer, terms: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Each term with a word that has it as its stem: the stem of a stem may be another (`becaus`, `becau`)."""
    for term, again in zip(terms, stems(terms), strict=True):
        word = term if again == [term] else _spelling(db, stems, term)
        if word:
            yield term, word


def _spelling(db: sqlite3.Connection, stems: Stemmer, term: str) -> str | None:
    for (row,) in db.execute("SELECT DISTINCT doc FROM places WHERE term = ? LIMIT ?", (term, _TRIES)):
        text = " ".join(db.execute("SELECT title, text FROM documents WHERE row = ?", (row,)).fetchone())
        words = list(dict.fromkeys(WORD.findall(indexable(text))))
        spelt = (word for word, found in zip(words, stems(words), strict=True) if found == [term])
        if word := next(spelt, ""):
            return str(word)
    return None


def _scored(db: sqlite3.Connection, query: str, *values: object) -> Postings:
    pairs = db.execute(query, values).fetchall()
    rows = np.fromiter((row for row, _ in pairs), np.uint32, len(pairs))
    return Postings(rows, np.fromiter((score for _, score in pairs), np.float32, len(pairs)))


def _load(db: sqlite3.Connection, term: str) -> Postings:
    rows, scores = db.execute("SELECT rows, scores FROM common WHERE term = ?", (term,)).fetchone()
    return Postings(np.frombuffer(rows, np.uint32), np.frombuffer(scores, np.float32))


def _keep(db: sqlite3.Connection, term: str, postings: Postings) -> None:
    row = (term, postings.rows.tobytes(), postings.scores.tobytes())
    db.execute("INSERT OR REPLACE INTO common VALUES (?, ?, ?)", row)


def _size(postings: Postings) -> int:
    return postings.rows.nbytes + postings.scores.nbytes


def _top(db: sqlite3.Connection, total: NDArray[np.float32], limit: int) -> list[int]:
    """Rows of the highest scores above zero; equal ones by id.

    The best `limit` are in the `limit` blocks with the highest maxima: partitioning those takes 0.1 ms, all rows 14 ms.
    """
    maxima = total.reshape(-1, _BLOCK).max(axis=1)  # [blocks]
    blocks = _largest(maxima, limit)
    rows = (blocks[:, None] * _BLOCK + np.arange(_BLOCK)).ravel()
    found = [(-float(total[row]), _id(db, int(row)), int(row)) for row in rows[_largest(total[rows], limit)]]
    return [row for score, _, row in sorted(found) if score < 0]


def _largest(values: NDArray[np.float32], count: int) -> NDArray[np.intp]:
    return np.argpartition(values, -count)[-count:] if count < len(values) else np.arange(len(values))


def _id(db: sqlite3.Connection, row: int) -> str:
    found = db.execute("SELECT id FROM documents WHERE row = ?", (row,)).fetchone()
    return found[0] if found else ""
