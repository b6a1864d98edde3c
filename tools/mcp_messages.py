"""JSON-RPC messages as lines on two descriptors, bounded in size, number and kind, as the streams the SDK takes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from time import monotonic
from typing import TYPE_CHECKING, Any

import anyio
from thinkloop.tools.mcp_process import LineTooLongError, read_lines, write_all
from thinkloop.tools.mcp_text import one_line

if TYPE_CHECKING:
    from mcp.shared.message import SessionMessage

MAX_VALUES = 500_000
"""Commas and brackets in one message: parsed, a value takes up to 60 times the bytes that it was sent in."""
MAX_JUNK = 1000
"""Lines that are no messages (banners, logs): more, and the other side doesn't speak the protocol."""
MAX_UNASKED, UNASKED_SECONDS = 2000, 1.0
"""Notifications and requests in any second; MCP's progress notifications come at some 10 a second."""
MAX_UNANSWERED = 256
"""Requests of the other side whose answers it hasn't read."""

Fault = Callable[[str], None]
"""Takes in why the connection must end."""
Streams = tuple[Any, Any]


@asynccontextmanager
async def line_streams(stdout: int, stdin: int, fault: Fault, junk: Callable[[str], None]) -> AsyncIterator[Streams]:
    """A pair of streams for an SDK session over the descriptors of the other side's output and input.

    `fault` is called, and the stream ended, for a message that is too large; `junk` for each line that is no message.
    """
    incoming, to_session = _pair()
    outgoing, from_session = _pair()
    async with anyio.create_task_group() as group:
        group.start_soon(_receive, stdout, incoming, fault, junk)
        group.start_soon(_send, from_session, stdin, incoming)
        try:
            yield to_session, outgoing
        finally:
            group.cancel_scope.cancel()
            for stream in (incoming, to_session, outgoing, from_session):
                stream.close()


def _pair() -> tuple[Any, Any]:
    return anyio.create_memory_object_stream[Any](0)


async def _receive(stdout: int, incoming: Any, fault: Fault, junk: Callable[[str], None]) -> None:
    from mcp.shared.message import SessionMessage
    from mcp_types import jsonrpc_message_adapter

    with incoming, suppress(anyio.BrokenResourceError, anyio.ClosedResourceError):
        try:
            async for line in read_lines(stdout):
                if too_many_values(line):
                    return fault(f"it sent a message with more than {MAX_VALUES:,} values")
                try:
                    message = jsonrpc_message_adapter.validate_json(line, by_name=False)
                except ValueError:
                    junk(one_line(line[:1000].decode(errors="replace")))
                    continue
                await incoming.send(SessionMessage(message))
        except LineTooLongError:
            fault("it sent a line of more than 16 MB")
    return None


def too_many_values(text: bytes) -> bool:
    """Whether `text` as JSON might hold more than `MAX_VALUES` values."""
    return text.count(b",") + text.count(b"[") + text.count(b"{") > MAX_VALUES


async def _send(from_session: Any, stdin: int, incoming: Any) -> None:
    with suppress(anyio.BrokenResourceError, anyio.ClosedResourceError):
        async with from_session:
            async for item in from_session:
                text = item.message.model_dump_json(by_alias=True, exclude_unset=True)
                try:
                    await write_all(stdin, text.encode() + b"\n")
                except OSError:  # nobody reads any more: the session must see the end, not wait
                    incoming.close()
                    return


class Gate:
    """Counts what the other side sends unasked, ends what floods, and knows when the stream is over.

    `read` and `write` wrap the transport's streams for the session.
    """

    def __init__(self, over: Callable[[str], None]) -> None:
        """`over` is called once the stream ends, with a reason if it was ended here."""
        self._over = over
        self._window, self._unasked = monotonic(), 0
        self._unanswered = 0

    def streams(self, pair: Streams) -> Streams:
        """The transport's pair, counted."""
        return _Reading(pair[0], self), _Writing(pair[1], self)

    def take(self, item: SessionMessage | Exception) -> bool:
        """Whether the session may have `item`; if not, the stream is over."""
        message: Any = getattr(item, "message", None)
        if not hasattr(message, "method"):
            return True
        if hasattr(message, "id"):
            self._unanswered += 1
        now = monotonic()
        if now - self._window > UNASKED_SECONDS:
            self._window, self._unasked = now, 0
        self._unasked += 1
        if self._unasked > MAX_UNASKED:
            self._over(f"it sent more than {MAX_UNASKED:,} unasked messages in a second")
            return False
        if self._unanswered > MAX_UNANSWERED:
            self._over(f"it sent more than {MAX_UNANSWERED} requests without reading the answers")
            return False
        return True

    def sent(self, item: SessionMessage) -> None:
        """Takes in that the other side has read `item`."""
        if not hasattr(item.message, "method"):
            self._unanswered -= 1

    def end(self) -> None:
        self._over("")


class _Reading:
    """A transport's read stream through a gate, in the shape the SDK takes."""

    def __init__(self, inner: Any, gate: Gate) -> None:
        self._inner, self._gate = inner, gate

    @property
    def last_context(self) -> Any:
        return getattr(self._inner, "last_context", None)

    async def receive(self) -> Any:
        try:
            item = await self._inner.receive()
        except (anyio.EndOfStream, anyio.ClosedResourceError, anyio.BrokenResourceError):
            self._gate.end()
            raise
        if self._gate.take(item):
            return item
        raise anyio.EndOfStream

    def __aiter__(self) -> _Reading:
        return self

    async def __anext__(self) -> Any:
        try:
            return await self.receive()
        except anyio.EndOfStream:
            raise StopAsyncIteration from None

    async def aclose(self) -> None:
        await self._inner.aclose()

    async def __aenter__(self) -> _Reading:
        await self._inner.__aenter__()
        return self

    async def __aexit__(self, *exc: Any) -> Any:
        return await self._inner.__aexit__(*exc)


class _Writing:
    """A transport's write stream through a gate."""

    def __init__(self, inner: Any, gate: Gate) -> None:
        self._inner, self._gate = inner, gate

    async def send(self, item: Any, /) -> None:
        await self._inner.send(item)
        self._gate.sent(item)

    async def aclose(self) -> None:
        await self._inner.aclose()

    async def __aenter__(self) -> _Writing:
        await self._inner.__aenter__()
        return self

    async def __aexit__(self, *exc: Any) -> Any:
        return await self._inner.__aexit__(*exc)
