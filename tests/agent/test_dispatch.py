"""Reads run side by side, writes one after the other, and results keep the order of the calls."""

import anyio
import pytest
from loop_tools import SmallTool, echo, sleep
from thinkloop.agent.dispatch import CALLS_PER_TURN, SIDE_BY_SIDE, Dispatcher
from thinkloop.agent.testing import parse_arguments
from thinkloop.tools.tool import Output, Tool
from thinkloop.traces.events import ToolCall, ToolResult

pytestmark = pytest.mark.anyio


def call(name: str, text: str, n: int = 0) -> ToolCall:
    raw = f'{{"text": "{text}"}}'
    arguments, problem = parse_arguments(raw)
    return ToolCall(id=f"functions.{name}:{n}", name=name, arguments=arguments, raw=raw, problem=problem)


async def results(tools: list[SmallTool], *calls: ToolCall) -> list[ToolResult]:
    given: dict[str, Tool] = {tool.name: tool for tool in tools}
    got: list[ToolResult] = []

    async def deliver(result: ToolResult) -> None:
        got.append(result)

    await Dispatcher(given).run(calls, deliver)
    return got


async def test_reads_run_side_by_side_and_results_keep_the_order() -> None:
    tool = sleep()
    got = await results([tool], *(call("sleep", str(s)) for s in (0.3, 0.1, 0.2)))
    assert [result.content for result in got] == ["slept 0.3", "slept 0.1", "slept 0.2"]
    assert tool.log[:3] == ["0.3 begins", "0.1 begins", "0.2 begins"]
    assert tool.log[3:] == ["0.1 ends", "0.2 ends", "0.3 ends"]


async def test_writes_are_barriers() -> None:
    log: list[str] = []
    read, write = sleep(log=log), SmallTool("write", sleep().do, effect="write", log=log)
    order = [call("sleep", "0.02"), call("write", "0.03"), call("write", "0.01"), call("sleep", "0.04")]
    await results([read, write], *order)
    assert log == [f"{s} {what}" for s in ("0.02", "0.03", "0.01", "0.04") for what in ("begins", "ends")]


async def test_at_most_eight_run_at_a_time_and_sixteen_a_turn() -> None:
    running = most = 0

    async def count(text: str) -> str:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await anyio.sleep(0.01)
        running -= 1
        return text

    got = await results([SmallTool("count", count)], *(call("count", str(n)) for n in range(20)))
    assert most == SIDE_BY_SIDE
    assert [result.ok for result in got] == [True] * CALLS_PER_TURN + [False] * 4
    assert got[16].content == "error: not run: one turn may make 16 calls; make the others in the next turn"


async def test_the_same_call_twice_in_a_turn_is_run_once() -> None:
    for effect in ("read", "write"):
        tool = echo(effect=effect)
        got = (
            await results([tool], call("echo", "a", 0), call("echo", "b", 1), call("echo", "a", 2))
            if effect == "read"
            else (await results([tool], call("echo", "a", 0), call("echo", "a", 2)))
        )
        assert got[0].content == got[-1].content == "you said a"
        assert (got[0].call_id, got[-1].call_id) == ("functions.echo:0", "functions.echo:2")
        assert tool.log.count("a begins") == 1


async def test_a_read_after_a_write_is_run_again() -> None:
    state = ["old"]

    async def read(text: str) -> str:
        return state[0]

    async def write(text: str) -> str:
        state[0] = text
        return "written"

    tools = [SmallTool("read", read), SmallTool("write", write, effect="write")]
    got = await results(tools, call("read", "x", 0), call("write", "new", 1), call("read", "x", 2))
    assert [result.content for result in got] == ["old", "written", "new"]


async def test_a_result_has_three_parts_and_its_time() -> None:
    async def rich(text: str) -> Output:
        await anyio.sleep(0.02)
        return Output("for the model", display="for the person", record={"for": "the record"})

    (got,) = await results([SmallTool("rich", rich)], call("rich", "a"))
    assert (got.content, got.display, got.record) == ("for the model", "for the person", {"for": "the record"})
    assert 0.02 <= got.seconds < 1


async def test_one_bad_call_doesnt_harm_its_neighbours() -> None:
    bad = ToolCall(id="x", name="", arguments=None, raw="", problem="the call has no name")
    got = await results([echo()], call("echo", "a"), bad, call("echo", "b"))
    assert [result.content for result in got] == [
        "you said a",
        "error: this call could not be read: the call has no name",
        "you said b",
    ]


async def test_without_tools_the_model_is_told_so() -> None:
    (got,) = await results([], call("echo", "a"))
    assert got.content == 'error: there is no tool "echo"; there are no tools: answer'


async def test_what_was_cut_short_is_told_honestly() -> None:
    tools: dict[str, Tool] = {"echo": echo(), "sleep": sleep(deadline=60.0)}
    dispatcher = Dispatcher(tools)

    async def deliver(result: ToolResult) -> None:
        raise AssertionError("nothing is delivered before its neighbours are done")

    with anyio.move_on_after(0.05):
        await dispatcher.run([call("echo", "a"), call("sleep", "50")], deliver)
    assert [result.content for result in dispatcher.cut_short()] == [
        "you said a",
        "error: cancelled before it finished",
    ]
    assert dispatcher.cut_short() == []
