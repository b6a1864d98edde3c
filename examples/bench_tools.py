"""What the tools cost on this machine: `python bench_tools.py [--rounds N] [--part python|pages|browser|mcp] [--json]`.

Everything runs for real, on this machine and its loopback. Times are medians (and the 95th percentile where it says p95)
over `--rounds`; memory is the proportional set size of all processes of a tool. Search over 100,000 documents has its own
bench, `bench_search.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from urllib.parse import quote

import anyio
from thinkloop.tools.browser import Browser
from thinkloop.tools.pages import WebPages
from world_site import world_site

import thinkloop as tl

Row = tuple[str, float, str]


async def timed(action: Callable[[], Awaitable[object]], rounds: int) -> list[float]:
    """Milliseconds of each round, sorted."""
    taken = []
    for _ in range(rounds):
        start = time.perf_counter()
        await action()
        taken.append((time.perf_counter() - start) * 1000)
    return sorted(taken)


def rows(name: str, taken: list[float]) -> list[Row]:
    return [(name, statistics.median(taken), "ms"), (f"{name}, p95", taken[int(len(taken) * 0.95)], "ms")]


def memory_mb(below: int) -> float:
    """Proportional set size of all processes below one."""
    parents = {int(path.name): parent(path) for path in Path("/proc").iterdir() if path.name.isdigit()}
    found, frontier = set[int](), {below}
    while frontier:
        frontier = {pid for pid, above in parents.items() if above in frontier} - found
        found |= frontier
    return sum(map(pss, found)) / 1000


def parent(path: Path) -> int:
    try:
        return int((path / "stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return -1


def pss(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)


async def bench_python(rounds: int) -> list[Row]:
    async def session() -> None:
        async with tl.Python() as python:
            await python.run("1")

    found = rows("python: start of a session with its first call", await timed(session, rounds))
    async with tl.Python() as python:
        await anyio.sleep(0.5)  # as long as a model takes to think of its first call
        first = await timed(lambda: python.run("1"), 1)
        found.append(("python: first call of a session that is waiting", first[0], "ms"))
        found += rows("python: call", await timed(lambda: python.run("1"), rounds * 20))
        found.append(("python: memory of a session", memory_mb(os.getpid()), "MB"))
    return found


async def bench_pages(rounds: int) -> list[Row]:
    with world_site() as url:
        async with WebPages(allow_hosts=[url.removeprefix("http://")]) as pages:
            names = [path.stem for path in Path(tl.__file__).parents[1].glob("engine/mini/world/*.md")]
            left = iter(names * 100)

            async def page() -> None:
                await pages.document(f"{url}/page/{quote(next(left))}?{time.monotonic_ns()}")

            found = [("open without a browser: first page", (await timed(page, 1))[0], "ms")]
            return found + rows("open without a browser", await timed(page, rounds))


async def bench_browser(rounds: int) -> list[Row]:
    with world_site() as url:
        start = time.perf_counter()
        async with Browser(allow_hosts=[url.removeprefix("http://")]) as browser:
            tools = {tool.name: tool for tool in browser.tools()}

            async def page() -> None:
                await tools["browser_open"].call({"url": f"{url}/page/Mekres?{time.monotonic_ns()}"})

            await page()
            found: list[Row] = [("browser: start with its first page", (time.perf_counter() - start) * 1000, "ms")]
            found += rows("browser: open", await timed(page, rounds))
            found += rows("browser: find", await timed(lambda: tools["browser_find"].call({"text": "area"}), rounds))
            found.append(("browser: memory of all its processes", memory_mb(os.getpid()), "MB"))
            return found


async def bench_mcp(rounds: int) -> list[Row]:
    from thinkloop.tools.mcp_client import MCP

    command = [sys.executable, "-m", "thinkloop", "mcp", "--tools", "search,open"]
    start = time.perf_counter()
    async with MCP(name="own", command=command) as server:
        found: list[Row] = [("MCP: start of a server", (time.perf_counter() - start) * 1000, "ms")]
        (search,) = (tool for tool in server.tools() if tool.name.endswith("search"))
        return found + rows("MCP: call over stdio", await timed(lambda: search.call({"query": "Mekres"}), rounds))


PARTS = {"python": bench_python, "pages": bench_pages, "browser": bench_browser, "mcp": bench_mcp}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--part", action="append", choices=PARTS, help="only this one (may be given again)")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    found: list[Row] = []
    for name in arguments.part or PARTS:
        part = anyio.run(PARTS[name], arguments.rounds)
        found += part
        if not arguments.json:
            for label, value, unit in part:
                print(f"{label:<50} {value:9.2f} {unit}", flush=True)
    if arguments.json:
        print(json.dumps([{"what": label, "value": value, "unit": unit} for label, value, unit in found]))


if __name__ == "__main__":
    main()
