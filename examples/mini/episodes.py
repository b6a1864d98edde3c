"""Training text: the solver drives the real tools, its run is rendered in the exact token format, and what the model must
write itself is marked.

An episode is a token sequence with a mask of the tokens to learn. Long chains are cut into windows such as the context
policy leaves: prompt and task, then some whole steps from anywhere in the run. Some episodes have a worn prompt (words of
the system text and the tool declarations left out), so that the model doesn't hang on their exact wording.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from tasks import Solver, Task, _fact, make_also_written, make_task, solve
from thinkloop.engine.template import Template
from thinkloop.engine.tokenizer import Tokenizer
from world import RELATIONS, Entity, World

SYSTEM = "You are a research agent. Think, call tools, read the results, and answer with what they show."


BARE_PROMPT = 20
"""Tokens: a shorter prompt declares no tools."""


class Tools(Protocol):
    """The tools as the solver needs them: declarations, and calls that give (result text, ok)."""

    declarations: list[dict[str, Any]]

    def call(self, name: str, arguments: dict[str, Any]) -> tuple[str, bool]: ...


@dataclass(slots=True)
class Step:
    """One call of a run: thought, call, result."""

    thinking: str
    name: str
    arguments: dict[str, Any]
    result: str


@dataclass(slots=True)
class Run:
    """A solver's whole run."""

    task: Task
    steps: list[Step]
    thinking: str
    answer: str


@dataclass(slots=True)
class Episode:
    """Token ids, and which of them are the model's own to learn."""

    ids: list[int] = field(default_factory=list)
    learn: list[bool] = field(default_factory=list)

    def add(self, ids: Sequence[int], *, learn: bool = False) -> None:
        self.ids += ids
        self.learn += [learn] * len(ids)


def solve_with(tools: Tools, task: Task) -> Run:
    """Run the solver of a task on real tools. Raises AssertionError when it doesn't reach the exact answer."""
    solver: Solver = solve(task)
    steps: list[Step] = []
    thinking, name, arguments = next(solver)
    while True:
        result, ok = tools.call(name, arguments)
        steps.append(Step(thinking, name, arguments, result))
        try:
            thinking, name, arguments = solver.send((result, ok))
        except StopIteration as stop:
            thinking, answer = stop.value
            assert answer == task.answer, (task, answer)
            return Run(task, steps, thinking, answer)


