"""Ranking by tantivy (extra `search`), for collections of more than some 300,000 documents.

Titles are part of the text here, and a word that is in the title counts once more, double. Scores differ from FTS5's, so
the order of results may; documents, ids and lines are the same.
"""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from thinkloop.tools.index_terms import indexable, is_cjk

_HEAP_BYTES = 64 << 20
_TITLE_BOOST = 2.0
_TOKENIZER = "folded"


class TantivyIndex:
    """A `TextIndex` in a folder of its own beside the database, or in memory (`folder` None).

    Raises `ImportError` when tantivy isn't installed.
    """

    name = "tantivy"
    outside = True
    schema: tuple[str, ...] = ()

    def __init__(self, folder: Path | None) -> None:
        import tantivy

        self._tantivy: Any = tantivy
        self._analyzer = _analyzer(tantivy)
        self._fields = _fields(tantivy)
        self._index: Any = self._opened(folder)
        self._writer: Any = None
        self._generation = -1

    def stale(self, db: sqlite3.Connection) -> bool:
        count = db.execute("SELECT count(*) FROM documents").fetchone()[0]
        self._index.reload()
        return bool(self._index.searcher().num_docs != count)

    def clear(self, db: sqlite3.Connection) -> None:
        self._writing().delete_all_documents()

    def add(self, db: sqlite3.Connection, row: int, title: str, text: str) -> None:
        document = self._tantivy.Document()
        document.add_unsigned("row", row)
        document.add_text("title", indexable(title))
        document.add_text("text", indexable(f"{title}\n{text}"))
        self._writing().add_document(document)

    def remove(self, db: sqlite3.Connection, row: int, title: str, text: str) -> None:
        self._writing().delete_documents_by_term("row", row)

    def finish(self, db: sqlite3.Connection, removed: Sequence[int], first_new: int) -> None:
        writer, self._writer = self._writing(), None
        writer.commit()
        writer.wait_merging_threads()
        self._index.reload()

    def abort(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            with suppress(ValueError):
                writer.rollback()

    def best(self, db: sqlite3.Connection, words: Sequence[str], limit: int) -> list[int]:
        self._follow(db)
        asked = [(word, tokens) for word in words if (tokens := self._analyzer.analyze(word))]
        if not asked:
            return []
        searcher, occur = self._index.searcher(), self._tantivy.Occur
        titles = [
            (occur.Should, self._tantivy.Query.boost_query(self._query("title", *one), _TITLE_BOOST)) for one in asked
        ]
        for needed in (occur.Must, occur.Should):
            texts = [(needed, self._query("text", *one)) for one in asked]
            found = searcher.search(self._tantivy.Query.boolean_query(texts + titles), limit, count=False).hits
            if found:
                return [int(searcher.doc(address)["row"][0]) for _, address in found]
        return []

    def close(self) -> None:
        self.abort()

    def _opened(self, folder: Path | None) -> Any:
        if folder is None:
            return self._registered(self._tantivy.Index(self._fields))
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        try:
            return self._registered(self._tantivy.Index(self._fields, str(folder)))
        except ValueError:  # damaged, or of another version: filled again from the documents
            shutil.rmtree(folder)
            folder.mkdir(mode=0o700)
            return self._registered(self._tantivy.Index(self._fields, str(folder)))

    def _registered(self, index: Any) -> Any:
        index.register_tokenizer(_TOKENIZER, self._analyzer)
        return index

    def _writing(self) -> Any:
        if self._writer is None:
            self._writer = self._index.writer(_HEAP_BYTES, 1)
        return self._writer

    def _follow(self, db: sqlite3.Connection) -> None:
        """See what another process has written."""
        row = db.execute("SELECT value FROM meta WHERE key = 'generation'").fetchone()
        if row is not None and row[0] != self._generation:
            self._index.reload()
            self._generation = row[0]

    def _query(self, field: str, word: str, tokens: list[str]) -> Any:
        query = self._tantivy.Query
        if len(word) == 1 and is_cjk(word):
            return query.regex_query(self._fields, field, f"{word}.*")
        if len(tokens) == 1:
            return query.term_query(self._fields, field, tokens[0])
        return query.phrase_query(self._fields, field, tokens)


def _analyzer(tantivy: Any) -> Any:
    filters = tantivy.Filter
    builder = tantivy.TextAnalyzerBuilder(tantivy.Tokenizer.simple())
    for step in (filters.remove_long(80), filters.lowercase(), filters.ascii_fold(), filters.stemmer("english")):
        builder = builder.filter(step)
    return builder.build()


def _fields(tantivy: Any) -> Any:
    builder = tantivy.SchemaBuilder()
    builder.add_unsigned_field("row", stored=True, indexed=True, fast=True)
    builder.add_text_field("title", stored=False, tokenizer_name=_TOKENIZER)
    builder.add_text_field("text", stored=False, tokenizer_name=_TOKENIZER)
    return builder.build()
