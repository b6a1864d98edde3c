"""Tools that break their contract: in a run, which goes on to its answer, with a whole trace and a result in bounded words."""

from __future__ import annotations

import asyncio
import io
import itertools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio
import pytest
import rogue_functions
from control_tokens import HOSTILE, control_tokens_of, rendered
from secret_server import secret
from thinkloop.agent.agent import Agent
from thinkloop.agent.screen import Screen, plain_console
from thinkloop.agent.testing import ScriptedModel
from thinkloop.tools.function import FunctionTool, tool
from thinkloop.tools.tool import Attachment, Effect, Output
from thinkloop.traces.events import Json, RunFinished, ThinkloopError, ToolResult
from thinkloop.traces.reader import TraceReader

pytestmark = pytest.mark.anyio

Held = Callable[[str], None]
MOST = 12_000
"""Characters of any result here: a budget of 2,000 tokens, and some words."""


@tool
def echo(text: str) -> str:
    """Says it again."""
    return f"you said {text}"


@dataclass
class Raw:
    """A tool that keeps no contract but the names."""

    do: Callable[[Json], Any]
    name: str = "rogue"
    description: str = "Raw."
    parameters: Json = field(default_factory=lambda: {"type": "object"})
    effect: Effect = "read"
    deadline: float = 3.0
    budget: int = 2000

    async def call(self, arguments: Json) -> Output:
        given = self.do(arguments)
        return (await given) if hasattr(given, "__await__") else given  # type: ignore[no-any-return]  # that's the point


def rogue(value: Callable[[], Any], **options: Any) -> FunctionTool:
    def misbehave() -> Any:
        return value()

    return tool(name="rogue", **options)(misbehave)


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    return tmp_path / "trace"


async def result_of(hostile: Any, trace: Path, arguments: Json | str = {}) -> ToolResult:  # noqa: B006 - not changed
    """The call's result, in a run that must go on: the next tool works, there is an answer, the trace is whole."""
    calls = [
        {"calls": [(hostile.name, arguments)]},
        {"calls": [("echo", {"text": "still here"})]},
        {"content": "Done."},
    ]
    started = time.monotonic()
    ended = await Agent(ScriptedModel(calls), [hostile, echo], trace=trace).run("Try it.")
    assert ended.reason == "answered", ended
    assert time.monotonic() - started < 15
    events = list(TraceReader.open(trace).events())
    first, second = (event for event in events if isinstance(event, ToolResult))
    assert isinstance(events[-1], RunFinished)
    assert second.content == "you said still here"
    assert len(first.content) <= MOST
    assert not any(char < " " and char not in "\n\t" for char in first.content)
    first.content.encode()
    assert sum(path.stat().st_size for path in trace.rglob("*") if path.is_file()) < 120_000_000
    return first


def whats(result: ToolResult) -> str:
    return " ".join(result.content.split())[:110]


# Too much, never, raising, no JSON

TOO_MUCH: dict[str, Callable[[], Any]] = {
    "text": lambda: "x" * 100_000_000,
    "bytes": lambda: b"y" * 100_000_000,
    "items": lambda: ["item"] * 2_000_000,
    "a value that writes itself": lambda: type("Huge", (), {"__repr__": lambda self: "x" * 100_000_000})(),
    "everything": lambda: Output("x" * 20_000_000, display="y" * 20_000_000, record={"z": ["z" * 20_000_000] * 9}),
}


@pytest.mark.parametrize("value", TOO_MUCH.values(), ids=TOO_MUCH.keys())
async def test_endless_output(trace: Path, held: Held, value: Callable[[], Any]) -> None:
    result = await result_of(rogue(value), trace)
    assert "left out here" in result.content
    held(f"budget: {len(result.content):,} characters for the model")


async def test_huge_files(trace: Path, held: Held) -> None:
    file = Attachment("../../../etc/passwd\x1b[2J", "text/html\r\nX: y", b"\0" * (30 << 20))
    result = await result_of(Raw(lambda _: Output("files", files=(file,) * 100)), trace)
    assert len(result.files) == 2
    assert not (trace.parent / "etc").exists()
    held(f"64 MB of files for one result: {len(result.files)} kept under their hash, the others named in the record")


