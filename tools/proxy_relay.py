"""One request through the proxy, from its first byte to the last of the answer, within limits all the way."""

from __future__ import annotations

import time
from base64 import b64encode
from collections.abc import Callable, Coroutine
from hmac import compare_digest
from typing import Any

import anyio
import h11
from anyio.lowlevel import checkpoint
from thinkloop.tools.addresses import AddressError, Place, authority, parse_url, split_authority
from thinkloop.tools.proxy_headers import bracketed, check_lengths, for_client, for_server, values
from thinkloop.tools.proxy_rules import Exchange, Refusal, Rules
from thinkloop.tools.proxy_wire import Wire, connect

__all__ = ["Relay", "credentials"]

_MAX_HEAD = 65_536  # bytes of a request or response head, and of one chunk's header
_EVENTS = 100  # parsed before others get a turn: reads and writes don't wait while there is data and room (25 µs each)
_FRAMING = 100_000  # bytes from a server, beyond its content, that pass; and then twice the content (1-byte chunks: 5)
_METHODS = frozenset({b"GET", b"HEAD", b"POST", b"PUT", b"PATCH", b"DELETE", b"OPTIONS"})
_TLS_HANDSHAKE = b"\x16\x03"
_Part = Callable[[], Coroutine[Any, Any, None]]


