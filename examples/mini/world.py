"""Made-up worlds: an encyclopaedia of an archipelago as a folder of Markdown pages a person could read.

A page has a title, a line of what it is, a short fact sheet and a little prose. Each fact is one line, `- captain Kantor
Melvis`: the word that decides stands right before the value. Lights form one long ring by their `next` fact.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path

from names import words

KINDS = ("ship", "island", "person", "light")
LINKS: dict[str, dict[str, str]] = {
    "ship": {"port": "island", "captain": "person"},
    "island": {"governor": "person"},
    "person": {"home": "island", "teacher": "person"},
    "light": {"keeper": "person", "next": "light"},
}
NUMBERS: dict[str, dict[str, tuple[int, int]]] = {
    "ship": {"crew": (2, 999), "built": (100, 999), "length": (10, 99)},
    "island": {"population": (10, 999), "area": (2, 999)},
    "person": {"age": (18, 99)},
    "light": {"height": (10, 99)},
}
RELATIONS = sorted({key for table in (LINKS, NUMBERS) for keys in table.values() for key in keys})
UNITS = {"length": " m", "height": " m"}
INTROS = {
    "ship": (
        "A ship of the {} islands.",
        "A trading ship of the {} islands.",
        "One of the old ships of the {} islands.",
    ),
    "island": ("An island of the {} group.", "A small island of the {} group.", "A green island in the {} group."),
    "person": (
        "A person of the {} islands.",
        "Known all over the {} islands.",
        "A well known person of the {} islands.",
    ),
    "light": (
        "A light on the coast of the {} islands.",
        "A white tower on the {} coast.",
        "An old light of the {} islands.",
    ),
}
PROSE = (
    "Old sailors tell of a storm near {}.",
    "There is a song about it in {}.",
    "It was painted by an artist from {}.",
    "The fish market of {} is not far.",
    "Nobody remembers why it was named so.",
    "Letters to {} take a week.",
    "In spring the fog comes in from {}.",
    "A map in {} shows it twice.",
)


@dataclass(slots=True)
class Entity:
    """Something with a page. `title` is the page's title, which differs from `name` for islands called `Isle of …`."""

    name: str
    kind: str
    title: str
    facts: dict[str, str] = field(default_factory=dict)
    page: str = ""

    @property
    def file(self) -> str:
        return f"{self.title}.md"


@dataclass(slots=True)
class World:
    """All entities of one archipelago by name, and by kind."""

    name: str
    entities: dict[str, Entity]
    spare: list[str]
    """Words of the same side of the split that no page has."""

    def of_kind(self, kind: str) -> list[Entity]:
        return [entity for entity in self.entities.values() if entity.kind == kind]

    def write(self, folder: Path) -> None:
        """Write one Markdown file a page."""
        folder.mkdir(parents=True, exist_ok=True)
        for entity in self.entities.values():
            (folder / entity.file).write_text(entity.page, encoding="utf-8")


def make_world(
    seed: int, *, held_out: bool, ships: int = 40, islands: int = 30, people: int = 80, lights: int = 330
) -> World:
    """A world from a seed: the same seed gives the same pages."""
    rng = random.Random(f"{seed}/{held_out}")
    fresh = words(rng, held_out=held_out)
    group = next(fresh)
    entities: dict[str, Entity] = {}
    for kind, count in zip(KINDS, (ships, islands, people, lights), strict=True):
        for _ in range(count):
            name = f"{next(fresh)} {next(fresh)}" if kind == "person" else next(fresh)
            title = f"Isle of {name}" if kind == "island" and rng.random() < 0.3 else name
            entities[name] = Entity(name, kind, title)
    world = World(group, entities, [next(fresh) for _ in range(50)])
    _fill(world, rng)
    return world


def _fill(world: World, rng: random.Random) -> None:
    ring = world.of_kind("light")
    after = {light.name: ring[(i + 1) % len(ring)].name for i, light in enumerate(ring)}
    by_kind = {kind: [entity.name for entity in world.of_kind(kind)] for kind in KINDS}
    for entity in world.entities.values():
        facts = {key: _other(by_kind[kind], entity.name, rng) for key, kind in LINKS[entity.kind].items()}
        if entity.kind == "light":
            facts["next"] = after[entity.name]
        for key, (low, high) in NUMBERS[entity.kind].items():
            facts[key] = f"{rng.randint(low, high)}{UNITS.get(key, '')}"
        entity.facts = {key: facts[key] for key in rng.sample(list(facts), len(facts))}
        entity.page = _page(entity, world, rng)


def _other(names: list[str], name: str, rng: random.Random) -> str:
    while (choice := rng.choice(names)) == name:
        pass
    return choice


def _page(entity: Entity, world: World, rng: random.Random) -> str:
    lines = [f"# {entity.title}", rng.choice(INTROS[entity.kind]).format(world.name), ""]
    lines += [f"- {key} {value}" for key, value in entity.facts.items()]
    if rng.random() < 0.7:
        lines += ["", rng.choice(PROSE).format(rng.choice(world.of_kind("island")).name)]
    return "\n".join(lines) + "\n"
