"""What the loop itself costs per step: a scripted model, one tool with results of 2,000 characters, 1,000 steps,
trace and all.

    python examples/bench_loop.py [STEPS]

For the first 50 steps and the last 50 it prints the runtime's own share of a step (wall time, with model, tool and
reader taken out) and the processor time of everything: runtime, scripted model, tool and reader. The second is the
upper bound, and holds still on a busy machine. Then the process's memory.
"""

from __future__ import annotations

import resource
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean, median
from time import process_time
from typing import Any

import anyio
from thinkloop.agent.agent import Agent
from thinkloop.agent.limits import Limits
from thinkloop.agent.testing import ScriptedModel
from thinkloop.tools.tool import Output
from thinkloop.traces.events import Json, StepFinished

PART = 50
WINDOW = 10_000_000
"""Never full: this measures a step, not an edit of the context."""


class Page:
    """A read tool whose result has 2,000 characters."""

    name, description, effect, deadline, budget = "page", "A page of text.", "read", 10.0, 4000
    parameters: Json = {"type": "object", "properties": {"number": {"type": "integer"}}, "required": ["number"]}

    async def call(self, arguments: Json) -> Output:
        return Output(f"{arguments['number']:04d} page " * 200, record={"document": str(arguments["number"])})


def script(steps: int) -> Iterator[dict[str, Any]]:
    """Thinking of 1,000 characters in 100 pieces and one call a step; an answer at the end."""
    for number in range(steps - 1):
        yield {"thinking": "I think on. " * 83, "calls": [("page", {"number": number})]}
    yield {"content": "Done."}


async def measure(steps: int, trace: Path) -> tuple[list[float], list[float]]:
    """Seconds of each step: the runtime's own share, and the processor time of everything."""
    model = ScriptedModel(script(steps), window=WINDOW, piece=10)
    agent = Agent(model, [Page()], limits=Limits(steps=steps * 2), trace=trace)
    own, processor, before = list[float](), list[float](), process_time()
    async for event in agent.stream("Read every page."):
        if isinstance(event, StepFinished):
            own.append(event.overhead_seconds)
            processor.append(process_time() - before)
            before = process_time()
    return own, processor


def line(what: str, seconds: list[float]) -> str:
    first, last = seconds[:PART], seconds[-PART - 1 : -1]
    early, late = (f"{median(part) * 1000:.3f} ms (mean {fmean(part) * 1000:.3f})" for part in (first, last))
    return f"{what:<24} first {PART}: {early}   last {PART}: {late}   ratio {median(last) / median(first):.2f}"


def main(steps: int = 1000) -> None:
    with tempfile.TemporaryDirectory() as folder:
        own, processor = anyio.run(measure, steps, Path(folder) / "trace")
        size = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
    print(line("the runtime's own share", own))
    print(line("processor time, all", processor))
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{len(own)} steps   memory {memory:.0f} MB   trace {size / len(own) / 1024:.1f} KB a step")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]))
