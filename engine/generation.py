"""One run of decoding: the worker samples ahead of the reader, by a bounded lead, and stops at the next token when
told to."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from thinkloop.engine.sampler import Sampler
from torch import Tensor

_LEAD = 32
"""Tokens the worker may be ahead: enough to hide the reader's pauses, little to throw away when it stops."""

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


class Generation:
    """Shared by the worker (`step`) and the reader on the event loop (`next`)."""

    def __init__(
        self, forward: Callable[[int | None], Tensor], sampler: Sampler, stops: Stops, draw: int,
        submit: Callable[[Callable[[], bool]], None],
    ) -> None:  # fmt: skip
        self._forward, self._sampler, self._stops, self._draw, self._submit = forward, sampler, stops, draw, submit
        self._last: int | None = None
        self._sampled = 0
        self._thinking = stops.think_end_id is not None and stops.max_thinking is not None
        self._ready: deque[int] = deque()
        self._lock = threading.Lock()
        self._loop = asyncio.get_running_loop()
        self._wake = asyncio.Event()
        self._asleep = False
        self._parked = False
        self._cancelled = False
        self._ended = False
        self._error: BaseException | None = None
        self.finish: Finish | None = None
        """Why it ended, once the reader has every token."""
        submit(self.step)

    def step(self) -> bool:
        """Samples one token (on the worker)."""
        if self._cancelled:
            return False
        try:
            finish, token = self._sample()
        except BaseException as error:
            self._error = error
            return self._deliver(None, ended=True)
        self.finish = finish
        return self._deliver(token, ended=finish is not None)

    def _sample(self) -> tuple[Finish | None, int | None]:
        s = self._stops
        if self._sampled >= s.max_tokens:
            return "length", None
        logits = self._forward(self._last)
        token = self._choose(logits)
        self._last, self._sampled = token, self._sampled + 1
        if token in s.stop_ids:
            return "stop", token
        return ("length" if self._sampled >= s.max_tokens else None), token

    def _choose(self, logits: Tensor) -> int:
        s, position = self._stops, self._draw + self._sampled
        if self._thinking and s.think_end_id is not None and self._sampled == s.max_thinking:
            self._thinking = False
            self._sampler.record(s.think_end_id)
            return s.think_end_id
        token = self._sampler.choose(logits, position)
        if token == s.think_end_id or token in s.call_ids:
            self._thinking = False
        return token

    def _deliver(self, token: int | None, *, ended: bool) -> bool:
        with self._lock:
            if token is not None:
                self._ready.append(token)
            self._ended = ended = ended or self._ended
            wake, self._asleep = self._asleep, False
            self._parked = not ended and len(self._ready) >= _LEAD
            go_on = not ended and not self._parked
        if wake and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._wake.set)
        return go_on

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
            self._submit(self.step)
        return token

    def cancel(self) -> None:
        """Stops before the next token, and ends what a reader is waiting for. From any thread."""
        self._cancelled = True
        self._deliver(None, ended=True)

    def fail(self, error: BaseException) -> None:
        """Stops, and raises `error` in the reader after the tokens that are ready. From any thread."""
        self._error = error
        self.cancel()


class TokenStream:
    """What `Session.generate` gives: an async iterator of token ids that stops the worker when it is closed, when the
    reading task is cancelled, or when the last reference to it goes (a `break` is enough)."""

    def __init__(
        self, generation: Generation, took: Callable[[int], None], ended: Callable[[Finish | None], None]
    ) -> None:
        self._generation: Generation | None = generation
        self._took, self._ended = took, ended

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
