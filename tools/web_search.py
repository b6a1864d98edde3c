"""Search over the network: sources in a fallback order, each asked no faster than it allows, answers kept and shared.

A source is asked only when the one before it failed. A failure is never an empty result: it is named, never kept, and a
source that failed is left alone for a while.
"""

from __future__ import annotations

import math
import random
import re
import unicodedata
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from time import monotonic
from typing import Protocol, cast, runtime_checkable
from urllib.parse import urlsplit

import anyio
from thinkloop.tools.corpus import Document, Hit
from thinkloop.tools.extract_text import clean_line
from thinkloop.traces.events import ThinkloopError

MAX_ID_CHARS = 500
"""As much as a citation can hold; results with a longer id are left out."""
MAX_TITLE_CHARS = 120
MAX_SNIPPET_CHARS = 300
MAX_REASON_CHARS = 200
KEPT_ANSWERS = 256
_MARKUP = re.compile(r"</?[a-zA-Z][^<>]{0,300}>")


class SourceError(ThinkloopError):
    """A source can't answer this query: it says so, or its answer can't be read. The next source is asked."""


class SourceDown(SourceError):
    """A failure that may pass at once: no connection, no answer in time, a server error. The source is asked again."""


class SourceBusy(SourceError):
    """The source wants to be left alone for `seconds` (None: it doesn't say for how long)."""

    def __init__(self, message: str, seconds: float | None = None) -> None:
        super().__init__(message)
        self.seconds = seconds


class SourceRefused(SourceError):
    """The source refuses its user: the key is wrong, the quota is spent. Asking again soon won't help."""


@runtime_checkable
class Source(Protocol):
    """Something to search besides folders. An attribute `interval` (seconds) sets the least time between requests; an
    async context manager is entered for as long as the run lasts."""

    @property
    def name(self) -> str: ...

    async def search(self, query: str, limit: int) -> Sequence[Hit]:
        """The best results, best first. A `Hit` of line 0 has no lines: on the web, its id is the page's URL and its
        text the snippet. Raises `SourceError`."""
        ...


@runtime_checkable
class Library(Source, Protocol):
    """A source that can also give its documents."""

    async def document(self, id: str) -> Document | None:
        """The document with this id, or None when there is none. Raises `SourceError`."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """How long and how often sources are asked; all times in seconds.

    A source gets up to `tries` requests, each up to `attempt` long, with waits of `backoff` doubled each time, of which a
    random half is taken off. One that still fails is left alone for `penalty`, doubled with each failure in a row up to
    `longest_penalty`. While another source can be asked instead, no wait is longer than `patience`. A search ends after
    `total`, in equal shares for the sources.
    """

    tries: int = 3
    attempt: float = 10.0
    backoff: float = 0.5
    penalty: float = 10.0
    longest_penalty: float = 300.0
    patience: float = 3.0
    total: float = 40.0
    clock: Callable[[], float] = monotonic
    sleep: Callable[[float], Awaitable[None]] = anyio.sleep


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a source gave no results, and in how many seconds it may be asked again (None: at once)."""

    source: str
    reason: str
    seconds: float | None = None

    def __str__(self) -> str:
        return f"{self.source} failed: {self.reason}"


@dataclass(frozen=True, slots=True)
class Found:
    """What a search gave. `source` has answered; it is empty when all failed."""

    hits: tuple[Hit, ...] = ()
    source: str = ""
    failures: tuple[Failure, ...] = ()
    cached: bool = False


@dataclass(slots=True)
class Gate:
    """When a source may be asked next, on the clock of the policy."""

    interval: float
    free_at: float = 0.0
    closed_until: float = 0.0
    reason: str = ""
    failures: int = 0

    def wait(self, now: float) -> float:
        return max(self.free_at, self.closed_until) - now

    def take(self, now: float) -> float:
        """Reserves the next moment. Gives the seconds until then."""
        start = max(now, self.free_at)
        self.free_at = start + self.interval
        return start - now

    def close(self, now: float, seconds: float, reason: str) -> None:
        self.closed_until = max(self.closed_until, now + seconds)
        self.reason, self.failures = reason, self.failures + 1

    def opened(self) -> None:
        self.reason, self.failures = "", 0