class Relay:
    """Serves one request of a client, then closes. Without `secret` (what `credentials` gives) anyone may ask."""

    def __init__(self, client: Wire, rules: Rules, secret: bytes | None) -> None:
        self._client = client
        self._rules = rules
        self._secret = secret
        self._parser = h11.Connection(h11.SERVER, max_incomplete_event_size=_MAX_HEAD)
        self._server: Wire | None = None
        self._idle = anyio.CancelScope()
        self._heard = False
        self._answered = False
        self._method, self._asked, self._address, self._refused = "", "", "", ""
        self._status = self._bytes = self._content = self._parsed = 0

    async def run(self, record: Callable[[Exchange], None]) -> None:
        """Serves; `record` hears what happened before a client can see the end of a refusal."""
        started = time.monotonic()
        try:
            refusal = await self._outcome()
            if self._heard and not (refusal and refusal.quiet):
                record(self._exchange(time.monotonic() - started))
            await self._farewell(refusal)
        finally:
            self._client.abort()
            if self._server:
                self._server.abort()

    async def _outcome(self) -> Refusal | None:
        try:
            await self._serve_in_time()
        except Refusal as refusal:
            self._refused = str(refusal)
            self._status = self._status if self._answered else refusal.status
            return refusal
        except OSError:
            self._refused = "The connection was lost."
        return None

    def _exchange(self, seconds: float) -> Exchange:
        return Exchange(self._method, self._asked, self._address, self._status, self._bytes, seconds, self._refused)

    async def _serve_in_time(self) -> None:
        with anyio.move_on_after(self._rules.max_seconds) as whole, self._idle:
            self._progress()
            await self._serve()
        if whole.cancelled_caught:
            raise Refusal(504, f"Cut after {self._rules.max_seconds:g} s.")
        if self._idle.cancelled_caught:
            raise Refusal(504, f"Nothing came for {self._rules.timeout:g} s.")

    async def _serve(self) -> None:
        request = await self._head()
        if request is None:
            return
        self._progress()
        self._method = request.method.decode("ascii")
        target = bracketed(request.target.decode("latin-1"), request.headers)
        self._asked = target.encode("ascii", "replace").decode("ascii")[:2000]
        self._authorise(request)
        check_lengths(request.headers, 400)
        if request.method == b"CONNECT":
            await self._tunnel(request)
        elif request.method in _METHODS:
            await self._forward(request, target)
        else:
            raise Refusal(403, f"The method {self._method[:20]} is refused.")

    async def _head(self) -> h11.Request | None:
        # No progress is noted here: a head that trickles in has `timeout` seconds in all.
        event = await self._next(self._parser, self._client)
        return event if isinstance(event, h11.Request) else None

    def _authorise(self, request: h11.Request) -> None:
        if self._secret is None:
            return
        given = b"".join(value for name, value in request.headers if name == b"proxy-authorization")
        if not compare_digest(given, self._secret):
            raise Refusal(407, "This proxy serves only the program that started it.", quiet=True)

    # Plain http

    async def _forward(self, request: h11.Request, target: str) -> None:
        place = self._place(target)
        if b"websocket" in values(request.headers, b"upgrade"):
            raise Refusal(403, "WebSockets are refused.")
        addresses = await self._rules.addresses(place.host, place.port, tunnel=False)
        server = await self._connect(addresses, place.port)
        parser = h11.Connection(h11.CLIENT, max_incomplete_event_size=_MAX_HEAD)
        headers = for_server(request.headers.raw_items(), place.netloc)
        await self._send(parser, server, h11.Request(method=request.method, target=place.path, headers=headers))
        await _side_by_side(lambda: self._download(parser, server), lambda: self._upload(parser, server))

    def _place(self, target: str) -> Place:
        try:
            place = parse_url(target)
        except AddressError as error:
            raise Refusal(403, str(error)) from error
        if place.scheme != "http":
            raise Refusal(403, "https goes through CONNECT.")
        return place

    async def _upload(self, parser: h11.Connection, server: Wire) -> None:
        if self._parser.they_are_waiting_for_100_continue:
            await self._send(self._parser, self._client, h11.InformationalResponse(status_code=100, headers=[]))
        sent = 0
        while not isinstance(event := await self._next(self._parser, self._client), h11.EndOfMessage):
            if not isinstance(event, h11.Data):
                raise ConnectionAbortedError
            sent += len(event.data)
            if sent > self._rules.max_bytes:
                raise Refusal(403, f"The request has more than {self._rules.max_bytes} bytes.")
            if not await self._accepted(parser, server, h11.Data(data=event.data)):
                return
        await self._accepted(parser, server, h11.EndOfMessage())
        if not await self._client.receive():
            raise ConnectionAbortedError  # gone; what else it sends is a second request, which nobody reads

    async def _accepted(self, parser: h11.Connection, server: Wire, event: h11.Event) -> bool:
        try:
            await self._send(parser, server, event)
        except OSError:
            return False  # it has heard enough, and its answer is on the way
        self._progress()
        return True

    async def _download(self, parser: h11.Connection, server: Wire) -> None:
        body = bytearray()  # the content of one read, sent as one: a chunk of the server may be a single byte
        while not isinstance(event := await self._parse(parser, server), h11.EndOfMessage):
            if isinstance(event, h11.Data):
                body += event.data
                continue
            await self._send_content(body)
            if event is h11.NEED_DATA:
                self._check_framing()
                await self._receive(parser, server)
            elif isinstance(event, h11.Response):
                await self._send(self._parser, self._client, self._answer(event))
            elif not isinstance(event, h11.InformationalResponse):
                raise Refusal(502, "The server closed the connection without an answer.")
        await self._send_content(body)
        await self._send(self._parser, self._client, h11.EndOfMessage())

    def _answer(self, event: h11.Response) -> h11.Response:
        check_lengths(event.headers, 502)
        self._status, self._answered = event.status_code, True
        headers = for_client(event.headers.raw_items())
        return h11.Response(status_code=event.status_code, reason=event.reason, headers=headers)

    async def _send_content(self, body: bytearray) -> None:
        if body:
            self._content += len(body)
            await self._send(self._parser, self._client, h11.Data(data=bytes(body)))
            body.clear()

    def _check_framing(self) -> None:
        if self._bytes - self._content > _FRAMING + 2 * self._content:
            raise Refusal(502, f"Cut: {self._bytes} bytes of the server's answer held {self._content} of content.")

    async def _next(self, parser: h11.Connection, source: Wire) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        """The next event; never `NEED_DATA`, which the type of h11 can't say."""
        while (event := await self._parse(parser, source)) is h11.NEED_DATA:
            await self._receive(parser, source)
        return event

    async def _parse(self, parser: h11.Connection, source: Wire) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        self._parsed += 1
        if self._parsed % _EVENTS == 0:
            await checkpoint()
        try:
            return parser.next_event()
        except h11.RemoteProtocolError as error:
            if source is self._server:
                raise Refusal(502, f"The server's answer is malformed or cut short: {error}.") from error
            raise Refusal(error.error_status_hint, f"The request is malformed: {error}.") from error

    async def _receive(self, parser: h11.Connection, source: Wire) -> None:
        try:
            data = await source.receive()
        except OSError as error:
            if source is self._server:
                raise Refusal(502, f"The server cut the connection: {error.strerror or error}.") from error
            raise
        if source is self._server:
            self._count(data)
        elif data:
            self._heard = True
        parser.receive_data(data)

    async def _send(self, parser: h11.Connection, sink: Wire, event: h11.Event) -> None:
        try:
            data = parser.send(event)
        except h11.LocalProtocolError as error:
            raise Refusal(502, f"The message can't be passed on: {error}.") from error
        await sink.send(data or b"")

    # Tunnels

    async def _tunnel(self, request: h11.Request) -> None:
        if values(request.headers, b"content-length") or values(request.headers, b"transfer-encoding"):
            raise Refusal(400, "CONNECT has no body.")
        try:
            host, port = split_authority(self._asked, 0)
        except AddressError as error:
            raise Refusal(403, str(error)) from error
        server = await self._connect(await self._rules.addresses(host, port, tunnel=True), port)
        await self._client.send(b"HTTP/1.1 200 Connection established\r\n\r\n")
        self._status, self._answered = 200, True
        first = self._parser.trailing_data[0]
        while len(first) < 2 and (more := await self._client.receive()):
            first += more
        if not _TLS_HANDSHAKE.startswith(first[:2]):
            raise Refusal(403, f"The tunnel to {authority(host, port)} was cut: it carried something else than TLS.")
        self._count(first)
        await server.send(first)
        await _side_by_side(lambda: self._pump(server, self._client), lambda: self._pump(self._client, server))

    async def _pump(self, source: Wire, sink: Wire) -> None:
        while data := await source.receive():
            self._count(data)
            await sink.send(data)
            self._progress()
        sink.end()

    # Both

    async def _connect(self, addresses: list[str], port: int) -> Wire:
        self._progress()
        try:
            self._address, self._server = await connect(addresses, port, self._rules.timeout)
        except OSError as error:
            status = 504 if isinstance(error, TimeoutError) else 502
            reason = error.strerror or str(error) or "no answer"
            raise Refusal(status, f"Can't connect to {authority(addresses[0], port)}: {reason}.") from error
        self._progress()
        return self._server

    def _progress(self) -> None:
        self._idle.deadline = anyio.current_time() + self._rules.timeout

    def _count(self, data: bytes) -> None:
        self._bytes += len(data)
        self._progress()
        if self._bytes > self._rules.max_bytes:
            raise Refusal(403, f"Cut after {self._rules.max_bytes} bytes.")

    async def _farewell(self, refusal: Refusal | None) -> None:
        if refusal and (self._answered or not self._heard):
            return  # the cut itself is the answer: an end in the middle of a message
        try:
            if refusal:
                with anyio.move_on_after(1):
                    await self._client.send(_refusal_bytes(refusal, with_body=self._method != "HEAD"))
            await self._client.finish()
        except OSError:
            pass


