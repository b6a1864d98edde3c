"""A recorded run can be run again through the real loop, without its model and without its tools."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
from recorded_runs import SCRIPT, Look, events_of, record, record_with
from thinkloop.agent.model import Conversation, Turn
from thinkloop.agent.recorded_model import Divergence, RecordedModel, RecordedTool, recorded_tools
from thinkloop.agent.testing import ScriptedModel
from thinkloop.traces.events import Attachment, Content, ContextEdited, RunFinished, ThinkloopError, ToolResult
from thinkloop.traces.reader import TraceReader


async def play(tools: list[RecordedTool], *words: str) -> list[str]:
    return [(await tools[0].call({"word": word})).content for word in words]


def test_a_recorded_run_gives_the_same_events_again(tmp_path: Path) -> None:
    trace = record(tmp_path / "a")
    again = record_with(tmp_path / "b", RecordedModel(trace), [Look()])
    assert events_of(again) == events_of(trace)


def test_so_it_does_with_recorded_tools(tmp_path: Path) -> None:
    trace = record(tmp_path / "a")
    again = record_with(tmp_path / "b", RecordedModel(trace), [*recorded_tools(trace)])
    assert events_of(again) == events_of(trace)


def test_a_replayed_run_can_be_replayed(tmp_path: Path) -> None:
    trace = record(tmp_path / "a")
    for name in ("b", "c"):
        trace = record_with(tmp_path / name, RecordedModel(trace), [*recorded_tools(trace)])
    assert events_of(trace) == events_of(tmp_path / "a")


def test_reminders_refusals_and_limits_come_out_the_same(tmp_path: Path) -> None:
    again_and_again = [{"calls": [("look", {"word": "mayor"})]}] * 8 + [{"content": "I give up."}]
    trace = record(tmp_path / "a", again_and_again, steps=12)
    again = record_with(tmp_path / "b", RecordedModel(trace), [*recorded_tools(trace)], steps=12)
    assert events_of(again) == events_of(trace)
    assert any("reminder" in event.content for event in events_of(trace) if isinstance(event, ToolResult))


def test_notes_about_limits_are_not_doubled(tmp_path: Path) -> None:
    script = [{"calls": [("look", {"word": f"w{step}"})]} for step in range(4)] + [{"content": "Done."}]
    trace = record(tmp_path / "a", script, steps=5)
    again = record_with(tmp_path / "b", RecordedModel(trace), [*recorded_tools(trace)], steps=5)
    assert events_of(again) == events_of(trace)
    assert any("[note:" in event.content for event in events_of(trace) if isinstance(event, ToolResult))


@pytest.mark.parametrize("policy", ["hide_results", "drop_steps"])
def test_the_context_is_edited_as_it_was(tmp_path: Path, policy: Literal["hide_results", "drop_steps"]) -> None:
    script = [{"calls": [("look", {"word": f"w{step}"})]} for step in range(30)] + [{"content": "Done."}]
    model = ScriptedModel(script, window=1200, context_policy=policy)
    trace = record_with(tmp_path / "a", model, [Look()], steps=60)
    assert policy in {event.policy for event in events_of(trace) if isinstance(event, ContextEdited)}
    again = record_with(tmp_path / "b", RecordedModel(trace), [*recorded_tools(trace)], steps=60)
    assert RecordedModel(trace).context_policy == policy
    assert isinstance(events_of(again)[-1], RunFinished)


def test_results_that_were_cut_to_the_budget_come_as_they_were_shown(tmp_path: Path) -> None:
    trace = record_with(tmp_path / "a", RecordedModel(record(tmp_path / "r")), [Look(budget=40)])
    assert any("left out" in event.content for event in events_of(trace) if isinstance(event, ToolResult))
    again = record_with(tmp_path / "b", RecordedModel(trace), [*recorded_tools(trace)])
    assert events_of(again) == events_of(trace)


def test_arguments_that_were_mended_are_mended_again(tmp_path: Path) -> None:
    trace = record(tmp_path / "a", [{"calls": [("look", '{"word": "mayor",}')]}, {"content": "Ada."}])
    (result,) = [event for event in events_of(trace) if isinstance(event, ToolResult)]
    assert result.record["repaired"] == {"raw": '{"word": "mayor",}', "to": {"word": "mayor"}}
    again = record_with(tmp_path / "b", RecordedModel(trace), [*recorded_tools(trace)])
    assert events_of(again) == events_of(trace)


def test_files_of_results_come_again(tmp_path: Path) -> None:
    trace = record_with(tmp_path / "a", ScriptedModel(SCRIPT), [Look(files=(Attachment("a.png", "image/png", b"1"),))])
    again = record_with(tmp_path / "b", RecordedModel(trace), [*recorded_tools(trace)])
    assert events_of(again) == events_of(trace)
    assert [file.data for event in events_of(again) if isinstance(event, ToolResult) for file in event.files][:1] == [
        b"1"
    ]


@pytest.mark.anyio
async def test_a_call_that_differs_is_an_error_with_both_sides(tmp_path: Path, anyio_backend: str) -> None:
    tools = recorded_tools(await _recorded(tmp_path))
    with pytest.raises(Divergence, match=r'calls look\(\{"word": "king"\}\), .*holds look\(\{"word": "mayor"\}\)'):
        await tools[0].call({"word": "king"})


@pytest.mark.anyio
async def test_calls_of_one_turn_may_come_in_any_order(tmp_path: Path, anyio_backend: str) -> None:
    tools = recorded_tools(await _recorded(tmp_path))
    assert [page.split("\n")[0] for page in await play(tools, "owner", "mayor", "mayor")] == [
        "page of owner", "page of mayor", "page of mayor",
    ]  # fmt: skip


@pytest.mark.anyio
async def test_a_call_of_a_later_turn_is_not_taken_early(tmp_path: Path, anyio_backend: str) -> None:
    tools = recorded_tools(await _recorded(tmp_path))
    with pytest.raises(Divergence):
        await tools[0].call({"word": "bad"})


@pytest.mark.anyio
async def test_one_call_more_than_recorded_is_an_error(tmp_path: Path, anyio_backend: str) -> None:
    tools = recorded_tools(await _recorded(tmp_path))
    await play(tools, "mayor", "owner", "bad", "mayor")
    with pytest.raises(Divergence, match="no further call of look"):
        await tools[0].call({"word": "mayor"})


@pytest.mark.anyio
async def test_one_turn_more_than_recorded_is_an_error(tmp_path: Path, anyio_backend: str) -> None:
    model = RecordedModel(await _recorded(tmp_path))
    for _ in SCRIPT:
        async for _event in model.stream(Conversation(), [], Turn()):
            pass
    with pytest.raises(ThinkloopError, match=r"asks for turn 5, .* holds 4 whole turns"):
        async for _event in model.stream(Conversation(), [], Turn()):
            pass


def test_a_cut_trace_ends_the_run_with_an_error_that_says_so(tmp_path: Path) -> None:
    trace = record(tmp_path / "a")
    lines = (trace / "events.jsonl").read_bytes().splitlines(keepends=True)
    (trace / "events.jsonl").write_bytes(b"".join(lines[:5]))
    again = record_with(tmp_path / "b", RecordedModel(trace), [Look()])
    end = events_of(again)[-1]
    assert isinstance(end, RunFinished)
    assert end.reason == "error"


def test_a_recorded_failure_fails_again(tmp_path: Path) -> None:
    trace = record(tmp_path / "a", [{"content": "Half", "error": "the server is gone"}])
    again = record_with(tmp_path / "b", RecordedModel(trace), [Look()])
    assert events_of(again) == events_of(trace)


def test_a_trace_that_starts_no_run_is_refused(tmp_path: Path) -> None:
    from thinkloop.traces.writer import TraceWriter

    with TraceWriter.create(tmp_path) as writer:
        writer.write(Content(text="x"))
    for reading in (RecordedModel, recorded_tools):
        with pytest.raises(ThinkloopError, match="doesn't begin with the start of a run"):
            reading(tmp_path)
    assert TraceReader.open(tmp_path).problems() == []


async def _recorded(folder: Path) -> Path:
    import anyio.to_thread

    return await anyio.to_thread.run_sync(record, folder / "a")
