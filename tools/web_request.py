"""One request to a search service: JSON back, or a `SourceError` that says what went wrong and never shows a key.

What comes back is not trusted: redirects are not followed (the key would go along), 2 MB and 10 s are the most, gzip is
unpacked within the same 2 MB, and texts from error answers are cleaned and cut.
"""

from __future__ import annotations

import json
import ssl
import zlib
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, cast
from urllib.parse import urlsplit

import anyio
from thinkloop.tools.extract_text import clean_line
from thinkloop.tools.web_search import SourceBusy, SourceDown, SourceError, SourceRefused
from thinkloop.traces.events import Json, ThinkloopError

if TYPE_CHECKING:
    import httpx

MAX_REPLY = 2 << 20
MAX_SECONDS = 10.0
MAX_WAIT = 3600.0
"""Longest `Retry-After` that is believed, in seconds."""
_MESSAGE_CHARS = 150
_MESSAGE_KEYS = ("detail", "message", "msg", "errors", "error")
_HEADERS = {"Accept": "application/json", "Accept-Encoding": "gzip", "User-Agent": "thinkloop"}
_REFUSED = frozenset({401, 402, 403, 432, 433})  # 432, 433: Tavily's plan and pay-as-you-go limits
_DOWN = frozenset({408, 425})


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What to ask, and where. `secret` is blotted out of every message; `hint` says what to check when the service refuses
    its user."""

    method: Literal["GET", "POST"]
    url: str
    params: Mapping[str, str | int] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    body: Json | None = None
    secret: str = field(default="", repr=False)
    hint: str = ""


@dataclass(frozen=True, slots=True)
class Reply:
    """A whole answer; `data` is its JSON, or None when it isn't any."""

    status: int
    headers: Mapping[str, str]
    data: Any


def service_url(url: str, *, keyed: bool) -> str:
    """The base address of a service, without a slash at its end. Raises `ThinkloopError` for what can't be one, or when
    a key (`keyed`) would travel unencrypted to another machine."""
    try:
        parts = urlsplit(url.strip())
        host, _ = parts.hostname or "", parts.port
        host.encode("idna")
    except (ValueError, AttributeError):
        raise ThinkloopError("The address of the search service can't be read. " + _EXAMPLE) from None
    if parts.scheme not in ("http", "https") or not host or parts.query or parts.fragment or not url.isprintable():
        raise ThinkloopError("The address of the search service needs http:// or https:// and a host. " + _EXAMPLE)
    if parts.username is not None or parts.password is not None:
        raise ThinkloopError(f"The address of the search service at {host} holds a user name or password. " + _EXAMPLE)
    if keyed and parts.scheme == "http" and host not in ("localhost", "127.0.0.1", "::1"):
        raise ThinkloopError(f"The key would go to {host} unencrypted: give an address with https://.")
    return url.strip().rstrip("/")


_EXAMPLE = "Give it like https://search.example.com or http://localhost:8080."


async def ask(request: Request) -> Json:
    """The JSON object that the service answers. Raises `SourceError`."""
    return answer(await send(request), request)


def answer(reply: Reply, request: Request) -> Json:
    """The JSON object in a reply. Raises the `SourceError` for its status, or for what isn't an object."""
    if reply.status != 200:
        raise refusal(reply, request)
    if not isinstance(reply.data, dict):
        raise SourceError("what it answered is not a JSON object")
    wrong = {key: reply.data[key] for key in ("error", "errors") if reply.data.get(key)}
    if said := message(wrong, request.secret):
        raise SourceError(f"it answered with an error{said}")
    return reply.data


