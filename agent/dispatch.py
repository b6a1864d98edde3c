"""Runs one turn's calls: bad ones become error results, reads run side by side, writes one after the other in order.

Nothing a call does raises here but cancellation. Results are delivered in call order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from time import perf_counter

import anyio
from thinkloop.agent.repetition import Repetition, call_key, refusal, reminder, verdict
from thinkloop.tools.tool import Output, Tool, ToolError
from thinkloop.traces.events import Json, ToolCall, ToolResult

CALLS_PER_TURN = 16
"""Calls of one turn that are run; the rest get an error result."""
SIDE_BY_SIDE = 8
"""Reads that run at the same time."""

CANCELLED = "error: cancelled before it finished"

Deliver = Callable[[ToolResult], Awaitable[None]]
Check = Callable[[Json, Json], str | None]


@dataclass(slots=True)
class Job:
    """A call on its way to a result. `broken`: it could not be run as written, or the tool broke under it."""

    call: ToolCall
    key: str
    tool: Tool | None = None
    output: Output | None = None
    started: float = 0.0
    seconds: float = 0.0
    broken: bool = False
    repeat_of: str = ""
    same_as: Job | None = None

    def fail(self, message: str, *, broken: bool = True) -> None:
        self.output = Output(f"error: {message}", ok=False)
        self.broken = broken

    def result(self) -> ToolResult:
        output = self.same_as.output if self.same_as else self.output
        if output is None:
            output = Output(CANCELLED, ok=False)
        record = output.record | ({"repeat_of": self.repeat_of} if self.repeat_of else {})
        return ToolResult(
            call_id=self.call.id, name=self.call.name, content=output.content, ok=output.ok,
            display=output.display, record=record, seconds=self.seconds,
        )  # fmt: skip


def _fits_schema(schema: Json, arguments: Json) -> str | None:
    from thinkloop.tools.validate import check_arguments  # brings jsonschema, 60 ms: a run without calls never needs it

    return check_arguments(schema, arguments)


class Dispatcher:
    """Takes a turn's calls to their results, for as long as the run lasts.

    `tools` maps names to tools; `check` says what is wrong with arguments for a schema, or None. `bad_turns` counts the
    turns in a row of which no call could be run.
    """

    def __init__(self, tools: Mapping[str, Tool], check: Check = _fits_schema) -> None:
        self._tools = tools
        self._check = check
        self.repetition = Repetition()
        self.bad_turns = 0
        self.tool_seconds = 0.0
        """Wall time that tools have run, over the whole run; calls side by side count once."""
        self._open: deque[Job] = deque()

    async def run(self, calls: Sequence[ToolCall], deliver: Deliver) -> None:
        """Runs the calls and awaits `deliver(result)` for each, in order. Raises only what cancels it; then `cut_short`
        has what was not delivered."""
        jobs = self._jobs(calls)
        self._open = deque(jobs)
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

    def _jobs(self, calls: Sequence[ToolCall]) -> list[Job]:
        jobs = [Job(call, call_key(call)) for call in calls]
        self.repetition.step(calls, [job.key for job in jobs])
        for index, job in enumerate(jobs):
            self._prepare(job, index)
        _share(jobs)
        return jobs

    def _prepare(self, job: Job, index: int) -> None:
        problem = self._problem(job.call, index)
        if problem:
            return job.fail(problem)
        job.tool = self._tools[job.call.name]
        repeats = self.repetition.repeats(job.key)
        if verdict(repeats) in ("refuse", "stop"):
            job.repeat_of = self.repetition.first_id(job.key)
            job.output = Output(refusal(repeats, job.repeat_of), ok=False)
        return None

    def _problem(self, call: ToolCall, index: int) -> str:
        if index >= CALLS_PER_TURN:
            return f"not run: one turn may make {CALLS_PER_TURN} calls; make the others in the next turn"
        if call.problem and not call.name:
            return f"this call could not be read: {call.problem}"
        if call.name not in self._tools:
            return self._unknown(call.name)
        if call.problem or call.arguments is None:
            problem = call.problem or "the arguments are not a JSON object"
            return f"this call of {call.name} could not be read: {problem}; write it again with whole JSON arguments"
        wrong = self._check(self._tools[call.name].parameters, call.arguments)
        return f"the arguments don't fit {call.name}: {wrong}" if wrong else ""

    def _unknown(self, name: str) -> str:
        names = ", ".join(self._tools)
        return f'there is no tool "{name}"; ' + (f"the tools are {names}" if names else "there are no tools: answer")

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
        if job.tool is None or job.output is not None:
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
    return job.tool is not None and job.output is None and job.same_as is None and job.tool.effect == "write"


def _wall_seconds(batch: Sequence[Job]) -> float:
    ran = [job for job in batch if job.started]
    return max(job.started + job.seconds for job in ran) - min(job.started for job in ran) if ran else 0.0


async def _run_batch(batch: Sequence[Job]) -> None:
    jobs = [job for job in batch if job.tool is not None and job.output is None and job.same_as is None]
    if len(jobs) < 2:
        return await _run_job(jobs[0]) if jobs else None
    limiter = anyio.CapacityLimiter(SIDE_BY_SIDE)
    async with anyio.create_task_group() as group:
        for job in jobs:
            group.start_soon(_run_limited, job, limiter)
    return None


async def _run_limited(job: Job, limiter: anyio.CapacityLimiter) -> None:
    async with limiter:
        await _run_job(job)


def _checked(output: object) -> Output:
    if isinstance(output, Output):
        return output
    raise TypeError(f"a tool must give an `Output`, not {type(output).__name__}")


async def _run_job(job: Job) -> None:
    assert job.tool is not None
    assert job.call.arguments is not None
    tool, job.started = job.tool, perf_counter()
    try:
        with anyio.move_on_after(tool.deadline) as scope:
            job.output = _checked(await tool.call(job.call.arguments))
        if scope.cancelled_caught:
            job.fail(f"{tool.name} took longer than its deadline of {tool.deadline:g} s and was stopped")
    except ToolError as problem:
        job.fail(str(problem), broken=False)
    except (Exception, SystemExit) as problem:  # a tool that breaks, even one that exits, must not take the run along
        job.fail(f"{tool.name} failed: {type(problem).__name__}: {problem}")
    finally:
        job.seconds = perf_counter() - job.started
