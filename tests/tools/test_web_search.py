"""Web search: published formats, fallback in order, limits respected, answers kept, hostile answers, keys never shown."""

from __future__ import annotations

import logging
import math
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from itertools import pairwise
from pathlib import Path
from time import monotonic

import anyio
import pytest
from thinkloop.tools import web_request, web_search
from thinkloop.tools.corpus import Hit
from thinkloop.tools.web_providers import Brave, SearXNG, Serper, Tavily
from thinkloop.tools.web_search import (
    MAX_SNIPPET_CHARS,
    MAX_TITLE_CHARS,
    RetryPolicy,
    Source,
    SourceBusy,
    SourceDown,
    SourceError,
    SourceRefused,
    WebSearch,
)
from thinkloop.traces.events import ThinkloopError

sys.path.insert(0, str(Path(__file__).parents[1]))
from search_server import KEY, Answer, SearchServer, bomb, brave_error, cut, endless, status, trickle

pytestmark = pytest.mark.anyio
QUICK = RetryPolicy(backoff=0.01, penalty=30.0, attempt=2.0, total=6.0)
MAKERS: dict[str, Callable[[str], Source]] = {
    "searxng": SearXNG,
    "brave": lambda url: Brave(KEY, base_url=url, interval=0),
    "tavily": lambda url: Tavily(KEY, base_url=url, interval=0),
    "serper": lambda url: Serper(KEY, base_url=url),
}
KEYED: dict[str, tuple[type, str]] = {
    "brave": (Brave, "BRAVE_API_KEY"),
    "tavily": (Tavily, "TAVILY_API_KEY"),
    "serper": (Serper, "SERPER_API_KEY"),
}


@pytest.fixture
def server() -> Iterator[SearchServer]:
    with SearchServer() as server:
        yield server


@dataclass(eq=False)
class Scripted:
    """A source that answers as told; the last entry is repeated."""

    script: list[Sequence[Hit] | Exception | float]
    name: str = "scripted"
    interval: float = 0.0
    asked: list[str] = field(default_factory=list)

    async def search(self, query: str, limit: int) -> Sequence[Hit]:
        self.asked.append(query)
        step = self.script.pop(0) if len(self.script) > 1 else self.script[0]
        if isinstance(step, float):
            await anyio.sleep(step)
            return HITS
        if isinstance(step, Exception):
            raise step
        return step


HITS = [Hit("https://a.example/", "A", 0, "about a"), Hit("https://b.example/", "B", 0, "about b")]


class Clock:
    """A clock that moves only when somebody sleeps."""

    def __init__(self) -> None:
        self.now, self.slept = 1000.0, list[float]()

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        await anyio.lowlevel.checkpoint()
        self.now += seconds
        if seconds:
            self.slept.append(seconds)


def policy(clock: Clock, **options: float) -> RetryPolicy:
    return RetryPolicy(clock=clock, sleep=clock.sleep, **options)  # type: ignore[arg-type]  # floats and ints


# --- published formats


@pytest.mark.parametrize("name", MAKERS)
async def test_each_service_is_understood(server: SearchServer, name: str) -> None:
    hits = await MAKERS[name](server.url).search("harbour ferries", 2)
    assert hits == [
        Hit("https://ports.example/bergen", "Bergen harbour", 0, "The harbour of Bergen & its ferries."),
        Hit("https://ports.example/oslo", "Oslo harbour", 0, "Ferries leave Oslo daily."),
    ]
    asked = server.requests[0].params
    assert asked.get("q", asked.get("query")) == "harbour ferries"


@pytest.mark.parametrize("name", MAKERS)
async def test_no_results_are_no_error(name: str) -> None:
    with SearchServer(()) as server:
        assert await MAKERS[name](server.url).search("zebra", 5) == []


async def test_searxng_takes_engines_language_and_a_path(server: SearchServer) -> None:
    source = SearXNG(server.url + "/search/", engines=["mojeek", "wikipedia"], language="nb")
    await source.search("havn", 3)
    wanted = {"q": "havn", "format": "json", "engines": "mojeek,wikipedia", "language": "nb"}
    assert server.requests[0].params == wanted


async def test_engines_that_were_silent_are_an_error_not_an_empty_result() -> None:
    data = {"query": "q", "results": [], "unresponsive_engines": [["google", "timeout"], ["bing", "CAPTCHA"]]}
    with SearchServer() as server:
        server.fail("searxng", status(200, data))
        with pytest.raises(SourceError, match="google: timeout, bing: CAPTCHA"):
            await SearXNG(server.url).search("q", 5)


