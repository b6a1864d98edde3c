"""Flat cost: the runtime's own work per step is the same at step 10 and at step 1,000."""

import sys
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, SupportsIndex

import pytest
from loop_tools import SmallTool
from thinkloop.agent.agent import Agent
from thinkloop.agent.limits import Limits
from thinkloop.agent.model import Conversation, Message, Turn
from thinkloop.agent.testing import ScriptedModel
from thinkloop.traces.events import Event, Json, StepFinished
from thinkloop.traces.reader import TraceReader

pytestmark = pytest.mark.anyio

STEPS = 1000
WINDOW = 10_000_000
"""Never full: what an edit of the context costs is priced and tested elsewhere."""
EARLY, LATE = slice(9, 49), slice(950, 990)


async def _page(text: str) -> str:
    return text * 500


def script(steps: int = STEPS, probe: Callable[[], object] = lambda: None) -> Iterator[dict[str, Any]]:
    """`probe` is called once in each step, from within the loop, just before the model's turn."""
    for n in range(steps - 1):
        probe()
        yield {"thinking": "t" * 1000, "calls": [("page", {"text": f"{n:04d}"})]}
    probe()
    yield {"content": "done"}


async def run(model: ScriptedModel, trace: Path | None = None) -> None:
    tool = SmallTool("page", _page)
    result = await Agent(model, [tool], limits=Limits(steps=2 * STEPS), trace=trace or False).run("Find out.")
    assert (result.reason, result.steps) == ("answered", STEPS)


def scripted(probe: Callable[[], object]) -> ScriptedModel:
    return ScriptedModel(script(probe=probe), window=WINDOW, piece=1000)


def differences(totals: Sequence[int]) -> list[int]:
    assert len(totals) == STEPS
    return [later - earlier for earlier, later in pairwise(totals)]


async def test_function_calls_per_step_dont_grow() -> None:
    calls, totals = 0, list[int]()

    def count(frame: object, event: str, argument: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        await run(scripted(lambda: totals.append(calls)))
    finally:
        sys.setprofile(None)
    per_step = differences(totals)
    assert min(per_step) > 0
    assert sum(per_step[LATE]) <= 1.02 * sum(per_step[EARLY])


async def test_text_that_is_counted_per_step_doesnt_grow() -> None:
    class Counting(ScriptedModel):
        chars = 0

        def count_tokens(self, text: str) -> int:
            self.chars += len(text)
            return super().count_tokens(text)

    totals = list[int]()
    model = Counting(script(probe=lambda: totals.append(model.chars)), window=WINDOW, piece=1000)
    await run(model)
    per_step = differences(totals)
    assert 0 < sum(per_step[LATE]) <= sum(per_step[EARLY])


class Watched(list[Message]):
    """A history that counts how many of its messages are looked at."""

    looks = 0

    def __iter__(self) -> Iterator[Message]:
        self.looks += len(self)
        return super().__iter__()

    def __getitem__(self, at: SupportsIndex | slice) -> Any:
        self.looks += len(range(*at.indices(len(self)))) if isinstance(at, slice) else 1
        return super().__getitem__(at)


async def test_no_step_reads_the_history_again() -> None:
    class Watching(ScriptedModel):
        history: Watched | None = None

        async def stream(self, conversation: Conversation, tools: Sequence[Json], turn: Turn) -> AsyncIterator[Event]:
            if self.history is None:
                conversation.messages = self.history = Watched(conversation.messages)
            async for event in super().stream(conversation, tools, turn):
                yield event

    totals = list[int]()
    model = Watching(script(probe=lambda: totals.append(model.history.looks)), window=WINDOW, piece=1000)
    await run(model)
    per_step = differences(totals)
    assert max(per_step[LATE]) <= max(per_step[EARLY]) <= 8


async def test_the_trace_grows_by_what_is_new(tmp_path: Path) -> None:
    await run(scripted(lambda: None), tmp_path / "t")
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
    agent = Agent(ScriptedModel(script(100)), [SmallTool("page", _page)], trace=False)
    own = [event.overhead_seconds async for event in agent.stream("Find out.") if isinstance(event, StepFinished)]
    # Typically 0.2 ms; the bench measures, this catches a slip of ten times even on a busy machine.
    assert 0 < sorted(own)[50] < 0.005