async def send(request: Request) -> Reply:
    """The reply, whatever its status. Raises `SourceDown` without one, `SourceError` for one that can't be read."""
    import httpx

    try:
        with anyio.fail_after(MAX_SECONDS):
            async with (
                httpx.AsyncClient(timeout=MAX_SECONDS, follow_redirects=False, verify=_tls()) as client,
                client.stream(
                    request.method, request.url, params=request.params or None, json=request.body,
                    headers=_HEADERS | dict(request.headers),
                ) as response,
            ):  # fmt: skip
                body = await _body(response)
                return Reply(response.status_code, response.headers, _json(body))
    except TimeoutError:
        raise SourceDown(f"no answer within {MAX_SECONDS:g} s") from None
    except httpx.TimeoutException:
        raise SourceDown(f"no answer within {MAX_SECONDS:g} s") from None
    except httpx.HTTPError as error:  # its text may show the request
        host = urlsplit(request.url).hostname
        raise SourceDown(f"no whole answer from {host} ({type(error).__name__})") from None


@lru_cache(maxsize=1)
def _tls() -> ssl.SSLContext:
    import httpx

    return httpx.create_ssl_context()  # 20 ms, so once


async def _body(response: httpx.Response) -> bytes:
    encoding = response.headers.get("content-encoding", "").strip().lower()
    if encoding not in ("", "identity", "gzip", "x-gzip"):
        raise SourceError(f"it answered in the encoding {clean_line(encoding, 20)}, which was not asked for")
    gzip = zlib.decompressobj(wbits=31) if encoding.endswith("gzip") else None
    body, received = bytearray(), 0
    async with aclosing(cast("AsyncGenerator[bytes]", response.aiter_raw())) as pieces:
        async for piece in pieces:
            received += len(piece)
            body += _unpacked(gzip, piece, MAX_REPLY + 1 - len(body)) if gzip else piece
            if max(received, len(body)) > MAX_REPLY:
                raise SourceError(f"its answer is larger than {MAX_REPLY >> 20} MB")
    if gzip and not gzip.eof:
        raise SourceDown("its answer was cut off")
    return bytes(body)


def _unpacked(gzip: zlib._Decompress, piece: bytes, most: int) -> bytes:
    try:
        return gzip.decompress(piece, most)
    except zlib.error:
        raise SourceError("its answer is not the gzip that it says it is") from None


def _json(body: bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError):  # some 1,000 levels deep
        return None


def refusal(reply: Reply, request: Request) -> SourceError:
    """The error for a status other than 200."""
    said = f"status {reply.status}{message(reply.data, request.secret)}"
    wait = retry_after(reply.headers)
    if reply.status == 429 or (reply.status == 503 and wait is not None):
        return SourceBusy(f"it asks for fewer requests ({said})", wait)
    if 300 <= reply.status < 400:
        return SourceError(f"it redirects elsewhere ({said}), which is not followed: its own address must be set")
    if reply.status in _REFUSED:
        return SourceRefused(f"it refuses the request ({said}){request.hint and '; ' + request.hint}")
    return (SourceDown if reply.status >= 500 or reply.status in _DOWN else SourceError)(f"it answered with {said}")


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds from a `Retry-After` header (a number or a date), 0 to 3,600; None when it has none."""
    from email.utils import parsedate_to_datetime

    text = headers.get("retry-after", "").strip()
    if text.isascii() and text.replace(".", "", 1).isdigit():
        return min(float(text[:20]), MAX_WAIT)
    try:
        date = parsedate_to_datetime(text)
    except (ValueError, TypeError, OverflowError):
        return None
    seconds = (date if date.tzinfo else date.replace(tzinfo=UTC)) - datetime.now(UTC)
    return min(max(0.0, seconds.total_seconds()), MAX_WAIT)


def message(data: Any, secret: str = "") -> str:
    """`: what the service says was wrong`, from the forms that services use; empty when it says nothing."""
    for _ in range(5):
        if isinstance(data, list) and data:
            data = data[0]
        elif isinstance(data, dict):
            data = next((data[key] for key in _MESSAGE_KEYS if data.get(key)), None)
    if not isinstance(data, str):
        return ""
    return ": " + clean_line(data.replace(secret, "[key]") if secret else data, _MESSAGE_CHARS)