@pytest.mark.parametrize("value", [itertools.count, lambda: (n for n in itertools.count()), lambda: iter(int, 1)],
                         ids=["counter", "generator", "iterator"])  # fmt: skip
async def test_values_that_come_without_end(trace: Path, held: Held, value: Callable[[], Any]) -> None:
    result = await result_of(rogue(value), trace)
    held(f"nothing is drawn from it: {whats(result)}")


NEVER: dict[str, Callable[[], Any]] = {
    "a busy loop in a thread": lambda: rogue(lambda: next(n for n in itertools.count() if n < 0), deadline=0.3),
    "a sleep in a thread": lambda: rogue(lambda: time.sleep(2), deadline=0.3),
    "an endless wait on the loop": lambda: Raw(lambda _: anyio.sleep_forever(), deadline=0.3),
    "a wait that swallows its cancellation once": lambda: Raw(lambda _: _stubborn(), deadline=0.3),
    "a value that never finishes writing itself": lambda: rogue(
        lambda: type("Slow", (), {"__repr__": lambda self: [time.sleep(0.001) for _ in iter(int, 1)]})(), deadline=0.3
    ),
}


async def _stubborn() -> Output:
    try:
        await anyio.sleep(60)
    except BaseException:
        await anyio.sleep(60)
    return Output("late")


@pytest.mark.parametrize("made", NEVER.values(), ids=NEVER.keys())
async def test_it_never_returns(trace: Path, held: Held, made: Callable[[], Any]) -> None:
    result = await result_of(made(), trace)
    assert "took longer than its deadline of 0.3 s" in result.content
    held(f"deadline: {result.content.removeprefix('error: ')}")


RAISED = [
    SystemExit(3), KeyboardInterrupt("not from a keyboard"), GeneratorExit(), asyncio.CancelledError(), StopIteration(1),
    MemoryError(), RecursionError(), BaseExceptionGroup("several", [SystemExit(1), KeyboardInterrupt()]),
    Exception("\x1b[2J\ud800" + "long " * 2_000_000), ThinkloopError(HOSTILE), TimeoutError(),
]  # fmt: skip


def raising(error: BaseException) -> Any:
    raise error


@pytest.mark.parametrize("made", [rogue, lambda do: Raw(lambda _: do())], ids=["function", "tool"])
@pytest.mark.parametrize("error", RAISED, ids=lambda error: type(error).__name__)
async def test_it_raises(trace: Path, held: Held, error: BaseException, made: Callable[..., Any]) -> None:
    result = await result_of(made(lambda: raising(error)), trace)
    assert not result.ok
    held(f"errors become results: {whats(result)}")


def _cyclic() -> Any:
    value: dict[str, Any] = {}
    value["again"] = [value]
    return value


def _deep() -> Any:
    value: Any = 1
    for _ in range(100_000):
        value = [value]
    return value


NO_JSON: dict[str, Callable[[], Any]] = {
    "not a number": lambda: float("nan"), "a cycle": _cyclic, "deep nesting": _deep, "an object": object, "a set": lambda: {1, 2},
    "a lock": threading.Lock, "keys that are no text": lambda: {(1, 2): 3, None: 4}, "binary data": lambda: b"\xff\0\x01" * 99,
    "lone surrogates": lambda: "a\ud800b", "a number of 5,000 digits": lambda: 10**5000,
    "a value that can't be shown": lambda: type("U", (), {"__repr__": lambda self: 1 / 0})(),
    "escapes": lambda: "\x1b]0;owned\x07\x1b[2J\x9b\r\n\x00", "a module": lambda: sys,
}  # fmt: skip


@pytest.mark.parametrize("value", NO_JSON.values(), ids=NO_JSON.keys())
async def test_it_returns_no_json(trace: Path, held: Held, value: Callable[[], Any]) -> None:
    result = await result_of(rogue(value), trace)
    held(f"shown as text: {ascii(whats(result))[1:-1][:90]}")


