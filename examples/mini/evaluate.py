"""Measure a model on held-out worlds, in the real loop with the real tools: `python evaluate.py --tasks 100`.

Every task is one run of `thinkloop.Agent` with search, open and python over the folder of a world that shares no word with
the training worlds. An answer counts when it is exactly right. The last line printed is a JSON object:
`{"accuracy": …, "by_family": {…}, "valid_calls": …, "tokens_per_second": …}`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from multiprocessing.queues import Queue
from pathlib import Path

import anyio
from tasks import FAMILIES, Task, make_task
from thinkloop.tools.validate import check_arguments
from world import make_world

import thinkloop as tl

CHAINS = (30, 100, 300)
EVALUATED = tuple(family for family in FAMILIES if family != "chain") + tuple(f"chain{links}" for links in CHAINS)
TASKS_PER_WORLD = 20


@dataclass(slots=True)
class Outcome:
    """How one task went."""

    family: str
    right: bool
    calls: int
    valid: int
    tokens: int
    decode_seconds: float
    line: str = ""


@dataclass(frozen=True, slots=True)
class Job:
    """Some tasks of one family on one world."""

    model: str
    family: str
    world: int
    tasks: int
    seed: int
    grammar: bool


async def run_task(agent: tl.Agent, family: str, task: Task) -> Outcome:
    """Run one task and count what its run shows."""
    calls = valid = tokens = 0
    seconds = 0.0
    schemas: dict[str, tl.events.Json] = {}
    answer = reason = ""
    async with agent.stream(task.question) as events:
        async for event in events:
            if isinstance(event, tl.events.RunStarted):
                schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in event.tools}
            elif isinstance(event, tl.events.ToolCall):
                calls += 1
                valid += is_valid(event, schemas)
            elif isinstance(event, tl.events.Usage):
                tokens += event.completion_tokens
                seconds += event.decode_seconds
            elif isinstance(event, tl.events.RunFinished):
                answer, reason = event.answer, event.reason
    right = answer.strip() == task.answer
    line = "" if right else f"{family}: {task.question} -> {answer[:60]!r} ({reason}), not {task.answer!r}"
    return Outcome(family, right, calls, valid, tokens, seconds, line)


def is_valid(call: tl.events.ToolCall, schemas: dict[str, tl.events.Json]) -> bool:
    """Whether a call is well formed, names a declared tool and fits its schema."""
    return not call.problem and call.name in schemas and check_arguments(schemas[call.name], call.arguments) is None


async def run_job(job: Job) -> list[Outcome]:
    world = make_world(job.world, held_out=True)
    rng = random.Random(f"{job.seed}/{job.family}/{job.world}")
    links = int(job.family.removeprefix("chain")) if job.family.startswith("chain") else None
    outcomes = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        world.write(folder)
        tools = [tl.Search(folder), tl.Python()]
        limits = tl.Limits(steps=400)
        async with tl.Agent(job.model, tools, limits=limits, trace=False, grammar=job.grammar) as agent:
            for _ in range(job.tasks):
                task = make_task(world, "chain" if links else job.family, rng, links=links)
                outcomes.append(await run_task(agent, job.family, task))
    return outcomes


def pin(cores: Queue[int]) -> None:
    """Give this process a core of its own: engines that share two cores wait for each other's threads."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {cores.get()})


def work(job: Job) -> list[Outcome]:
    return anyio.run(run_job, job)


def jobs(arguments: argparse.Namespace) -> Iterator[Job]:
    for family in arguments.family or EVALUATED:
        left, world = arguments.tasks, arguments.seed * 1000
        while left > 0:
            yield Job(arguments.model, family, world, min(left, TASKS_PER_WORLD), arguments.seed, arguments.grammar)
            left, world = left - TASKS_PER_WORLD, world + 1


@dataclass(slots=True)
class Tally:
    """Sums over outcomes."""

    outcomes: list[Outcome] = field(default_factory=list)

    def summary(self) -> dict[str, object]:
        by_family = {}
        for family in dict.fromkeys(outcome.family for outcome in self.outcomes):
            group = [outcome.right for outcome in self.outcomes if outcome.family == family]
            by_family[family] = round(sum(group) / len(group), 4)
        calls = sum(outcome.calls for outcome in self.outcomes)
        return {
            "accuracy": round(sum(outcome.right for outcome in self.outcomes) / max(len(self.outcomes), 1), 4),
            "by_family": by_family,
            "valid_calls": round(sum(outcome.valid for outcome in self.outcomes) / max(calls, 1), 5),
            "tokens_per_second": round(
                sum(outcome.tokens for outcome in self.outcomes)
                / max(sum(outcome.decode_seconds for outcome in self.outcomes), 1e-9),
                1,
            ),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mini", help='"mini", a checkpoint folder or a URL')
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--tasks", type=int, default=100, help="tasks a family")
    parser.add_argument("--family", action="append", choices=EVALUATED, help="only this one (may be given again)")
    parser.add_argument("--grammar", action="store_true", help="let a grammar keep the calls valid")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="print nothing but the last line")
    arguments = parser.parse_args()
    tally = Tally()
    free = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0]
    cores: Queue[int] = multiprocessing.Queue()
    for process in range(arguments.processes):
        cores.put(free[process % len(free)])
    with ProcessPoolExecutor(arguments.processes, initializer=pin, initargs=(cores,)) as pool:
        for outcomes in pool.map(work, jobs(arguments)):
            tally.outcomes += outcomes
            if not arguments.json:
                right = sum(outcome.right for outcome in outcomes)
                print(f"{outcomes[0].family}: {right}/{len(outcomes)}", file=sys.stderr, flush=True)
                for outcome in outcomes:
                    if outcome.line:
                        print("  " + outcome.line, file=sys.stderr, flush=True)
    print(json.dumps(tally.summary()))


if __name__ == "__main__":
    main()
