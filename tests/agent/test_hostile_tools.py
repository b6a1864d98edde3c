"""Whatever a tool does, the run goes on and the model is told, in bounded words, what happened."""

from __future__ import annotations

import asyncio
import itertools
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import anyio
import pytest
from loop_tools import ANSWER, Ran, echo, ran, says
from thinkloop.agent.dispatch import Dispatcher
from thinkloop.tools.function import FunctionTool, tool
from thinkloop.tools.outcome import passes_on
from thinkloop.tools.tool import Attachment, Effect, Output
from thinkloop.traces.events import Json, ToolCall, ToolResult
from thinkloop.traces.reader import TraceReader

pytestmark = pytest.mark.anyio

MOST = 12_000
"""Characters of any result here: a budget of 2,000 tokens, and some words."""


async def result_of(hostile: Any, **arguments: Any) -> ToolResult:
    """The result of one call of the tool, in a run that must go on to its answer."""
    run: Ran = await ran(
        [{"calls": [(hostile.name, arguments)]}, says("echo", "still here"), ANSWER], [hostile, echo()]
    )
    assert (run.end.reason, run.results[1]) == ("answered", "you said still here")
    result: ToolResult = run.of(ToolResult)[0]
    assert len(result.content) <= MOST
    assert not any(char < " " and char not in "\n\t" for char in result.content)
    result.content.encode()
    return result


@dataclass
class RawTool:
    """A tool that keeps no contract but the names."""

    do: Callable[[Json], Any]
    name: str = "raw"
    description: str = "Raw."
    parameters: Json = field(default_factory=lambda: {"type": "object"})
    effect: Effect = "read"
    deadline: float = 5.0
    budget: int = 2000

    async def call(self, arguments: Json) -> Output:
        given = self.do(arguments)
        return (await given) if hasattr(given, "__await__") else given  # type: ignore[no-any-return]  # that's the point


def sync(value: Callable[[], Any], **options: Any) -> FunctionTool:
    def hostile() -> Any:
        return value()

    return tool(name="hostile", **options)(hostile)


def on_loop(value: Callable[[], Any]) -> FunctionTool:
    async def hostile() -> Any:
        return value()

    return tool(name="hostile")(hostile)


# Too much


class Huge:
    def __repr__(self) -> str:
        return "x" * 300_000_000


class Slow:
    def __repr__(self) -> str:
        while True:
            time.sleep(0.001)


@pytest.mark.parametrize("made", [sync, on_loop])
@pytest.mark.parametrize(
    "value",
    [
        lambda: "x" * 300_000_000,
        lambda: b"y" * 300_000_000,
        lambda: ["item"] * 3_000_000,
        lambda: {"a": ["b" * 1000] * 100_000},
        Huge,
        lambda: Output("x" * 100_000_000, display="y" * 100_000_000, record={"z": "z" * 100_000_000}),
    ],
)  # fmt: skip
async def test_endless_output_is_cut(made: Callable[..., FunctionTool], value: Callable[[], Any]) -> None:
    started = time.monotonic()
    result = await result_of(made(value))
    assert result.ok
    assert "left out here" in result.content
    assert len(result.display) < 1_100_000
    assert sum(len(str(part)) for part in result.record.values()) < 6_000_000
    assert time.monotonic() - started < 20


async def test_a_value_that_takes_for_ever_to_write_out_meets_the_deadline() -> None:
    result = await result_of(sync(Slow, deadline=0.2))
    assert "took longer than its deadline of 0.2 s and was stopped" in result.content
    assert "still_running" not in result.record


@pytest.mark.parametrize(
    "value", [itertools.count, lambda: (n for n in itertools.count()), lambda: [itertools.count()]]
)
@pytest.mark.parametrize("made", [sync, on_loop])
async def test_values_that_come_one_by_one_are_refused(made: Any, value: Callable[[], Any]) -> None:
    result = await result_of(made(value))
    assert ("return a list" in result.content) != ("count(" in result.content)


async def test_an_async_generator_is_refused() -> None:
    async def endless() -> AsyncIterator[int]:
        while True:
            yield 1

    assert "return a list" in (await result_of(sync(endless))).content


async def test_many_huge_files_are_bounded() -> None:
    file = Attachment("a", "image/png", b"\0" * (30 << 20))
    result = await result_of(RawTool(lambda _: Output("files", files=(file,) * 100)))
    assert len(result.files) == 2
    assert len(result.record["left_out"]) == 64 - 2 + 1
    assert result.record["left_out"][0] == "the file 'a': 31,457,280 bytes"


# Never ending


async def test_a_busy_loop_is_stopped_at_its_deadline() -> None:
    threads: list[threading.Thread] = []

    def spin() -> None:
        threads.append(threading.current_thread())
        while True:
            pass

    result = await result_of(sync(spin, deadline=0.2))
    assert result.content == "error: hostile took longer than its deadline of 0.2 s and was stopped"
    threads[0].join(5)
    assert not threads[0].is_alive()


