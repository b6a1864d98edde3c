"""Worlds and tasks: held-out worlds share no word with training ones, and the solver's answers are the true ones."""

from __future__ import annotations

import random
import re
from itertools import islice
from pathlib import Path

import pytest
from episodes import Renderer, episodes, solve_with
from generate import WorldTools, sample_texts, shown_by_python
from names import is_held_out, words
from tasks import FAMILIES, make_task
from thinkloop.engine.tokenizer import Tokenizer
from thinkloop.tools.python import Python
from vocab import build_ranks, write_vocabulary
from world import KINDS, make_world

SMALL = {"ships": 12, "islands": 10, "people": 16, "lights": 40}


def _words(world) -> set[str]:
    return {word for name in [world.name, *world.entities, *world.spare] for word in name.split()}


def test_held_out_worlds_share_no_word_with_training_worlds() -> None:
    training = set().union(*(_words(make_world(seed, held_out=False, **SMALL)) for seed in range(30)))
    held_out = set().union(*(_words(make_world(seed, held_out=True, **SMALL)) for seed in range(30)))
    assert not training & held_out
    assert all(map(is_held_out, held_out))
    assert not any(map(is_held_out, training))


def test_a_seed_gives_the_same_world(tmp_path: Path) -> None:
    pages = [{e.file: e.page for e in make_world(3, held_out=True, **SMALL).entities.values()} for _ in range(2)]
    assert pages[0] == pages[1]
    assert {entity.kind for entity in make_world(3, held_out=True, **SMALL).entities.values()} == set(KINDS)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_solver_reaches_the_exact_answer_with_the_real_search(family: str) -> None:
    world = make_world(5, held_out=True, **SMALL)
    tools, rng = WorldTools(world), random.Random(family)
    for _ in range(20):
        run = solve_with(tools, make_task(world, family, rng, links=7 if family == "chain" else None))
        assert run.answer == run.task.answer
        assert run.steps


def test_recovery_tasks_really_meet_a_failure() -> None:
    world = make_world(6, held_out=True, **SMALL)
    tools, rng = WorldTools(world), random.Random(0)
    failures = set()
    for _ in range(40):
        results = [step.result for step in solve_with(tools, make_task(world, "recovery", rng)).steps]
        failures |= {re.split(r"[ :]", text)[0] for text in results if re.match(r"No results|error:|  File", text)}
    assert failures == {"No", "error", ""}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("vocabulary")
    write_vocabulary(folder, build_ranks(sample_texts()))
    return Tokenizer.load(folder)


def test_names_split_at_syllables_and_numbers_are_one_token(tokenizer: Tokenizer) -> None:
    for word in islice(words(random.Random(1), held_out=True), 200):
        alone, spaced = tokenizer.encode(word), tokenizer.encode(f" {word}'s port")
        assert len(alone) == 2
        assert len(spaced) == 4
        assert alone[1] == spaced[1]
    assert all(len(tokenizer.encode(str(number))) == 1 for number in range(1000))


def test_episodes_learn_only_what_the_model_writes(tokenizer: Tokenizer) -> None:
    world = make_world(7, held_out=False, lights=330)
    tools = WorldTools(world)
    renderer = Renderer(tokenizer, tools.declarations)
    end = tokenizer.special("<|im_end|>")
    for episode in episodes(world, tools, renderer, random.Random(0), {"hop2": 5, "chain": 5, "recovery": 5}, bare=0.0):
        learnt = [token for token, learn in zip(episode.ids, episode.learn, strict=True) if learn]
        assert learnt[0] == tokenizer.think_start
        assert learnt[-1] == end
        assert len(episode.ids) <= 1280


EXPRESSIONS = [
    "212 + 187",
    "3 - 90",
    "round(69 / 96, 2)",
    "round(500 / 2, 2)",
    "939 > 80",
    "31 < 31",
    "48 m + 31 m",
    "round(48 m / 31 m, 2)",
]


@pytest.mark.anyio
@pytest.mark.parametrize("code", EXPRESSIONS)
async def test_what_the_solver_sees_of_python_is_what_the_sandbox_shows(code: str) -> None:
    async with Python() as python:
        (tool,) = python.tools()
        output = await tool.call({"code": code})
    assert shown_by_python(code) == (output.content, output.ok)
