"""Events of a run as an async iterator. The run has a task of its own, so that its cancel scopes never cross a `yield`:
an async generator that is dropped in mid-loop is finished by another task, where a scope can't be left."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Self

import anyio
from anyio.streams.memory import MemoryObjectSendStream
from thinkloop.traces.events import Event

BUFFERED = 256
"""Events that the run may be ahead of its reader; then it waits."""

Drive = Callable[[Callable[[Event], Awaitable[None]]], Awaitable[object]]

_running: set[asyncio.Task[None]] = set()  # the event loop itself keeps only weak references to tasks


class EventStream:
    """The events of one run, in order, ending with `RunFinished`.

    The run starts with the first event asked for. Leaving the `async for`, cancelling the task that iterates, or
    `aclose` stops model and tools and closes the trace; `async with` waits until that is done. Iterating raises what
    the run raises.
    """

    def __init__(self, drive: Drive) -> None:
        self._drive = drive
        self._send, self._receive = anyio.create_memory_object_stream[Event](BUFFERED)
        self._scope = anyio.CancelScope()
        self._task: asyncio.Task[None] | None = None

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        self._start()
        try:
            return await self._receive.receive()
        except (anyio.EndOfStream, anyio.ClosedResourceError):
            await self._joined()
            raise StopAsyncIteration from None
        except anyio.get_cancelled_exc_class():
            await self.aclose()
            raise

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Stops the run if it is under way, and returns when model and tools have stopped. Doing it twice is fine."""
        self._stop()
        if self._task is not None:
            with anyio.CancelScope(shield=True):
                await asyncio.wait([self._task])

    def _start(self) -> None:
        if self._task is None:
            # The task must not hold this object: dropping it is what stops the run.
            work = _run(self._drive, self._scope, self._send)
            self._task = asyncio.get_running_loop().create_task(work)
            _running.add(self._task)
            self._task.add_done_callback(_running.discard)

    async def _joined(self) -> None:
        if self._task is not None:
            await asyncio.wait([self._task])
            if not self._task.cancelled():
                self._task.result()

    def _stop(self) -> None:
        self._receive.close()
        if self._task is None:
            self._send.close()
        elif not self._task.done() and not self._task.get_loop().is_closed():
            self._scope.cancel()

    def __del__(self) -> None:
        self._stop()


async def _run(drive: Drive, scope: anyio.CancelScope, send: MemoryObjectSendStream[Event]) -> None:
    with send, scope:
        await drive(_listener(send))


def _listener(send: MemoryObjectSendStream[Event]) -> Callable[[Event], Awaitable[None]]:
    async def listen(event: Event) -> None:
        try:
            send.send_nowait(event)
        except anyio.WouldBlock:
            with anyio.CancelScope(
                shield=True
            ):  # a time limit must not lose an event; closing the reader ends the wait
                await send.send(event)

    return listen
