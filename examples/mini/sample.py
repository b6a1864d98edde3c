"""Write the sample world that ships with the package, and its demo question: `python sample.py FOLDER`."""

from __future__ import annotations

import random
import sys
from pathlib import Path

from tasks import make_task
from world import make_world

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    world = make_world(2026, held_out=True, ships=12, islands=10, people=20, lights=40)
    world.write(folder / "world")
    task = make_task(world, "hop3", random.Random(8))
    (folder / "demo.txt").write_text(task.question + "\n", encoding="utf-8")
    print(task.question, "->", task.answer)
