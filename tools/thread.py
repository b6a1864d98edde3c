"""Runs a function in a thread of its own and, when its call is cancelled, stops it there.

An exception is raised inside the thread; it takes effect at the next Python instruction. A thread that sits in C code
(`time.sleep`, a read that never ends) can't be stopped so: that is said in the call's record, and such threads are
bounded in number. What must be stoppable for certain runs in a process (`tools.process`).

Python 3.11 keeps one flag for all threads that says "an exception is waiting", and lowers it only when one is raised.
While it is up everything is a little slower, and a function under a tracer (a debugger, coverage) never gets past its
first instruction. So the flag is always taken down again, and under a tracer no thread is interrupted.
"""

from __future__ import annotations

import asyncio
import ctypes
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from contextvars import copy_context
from dataclasses import dataclass
from typing import Any

import anyio
from thinkloop.tools.call_record import remember
from thinkloop.tools.tool import ToolError

GRACE = 1.0
"""Seconds that a thread gets to end once it has been told to."""
AGAIN = 0.5
"""Seconds after which it is told once more: code that catches everything swallows the first time."""
MOST_LEFT_RUNNING = 16
"""Threads that couldn't be stopped and still run, in the whole process; no further call is begun beside so many."""


class Interrupted(BaseException):
    """Raised inside a tool's function when its call is over: its deadline has passed, or the run was cancelled."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a function gave, or what it raised."""

    value: Any = None
    error: BaseException | None = None


_left_running: set[threading.Thread] = set()


async def run_in_thread(function: Callable[[], Any]) -> Outcome:
    """Runs `function` in a thread; whatever it raises is in the outcome. On cancellation raises `Interrupted` inside the
    thread and waits up to `GRACE` seconds for its end; after that the call's record says `still_running`.

    Raises `ToolError` when too many earlier threads can't be stopped.
    """
    _check_room()
    work = _Work(function)
    work.thread.start()
    try:
        await work.done.wait()
    except BaseException:
        with anyio.CancelScope(shield=True):
            await work.stop()
        raise
    return work.outcome


def left_running() -> int:
    """How many threads of tools couldn't be stopped and still run."""
    _left_running.intersection_update(thread for thread in list(_left_running) if thread.is_alive())
    return len(_left_running)


def _check_room() -> None:
    if left_running() >= MOST_LEFT_RUNNING:
        raise ToolError(f"not run: {MOST_LEFT_RUNNING} earlier calls could not be stopped and still run. "
                        "Tools like these belong in a process of their own: `@tool(process=True)`.")  # fmt: skip


class _Work:
    """One call in its thread."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self.outcome = Outcome(error=Interrupted())
        self.done = anyio.Event()
        self.thread = threading.Thread(target=self._run, name="tool", daemon=True)  # must not hold up the program's end
        self._function, self._context = function, copy_context()
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        self._begun = self._told = self._unwanted = self._over = False

    async def stop(self) -> None:
        for pause in (AGAIN, GRACE - AGAIN):
            self._interrupt()
            with anyio.move_on_after(pause):
                await self.done.wait()
            if self.done.is_set():
                return
        self._withdraw()
        _left_running.add(self.thread)
        remember(still_running=True)

    def _interrupt(self) -> None:
        with self._lock:  # once the thread is over, its id may be another's
            self._unwanted = True
            if self._begun and not self._over and not _is_traced():
                self._told = True
                _raise_in(self.thread.ident, Interrupted)

    def _withdraw(self) -> None:
        with self._lock:
            if not self._told or self._over:
                return
            _raise_in(self.thread.ident, None)
        _lower_flag()

    def _run(self) -> None:
        with suppress(Interrupted):
            self._call()
        told = False
        while not told:
            with suppress(Interrupted):  # may come late, and must not keep the end from being told
                told = self._finish()

    def _call(self) -> None:
        try:
            with self._lock:
                self._begun = not self._unwanted
            if self._begun:
                self.outcome = Outcome(self._context.run(self._function))
        except BaseException as error:
            self.outcome = Outcome(error=error)

    def _finish(self) -> bool:
        with self._lock:
            self._over = True
        if self._told:
            _lower_flag()
        with suppress(RuntimeError):  # the event loop has ended: nobody waits
            self._loop.call_soon_threadsafe(self.done.set)
        return True


def _raise_in(thread: int | None, kind: type[BaseException] | None) -> None:
    """Raises `kind` in a thread at its next instruction; None takes back what hasn't been raised yet."""
    given = None if kind is None else ctypes.py_object(kind)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread or 0), given)


def _lower_flag() -> None:
    """Has an exception raised in this thread, in place of one that may still be waiting for it."""
    with suppress(Interrupted):
        _raise_in(threading.get_ident(), Interrupted)
        while True:
            pass


def _is_traced() -> bool:
    hooks = (sys.gettrace(), sys.getprofile(), threading.gettrace(), threading.getprofile())
    return sys.version_info < (3, 12) and any(hook is not None for hook in hooks)
