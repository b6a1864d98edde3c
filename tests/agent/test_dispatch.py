"""Reads run side by side, writes one after the other, and results keep the order of the calls."""

import json
import time
from typing import Any

import anyio
import pytest
from loop_tools import ANSWER, SmallTool, echo, ran, sleep
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


# Malformed arguments


def raw_call(raw: str, name: str = "echo", problem: str | None = None) -> ToolCall:
    arguments, found = parse_arguments(raw)
    return ToolCall(id=f"functions.{name}:0", name=name, arguments=arguments, raw=raw, problem=problem or found)


async def test_arguments_that_can_mean_one_thing_are_mended_for_a_read_and_both_texts_are_recorded() -> None:
    raw = '```json\n{"text": "a",}\n```'
    (got,) = await results([echo()], raw_call(raw))
    assert got.ok
    assert got.content == (
        'you said a\n\n[note: the arguments were not as they must be and were read as {"text": "a"}]'
    )
    assert got.record == {"repaired": {"raw": raw, "to": {"text": "a"}}}


async def test_values_are_mended_as_the_schema_asks() -> None:
    schema = {"type": "object", "properties": {"text": {"type": "integer"}}, "required": ["text"]}
    tool = echo(parameters=schema)
    (got,) = await results([tool], raw_call('{"text": "3"}'))
    assert got.content.startswith("you said 3\n")
    assert got.record["repaired"] == {"raw": '{"text": "3"}', "to": {"text": 3}}


async def test_arguments_of_a_write_are_never_mended() -> None:
    tool = echo(effect="write")
    for raw in ('{"text": "a",}', '```\n{"text": "a"}\n```', '{"text": "a"}}'):
        (got,) = await results([tool], raw_call(raw))
        assert not got.ok
        assert got.content.startswith("error: this call of echo could not be read: ")
        assert "repaired" not in got.record
    assert tool.log == []


async def test_what_a_limit_cut_off_is_never_completed() -> None:
    tool, cut = echo(), raw_call('{"text": "a"')
    got: list[ToolResult] = []

    async def deliver(result: ToolResult) -> None:
        got.append(result)

    await Dispatcher({"echo": tool}).run([raw_call('{"text": "b",}'), cut], deliver, cut_off=True)
    assert [result.ok for result in got] == [True, False]
    (said_so,) = await results([tool], raw_call('{"text": "a"', problem="the call was cut off before its end"))
    (by_itself,) = await results([tool], cut)
    assert (said_so.ok, by_itself.ok) == (False, True)
    script: list[Any] = [{"calls": [("echo", '{"text": "a"')], "reason": "length"}, ANSWER]
    assert (await ran(script, [tool])).results[0].startswith("error: this call of echo could not be read")


async def test_the_conversation_keeps_what_the_model_wrote() -> None:
    run = await ran([{"calls": [("echo", '{"text": "a",}')]}, ANSWER], [echo()])
    assert run.of(ToolCall)[0].raw == '{"text": "a",}'
    assert run.model.conversations[-1][2]["tool_calls"][0]["function"]["arguments"] == '{"text": "a",}'
    assert run.results[0].startswith("you said a\n")


async def test_a_mended_call_counts_as_run_and_as_a_repeat_of_itself() -> None:
    run = await ran([{"calls": [("echo", '{"text": "a",}')]}] * 5 + [ANSWER], [echo()])
    assert "reminder" in run.results[2]
    assert run.results[4].startswith("error: not run again")
    assert run.end.reason == "answered"


async def test_the_note_of_a_long_repair_is_short() -> None:
    (got,) = await results([echo()], raw_call(json.dumps({"text": "x" * 5000})[:-1] + ",}"))
    assert got.content.count("x") < 5000 + 400


# Checks that take long


async def test_a_slow_check_doesnt_hold_up_the_event_loop() -> None:
    schema = {"type": "object", "properties": {"text": {"type": "string", "pattern": "^(a+)+$"}}}
    gaps: list[float] = []

    async def watch() -> None:
        last = time.monotonic()
        while True:
            await anyio.sleep(0.005)
            gaps.append(time.monotonic() - last)
            last = time.monotonic()

    async with anyio.create_task_group() as group:
        group.start_soon(watch)
        await anyio.sleep(0.02)
        (got,) = await results([echo(parameters=schema)], raw_call(json.dumps({"text": "a" * 100_000 + "!"})))
        group.cancel_scope.cancel()
    assert not got.ok
    assert "can't be checked against the pattern" in got.content
    assert len(gaps) > 3
    assert max(gaps) < 0.5  # 0.01 s on a quiet machine; the check itself takes about 0.3 s


async def test_a_run_can_be_cancelled_while_arguments_are_checked() -> None:
    definitions: Any = {"d60": {"type": "object"}}
    for n in range(60):
        definitions[f"d{n}"] = {"allOf": [{"$ref": f"#/$defs/d{n + 1}"}] * 2}
    started = time.monotonic()
    with anyio.move_on_after(0.05) as scope:
        await results([echo(parameters={"$defs": definitions, "$ref": "#/$defs/d0"})], call("echo", "a"))
    assert scope.cancelled_caught
    assert time.monotonic() - started < 0.8