def gate_of(source: Source) -> Gate:
    """The gate of this source and of those equal to it: a rate limit belongs to the key, not to one search."""
    interval = float(getattr(source, "interval", 0.0))
    try:
        return _shared_gate(cast("Hashable", source), interval)
    except TypeError:  # not hashable
        return Gate(interval)


@lru_cache(maxsize=256)
def _shared_gate(source: Hashable, interval: float) -> Gate:
    return Gate(interval)


@dataclass(slots=True)
class _Flight:
    """A search under way, which the same searches wait for. Without `found` at its end it was cancelled."""

    done: anyio.Event = field(default_factory=anyio.Event)
    found: Found | None = None


class WebSearch:
    """Asks `sources` in order until one answers; the last 256 answers are kept in memory."""

    def __init__(self, sources: Sequence[Source], retry: RetryPolicy | None = None) -> None:
        self._sources = tuple((source, gate_of(source)) for source in sources)
        self._retry = retry or RetryPolicy()
        self._kept: OrderedDict[tuple[str, int], Found] = OrderedDict()
        self._flights: dict[tuple[str, int], _Flight] = {}

    async def search(self, query: str, limit: int) -> Found:
        """Results for `query`, `limit` at most. The same searches at the same time share one request, and one failure.
        Raises nothing but what cancels it."""
        key = (normal_query(query), limit)
        while True:
            if key in self._kept:
                self._kept.move_to_end(key)
                return replace(self._kept[key], cached=True)
            flight = self._flights.get(key)
            if flight is None:
                return await self._lead(key, query)
            await flight.done.wait()
            if flight.found is not None:
                return flight.found

    async def _lead(self, key: tuple[str, int], query: str) -> Found:
        flight = self._flights[key] = _Flight()
        try:
            flight.found = await self._first_answer(clean_line(query, 2000), key[1])
        finally:
            del self._flights[key]
            flight.done.set()
        if flight.found.source:
            self._kept[key] = replace(flight.found, failures=())
            while len(self._kept) > KEPT_ANSWERS:
                self._kept.popitem(last=False)
        return flight.found

    async def _first_answer(self, query: str, limit: int) -> Found:
        failures: list[Failure] = []
        clock = self._retry.clock
        end = clock() + self._retry.total
        for left, (source, gate) in zip(range(len(self._sources), 0, -1), self._sources, strict=True):
            until = clock() + (end - clock()) / left
            patience = self._retry.patience if left > 1 else math.inf
            try:
                hits = await _Asking(source, gate, self._retry, until, patience).search(query, limit)
            except SourceError as error:
                reason, closed = clean_line(str(error), MAX_REASON_CHARS), gate.closed_until - clock()
                failures.append(Failure(source.name, reason, closed if closed > 0 else None))
            else:
                return Found(hits, source.name, tuple(failures))
        return Found(failures=tuple(failures))


