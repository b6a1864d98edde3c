"""`search` and `open`: exact wording over folders, the web beside them, ids, titles and URLs, pages with line numbers."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio
import pytest
from thinkloop.tools.call_record import recording
from thinkloop.tools.corpus import Corpus, CorpusError, Document, Hit
from thinkloop.tools.pages import WebPages
from thinkloop.tools.search import Search, format_hits, merge, show_page
from thinkloop.tools.tool import Output, ToolError, Toolset, declaration
from thinkloop.tools.web_providers import SearXNG, Serper
from thinkloop.tools.web_search import RetryPolicy, SourceError
from thinkloop.traces.events import ThinkloopError

sys.path.insert(0, str(Path(__file__).parents[1]))
from search_server import KEY, SearchServer, cut, status

pytestmark = pytest.mark.anyio
QUICK = RetryPolicy(tries=1, attempt=2.0, total=6.0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "harbour.md").write_text("# Harbour\n\nShips land here.\nThe harbour closes at nine.\n")
    (docs / "install.md").write_text("# Installing\n\nRun the installer.\n")
    (docs / "long.txt").write_text("\n".join(f"row {number}" for number in range(1, 2001)))
    return docs


@pytest.fixture
def server() -> Iterator[SearchServer]:
    with SearchServer() as server:
        yield server


@dataclass
class Site:
    """Pages from memory: what a program may bring itself."""

    pages: dict[str, tuple[str, str, tuple[str, ...]]]
    opened: list[str] = field(default_factory=list)
    entered: int = 0

    async def __aenter__(self) -> Site:
        self.entered += 1
        return self

    async def __aexit__(self, *exc: Any) -> None:
        self.entered -= 1

    async def document(self, url: str) -> tuple[str, str, tuple[str, ...]]:
        self.opened.append(url)
        await anyio.sleep(0.01)
        if url not in self.pages:
            raise ToolError(f"{url} answered with status 404")
        return self.pages[url]


async def call(search: Search, name: str, **arguments: Any) -> Output:
    return await {tool.name: tool for tool in search.tools()}[name].call(arguments)


# --- over a folder alone: the wording that the mini model was trained on


async def test_the_declarations_are_to_the_byte_what_the_mini_model_knows(folder: Path) -> None:
    declared = json.dumps([declaration(tool) for tool in Search(folder).tools()])
    assert declared == (
        '[{"type": "function", "function": {"name": "search", "description": "Search the documents. Each result is an id, '
        'a line number and the line that matches best.", "parameters": {"type": "object", "properties": {"query": '
        '{"type": "string", "description": "Words to look for."}, "limit": {"type": "integer", "minimum": 1, "maximum": '
        '50, "description": "How many results, 5 if not given."}}, "required": ["query"], "additionalProperties": false}}},'
        ' {"type": "function", "function": {"name": "open", "description": "Read a document with line numbers. Takes an id '
        'from search, or an exact title.", "parameters": {"type": "object", "properties": {"id": {"type": "string", '
        '"description": "Id or title."}, "line": {"type": "integer", "minimum": 1, "description": "First line to show."}, '
        '"find": {"type": "string", "description": "Show only the lines with this text."}}, "required": ["id"], '
        '"additionalProperties": false}}}]'
    )


async def test_results_and_errors_are_worded_as_ever(folder: Path) -> None:
    async with Search(folder) as search:
        assert (await call(search, "search", query="harbour", limit=1)).content == "1. harbour.md:1: # Harbour"
        assert (await call(search, "search", query="zebra")).content == 'No results for "zebra".'
        assert (await call(search, "search", query="")).content == 'No results for "".'
        page = await call(search, "open", id="Harbour")
        assert page.content == (
            "harbour.md (4 lines)\n1: # Harbour\n2:\n3: Ships land here.\n4: The harbour closes at nine."
        )
        for arguments, said in (
            ({"id": "Port"}, 'there is no document "Port"; search for it'),
            ({"id": "https://a.example/"}, 'there is no document "https://a.example/"; search for it'),
            ({"id": "harbour.md", "line": 9}, "harbour.md has lines 1 to 4; there is no line 9"),
            ({"id": "harbour.md", "find": "cow"}, 'no line of harbour.md from line 1 on has "cow"'),
        ):
            with pytest.raises(ToolError) as caught:
                await call(search, "open", **arguments)
            assert str(caught.value) == said


async def test_records_say_which_lines_were_shown(folder: Path) -> None:
    async with Search(folder) as search:
        found = await call(search, "search", query="harbour")
        assert found.record == {"hits": ["harbour.md"], "sources": ["docs"], "cached": False}
        page = await call(search, "open", id="Harbour", line=2)
        assert page.record == {"document": "harbour.md", "title": "Harbour", "lines": [[2, 4]]}
        rows = await call(search, "open", id="long.txt", find="row 19")
        assert rows.record["lines"] == [[19, 19], [190, 199], [1900, 1999]]
        first = await call(search, "open", id="long.txt")
        last = first.record["lines"][0][1]
        assert first.content.startswith(f"long.txt (2000 lines; more from line {last + 1} on)\n1: row 1\n")
        assert first.content.endswith(f"\n{last}: row {last}")


async def test_it_can_be_used_again_and_by_two_at_once(folder: Path) -> None:
    search = Search(folder)
    assert isinstance(search, Toolset)
    async with search, search:
        assert (await call(search, "search", query="harbour")).record["hits"]
    (folder / "new.md").write_text("# Lighthouse\n")
    async with search:
        assert (await call(search, "search", query="lighthouse")).record["hits"] == ["new.md"]


async def test_several_folders_are_told_apart(tmp_path: Path) -> None:
    for name, text in (("one", "# Mayor\n\nAda"), ("two", "# Mayor\n\nBob")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "town.md").write_text(text)
    async with Search(tmp_path / "one", str(tmp_path / "two")) as search:
        hits = (await call(search, "search", query="mayor")).record["hits"]
        assert sorted(hits) == ["one/town.md", "two/town.md"]
        assert "Bob" in (await call(search, "open", id="two/town.md")).content


async def test_a_corpus_of_its_own_stays_open(folder: Path) -> None:
    corpus = Corpus(folder)
    async with Search(corpus) as search:
        assert (await call(search, "search", query="harbour")).record["hits"] == ["harbour.md"]
    assert corpus.search("harbour")
    corpus.close()


def test_what_can_not_be_searched_is_refused(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(ThinkloopError, match="nothing to search"):
        Search()
    with pytest.raises(CorpusError, match="does not exist"):
        Search(tmp_path / "nowhere")
    with pytest.raises(ThinkloopError, match="`int` can't be searched"):
        Search(5)  # type: ignore[arg-type]  # that is the point
    with pytest.raises(ThinkloopError, match="`Serper` can't be searched"):
        Search(Serper)  # type: ignore[arg-type]  # the class and not an instance
    with pytest.raises(ThinkloopError, match="one `Corpus`"):
        Search(folder, Corpus(folder))
    with pytest.raises(ThinkloopError, match="no folders"):
        _ = Search(SearXNG("http://localhost")).corpus


# --- the web


async def test_descriptions_say_what_is_searched_and_opened(folder: Path) -> None:
    web, pages = SearXNG("http://localhost:8080"), Site({})
    said = {
        name: [tool.description for tool in search.tools()]
        for name, search in {
            "web": Search(web), "both": Search(folder, web), "pages": Search(folder, pages=pages), "urls": Search(pages=pages),
        }.items()
    }  # fmt: skip
    assert said["web"][0].startswith("Search the web.")
    assert said["both"][0].startswith("Search the documents and the web.")
    assert said["pages"][0].startswith("Search the documents. ")
    assert all("URL" in said[name][-1] for name in said)
    assert len(said["urls"]) == 1


async def test_web_results_are_url_title_and_snippet(server: SearchServer) -> None:
    async with Search(SearXNG(server.url), pages=Site({})) as search:
        found = await call(search, "search", query="harbour", limit=2)
        assert found.content == (
            "1. https://ports.example/bergen: Bergen harbour: The harbour of Bergen & its ferries.\n"
            "2. https://ports.example/oslo: Oslo harbour: Ferries leave Oslo daily."
        )
        assert found.record == {
            "hits": ["https://ports.example/bergen", "https://ports.example/oslo"], "sources": ["searxng"], "cached": False,
        }  # fmt: skip
        assert (await call(search, "search", query="HARBOUR", limit=2)).record["cached"] is True
        with pytest.raises(ToolError, match="the query is empty"):
            await call(search, "search", query=" ")


async def test_the_corpus_comes_first_and_both_have_a_share(folder: Path, server: SearchServer) -> None:
    for number in range(9):
        (folder / f"port{number}.md").write_text(f"# Port {number}\n\nharbour\n")
    async with Search(folder, SearXNG(server.url), pages=Site({})) as search:
        hits = (await call(search, "search", query="harbour", limit=6)).record["hits"]
        assert [hit.startswith("http") for hit in hits] == [False] * 3 + [True] * 3
        assert len((await call(search, "search", query="harbour", limit=50)).record["hits"]) == 13
        one = await call(search, "search", query="harbour", limit=1)
        assert one.record["hits"] == ["harbour.md"]
        assert one.record["sources"] == ["docs", "searxng"]


@pytest.mark.parametrize(
    ("sizes", "limit", "shares"),
    [((9, 9), 5, (3, 2)), ((1, 9), 5, (1, 4)), ((9, 1), 5, (4, 1)), ((0, 0), 5, (0, 0)), ((2,), 5, (2,)), ((), 5, ())],
)
def test_what_one_leaves_the_others_get(sizes: tuple[int, ...], limit: int, shares: tuple[int, ...]) -> None:
    groups = [[Hit(f"{group}", "", number, "") for number in range(size)] for group, size in enumerate(sizes)]
    wanted = [hit for group, share in zip(groups, shares, strict=True) for hit in group[:share]]
    assert merge(groups, limit) == wanted


async def test_a_failure_before_an_answer_is_one_line(server: SearchServer) -> None:
    server.fail("searxng", status(500))
    async with Search(SearXNG(server.url), Serper(KEY, base_url=server.url), pages=Site({}), retry=QUICK) as search:
        found = await call(search, "search", query="harbour", limit=1)
        assert found.content.split("\n")[1:] == ["(searxng failed: it answered with status 500)"]
        assert found.record["sources"] == ["serper"]
        assert found.record["failed"] == {"searxng": "it answered with status 500"}


async def test_a_failure_of_the_web_leaves_the_corpus(folder: Path, server: SearchServer) -> None:
    server.fail("searxng", *[cut()] * 3)
    async with Search(folder, SearXNG(server.url), pages=Site({}), retry=QUICK) as search:
        found = await call(search, "search", query="harbour")
        assert found.content.startswith("1. harbour.md:1: # Harbour\n(searxng failed: no whole answer")


async def test_an_error_is_never_an_empty_result(folder: Path, server: SearchServer) -> None:
    server.fail("searxng", *[status(403)] * 3)
    server.fail("serper", *[status(429, None, {"Retry-After": "90"})] * 3)
    sources = SearXNG(server.url), Serper(KEY, base_url=server.url)
    async with Search(*sources, pages=Site({}), retry=QUICK) as search:
        with pytest.raises(ToolError) as caught:
            await call(search, "search", query="harbour")
        said = str(caught.value)
        assert "searxng failed: it refuses the request (status 403)" in said
        assert "serper failed: it asks for fewer requests (status 429)" in said
        assert "search again in 90 s" in said
    async with Search(folder, *sources, pages=Site({}), retry=QUICK) as search:
        with pytest.raises(ToolError, match=r'no results for "zebra" in docs, and searxng failed.*serper failed'):
            await call(search, "search", query="zebra")


async def test_an_empty_answer_beside_a_failure_is_told_as_both() -> None:
    with SearchServer(()) as server:
        server.fail("searxng", status(500))
        async with Search(SearXNG(server.url), Serper(KEY, base_url=server.url), pages=Site({}), retry=QUICK) as search:
            found = await call(search, "search", query="zebra")
    assert found.content == 'No results for "zebra".\n(searxng failed: it answered with status 500)'


async def test_many_searches_and_opens_side_by_side(folder: Path, server: SearchServer) -> None:
    site = Site({f"https://a.example/{number}": (f"https://a.example/{number}", "", ("x",)) for number in range(20)})
    async with Search(folder, SearXNG(server.url), pages=site) as search, anyio.create_task_group() as group:
        for number in range(20):
            group.start_soon(lambda number=number: call(search, "search", query=f"harbour {number % 4}"))
            group.start_soon(lambda number=number: call(search, "open", id=f"https://a.example/{number % 5}"))
    assert len(server.requests) == 4
    assert sorted(site.opened) == [f"https://a.example/{number}" for number in range(5)]


# --- opening


BERGEN = "https://ports.example/bergen"


async def test_open_takes_urls_ids_and_titles_of_results(server: SearchServer) -> None:
    page = (BERGEN, "Bergen", ("Bergen has a harbour.", "", "It closes at nine."))
    site = Site({BERGEN: page})
    async with Search(SearXNG(server.url), pages=site) as search:
        with pytest.raises(ToolError, match='no document "Bergen harbour"; search for it, or give a whole URL'):
            await call(search, "open", id="Bergen harbour")
        await call(search, "search", query="harbour")
        by_title = await call(search, "open", id="Bergen harbour")
        by_url = await call(search, "open", id=f" {BERGEN}\n")
        assert by_title == by_url
        assert by_url.content == f"{BERGEN}: Bergen (3 lines)\n1: Bergen has a harbour.\n2:\n3: It closes at nine."
        assert by_url.record == {"document": BERGEN, "title": "Bergen", "lines": [[1, 3]]}
    async with search:
        with pytest.raises(ToolError, match="no document"):  # another run has seen no results
            await call(search, "open", id="Bergen harbour")


async def test_a_document_of_the_folder_wins(folder: Path) -> None:
    site = Site({})
    async with Search(folder, pages=site) as search:
        assert (await call(search, "open", id="Harbour")).record["document"] == "harbour.md"
    assert site.opened == []


async def test_a_title_that_several_results_have_is_asked_back() -> None:
    rows = (("https://a.example/", "News", "a"), ("https://b.example/", "News", "b"))
    with SearchServer(rows) as server:
        async with Search(SearXNG(server.url), pages=Site({})) as search:
            await call(search, "search", query="news")
            with pytest.raises(ToolError, match=r'several results .* "News".* https://a.example/, https://b.example/'):
                await call(search, "open", id="News")


async def test_a_title_never_takes_an_address_of_another() -> None:
    good, evil = "https://good.example/page", "https://evil.example/x"
    with SearchServer(((evil, good, "x"), ("https://other.example/", evil, "y"))) as server:
        site = Site({good: (good, "Good", ("good",)), evil: (evil, "Evil", ("evil",))})
        async with Search(SearXNG(server.url), pages=site) as search:
            await call(search, "search", query="news")
            assert (await call(search, "open", id=good)).record["document"] == good
            assert (await call(search, "open", id=evil)).record["document"] == evil
    assert site.opened == [good, evil]


async def test_what_is_kept_for_a_run_is_bounded_in_all(folder: Path) -> None:
    pages = {f"https://a.example/{n}": (f"https://a.example/{n}", "", ("x",) * 90_000) for n in range(4)}
    site = Site(pages)
    async with Search(folder, pages=site) as search:
        for url in (*pages, *reversed(pages)):
            await call(search, "open", id=url)
    assert len(site.opened) == 6  # two are kept at a time: 9,000,000 characters each, as lines count


async def test_reading_on_fetches_nothing_again(folder: Path) -> None:
    lines = tuple(f"line {number} {'x' * 100}" for number in range(1, 301))
    site = Site({BERGEN: (BERGEN, "", lines)})
    async with Search(folder, pages=site) as search:
        first = await call(search, "open", id=BERGEN)
        more = first.record["lines"][0][1] + 1
        assert f"more from line {more} on" in first.content
        second = await call(search, "open", id=BERGEN, line=more)
        assert f"\n{more}: line {more} x" in second.content
        assert (await call(search, "open", id=BERGEN, find="line 299")).record["lines"] == [[299, 299]]
        assert site.opened == [BERGEN]
        with pytest.raises(ToolError, match="404"):
            await call(search, "open", id="https://other.example/")
        assert site.entered == 1
    assert site.entered == 0


async def test_nothing_of_a_page_is_lost_or_dangerous(folder: Path) -> None:
    words = " ".join(f"word{number}" for number in range(2000))
    site = Site({BERGEN: ("https://elsewhere.example/", "T\x1b[2Jitle\n" * 99, (words, "two\nlines\x00\u202e"))})
    async with Search(folder, pages=site) as search:
        seen, line = "", 1
        while line:
            page = await call(search, "open", id=BERGEN, line=line)
            head, *rows = page.content.split("\n")
            assert head.startswith(f"{BERGEN}, moved to https://elsewhere.example/: T[2Jitle ")
            assert max(map(len, rows)) < 520
            seen += " ".join(row.split(": ", 1)[1] for row in rows) + " "
            line = page.record["lines"][0][1] + 1 if "more from" in head else 0
        assert seen.split() == [*words.split(), "two", "lines"]
        assert page.record["document"] == BERGEN
        assert page.record["url"] == "https://elsewhere.example/"
        assert len(page.record["title"]) <= 120


async def test_a_page_without_text_says_so(folder: Path) -> None:
    async with Search(folder, pages=Site({BERGEN: (BERGEN, "", ("", " "))})) as search:
        with pytest.raises(ToolError, match="holds no text"):
            await call(search, "open", id=BERGEN)


@pytest.mark.parametrize(
    "id", ["javascript:alert(1)", "file:///etc/passwd", "ports.example", "../docs/x", "", "\x00", "http://"]
)
async def test_what_is_no_web_address_is_not_fetched(folder: Path, id: str) -> None:
    site = Site({})
    async with Search(folder, pages=site) as search:
        with pytest.raises(ToolError, match="there is no document"):
            await call(search, "open", id=id)
    assert site.opened == []


@dataclass(frozen=True)
class Tickets:
    """A source of one's own that can give its documents, and must be entered."""

    name: str = "tickets"
    state: list[str] = field(default_factory=list, compare=False)

    async def __aenter__(self) -> Tickets:
        self.state.append("open")
        return self

    async def __aexit__(self, *exc: Any) -> None:
        self.state.append("closed")

    async def search(self, query: str, limit: int) -> Sequence[Hit]:
        return [Hit("T-7", "Harbour crane", 2, "The crane is stuck.")]

    async def document(self, id: str) -> Document | None:
        if id == "T-8":
            raise SourceError("ticket T-8 is secret")
        return Document("T-7", "Harbour crane", ("Opened by Ada.", "The crane is stuck.")) if id == "T-7" else None