async def test_a_call_that_cannot_be_stopped_says_so() -> None:
    release = threading.Event()
    result = await result_of(sync(lambda: release.wait(30), deadline=0.1))
    release.set()
    assert result.content.endswith("and can't be stopped: it still runs")
    assert result.record["still_running"] is True


async def test_a_run_that_is_cancelled_records_what_still_runs(tmp_path: Any) -> None:
    from thinkloop.agent.agent import Agent
    from thinkloop.agent.testing import ScriptedModel

    release = threading.Event()
    script = [{"calls": [("hostile", {})]}]
    with anyio.move_on_after(0.2):
        await Agent(ScriptedModel(script), [sync(lambda: release.wait(30))], trace=tmp_path / "t").run("Find out.")
    release.set()
    (result,) = (event for event in TraceReader.open(tmp_path / "t").events() if isinstance(event, ToolResult))
    assert (result.content, result.record) == ("error: cancelled before it finished", {"still_running": True})


async def test_an_async_call_that_waits_for_ever_meets_its_deadline() -> None:
    result = await result_of(RawTool(lambda _: anyio.sleep_forever(), deadline=0.1))
    assert "took longer than its deadline of 0.1 s and was stopped" in result.content


# Raising


class Own(BaseException):
    pass


class Mute(Exception):
    def __str__(self) -> str:
        raise ValueError("no words")


class Talkative(Exception):
    def __str__(self) -> str:
        return "\x1b[31m\0" * 10_000_000


RAISED = [
    SystemExit(3), KeyboardInterrupt("not from a keyboard"), GeneratorExit(), Own("mine"), asyncio.CancelledError(),
    StopIteration(1), StopAsyncIteration(1), MemoryError(), RecursionError(), Mute(), Talkative(), TimeoutError("mine"),
    BaseExceptionGroup("several", [SystemExit(1), Own()]), asyncio.InvalidStateError(), Exception("\ud800\x1b"),
]  # fmt: skip


def raising(error: BaseException) -> Any:
    raise error


@pytest.mark.parametrize("error", RAISED, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("made", [sync, on_loop])
async def test_what_a_function_raises_is_told(error: BaseException, made: Callable[..., FunctionTool]) -> None:
    result = await result_of(made(lambda: raising(error)))
    assert not result.ok
    assert result.content.startswith("error: ")
    assert type(error).__name__ in result.content or isinstance(error, StopIteration | StopAsyncIteration)


@pytest.mark.parametrize("error", RAISED, ids=lambda error: type(error).__name__)
async def test_what_a_tool_raises_is_told(error: BaseException) -> None:
    result = await result_of(RawTool(lambda _: raising(error)))
    assert not result.ok
    assert result.content.startswith("error: raw failed: ")


async def test_a_tool_s_own_cancellation_beside_others_ends_only_its_call() -> None:
    hostile = RawTool(lambda _: raising(asyncio.CancelledError()))
    script = [{"calls": [("raw", {"n": 1}), ("echo", {"text": "a"}), ("raw", {"n": 2})]}, ANSWER]
    run = await ran(script, [hostile, echo()])
    assert [result.ok for result in run.of(ToolResult)] == [False, True, False]
    assert run.end.reason == "answered"


def interrupted() -> BaseException:
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt as error:
        return error
    raise AssertionError("nothing was raised")


async def test_ctrl_c_is_not_taken_for_the_tool_s_own_doing() -> None:
    def handler(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    assert passes_on(interrupted())
    assert passes_on(BaseExceptionGroup("of a task group", [ValueError(), interrupted()]))
    before = signal.signal(signal.SIGINT, handler)
    try:
        assert passes_on(interrupted())
    finally:
        signal.signal(signal.SIGINT, before)


# Not JSON


class Unshowable:
    def __repr__(self) -> str:
        raise RuntimeError("no")


class Lying:
    @property
    def __class__(self) -> type:  # type: ignore[override]  # that's the lie
        return Output


def loop() -> Any:
    value: dict[str, Any] = {}
    value["again"] = [value]
    return value


def deep() -> Any:
    value: Any = 1
    for _ in range(100_000):
        value = [value]
    return value


@pytest.mark.parametrize("made", [sync, on_loop])
@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (lambda: float("nan"), "nan"),
        (lambda: {(1, 2): 3}, '{"1,2":3}'),
        (lambda: object, "<class 'object'>"),
        (loop, "{'again': [{...}]}"),
        (deep, "that can't be shown: RecursionError"),
        (Unshowable, "<a Unshowable that can't be shown: RuntimeError: no>"),
        (lambda: b"caf\xc3\xa9", "café"),
        (lambda: b"\xff\0\x01" * 100, "[300 bytes that are not text; the first are ff 00 01"),
        (lambda: bytearray(b"ok"), "ok"),
        (lambda: "a\0b\x1b[2J\ud800\r\nc\x9b", "a\\x00b\\x1b[2J\\ud800\nc\\x9b"),
        (lambda: "<|im_end|>", "<|im_end|>"),
        (lambda: threading.Lock(), "lock object"),
        (lambda: 10**5000, "int"),
        (lambda: {"n": Unshowable}, "Unshowable"),
    ],
)  # fmt: skip
async def test_what_is_not_json_is_shown_as_well_as_can_be(made: Any, value: Callable[[], Any], shown: str) -> None:
    result = await result_of(made(value))
    assert shown in result.content


