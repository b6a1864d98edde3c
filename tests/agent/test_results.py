"""A result longer than its tool's budget is cut, and nothing of it is lost: `read_result` reads on."""

import re
from collections.abc import Sequence
from typing import Any

import pytest
from loop_tools import ANSWER, Ran, SmallTool, echo, says
from thinkloop.agent.context import Context
from thinkloop.agent.limits import Limits
from thinkloop.agent.loop import Loop
from thinkloop.agent.results import (
    LINE_CHARS,
    MAX_CHARS,
    MAX_RESULTS,
    MAX_TOTAL_CHARS,
    READ_RESULT,
    ReadResult,
    ResultStore,
    last_line_of,
    with_paging,
)
from thinkloop.agent.testing import ScriptedModel
from thinkloop.tools.tool import Output, Tool, ToolError, declaration
from thinkloop.tools.validate import check_schema
from thinkloop.traces.events import Event, RunStarted, ToolResult

pytestmark = pytest.mark.anyio


def count(text: str) -> int:
    return -(-len(text) // 4)


def reader(*texts: str) -> ReadResult:
    """A `read_result` over results of the calls `c:0`, `c:1`, …"""
    store = ResultStore()
    for number, text in enumerate(texts):
        store.keep(f"c:{number}", text)
    return ReadResult(store, count)


async def read(tool: ReadResult, **arguments: Any) -> str:
    return (await tool.call({"call": "c:0"} | arguments)).content


async def ran(script: Any, given: Sequence[Tool]) -> Ran:
    """A run whose tools were given paging, as an agent does it."""
    model, events = ScriptedModel(script), list[Event]()

    async def listen(event: Event) -> None:
        events.append(event)

    tools = with_paging({tool.name: tool for tool in given}, model.count_tokens)
    told = [declaration(tool) for tool in tools.values()]
    start = RunStarted(run_id="", task="", system="", model={}, tools=told, limits={}, sampling={}, version="")
    await Loop(start, model, Context(model, "system", "task", told), tools, Limits(), listener=listen).run()
    return Ran(events, model)


LINES = [f"row {number} of the table" for number in range(1, 3001)]


async def _table(text: str) -> Output:
    return Output("\n".join(LINES), ok=text != "fail")


def table(**changes: Any) -> SmallTool:
    return SmallTool("table", _table, budget=500, **changes)


async def test_a_cut_result_says_how_to_read_on_and_reading_on_goes_on_there() -> None:
    run = await ran([says("table", "a"), ANSWER], [table()])
    note = re.search(r'read on with read_result\(call="(functions\.table:0)", line=(\d+)\)', run.results[0])
    assert note is not None
    line = int(note[2])
    shown_last = run.results[0][: note.start()].splitlines()[-2]
    assert LINES[line - 1].startswith(shown_last)
    call = {"calls": [(READ_RESULT, {"call": note[1], "line": line})]}
    run = await ran([says("table", "a"), call, ANSWER], [table()])
    head, first, *_, last = run.results[1].splitlines()
    assert head.startswith(f"functions.table:0 (3000 lines; more from line {int(last.split(':')[0]) + 1} on)")
    assert first == f"{line}: {LINES[line - 1]}"
    assert all(result.ok for result in run.of(ToolResult))


async def test_every_line_can_be_reached_within_the_budget() -> None:
    tool, line, seen = reader("\n".join(LINES)), 1, list[str]()
    while line:
        content = await read(tool, line=line)
        assert count(content) <= tool.budget
        head, *rows = content.splitlines()
        seen += [row.partition(": ")[2] for row in rows]
        more = re.search(r"more from line (\d+) on", head)
        line = int(more[1]) if more else 0
    assert seen == LINES


async def test_one_endless_line_is_read_in_pieces_and_found_in() -> None:
    text = "".join(f"<{number}>" for number in range(200_000))
    tool = reader(text)
    content = await read(tool, find="<123456>")
    number, _, row = content.splitlines()[1].partition(": ")
    assert "<123456>"[:4] in row
    assert (await read(tool, line=int(number))).splitlines()[1] == content.splitlines()[1]
    assert all(len(row) <= LINE_CHARS + 10 for row in (await read(tool, line=7)).splitlines())


async def test_finding_shows_the_lines_with_their_numbers_whatever_the_case() -> None:
    tool = reader("Alpha\nbeta\nGAMMA alpha\n\nlast alpha")
    assert await read(tool, find="ALPHA") == "c:0 (5 lines)\n1: Alpha\n3: GAMMA alpha\n5: last alpha"
    assert await read(tool, find="alpha", line=4) == "c:0 (5 lines)\n5: last alpha"
    with pytest.raises(ToolError, match='no line of c:0 from line 4 on has "beta"'):
        await read(tool, find="beta", line=4)
    assert await read(reader("a.c\nabc"), find="a.c") == "c:0 (2 lines)\n1: a.c"
    many = await read(reader("\n".join(["needle " + "x" * 100] * 2000)), find="needle")
    assert re.match(r"c:0 \(2000 lines; more from line \d+ on\)", many)


@pytest.mark.parametrize("text", ["", "\n", "a", "a\n", "a\n\nb", "x" * 500, "x" * 501, "x" * 1000 + "\n\ny", "\n" * 9])
async def test_lines_are_numbered_as_they_are_counted(text: str) -> None:
    tool = reader(text)
    rows = (await read(tool)).splitlines()[1:]
    pieces = [line[at : at + 500] for line in text.split("\n") for at in range(0, max(len(line), 1), 500)]
    assert rows == [f"{number}: {piece}".rstrip() for number, piece in enumerate(pieces, 1)]
    assert last_line_of(text) == len(pieces)


async def test_lines_and_calls_that_are_not_there_are_named() -> None:
    tool = reader("a\nb")
    with pytest.raises(ToolError, match=r"c:0 has lines 1 to 2; there is no line 3"):
        await read(tool, line=3)
    with pytest.raises(ToolError, match=r'no result of "c:7" is kept.*there are c:0'):
        await read(tool, call="c:7")
    with pytest.raises(ToolError, match=r"there are none: after a resume they are gone"):
        await read(reader())


async def test_what_is_kept_is_bounded_and_the_oldest_go_first() -> None:
    many = reader(*(f"text {number}" for number in range(MAX_RESULTS + 5)))
    with pytest.raises(ToolError, match="is kept"):
        await read(many, call="c:4")
    assert await read(many, call="c:5")
    large = reader(*["x" * MAX_CHARS] * (MAX_TOTAL_CHARS // MAX_CHARS + 1))
    with pytest.raises(ToolError, match="is kept"):
        await read(large, call="c:0")
    assert await read(large, call="c:1")
    longer = reader("x" * (MAX_CHARS + 7))
    assert "its last 7 characters were not kept" in await read(longer)


async def test_the_same_call_id_again_replaces_what_was_kept() -> None:
    store = ResultStore()
    for _ in range(MAX_RESULTS * 3):
        store.keep("c:0", "x" * (MAX_CHARS // 2))
    store.keep("c:1", "y")
    assert store.get("c:0").lines == MAX_CHARS // 2 // LINE_CHARS
    assert store.get("c:1").lines == 1


async def test_it_is_offered_only_where_a_tool_does_not_page_by_itself() -> None:
    own, paged = table(), table()
    paged.paged = True  # type: ignore[attr-defined]  # as tools of the user's say it
    assert list(with_paging({"table": own}, count)) == ["table", READ_RESULT]
    assert list(with_paging({"table": paged}, count)) == ["table"]
    assert list(with_paging({"a": own, "b": paged}, count)) == ["a", "b", READ_RESULT]
    assert with_paging({}, count) == {}
    assert check_schema(reader().parameters) is None
    assert isinstance(reader(), Tool)


async def test_a_tool_that_pages_itself_is_cut_with_its_own_advice_and_not_kept() -> None:
    paged = table()
    paged.paged = True  # type: ignore[attr-defined]  # as tools of the user's say it
    call = {"calls": [(READ_RESULT, {"call": "functions.table:0"})]}
    run = await ran([says("table", "a"), call, ANSWER], [paged, echo()])
    assert "read on from there" in run.results[0]
    assert READ_RESULT not in run.results[0]
    assert "there are none" in run.results[1]


async def test_a_tool_of_the_user_s_called_so_is_left_alone() -> None:
    own = SmallTool(READ_RESULT, _table, budget=500)
    run = await ran([says(READ_RESULT, "a"), ANSWER], [own])
    assert "read on from there" in run.results[0]


async def test_a_failed_result_can_be_read_on_too() -> None:
    call = {"calls": [(READ_RESULT, {"call": "functions.table:0", "line": 2999})]}
    run = await ran([says("table", "fail"), call, ANSWER], [table()])
    assert not run.of(ToolResult)[0].ok
    assert run.results[1] == f"functions.table:0 (3000 lines)\n2999: {LINES[2998]}\n3000: {LINES[2999]}"
