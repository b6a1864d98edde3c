"""The engine's own thread: takes in what sessions want computed and does it in steps, as one batch.

A step holds one row and a few drafts of every sequence that is decoding, and at most one chunk of one sequence that is
reading: a long tool result delays the others by a chunk at a time. Jobs join and leave between any two steps. Waiting
jobs take turns; one that finds no room in the cache waits until another session gives some back, for as long as others
are at work and a while longer, and is refused then.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from time import perf_counter
from typing import NamedTuple, Protocol, TypeVar

import torch
from thinkloop.engine.drafts import StepCost
from thinkloop.engine.kv_cache import CacheFull, LatentCache
from thinkloop.engine.model import Segment, Transformer
from thinkloop.traces.events import ThinkloopError
from torch import Tensor

T = TypeVar("T")
MAX_BATCH = 32
"""Sequences that decode in one step; more take turns."""
_NARROW = 1
"""Rows up to which a small model's step is quicker on one thread."""
_PAUSE = 0.05
"""Seconds between two looks for room when nobody is at work."""
MAX_JOBS = 1024
"""Appends and generations under way or waiting; one more is refused."""
_FEW = 16
"""A job with more tokens to compute is reading, not decoding."""


class EngineClosed(ThinkloopError):
    """The engine was closed while, or before, it was asked to work."""


class EngineBusy(ThinkloopError):
    """More is asked of the engine than it queues."""


class Job(Protocol):
    """Something that needs forward passes. All methods run on the engine's thread; `flush` and `fail` never raise."""

    cache: LatentCache

    def begin(self) -> None:
        """Called once, before anything else."""
        ...

    def wanted(self, cost: StepCost) -> Sequence[int]:
        """The tokens to compute next, at least one; empty when it is done or pauses, which ends the job's stay. The
        same until `computed` is called."""
        ...

    def computed(self, logits: Tensor, count: int) -> None:
        """The first `count` of the wanted tokens are in the cache; float32 `logits [count, V]` after each of them, or
        `[1, V]` after the last where they were more than a few."""
        ...

    def shorten(self) -> bool:
        """Wants less from now on, as little as it can go on with; true when that is less."""
        ...

    def flush(self) -> None:
        """Its next step may be long in coming: hands on what it has."""
        ...

    def fail(self, error: BaseException) -> None:
        """It can't go on. Gives back what it alone holds."""
        ...


class _Refused(NamedTuple):
    job: Job
    error: BaseException
    long: bool