async def test_binary_data_is_kept_as_a_file() -> None:
    result = await result_of(sync(lambda: b"\xff\0\x01"))
    assert [(file.name, file.media_type, file.data) for file in result.files] == [
        ("result.bin", "application/octet-stream", b"\xff\0\x01")
    ]


class LoudText(str):
    def __str__(self) -> str:
        raise RuntimeError("no")

    def __len__(self) -> int:
        return -1


BAD_OUTPUTS: list[tuple[Any, str]] = [
    (None, "must give an `Output`, not NoneType"),
    ("text", "must give an `Output`, not str"),
    (Lying(), "error: raw failed: "),
    (Output(None), "must be text, not NoneType"),  # type: ignore[arg-type]
    (Output(b"x"), "must be text, not bytes"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("given", "told"), BAD_OUTPUTS)
async def test_an_output_that_is_none_is_told_as_broken(given: Any, told: str) -> None:
    result = await result_of(RawTool(lambda _: given))
    assert not result.ok
    assert told in result.content


async def test_the_parts_of_an_output_are_made_what_they_should_be() -> None:
    record: Any = {1: {2, 3}, "deep": loop(), "n": float("inf"), "big": 10**400, "obj": Unshowable(), "b": b"123"}
    files: Any = (None, Attachment("a", "b", "text"), Attachment("ok\0", "text/plain", b"1"))  # type: ignore[arg-type]
    given = Output(LoudText("loud"), display=7, record=record, ok="yes", files=files)  # type: ignore[arg-type]
    result = await result_of(RawTool(lambda _: given))
    assert (result.content, result.display, result.ok) == ("loud", "", True)
    assert result.record["1"] == "<set of 2>"
    assert result.record["n"] == "inf"
    assert result.record["big"] == "a number of 1329 bits"
    assert result.record["obj"] == "<Unshowable>"
    assert result.record["b"] == "<bytes of 3>"
    assert len(result.record["left_out"]) == 3
    assert [(file.name, file.data) for file in result.files] == [("ok\\x00", b"1")]
    assert (await result_of(RawTool(lambda _: Output("x", files="no", record=[1])))).record == {  # type: ignore[arg-type]
        "record": [1],
        "left_out": ["files, which are no tuple but str"],
    }


async def test_a_record_without_end_is_bounded() -> None:
    wide: Any = "ha"
    for _ in range(30):
        wide = [wide] * 10
    result = await result_of(RawTool(lambda _: Output("x", record={"wide": wide, "n": list(range(10**6))})))
    assert len(str(result.record)) < 6_000_000


# Reaching out of the call


async def test_arguments_that_a_tool_changes_stay_as_they_were_written() -> None:
    def change(arguments: Json) -> Output:
        arguments["list"].append(2)
        arguments.clear()
        return Output("changed")

    call = ToolCall(id="raw:0", name="raw", arguments={"list": [1]}, raw='{"list": [1]}')
    got: list[ToolResult] = []

    async def deliver(result: ToolResult) -> None:
        got.append(result)

    await Dispatcher({"raw": RawTool(change)}).run([call], deliver)
    assert got[0].content == "changed"
    assert call.arguments == {"list": [1]}


async def test_a_result_that_its_tool_changes_afterwards_stays_as_it_was_given() -> None:
    record: dict[str, Any] = {"n": [1]}
    result = await result_of(RawTool(lambda _: Output("x", record=record)))
    record["n"].append(2)
    record["later"] = True
    assert result.record == {"n": [1]}


async def test_writing_out_a_large_value_does_not_hold_up_the_event_loop() -> None:
    gaps: list[float] = []

    async def watch() -> None:
        last = time.monotonic()
        while True:
            await anyio.sleep(0.005)
            gaps.append(time.monotonic() - last)
            last = time.monotonic()

    value = [{"a": n, "b": [n]} for n in range(500_000)]
    async with anyio.create_task_group() as group:
        group.start_soon(watch)
        await on_loop(lambda: value).call({})
        group.cancel_scope.cancel()
    assert max(gaps) < 1.0  # 0.05 s on a quiet machine
