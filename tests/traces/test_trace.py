"""What goes into a trace comes out of it, and anything less is noticed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from random import Random
from typing import Any

import pytest
from thinkloop.traces.events import Attachment, Content, Event, Thinking, ToolCall, ToolCallDelta, ToolResult, Unknown
from thinkloop.traces.format import TraceError
from thinkloop.traces.reader import TraceReader
from thinkloop.traces.writer import TraceWriter
from trace_samples import EVERY_TYPE, LONG, write_trace


def read(folder: Path, *, strict: bool = True) -> list[Event]:
    return list(TraceReader.open(folder, strict=strict).events())


def blobs(folder: Path) -> list[Path]:
    return [path for path in (folder / "blobs").rglob("*") if path.is_file()]


def result(content: str) -> ToolResult:
    return ToolResult(call_id="c", name="t", content=content, ok=True)


def test_every_event_type_survives_the_round_trip(tmp_path: Path) -> None:
    trace = write_trace(tmp_path / "t")
    assert read(trace) == EVERY_TYPE
    assert TraceReader.open(trace).problems() == []


def test_records_carry_sequence_and_times(tmp_path: Path) -> None:
    ticks = iter(range(0, 10**9, 1_000_000))
    with TraceWriter.create(tmp_path, clock=lambda: 1000.5, ticks=lambda: next(ticks)) as writer:
        writer.write(Content(text="a"))
        writer.write(result("b"))
    records = list(TraceReader.open(tmp_path))
    assert [(r.seq, r.t, r.mono) for r in records] == [(0, 1000.5, 1000), (1, 1000.5, 2000)]


def test_neighbouring_deltas_are_one_event_and_call_deltas_are_not_stored(tmp_path: Path) -> None:
    deltas = [
        Thinking(text="a"),
        Thinking(text="b"),
        Content(text="c"),
        ToolCallDelta(index=0, name="x"),
        Content(text="d"),
    ]
    write_trace(tmp_path / "t", [*deltas, Thinking(text="e")])
    assert read(tmp_path / "t") == [Thinking(text="ab"), Content(text="cd"), Thinking(text="e")]


def test_flush_writes_held_text(tmp_path: Path) -> None:
    writer = TraceWriter.create(tmp_path)
    writer.write(Thinking(text="half"))
    assert read(tmp_path) == []
    writer.flush()
    assert read(tmp_path) == [Thinking(text="half")]
    writer.close()


def test_a_trace_being_written_can_be_read(tmp_path: Path) -> None:
    with TraceWriter.create(tmp_path) as writer:
        for count, event in enumerate(EVERY_TYPE, 1):
            writer.write(event)
            writer.flush(durable=False)
            assert read(tmp_path) == EVERY_TYPE[:count]


def any_json(random: Random, depth: int = 0) -> Any:
    scalars = (
        None,
        True,
        -1,
        2**70,
        0.1,
        1e300,
        "",
        "$blob",
        "\ud800",
        "\r\n\x00\u2028",
        "ü" * random.choice((1, 3000)),
    )
    kind = random.randrange(6 if depth < 4 else 1)
    if kind < 2:
        return random.choice(scalars)
    items = [any_json(random, depth + 1) for _ in range(random.randrange(4))]
    if kind < 4:
        return items
    return {random.choice(("$blob", "$bytes", "$literal", "bytes", "sha", "", "\ud800")): item for item in items}


def test_any_json_survives(tmp_path: Path) -> None:
    random = Random(0)
    events: list[Event] = [
        ToolResult(call_id=str(n), name="t", content="", ok=True, record={"value": any_json(random)})
        for n in range(2000)
    ]
    assert read(write_trace(tmp_path / "t", events)) == events


def test_arguments_that_look_like_blob_references_stay_arguments(tmp_path: Path) -> None:
    for hostile in (
        {"$blob": "../../etc/passwd", "bytes": 3},
        {"$literal": {"$blob": "0" * 64, "bytes": 1}},
        {"$blob": LONG},
        {"$bytes": "0" * 64, "bytes": 0},
    ):
        event = ToolCall(id="c", name="t", arguments={"deep": [hostile]} | hostile, raw="{}")
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        assert read(write_trace(folder, [event])) == [event]


def test_lone_surrogates_and_line_breaks_survive(tmp_path: Path) -> None:
    events: list[Event] = [result("\ud800 \u2028 \r\n \x00"), result("\udfff" * 5000)]
    assert read(write_trace(tmp_path / "t", events)) == events


def test_what_json_cannot_hold_is_kept_as_its_repr(tmp_path: Path) -> None:
    event = ToolResult(call_id="c", name="t", content="", ok=True, record={"path": Path("x"), "pair": (1, 2)})
    stored = read(write_trace(tmp_path / "t", [event]))[0]
    assert isinstance(stored, ToolResult)
    assert stored.record == {"path": repr(Path("x")), "pair": [1, 2]}


def figure(data: bytes) -> ToolResult:
    return ToolResult(call_id="c", name="t", content="", ok=True, files=[Attachment("a.png", "image/png", data)])


def test_files_are_stored_once_as_they_are(tmp_path: Path) -> None:
    write_trace(tmp_path / "t", [figure(b"\x89PNG\0\xff"), figure(b"\x89PNG\0\xff")])
    assert [path.read_bytes() for path in blobs(tmp_path / "t")] == [b"\x89PNG\0\xff"]


def test_a_lost_file_leaves_an_empty_one_and_is_named(tmp_path: Path) -> None:
    folder = write_trace(tmp_path / "t", [figure(b"\x89PNG")])
    blobs(folder)[0].unlink()
    reader = TraceReader.open(folder, strict=False)
    assert list(reader.events()) == [figure(b"")]
    assert "is missing" in str(reader.problems()[0])


def test_long_strings_are_stored_once(tmp_path: Path) -> None:
    write_trace(tmp_path / "t", [result(LONG), ToolCall(id="c", name="t", arguments={"text": LONG}, raw=LONG)])
    assert [path.read_text() for path in blobs(tmp_path / "t")] == [LONG]
    assert (tmp_path / "t" / "events.jsonl").stat().st_size < 1000


def test_the_limit_for_a_blob_is_4096_bytes(tmp_path: Path) -> None:
    write_trace(tmp_path / "t", [result("x" * 4096), result("é" * 2048)])
    assert blobs(tmp_path / "t") == []
    write_trace(tmp_path / "u", [result("x" * 4097), result("é" * 2049)])
    assert len(blobs(tmp_path / "u")) == 2


def test_size_grows_with_what_is_new(tmp_path: Path) -> None:
    def size(steps: int) -> int:
        folder = write_trace(tmp_path / str(steps), [result(f"{step} {LONG[:2000]}") for step in range(steps)])
        return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())

    assert size(400) < 4.2 * size(100)


def test_an_event_late_in_a_trace_costs_what_an_early_one_does(tmp_path: Path) -> None:
    def seconds(writer: TraceWriter, count: int) -> float:
        start = time.process_time()
        for step in range(count):
            writer.write(result(f"{step} {LONG[:2000]}"))
        return time.process_time() - start

    with TraceWriter.create(tmp_path) as writer:
        seconds(writer, 100)
        early = min(seconds(writer, 200) for _ in range(3))
        seconds(writer, 5000)
        late = min(seconds(writer, 200) for _ in range(3))
    assert late < 2 * early
    assert early / 200 < 0.001


def test_cut_at_any_byte_a_trace_reads_as_a_valid_prefix(tmp_path: Path) -> None:
    folder = write_trace(tmp_path / "t")
    events = folder / "events.jsonl"
    data = events.read_bytes()
    whole = 0
    for cut in range(len(data)):
        events.write_bytes(data[:cut])
        whole = data[:cut].count(b"\n")
        assert read(folder) == EVERY_TYPE[:whole]
        assert (TraceReader.open(folder).torn() > 0) == (cut > 0 and data[cut - 1 : cut] != b"\n")
    assert whole == len(EVERY_TYPE) - 1


@pytest.mark.parametrize("mask", [0x01, 0x20, 0x80, ord("0") ^ ord("\n")])
def test_every_changed_byte_is_noticed(tmp_path: Path, mask: int) -> None:
    folder = write_trace(tmp_path / "t")
    for path in (folder / "events.jsonl", *blobs(folder)):
        data = path.read_bytes()
        # Of a blob, which is hashed whole, a sample will do.
        for position in range(0, len(data), 1 if path.name == "events.jsonl" else 997):
            changed = bytearray(data)
            changed[position] ^= mask
            path.write_bytes(changed)
            reader = TraceReader.open(folder)
            problems = reader.problems()
            assert problems or reader.torn(), position
            if problems:
                with pytest.raises(TraceError, match=f"line {problems[0].line} "):
                    read(folder)
        path.write_bytes(data)


def test_a_lost_line_and_swapped_lines_are_noticed_where_they_are(tmp_path: Path) -> None:
    folder = write_trace(tmp_path / "t")
    lines = (folder / "events.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "events.jsonl").write_bytes(b"".join(lines[:4] + lines[5:]))
    (problem,) = TraceReader.open(folder).problems()
    assert (problem.line, problem.offset) == (5, sum(map(len, lines[:4])))
    assert "event 5 stands where event 4 belongs" in problem.message
    (folder / "events.jsonl").write_bytes(b"".join([*lines[:4], lines[5], lines[4], *lines[6:]]))
    assert [problem.line for problem in TraceReader.open(folder).problems()] == [5, 6, 7]


def test_lenient_reading_skips_the_damage_and_goes_on(tmp_path: Path) -> None:
    folder = write_trace(tmp_path / "t")
    lines = (folder / "events.jsonl").read_bytes().splitlines(keepends=True)
    lines[3] = b"garbage\n"
    (folder / "events.jsonl").write_bytes(b"".join(lines))
    assert read(folder, strict=False) == EVERY_TYPE[:3] + EVERY_TYPE[4:]


def test_a_lost_blob_is_named(tmp_path: Path) -> None:
    folder = write_trace(tmp_path / "t", [result(LONG)])
    shutil.rmtree(folder / "blobs")
    (problem,) = TraceReader.open(folder).problems()
    assert "is missing" in problem.message
    (lost,) = read(folder, strict=False)
    assert isinstance(lost, ToolResult)
    assert lost.content.startswith(f"[lost: {len(LONG.encode())} bytes")


def test_a_newer_format_is_refused_with_what_to_do(tmp_path: Path) -> None:
    folder = write_trace(tmp_path / "t")
    events = folder / "events.jsonl"
    events.write_bytes(events.read_bytes().replace(b'{"v":1,', b'{"v":2,'))
    with pytest.raises(TraceError, match="update thinkloop"):
        read(folder)


def test_events_of_a_newer_version_pass_through(tmp_path: Path) -> None:
    event = Unknown(data={"type": "new_thing", "text": LONG})
    assert read(write_trace(tmp_path / "t", [event])) == [event]


def test_a_line_is_plain_json_for_other_programs(tmp_path: Path) -> None:
    folder = write_trace(tmp_path / "t")
    for line in (folder / "events.jsonl").read_text("utf-8").splitlines():
        assert list(json.loads(line)) == ["v", "seq", "t", "mono", "sum", "event"]


def test_a_folder_with_a_trace_is_refused(tmp_path: Path) -> None:
    folder = write_trace(tmp_path / "t")
    with pytest.raises(TraceError, match=r"already holds a trace.*Name a new folder"):
        TraceWriter.create(folder)
    assert read(folder) == EVERY_TYPE


def test_a_file_in_the_way_and_a_closed_trace_are_errors(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TraceError, match=r"is a file|Not a directory"):
        TraceWriter.create(tmp_path / "file")
    writer = TraceWriter.create(tmp_path / "t")
    writer.close()
    writer.close()
    with pytest.raises(TraceError, match="is closed"):
        writer.write(result("late"))


def test_no_trace_is_an_error_that_says_how_to_find_one(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="trace ls"):
        TraceReader.open(tmp_path)


def test_a_full_disk_is_an_error_and_what_was_written_stays_whole(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    writer = TraceWriter.create(tmp_path)
    writer.write(result("kept"))
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, writer._descriptor)
    os.close(full)
    with pytest.raises(TraceError, match="No space left"):
        writer.write(result("lost"))
    with pytest.raises(TraceError, match="is closed"):
        writer.write(result("lost too"))
    assert read(tmp_path) == [result("kept")]


WRITE_FOREVER = """
import itertools, sys
from thinkloop.traces.events import ToolResult
from thinkloop.traces.writer import TraceWriter
writer = TraceWriter.create(sys.argv[1])
print("ready", flush=True)
for n in itertools.count():
    writer.write(ToolResult(call_id=str(n), name="t", content=f"{n} " * 2000, ok=True))
"""


def test_kill_9_leaves_a_readable_trace(tmp_path: Path) -> None:
    for attempt in range(3):
        folder = tmp_path / str(attempt)
        writer = subprocess.Popen([sys.executable, "-c", WRITE_FOREVER, str(folder)], stdout=subprocess.PIPE)
        assert writer.stdout is not None
        writer.stdout.readline()
        time.sleep(0.05 * (attempt + 1))
        writer.send_signal(signal.SIGKILL)
        writer.communicate()
        events = read(folder)
        assert events
        assert [e.call_id for e in events if isinstance(e, ToolResult)] == [str(n) for n in range(len(events))]
