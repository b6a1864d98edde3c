"""The loop: model turn, calls, results, limits, until there is an answer.

Every event goes to the journal first and to the listener after it. What the loop says to the model is in the events
word for word: notes at the end of a `ToolResult`, the opening of the last step as the message of a final
`LimitReached`, a nudge as the message of a recovered `Error`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, replace
from time import perf_counter
from typing import Literal, NamedTuple, Protocol

import anyio
from thinkloop.agent.citations import Citation, Shown
from thinkloop.agent.context import Context
from thinkloop.agent.dispatch import CANCELLED, Dispatcher
from thinkloop.agent.limits import Limits, Meter, end_reason, final_text
from thinkloop.agent.model import Model, Turn
from thinkloop.agent.repetition import REFUSE_AT, REMIND_AT, STOP_AT, refusal, reminder
from thinkloop.agent.results import store_of, within_budget
from thinkloop.agent.turn import TurnRecord
from thinkloop.tools.tool import Tool
from thinkloop.traces.events import (
    EndReason,
    Error,
    Event,
    Json,
    LimitReached,
    RunFinished,
    RunStarted,
    StepFinished,
    StepStarted,
    ThinkloopError,
    ToolCall,
    ToolResult,
    Usage,
)
from thinkloop.traces.format import TraceError

EMPTY_TURNS = 3
"""Turns in a row with neither answer nor call (or cut off before one was whole) after which the model is asked to
answer."""
NO_ANSWER = "No answer was reached."

Listener = Callable[[Event], Awaitable[None]]


class Journal(Protocol):
    """Where events are kept; `traces.writer.TraceWriter` is one."""

    def write(self, event: Event) -> None: ...
    def flush(self, *, durable: bool = True) -> None: ...


class Ending(NamedTuple):
    answer: str
    reason: EndReason


class Loop:
    """One run. `context` holds the conversation with its task; `tools` maps names to tools that are ready to be called;
    `notes` is what the person is to know of them before the first step."""

    def __init__(
        self, start: RunStarted, model: Model, context: Context, tools: Mapping[str, Tool], limits: Limits,
        *, listener: Listener, journal: Journal | None = None, response_format: Json | None = None,
        forbid_repeats: bool = False, notes: Sequence[str] = (),
    ) -> None:  # fmt: skip
        self._start, self._model, self._context, self._tools = start, model, context, tools
        self._listener, self._journal = listener, journal
        self._response_format, self._forbid_repeats, self._notes = response_format, forbid_repeats, notes
        self._meter = Meter(limits)
        self._dispatcher, self._store = Dispatcher(tools), store_of(tools)
        self._turn: TurnRecord | None = None
        self.error = ""
        """What ended the run when its reason is `error`."""
        self._best = ""
        self._empty_turns = 0
        self._shown = Shown()
        self._step_started = self._outside = 0.0

    def citations(self, answer: str) -> list[Citation]:
        """The citations in an answer, held against what has been opened so far."""
        return self._shown.check(answer)

    async def run(self) -> RunFinished:
        """Runs to the end. A model's `ThinkloopError` ends the run with reason `error`; any other exception and
        cancellation go through, once the end is in the journal."""
        await self._emit(self._start)
        await self._emit_all([Error(where="tools", message=note, recovered=True) for note in self._notes])
        try:
            ending = await self._steps()
        except anyio.get_cancelled_exc_class():
            self._record_end("cancelled")
            raise
        except TraceError:  # the journal failed: nothing more can be kept, so nothing more is done
            raise
        except ThinkloopError as problem:
            ending = await self._failed(problem)
        except Exception as problem:
            self._record_end("error", Error(where="run", message=_describe(problem), recovered=False))
            raise
        finished = self._finished(ending)
        await self._emit(finished)
        return finished

    async def _steps(self) -> Ending:
        while True:
            limit = await self._limit_reached()
            if limit:
                return await self._last_step(limit)
            await self._begin_step()
            turn = await self._model_turn(final=False)
            if turn.calls:
                await self._dispatch(turn)
            elif turn.is_answer:
                await self._end_step()
                return Ending(turn.text.strip(), "answered")
            else:
                await self._nudge(turn)
            await self._end_step()

    async def _last_step(self, limit: LimitReached) -> Ending:
        await self._emit(limit)
        self._context.append_user(limit.message)
        await self._begin_step()
        turn = await self._model_turn(final=True)
        await self._refuse(turn.calls, "error: not run: this was the last step, which may only answer")
        await self._end_step()
        return Ending(turn.text.strip() or self._best or NO_ANSWER, end_reason(limit))

    async def _begin_step(self) -> None:
        self._step_started, self._outside = perf_counter(), 0.0
        self._meter.steps += 1
        self._context.begin_step(self._meter.steps)
        await self._emit(StepStarted(step=self._meter.steps, context_tokens=self._context.tokens))

    async def _end_step(self) -> None:
        seconds = perf_counter() - self._step_started
        own = max(seconds - self._outside, 0.0)
        await self._emit(StepFinished(step=self._meter.steps, seconds=seconds, overhead_seconds=own))

    # -- the model's turn ---

    async def _model_turn(self, *, final: bool) -> TurnRecord:
        self._turn = turn = TurnRecord()
        deadline = self._meter.answer_deadline if final else self._meter.work_deadline
        ask, allowed = self._ask(final), self._meter.thinking_allowed
        with anyio.CancelScope(deadline=deadline) as scope:
            await self._stream_turn(turn, ask)
        if not scope.cancelled_caught:
            turn.end()
        self._keep(turn)
        await self._note_thinking(turn.usage, allowed)
        return turn

    async def _stream_turn(self, turn: TurnRecord, ask: Turn) -> None:
        events = self._model.stream(self._context.conversation, self._start.tools, ask)
        async with _closing(events):
            while (event := await self._next(events)) is not None:
                turn.add(event)
                await self._emit(event)

    async def _next(self, events: AsyncIterator[Event]) -> Event | None:
        started = perf_counter()
        try:
            return await anext(events, None)
        finally:
            self._outside += perf_counter() - started

    def _ask(self, final: bool) -> Turn:
        room, thinking = self._context.max_tokens(final), self._meter.thinking_allowed
        tokens_left = self._meter.tokens_left
        if not final:
            room = room if tokens_left is None else max(min(room, tokens_left), 1)
            forbidden = self._dispatcher.repetition.recent() if self._forbid_repeats else ()
            return Turn(
                max_tokens=room, max_thinking=thinking, response_format=self._response_format, forbidden=forbidden
            )
        # Half of the last step's room is for the answer itself: thinking must not eat it all.
        room = room if tokens_left is None else min(room, self._context.reserve)
        half = max(room // 2, 1)
        return Turn(
            max_tokens=room, max_thinking=min(thinking or half, half), tool_choice="none",
            response_format=self._response_format,
        )  # fmt: skip

    def _keep(self, turn: TurnRecord) -> None:
        self._best = turn.text.strip() or self._best
        if turn.usage:
            self._meter.add(turn.usage)
        if not turn.is_blank:
            self._context.append_turn(turn.message(), turn.usage)

    async def _note_thinking(self, usage: Usage | None, allowed: int | None) -> None:
        if allowed and usage and usage.thinking_tokens >= allowed:
            text = f"thinking was closed at the limit of {allowed:,} tokens"
            used = usage.thinking_tokens
            await self._emit(LimitReached(limit="thinking", used=used, allowed=allowed, final=False, message=text))

    async def _nudge(self, turn: TurnRecord) -> None:
        self._empty_turns += 1
        self._dispatcher.idle()
        if self._empty_turns >= EMPTY_TURNS or turn.finish == "cancelled":
            return
        text = _CUT_OFF if turn.finish == "length" else _NOTHING
        await self._emit(Error(where="model turn", message=text, recovered=True))
        warnings = self._warnings()
        self._context.append_user("\n\n".join([text, *(warning.message for warning in warnings)]))
        await self._emit_all(warnings)

    # -- calls and results ---

    async def _dispatch(self, turn: TurnRecord) -> None:
        self._empty_turns = 0
        self._flush(turn.calls)
        left = len(turn.calls)

        async def deliver(result: ToolResult) -> None:
            nonlocal left
            left -= 1
            await self._deliver(result, left)

        before, self._turn = self._dispatcher.tool_seconds, None
        with anyio.CancelScope(deadline=self._meter.work_deadline):
            await self._dispatcher.run(turn.calls, deliver, cut_off=turn.finish in ("length", "cancelled"))
        for result in self._dispatcher.cut_short():
            await deliver(result)
        self._outside += self._dispatcher.tool_seconds - before
        await self._note_repetition()

    async def _deliver(self, result: ToolResult, left: int) -> None:
        """Takes a result into the conversation; `left` results of the turn are still to come."""
        result = self._within_budget(result)
        warnings = [] if left else self._warnings()
        text = "\n\n".join([result.content, *(warning.message for warning in warnings)])
        content, edits = self._context.fit(text, left)
        cut = len(content) < len(text) or "uncut" in result.record
        result = replace(result, content=content)
        self._context.append_result(result.call_id, result.name, content)
        self._shown.note(result, cut=cut)
        await self._emit_all([*edits, result, *warnings])

    def _within_budget(self, result: ToolResult) -> ToolResult:
        tool = self._tools.get(result.name)
        return within_budget(result, tool, self._model.count_tokens, self._store) if tool else result

    async def _refuse(self, calls: list[ToolCall], content: str) -> None:
        self._turn = None
        await self._emit_all(_unrun(calls, content))

    def _flush(self, calls: list[ToolCall]) -> None:
        """Journal before dispatch: a write must be known even after a power cut, a read can simply be made again."""
        if self._journal:
            tools = [self._tools.get(call.name) for call in calls]
            self._journal.flush(durable=any(tool is not None and tool.effect == "write" for tool in tools))

    async def _note_repetition(self) -> None:
        repeats = self._dispatcher.repetition.most()
        if repeats in (REMIND_AT, REFUSE_AT):
            text = reminder(repeats) if repeats == REMIND_AT else refusal(repeats, "an earlier call")
            near = LimitReached(limit="repetition", used=repeats, allowed=STOP_AT, final=False, message=text)
            await self._emit(near)

    # -- limits ---

    async def _limit_reached(self) -> LimitReached | None:
        """What makes the next step the last one, if anything."""
        repeats, limits = self._dispatcher.repetition.most(), self._meter.limits
        if repeats >= STOP_AT:
            return _final("repetition", repeats, STOP_AT, f"the same calls have been made {repeats} times in a row")
        if (bad := self._dispatcher.bad_turns) >= limits.bad_turns:
            return _final("bad_calls", bad, limits.bad_turns, f"no call could be run in the last {bad} turns")
        if (empty := self._empty_turns) >= EMPTY_TURNS:
            return _final("bad_calls", empty, EMPTY_TURNS, f"the last {empty} turns held neither an answer nor a call")
        return self._meter.reached() or await self._context_full()

    async def _context_full(self) -> LimitReached | None:
        await self._emit_all(self._context.make_room())
        if self._context.room() >= 0:
            return None
        return _final("context", self._context.tokens, self._context.window, "the context is full")

    def _warnings(self) -> list[LimitReached]:
        return [] if self._meter.reached() else list(self._meter.warnings())

    # -- events ---

    async def _emit(self, event: Event) -> None:
        if self._journal:
            self._journal.write(event)
        started = perf_counter()
        await self._listener(event)
        self._outside += perf_counter() - started

    async def _emit_all(self, events: Sequence[Event]) -> None:
        for event in events:
            await self._emit(event)

    async def _failed(self, problem: ThinkloopError) -> Ending:
        """Ends a run whose model gave up, with what there is."""
        self.error = str(problem)
        await self._emit(Error(where="model", message=str(problem), recovered=False))
        await self._emit_all(self._dangling("error: not run: the model's turn broke off"))
        return Ending(self._best_so_far(), "error")

    def _record_end(self, reason: EndReason, error: Error | None = None) -> None:
        """Writes the end of a run that is cut short; without awaiting, so that a cancelled scope can't stop it."""
        if not self._journal:
            return
        results = self._dispatcher.cut_short() or self._dangling(CANCELLED)
        with suppress(ThinkloopError):  # a journal that fails now must not take the place of what cut the run short
            for event in (*results, *([error] if error else ()), self._finished(Ending(self._best_so_far(), reason))):
                self._journal.write(event)

    def _dangling(self, content: str) -> list[ToolResult]:
        return _unrun(self._turn.calls if self._turn else [], content)

    def _best_so_far(self) -> str:
        return (self._turn.text.strip() if self._turn else "") or self._best

    def _finished(self, ending: Ending) -> RunFinished:
        meter = self._meter
        return RunFinished(
            answer=ending.answer, reason=ending.reason, steps=meter.steps, usage=asdict(meter.usage),
            sources=self._shown.documents, citations=[entry.to_json() for entry in self.citations(ending.answer)],
            seconds=meter.seconds,
        )  # fmt: skip


_NOTHING = "Your last turn held neither an answer nor a call. Call a tool, or answer the task."
_CUT_OFF = "Your last turn was cut off before it was whole. Be brief: call a tool, or answer the task."


def _final(name: Literal["repetition", "bad_calls", "context"], used: float, allowed: float, why: str) -> LimitReached:
    return LimitReached(limit=name, used=used, allowed=allowed, final=True, message=final_text(why))


def _unrun(calls: list[ToolCall], content: str) -> list[ToolResult]:
    return [ToolResult(call_id=call.id, name=call.name, content=content, ok=False) for call in calls]


def _describe(problem: BaseException) -> str:
    return f"{type(problem).__name__}: {problem}"


@asynccontextmanager
async def _closing(events: AsyncIterator[Event]) -> AsyncIterator[None]:
    try:
        yield
    finally:
        close = getattr(events, "aclose", None)  # an async generator has it, other iterators need not
        if close is not None:
            await close()
