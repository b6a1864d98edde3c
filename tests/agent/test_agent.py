"""The Python face: what an agent takes, what a run gives, and that leaving early stops everything."""

import asyncio
import gc
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import anyio
import pytest
from chat_server import ChatServer, turn
from loop_tools import ANSWER, SmallTool, echo, says, sleep
from thinkloop.agent.agent import SYSTEM, Agent
from thinkloop.agent.limits import Limits
from thinkloop.agent.testing import ChaosModel, ScriptedModel
from thinkloop.engine.params import Sampling
from thinkloop.tools.tool import Tool
from thinkloop.traces.events import RunFinished, RunStarted, ThinkloopError, ToolCall
from thinkloop.traces.reader import TraceReader

from thinkloop.testing import ScriptedModel as Shipped

anyio_test = pytest.mark.anyio


class Box:
    """A toolset that says when it is open."""

    def __init__(self, *tools: Tool) -> None:
        self.log: list[str] = []
        self._tools = tools

    def tools(self) -> list[Tool]:
        assert self.log[-1:] == ["open"]
        return list(self._tools)

    async def __aenter__(self) -> "Box":
        self.log.append("open")
        return self

    async def __aexit__(self, *exc: object) -> None:
        with anyio.CancelScope(shield=True):
            await anyio.sleep(0.01)
        self.log.append("closed")


@anyio_test
async def test_a_run_gives_answer_reason_steps_usage_sources_and_trace(tmp_path: Path) -> None:
    agent = Agent(ScriptedModel([says("echo", "a"), ANSWER]), [echo()], trace=tmp_path / "t")
    result = await agent.run("Find out.")
    assert (result.answer, result.reason, result.steps, result.sources) == ("The answer.", "answered", 2, [])
    assert result.usage.completion_tokens > 0
    assert result.trace == tmp_path / "t"
    assert result.error == ""


def test_a_run_needs_no_async_code() -> None:
    assert Agent(ScriptedModel([ANSWER]), trace=False).run_sync("Find out.").answer == "The answer."


def test_traces_go_to_a_new_folder_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    traces = [Agent(ScriptedModel([ANSWER])).run_sync("Find out.").trace for _ in range(2)]
    assert traces[0] != traces[1]
    assert all(
        trace is not None and trace.parent == Path("runs") and (trace / "events.jsonl").exists() for trace in traces
    )


def test_no_trace_is_written_when_none_is_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Agent(ScriptedModel([ANSWER]), trace=False).run_sync("Find out.").trace is None
    assert list(tmp_path.iterdir()) == []


def test_a_trace_is_never_overwritten(tmp_path: Path) -> None:
    agent = Agent(ScriptedModel([ANSWER, ANSWER]), trace=tmp_path / "t")
    agent.run_sync("Find out.")
    with pytest.raises(ThinkloopError, match="already holds a trace"):
        agent.run_sync("Find out.")


@pytest.mark.parametrize("task", ["", "  \n", None, 3])
def test_an_empty_task_is_refused_before_anything_starts(task: Any, tmp_path: Path) -> None:
    box, model = Box(echo()), ScriptedModel([ANSWER])
    agent = Agent(model, [box], trace=tmp_path / "t")
    with pytest.raises(ThinkloopError, match="task is empty"):
        agent.run_sync(task)
    with pytest.raises(ThinkloopError, match="task is empty"):
        agent.stream(task)
    assert (box.log, model.turns, (tmp_path / "t").exists()) == ([], [], False)


def test_a_task_longer_than_the_context_is_refused_before_the_model_runs(tmp_path: Path) -> None:
    box, model = Box(echo()), ScriptedModel([ANSWER], window=1024)
    with pytest.raises(ThinkloopError, match="too long"):
        Agent(model, [box], trace=tmp_path / "t").run_sync("word " * 2000)
    assert (model.turns, box.log, (tmp_path / "t").exists()) == ([], ["open", "closed"], False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "no/such/folder"}, "There is no model 'no/such/folder'"),
        ({"model": "http://localhost:1"}, "needs its name"),
        ({"model": "mini", "model_name": "x"}, "not a URL"),
        ({"model": 3}, "`model` is int"),
        ({"model": ScriptedModel([]), "sampling": Sampling()}, "given by name"),
        ({"model": ScriptedModel([]), "seed": 3}, "given by name"),
        ({"model": "mini", "seed": -1}, "`seed` is -1"),
        ({"model": "mini", "seed": 2**63}, "`seed` is 9223372036854775808"),
        ({"model": "mini", "tools": [print]}, "decorate the function with `@tool`"),
        ({"model": "mini", "tools": [Box]}, "`Box` is a class"),
        ({"model": "mini", "tools": ["search"]}, "is not a tool"),
    ],
)
def test_what_an_agent_cant_use_is_refused_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ThinkloopError, match=message):
        Agent(**options)


