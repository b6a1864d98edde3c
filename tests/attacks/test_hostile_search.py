"""Search services that mean harm: what they answer is bounded, a failure is named, and the next source is asked."""

from __future__ import annotations

import gzip
import re
import sys
import time
from collections.abc import Callable
from itertools import repeat
from typing import Any

import pytest
from control_tokens import HOSTILE
from evidence import peak_of
from search_server import KEY, Answer, SearchServer, bomb, cut, endless, status
from thinkloop.tools.search import Search
from thinkloop.tools.tool import ToolError
from thinkloop.tools.web_providers import Brave, SearXNG
from thinkloop.tools.web_search import RetryPolicy

pytestmark = [pytest.mark.anyio, pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")]

Held = Callable[[str], None]

BAD_ANSWERS: dict[str, Callable[[], Answer]] = {
    "a gzip bomb": bomb,
    "JSON without end": endless,
    "a web page": lambda: status(200, b"<!doctype html><title>Log in</title>", {"Content-Type": "text/html"}),
    "an answer that is cut off": cut,
    "JSON that nests without end": lambda: status(200, b'{"results":' + b"[" * 500_000),
    "a million results": lambda: status(200, b'{"web":{"results":[' + b'{"url":7},' * 180_000 + b"{}]}}"),
    "results of other types": lambda: status(200, {"web": {"results": [7, None, {"url": 7}, {"url": ["http://a/"]}]}}),
    "an error with the key in it": lambda: status(401, {"message": f"bad key {KEY} \x1b[2J{HOSTILE}"}),
    "a compression that was not asked for": lambda: status(200, b"xx", {"Content-Encoding": "br"}),
    "broken gzip": lambda: status(200, b"no gzip", {"Content-Encoding": "gzip"}),
    "gzip in gzip": lambda: status(
        200, gzip.compress(gzip.compress(b" " * (1 << 24))), {"Content-Encoding": "gzip, gzip"}
    ),
    "nothing": lambda: Answer(silent=True),
    "a wait of a year": lambda: status(429, {}, {"Retry-After": "31536000"}),
    "headers without end": lambda: status(200, {}, {f"X-{n}": "x" * 1000 for n in range(300)}),
    "a thousand megabytes of blanks": lambda: Answer(body=lambda: repeat(b" " * (1 << 20), 1000)),
}
QUICK = RetryPolicy(tries=1, attempt=1.0, total=2.0, backoff=0.01)


def brave(url: str) -> Brave:
    return Brave(KEY, base_url=url, interval=0)


@pytest.mark.parametrize("name", BAD_ANSWERS)
async def test_a_search_service_sends(held: Held, name: str) -> None:
    started = time.monotonic()
    with SearchServer() as server:
        server.fail("brave", BAD_ANSWERS[name]())
        async with Search(brave(server.url), retry=QUICK) as search:
            said, megabytes = await peak_of(_searched(search))
    assert time.monotonic() - started < 8
    assert megabytes < 100
    assert KEY not in said
    assert len(said) < 3000
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", said)
    assert said.startswith("brave failed: ")
    held(
        f"reply bounds, and an error is never an empty result: {said.removeprefix('brave failed: ').partition('. You')[0][:90]}"
    )


async def _searched(search: Search) -> str:
    (tool,) = (tool for tool in search.tools() if tool.name == "search")
    try:
        return (await tool.call({"query": "harbour"})).content
    except ToolError as error:
        return str(error)


async def test_a_source_of_ones_own_gives_no_hits_but(held: Held) -> None:
    class Source:
        name = "rogue"

        def __init__(self, given: Any) -> None:
            self.given = given

        async def search(self, query: str, limit: int) -> Any:
            if isinstance(self.given, BaseException):
                raise self.given
            return self.given

    told = []
    for given in (
        None,
        "hits",
        [1, 2],
        {"a": 1},
        object(),
        ValueError(HOSTILE + "\x1b[2J"),
        RecursionError(),
        MemoryError(),
    ):
        async with Search(Source(given), retry=QUICK) as search:
            told.append(await _searched(search))
    assert all("rogue failed" in each and "\x1b" not in each for each in told)
    held(f"checked for shape: {len(told)} of {len(told)} told as failures")


async def test_two_sources_of_which_the_first_is_hostile(held: Held) -> None:
    with SearchServer() as server:
        server.fail("brave", endless(), endless(), endless())
        sources = (brave(server.url), SearXNG(server.url))
        async with Search(*sources, retry=QUICK) as search:
            said = await _searched(search)
    assert "https://ports.example/bergen" in said
    assert "brave failed" in said
    held(f"the next source: {said.rpartition('(')[2].rstrip(')')[:90]}")
