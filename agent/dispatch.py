"""Runs one turn's calls: bad ones become error results, reads run side by side, writes one after the other in order.

Nothing a call does raises here but cancellation. Results are delivered in call order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from time import perf_counter

import anyio
from thinkloop.agent.arguments import Check, Reading, copied, fits_schema, read_arguments, repair_note
from thinkloop.agent.repetition import Repetition, call_key, refusal, reminder, verdict
from thinkloop.tools.call_record import recording
from thinkloop.tools.outcome import message_of, passes_on, plain_json, plain_output, told
from thinkloop.tools.tool import Output, Tool, ToolError
from thinkloop.traces.events import Json, ToolCall, ToolResult

CALLS_PER_TURN = 16
"""Calls of one turn that are run; the rest get an error result."""
SIDE_BY_SIDE = 8
"""Reads that run at the same time."""

CANCELLED = "error: cancelled before it finished"

Deliver = Callable[[ToolResult], Awaitable[None]]


@dataclass(slots=True)
class Job:
    """A call on its way to a result. `broken`: it could not be run as written, or the tool broke under it; `facts` are
    what is remembered of it besides its output."""

    call: ToolCall
    key: str
    tool: Tool | None = None
    reading: Reading = field(default_factory=lambda: Reading(None))
    output: Output | None = None
    facts: Json = field(default_factory=dict)
    started: float = 0.0
    seconds: float = 0.0
    broken: bool = False
    repeat_of: str = ""
    same_as: Job | None = None

    def fail(self, message: str, *, broken: bool = True) -> None:
        self.output = Output(f"error: {message}", ok=False)
        self.broken = broken

    @property
    def waits(self) -> bool:
        """Whether there is something to run for it."""
        return self.tool is not None and self.output is None and self.same_as is None

    def result(self) -> ToolResult:
        """The result as it stands; of a call that has no output yet, that it was cancelled."""
        source = self.same_as or self
        output = source.output or Output(CANCELLED, ok=False)
        record = output.record | plain_json(source.facts)
        if self.repeat_of:
            record["repeat_of"] = self.repeat_of
        content = output.content
        if self.reading.repaired and self.reading.arguments is not None:
            record["repaired"] = {"raw": self.call.raw, "to": self.reading.arguments}
            content = f"{content}\n\n{repair_note(self.reading.arguments)}"
        return ToolResult(
            call_id=self.call.id, name=self.call.name, content=content, ok=output.ok,
            display=output.display, record=record, files=list(output.files), seconds=self.seconds,
        )  # fmt: skip


class Dispatcher:
    """Takes a turn's calls to their results, for as long as the run lasts.

    `tools` maps names to tools; `check` says what is wrong with arguments for a schema, or None. `bad_turns` counts the
    turns in a row of which no call could be run.
    """

    def __init__(self, tools: Mapping[str, Tool], check: Check = fits_schema) -> None:
        self._tools = tools
        self._check = check
        self.repetition = Repetition()
        self.bad_turns = 0
        self.tool_seconds = 0.0
        """Wall time that tools have run, over the whole run; calls side by side count once."""
        self._open: deque[Job] = deque()

    async def run(self, calls: Sequence[ToolCall], deliver: Deliver, *, cut_off: bool = False) -> None:
        """Runs the calls and awaits `deliver(result)` for each, in order. `cut_off` says that the turn ended before the
        model was done. Raises only what cancels it; then `cut_short` has what was not delivered."""
        jobs = [Job(call, call_key(call)) for call in calls]
        self._open = deque(jobs)
        self.repetition.step(calls, [job.key for job in jobs])
        for index, job in enumerate(jobs):
            await self._prepare(job, index, cut_off=cut_off and job is jobs[-1])
        _share(jobs)
        for batch in _batches(jobs):
            try:
                await _run_batch(batch)
            finally:
                self.tool_seconds += _wall_seconds(batch)
            for job in batch:
                self._open.popleft()
                await deliver(self._told(job))
        self.bad_turns = self.bad_turns + 1 if all(job.broken for job in jobs) else 0

    def cut_short(self) -> list[ToolResult]:
        """Results, once, of the calls that were not delivered when `run` was cancelled: honest ones for those cut
        off."""
        results = [job.result() for job in self._open]
        self._open.clear()
        return results

    def idle(self) -> None:
        """Takes in a turn without calls."""
        self.repetition.step((), ())

    async def _prepare(self, job: Job, index: int, *, cut_off: bool) -> None:
        problem = self._refusal(job.call, index)
        if problem:
            return job.fail(problem)
        tool = self._tools[job.call.name]
        job.reading = await read_arguments(job.call, tool, self._check, cut_off=cut_off)
        if job.reading.arguments is None:
            return job.fail(job.reading.problem)
        job.tool = tool
        repeats = self.repetition.repeats(job.key)
        if verdict(repeats) in ("refuse", "stop"):
            job.repeat_of = self.repetition.first_id(job.key)
            job.output = Output(refusal(repeats, job.repeat_of), ok=False)
        return None

    def _refusal(self, call: ToolCall, index: int) -> str:
        if index >= CALLS_PER_TURN:
            return f"not run: one turn may make {CALLS_PER_TURN} calls; make the others in the next turn"
        if call.problem and not call.name:
            return f"this call could not be read: {call.problem}"
        return "" if call.name in self._tools else self._unknown(call.name)

    def _unknown(self, name: str) -> str:
        names = ", ".join(self._tools)
        return f'there is no tool "{name[:100]}"; ' + (
            f"the tools are {names}" if names else "there are no tools: answer"
        )

    def _told(self, job: Job) -> ToolResult:
        result = job.result()
        repeats = self.repetition.repeats(job.key)
        if verdict(repeats) != "remind":
            return result
        return replace(result, content=f"{result.content}\n\n{reminder(repeats)}")


def _share(jobs: Sequence[Job]) -> None:
    """Lets the same call made twice in a turn share one execution, unless another write in between may have changed
    its result."""
    first: dict[str, Job] = {}
    for job in jobs:
        if not job.waits or job.tool is None:
            continue
        if job.key in first:
            job.same_as = first[job.key]
            continue
        if job.tool.effect == "write":
            first.clear()
        first[job.key] = job


def _batches(jobs: Sequence[Job]) -> Iterator[list[Job]]:
    """Runs of jobs that may go side by side: neighbouring reads (and jobs with nothing to run); a write stands
    alone."""
    batch: list[Job] = []
    for job in jobs:
        if _is_write(job):
            if batch:
                yield batch
            yield [job]
            batch = []
        else:
            batch.append(job)
    if batch:
        yield batch


def _is_write(job: Job) -> bool:
    return job.waits and job.tool is not None and job.tool.effect == "write"


def _wall_seconds(batch: Sequence[Job]) -> float:
    ran = [job for job in batch if job.started]
    return max(job.started + job.seconds for job in ran) - min(job.started for job in ran) if ran else 0.0


async def _run_batch(batch: Sequence[Job]) -> None:
    """Each in a task of its own: a tool that cancels its task cancels nothing but itself."""
    jobs = [job for job in batch if job.waits]
    limiter = anyio.CapacityLimiter(SIDE_BY_SIDE)
    async with anyio.create_task_group() as group:
        for job in jobs:
            group.start_soon(_run_limited, job, limiter)


async def _run_limited(job: Job, limiter: anyio.CapacityLimiter) -> None:
    async with limiter:
        await _run_job(job)


async def _run_job(job: Job) -> None:
    assert job.tool is not None
    tool, job.started = job.tool, perf_counter()
    with recording() as job.facts:
        try:
            with anyio.move_on_after(tool.deadline) as scope:
                job.output = plain_output(await tool.call(copied(job.reading.arguments)))
            if scope.cancelled_caught:
                job.fail(f"{tool.name} took longer than its deadline of {tool.deadline:g} s and {_stopped(job.facts)}")
        except ToolError as problem:
            job.fail(message_of(problem), broken=False)
        except BaseException as problem:  # a tool that breaks, even one that exits, must not take the run along
            if passes_on(problem):
                raise
            job.fail(f"{tool.name} failed: {told(problem)}")
        finally:
            job.seconds = perf_counter() - job.started


def _stopped(facts: Json) -> str:
    return "can't be stopped: it still runs" if facts.get("still_running") else "was stopped"
