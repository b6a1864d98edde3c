"""Flat cost: the runtime's own work per step is the same at step 10 and at step 1,000."""

import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from loop_tools import SmallTool
from thinkloop.agent.agent import Agent
from thinkloop.agent.limits import Limits
from thinkloop.agent.testing import ScriptedModel
from thinkloop.traces.events import StepFinished, StepStarted
from thinkloop.traces.reader import TraceReader

pytestmark = pytest.mark.anyio

STEPS = 1000
WINDOW = 10_000_000
"""Never full: what an edit of the context costs is priced and tested elsewhere."""
EARLY, LATE = slice(9, 49), slice(950, 990)


async def _page(text: str) -> str:
    return text * 500


def script(steps: int) -> Iterator[dict[str, Any]]:
    for n in range(steps - 1):
        yield {"thinking": "t" * 1000, "calls": [("page", {"text": f"{n:04d}"})]}
    yield {"content": "done"}


def model() -> ScriptedModel:
    return ScriptedModel(script(STEPS), window=WINDOW, piece=1000)


def agent(played: ScriptedModel, trace: Path | bool = False, steps: int = STEPS) -> Agent:
    return Agent(played, [SmallTool("page", _page)], limits=Limits(steps=steps + 300), trace=trace)  # type: ignore[arg-type]  # True is never given


async def test_function_calls_per_step_dont_grow() -> None:
    calls, per_step = 0, list[int]()

    def count(frame: object, event: str, argument: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    async for event in agent(model()).stream("Find out."):
        if isinstance(event, StepStarted):
            sys.setprofile(count)
            calls = 0
        elif isinstance(event, StepFinished):
            per_step.append(calls)
    sys.setprofile(None)
    assert len(per_step) == STEPS
    early, late = per_step[EARLY], per_step[LATE]
    assert min(early) > 0
    assert sum(late) <= 1.02 * sum(early)


async def test_text_that_is_counted_per_step_doesnt_grow() -> None:
    class Counting(ScriptedModel):
        chars = 0

        def count_tokens(self, text: str) -> int:
            self.chars += len(text)
            return super().count_tokens(text)

    counting, per_step, before = Counting(script(STEPS), window=WINDOW), list[int](), 0
    async for event in agent(counting).stream("Find out."):
        if isinstance(event, StepFinished):
            per_step.append(counting.chars - before)
            before = counting.chars
    assert len(per_step) == STEPS
    assert 0 < sum(per_step[LATE]) <= sum(per_step[EARLY])


async def test_memory_that_a_step_needs_doesnt_grow() -> None:
    """A copy of the history in every step would show: at step 1,000 it has 2,000 messages, 16 KB of references
    alone."""
    peaks = list[int]()
    tracemalloc.start()
    try:
        async for event in agent(model()).stream("Find out."):
            if isinstance(event, StepStarted):
                tracemalloc.reset_peak()
                held = tracemalloc.get_traced_memory()[0]
            elif isinstance(event, StepFinished):
                peaks.append(tracemalloc.get_traced_memory()[1] - held)
    finally:
        tracemalloc.stop()
    assert len(peaks) == STEPS
    median_early, median_late = (sorted(peaks[part])[20] for part in (EARLY, LATE))
    assert median_late <= median_early + 4096


async def test_the_trace_grows_by_what_is_new(tmp_path: Path) -> None:
    await agent(model(), tmp_path / "t").run("Find out.")
    lines = (tmp_path / "t" / "events.jsonl").read_bytes().splitlines(keepends=True)
    steps, size = list[int](), 0
    for line, event in zip(lines, TraceReader.open(tmp_path / "t").events(), strict=True):
        size += len(line)
        if isinstance(event, StepFinished):
            steps.append(size)
            size = 0
    assert len(steps) == STEPS
    assert sum(steps[LATE]) <= 1.05 * sum(steps[EARLY])


async def test_each_step_says_its_own_share() -> None:
    own = [
        event.overhead_seconds
        async for event in agent(ScriptedModel(script(100)), steps=100).stream("Find out.")
        if isinstance(event, StepFinished)
    ]
    assert sorted(own)[50] < 0.005  # typically 0.1 to 0.3 ms; the bench measures, this catches a slip of ten times
