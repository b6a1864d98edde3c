"""The HTTP client that MCP's streamable HTTP runs on: through our proxy, with bounded bodies and no silent failures.

Imported only once a server at a URL is entered: httpx2 comes with the `mcp` extra and takes 0.2 s.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import httpx2
from thinkloop.tools.mcp_messages import MAX_VALUES, Fault, Rate, marks_in
from thinkloop.tools.mcp_process import MAX_LINE
from thinkloop.tools.proxy import Exchange

_CONNECT_SECONDS = 10.0
MAX_STREAMS = 20
MAX_MARKS = 10 * MAX_VALUES
"""As `MAX_VALUES`, but with those within texts, which can't be told apart in a body that comes in pieces."""


@dataclass(slots=True)
class Seen:
    """What the client met: the last problem in words; `refuse` cuts off whatever is still coming."""

    fault: Fault
    problem: str = ""
    refuse: bool = False
    marks: Rate = field(default_factory=partial(Rate, 20 * MAX_MARKS, 10))
    _streams: Rate = field(default_factory=partial(Rate, MAX_STREAMS, 1))

    def stream_asked(self) -> None:
        """The SDK asked for an event stream; a server may end one and have it asked for again, without end."""
        if self._streams.exceeded():
            self.end(f"it ended more than {MAX_STREAMS} event streams in a second")

    def exchange(self, exchange: Exchange) -> None:
        """From the proxy: what never got to the server means that it is gone."""
        if exchange.refused and not exchange.address and not self.refuse:
            self.end(f"it can't be reached: {exchange.refused.rstrip('.')}")

    def end(self, problem: str) -> None:
        """The server broke a bound: nothing more is taken from it."""
        self.problem, self.refuse = problem, True
        self.fault(problem)


def http_client(proxy: str, headers: Mapping[str, str], seen: Seen) -> httpx2.AsyncClient:
    """An httpx2 client whose requests all go through `proxy` and whose bodies are bounded.

    No read timeout: the deadline round each call is ours, and an idle event stream is no fault.
    """
    inner = httpx2.AsyncHTTPTransport(proxy=proxy, trust_env=False)
    return httpx2.AsyncClient(
        transport=_Bounded(inner, seen), headers={**headers, "Accept-Encoding": "identity"}, trust_env=False,
        follow_redirects=False, timeout=httpx2.Timeout(_CONNECT_SECONDS, read=None),
    )  # fmt: skip


class _Bounded(httpx2.AsyncBaseTransport):
    def __init__(self, inner: httpx2.AsyncHTTPTransport, seen: Seen) -> None:
        self._inner, self._seen = inner, seen

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        if request.method == "GET":
            self._seen.stream_asked()
        if self._seen.refuse:
            raise httpx2.ConnectError(self._seen.problem, request=request)
        try:
            response = await self._inner.handle_async_request(request)
        except httpx2.TransportError as error:
            self._seen.problem = f"{type(error).__name__}: {str(error)[:300]}"
            raise
        _note_status(response.status_code, self._seen)
        if response.headers.get("content-encoding", "identity").lower() != "identity":
            await response.aclose()
            self._seen.end("it sent a compressed body, unasked")
            raise httpx2.DecodingError("compressed, unasked", request=request)
        response.stream = _BoundedBody(response.stream, _is_events(response), self._seen)
        return response

    async def aclose(self) -> None:
        await self._inner.aclose()


def _note_status(status: int, seen: Seen) -> None:
    if seen.refuse:
        return  # the proxy has said it better
    if status in (401, 403):
        seen.problem = f"HTTP {status}: it wants credentials; give them in `headers`, such as Authorization"
    elif status >= 300 and status != 405:  # 405: no event stream of its own, which is allowed
        seen.problem = f"HTTP {status}"


def _is_events(response: httpx2.Response) -> bool:
    kind = response.headers.get("content-type", "").lower()
    return response.status_code == 200 and kind.startswith("text/event-stream")


class _BoundedBody(httpx2.AsyncByteStream):
    """A response's bytes, ended once one message has too many of them or too many values."""

    def __init__(self, inner: Any, events: bool, seen: Seen) -> None:
        self._inner, self._events, self._seen = inner, events, seen
        self._bytes = self._values = 0

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for chunk in self._inner:
            self._count(chunk)
            if self._seen.refuse:
                raise httpx2.ReadError(self._seen.problem or "cut off")
            yield chunk

    def _count(self, chunk: bytes) -> None:
        if self._events and (b"\n\n" in chunk or b"\r\n\r\n" in chunk):
            self._bytes = self._values = 0  # a new event has begun, somewhere in here
        self._bytes += len(chunk)
        self._values += (marks := marks_in(chunk))
        if self._bytes > MAX_LINE or self._values > MAX_MARKS:
            self._seen.end(f"it sent a message of more than {MAX_LINE >> 20} MB or {MAX_MARKS:,} values")
        elif self._seen.marks.exceeded(marks):
            self._seen.end(f"it sent more than {20 * MAX_MARKS:,} values in 10 s")

    async def aclose(self) -> None:
        await self._inner.aclose()
