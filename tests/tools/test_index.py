"""The index on disk: incremental, safe against crashes, damage and other processes, and as exact as a full ranking."""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import closing
from itertools import count
from pathlib import Path
from typing import Literal

import pytest
from thinkloop.tools.corpus import Corpus, CorpusError, index_folder
from thinkloop.tools.index import SCHEMA, Changes
from thinkloop.tools.index_database import Database
from thinkloop.tools.index_fts import BM25

Engine = Literal["sqlite", "tantivy"]
engines = pytest.mark.parametrize("engine", ["sqlite", "tantivy"])
BENCH = Path(__file__).parents[2] / "examples" / "bench_search.py"
clock = count(1_000_000_000)  # seconds; every file that is written gets a time of its own
COMMON = [f"common{letter}" for letter in "abcdef"]


@pytest.fixture(autouse=True)
def _installed(request: pytest.FixtureRequest) -> None:
    if "engine" in request.fixturenames and request.getfixturevalue("engine") == "tantivy":
        pytest.importorskip("tantivy")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "docs").mkdir()
    for name in ("apple", "pear", "plum"):
        write(tmp_path / "docs" / f"{name}.md", f"# {name.title()}\n\nA fruit named {name}.")
    return tmp_path / "docs"


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def write(path: Path, text: str) -> None:
    """Write a file that looks as if it was written long ago."""
    path.write_text(text, encoding="utf-8")
    now = next(clock)
    os.utime(path, (now, now))


def counts(changes: Changes) -> tuple[int, int, int, int]:
    return changes.added, changes.changed, changes.removed, changes.unchanged


def ids(corpus: Corpus, query: str) -> list[str]:
    return [hit.id for hit in corpus.search(query)]


def database(cache: Path) -> Path:
    return next(cache.glob("*.db"))


@engines
def test_only_what_changed_is_read_again(folder: Path, cache: Path, engine: Engine) -> None:
    with closing(Corpus(folder, cache=cache, engine=engine)) as corpus:
        assert counts(corpus.changes) == (3, 0, 0, 0)
    write(folder / "pear.md", "# Pear\n\nA fruit of the rose family.")
    os.utime(folder / "apple.md")  # touched, not changed
    (folder / "plum.md").unlink()
    write(folder / "fig.md", "# Fig")
    read: list[tuple[int, int]] = []
    with closing(Corpus(folder, cache=cache, engine=engine, progress=lambda *state: read.append(state))) as corpus:
        assert counts(corpus.changes) == (1, 1, 1, 1)
        assert read == [(0, 3), (1, 3), (2, 3), (3, 3)]
        assert (ids(corpus, "rose"), ids(corpus, "fig"), ids(corpus, "plum")) == (["pear.md"], ["fig.md"], [])
        assert ids(corpus, "named") == ["apple.md"]
        assert corpus.document("plum.md") is None
        write(folder / "plum.md", "# Plum is back")
        assert counts(corpus.update()) == (1, 0, 0, 3)
        assert ids(corpus, "back") == ["plum.md"]


def test_a_changed_line_of_json_lines_is_one_changed_document(tmp_path: Path, cache: Path) -> None:
    rows = [{"title": f"Row {number}", "text": "text"} for number in range(100)]
    file = tmp_path / "docs" / "rows.jsonl"
    file.parent.mkdir()
    write(file, "\n".join(map(json.dumps, rows)))
    with closing(Corpus(file.parent, cache=cache)) as corpus:
        rows[50]["text"] = "unlike"
        write(file, "\n".join(map(json.dumps, rows[:90])))
        assert counts(corpus.update()) == (0, 1, 10, 89)
        assert ids(corpus, "unlike") == ["rows.jsonl#51"]


def test_a_file_written_twice_in_one_tick_of_the_clock_is_seen(folder: Path, cache: Path) -> None:
    file = folder / "new.md"
    file.write_text("first")
    time = file.stat().st_mtime_ns
    with closing(Corpus(folder, cache=cache)) as corpus:
        file.write_text("other")
        os.utime(file, ns=(time, time))
        assert corpus.update().changed == 1
        assert ids(corpus, "other") == ["new.md"]