async def test_sources_of_ones_own_are_searched_opened_and_closed() -> None:
    tickets = Tickets()
    async with Search(tickets) as search:
        assert tickets.state == ["open"]
        assert (await call(search, "search", query="crane")).content == "1. T-7:2: The crane is stuck."
        page = await call(search, "open", id="Harbour crane")
        assert page.content == "T-7: Harbour crane (2 lines)\n1: Opened by Ada.\n2: The crane is stuck."
        with pytest.raises(ToolError, match="T-8 is secret"):
            await call(search, "open", id="T-8")
        with pytest.raises(ToolError, match='no document "T-9"'):
            await call(search, "open", id="T-9")
    assert tickets.state == ["open", "closed"]


async def test_what_was_entered_is_left_when_the_next_can_not_start(folder: Path) -> None:
    class Broken(Site):
        async def __aenter__(self) -> Site:
            raise ThinkloopError("no browser")

    tickets = Tickets()
    search = Search(folder, tickets, pages=Broken({}))
    for _ in range(2):
        with pytest.raises(ThinkloopError, match="no browser"):
            await search.__aenter__()
    assert tickets.state == ["open", "closed"] * 2


# --- pages without a browser


async def test_a_web_page_is_read_with_line_numbers(server: SearchServer) -> None:
    paragraphs = "".join(
        f"<p>Pier {number} of the harbour is {number * 10} metres long, and ships land there.</p>"
        for number in range(9)
    )
    server.pages["/bergen"] = (
        f"<html><head><title>Bergen</title></head><body><article>{paragraphs}</article></body></html>"
    )
    host = f"127.0.0.1:{server.port}"
    url = f"http://{host}/bergen"
    async with Search(SearXNG(server.url), pages=WebPages(allow_hosts=[host])) as search:
        with recording() as facts:
            page = await call(search, "open", id=url)
        assert {name: facts["response"][name] for name in ("final_url", "status", "truncated")} == {
            "final_url": url, "status": 200, "truncated": False,
        }  # fmt: skip
        assert page.content.startswith(f"{url}: Bergen (")
        number = next(row for row in page.content.split("\n") if "Pier 4 of the harbour" in row).partition(":")[0]
        found = await call(search, "open", id=url, find="Pier 4")
        assert found.record["lines"] == [[int(number)] * 2]
        with pytest.raises(ToolError, match="404"):
            await call(search, "open", id=f"http://{host}/nothing")


async def test_private_hosts_are_not_opened_unless_allowed(server: SearchServer) -> None:
    server.pages["/secret"] = "<p>secret</p>"
    rows = ((f"{server.url}/secret", "Free money", "open me"),)
    with SearchServer(rows) as hostile:
        async with Search(SearXNG(hostile.url)) as search:
            await call(search, "search", query="money")
            for id in ("Free money", f"{server.url}/secret", f"http://localhost:{server.port}/secret"):
                with pytest.raises(ToolError):
                    await call(search, "open", id=id)
    assert server.requests == []


def test_a_result_without_a_line_has_no_number() -> None:
    hits = [Hit("https://a.example/", "", 0, "text"), Hit("https://b.example/", "Title", 0, "")]
    assert format_hits("q", hits) == "1. https://a.example/: text\n2. https://b.example/: Title"


def test_a_page_is_never_empty() -> None:
    shown = show_page(Document("a", "A", ("x" * 400,) * 3), max_chars=10)
    assert shown.lines == [[1, 1]]