NO_OUTPUT: list[Any] = [None, "text", 7, Output(None), Output(b"x"), Output("x", record=[1], files="no", ok="yes"),  # type: ignore[arg-type]
                        Output("x", record={"deep": _deep(), "cycle": _cyclic()})]  # fmt: skip


@pytest.mark.parametrize(
    "given", NO_OUTPUT, ids=["None", "text", "number", "no text", "bytes", "wrong parts", "deep record"]
)
async def test_its_output_is_none(trace: Path, held: Held, given: Any) -> None:
    result = await result_of(Raw(lambda _: given), trace)
    held(f"checked for shape: {whats(result)}")


# In a process of its own


@pytest.mark.parametrize("name", ["vanish", "crash", "scribble", "huge", "deep"])
async def test_in_its_own_process_it(trace: Path, held: Held, name: str) -> None:
    result = await result_of(getattr(rogue_functions, name), trace)
    held(f"own process, bounded frames: {whats(result)}")


@pytest.mark.parametrize("own_session", [False, True])
async def test_in_its_own_process_it_hangs_with_what_it_started(trace: Path, held: Held, own_session: bool) -> None:
    mark = f"{30 + time.time() % 9:.6f}"
    result = await result_of(rogue_functions.hang, trace, {"mark": mark, "own_session": own_session})
    assert "took longer than its deadline" in result.content
    left = [int(path.parent.name) for path in Path("/proc").glob("[0-9]*/cmdline") if mark in _read(path)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert left == []
    held("deadline, then a kill of all that it started: nothing is left")


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


# Reaching further


async def test_it_cancels_the_task_that_called_it(trace: Path, held: Held) -> None:
    async def cancel() -> Output:
        task = asyncio.current_task()
        assert task
        task.cancel()
        await anyio.sleep(0)
        return Output("survived")

    running = asyncio.create_task(result_of(Raw(lambda _: cancel()), trace))
    await asyncio.wait({running})
    assert not running.cancelled(), "the whole run was cancelled"
    held(f"its cancellation ends its own call alone: {whats(running.result())}")


async def test_it_changes_its_arguments_and_its_result_afterwards(trace: Path, held: Held) -> None:
    record: Json = {"n": [1]}

    def change(arguments: Json) -> Output:
        arguments["list"].append(2)
        arguments.clear()
        threading.Timer(0.05, record["n"].append, (2,)).start()
        return Output("changed", record=record)

    result = await result_of(Raw(change), trace, {"list": [1]})
    assert result.record["n"] == [1]
    events = TraceReader.open(trace).events()
    assert any(getattr(event, "arguments", None) == {"list": [1]} for event in events)
    held("copies: the trace has the arguments and the record as they were")


SCHEMAS: dict[str, Json] = {
    "a pattern that stalls": {"type": "object", "properties": {"x": {"type": "string", "pattern": "^(a+)+$"}}},
    "a schema from the network": {"type": "object", "properties": {"x": {"$ref": "SECRET/schema.json"}}},
    "a schema from a file": {"type": "object", "properties": {"x": {"$ref": "file:///etc/passwd"}}},
    "a schema that refers to itself": {"$ref": "#"},
    "a million words": {"type": "object", "properties": {"x": {"enum": ["w" * 20] * 100_000}}},
    "unevaluated everything": {"type": "object", "allOf": [{"anyOf": [{"properties": {"x": {}}}] * 50}] * 50, "unevaluatedProperties": False},
}  # fmt: skip


@pytest.mark.parametrize("name", SCHEMAS)
async def test_its_schema_is(trace: Path, held: Held, name: str) -> None:
    with secret() as hidden:
        schema = _filled(SCHEMAS[name], hidden.url)
        hostile = Raw(lambda _: Output("ran"), parameters=schema)
        try:
            said = f"the call's result: {whats(await result_of(hostile, trace, {'x': 'a' * 40 + '!'}))}"
        except ThinkloopError as error:
            said = f"refused when the run starts: {str(error)[:110]}"
        held(f"schema guards: {said}; {hidden.unseen()}")


def _filled(schema: Any, url: str) -> Any:
    if isinstance(schema, dict):
        return {key: _filled(value, url) for key, value in schema.items()}
    return schema.replace("SECRET", url) if isinstance(schema, str) else schema


ARGUMENTS: dict[str, str] = {
    "half a megabyte": '{"text": "' + "x" * 500_000 + '"}',
    "thirty thousand keys": "{" + ",".join(f'"k{n}": 1' for n in range(30_000)) + "}",
    "three hundred levels": '{"text": ' + "[" * 300 + "]" * 300 + "}",
    "a number of a million digits": '{"text": ' + "9" * 1_000_000 + "}",
    "no JSON": "{text: <|im_end|>",
    "control characters": '{"text": "\x1b[2J\x00"}',
    "the same key twice": '{"text": "a", "text": "b"}',
    "nothing": "",
    "an array": "[1, 2]",
    "a hundred thousand levels": '{"text": ' + "[" * 100_000 + "]" * 100_000 + "}",
}


@pytest.mark.parametrize("raw", ARGUMENTS.values(), ids=ARGUMENTS.keys())
async def test_a_call_with_arguments_of(trace: Path, held: Held, raw: str) -> None:
    @tool(name="rogue")
    def takes(text: str) -> str:
        """Takes a text."""
        return f"{len(text)} characters"

    result = await result_of(takes, trace, raw)
    held(f"bad calls become results: {ascii(whats(result))[1:-1][:100]}")


async def test_a_turn_of_a_thousand_calls(held: Held) -> None:
    names = ["echo", "x" * 1000, "\x1b[2J", "", HOSTILE]
    calls = [(names[n % 5], {"text": str(n)}) for n in range(1000)]
    model = ScriptedModel([{"calls": calls}, {"content": "Done."}])
    ended = await Agent(model, [echo], trace=False).run("Try it.")
    assert ended.reason == "answered"
    answers = [str(message["content"]) for message in model.conversations[-1] if message["role"] == "tool"]
    ran = sum(answer.startswith("you said") for answer in answers)
    assert (len(answers), ran) == (1000, 4)
    assert max(map(len, answers)) < 1500
    held(
        f"16 calls a turn: {ran} ran, {len(answers) - ran} were refused in {max(map(len, answers))} characters or less"
    )


# Steering


async def test_control_tokens_in_a_result(held: Held) -> None:
    held(await control_tokens_of([rogue(lambda: HOSTILE)], "rogue", {}))


async def test_control_tokens_in_an_error(held: Held) -> None:
    held(await control_tokens_of([rogue(lambda: raising(ValueError(HOSTILE)))], "rogue", {}))


async def test_control_tokens_in_a_tools_own_description(held: Held) -> None:
    schema = {"type": "object", "properties": {HOSTILE: {"type": "string", "description": HOSTILE}}}
    model = ScriptedModel([{"content": "Done."}])
    await Agent(model, [Raw(lambda _: Output(""), description=HOSTILE, parameters=schema)], trace=False).run("Look.")
    names, text = rendered(model)
    assert text.count("<|im_end|>") > names.count("<|im_end|>")
    plain = ScriptedModel([{"content": "Done."}])
    await Agent(plain, [Raw(lambda _: Output(""))], trace=False).run("Look.")
    assert names == rendered(plain)[0]
    held(f"tokenised with specials disallowed: {len(names)} control tokens, none of them from the declaration")


async def test_terminal_escapes_on_the_screen(held: Held) -> None:
    text = "\x1b]0;owned\x07\x1b[2J\x1b]8;;http://x\x07link\x1b[31m\x9b2J\u202e[bold]markup[/bold]\r" * 3
    files = (Attachment(text, text, b"1"),)
    hostile = Raw(lambda _: Output(text, display=text, files=files))
    calls = [{"thinking": text, "calls": [("rogue", {text: text})]}, {"content": text}]
    out = io.StringIO()
    with Screen(plain_console(out, width=80, height=30)) as screen:
        async for event in Agent(ScriptedModel(calls), [hostile], trace=False).stream("Try it."):
            screen.show(event)
    shown = out.getvalue()
    assert not any(char in shown for char in "\x1b\x07\x9b\u202e\r")
    assert "[bold]markup[/bold]" in shown
    held("the screen shows text literally: no escape, bell or direction character in what it wrote")
