"""Write the sample world that ships with the package, and its demo question: `python sample.py FOLDER`."""

from __future__ import annotations

import random
import sys
from pathlib import Path

from tasks import Task, make_task
from world import World, make_world


def sample() -> tuple[World, Task]:
    """The sample world, which no training world shares a name with, and the demo task."""
    world = make_world(2026, held_out=True, ships=12, islands=10, people=20, lights=40)
    return world, make_task(world, "arithmetic", random.Random(7))


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    world, task = sample()
    world.write(folder / "world")
    (folder / "demo.txt").write_text(task.question + "\n", encoding="utf-8")
    print(task.question, "->", task.answer)
