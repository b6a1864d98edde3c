"""One run of decoding: the engine's thread samples ahead of the reader, by a bounded lead, and stops at the next token
when told to."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Tokens
from contextlib import suppress
from dataclasses import dataclass
from time import perf_counter
from typing import Literal

from thinkloop.engine.constraint import Constraint
from thinkloop.engine.drafts import MAX_DRAFT, StepCost
from thinkloop.engine.sampler import Sampler, TokenLogprobs
from thinkloop.engine.sequence import Sequence
from torch import Tensor

_LEAD = 32
"""Tokens the engine may be ahead: enough to hide the reader's pauses, little to throw away when it stops."""
_GROUP = 4
_LATENCY = 0.01
"""The reader is woken for every fourth token, or when 10 ms have gone by."""
_SOFT_SHARE = 8
"""In the last eighth of the thinking budget the end of thinking is taken as soon as it is likely at all."""
_SOFT_CHANCE = 0.05

Finish = Literal["stop", "length"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stops:
    """When a generation ends, and when thinking must."""

    max_tokens: int
    stop_ids: frozenset[int]
    think_end_id: int | None = None
    max_thinking: int | None = None
    call_ids: frozenset[int] = frozenset()
    """These end thinking too: a call opened inside it."""


@dataclass(slots=True)
class GenerationStats:
    """What one generation took: seconds from one moment to the next, tokens, and forward passes."""

    queue_seconds: float = 0.0
    """From the request to the engine taking it up."""
    first_token_seconds: float = 0.0
    """From there to the first token."""
    decode_seconds: float = 0.0
    """From the first token to the last."""
    tokens: int = 0
    passes: int = 0
    """Forward passes; fewer than tokens where drafts held."""
    drafted: int = 0
    accepted: int = 0
    """Drafted tokens, and those of them that the model chose."""


class Generation:
    """A job on the engine's thread, read by `next` on the event loop."""

    def __init__(
        self, sequence: Sequence, timeline: Tokens[int], sampler: Sampler, stops: Stops, draw: int,
        submit: Callable[[Generation], None], *, constraint: Constraint | None = None, speculate: bool = True,
        logprobs: int | None = None,
    ) -> None:  # fmt: skip
        self.cache, self.stats = sequence.cache, GenerationStats()
        self.logprobs: deque[TokenLogprobs] = deque()
        """For each token that `next` gives, in order, where they were asked for."""
        self._sequence, self._timeline, self._length = sequence, timeline, len(timeline)
        self._sampler, self._stops, self._draw, self._submit = sampler, stops, draw, submit
        self._constraint, self._speculate, self._top = constraint, speculate, logprobs
        self._wanted: list[int] = []
        self._drafts: list[int] = []
        self._planned = self._caught_up = False
        self._unread: list[int] = []
        """Sampled before the drafter had read what stands before them."""
        self._thinking = stops.think_end_id is not None and stops.max_thinking is not None
        self._ready: deque[int] = deque()
        self._lock = threading.RLock()  # a stream collected on the engine's thread cancels from there
        self._loop = asyncio.get_running_loop()
        self._wake = asyncio.Event()
        self._asleep = self._parked = self._cancelled = self._ended = False
        self._error: BaseException | None = None
        self.finish: Finish | None = None
        """Why it ended, once the reader has every token."""
        self._asked = self._began = self._first = perf_counter()
        self._woken = 0.0

    # On the engine's thread.

    def begin(self) -> None:
        """Goes on from logits that are at hand, or computes what isn't yet, at least the last token."""
        self._began = self._first = perf_counter()
        self.stats.queue_seconds = self._began - self._asked
        sequence, length = self._sequence, self._length
        sequence.trim(length)
        logits = sequence.logits_after(length)
        if self._stops.max_tokens <= 0:
            self.finish = "length"
            self._deliver([], ended=True)
        elif logits is not None and self.cache.length == length:
            self._take([logits])
        else:
            sequence.trim(length - 1)
            self._wanted = list(self._timeline[self.cache.length : length])

    def wanted(self, cost: StepCost) -> Tokens[int]:
        if self._cancelled or self._ended or self._parked:
            return ()
        if not self._planned:
            self._planned = True
            if self._speculate and not self._caught_up:
                self._catch_up()
            self._drafts = self._guesses(cost) if len(self._wanted) == 1 else []
        return [*self._wanted, *self._drafts] if self._drafts else self._wanted

    def _catch_up(self) -> None:
        """Lets the drafter read a little of the timeline, then what was sampled meanwhile."""
        sequence = self._sequence
        self._caught_up = sequence.read_drafts(self._timeline, self._length)
        if self._caught_up:
            sequence.drafter.read(self._unread)
            sequence.drafted_to += len(self._unread)

    def shorten(self) -> bool:
        """Goes without drafts; true when there were some."""
        had, self._drafts = bool(self._drafts), []
        return had

    def _guesses(self, cost: StepCost) -> list[int]:
        """Drafts: what the grammar leaves no choice about, else what the text suggests."""
        most = self._stops.max_tokens - self.stats.tokens - 1
        forced = self._constraint.forced() if self._constraint is not None else []
        if forced:
            known = len(self._sequence.logits) if self._sequence.logits is not None else 0
            wrong = next((index for index, token in enumerate(forced) if not 0 <= token < known), len(forced))
            return forced[: min(most, wrong, MAX_DRAFT)]
        return self._sequence.drafter.propose(cost, most) if self._caught_up else []

    def computed(self, logits: Tensor, count: int) -> None:
        self.stats.passes += 1
        left = len(self._wanted) - count
        self._sequence.decoded += min(count, len(self._wanted))
        if left > 0:
            self._sequence.took(logits[-1])
            del self._wanted[:count]
            self._planned = False
            return
        rows = list(logits[-1 - len(self._drafts) :])
        self._take(rows)

    def _take(self, rows: Tokens[Tensor]) -> None:
        """Samples after each row for as long as the drafts before it held."""
        tokens: list[int] = []
        drafts, end = self._drafts, self.cache.length - len(self._drafts)
        for index, row in enumerate(rows):
            tokens.append(self._choose(row))
            self.finish = self._ends(tokens[-1])
            if self.finish is not None or index == len(drafts) or tokens[-1] != drafts[index]:
                break
        held = len(tokens) - 1
        self.cache.truncate(end + held)
        self._sequence.took(rows[held])
        if drafts:
            self._sequence.decoded += held
            self.stats.drafted += len(drafts)
            self.stats.accepted += held
        if self._caught_up:
            self._sequence.drafter.sampled(tokens)
            self._sequence.drafted_to += len(tokens)
        elif self._speculate:
            self._unread += tokens
        self._wanted, self._drafts, self._planned = tokens[-1:], [], False
        self._deliver(tokens, ended=self.finish is not None)

    def _choose(self, logits: Tensor) -> int:
        position, allowed = self._draw + self.stats.tokens, None
        token = self._end_of_thinking(logits)
        if token is None:
            if self._constraint is not None:
                allowed = self._constraint.mask()
            token = self._sampler.choose(logits, position, allowed)
        else:
            self._sampler.record(token)
        if self._top is not None:
            self.logprobs.append(self._sampler.logprobs(logits, token, self._top))
        if self._constraint is not None:
            self._constraint.accept(token)
        if token == self._stops.think_end_id or token in self._stops.call_ids:
            self._thinking = False
        now = perf_counter()
        if not self.stats.tokens:
            self._first, self.stats.first_token_seconds = now, now - self._began
        self.stats.decode_seconds = now - self._first
        self.stats.tokens += 1
        return token

    def _end_of_thinking(self, logits: Tensor) -> int | None:
        """The real end token, once the budget is spent, or nearly and the model is inclined to stop anyway."""
        s, used = self._stops, self.stats.tokens
        if not self._thinking or s.think_end_id is None or s.max_thinking is None:
            return None
        if used >= s.max_thinking:
            return s.think_end_id
        if used < s.max_thinking - s.max_thinking // _SOFT_SHARE:
            return None
        likely = float(logits.float().softmax(-1)[s.think_end_id]) >= _SOFT_CHANCE
        return s.think_end_id if likely else None

    def _ends(self, token: int) -> Finish | None:
        if token in self._stops.stop_ids:
            return "stop"
        return "length" if self.stats.tokens >= self._stops.max_tokens else None

    # Between the threads.

    def _deliver(self, tokens: Tokens[int], *, ended: bool) -> None:
        now = perf_counter()
        with self._lock:
            self._ready.extend(tokens)
            self._ended = ended = ended or self._ended
            wake = self._asleep and (ended or len(self._ready) >= _GROUP or now - self._woken >= _LATENCY)
            if wake:
                self._asleep, self._woken = False, now
            self._parked = not ended and len(self._ready) >= _LEAD
        if wake:
            self._signal()

    def _signal(self) -> None:
        with suppress(RuntimeError):  # the loop was closed
            self._loop.call_soon_threadsafe(self._wake.set)

    def flush(self) -> None:
        """Wakes the reader for what is ready: the next token may be long in coming."""
        with self._lock:
            wake = self._asleep and bool(self._ready)
            if wake:
                self._asleep, self._woken = False, perf_counter()
        if wake:
            self._signal()

    async def next(self) -> int | None:
        """The next token in order; None when there are no more. Raises what the forward pass raised."""
        while True:
            with self._lock:
                if self._ready:
                    token = self._ready.popleft()
                    resume = self._parked and len(self._ready) <= _LEAD // 2
                    if resume:
                        self._parked = False
                    break
                if self._ended:
                    if self._error is not None:
                        raise self._error
                    return None
                self._wake.clear()
                self._asleep = True
            await self._wake.wait()
        if resume:
            self._submit(self)
        return token

    def cancel(self) -> None:
        """Stops before the next token, and ends what a reader is waiting for. From any thread."""
        self._cancelled = True
        self._deliver([], ended=True)

    def fail(self, error: BaseException) -> None:
        """Stops, and raises `error` in the reader after the tokens that are ready. From any thread."""
        self._error = error
        self.cancel()


class TokenStream:
    """What `Session.generate` gives: an async iterator of token ids that stops the engine when it is closed, when the
    reading task is cancelled, or when the last reference to it goes (a `break` is enough)."""

    def __init__(
        self, generation: Generation, took: Callable[[int], None], ended: Callable[[Finish | None], None]
    ) -> None:
        self._generation: Generation | None = generation
        self._took, self._ended = took, ended
        self.stats = generation.stats
        """Times and counts, filled in as it goes."""
        self.logprobs: list[TokenLogprobs] = []
        """Of every token read so far, where `generate` was asked for them."""

    def __aiter__(self) -> TokenStream:
        return self

    async def __anext__(self) -> int:
        if self._generation is None:
            raise StopAsyncIteration
        try:
            token = await self._generation.next()
        except BaseException:
            self._end(None)
            raise
        if token is None:
            self._end(self._generation.finish)
            raise StopAsyncIteration
        if self._generation.logprobs:
            self.logprobs.append(self._generation.logprobs.popleft())
        self._took(token)
        return token

    async def aclose(self) -> None:
        """Stops generating. Tokens not yet read are forgotten."""
        self._end(None)

    def _end(self, finish: Finish | None) -> None:
        generation, self._generation = self._generation, None
        if generation is not None:
            generation.cancel()
            self._ended(finish)

    def __del__(self) -> None:
        self._end(None)
