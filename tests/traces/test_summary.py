"""A trace's summary says what was asked and how it went, whole or cut."""

from __future__ import annotations

from pathlib import Path

import pytest
from thinkloop.traces.events import RunFinished
from thinkloop.traces.format import TraceError
from thinkloop.traces.summary import list_traces, summarize
from trace_samples import EVERY_TYPE, LONG, write_trace


def test_a_finished_run(tmp_path: Path) -> None:
    summary = summarize(write_trace(tmp_path / "t"))
    assert (summary.task, summary.model, summary.reason) == ("Who is the mayor?", "mini", "answered")
    assert (summary.steps, summary.tokens, summary.seconds, summary.answer) == (1, 7, 0.6, "Ada")


def test_a_long_answer_comes_from_its_blob(tmp_path: Path) -> None:
    end = RunFinished(answer=LONG, reason="steps", steps=3, usage={})
    assert summarize(write_trace(tmp_path / "t", [*EVERY_TYPE, end])).answer == LONG


def test_a_long_last_line_is_found(tmp_path: Path) -> None:
    end = RunFinished(answer="x", reason="steps", steps=3, usage={}, sources=[f"page-{n}.md" for n in range(20_000)])
    assert summarize(write_trace(tmp_path / "t", [*EVERY_TYPE, end])).reason == "steps"


def test_a_cut_run_is_unfinished_and_counts_what_is_there(tmp_path: Path) -> None:
    folder = write_trace(tmp_path / "t")
    data = (folder / "events.jsonl").read_bytes()
    (folder / "events.jsonl").write_bytes(data[:-10])
    summary = summarize(folder)
    assert (summary.reason, summary.steps, summary.tokens, summary.answer) == ("unfinished", 1, 7, "")


def test_an_empty_trace_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").touch()
    with pytest.raises(TraceError, match="cut before its first event"):
        summarize(tmp_path)


def test_a_folder_of_traces_is_listed_in_order_of_time(tmp_path: Path) -> None:
    write_trace(tmp_path / "z")
    write_trace(tmp_path / "a")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "events.jsonl").write_text("")
    (tmp_path / "notes.txt").write_text("not a trace")
    assert [summary.folder.name for summary in list_traces(tmp_path)] == ["z", "a"]


def test_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="There is no folder"):
        list(list_traces(tmp_path / "nowhere"))
