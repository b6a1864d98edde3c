"""The loop: thinking is kept, nothing a call does kills a run, every run ends with an answer and a reason."""

import resource
from collections.abc import AsyncIterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import anyio
import pytest
from loop_tools import ANSWER, SmallTool, echo, ran, says, sleep
from thinkloop.agent.agent import Agent
from thinkloop.agent.context import Context
from thinkloop.agent.limits import Limits
from thinkloop.agent.loop import Loop
from thinkloop.agent.testing import ChaosModel, ScriptedModel
from thinkloop.agent.turn import RESTARTED
from thinkloop.tools.tool import Output, ToolError
from thinkloop.traces.events import (
    Content,
    Error,
    Event,
    LimitReached,
    RunFinished,
    RunStarted,
    StepFinished,
    StepStarted,
    Thinking,
    ThinkloopError,
    ToolCall,
    ToolResult,
    Usage,
)
from thinkloop.traces.reader import TraceReader

pytestmark = pytest.mark.anyio


async def test_a_run_goes_from_task_to_answer_and_says_why_it_ended() -> None:
    run = await ran([says("echo", "a"), ANSWER], [echo()])
    assert isinstance(run.events[0], RunStarted)
    assert [event.step for event in run.of(StepStarted)] == [event.step for event in run.of(StepFinished)] == [1, 2]
    assert run.results == ["you said a"]
    assert (run.end.answer, run.end.reason, run.end.steps) == ("The answer.", "answered", 2)
    run.model.assert_complete()


async def test_thinking_is_kept_across_calls_even_when_empty() -> None:
    run = await ran([says("echo", "a"), {"calls": [("echo", '{"text": "b"}')]}, ANSWER], [echo()])
    first, second = (message for message in run.model.conversations[-1] if message["role"] == "assistant")
    assert first["reasoning_content"] == "I call echo."
    assert second["reasoning_content"] == ""
    assert second["tool_calls"] == [
        {"id": "functions.echo:1", "type": "function", "function": {"name": "echo", "arguments": '{"text": "b"}'}}
    ]


async def test_sampled_token_ids_stay_with_their_message() -> None:
    run = await ran([says("echo", "a") | {"token_ids": [5, 6, 7]}, ANSWER], [echo()])
    assert run.model.conversations[-1][2]["token_ids"] == [5, 6, 7]


async def test_the_conversation_only_grows() -> None:
    """Each turn's messages begin with exactly those of the turn before, warnings, nudges and last step included."""
    script = [says("echo", str(n)) for n in range(4)] + [
        {"thinking": "?"},
        says("nope", "x"),
        says("echo", "z"),
        ANSWER,
    ]
    run = await ran(script, [echo()], limits=Limits(steps=8))
    seen = run.model.conversations
    assert len(seen) == 8
    assert all(later[: len(earlier)] == earlier for earlier, later in pairwise(seen))


BAD_CALLS = {
    "unknown tool": (
        ("ocho", {"text": "a"}),
        'error: there is no tool "ocho"; the tools are echo, fails, breaks, sleep',
    ),
    "malformed JSON": (
        ("echo", '{"text": a}'),
        "error: this call of echo could not be read: the arguments are not JSON",
    ),
    "not an object": (
        ("echo", "[1]"),
        "error: this call of echo could not be read: the arguments are not a JSON object",
    ),
    "truncated": (("echo", '{"text": "a'), "error: this call of echo could not be read: the arguments are not JSON"),
    "wrong type": (("echo", {"text": 1}), "error: the arguments don't fit echo: "),
    "missing argument": (("echo", {}), "error: the arguments don't fit echo: "),
    "tool error": (("fails", {"text": "a"}), "error: no page called a"),
    "exception": (
        ("breaks", {"text": "a"}),
        "error: breaks failed: ZeroDivisionError: integer division or modulo by zero",
    ),
    "exit": (("breaks", {"text": "exit"}), "error: breaks failed: SystemExit: 3"),
    "deadline": (("sleep", {"text": "9"}), "error: sleep took longer than its deadline of 0.02 s and was stopped"),
}