class Renderer:
    """Runs to episodes, in the vocabulary of one tokenizer."""

    def __init__(self, tokenizer: Tokenizer, declarations: list[dict[str, Any]], system: str = SYSTEM) -> None:
        self._tokenizer = tokenizer
        self._template = Template(tokenizer)
        self._declarations = declarations
        self._system = system
        self._prefix = self._template.render_prefix(declarations, [{"role": "system", "content": system}])

    def prompt(self, rng: random.Random, *, bare: float) -> list[int]:
        """Ids before the task: as they are, or worn, or (with probability `bare`) nearly nothing."""
        if rng.random() < bare:
            return self._template.render_prefix([], [{"role": "system", "content": ""}])
        if rng.random() < 0.6:
            return self._prefix
        keep = rng.random()
        ends = {self._tokenizer.special(name) for name in ("<|im_system|>", "<|im_middle|>", "<|im_end|>")}
        return [token for token in self._prefix if token in ends or rng.random() < keep]

    def run(self, run: Run, rng: random.Random, *, bare: float, first: int = 0, last: int | None = None) -> Episode:
        """The episode of steps `first` to `last` (exclusive; None: to the answer). A run that starts later than its
        first step begins with a step that is only read. Half of the runs without a full prompt are skimmed: thoughts
        and pages, without the calls between them, so that decisions come twice as densely."""
        episode = Episode()
        prompt = self.prompt(rng, bare=bare)
        episode.add(prompt)
        episode.add(self._template.render_new([{"role": "user", "content": run.task.question}]))
        end = len(run.steps) if last is None else min(last, len(run.steps))
        add = self._skimmed if len(prompt) < BARE_PROMPT and rng.random() < 0.5 else self._step
        for index in range(first, end):
            add(episode, run.steps[index], index, learn=index > first or first == 0)
        if end == len(run.steps):
            self._assistant(episode, {"role": "assistant", "reasoning_content": run.thinking, "content": run.answer})
        return episode

    def glimpse(self, run: Run, index: int, rng: random.Random) -> Episode:
        """The task, the result before step `index`, and that step (or the answer): one decision, nothing else."""
        episode = Episode()
        episode.add(self.prompt(rng, bare=1.0))
        episode.add(self._template.render_new([{"role": "user", "content": run.task.question}]))
        self._result(episode, run.steps[index - 1], index - 1)
        if index == len(run.steps):
            self._assistant(episode, {"role": "assistant", "reasoning_content": run.thinking, "content": run.answer})
        else:
            self._step(episode, run.steps[index], index, learn=True)
        return episode

    def _step(self, episode: Episode, step: Step, index: int, *, learn: bool) -> None:
        call_id = f"functions.{step.name}:{index}"
        call = {"id": call_id, "function": {"name": step.name, "arguments": _json(step.arguments)}}
        message = {"role": "assistant", "reasoning_content": step.thinking, "content": "", "tool_calls": [call]}
        self._assistant(episode, message, learn=learn)
        self._result(episode, step, index)

    def _skimmed(self, episode: Episode, step: Step, index: int, *, learn: bool) -> None:
        if step.name == "python":
            self._step(episode, step, index, learn=learn)
            return
        if not step.thinking.startswith("Found "):
            message = {"role": "assistant", "reasoning_content": step.thinking, "content": ""}
            self._assistant(episode, message, learn=learn)
            episode.learn[-1] = False  # a thought without a call would not end the message
        if step.name == "open" or step.result.startswith("No results"):
            self._result(episode, step, index)

    def _result(self, episode: Episode, step: Step, index: int) -> None:
        call_id = f"functions.{step.name}:{index}"
        result = {"role": "tool", "tool_call_id": call_id, "name": step.name, "content": step.result}
        episode.add(self._template.render_new([result]))

    def lookups(self, pages: list[tuple[Entity, str]], rng: random.Random) -> Episode:
        """Pages, each followed by questions about every one of its facts: retrieval at its densest."""
        episode = Episode()
        episode.add(self.prompt(rng, bare=1.0))
        for index, (entity, page) in enumerate(pages):
            result = {"role": "tool", "tool_call_id": f"functions.open:{index}", "name": "open", "content": page}
            episode.add(self._template.render_new([result]))
            for key in rng.sample(list(entity.facts), len(entity.facts)):
                question = {"role": "user", "content": f"What is {entity.name}'s {key}?"}
                episode.add(self._template.render_new([question]))
                value = _fact(page, key)
                thinking = f"So {entity.name}'s {key} {value}."
                self._assistant(episode, {"role": "assistant", "reasoning_content": thinking, "content": value})
        return episode

    def drill(self, facts: list[tuple[str, str]], rng: random.Random) -> Episode:
        """A list of facts, then every value asked for twice by its key alone: the first thing to learn is to copy."""
        episode = Episode()
        episode.add(self.prompt(rng, bare=1.0))
        lines = "\n".join(f"{row}: - {key} {value}" for row, (key, value) in enumerate(facts, 1))
        episode.add(self._template.render_new([{"role": "user", "content": lines}]))
        episode.add(self._template.generation_prompt)
        for key, value in rng.sample(facts, len(facts)) + rng.sample(facts, len(facts)):
            asked = self._tokenizer.encode(f" So {key}")
            whole = self._tokenizer.encode(f" So {key} {value}.")
            assert whole[: len(asked)] == asked
            episode.add(asked)
            episode.add(whole[len(asked) :], learn=True)
        return episode

    def _assistant(self, episode: Episode, message: dict[str, Any], *, learn: bool = True) -> None:
        opening = self._template.generation_prompt
        ids = self._template.render_new([message])
        assert ids[: len(opening)] == opening
        episode.add(opening)
        episode.add(ids[len(opening) :], learn=learn)


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def episodes(
    world: World, tools: Tools, renderer: Renderer, rng: random.Random, counts: dict[str, int], *, bare: float
):
    """Episodes of a world, `counts` of each family (`lookup` besides the task families); chains come as windows."""
    entities = list(world.entities.values())
    for family, count in counts.items():
        for _ in range(count):
            if family == "lookup":
                chosen = rng.sample(entities, rng.randint(1, 3))
                yield renderer.lookups([(entity, tools.call("open", {"id": entity.file})[0]) for entity in chosen], rng)
            elif family == "drill":
                yield renderer.drill(_random_facts(world, rng), rng)
            elif family == "glimpse":
                task, index = (
                    (make_also_written(world, rng), 1)
                    if rng.random() < 0.4
                    else (make_task(world, "compare", rng), None)
                )
                run = solve_with(tools, task)
                yield renderer.glimpse(run, index or len(run.steps), rng)
            elif family == "chain":
                yield _chain_window(world, tools, renderer, rng, bare)
            else:
                run = solve_with(tools, make_task(world, family, rng))
                yield renderer.run(run, rng, bare=bare)


def _random_facts(world: World, rng: random.Random) -> list[tuple[str, str]]:
    names = [entity.name for entity in rng.sample(list(world.entities.values()), 40)]
    keys = (
        rng.sample(RELATIONS, rng.randint(2, 10))
        + [name for name in names[:20] if " " not in name][: rng.randint(2, 6)]
    )
    values = [
        rng.choice((names[20 + row], str(rng.randint(2, 999)), f"{rng.randint(10, 99)} m")) for row in range(len(keys))
    ]
    return list(zip(rng.sample(keys, len(keys)), values, strict=True))


def _chain_window(world: World, tools: Tools, renderer: Renderer, rng: random.Random, bare: float) -> Episode:
    """Some steps of a chain: its start, its end, or any stretch between; short counts come more often, or they would be rare."""
    links = rng.randint(1, 310) if rng.random() < 0.6 else rng.randint(1, 40)
    task = make_task(world, "chain", rng, links=links)
    length = rng.randint(2, 9)
    where = rng.random()
    first = 0 if where < 0.15 else max(0, links + 1 - length + 1) if where < 0.3 else rng.randint(0, links)
    run = _chain_stretch(task, tools, world, first, first + length)
    return renderer.run(run, rng, bare=bare, first=first, last=first + length)


def _chain_stretch(task: Task, tools: Tools, world: World, first: int, last: int) -> Run:
    """A chain's run with only the steps from `first` to `last` really called (the others are never rendered)."""
    start, links = task.plan["start"], task.plan["links"]
    steps: list[Step] = []
    name, left = start, links
    for index in range(min(last, links + 1)):
        if index > 1:
            name, left = world.entities[name].facts["next"], left - 1
        if index < first:
            steps.append(Step("", "open", {}, ""))
            continue
        thinking = f"So next {name}, {left} left."
        call: tuple[str, dict[str, Any]] = ("open", {"id": name})
        if index == 0:
            thinking, call = f"Start {start}, {links} left.", ("search", {"query": start})
        elif index == 1:
            thinking, call = f"Found {start}.md.", ("open", {"id": f"{start}.md"})
        steps.append(Step(thinking, *call, tools.call(*call)[0]))
    if last < links + 1:
        steps.append(Step("", "open", {}, ""))
    return Run(task, steps, f"So next {task.answer}, 0 left.", task.answer)
