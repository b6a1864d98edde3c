"""Pages without a browser: GET and JSON POST through the proxy, bounded in size, time, redirects and kinds of content."""

from __future__ import annotations

import hashlib
import ssl
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urljoin

import anyio
from thinkloop.tools.addresses import AddressError, Place, Policy, Resolver, parse_url, system_resolver
from thinkloop.tools.extract_kind import content_type
from thinkloop.tools.fetch_body import TEXT_LIKE, accepts, read_body, short_text
from thinkloop.tools.proxy import Exchange, Proxy
from thinkloop.tools.tool import ToolError
from thinkloop.traces.events import Json

if TYPE_CHECKING:
    import httpx

__all__ = ["Fetched", "Fetcher", "StatusError"]

_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_AGENT = "Mozilla/5.0 (compatible; thinkloop)"
_CACHE_SECONDS = 300.0
_CACHE_BYTES = 50_000_000
_ERROR_BODY = 65_536  # bytes read of a page that comes with an error


class StatusError(ToolError):
    """The server answered with an error: `status`, and `retry_after` seconds if it said so."""

    def __init__(self, message: str, status: int, retry_after: float | None) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after = retry_after


@dataclass(frozen=True, slots=True)
class Fetched:
    """A response: `url` as asked, `final_url` after `redirects` (the URLs gone to, the final one last).

    `media_type` is "" if the server named none; `charset` "" if it named none that is known. `body` is decompressed, and
    `truncated` when there was more.
    """

    url: str
    final_url: str
    status: int
    media_type: str
    charset: str
    body: bytes
    truncated: bool
    redirects: tuple[str, ...]
    seconds: float


@dataclass(frozen=True, slots=True)
class _Question:
    """What is asked, and what of the answer is wanted."""

    headers: Mapping[str, str]
    accept: tuple[str, ...]