@anyio_test
async def test_two_tools_of_one_name_are_refused() -> None:
    with pytest.raises(ThinkloopError, match="Two tools are called `echo`"):
        await Agent(ScriptedModel([ANSWER]), [echo(), Box(echo())], trace=False).run("Find out.")


@anyio_test
async def test_a_tool_whose_schema_is_none_is_refused_by_name() -> None:
    with pytest.raises(ThinkloopError, match="tool `echo` can't be used"):
        await Agent(ScriptedModel([ANSWER]), [echo(parameters={"type": "nothing"})], trace=False).run("Find out.")


@anyio_test
async def test_toolsets_are_open_for_the_run_and_closed_after() -> None:
    box = Box(echo())
    agent = Agent(ScriptedModel([says("echo", "a"), ANSWER] * 2), [box], trace=False)
    await agent.run("Find out.")
    await agent.run("Find out.")
    assert box.log == ["open", "closed"] * 2


@anyio_test
async def test_the_system_prompt_is_ours_the_models_or_the_users() -> None:
    class Prompted(ScriptedModel):
        system = "You are a librarian."

    async def system(model: ScriptedModel, **options: Any) -> str:
        await Agent(model, trace=False, **options).run("Find out.")
        return str(model.conversations[0][0]["content"])

    assert await system(ScriptedModel([ANSWER])) == SYSTEM
    assert SYSTEM == "You are a research agent. Think, call tools, read the results, and answer with what they show."
    assert await system(Prompted([ANSWER])) == "You are a librarian."
    assert await system(Prompted([ANSWER]), system="You are a cook.") == "You are a cook."


@anyio_test
async def test_the_run_says_all_that_is_needed_to_do_it_again() -> None:
    agent = Agent(ScriptedModel([ANSWER]), [echo()], limits=Limits(steps=7), trace=False)
    start = await anext(agent.stream("Find out."))
    assert isinstance(start, RunStarted)
    assert (start.task, start.system, start.limits["steps"]) == ("Find out.", SYSTEM, 7)
    assert start.tools[0]["function"]["name"] == "echo"
    assert start.model["kind"] == "scripted"


@anyio_test
@pytest.mark.parametrize(
    ("options", "sent"),
    [
        ({}, {}),
        ({"seed": 3}, {"seed": 3}),
        ({"sampling": Sampling(temperature=0.5)}, {"temperature": 0.5}),
        ({"sampling": Sampling(top_p=0.9, seed=1)}, {"top_p": 0.9, "seed": 1}),
        ({"sampling": Sampling(top_p=0.9, seed=1), "seed": 2}, {"top_p": 0.9, "seed": 2}),
    ],
    ids=repr,
)
async def test_a_server_is_sent_the_sampling_that_was_asked_for_and_the_record_says_so(
    options: dict[str, Any], sent: dict[str, Any]
) -> None:
    with ChatServer([turn(content="The answer.")]) as server:
        async with Agent(server.url, model_name="kimi", trace=False, **options) as agent:
            events = [event async for event in agent.stream("Find out.")]
        body = server.posts[0].body
    assert {key: body[key] for key in body.keys() & {f.name for f in fields(Sampling)}} == sent
    assert isinstance(events[0], RunStarted)
    assert events[0].sampling == events[0].model["sampling"] == sent


@anyio_test
async def test_breaking_off_a_stream_stops_tools_and_closes_the_trace(tmp_path: Path) -> None:
    box = Box(sleep(deadline=60.0))
    agent = Agent(ScriptedModel([says("sleep", "50"), ANSWER]), [box], trace=tmp_path / "t")
    async for event in agent.stream("Find out."):
        if isinstance(event, ToolCall):
            await anyio.sleep(0.02)
            break
    gc.collect()
    await _until(lambda: box.log == ["open", "closed"])
    assert _end(tmp_path / "t").reason == "cancelled"


@anyio_test
async def test_async_with_waits_until_all_is_stopped(tmp_path: Path) -> None:
    box = Box(sleep(deadline=60.0))
    agent = Agent(ScriptedModel([says("sleep", "50"), ANSWER]), [box], trace=tmp_path / "t")
    async with agent.stream("Find out.") as events:
        async for event in events:
            if isinstance(event, ToolCall):
                break
    assert box.log == ["open", "closed"]
    assert _end(tmp_path / "t").reason == "cancelled"


@anyio_test
async def test_cancelling_the_reader_stops_the_run_before_it_returns(tmp_path: Path) -> None:
    box = Box(sleep(deadline=60.0))
    agent = Agent(ScriptedModel([says("sleep", "50"), ANSWER]), [box], trace=tmp_path / "t")
    with anyio.move_on_after(0.1) as scope:
        async for _ in agent.stream("Find out."):
            pass
    assert scope.cancelled_caught
    assert box.log == ["open", "closed"]
    assert _end(tmp_path / "t").reason == "cancelled"