def credentials(user: str, token: str) -> bytes:
    """What `Proxy-Authorization` must be."""
    return b"Basic " + b64encode(f"{user}:{token}".encode())


def _refusal_bytes(refusal: Refusal, *, with_body: bool) -> bytes:
    # The reason phrase says it too: it is all that a client shows of a refused CONNECT.
    reason = "".join(letter if " " <= letter <= "~" else "?" for letter in str(refusal))[:400]
    body = f"{refusal}\n".encode()
    lines = [
        f"HTTP/1.1 {refusal.status} {reason}",
        *(['Proxy-Authenticate: Basic realm="thinkloop"'] if refusal.status == 407 else []),
        "Proxy-Status: thinkloop; error=http_request_denied",
        "Content-Type: text/plain; charset=utf-8",
        f"Content-Length: {len(body)}",
        "Cache-Control: no-store",
        "Connection: close",
    ]
    return "\r\n".join(lines).encode("ascii") + b"\r\n\r\n" + (body if with_body else b"")


async def _side_by_side(main: _Part, other: _Part) -> None:
    """Runs both until `main` ends; a failure of either stops both and is raised as itself, not as a group."""
    try:
        async with anyio.create_task_group() as group:
            group.start_soon(other)
            await main()
            group.cancel_scope.cancel()
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None