class Fetcher:
    """Fetches through its own proxy: public hosts only, and those that `policy` allows.

        async with Fetcher() as fetcher:
            page = await fetcher.get("https://example.org/")

    `max_bytes` bounds a body after decompression (more is cut, `truncated` says so), `timeout` the seconds of a whole
    fetch with its redirects. Up to `cache` pages are kept for five minutes. Cookies last for one fetch with its redirects;
    nothing is read from the environment but `SSL_CERT_FILE`. Every error is a `ToolError` with a sentence for the model.
    """

    def __init__(
        self,
        policy: Policy = Policy(),  # noqa: B008 - frozen
        *,
        max_bytes: int = 10_000_000,
        timeout: float = 20.0,
        max_redirects: int = 10,
        cache: int = 64,
        resolver: Resolver = system_resolver,
        on_exchange: Callable[[Exchange], None] | None = None,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        self._max_bytes = max_bytes
        self._timeout = timeout
        self._max_redirects = max_redirects
        self._cache = _Cache(cache)
        self._ssl_context = ssl_context
        self.proxy = Proxy(
            policy,
            max_bytes=2 * max_bytes + 1_000_000,  # so that the fetcher's own, exact bound is met first
            timeout=timeout,
            max_seconds=timeout + 5,
            on_exchange=on_exchange,
            resolver=resolver,
        )

    async def __aenter__(self) -> Fetcher:
        import httpx

        self._ssl_context = self._ssl_context or httpx.create_ssl_context()
        await self.proxy.__aenter__()
        return self

    async def __aexit__(self, *exc: Any) -> None:
        await self.proxy.__aexit__(*exc)

    async def get(
        self, url: str, *, headers: Mapping[str, str] | None = None, accept: tuple[str, ...] = TEXT_LIKE
    ) -> Fetched:
        """The page at a URL. `accept` are the media types wanted, as patterns; `headers` go to the first origin only.

        Raises `AddressError` for what may not be reached, `StatusError` for a status of 400 and up, and `ToolError` for
        all else: not found, no answer in time, an untrusted certificate, too many redirects, another media type.
        """
        key = None if headers else (url, accept)
        if key and (kept := self._cache.get(key)):
            return kept
        wanted = ", ".join(accept) if len(accept) < 4 else "text/html, text/*;q=0.9, */*;q=0.5"
        question = _Question({"Accept": wanted, **(headers or {})}, accept)
        fetched, storable = await self._fetch(url, question)
        if key and storable:
            self._cache.put(key, fetched)
        return fetched

    def record(self, fetched: Fetched) -> Json:
        """The facts of a fetch, for the trace."""
        return {
            "url": fetched.url,
            "final_url": fetched.final_url,
            "redirects": list(fetched.redirects),
            "status": fetched.status,
            "media_type": fetched.media_type,
            "bytes": len(fetched.body),
            "truncated": fetched.truncated,
            "sha256": hashlib.sha256(fetched.body).hexdigest(),
        }

    async def _fetch(self, url: str, question: _Question) -> tuple[Fetched, bool]:
        started = time.monotonic()
        try:
            with anyio.fail_after(self._timeout):
                async with self._transport() as transport:
                    return await self._follow(transport, url, question, started)
        except TimeoutError:
            raise ToolError(f"{_shown(url)} did not answer in full within {self._timeout:g} s.") from None

    def _transport(self) -> httpx.AsyncHTTPTransport:
        # One per fetch (the TLS context is shared), so no connection of one page serves another; and the transport
        # itself, because httpx's client reads `Location` even where it doesn't follow it.
        import httpx

        return httpx.AsyncHTTPTransport(
            proxy=httpx.Proxy(self.proxy.url), verify=self._ssl_context or True, trust_env=False
        )

    async def _follow(
        self, transport: httpx.AsyncHTTPTransport, url: str, question: _Question, started: float
    ) -> tuple[Fetched, bool]:
        import httpx

        place = parse_url(url)
        origin, cookies = place.origin, httpx.Cookies()
        hops: list[str] = []
        while True:
            request = self._request(place, question, place.origin == origin)
            cookies.set_cookie_header(request)
            async with _answer(transport, request) as response:
                if response.status_code not in _REDIRECTS or "location" not in response.headers:
                    return await self._read(response, url, place, question, tuple(hops), started)
                cookies.extract_cookies(response)
                target = _target(place.url, response.headers["location"])
            self._check_redirect(place.url, hops)
            place = parse_url(target)
            hops.append(place.url)

    def _request(self, place: Place, question: _Question, is_origin: bool) -> httpx.Request:
        import httpx

        headers = {"User-Agent": _AGENT, "Accept-Encoding": "gzip, deflate", "Accept": question.headers["Accept"]}
        sent = {**headers, **(question.headers if is_origin else {})}
        extensions = {"timeout": httpx.Timeout(self._timeout).as_dict()}
        try:
            return httpx.Request("GET", place.url, headers=sent, extensions=extensions)
        except (httpx.InvalidURL, ValueError, TypeError) as error:
            raise ToolError(f"{_shown(place.url)} can't be asked for: {error}.") from error

    def _check_redirect(self, source: str, hops: list[str]) -> None:
        if len(hops) < self._max_redirects:
            return
        if len(set(hops)) < len(hops):
            raise ToolError(f"{_shown(source)} redirects in a loop.")
        raise ToolError(f"{_shown(hops[0])} leads on through more than {self._max_redirects} redirects.")

    async def _read(
        self,
        response: httpx.Response,
        url: str,
        place: Place,
        question: _Question,
        hops: tuple[str, ...],
        started: float,
    ) -> tuple[Fetched, bool]:
        status = response.status_code
        media_type, charset = content_type(response.headers.get("content-type", ""))
        if status >= 400:
            raise await _status_error(response, place, media_type, charset)
        if media_type and not accepts(question.accept, media_type):
            raise ToolError(f"{_shown(place.url)} is {media_type}, a download, not a page to read. It was not fetched.")
        body, truncated = await read_body(response, self._max_bytes)
        if not media_type and b"\0" in body[:4096]:
            raise ToolError(f"{_shown(place.url)} is binary data without a media type, not a page to read.")
        seconds = time.monotonic() - started
        fetched = Fetched(url, place.url, status, media_type, charset, body, truncated, hops, seconds)
        return fetched, "no-store" not in response.headers.get("cache-control", "").lower()


@asynccontextmanager
async def _answer(transport: httpx.AsyncHTTPTransport, request: httpx.Request) -> AsyncIterator[httpx.Response]:
    """One request, its body not yet read. What httpx and the proxy raise becomes a sentence."""
    import httpx

    url = str(request.url)
    try:
        response = await transport.handle_async_request(request)
        response.request = request
        try:
            if request.url.scheme == "http" and response.headers.get("proxy-status", "").startswith("thinkloop"):
                reason = short_text(await response.aread(), "utf-8", 600)
                raise (AddressError if response.status_code == 403 else ToolError)(reason)
            yield response
        finally:
            await response.aclose()
    except httpx.ProxyError as error:
        status, _, reason = str(error).partition(" ")
        raise (AddressError if status == "403" else ToolError)(reason or f"{_shown(url)} was refused.") from error
    except httpx.TimeoutException as error:
        raise ToolError(f"{_shown(url)} did not answer in time.") from error
    except httpx.ConnectError as error:
        raise ToolError(f"{_shown(url)} can't be reached: {_tls(str(error))}.") from error
    except httpx.HTTPError as error:
        raise ToolError(f"{_shown(url)} gave no proper answer: {error or type(error).__name__}.") from error


async def _status_error(response: httpx.Response, place: Place, media_type: str, charset: str) -> StatusError:
    status = response.status_code
    said = await _error_text(response, charset) if accepts(TEXT_LIKE, media_type) else ""
    message = f"{_shown(place.url)} answered {status} {response.reason_phrase[:60]}".rstrip()
    wait = response.headers.get("retry-after", "")
    seconds = float(wait) if wait.isascii() and wait.isdigit() and len(wait) < 7 else None
    return StatusError(f"{message}: {said}" if said else f"{message}.", status, seconds)


async def _error_text(response: httpx.Response, charset: str) -> str:
    try:
        body, _ = await read_body(response, _ERROR_BODY)
    except ToolError:
        return ""
    return short_text(body, charset)


def _target(source: str, location: str) -> str:
    """Where a redirect leads. Raw spaces and letters beyond ASCII are common in the wild; the rest `parse_url` judges."""
    try:
        text = location.encode("latin-1").decode("utf-8")
    except UnicodeError:
        text = location
    try:
        return urljoin(source, text.strip().replace(" ", "%20"))
    except ValueError:
        raise AddressError(f"{_shown(source)} redirects to {_shown(text)}, which is no URL.") from None


def _tls(said: str) -> str:
    """OpenSSL's words without its code and source line: `[SSL: X] certificate verify failed: … (_ssl.c:1006)`."""
    return said.partition("] ")[2].partition(" (_ssl.c")[0] if said.startswith("[SSL") else said


def _shown(url: str) -> str:
    return url if len(url) <= 200 and url.isprintable() else ascii(url[:199] + "…")


class _Cache:
    """The pages used last, up to a number and 50 MB, for five minutes."""

    def __init__(self, entries: int) -> None:
        self._entries = entries
        self._kept: OrderedDict[tuple[str, tuple[str, ...]], tuple[float, Fetched]] = OrderedDict()

    def get(self, key: tuple[str, tuple[str, ...]]) -> Fetched | None:
        when, fetched = self._kept.get(key, (0.0, None))
        if fetched is None or time.monotonic() - when > _CACHE_SECONDS:
            return None
        self._kept.move_to_end(key)
        return fetched

    def put(self, key: tuple[str, tuple[str, ...]], fetched: Fetched) -> None:
        self._kept.pop(key, None)
        self._kept[key] = (time.monotonic(), fetched)
        while len(self._kept) > self._entries or sum(len(page.body) for _, page in self._kept.values()) > _CACHE_BYTES:
            self._kept.popitem(last=False)
