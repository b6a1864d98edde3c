"""A run from its record: a `Model` that says again what it said, and tools that give again what they gave.

With both, the real loop runs without an engine, a sandbox or a network. A call that differs from the record is an error
that shows both sides: nothing is guessed.
"""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from thinkloop.agent.arguments import repair_note
from thinkloop.agent.model import Conversation, Turn
from thinkloop.agent.repetition import REFUSE_AT, REMIND_AT, reminder
from thinkloop.tools.tool import Effect, Output
from thinkloop.traces.events import (
    Content,
    ContextEdited,
    Error,
    Event,
    Json,
    LimitReached,
    RunFinished,
    RunStarted,
    StepStarted,
    Thinking,
    ThinkloopError,
    ToolCall,
    ToolResult,
    TurnFinished,
    Usage,
)
from thinkloop.traces.reader import TraceReader

DEFAULT_WINDOW = 262_144
CHARS_PER_TOKEN = 4
NO_BUDGET = 1 << 40
"""Recorded results were cut when they were recorded."""

TraceFolder = str | os.PathLike[str]


class Divergence(ThinkloopError):
    """A replayed run asks for something else than its record holds; the message shows both."""


class RecordedModel:
    """A `Model` that plays back the turns of the trace in `trace`, whatever the conversation says.

    It describes itself as the recorded model did. Raises `ThinkloopError` when the trace can't be opened or its first
    event doesn't start a run; `stream` raises it when the record has no further whole turn.
    """

    def __init__(self, trace: TraceFolder) -> None:
        self._reader = TraceReader.open(trace)
        self._start = run_start(self._reader)
        self._events = self._reader.events()
        self._turns = 0
        self._policy = _policy(self._reader, self._start)

    @property
    def name(self) -> str:
        return str(self._start.model.get("name", "recorded"))

    @property
    def window(self) -> int:
        return int(self._start.model.get("window", DEFAULT_WINDOW))

    @property
    def context_policy(self) -> Literal["hide_results", "drop_steps"]:
        return self._policy

    def describe(self) -> Json:
        return self._start.model

    def count_tokens(self, text: str) -> int:
        """An estimate: the tokenizer isn't part of the record."""
        return -(-len(text) // CHARS_PER_TOKEN)

    async def stream(self, conversation: Conversation, tools: Sequence[Json], turn: Turn) -> AsyncIterator[Event]:
        """The next recorded turn. `conversation`, `tools` and `turn` are not looked at."""
        self._turns += 1
        for event in self._events:
            match event:
                case TurnFinished():
                    yield event
                    return
                case Thinking() | Content() | ToolCall() | Usage():
                    yield event
                case Error(recovered=False):
                    raise ThinkloopError(event.message)
                case RunFinished():
                    break
        raise Divergence(
            f"The run asks for turn {self._turns}, but the trace {str(self._reader.folder)!r} holds {self._turns - 1} "
            "whole turns. It was cut, or the run has come away from its record: check that task, tools and limits are "
            "the same."
        )

    async def aclose(self) -> None:
        return None


def _policy(reader: TraceReader, start: RunStarted) -> Literal["hide_results", "drop_steps"]:
    """The recorded model's policy: as it described itself, else as the run's first context edit shows."""
    if "context_policy" in start.model:
        return "drop_steps" if start.model["context_policy"] == "drop_steps" else "hide_results"
    lenient = TraceReader(reader.folder, strict=False)
    return next((event.policy for event in lenient.events() if isinstance(event, ContextEdited)), "hide_results")


def run_start(reader: TraceReader) -> RunStarted:
    """The event that starts the run. Raises `ThinkloopError` when the trace has none."""
    first = next(reader.events(), None)
    if isinstance(first, RunStarted):
        return first
    raise ThinkloopError(
        f"The trace {str(reader.folder)!r} doesn't begin with the start of a run: it was cut at once, or isn't "
        "a trace of thinkloop. `thinkloop trace ls DIR` shows which can be replayed."
    )


@dataclass(frozen=True, slots=True)
class _Entry:
    """A recorded call with its result. `turn` counts model turns."""

    turn: int
    call: ToolCall
    output: Output


class Tape:
    """The recorded calls of a trace, read turn by turn as they are asked for."""

    def __init__(self, reader: TraceReader) -> None:
        self._turns = _turns_with_calls(reader)
        self._waiting: dict[str, deque[_Entry]] = {}

    def take(self, name: str, arguments: Json) -> Output:
        """The recorded output of this call. Raises `Divergence` when the record goes on with another call.

        Calls of one turn may come in any order. Failed ones may be missing: the loop refuses bad calls before a tool
        sees them.
        """
        queue = self._waiting.setdefault(name, deque())
        passed: list[_Entry] = []
        while True:
            if not queue and not self._read_turn(name):
                raise Divergence(_diverged(name, arguments, passed))
            entry = queue.popleft()
            if entry.call.arguments == arguments:
                self._put_back(queue, passed, entry.turn)
                return entry.output
            passed.append(entry)
            if self._blocked(passed, queue):
                raise Divergence(_diverged(name, arguments, passed))

    def _read_turn(self, name: str) -> bool:
        """Reads on until a turn has a call of this tool; False at the end of the trace."""
        for entries in self._turns:
            for entry in entries:
                self._waiting.setdefault(entry.call.name, deque()).append(entry)
            if self._waiting[name]:
                return True
        return False

    @staticmethod
    def _blocked(passed: Sequence[_Entry], queue: deque[_Entry]) -> bool:
        """Whether a call that was run has been passed, and its turn holds no other that could be the one asked for."""
        run = next((entry.turn for entry in passed if entry.output.ok), None)
        return run is not None and (not queue or queue[0].turn != run)

    @staticmethod
    def _put_back(queue: deque[_Entry], passed: Sequence[_Entry], turn: int) -> None:
        queue.extendleft(entry for entry in reversed(passed) if entry.turn == turn)


@dataclass(frozen=True, slots=True)
class RecordedTool:
    """A `Tool` as the recorded run declared it, whose results come from the record."""

    name: str
    description: str
    parameters: Json
    tape: Tape
    effect: Effect = "read"
    deadline: float = 60.0
    budget: int = NO_BUDGET
    paged: bool = True

    async def call(self, arguments: Json) -> Output:
        """The recorded result. Raises `Divergence` when the record holds another call here."""
        return self.tape.take(self.name, arguments)


def recorded_tools(trace: TraceFolder) -> list[RecordedTool]:
    """The tools of a recorded run, with its results in the order of its calls.

    Raises `ThinkloopError` when the trace can't be opened or doesn't start a run.
    """
    reader = TraceReader.open(trace)
    tape = Tape(reader)
    functions = [tool["function"] for tool in run_start(reader).tools]
    return [RecordedTool(f["name"], f.get("description", ""), f.get("parameters", {}), tape) for f in functions]


def _turns_with_calls(reader: TraceReader) -> Iterator[list[_Entry]]:
    turn, calls, results, notes = 0, dict[str, ToolCall](), list[ToolResult](), list[str]()
    for event in reader.events():
        match event:
            case StepStarted():
                yield _entries(turn, calls, results, notes)
                turn, calls, results, notes = turn + 1, {}, [], []
            case ToolCall():
                calls[event.id] = event
            case ToolResult():
                results.append(event)
            case LimitReached(final=False):
                notes.append(event.message)
    yield _entries(turn, calls, results, notes)


def _entries(
    turn: int, calls: dict[str, ToolCall], results: Sequence[ToolResult], notes: Sequence[str]
) -> list[_Entry]:
    known = [result for result in results if result.call_id in calls]
    return [_Entry(turn, _read(calls[result.call_id], result), _output(result, notes)) for result in known]


def _read(call: ToolCall, result: ToolResult) -> ToolCall:
    """The call as its arguments were read: mended, where the record says so."""
    mended = _mended(result)
    return call if mended is None else replace(call, arguments=mended)


def _mended(result: ToolResult) -> Json | None:
    match result.record.get("repaired"):
        case {"to": dict(arguments)}:
            return arguments
    return None


def _output(result: ToolResult, notes: Sequence[str]) -> Output:
    """The result as it was, cut or whole, without what the loop wrote at its end, since it will do so again."""
    record = {key: value for key, value in result.record.items() if key != "repaired"}
    content, mended = result.content, _mended(result)
    for note in (*reversed(notes), *(reminder(times) for times in range(REMIND_AT, REFUSE_AT))):
        content = content.removesuffix(f"\n\n{note}")
    if mended is not None:
        content = content.removesuffix(f"\n\n{repair_note(mended)}")
    return Output(content, display=result.display, record=record, ok=result.ok, files=tuple(result.files))


def _diverged(name: str, arguments: Json, passed: Sequence[_Entry]) -> str:
    asked = f"{name}({_short(arguments)})"
    calls = [entry.call for entry in passed if entry.call.arguments is not None]
    held = "; ".join(f"{call.name}({_short(call.arguments)})" for call in calls)
    return (
        f"The run has come away from its record: it calls {asked}, and the record holds "
        f"{held or f'no further call of {name}'}. Replay it with the model, task and limits that it was recorded with."
    )


def _short(arguments: Json | None, limit: int = 300) -> str:
    text = json.dumps(arguments, ensure_ascii=False, default=repr)
    return text if len(text) <= limit else text[:limit] + "…"
