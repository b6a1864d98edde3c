"""Search services on the web: SearXNG, Brave, Tavily and Serper, each a small value that holds no connection.

Keys come from the environment unless given. They are sent to the service alone; no message, record or repr shows them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, InitVar, dataclass, field
from typing import Any, ClassVar

from thinkloop.tools.corpus import Hit
from thinkloop.tools.web_request import MAX_WAIT, Reply, Request, answer, ask, message, refusal, send, service_url
from thinkloop.tools.web_search import (
    MAX_SNIPPET_CHARS,
    MAX_TITLE_CHARS,
    SourceBusy,
    SourceError,
    SourceRefused,
    is_web_url,
    plain,
)
from thinkloop.traces.events import Json, ThinkloopError

MAX_QUERY_CHARS = 400
"""What Brave and Tavily take."""
MAX_QUERY_WORDS = 50
"""What Brave takes."""


@dataclass(frozen=True, slots=True)
class SearXNG:
    """A SearXNG server at `url`, on a private host too; its settings must list `json` under `search.formats`.

    `engines` and `language` as the server names them; empty: its own choice. `interval` is the least time between
    requests in seconds, here and below.
    """

    url: str
    _: KW_ONLY
    engines: Sequence[str] = ()
    language: str = ""
    interval: float = 0.0
    name: ClassVar[str] = "searxng"

    def __post_init__(self) -> None:
        _set(self, "url", service_url(self.url, keyed=False).removesuffix("/search"))
        _set(self, "engines", (self.engines,) if isinstance(self.engines, str) else tuple(self.engines))

    async def search(self, query: str, limit: int) -> list[Hit]:
        """One page of results. Raises `SourceError`, also when there are none because engines did not answer."""
        choice = {"engines": ",".join(self.engines), "language": self.language}
        params = {"q": query, "format": "json"} | {key: value for key, value in choice.items() if value}
        hint = "its settings.yml must list `json` under search.formats"
        data = await ask(Request(method="GET", url=f"{self.url}/search", params=params, hint=hint))
        found = _hits(_rows(data, "results"), "url", "title", "content")
        silent = data.get("unresponsive_engines")
        if not found and isinstance(silent, list) and silent:
            raise SourceError(f"its engines did not answer: {_engines(silent)}")
        return found[:limit]


@dataclass(frozen=True, slots=True)
class Brave:
    """The Brave Search API, with the key in `BRAVE_API_KEY`. The free plan takes one request a second."""

    key: InitVar[str | None] = None
    _: KW_ONLY
    base_url: str = "https://api.search.brave.com"
    interval: float = 1.0
    _key: str = field(init=False, repr=False, default="")
    name: ClassVar[str] = "brave"

    def __post_init__(self, key: str | None) -> None:
        _set(self, "base_url", service_url(self.base_url, keyed=True))
        _set(self, "_key", api_key(key, "BRAVE_API_KEY"))

    async def search(self, query: str, limit: int) -> list[Hit]:
        """At most 20 results. Raises `SourceError`."""
        request = Request(
            method="GET", url=f"{self.base_url}/res/v1/web/search", headers={"X-Subscription-Token": self._key},
            params={"q": _short(query), "count": min(limit, 20), "text_decorations": "false"},
            secret=self._key, hint="check BRAVE_API_KEY",
        )  # fmt: skip
        reply = await send(request)
        if reply.status != 200:
            raise _brave_refusal(reply, request)
        data = answer(reply, request)
        if data.get("type") == "search" and "web" not in data:  # how it says that there is nothing
            return []
        return _hits(_rows(data, "web", "results"), "url", "title", "description")[:limit]


@dataclass(frozen=True, slots=True)
class Tavily:
    """The Tavily search API, with the key in `TAVILY_API_KEY`. Development keys take 100 requests a minute."""

    key: InitVar[str | None] = None
    _: KW_ONLY
    base_url: str = "https://api.tavily.com"
    interval: float = 0.6
    _key: str = field(init=False, repr=False, default="")
    name: ClassVar[str] = "tavily"

    def __post_init__(self, key: str | None) -> None:
        _set(self, "base_url", service_url(self.base_url, keyed=True))
        _set(self, "_key", api_key(key, "TAVILY_API_KEY"))

    async def search(self, query: str, limit: int) -> list[Hit]:
        """At most 20 results. Raises `SourceError`."""
        data = await ask(Request(
            method="POST", url=f"{self.base_url}/search", headers={"Authorization": f"Bearer {self._key}"},
            body={"query": _short(query), "max_results": min(limit, 20)},
            secret=self._key, hint="check TAVILY_API_KEY",
        ))  # fmt: skip
        return _hits(_rows(data, "results"), "url", "title", "content")[:limit]


@dataclass(frozen=True, slots=True)
class Serper:
    """Google results by way of serper.dev, with the key in `SERPER_API_KEY`."""

    key: InitVar[str | None] = None
    _: KW_ONLY
    base_url: str = "https://google.serper.dev"
    interval: float = 0.0
    _key: str = field(init=False, repr=False, default="")
    name: ClassVar[str] = "serper"

    def __post_init__(self, key: str | None) -> None:
        _set(self, "base_url", service_url(self.base_url, keyed=True))
        _set(self, "_key", api_key(key, "SERPER_API_KEY"))

    async def search(self, query: str, limit: int) -> list[Hit]:
        """At most 100 results. Raises `SourceError`."""
        request = Request(
            method="POST", url=f"{self.base_url}/search", headers={"X-API-KEY": self._key},
            body={"q": query, "num": min(limit, 100)}, secret=self._key, hint="check SERPER_API_KEY",
        )  # fmt: skip
        reply = await send(request)
        if reply.status == 400 and "credits" in message(reply.data):
            raise SourceRefused(f"{refusal(reply, request)}; {request.hint}")
        data = answer(reply, request)
        return _hits(_rows(data, "organic"), "link", "title", "snippet")[:limit]


def api_key(key: str | None, variable: str) -> str:
    """The key as given, else from the environment. Raises `ThinkloopError`, key not shown, for none or a broken one."""
    found = (os.environ.get(variable, "") if key is None else key).strip()
    if not found:
        raise ThinkloopError(f"There is no key for this search service: set {variable} in the environment.")
    if not found.isascii() or not found.isprintable() or " " in found:
        raise ThinkloopError(
            f"The key in {variable} holds characters that no key has (spaces, line breaks or non-ASCII): set it again."
        )
    return found


def _set(value: object, name: str, to: object) -> None:
    object.__setattr__(value, name, to)


def _short(query: str) -> str:
    if len(query) > MAX_QUERY_CHARS or len(query.split()) > MAX_QUERY_WORDS:
        raise SourceError(
            f"the query has {len(query)} characters and {len(query.split())} words, and it takes {MAX_QUERY_CHARS} and "
            f"{MAX_QUERY_WORDS}: search with fewer words"
        )
    return query


def _rows(data: Json, *path: str) -> list[Any]:
    found: Any = data
    for name in path:
        found = found.get(name) if isinstance(found, dict) else None
    if not isinstance(found, list):
        raise SourceError(f"its answer has no list `{'.'.join(path)}`")
    return found


def _hits(rows: list[Any], url: str, title: str, text: str) -> list[Hit]:
    usable = [row for row in rows if isinstance(row, dict) and isinstance(row.get(url), str)]
    if rows and not usable:
        raise SourceError("its results have another form than they should")
    return [
        Hit(row[url], plain(_text(row, title), MAX_TITLE_CHARS), 0, plain(_text(row, text), MAX_SNIPPET_CHARS))
        for row in usable
        if is_web_url(row[url])
    ]


def _text(row: Json, name: str) -> str:
    value = row.get(name)
    return value if isinstance(value, str) else ""


def _engines(silent: list[Any]) -> str:
    pairs = [row for row in silent if isinstance(row, list)]
    return ", ".join(": ".join(str(part) for part in pair[:2]) for pair in pairs[:5]) or "it names none"


def _brave_refusal(reply: Reply, request: Request) -> SourceError:
    """Brave says with 422 that a key is wrong, and with headers of its own how long to wait."""
    error = refusal(reply, request)
    match reply.data:
        case {"error": {"code": str(code)}} if code.startswith("SUBSCRIPTION_TOKEN"):
            return SourceRefused(f"{error}; {request.hint}")
    if isinstance(error, SourceBusy) and error.seconds is None:
        return SourceBusy(str(error), _brave_wait(reply.headers))
    return error


def _brave_wait(headers: Mapping[str, str]) -> float | None:
    """Seconds until the used-up windows (`X-RateLimit-Remaining: 0, 1000`) begin anew (`X-RateLimit-Reset: 1, 14197`)."""
    windows = [headers.get(f"x-ratelimit-{name}", "").split(",") for name in ("remaining", "reset")]
    waits = [
        int(reset)
        for left, reset in zip(*windows, strict=False)
        if left.strip() == "0" and reset.strip().isdecimal() and len(reset) < 12
    ]
    return min(float(max(waits)), MAX_WAIT) if waits else None
