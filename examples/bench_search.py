"""How fast the local corpus answers, and whether it finds what a full ranking finds.

    python examples/bench_search.py --documents 100000

Makes documents of words that are as frequent as in a language (Zipf's law), indexes them with SQLite FTS5 and, where it is
installed, tantivy, and asks queries of one to eight words. Prints the time to build, sizes, p50 and p95 of each kind of
query, and how many of the ten best documents are the same as in FTS5's own full ranking, which takes 100 ms and more.
"""

from __future__ import annotations

import argparse
import json
import random
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from thinkloop.tools.corpus import Corpus
from thinkloop.tools.index_fts import BM25

SYLLABLES = [c + v for c in "bdfghklmnprstvz" for v in "aeiou"] + ["an", "er", "in", "on", "al", "es", "us", "or"]
VOCABULARY = 80_000
SHARD = 1_000  # documents in one file
EXACT = (
    f"SELECT d.id FROM words JOIN documents d ON d.row = words.rowid WHERE words MATCH ? ORDER BY {BM25}, d.id LIMIT 10"
)


def make_words(rng: np.random.Generator) -> list[str]:
    """Different made-up words, the frequent ones short."""
    words: dict[str, None] = {}
    while len(words) < VOCABULARY:
        syllables = 1 + int(rng.integers(0, 1 + min(4, len(words) // 20 + 1)))
        words["".join(SYLLABLES[at] for at in rng.integers(0, len(SYLLABLES), syllables))] = None
    return list(words)


def make_documents(words: list[str], count: int, rng: np.random.Generator) -> Iterator[dict[str, str]]:
    """Texts of 70 words on average, each about three words that come up again and make its title."""
    share = np.cumsum(1 / np.arange(1, VOCABULARY + 1))
    for number in range(count):
        length = max(10, int(rng.lognormal(4.0, 0.6)))
        ranks = np.searchsorted(share, rng.random(length) * share[-1])
        topic = rng.choice(ranks, 3)
        ranks = np.concatenate([ranks, np.repeat(topic, 3)])
        lines = [" ".join(words[rank] for rank in ranks[at : at + 12]) for at in range(0, len(ranks), 12)]
        yield {"id": str(number), "title": " ".join(words[rank] for rank in topic), "text": "\n".join(lines)}


def write(folder: Path, words: list[str], count: int) -> float:
    """Write the documents as JSON lines; returns their size in MB."""
    shard: list[str] = []
    for number, document in enumerate(make_documents(words, count, np.random.default_rng(2)), 1):
        shard.append(json.dumps(document))
        if number % SHARD == 0 or number == count:
            (folder / f"{number:07}.jsonl").write_text("\n".join(shard), encoding="utf-8")
            shard = []
    return sum(file.stat().st_size for file in folder.iterdir()) / 1e6


def mixes(words: list[str]) -> dict[str, Callable[[random.Random, int], list[str]]]:
    """Kinds of queries: each gives a number of words."""

    def between(low: int, high: int) -> Callable[[random.Random, int], list[str]]:
        return lambda rng, count: [words[rng.randrange(low, high)] for _ in range(count)]

    return {
        "most common": between(0, 30),
        "common": between(30, 1_000),
        "medium": between(300, 5_000),
        "rare, names": between(5_000, 60_000),
        "as in text": lambda rng, count: [words[int(VOCABULARY ** rng.random()) - 1] for _ in range(count)],
        "common and rare": lambda rng, count: [words[rng.randrange(300 if at % 2 else 40_000)] for at in range(count)],
    }


def asked(words: list[str], count: int) -> dict[str, list[str]]:
    rng = random.Random(3)
    return {
        name: [" ".join(make(rng, 1 + number % 8)) for number in range(count)] for name, make in mixes(words).items()
    }


def timed(corpus: Corpus, queries: list[str]) -> tuple[list[float], list[list[str]]]:
    """Milliseconds for five results of each query, and ids of the ten best."""
    taken = []
    for query in queries:
        start = time.perf_counter()
        corpus.search(query)
        taken.append((time.perf_counter() - start) * 1e3)
    return taken, [[hit.id for hit in corpus.search(query, 10)] for query in queries]


def exact(database: Path, queries: list[str]) -> tuple[list[float], list[list[str]]]:
    """The same by FTS5's own full ranking."""
    taken, found = [], []
    with sqlite3.connect(database) as db:
        for query in queries:
            start = time.perf_counter()
            quoted = [f'"{word}"' for word in query.split()]
            rows = (
                db.execute(EXACT, (" ".join(quoted),)).fetchall()
                or db.execute(EXACT, (" OR ".join(quoted),)).fetchall()
            )
            taken.append((time.perf_counter() - start) * 1e3)
            found.append([row[0] for row in rows])
    db.close()
    return taken, found


def overlap(ours: list[list[str]], theirs: list[list[str]]) -> float:
    """Mean share of the ten best that are among the other ten, in percent."""
    shares = [len({*one} & {*other}) / len(other) for one, other in zip(ours, theirs, strict=True) if other]
    return 100 * statistics.fmean(shares) if shares else 100.0


def percentiles(taken: list[float]) -> str:
    ordered = sorted(taken)
    return f"{ordered[len(ordered) // 2]:8.2f} {ordered[int(len(ordered) * 0.95)]:8.2f} {ordered[-1]:8.2f}"


def build(folder: Path, cache: Path, engine: str) -> Corpus:
    corpus = Corpus(folder, cache=cache, engine=engine)  # type: ignore[arg-type]  # checked there
    size = sum(file.stat().st_size for file in cache.rglob("*") if file.is_file()) / 1e6
    print(f"{engine}: {len(corpus):,} documents indexed in {corpus.changes.seconds:.1f} s, {size:.0f} MB on disk")
    start = time.perf_counter()
    corpus.update()
    print(f"{engine}: nothing to do in {(time.perf_counter() - start) * 1e3:.1f} ms")
    shard = sorted(folder.iterdir())[0]
    lines = shard.read_text(encoding="utf-8").split("\n")
    shard.write_text("\n".join([lines[0].replace('"text": "', '"text": "changed '), *lines[1:]]), encoding="utf-8")
    print(f"{engine}: one document changed in {corpus.update().seconds * 1e3:.0f} ms")
    shard.write_text("\n".join(lines), encoding="utf-8")
    corpus.update()
    return corpus


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=100_000)
    parser.add_argument("--queries", type=int, default=300, help="of each kind")
    arguments = parser.parse_args()
    words = make_words(np.random.default_rng(1))
    queries = asked(words, arguments.queries)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "documents")
        folder.mkdir()
        print(f"{arguments.documents:,} documents, {write(folder, words, arguments.documents):.1f} MB, seed 2")
        engines = ["sqlite"] + ["tantivy"] * bool(find_spec("tantivy"))
        corpora = {engine: build(folder, Path(scratch, engine), engine) for engine in engines}
        database = next(Path(scratch, "sqlite").glob("*.db"))
        print(
            f"\n{'queries of 1 to 8 words':24} {'ranked by':10} {'p50 ms':>8} {'p95 ms':>8} {'max ms':>8}  same top ten"
        )
        for name, some in queries.items():
            taken, best = exact(database, some)
            print(f"{name:24} {'full bm25':10} {percentiles(taken)}")
            for engine, corpus in corpora.items():
                taken, found = timed(corpus, some)
                print(f"{'':24} {engine:10} {percentiles(taken)} {overlap(found, best):10.1f} %")
        for corpus in corpora.values():
            corpus.close()


if __name__ == "__main__":
    main()