async def _fails(text: str) -> str:
    raise ToolError(f"no page called {text}")


async def _breaks(text: str) -> str:
    if text == "exit":
        raise SystemExit(3)
    return str(1 // len(text.strip(text)))


@pytest.mark.parametrize("kind", BAD_CALLS)
async def test_a_bad_call_is_told_and_survived(kind: str) -> None:
    call, told = BAD_CALLS[kind]
    tools = [echo(), SmallTool("fails", _fails), SmallTool("breaks", _breaks), sleep(deadline=0.02)]
    run = await ran([{"calls": [call]}, says("echo", "a"), ANSWER], tools)
    assert run.results[0].startswith(told)
    assert not run.of(ToolResult)[0].ok
    assert run.results[1] == "you said a"
    assert run.end.reason == "answered"


async def test_a_bad_call_is_recorded_raw() -> None:
    run = await ran([{"calls": [("echo", '{"text": "a')]}, ANSWER], [echo()])
    call = run.of(ToolCall)[0]
    assert (call.raw, call.arguments) == ('{"text": "a', None)
    assert run.model.conversations[-1][2]["tool_calls"][0]["function"]["arguments"] == '{"text": "a'


async def test_a_tool_that_gives_no_output_is_told_as_broken() -> None:
    class Wrong(SmallTool):
        async def call(self, arguments: object) -> str:  # type: ignore[override]  # the mistake under test
            return "plain"

    run = await ran([says("wrong", "a"), ANSWER], [Wrong("wrong", _fails)])
    assert run.results == ["error: wrong failed: TypeError: a tool must give an `Output`, not str"]


async def test_bad_turns_in_a_row_lead_to_the_answer() -> None:
    script = [{"calls": [("echo", f"{{{n}")]} for n in range(5)] + [ANSWER]
    run = await ran(script, [echo()])
    assert (run.end.answer, run.end.reason, run.end.steps) == ("The answer.", "bad_calls", 6)
    assert run.model.turns[-1].tool_choice == "none"


async def test_a_good_call_between_bad_ones_starts_the_count_again() -> None:
    bad = [{"calls": [("echo", f"{{{n}")]} for n in range(8)]
    run = await ran([*bad[:4], says("echo", "a"), *bad[4:], ANSWER], [echo()])
    assert run.end.reason == "answered"


async def test_what_a_tool_refuses_on_purpose_is_no_bad_call() -> None:
    run = await ran([*(says("fails", str(n)) for n in range(7)), ANSWER], [SmallTool("fails", _fails)])
    assert run.end.reason == "answered"


@pytest.mark.parametrize("empty", [{"thinking": "Hm."}, {}, {"content": " \n"}])
async def test_an_empty_turn_is_nudged(empty: dict[str, str]) -> None:
    run = await ran([empty, ANSWER])
    assert run.model.conversations[1][-1]["role"] == "user"
    assert "neither an answer nor a call" in run.model.conversations[1][-1]["content"]
    assert run.of(Error)[0].recovered
    assert run.end.reason == "answered"


async def test_empty_turns_are_bounded() -> None:
    run = await ran([{"thinking": "Hm."}] * 3 + [ANSWER])
    assert (run.end.reason, run.end.steps, run.end.answer) == ("bad_calls", 4, "The answer.")


async def test_an_answer_cut_off_is_not_taken_for_whole() -> None:
    run = await ran([{"content": "The ans", "reason": "length"}, ANSWER])
    assert run.end.answer == "The answer."
    assert "cut off" in run.model.conversations[1][-1]["content"]


async def test_cut_off_text_is_better_than_nothing() -> None:
    run = await ran([{"content": "The ans", "reason": "length"}, {}, {}, {}])
    assert (run.end.answer, run.end.reason) == ("The ans", "bad_calls")


async def test_chaos_never_kills_a_run() -> None:
    for seed in range(20):
        script = [says("echo", f"{seed} {n}") for n in range(30)] + [ANSWER]
        chaos = ChaosModel(ScriptedModel(script), seed, rate=0.7)
        run = await ran(chaos, [echo()])
        assert chaos.spoiled > 0
        assert isinstance(run.end, RunFinished)
        assert run.end.reason in ("answered", "bad_calls")
        assert len(run.of(ToolResult)) == len(run.of(ToolCall))


async def test_a_model_error_ends_the_run_with_what_there_is() -> None:
    script = [says("echo", "a") | {"content": "So far: a."}, {"thinking": "x", "error": "the server is down"}]
    run = await ran(script, [echo()])
    assert (run.of(Error)[0].message, run.of(Error)[0].recovered) == ("the server is down", False)
    assert (run.end.answer, run.end.reason) == ("So far: a.", "error")


async def test_a_model_error_is_in_the_result() -> None:
    agent = Agent(ScriptedModel([{"error": "the server is down"}]), trace=False)
    result = await agent.run("Find out.")
    assert (result.answer, result.reason, result.error) == ("", "error", "the server is down")


async def test_a_call_written_before_the_model_broke_off_gets_an_honest_result() -> None:
    run = await ran([says("echo", "a") | {"error": "gone"}], [echo()])
    assert run.results == ["error: not run: the model's turn broke off"]


async def test_a_turn_that_its_model_begins_again_counts_once() -> None:
    class Restarting(ScriptedModel):
        async def stream(self, *given: Any) -> AsyncIterator[Event]:
            yield Thinking(text="lost")
            yield Content(text="lost")
            yield ToolCall(id="functions.echo:0", name="echo", arguments={"text": "lost"}, raw="")
            yield Error(where=RESTARTED, message="the server cut the stream", recovered=True)
            async for event in super().stream(*given):
                yield event

    run = await ran(Restarting([says("echo", "a"), ANSWER]), [echo()])
    assert run.results == ["you said a"]
    assert run.model.conversations[-1][2]["reasoning_content"] == "I call echo."
    assert run.end.answer == "The answer."


async def test_a_bug_in_a_model_is_recorded_and_not_hidden(tmp_path: Path) -> None:
    agent = Agent(ScriptedModel([{"error": ValueError("shape")}]), trace=tmp_path / "t")
    with pytest.raises(ValueError, match="shape"):
        await agent.run("Find out.")
    assert _ended(tmp_path / "t").reason == "error"


async def test_usage_is_summed() -> None:
    run = await ran(
        [
            says("echo", "a") | {"usage": {"completion_tokens": 7, "cost": 0.5}},
            ANSWER | {"usage": {"completion_tokens": 3, "cost": 0.25}},
        ],
        [echo()],
    )
    assert run.end.usage["completion_tokens"] == 10
    assert run.end.usage["cost"] == 0.75
    assert run.end.usage.keys() == {field for field in Usage.__dataclass_fields__ if field != "type"}


async def test_sources_are_documents_in_order_of_first_opening() -> None:
    async def open_page(text: str) -> Output:
        return Output(f"page {text}", record={"document": text}, ok=text != "missing")

    script = [says("open", "b", "a"), says("open", "missing"), says("open", "b", "c"), ANSWER]
    run = await ran(script, [SmallTool("open", open_page)])
    assert run.end.sources == ["b", "a", "c"]


async def test_long_results_are_cut_to_the_tools_budget_and_kept_in_the_record() -> None:
    async def long(text: str) -> str:
        return "start " + "x" * 40_000 + " end"

    run = await ran([says("long", "a"), ANSWER], [SmallTool("long", long, budget=500)])
    content = run.results[0]
    assert run.model.count_tokens(content) <= 500
    assert content.startswith("start ")
    assert content.endswith(" end")
    assert "tokens left out here" in content
    assert len(run.of(ToolResult)[0].record["uncut"]) == 40_010


async def test_calls_are_in_the_trace_before_they_run(tmp_path: Path) -> None:
    seen: list[list[str]] = []

    async def look(text: str) -> str:
        events = list(TraceReader.open(tmp_path / "t").events())
        seen.append([event.id for event in events if isinstance(event, ToolCall)])
        return "looked"

    tools = [SmallTool("look", look), SmallTool("change", look, effect="write")]
    agent = Agent(ScriptedModel([says("look", "a"), says("change", "b"), ANSWER]), tools, trace=tmp_path / "t")
    await agent.run("Find out.")
    assert seen == [["functions.look:0"], ["functions.look:0", "functions.change:1"]]


async def test_calls_are_flushed_before_they_run_and_writes_to_the_disk_itself() -> None:
    log: list[str] = []

    class Noting:
        def write(self, event: Event) -> None:
            log.extend([event.id] if isinstance(event, ToolCall) else [])

        def flush(self, *, durable: bool = True) -> None:
            log.append("on disk" if durable else "out of the process")

    async def ignore(event: Event) -> None:
        pass

    tools = {"look": echo(name="look", log=log), "change": echo(name="change", log=log, effect="write")}
    model = ScriptedModel([says("look", "a"), says("change", "b"), ANSWER])
    start = RunStarted(run_id="", task="", system="", model={}, tools=[], limits={}, sampling={}, version="")
    context = Context(model, "system", "task", [])
    await Loop(start, model, context, tools, Limits(), listener=ignore, journal=Noting()).run()
    assert log == [
        *("functions.look:0", "out of the process", "a begins", "a ends"),
        *("functions.change:1", "on disk", "b begins", "b ends"),
    ]


async def test_the_trace_holds_what_the_listener_saw(tmp_path: Path) -> None:
    agent = Agent(ScriptedModel([says("echo", "a"), ANSWER]), [echo()], trace=tmp_path / "t")
    heard = [event async for event in agent.stream("Find out.") if event.type != "tool_call_delta"]
    kept = list(TraceReader.open(tmp_path / "t").events())
    assert kept == heard


async def test_a_cancelled_model_leaves_a_whole_trace(tmp_path: Path) -> None:
    model = ScriptedModel([{"thinking": "x", "content": "So far."} | says("echo", "a"), {"delay": 60}])
    with anyio.move_on_after(0.1) as scope:
        await Agent(model, [echo()], trace=tmp_path / "t").run("Find out.")
    assert scope.cancelled_caught
    assert _ended(tmp_path / "t").answer == "So far."
    assert _ended(tmp_path / "t").reason == "cancelled"


async def test_cancelled_calls_get_honest_results(tmp_path: Path) -> None:
    tools = [echo(), sleep(deadline=60.0), SmallTool("write", _fails, effect="write")]
    script = [{"calls": [("echo", {"text": "a"}), ("sleep", {"text": "50"}), ("write", {"text": "b"})]}]
    with anyio.move_on_after(0.1):
        await Agent(ScriptedModel(script), tools, trace=tmp_path / "t").run("Find out.")
    results = [event for event in _events(tmp_path / "t") if isinstance(event, ToolResult)]
    assert [result.content for result in results] == ["you said a"] + ["error: cancelled before it finished"] * 2
    assert tools[1].log == ["50 begins"]
    assert tools[2].log == []


async def test_events_come_as_words_not_only_as_limits() -> None:
    """What the model is told at its last step is in the events, word for word."""
    run = await ran([says("echo", "a"), ANSWER], [echo()], limits=Limits(steps=2))
    final = [event for event in run.of(LimitReached) if event.final]
    assert run.model.conversations[-1][-1] == {"role": "user", "content": final[0].message}


async def test_a_trace_that_cant_be_written_is_an_error_and_no_silent_loss(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    async def fill_disk(text: str) -> str:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
        return "full"

    agent = Agent(ScriptedModel([says("fill", "a"), ANSWER]), [SmallTool("fill", fill_disk)], trace=tmp_path / "t")
    try:
        with pytest.raises(ThinkloopError, match="Writing to the trace"):
            await agent.run("Find out.")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def _events(folder: Path) -> list[object]:
    return list(TraceReader.open(folder).events())


def _ended(folder: Path) -> RunFinished:
    end = _events(folder)[-1]
    assert isinstance(end, RunFinished)
    return end
