"""Tasks over a world, and the scripted solver whose runs are the training text.

A thought carries the state, always in the same form: `Want Kantor's port's age?` is what is still to be found, `So
Kantor's port Tarbul.` is what the page just read says, `Compute 212 plus Melvis's crew?` is how far a sum has come. The
word that decides what to copy next stands right before it.
"""

from __future__ import annotations

import random
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any

from world import LINKS, NUMBERS, UNITS, Entity, World

FAMILIES = ("hop1", "hop2", "hop3", "compare", "arithmetic", "chain", "recovery")
LEADS = ("What is", "Tell me, what is", "I want to know: what is")
OPERATORS = {"plus": "+", "minus": "-", "divided by": "/"}

Call = tuple[str, str, dict[str, Any]]
"""A thought, the tool's name and its arguments."""
Solver = Generator[Call, tuple[str, bool], tuple[str, str]]
"""Yields calls, is sent (result text, ok), returns the last thought and the answer."""


@dataclass(slots=True)
class Task:
    """A question with its exact answer. `plan` is what the solver needs to know."""

    family: str
    question: str
    answer: str
    plan: dict[str, Any] = field(default_factory=dict)


def make_task(world: World, family: str, rng: random.Random, *, links: int | None = None) -> Task:
    """A random task of a family; `links` fixes a chain's length."""
    if family.startswith("hop"):
        return _hops(world, int(family[3:]), rng)
    if family == "compare":
        return _compare(world, rng)
    if family == "arithmetic":
        return _arithmetic(world, rng, units=False)
    if family == "chain":
        return _chain(world, rng, links or rng.randint(1, 310))
    return rng.choice((make_also_written, _isle, lambda w, r: _arithmetic(w, r, units=True)))(world, rng)


def _path(world: World, start: Entity, hops: int, rng: random.Random) -> list[str] | None:
    """Relation names from `start`, none twice, that `hops` look-ups follow; None when it runs into a dead end."""
    path: list[str] = []
    here = start
    for left in range(hops, 0, -1):
        links = [key for key in LINKS[here.kind] if key not in path]
        choices = links if left > 1 else links + list(NUMBERS[here.kind])
        if not choices:
            return None
        path.append(rng.choice(choices))
        if left > 1:
            here = world.entities[here.facts[path[-1]]]
    return path


def follow(world: World, start: str, path: list[str]) -> str:
    """The value at the end of a path of relations."""
    value = start
    for key in path:
        value = world.entities[value].facts[key]
    return value


def _hops(world: World, hops: int, rng: random.Random, start: Entity | None = None) -> Task:
    while True:
        first = start or rng.choice(list(world.entities.values()))
        path = _path(world, first, hops, rng)
        if path:
            break
    question = f"{rng.choice(LEADS)} {_want(first.name, path)}"
    return Task(f"hop{hops}", question, follow(world, first.name, path), {"start": first.name, "path": path})


def _pair(world: World, keys: list[str], rng: random.Random) -> tuple[Entity, Entity, str]:
    key = rng.choice(keys)
    kind = next(kind for kind in NUMBERS if key in NUMBERS[kind])
    first, second = rng.sample(world.of_kind(kind), 2)
    return first, second, key


PLAIN = ["crew", "population", "area", "age", "built"]


def _compare(world: World, rng: random.Random) -> Task:
    while True:
        a, b, key = _pair(world, PLAIN, rng)
        if a.facts[key] != b.facts[key]:
            break
    word = rng.choice(("larger", "smaller"))
    a_wins = (int(a.facts[key]) > int(b.facts[key])) == (word == "larger")
    question = f"Which has the {word} {key}, {a.name} or {b.name}?"
    plan = {"a": a.name, "b": b.name, "key": key, "word": "or", "sign": ">" if word == "larger" else "<"}
    return Task("compare", question, a.name if a_wins else b.name, plan)


def _arithmetic(world: World, rng: random.Random, *, units: bool) -> Task:
    a, b, key = _pair(world, list(UNITS) if units else PLAIN, rng)
    word = rng.choice(list(OPERATORS))
    x, y = (int(entity.facts[key].split()[0]) for entity in (a, b))
    value = {"plus": x + y, "minus": x - y, "divided by": round(x / y, 2)}[word]
    tail = ", to two decimals?" if word == "divided by" else "?"
    question = f"{rng.choice(LEADS)} {a.name}'s {key} {word} {b.name}'s {key}{tail}"
    plan = {"a": a.name, "b": b.name, "key": key, "word": word, "sign": OPERATORS[word]}
    return Task("recovery" if units else "arithmetic", question, str(value), plan)


