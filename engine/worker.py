"""The engine's own thread: all tensor work happens here, step by step, so that neither the event loop nor another
session waits longer than one step."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import TypeVar

import torch
from thinkloop.traces.events import ThinkloopError

T = TypeVar("T")
Step = Callable[[], bool]
"""Does a little work; true asks to be called again, after the others had their turn."""


class EngineClosed(ThinkloopError):
    """The engine was closed while, or before, it was asked to work."""


class Worker:
    """Runs steps in turn on one daemon thread with `threads` torch threads."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._steps: SimpleQueue[Step | None] = SimpleQueue()
        self._closed = False
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="thinkloop-engine", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        torch.set_num_threads(self._threads)
        with torch.inference_mode():
            while (step := self._steps.get()) is not None:
                if step():
                    self._steps.put(step)

    def submit(self, step: Step) -> None:
        """Queues `step`, which must not raise. Raises `EngineClosed`."""
        with self._lock:
            if self._closed:
                raise EngineClosed("The engine is closed. Load it again with Engine.load(…).")
            self._steps.put(step)

    def start(self, work: Callable[[], T]) -> Future[T]:
        """Queues `work`, and gives a future of its result. A cancelled future is skipped."""
        future: Future[T] = Future()

        def step() -> bool:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(work())
                except BaseException as error:
                    future.set_exception(error)
            return False

        self.submit(step)
        return future

    def call(self, work: Callable[[], T]) -> T:
        """Runs `work` and waits, from any thread but the worker's own."""
        return self.start(work).result()

    async def run(self, work: Callable[[], T]) -> T:
        """Runs `work` without blocking the event loop. Cancelling the caller doesn't stop work that has begun."""
        return await asyncio.wrap_future(self.start(work))

    def close(self) -> None:
        """Stops after what is queued; a second call does nothing."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._steps.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join()
