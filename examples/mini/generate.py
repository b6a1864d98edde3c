"""Training data: worlds, the solver's runs on the real tools, packed episodes."""

from __future__ import annotations

import random
import tempfile
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from episodes import SYSTEM, Episode, Renderer, _json, episodes, solve_with
from tasks import FAMILIES, make_task
from thinkloop.engine.tokenizer import Tokenizer
from thinkloop.tools.python import Python
from thinkloop.tools.search import Search, format_hits, format_page
from thinkloop.tools.tool import declaration
from world import World, make_world

MIXES: dict[str, dict[str, int]] = {
    "drill": {"drill": 250, "lookup": 60, "hop1": 10, "hop2": 10, "chain": 30},
    "dense": {
        "lookup": 120,
        "hop1": 20,
        "hop2": 30,
        "hop3": 20,
        "compare": 10,
        "arithmetic": 10,
        "recovery": 20,
        "chain": 60,
    },
    "full": {
        "lookup": 2,
        "glimpse": 20,
        "hop1": 20,
        "hop2": 25,
        "hop3": 55,
        "compare": 50,
        "arithmetic": 70,
        "recovery": 70,
        "chain": 160,
    },
}


class WorldTools:
    """The tools over one world's folder."""

    def __init__(self, world: World) -> None:
        with tempfile.TemporaryDirectory() as folder:
            world.write(Path(folder))
            search = Search(folder)
        self._corpus = search.corpus
        self.declarations = [declaration(tool) for tool in (*search.tools(), *Python().tools())]

    def call(self, name: str, arguments: dict[str, Any]) -> tuple[str, bool]:
        if name == "search":
            return format_hits(arguments["query"], self._corpus.search(arguments["query"])), True
        if name == "open":
            document = self._corpus.document(arguments["id"])
            if document is None:
                return f'error: there is no document "{arguments["id"]}"; search for it', False
            return format_page(document), True
        return shown_by_python(arguments["code"])


def shown_by_python(code: str) -> tuple[str, bool]:
    """What the sandbox shows for a first cell with one expression (a test holds the two together)."""
    try:
        return repr(eval(compile(code, "<cell 1>", "eval"), {})), True
    except SyntaxError as error:
        rows = "".join(traceback.format_exception_only(error)).split("\n")
        return "\n".join(row for row in rows if row.strip() and set(row.strip()) - set("^~")), False


def sample_texts() -> list[str]:
    """Texts that show every word the worlds, tasks, tools and prompts use, for the vocabulary."""
    texts = [SYSTEM] * 3
    for seed in range(4):
        world = make_world(seed, held_out=False)
        tools, rng = WorldTools(world), random.Random(seed)
        for tool in tools.declarations:
            texts.append(_sorted_json([tool]))
        texts += [entity.page for entity in world.entities.values()]
        for family in FAMILIES:
            for _ in range(30):
                run = solve_with(tools, make_task(world, family, rng, links=3 if family == "chain" else None))
                texts += [run.task.question, run.thinking, run.answer]
                for step in run.steps:
                    texts += [
                        step.thinking,
                        _json(step.arguments),
                        f"## Return of functions.{step.name}:1\n{step.result}",
                    ]
                    texts += [f"functions.{step.name}:", "assistant", "system", "user", "tool_declare", step.name]
    return texts


def _sorted_json(value: Any) -> str:
    import json

    return json.dumps(value, separators=(",", ":"), sort_keys=True, ensure_ascii=False)


def pack_mix(
    seed: int, mix: str, tokenizer: Tokenizer, *, bare: float, held_out: bool = False
) -> dict[str, np.ndarray]:
    """The packed episodes of one world: `ids`, `learn`, and `ends` (where each episode stops)."""
    rng = random.Random(f"{mix}/{seed}")
    world = make_world(seed, held_out=False)
    tools = WorldTools(world)
    renderer = Renderer(tokenizer, tools.declarations)
    return _packed(episodes(world, tools, renderer, rng, MIXES[mix], bare=bare if mix == "full" else 1.0))


def pack_held_out(tokenizer: Tokenizer, count: int = 10) -> dict[str, list[tuple[np.ndarray, np.ndarray]]]:
    """For each family, episodes of held-out worlds with the prompt as it is."""
    result: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    for family in ("drill", "lookup", *FAMILIES):
        rng, world = random.Random(family), make_world(len(result), held_out=True)
        tools = WorldTools(world)
        renderer = Renderer(tokenizer, tools.declarations)
        made = episodes(world, tools, renderer, rng, {family: count}, bare=0.0)
        result[family] = [(np.array(e.ids), np.array(e.learn)) for e in made]
    return result


def _packed(made: Iterable[Episode]) -> dict[str, np.ndarray]:
    ids: list[int] = []
    learn: list[bool] = []
    ends: list[int] = []
    for episode in made:
        ids += episode.ids
        learn += episode.learn
        ends.append(len(ids))
    return {"ids": np.array(ids, np.int16), "learn": np.array(learn), "ends": np.array(ends)}