@anyio_test
async def test_cancelling_a_run_in_a_task_group_leaves_its_neighbours_alone(tmp_path: Path) -> None:
    done: list[str] = []

    async def neighbour() -> None:
        done.append((await Agent(ScriptedModel([{"delay": 0.2} | ANSWER]), trace=False).run("Find out.")).answer)

    async with anyio.create_task_group() as group:
        group.start_soon(neighbour)
        with anyio.move_on_after(0.05):
            await Agent(ScriptedModel([{"delay": 60}]), trace=tmp_path / "t").run("Find out.")
    assert done == ["The answer."]
    assert _end(tmp_path / "t").reason == "cancelled"


def test_a_stream_dropped_as_the_event_loop_ends_is_closed(tmp_path: Path) -> None:
    async def main() -> None:
        agent = Agent(ScriptedModel([says("sleep", "50"), ANSWER]), [sleep(deadline=60.0)], trace=tmp_path / "t")
        async for event in agent.stream("Find out."):
            if isinstance(event, ToolCall):
                break

    asyncio.run(main())
    assert _end(tmp_path / "t").reason == "cancelled"


@anyio_test
async def test_a_stream_that_was_never_read_runs_nothing() -> None:
    model = ScriptedModel([ANSWER])
    stream = Agent(model, trace=False).stream("Find out.")
    await stream.aclose()
    del stream
    assert model.turns == []


@anyio_test
async def test_a_slow_reader_gets_every_event() -> None:
    script = [says("echo", str(n)) | {"thinking": "x" * 2000} for n in range(10)] + [ANSWER]
    agent = Agent(ScriptedModel(script, piece=1), [echo()], trace=False, limits=Limits(seconds=30))
    events = []
    async for event in agent.stream("Find out."):
        events.append(event)
        if len(events) % 500 == 0:
            await anyio.sleep(0)
    assert len(events) > 20_000
    assert isinstance(events[-1], RunFinished)


@anyio_test
async def test_a_stream_raises_what_the_run_raises() -> None:
    agent = Agent(ScriptedModel([{"error": ValueError("shape")}]), trace=False)
    with pytest.raises(ValueError, match="shape"):
        async for _ in agent.stream("Find out."):
            pass


@anyio_test
async def test_two_runs_of_one_agent_may_go_side_by_side() -> None:
    script = [{"delay": 0.05} | ANSWER] * 2
    agent = Agent(ScriptedModel(script), trace=False)
    async with anyio.create_task_group() as group:
        for _ in range(2):
            group.start_soon(agent.run, "Find out.")


@anyio_test
async def test_a_model_object_stays_its_owners() -> None:
    model = ScriptedModel([ANSWER])
    async with Agent(model, trace=False) as agent:
        await agent.run("Find out.")
    assert not model.closed


def test_a_script_is_checked_and_counted() -> None:
    assert Shipped is ScriptedModel
    left = ScriptedModel([ANSWER, ANSWER])
    Agent(left, trace=False).run_sync("Find out.")
    with pytest.raises(AssertionError, match="1 turns of the script were never asked for"):
        left.assert_complete()
    short = Agent(ScriptedModel([says("echo", "a")]), [echo()], trace=False).run_sync("Find out.")
    assert (short.reason, "one more was asked for" in short.error) == ("error", True)
    wrong = Agent(ScriptedModel([{"contents": "x"}]), trace=False).run_sync("Find out.")
    assert "unknown keys ['contents']" in wrong.error


def test_chaos_is_the_same_for_the_same_seed() -> None:
    def results(seed: int) -> list[str]:
        chaos = ChaosModel(ScriptedModel([says("echo", str(n)) for n in range(4)] + [ANSWER]), seed, rate=1.0)
        run = Agent(chaos, [echo()], trace=False)

        async def collect() -> list[str]:
            return [event.raw for event in [e async for e in run.stream("Find out.")] if isinstance(event, ToolCall)]

        return anyio.run(collect)

    assert results(1) == results(1)
    assert results(1) != results(2)


def test_the_agent_brings_no_torch() -> None:
    heavy = "print(sorted({'torch', 'jsonschema', 'httpx'} & set(sys.modules)))"
    code = f"import sys, thinkloop.agent.agent, thinkloop.testing; {heavy}"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


async def _until(true: Any, seconds: float = 2.0) -> None:
    with anyio.fail_after(seconds):
        while not true():
            await anyio.sleep(0.005)


def _end(folder: Path) -> RunFinished:
    end = list(TraceReader.open(folder).events())[-1]
    assert isinstance(end, RunFinished)
    return end


def test_a_small_tool_is_a_tool() -> None:
    assert isinstance(SmallTool("echo", echo().do), Tool)