async def test_only_web_addresses_come_back_and_text_is_plain() -> None:
    rows = [
        {"url": "javascript:alert(1)", "title": "x", "content": "x"},
        {"url": "file:///etc/passwd", "title": "x", "content": "x"},
        {"url": "https://user:pw@a.example/", "title": "x", "content": "x"},
        {"url": "https://a.example/ b", "title": "x", "content": "x"},
        {"url": "https://[bad/", "title": "x", "content": "x"},
        {"url": "https://long.example/" + "x" * 600, "title": "x", "content": "x"},
        {
            "url": "https://ok.example/",
            "title": "T\x1b[2J\n\ud800\u202et<b>i</b>tle" * 50,
            "content": "1 < 2 &lt;b&gt; \x07",
        },
        {"url": "https://bare.example/", "title": None, "content": ["no", "text"]},
        {"url": "https://ok.example/", "title": "again", "content": ""},
        "no row",
        {"title": "no url"},
    ]
    with SearchServer() as server:
        server.fail("searxng", status(200, {"results": rows}))
        found = await WebSearch([SearXNG(server.url)]).search("q", 9)
    assert [hit.id for hit in found.hits] == ["https://ok.example/", "https://bare.example/"]
    assert found.hits[0].title.startswith("T[2J title")
    assert len(found.hits[0].title) <= MAX_TITLE_CHARS
    assert found.hits[0].text == "1 < 2 <b>"
    assert found.hits[1].title == found.hits[1].text == ""


async def test_long_texts_are_cut() -> None:
    with SearchServer((("https://a.example/", "t" * 9999, "s" * 99_999),)) as server:
        hit = (await WebSearch([SearXNG(server.url)]).search("q", 1)).hits[0]
    assert (len(hit.title), len(hit.text)) == (MAX_TITLE_CHARS, MAX_SNIPPET_CHARS)


@pytest.mark.parametrize("name", ["brave", "tavily"])
async def test_a_query_that_is_too_long_is_said_to_be(server: SearchServer, name: str) -> None:
    with pytest.raises(SourceError, match=r"401 characters.*fewer words"):
        await MAKERS[name](server.url).search("x" * 401, 5)
    assert server.requests == []


# --- answers that are not what they should be

