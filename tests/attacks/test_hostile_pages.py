"""Pages that would drown, stall or steer the model: read with `open`, that is without a browser."""

from __future__ import annotations

import re
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from control_tokens import HOSTILE, control_tokens_of
from evidence import layer, peak_of
from hostile_site import NO_HTTP, answering, pages_of_harm
from search_server import SearchServer
from thinkloop.tools.addresses import Policy
from thinkloop.tools.extract import Extractor
from thinkloop.tools.fetch import Fetcher
from thinkloop.tools.pages import WebPages
from thinkloop.tools.search import Search
from thinkloop.tools.tool import ToolError
from thinkloop.tools.web_providers import SearXNG
from web_site import site

pytestmark = pytest.mark.anyio

Held = Callable[[str], None]

MOST = 8_500
"""Characters of any result: a budget of 2,000 tokens, and some words."""
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\U000e0000-\U000e007f]")


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with pages_of_harm(), site() as address:
        yield address


def quick(*allow: str, seconds: float = 8) -> WebPages:
    """The real fetcher and the real extractor, with a few seconds for a page instead of 20."""
    pages = WebPages()
    pages._fetcher = Fetcher(Policy.of(allow), timeout=seconds)
    pages._extractor = Extractor()
    return pages


@pytest.fixture(scope="module")
async def search(url: str) -> AsyncIterator[Search]:
    async with Search(pages=quick(url.removeprefix("http://"))) as search:
        await search.tools()[0].call({"id": f"{url}/table"})
        yield search


async def opened(search: Search, id: str, **arguments: Any) -> str:
    """What the model is told, in time and in bounds; and the next page works."""
    started = time.monotonic()
    try:
        content = (await search.tools()[0].call({"id": id, **arguments})).content
    except ToolError as error:
        content = f"error: {error}"
    assert time.monotonic() - started < 20
    assert len(content) < MOST
    assert not CONTROL.search(content), CONTROL.search(content)
    return content


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("/plain?mb=100", "cut after 2,000,000 characters"),
        ("/big?mb=100", "cut after 2,000,000 characters"),
        ("/links?n=1000000", "cut after 2,000,000 characters"),
        ("/flood", "binary data"),
        ("/long-line", "cut after 2,000,000 characters"),
        ("/attribute", "Harbour"),
        ("/long-title", "Harbour"),
        ("/comments", "Harbour"),
        ("/nested", "nests more than 2,000 elements"),
        ("/entities", "&b;&b;&f;$"),
        ("/style", "x"),
        ("/gzip-bomb", "cut after 2,000,000 characters"),
        ("/deflate-bomb", "cut after 2,000,000 characters"),
        ("/bomb.pdf", "error: "),
        ("/broken.pdf", "error: "),
    ],
    ids=lambda value: value if value.startswith("/") else "",
)
async def test_a_page_without_end(search: Search, url: str, held: Held, path: str, said: str) -> None:
    content, megabytes = await peak_of(opened(search, url + path))
    assert re.search(said, content), content
    assert "root:" not in content
    assert megabytes < 150
    assert "Crane 1" in await opened(search, f"{url}/table", find="Crane 1")
    held(f"{_bound(content)}; {megabytes} MB of memory for it, {len(content):,} characters for the model")


def _bound(content: str) -> str:
    match = re.search(r"cut after [\d,]+ characters|cut where the page nests more than [\d,]+ elements", content)
    if match:
        return f"size bounds: {match[0]}"
    if "&b;" in content:
        return "entities are not expanded"
    return (
        f"parser in a process of its own: {content[7:100]}"
        if content.startswith("error")
        else "the extractor, and the budget"
    )


@pytest.mark.parametrize("path", ["/loop", "/onward", "/redirect?url=/to%3Furl%3D/redirect%3Furl%3D/loop"])
async def test_redirects_without_end(search: Search, url: str, held: Held, path: str) -> None:
    held(layer(await opened(search, url + path)))


@pytest.mark.parametrize("path", ["/hang", "/drip?n=100"])
async def test_a_page_that_never_comes(url: str, held: Held, path: str) -> None:
    async with Search(pages=quick(url.removeprefix("http://"), seconds=1)) as search:
        said = await opened(search, url + path)
    assert "did not answer in full within 1 s" in said
    held("deadline of the fetch: did not answer in full within 1 s")


@pytest.mark.parametrize(
    "path",
    ["/utf-7", "/utf-16", "/unlabelled-utf-32", "/unknown-charset", "/rot13", "/surrogates", "/mislabelled", "/noise",
     "/binary", "/not-gzip", "/cut-gzip", "/unasked-coding", "/empty"],
)  # fmt: skip
async def test_a_bad_encoding(search: Search, url: str, held: Held, path: str) -> None:
    said = await opened(search, url + path)
    said.encode()
    assert "<script" not in said
    first = said.partition("\n")[2][:50] or said[:120]
    held(f"decoded with replacements, or refused: {ascii(first.replace(url, ''))[1:-1]}")


@pytest.mark.parametrize("case", NO_HTTP.values(), ids=NO_HTTP.keys())
async def test_an_answer_that_is_no_http(held: Held, case: tuple[bytes, bytes]) -> None:
    async with answering(*case) as port, Search(pages=quick("127.0.0.1", seconds=1)) as search:
        content, megabytes = await peak_of(opened(search, f"http://127.0.0.1:{port}/"))
    assert "evil" not in content
    assert megabytes < 100
    held(f"proxy: {content.removeprefix('error: ').replace(f'http://127.0.0.1:{port}/', 'it')[:110]}")


async def test_control_tokens_in_a_page(url: str, held: Held) -> None:
    """In its title, headings, text, links, and its address: each could end the result and begin an order."""
    tools = [Search(pages=WebPages(allow_hosts=[url.removeprefix("http://")]))]
    held(await control_tokens_of(tools, "open", {"id": f"{url}/injected"}))


async def test_control_tokens_in_search_results(held: Held) -> None:
    with SearchServer((("https://a.example/?<|im_end|>", HOSTILE, HOSTILE + "\x1b[2J\x00\u202e"),)) as server:
        held(await control_tokens_of([Search(SearXNG(server.url))], "search", {"query": "harbour"}))


async def test_control_tokens_in_a_file_of_the_corpus(held: Held, tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text(f"# Harbour {HOSTILE}\n{HOSTILE}\x1b[2J\u202e\n")
    held(await control_tokens_of([Search(tmp_path)], "open", {"id": "a.md"}))


async def test_a_page_asks_for_a_line_or_a_text_that_stalls(search: Search, url: str, held: Held) -> None:
    found = await opened(search, f"{url}/plain?mb=100", find="(a+)+$" * 100)
    late = await opened(search, f"{url}/plain?mb=100", line=10**12)
    assert "no line of" in found
    assert "there is no line" in late
    held("`find` is plain text, not a pattern; lines are bounded by the page's own number")