@dataclass(frozen=True, slots=True)
class _Asking:
    """One source being asked until the moment `until`, with no wait longer than `patience`."""

    source: Source
    gate: Gate
    retry: RetryPolicy
    until: float
    patience: float

    async def search(self, query: str, limit: int) -> tuple[Hit, ...]:
        """The hits. Raises `SourceError`, and closes the gate where asking again soon won't help."""
        try:
            hits = await self._tries(query, limit)
        except SourceDown as error:
            self._close(str(error), None)
            raise
        except SourceRefused as error:
            self._close(str(error), self.retry.longest_penalty)
            raise
        self.gate.opened()
        return hits

    async def _tries(self, query: str, limit: int) -> tuple[Hit, ...]:
        attempt = 0
        while True:
            attempt += 1
            await self._turn()
            try:
                return await self._once(query, limit)
            except SourceBusy as error:
                self._close(str(error), error.seconds)
                if attempt >= self.retry.tries:
                    raise
            except SourceDown:
                if attempt >= self.retry.tries or not await self._back_off(attempt):
                    raise

    async def _turn(self) -> None:
        """Waits until the source may be asked. Raises `SourceBusy` when that is too far off."""
        while True:
            now = self.retry.clock()
            seconds = max(0.0, self.gate.wait(now))
            if seconds > min(self.until - now, self.patience):
                raise SourceBusy(self.gate.reason or "it is being asked as often as it allows", seconds)
            if self.gate.closed_until > now:
                await self.retry.sleep(seconds)
                continue
            await self.retry.sleep(self.gate.take(now))
            if self.gate.closed_until <= self.retry.clock():  # another search may have been told to wait meanwhile
                return

    async def _once(self, query: str, limit: int) -> tuple[Hit, ...]:
        seconds = min(self.retry.attempt, max(0.0, self.until - self.retry.clock()))
        try:
            with anyio.fail_after(seconds):
                return checked_hits(await self.source.search(query, limit), limit)
        except TimeoutError:
            raise SourceDown(f"no answer within {seconds:.2g} s") from None
        except SourceError:
            raise
        except ThinkloopError as error:
            raise SourceError(str(error)) from error
        except Exception as error:  # a source may be anybody's: whatever breaks it, the next one is asked
            raise SourceError(f"{type(error).__name__}: {error}") from error

    async def _back_off(self, attempt: int) -> bool:
        """Whether there was time to wait before another attempt."""
        seconds = self.retry.backoff * 2.0 ** (attempt - 1) * random.uniform(0.5, 1.0)
        if self.retry.clock() + seconds >= self.until:
            return False
        await self.retry.sleep(seconds)
        return True

    def _close(self, reason: str, seconds: float | None) -> None:
        doubled = min(self.retry.longest_penalty, self.retry.penalty * 2.0 ** min(self.gate.failures, 20))
        self.gate.close(self.retry.clock(), doubled if seconds is None else seconds, reason)


def normal_query(query: str) -> str:
    """The query as answers are kept by: NFKC, without differences of case and white space."""
    return " ".join(unicodedata.normalize("NFKC", query).casefold().split())


def checked_hits(hits: object, limit: int) -> tuple[Hit, ...]:
    """At most `limit` hits, cleaned, each id once. Raises `SourceError` for what isn't a sequence of `Hit`."""
    if not isinstance(hits, Sequence) or not all(isinstance(hit, Hit) for hit in hits):
        raise SourceError("what it gave is not a list of `Hit`")
    found: dict[str, Hit] = {}
    for hit in map(_cleaned, hits):
        if 0 < len(hit.id) <= MAX_ID_CHARS:
            found.setdefault(hit.id, hit)
    return tuple(found.values())[:limit]


def _cleaned(hit: Hit) -> Hit:
    title, text = clean_line(hit.title, MAX_TITLE_CHARS), clean_line(hit.text, MAX_SNIPPET_CHARS)
    return replace(hit, id=clean_line(hit.id, MAX_ID_CHARS + 1), title=title, line=max(0, hit.line), text=text)


def plain(markup: str, most: int) -> str:
    """A snippet as one line of text: without HTML tags, entities resolved."""
    from html import unescape

    return clean_line(unescape(_MARKUP.sub("", markup[: most * 8])), most)


def is_web_url(text: str) -> bool:
    """Whether this is an http or https URL with a host, without user name, white space or control characters."""
    try:
        parts = urlsplit(text)
        host, _ = parts.hostname, parts.port
    except ValueError:
        return False
    return (
        parts.scheme in ("http", "https")
        and bool(host)
        and "@" not in parts.netloc
        and text.isprintable()
        and " " not in text
    )