BAD: dict[str, tuple[Answer, str]] = {
    "html": (status(200, b"<html>Are you a robot?</html>", {"Content-Type": "text/html"}), "not a JSON object"),
    "a list": (status(200, []), "not a JSON object"),
    "an error with 200": (status(200, {"error": {"message": "out of cheese"}}), "an error: out of cheese"),
    "results of another type": (status(200, {"results": "many", "web": [], "organic": 7}), "no list"),
    "rows of another type": (
        status(200, {"results": [1, 2], "web": {"results": [None]}, "organic": [{"link": 5}]}), "another form",
    ),
    "too deep": (status(200, b'{"a":' * 200_000), "not a JSON object"),
    "a huge number": (status(200, b'{"results": [' + b"9" * 100_000 + b"]}"), "not a JSON object"),
    "not UTF-8": (status(200, b'{"results": "\xff\xfe"}'), "not a JSON object"),
    "cut off": (cut(), "no whole answer"),
    "gzip cut off": (status(200, b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03", {"Content-Encoding": "gzip"}), "cut off"),
    "no gzip": (status(200, b"{}", {"Content-Encoding": "gzip"}), "not the gzip"),
    "gzip bomb": (bomb(), "larger than 2 MB"),
    "another encoding": (status(200, b"{}", {"Content-Encoding": "br"}), "encoding br"),
    "endless": (endless(), "larger than 2 MB"),
    "redirect": (status(302, None, {"Location": "http://169.254.169.254/latest/meta-data"}), "redirects elsewhere"),
    "no such page": (status(404, b"<html>"), "status 404"),
    "server error": (status(500, b"oops"), "status 500"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("name", MAKERS)
async def test_a_bad_answer_is_named_and_quickly(server: SearchServer, name: str, case: str) -> None:
    answer, said = BAD[case]
    server.fail(name, answer)
    started = monotonic()
    with pytest.raises(SourceError, match=said):
        await MAKERS[name](server.url).search("q", 5)
    assert monotonic() - started < 5
    assert len(server.requests) == 1


async def test_a_bomb_is_not_unpacked(server: SearchServer) -> None:
    server.fail("searxng", bomb())
    tracemalloc.start()
    try:
        with pytest.raises(SourceError, match="larger"):
            await SearXNG(server.url).search("q", 5)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 16 << 20


@pytest.mark.parametrize("answer", [Answer(silent=True), trickle(0.02)])
async def test_a_service_that_does_not_finish_is_given_up(
    server: SearchServer, monkeypatch: pytest.MonkeyPatch, answer: Answer
) -> None:
    monkeypatch.setattr(web_request, "MAX_SECONDS", 0.3)
    server.fail("searxng", answer)
    with pytest.raises(SourceDown, match=r"no answer within 0.3 s"):
        await SearXNG(server.url).search("q", 5)


async def test_nobody_there_is_an_error_that_may_pass() -> None:
    with SearchServer() as server:
        url = server.url
    with pytest.raises(SourceDown, match=r"no whole answer from 127.0.0.1 \(ConnectError\)"):
        await SearXNG(url).search("q", 5)


# --- keys


@pytest.mark.parametrize("name", KEYED)
async def test_a_wrong_key_is_refused_without_being_shown(server: SearchServer, name: str) -> None:
    make, variable = KEYED[name]
    wrong = "wrong-7f3a9c"
    echo = status(401, {"message": f"the key {wrong} is unknown"})
    for answers, said in (((), "refuses|invalid"), ((echo,), r"the key \[key\] is unknown")):
        server.fail(name, *answers)
        with pytest.raises(SourceRefused, match=said) as caught:
            await make(wrong, base_url=server.url).search("q", 5)
        assert variable in str(caught.value)
        assert wrong not in str(caught.value)


@pytest.mark.parametrize("name", KEYED)
async def test_keys_show_nowhere(
    server: SearchServer, name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    make, variable = KEYED[name]
    monkeypatch.setenv(variable, f" {KEY}\n")
    source = make(base_url=server.url)
    assert len(await source.search("q", 5)) == 3
    server.fail(name, status(500, {"error": KEY}), cut(), endless(), status(307, {"error": KEY}, {"Location": "/"}))
    found = await WebSearch([source], RetryPolicy(tries=1)).search("a", 5)
    texts = [repr(source), str(source), repr(found)]
    for _ in range(3):
        with pytest.raises(SourceError) as caught:
            await source.search("q", 5)
        error: BaseException | None = caught.value
        while error is not None:
            texts.append(f"{error!r} {error}")
            error = error.__cause__
    assert KEY not in " ".join(texts)
    assert KEY not in caplog.text


@pytest.mark.parametrize("name", KEYED)
def test_a_missing_or_broken_key_is_said_at_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, variable = KEYED[name]
    monkeypatch.delenv(variable, raising=False)
    with pytest.raises(ThinkloopError, match=f"set {variable}"):
        make()
    for broken in ("two words", "line\nbreak", "clé"):
        with pytest.raises(ThinkloopError, match=f"{variable} holds characters") as caught:
            make(broken)
        assert broken not in str(caught.value)


def test_addresses_are_checked_and_keys_need_encryption() -> None:
    for url in ("", "localhost:8080", "ftp://a/", "http://", "http://[", "http://a:b/", "http://a/?q=1", "http://a\n/"):
        with pytest.raises(ThinkloopError, match="address of the search service"):
            SearXNG(url)
    with pytest.raises(ThinkloopError, match="password") as caught:
        SearXNG("http://me:hunter2@search.example")
    assert "hunter2" not in str(caught.value)
    with pytest.raises(ThinkloopError, match="unencrypted"):
        Brave(KEY, base_url="http://api.example")


async def test_a_redirect_takes_the_key_nowhere(server: SearchServer) -> None:
    with SearchServer() as elsewhere:
        for name in KEYED:
            server.fail(name, status(307, None, {"Location": elsewhere.url + "/search"}))
            with pytest.raises(SourceError, match="redirects"):
                await MAKERS[name](server.url).search("q", 5)
        assert elsewhere.requests == []


# --- fallback


async def test_the_next_source_is_asked_only_when_the_one_before_failed(server: SearchServer) -> None:
    search = WebSearch([SearXNG(server.url), MAKERS["brave"](server.url)], QUICK)
    found = await search.search("harbour", 2)
    assert (found.source, found.failures, server.asked("brave")) == ("searxng", (), [])
    server.fail("searxng", status(403, b"Forbidden"))
    found = await search.search("tides", 2)
    assert (found.source, len(found.hits)) == ("brave", 2)
    assert "searxng failed: it refuses the request (status 403)" in str(found.failures[0])
    assert "search.formats" in found.failures[0].reason


async def test_an_empty_answer_is_an_answer() -> None:
    with SearchServer(()) as server:
        found = await WebSearch([SearXNG(server.url), MAKERS["brave"](server.url)]).search("zebra", 5)
        assert (found.source, found.hits, server.asked("brave")) == ("searxng", (), [])


async def test_all_failed_names_every_failure(server: SearchServer) -> None:
    server.fail("searxng", cut(), cut(), cut())
    server.fail("tavily", status(432, {"detail": {"error": "This request exceeds your plan's set usage limit."}}))
    server.fail("serper", status(400, {"message": "Not enough credits", "statusCode": 400}))
    sources = [MAKERS[name](server.url) for name in ("searxng", "tavily", "serper")]
    found = await WebSearch(sources, QUICK).search("q", 5)
    assert (found.source, found.hits) == ("", ())
    said = [str(failure) for failure in found.failures]
    assert "searxng failed: no whole answer" in said[0]
    assert "exceeds your plan's set usage limit" in said[1]
    assert "Not enough credits" in said[2]
    assert "SERPER_API_KEY" in said[2]


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (ZeroDivisionError("by zero\x1b[2J"), "ZeroDivisionError: by zero"),
        (ThinkloopError("the index is gone"), "the index is gone"),
        (["no hit"], "not a list of `Hit`"),
        (None, "not a list of `Hit`"),
        ([Hit(None, "t", 0, "x")], "TypeError"),  # type: ignore[arg-type]  # that is the point
    ],
)
async def test_whatever_breaks_a_source_the_next_is_asked(broken: object, said: str) -> None:
    found = await WebSearch([Scripted([broken]), Scripted([HITS], name="second")]).search("q", 5)  # type: ignore[list-item]
    assert found.source == "second"
    assert said in found.failures[0].reason
    assert "\x1b" not in found.failures[0].reason


async def test_a_slow_source_leaves_time_for_the_next() -> None:
    started = monotonic()
    search = WebSearch(
        [Scripted([30.0]), Scripted([HITS], name="second")], RetryPolicy(total=0.6, attempt=0.2, backoff=0.01)
    )
    found = await search.search("q", 5)
    assert found.source == "second"
    assert "no answer within" in found.failures[0].reason
    assert monotonic() - started < 0.6


# --- trying again, and leaving alone


async def test_what_may_pass_is_tried_three_times_with_growing_waits() -> None:
    clock = Clock()
    source = Scripted([SourceDown("oops"), SourceDown("oops"), HITS])
    found = await WebSearch([source], policy(clock, backoff=1.0)).search("q", 5)
    assert found.source == "scripted"
    assert len(source.asked) == 3
    assert 0.5 <= clock.slept[0] <= 1.0 <= clock.slept[1] <= 2.0


async def test_a_server_error_passes(server: SearchServer) -> None:
    server.fail("serper", status(500), status(502))
    found = await WebSearch([MAKERS["serper"](server.url)], QUICK).search("q", 5)
    assert (found.source, len(server.requests)) == ("serper", 3)


async def test_other_errors_are_not_tried_again() -> None:
    source = Scripted([SourceError("malformed")])
    found = await WebSearch([source]).search("q", 5)
    assert (len(source.asked), found.failures[0].reason) == (1, "malformed")


async def test_a_source_in_penalty_is_skipped_until_it_ends() -> None:
    clock, down = Clock(), Scripted([SourceDown("oops")])
    search = WebSearch([down, Scripted([HITS], name="second")], policy(clock, penalty=20.0))
    await search.search("one", 5)
    asked = len(down.asked)
    found = await search.search("two", 5)
    assert (len(down.asked), found.source, found.failures[0].reason) == (asked, "second", "oops")
    assert 0 < (found.failures[0].seconds or 0) <= 20
    clock.now += 21
    down.script = [HITS]
    assert (await search.search("three", 5)).source == "scripted"
    assert (await search.search("four", 5)).failures == ()


async def test_penalties_grow_and_end() -> None:
    clock, down = Clock(), Scripted([SourceDown("oops")])
    search = WebSearch([down], policy(clock, penalty=10.0, longest_penalty=35.0, tries=1, total=5.0))
    waits = []
    for number in range(4):
        found = await search.search(f"q{number}", 5)
        waits.append(found.failures[0].seconds)
        clock.now += 100
    assert waits == [10.0, 20.0, 35.0, 35.0]


async def test_an_answer_ends_the_count_of_failures() -> None:
    clock, source = Clock(), Scripted([SourceDown("oops"), HITS, SourceDown("oops")])
    search = WebSearch([source], policy(clock, penalty=10.0, tries=1, total=5.0))
    waits = []
    for number in range(3):
        found = await search.search(f"q{number}", 5)
        waits += [failure.seconds for failure in found.failures]
        clock.now += 100
    assert waits == [10.0, 10.0]


async def test_a_refused_key_is_not_sent_again_and_again() -> None:
    clock, refused = Clock(), Scripted([SourceRefused("no such key")])
    search = WebSearch([refused], policy(clock))
    for number in range(5):
        found = await search.search(f"q{number}", 5)
        assert found.failures[0].reason == "no such key"
    assert len(refused.asked) == 1


async def test_the_last_source_is_waited_for_as_long_as_the_search_may_take() -> None:
    clock = Clock()
    source = Scripted([SourceBusy("slow down", 12.0), HITS])
    assert (await WebSearch([source], policy(clock)).search("q", 5)).source == "scripted"
    assert clock.slept == [12.0]
    source.script = [SourceBusy("slow down", 60.0)]
    found = await WebSearch([source], policy(clock)).search("r", 5)
    assert (found.failures[0].reason, found.failures[0].seconds, clock.slept) == ("slow down", 60.0, [12.0])


async def test_where_another_source_is_there_nobody_waits_long() -> None:
    clock = Clock()
    busy = Scripted([SourceBusy("slow down", 12.0)])
    found = await WebSearch([busy, Scripted([HITS], name="second")], policy(clock)).search("q", 5)
    assert (found.source, clock.slept) == ("second", [])


@pytest.mark.parametrize("code", [429, 503])
async def test_retry_after_is_respected(server: SearchServer, code: int) -> None:
    server.fail("searxng", status(code, None, {"Retry-After": "0.3"}))
    started = monotonic()
    found = await WebSearch([SearXNG(server.url)], QUICK).search("q", 5)
    assert found.source == "searxng"
    assert monotonic() - started >= 0.3
    assert len(server.requests) == 2


@pytest.mark.parametrize(
    ("text", "low", "high"),
    [
        ("7", 7, 7),
        ("0.5", 0.5, 0.5),
        ("999999", 3600, 3600),
        ("Fri, 01 Jan 1990 00:00:00 GMT", 0, 0),
    ],
)
def test_a_retry_after_in_seconds_or_past_is_read(text: str, low: float, high: float) -> None:
    seconds = web_request.retry_after({"retry-after": text})
    assert seconds is not None
    assert low <= seconds <= high


def test_a_retry_after_as_a_date_is_read() -> None:
    seconds = web_request.retry_after({"retry-after": format_datetime(datetime.now(UTC) + timedelta(seconds=50))})
    assert seconds is not None
    assert 30 <= seconds <= 51


@pytest.mark.parametrize("text", ["", "soon", "-5", "nan", "inf", "1e9", "٣", "Fri, 99 Jan 0000", "1" * 5000])
def test_a_retry_after_that_says_nothing_is_no_number_to_wait_for(text: str) -> None:
    seconds = web_request.retry_after({"retry-after": text})
    assert seconds is None or (math.isfinite(seconds) and 0 <= seconds <= 3600)


async def test_brave_says_in_headers_how_long_to_wait(server: SearchServer) -> None:
    windows = {"X-RateLimit-Limit": "1, 15000", "X-RateLimit-Remaining": "0, 1000", "X-RateLimit-Reset": "1, 1419704"}
    server.fail("brave", brave_error(429, "RATE_LIMITED", "Request rate limit exceeded for plan.", windows))
    with pytest.raises(SourceBusy, match="Request rate limit exceeded") as caught:
        await MAKERS["brave"](server.url).search("q", 5)
    assert caught.value.seconds == 1.0
    spent = windows | {"X-RateLimit-Remaining": "1, 0"}
    server.fail("brave", brave_error(429, "QUOTA_LIMITED", "Quota exceeded.", spent))
    with pytest.raises(SourceBusy) as caught:
        await MAKERS["brave"](server.url).search("q", 5)
    assert caught.value.seconds == 3600.0


async def test_requests_keep_their_distance_also_side_by_side(server: SearchServer) -> None:
    times: list[float] = []

    @dataclass(frozen=True)
    class Timed:
        name: str = "timed"
        interval: float = 0.1

        async def search(self, query: str, limit: int) -> Sequence[Hit]:
            times.append(monotonic())
            return HITS

    searches = [WebSearch([Timed()], QUICK), WebSearch([Timed()], QUICK)]  # the same source: the limit is common
    async with anyio.create_task_group() as group:
        for number in range(4):
            group.start_soon(searches[number % 2].search, f"q{number}", 5)
    assert len(times) == 4
    assert all(later - earlier >= 0.095 for earlier, later in pairwise(times))


def test_the_free_plan_of_brave_is_the_default() -> None:
    assert (Brave(KEY).interval, SearXNG("http://localhost").interval) == (1.0, 0.0)


async def test_a_queue_that_is_too_long_goes_to_the_next_source() -> None:
    search = WebSearch(
        [Scripted([HITS], interval=0.2), Scripted([HITS], name="second")], RetryPolicy(patience=0.3, total=60.0)
    )
    sources: list[str] = []

    async def one(number: int) -> None:
        sources.append((await search.search(f"q{number}", 5)).source)

    async with anyio.create_task_group() as group:
        for number in range(4):
            group.start_soon(one, number)
    assert sorted(sources) == ["scripted", "scripted", "second", "second"]


# --- keeping answers


async def test_the_same_question_is_asked_once() -> None:
    source = Scripted([HITS])
    search = WebSearch([source])
    first = await search.search("Harbour  of\tBERGEN", 5)
    again = await search.search(" harbour of ｂｅｒｇｅｎ", 5)
    assert (first.cached, again.cached, again.hits) == (False, True, first.hits)
    assert len(source.asked) == 1
    await search.search("harbour of bergen", 4)
    assert len(source.asked) == 2


async def test_a_failure_is_never_kept() -> None:
    source = Scripted([SourceError("malformed"), HITS])
    search = WebSearch([source])
    assert (await search.search("q", 5)).source == ""
    found = await search.search("q", 5)
    assert (found.source, found.cached) == ("scripted", False)


async def test_the_failure_before_an_answer_is_not_repeated_from_memory() -> None:
    search = WebSearch([Scripted([SourceError("malformed")]), Scripted([HITS], name="second")])
    assert (await search.search("q", 5)).failures
    kept = await search.search("q", 5)
    assert (kept.cached, kept.failures, kept.source) == (True, (), "second")


async def test_memory_is_bounded_and_the_oldest_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web_search, "KEPT_ANSWERS", 3)
    search = WebSearch([Scripted([HITS])])
    for query in ("a", "b", "c", "a", "d"):
        await search.search(query, 5)
    assert [(await search.search(query, 5)).cached for query in ("a", "c", "d", "b")] == [True, True, True, False]


async def test_the_same_searches_at_once_share_a_request(server: SearchServer) -> None:
    server.hold.clear()
    search = WebSearch([SearXNG(server.url)], QUICK)
    found = []

    async def one(query: str) -> None:
        found.append(await search.search(query, 2))

    async with anyio.create_task_group() as group:
        for query in ("harbour", "Harbour", " HARBOUR "):
            group.start_soon(one, query)
        while not server.requests:
            await anyio.sleep(0.01)
        server.hold.set()
    assert len(server.requests) == 1
    assert [one.hits for one in found] == [found[0].hits] * 3


async def test_one_that_is_cancelled_does_not_take_the_others_along() -> None:
    source = Scripted([10.0, HITS])
    search = WebSearch([source])
    found = []

    async def follow() -> None:
        found.append(await search.search("q", 5))

    with anyio.fail_after(5):
        async with anyio.create_task_group() as group:
            with anyio.move_on_after(0.1):
                group.start_soon(follow)
                await search.search("q", 5)
    assert [one.source for one in found] == ["scripted"]
    assert len(source.asked) == 2


async def test_cancelling_ends_the_request(server: SearchServer) -> None:
    server.fail("searxng", Answer(silent=True))
    started = monotonic()
    with anyio.move_on_after(0.2) as scope:
        await WebSearch([SearXNG(server.url)], QUICK).search("q", 5)
    assert scope.cancelled_caught
    assert monotonic() - started < 1


def test_importing_brings_no_http_library() -> None:
    code = """import sys, thinkloop.tools.web_providers, thinkloop.tools.search
print([name for name in ("httpx", "torch", "trafilatura", "pydantic") if name in sys.modules])"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout.strip() == "[]"
