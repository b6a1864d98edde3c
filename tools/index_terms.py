"""Words and terms: what a query asks for, and what the index holds for it."""

from __future__ import annotations

import re
import sqlite3
import threading
from collections.abc import Sequence
from itertools import islice
from unicodedata import normalize

TOKENIZE = "porter unicode61 remove_diacritics 2"
MAX_QUERY_CHARS = 10_000
MAX_WORDS = 64
_KNOWN = 20_000  # words whose stems are remembered
_MARKS = "\u0300-\u036f\u0483-\u0487\u0591-\u05bd\u05bf\u05c1-\u05c7\u0610-\u061a\u064b-\u065f\u0670\u0900-\u0963\u0966-\u0df3"
WORD = re.compile(rf"[\w{_MARKS}]+")  # `\w` leaves out vowel signs, which would cut the words of Hindi to pieces
_CJK = "々〇ぁ-ゖゝ-ゟァ-ヺー-ヿㇰ-ㇿ㐀-䶿一-鿿가-힣豈-﫿ｦ-ﾟ\U00020000-\U0003ffff"
_RUN = re.compile(f"[{_CJK}]+")
_PIECE = re.compile(f"[{_CJK}]+|[^{_CJK}]+")


def is_cjk(char: str) -> bool:
    """Whether `char` is of a script that is written without spaces (Chinese, Japanese; Korean is treated alike)."""
    return _RUN.match(char) is not None


def indexable(text: str) -> str:
    """`text` as it is indexed: runs of Chinese, Japanese and Korean as overlapping pairs, each a term of its own."""
    return text if text.isascii() else _RUN.sub(_spaced_pairs, text)


def query_words(query: str) -> list[str]:
    """What a query looks for, at most 64 words: nothing in it is syntax. Runs without spaces become pairs."""
    found = (
        piece for word in WORD.finditer(normalize("NFC", query[:MAX_QUERY_CHARS])) for piece in _pieces(word.group())
    )
    return list(islice(found, MAX_WORDS))


def quoted(word: str) -> str:
    """`word` in FTS5's query language. A single Chinese character finds every pair that begins with it."""
    return f'"{word}"*' if len(word) == 1 and is_cjk(word) else f'"{word}"'


class Stemmer:
    """The terms that FTS5's own tokenizer makes of words. Safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: dict[str, list[str]] = {}
        self._db = sqlite3.connect(":memory:", check_same_thread=False, isolation_level=None)
        self._db.execute(f"CREATE VIRTUAL TABLE words USING fts5 (word, tokenize='{TOKENIZE}')")
        self._db.execute("CREATE VIRTUAL TABLE terms USING fts5vocab (words, instance)")

    def __call__(self, words: Sequence[str]) -> list[list[str]]:
        """The terms of each word, in order: usually one; none for a bare `_`, two for `snake_case`."""
        with self._lock:
            if len(self._known) > _KNOWN:
                self._known.clear()
            self._learn([word for word in dict.fromkeys(words) if word not in self._known])
            return [self._known[word] for word in words]

    def of(self, text: str) -> set[str]:
        """The different terms in a whole text."""
        with self._lock:
            self._db.execute("BEGIN")
            self._db.execute("INSERT INTO words (rowid, word) VALUES (0, ?)", (indexable(text),))
            found = {term for (term,) in self._db.execute("SELECT DISTINCT term FROM terms")}
            self._db.execute("ROLLBACK")
            return found

    def close(self) -> None:
        with self._lock:
            self._db.close()

    def _learn(self, words: list[str]) -> None:
        if not words:
            return
        self._known.update((word, []) for word in words)
        self._db.execute("BEGIN")
        self._db.executemany("INSERT INTO words (rowid, word) VALUES (?, ?)", enumerate(words))
        for row, term in self._db.execute("SELECT doc, term FROM terms ORDER BY doc, offset"):
            self._known[words[row]].append(term)
        self._db.execute("ROLLBACK")


def _pieces(word: str) -> list[str]:
    if word.isascii():
        return [word]
    return [part for piece in _PIECE.findall(word) for part in (_pairs(piece) if is_cjk(piece) else [piece])]


def _pairs(run: str) -> list[str]:
    return [run[at : at + 2] for at in range(max(1, len(run) - 1))]


def _spaced_pairs(match: re.Match[str]) -> str:
    run = match.group()
    return f" {' '.join(run[at : at + 2] for at in range(len(run)))} "