class Scheduler:
    """Runs jobs on one daemon thread."""

    def __init__(self, model: Transformer, threads: Sequence[int], *, chunk: int, patience: float) -> None:
        """`threads`: how many torch may use for a step of a few rows, and of more; `chunk`: tokens read in one step;
        `patience`: seconds that a job without room waits when nobody else is at work."""
        self.cost = StepCost()
        self._model, self._threads, self._chunk, self._patience = model, threads, chunk, patience
        self._stuck_since: float | None = None
        self._inbox: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._jobs: deque[Job] = deque()
        self._closed = False
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="thinkloop-engine", daemon=True)
        self._thread.start()

    def add(self, job: Job) -> None:
        """Begins `job`; it takes part from the next step on. From any thread. Raises `EngineClosed` and `EngineBusy`."""
        if len(self._jobs) >= MAX_JOBS:
            raise EngineBusy(f"{MAX_JOBS} sessions are at work or waiting. Let some finish before asking for more.")

        def task() -> None:
            try:
                job.begin()
            except BaseException as error:
                job.fail(error)
            else:
                self._jobs.append(job)

        self._put(task)

    def resume(self, job: Job) -> None:
        """Lets a job that has begun, and may have paused, take part again."""
        self._put(lambda: None if job in self._jobs else self._jobs.append(job))

    def start(self, work: Callable[[], T]) -> Future[T]:
        """Runs `work` between two steps, and gives a future of its result. A cancelled future is skipped."""
        future: Future[T] = Future()

        def task() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(work())
                except BaseException as error:
                    future.set_exception(error)

        self._put(task)
        return future

    def call(self, work: Callable[[], T]) -> T:
        """Runs `work` and waits, from any thread but the engine's own."""
        return self.start(work).result()

    async def run(self, work: Callable[[], T]) -> T:
        """Runs `work` without blocking the event loop. Cancelling the caller doesn't stop work that has begun."""
        return await asyncio.wrap_future(self.start(work))

    def close(self) -> None:
        """Stops after what was asked before; jobs that are left fail. A second call does nothing."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._inbox.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _put(self, task: Callable[[], None]) -> None:
        with self._lock:
            if self._closed:
                raise EngineClosed("The engine is closed. Load it again with Engine.load(…).")
            self._inbox.put(task)

    def _run(self) -> None:
        error: BaseException = EngineClosed("The engine was closed while a session was working.")
        try:
            with torch.inference_mode():
                while self._take_in():
                    if self._jobs:
                        self._step()
        except BaseException as bug:
            error = bug
            raise
        finally:
            with self._lock:
                self._closed = True
            for job in self._jobs:
                job.fail(error)

    def _take_in(self) -> bool:
        """Does what has come in; waits for it when there is nothing else to do. False when it is time to stop."""
        while not self._jobs or self._stuck_since is not None or not self._inbox.empty():
            try:
                task = self._inbox.get(timeout=_PAUSE if self._stuck_since is not None else None)
            except Empty:
                return True
            if task is None:
                return False
            task()
            self._stuck_since = self._stuck_since if self._jobs else None
            if self._jobs and self._inbox.empty():
                return True
        return True

    def _step(self) -> None:
        batch = self._batch()
        if not batch:
            return
        rows = sum(len(ids) for _, ids in batch)  # before jobs take them off their lists
        started, long = perf_counter(), [job for job, ids in batch if len(ids) > _FEW]
        for job, _ in batch if long else ():
            job.flush()
        try:
            torch.set_num_threads(self._threads[rows > _NARROW])
            segments = [Segment(job.cache, ids, every=len(ids) <= _FEW) for job, ids in batch]
            results = self._model.forward(segments)
        except BaseException as error:  # everyone's state is whole: lengths move only after the pass
            self._drop(long or [job for job, _ in batch], error)  # the reader may have been too much: once more without
            return
        took = perf_counter() - started
        for (job, ids), logits in zip(batch, results, strict=True):
            try:
                job.computed(logits, len(ids))
            except BaseException as error:
                self._drop([job], error)
        if not long:
            self.cost.sequences = len(batch)
            if results[0].is_cuda:  # choosing tokens has waited for the device, the pass alone has not
                took = perf_counter() - started
            self.cost.learn(rows, took)

    def _drop(self, jobs: Sequence[Job], error: BaseException) -> None:
        for job in jobs:
            self._jobs.remove(job)
            job.fail(error)

    def _batch(self) -> list[tuple[Job, Sequence[int]]]:
        """The next step: whose tokens, and which. Takes jobs that want nothing off the list; what didn't get a place
        comes first next time."""
        batch: list[tuple[Job, Sequence[int]]] = []
        served, waiting, refused = deque[Job](), deque[Job](), list[_Refused]()
        reading = False
        for job in self._jobs:
            ids = self._wanted(job)
            long = len(ids) > _FEW
            if not ids:
                continue
            if len(batch) >= MAX_BATCH or (long and reading):
                waiting.append(job)
                continue
            if long:
                ids = ids[: self._model.chunk_size(job.cache.length, self._chunk)]
            try:
                ids = self._with_room(job, ids)
            except BaseException as error:
                refused.append(_Refused(job, error, long))
                continue
            if not ids:  # cancelled while room was made for it
                continue
            reading = reading or long
            batch.append((job, ids))
            served.append(job)
        self._refuse(refused, at_work=bool(batch))
        for job in waiting:
            job.flush()
        waiting.extendleft(one.job for one in reversed(refused))
        self._jobs = waiting + served
        return batch

    def _wanted(self, job: Job) -> Sequence[int]:
        try:
            return job.wanted(self.cost)
        except BaseException as error:
            job.fail(error)
            return ()

    def _with_room(self, job: Job, ids: Sequence[int]) -> Sequence[int]:
        """Reserves the cache's rows for `ids`, or for what the job wants at least. Raises `CacheFull`."""
        try:
            job.cache.reserve(job.cache.length + len(ids))
        except CacheFull:
            if not job.shorten():
                raise
            ids = job.wanted(self.cost)
            job.cache.reserve(job.cache.length + len(ids))
        return ids

    def _refuse(self, refused: list[_Refused], *, at_work: bool) -> None:
        """Ends what can't go on, and of the jobs that have waited for room too long one: a reader first, whose blocks
        the others may need."""
        for one in [one for one in refused if not isinstance(one.error, CacheFull)]:
            refused.remove(one)
            one.job.fail(one.error)
        if self._gives_up(at_work, bool(refused)):
            victim = max(refused, key=lambda one: one.long)
            refused.remove(victim)
            victim.job.fail(victim.error)
        for one in refused:
            one.job.flush()

    def _gives_up(self, at_work: bool, refused: bool) -> bool:
        """Whether jobs without room have waited long enough."""
        if at_work or not refused:
            self._stuck_since = None
            return False
        now = perf_counter()
        self._stuck_since = self._stuck_since or now
        if now - self._stuck_since < self._patience:
            return False
        self._stuck_since = None
        return True
