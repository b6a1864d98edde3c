"""The python tool by hand: a table goes in, variables stay from call to call, files come out.

Needs bubblewrap (`thinkloop doctor` says whether it is there). The table can be read inside, not changed.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import anyio

import thinkloop as tl

TABLE = "island,population,area\nMekres,989,125\nResnir,640,548\n"
CELLS = (
    "import csv\nrows = list(csv.DictReader(open('islands.csv')))\nlen(rows)",
    "density = {row['island']: int(row['population']) / int(row['area']) for row in rows}\ndensity",
    "open('densest.txt', 'w').write(max(density, key=density.get))",
    "open('/etc/passwd')",
)


async def main(folder: Path) -> None:
    (folder / "islands.csv").write_text(TABLE)
    async with tl.Python(files=[folder / "islands.csv"], keep=folder / "results") as python:
        (tool,) = python.tools()
        for code in CELLS:
            output = await tool.call({"code": code})
            print(f"→ {code.splitlines()[-1]}\n{output.content}")
    print(f"kept: {(folder / 'results' / 'densest.txt').read_text()}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        anyio.run(main, Path(name))