def test_little_stays_in_memory_and_much_goes_to_the_cache_folder(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    Corpus(folder).close()
    assert not (tmp_path / "home").exists()
    assert counts(index_folder(folder)) == (3, 0, 0, 0)  # asked for
    place = tmp_path / "home" / "thinkloop" / "index"
    assert stat.S_IMODE(place.stat().st_mode) == 0o700
    assert {stat.S_IMODE(file.stat().st_mode) for file in place.iterdir()} == {0o600}
    with closing(Corpus(folder)) as corpus:
        assert counts(corpus.changes) == (0, 0, 0, 3)  # what is there is used
    (tmp_path / "large").mkdir()
    for part in range(2):
        write(tmp_path / "large" / f"{part}.txt", "many words " * 400_000)
    with closing(Corpus(tmp_path / "large")) as corpus:
        assert len(list(place.glob("*.db"))) == 2
        assert len(corpus) == 2


@pytest.mark.parametrize("place", ["file/below", "locked"])
def test_without_a_place_for_the_index_it_stays_in_memory_and_says_so(folder: Path, tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("not a folder")
    (tmp_path / "locked").mkdir(0o500)
    if place == "locked" and os.geteuid() == 0:
        pytest.skip("root writes everywhere")
    with closing(Corpus(folder, cache=tmp_path / place)) as corpus:
        assert "in memory" in corpus.note
        assert ids(corpus, "pear") == ["pear.md"]


def spoil_head(file: Path) -> None:
    file.write_bytes(b"this is no database at all" * 1000)


def spoil_middle(file: Path) -> None:
    size = file.stat().st_size
    with file.open("r+b") as stream:
        stream.seek(4096)
        stream.write(random.Random(1).randbytes(size - 4096))


def cut_short(file: Path) -> None:
    with file.open("r+b") as stream:
        stream.truncate(file.stat().st_size // 2)


def replace_by_another(file: Path) -> None:
    file.unlink()
    with closing(sqlite3.connect(file)) as db:
        db.execute("CREATE TABLE documents (id, title)")


def make_empty(file: Path) -> None:
    file.write_bytes(b"")


@engines
@pytest.mark.parametrize("spoil", [spoil_head, spoil_middle, cut_short, replace_by_another, make_empty])
def test_a_damaged_or_foreign_file_is_built_again(
    folder: Path, cache: Path, spoil: Callable[[Path], None], engine: Engine
) -> None:
    Corpus(folder, cache=cache, engine=engine).close()
    spoil(database(cache))
    with closing(Corpus(folder, cache=cache, engine=engine)) as corpus:
        assert len(corpus) == 3
        assert ids(corpus, "pear") == ["pear.md"]
        assert corpus.note == ""
    with closing(Corpus(folder, cache=cache, engine=engine)) as corpus:
        assert counts(corpus.changes) == (0, 0, 0, 3)


@pytest.mark.parametrize("spoil", [spoil_head, spoil_middle, cut_short, replace_by_another, Path.unlink])
def test_damage_while_it_is_open_does_not_reach_the_answers(
    folder: Path, cache: Path, spoil: Callable[[Path], None]
) -> None:
    Corpus(folder, cache=cache).close()
    with closing(Corpus(folder, cache=cache)) as corpus:
        spoil(database(cache))
        for _ in range(2):
            assert ids(corpus, "pear") == ["pear.md"]
            assert corpus.document("plum.md") is not None


def test_a_lost_tantivy_folder_is_filled_again(folder: Path, cache: Path) -> None:
    tantivy = pytest.importorskip("tantivy")
    Corpus(folder, cache=cache, engine="tantivy").close()
    place = next(cache.glob("*.tantivy"))
    for file in place.iterdir():
        file.unlink()
    with closing(Corpus(folder, cache=cache, engine="tantivy")) as corpus:
        assert ids(corpus, "pear") == ["pear.md"]
        assert counts(corpus.changes) == (0, 0, 0, 3)
    assert tantivy.Index.exists(str(place))


KILLED = """
import os, signal, sys
from pathlib import Path
from thinkloop.tools.corpus import Corpus
def progress(done, total):
    if done == 30:
        os.kill(os.getpid(), signal.SIGKILL)
Corpus(Path(sys.argv[1]), cache=Path(sys.argv[2]), engine=sys.argv[3], progress=progress)
"""


@engines
def test_a_kill_in_the_middle_leaves_the_old_index(folder: Path, cache: Path, engine: Engine) -> None:
    Corpus(folder, cache=cache, engine=engine).close()
    for number in range(60):
        write(folder / f"n{number:02}.md", f"# New {number}\n\nfresh text")
    (folder / "pear.md").unlink()
    died = subprocess.run([sys.executable, "-c", KILLED, str(folder), str(cache), engine], timeout=60, check=False)
    assert died.returncode == -signal.SIGKILL
    with closing(sqlite3.connect(database(cache))) as db:
        assert db.execute("SELECT count(*) FROM documents").fetchone() == (3,)
    with closing(Corpus(folder, cache=cache, engine=engine)) as corpus:
        assert counts(corpus.changes) == (60, 0, 1, 2)
        assert len(corpus.search("fresh", 100)) == 60
        assert ids(corpus, "pear") == []


OPENED = """
import sys
from pathlib import Path
from thinkloop.tools.corpus import Corpus
corpus = Corpus(Path(sys.argv[1]), cache=Path(sys.argv[2]), engine=sys.argv[3])
print(len(corpus), len(corpus.search("fresh", 100)), corpus.note)
"""


@engines
def test_processes_that_start_together_share_one_index(folder: Path, cache: Path, engine: Engine) -> None:
    for number in range(50):
        write(folder / f"n{number:02}.md", f"# New {number}\n\nfresh text")
    command = [sys.executable, "-c", OPENED, str(folder), str(cache), engine]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for _ in range(4)]
    said = [process.communicate(timeout=60)[0].strip() for process in running]
    assert said == ["53 50"] * 4
    assert len(list(cache.glob("*.db"))) == 1


@engines
def test_readers_go_on_while_an_update_is_written(folder: Path, cache: Path, engine: Engine) -> None:
    with (
        closing(Corpus(folder, cache=cache, engine=engine)) as writer,
        closing(Corpus(folder, cache=cache, engine=engine)) as reader,
    ):
        (folder / "pear.md").unlink()
        write(folder / "fig.md", "# Fig")
        write(folder / "kiwi.md", "# Kiwi")
        seen: list[list[str]] = []
        writer.update(lambda done, total: seen.extend([ids(reader, "pear"), ids(writer, "fig")]))
        assert seen == [["pear.md"], []] * 3  # the state before
        assert (ids(reader, "pear"), ids(reader, "fig")) == ([], ["fig.md"])


def test_an_error_in_an_update_leaves_the_old_index(folder: Path, cache: Path) -> None:
    def stop(done: int, total: int) -> None:
        if done == 1:
            raise KeyboardInterrupt

    with closing(Corpus(folder, cache=cache)) as corpus:
        for name in ("fig", "kiwi"):
            write(folder / f"{name}.md", f"# {name}")
        with pytest.raises(KeyboardInterrupt):
            corpus.update(stop)
        assert len(corpus) == 3
        assert counts(corpus.update()) == (2, 0, 0, 3)


def test_a_folder_that_is_gone_is_an_error_and_not_an_empty_index(folder: Path, cache: Path) -> None:
    with closing(Corpus(folder, cache=cache)) as corpus:
        folder.rename(folder.with_name("moved"))
        with pytest.raises(CorpusError, match="does not exist"):
            corpus.update()
        assert ids(corpus, "pear") == ["pear.md"]


@engines
def test_threads_search_while_it_changes(folder: Path, cache: Path, engine: Engine) -> None:
    wrong: list[object] = []
    with closing(Corpus(folder, cache=cache, engine=engine)) as corpus:

        def look() -> None:
            for _ in range(60):
                try:
                    if ids(corpus, "apple") != ["apple.md"] or corpus.document("apple.md") is None:
                        wrong.append("nothing found")
                except Exception as error:
                    wrong.append(error)

        threads = [threading.Thread(target=look) for _ in range(6)]
        for thread in threads:
            thread.start()
        for number in range(6):
            write(folder / "fig.md", f"# Fig {number}")
            assert corpus.update().seconds < 30
        for thread in threads:
            thread.join()
    assert wrong == []


def large(folder: Path, documents: int, seed: int) -> None:
    """Documents of common words, one rarer word and one of their own."""
    rng = random.Random(seed)
    texts = [
        " ".join(
            [*rng.choices(COMMON, weights=[32, 16, 8, 4, 2, 1], k=rng.randrange(3, 40)), f"rare{rng.randrange(60)}"]
        )
        for _ in range(documents)
    ]
    rows = [json.dumps({"title": f"own{number}", "text": text}) for number, text in enumerate(texts)]
    folder.mkdir(exist_ok=True)
    write(folder / "rows.jsonl", "\n".join(rows))


def assert_exact(corpus: Corpus, file: Path) -> None:
    """The best documents have the scores that FTS5 gives the best documents."""
    rng = random.Random(9)
    words = [*COMMON, "rare7", "rare8", "absent", "own5"]
    with closing(sqlite3.connect(file)) as db:
        for _ in range(60):
            query = rng.choices(words, k=rng.randrange(1, 6))
            for joiner in (" ", " OR "):
                rows = db.execute(
                    f"SELECT d.id, -{BM25} FROM words JOIN documents d ON d.row = words.rowid WHERE words MATCH ?",
                    (joiner.join(query),),
                )
                exact = dict(rows.fetchall())
                if exact:
                    break
            found = [exact.get(hit.id, -1.0) for hit in corpus.search(" ".join(query), 10)]
            best = sorted(exact.values(), reverse=True)[:10]
            assert found == pytest.approx(best, rel=1e-2, abs=1e-5), query


def test_common_words_rank_as_in_a_full_ranking_also_after_changes(tmp_path: Path, cache: Path) -> None:
    large(tmp_path / "docs", 2200, seed=1)
    with closing(Corpus(tmp_path / "docs", cache=cache)) as corpus:
        with closing(sqlite3.connect(database(cache))) as db:
            assert {row[0] for row in db.execute("SELECT term FROM common")} >= set(COMMON[:4])
        assert_exact(corpus, database(cache))
        rows = (tmp_path / "docs" / "rows.jsonl").read_text().split("\n")
        rows[7] = json.dumps({"title": "own7", "text": "commona commonf " * 20})
        write(tmp_path / "docs" / "rows.jsonl", "\n".join(rows[:2190]))
        write(tmp_path / "docs" / "more.md", "# commonf commonf\n\nrare7 commonb")
        assert counts(corpus.update()) == (1, 1, 10, 2189)
        assert_exact(corpus, database(cache))
        large(tmp_path / "docs", 2800, seed=2)
        corpus.update()
        assert_exact(corpus, database(cache))


def test_a_stem_whose_own_stem_differs_is_common_too(tmp_path: Path, cache: Path) -> None:
    rows = [json.dumps({"id": str(number), "text": f"because {number % 7}"}) for number in range(2500)]
    (tmp_path / "docs").mkdir()
    write(tmp_path / "docs" / "rows.jsonl", "\n".join(rows))
    with closing(Corpus(tmp_path / "docs", cache=cache)) as corpus:
        with closing(sqlite3.connect(database(cache))) as db:
            assert db.execute("SELECT length(rows) FROM common WHERE term = 'becaus'").fetchone() == (4 * 2500,)
        assert len(corpus.search("because 3", 500)) == 357


def test_row_numbers_stay_close_to_the_number_of_documents(tmp_path: Path, cache: Path) -> None:
    rows = [{"id": str(number), "text": "first"} for number in range(300)]
    (tmp_path / "docs").mkdir()
    for turn in range(9):
        write(tmp_path / "docs" / "rows.jsonl", "\n".join(json.dumps(row | {"text": f"turn {turn}"}) for row in rows))
        Corpus(tmp_path / "docs", cache=cache).close()
    with closing(sqlite3.connect(database(cache))) as db:
        assert db.execute("SELECT max(row) FROM documents").fetchone()[0] <= 2_200 + 300
    with closing(Corpus(tmp_path / "docs", cache=cache)) as corpus:
        assert len(corpus.search("turn 8", 10)) == 10
        assert corpus.search("turn 7", 1)[0].text != "turn 7"


def test_a_statement_that_takes_too_long_is_stopped() -> None:
    endless = "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) SELECT count(*) FROM n"
    with closing(Database(None, "", SCHEMA)) as memory:
        with pytest.raises(sqlite3.OperationalError, match="interrupted"), memory.reading(0.05) as db:
            db.execute(endless).fetchone()
        with memory.reading() as db:
            assert db.execute("SELECT count(*) FROM files").fetchone() == (0,)


@engines
def test_both_engines_have_the_same_documents_and_lines(folder: Path, cache: Path, engine: Engine) -> None:
    with closing(Corpus(folder, cache=cache, engine=engine)) as corpus:
        hit = corpus.search("fruit named plum")[0]
        assert (hit.id, hit.title, hit.line, hit.text) == ("plum.md", "Plum", 3, "A fruit named plum.")
        assert {found.id for found in corpus.search("fruits nothing")} == {"apple.md", "pear.md", "plum.md"}
        assert ids(corpus, "Apple") == ["apple.md"]


def test_the_bench_runs() -> None:
    command = [sys.executable, str(BENCH), "--documents", "2000", "--queries", "16"]
    printed = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    rows = [line for line in printed.split("\n") if "  sqlite  " in line]
    assert len(rows) == 6
    assert all(float(row.split()[-2]) >= 95 for row in rows)