def _chain(world: World, rng: random.Random, links: int) -> Task:
    start = rng.choice(world.of_kind("light")).name
    question = f"Start at {start} and follow next {links} times. Where do you end?"
    return Task("chain", question, follow(world, start, ["next"] * links), {"start": start, "links": links})


def make_also_written(world: World, rng: random.Random) -> Task:
    """A recovery task whose first search finds nothing: the name is known under another spelling."""
    task = _hops(world, 1, rng)
    start, wrong = task.plan["start"], rng.choice(world.spare)
    question = f"{rng.choice(LEADS)} {_want(wrong, task.plan['path'])} {wrong} is also written {start}."
    return Task("recovery", question, task.answer, task.plan | {"wrong": wrong})


def _isle(world: World, rng: random.Random) -> Task:
    while True:
        task = _hops(world, 2, rng)
        middle = world.entities[follow(world, task.plan["start"], task.plan["path"][:1])]
        if middle.title != middle.name:
            return Task("recovery", task.question, task.answer, task.plan)


def _want(name: str, path: list[str]) -> str:
    return "'s ".join([name, *path]) + "?"


def solve(task: Task) -> Solver:
    """The solver's run of a task: a generator of calls that is sent their results."""
    if "links" in task.plan:
        return _solve_chain(task)
    if "path" in task.plan:
        return _solve_hops(task)
    return _solve_pair(task)


def _find(thought: str, name: str) -> Generator[Call, tuple[str, bool], tuple[str, bool]]:
    """Search for a name and open the first result."""
    result, _ = yield thought, "search", {"query": name}
    if result.startswith("No results"):
        return result, False
    file = result.split("\n")[0].removeprefix("1. ").split(".md:")[0] + ".md"
    return (yield f"Found {file}.", "open", {"id": file})


def _fact(page: str, key: str) -> str:
    return next(line.split(f"- {key} ", 1)[1] for line in page.split("\n") if f"- {key} " in line)


def _solve_hops(task: Task) -> Solver:
    name, path = task.plan["start"], list(task.plan["path"])
    if "wrong" in task.plan:
        wanted = _want(task.plan["wrong"], path)
        yield from _find(f"Want {wanted}", task.plan["wrong"])
        page, _ = yield from _find(
            f"No results. {task.plan['wrong']} is also written {name}. Want {_want(name, path)}", name
        )
    else:
        page, _ = yield from _find(f"Want {_want(name, path)}", name)
    while True:
        key = path.pop(0)
        value = _fact(page, key)
        found = f"So {name}'s {key} {value}."
        if not path:
            return found, value
        name = value
        page, ok = yield f"{found} Want {_want(name, path)}", "open", {"id": name}
        if not ok:
            page, _ = yield from _find(f"No document {name}.", name)


def _solve_pair(task: Task) -> Solver:
    a, b, key, word = (task.plan[part] for part in ("a", "b", "key", "word"))
    page, _ = yield from _find(f"Want {_want(a, [key])}", a)
    x = _fact(page, key)
    page, _ = yield from _find(f"So {a}'s {key} {x}. Compute {x} {word} {_want(b, [key])}", b)
    y = _fact(page, key)
    code = _code(task, x, y)
    result, ok = yield f"So {b}'s {key} {y}. Compute {code}.", "python", {"code": code}
    if not ok:
        code = _code(task, x.split()[0], y.split()[0])
        result, _ = yield f"Error. No units. Compute {code}.", "python", {"code": code}
    value = {"True": a, "False": b}.get(result, result)
    return f"Result {value}.", value


def _code(task: Task, x: str, y: str) -> str:
    expression = f"{x} {task.plan['sign']} {y}"
    return f"round({expression}, 2)" if task.plan["sign"] == "/" else expression


def _solve_chain(task: Task) -> Solver:
    name, left = task.plan["start"], task.plan["links"]
    page, _ = yield from _find(f"Start {name}, {left} left.", name)
    while True:
        name, left = _fact(page, "next"), left - 1
        thought = f"So next {name}, {left} left."
        if not left:
            return thought, name
        page, _ = yield thought, "open", {"id": name}
