"""JSON-RPC messages as lines on two descriptors, bounded in size, number and kind, as the streams the SDK takes."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from time import monotonic
from typing import TYPE_CHECKING, Any

import anyio
from thinkloop.tools.mcp_process import MAX_LINE, LineTooLongError, read_lines, write_all
from thinkloop.tools.mcp_reduce import reduce_message
from thinkloop.tools.mcp_text import one_line

if TYPE_CHECKING:
    from mcp.shared.message import SessionMessage

MAX_VALUES = 50_000
"""Commas and brackets in one message: parsed, a value takes up to 60 times the bytes that it was sent in."""
MAX_JUNK = 1000
"""Lines that are no messages (banners, logs): more, and the other side doesn't speak the protocol."""
MAX_BURST, MAX_MESSAGES = 2000, 20_000
"""Messages in any second and in any minute, at some 0.2 ms each; MCP's progress notifications come at some 10 a second."""
MAX_UNANSWERED = 256
"""Requests of the other side whose answers it hasn't read."""

PARSE_ERROR = -32700
"""JSON-RPC's code for what is no JSON, given here to the calls that an unreadable answer may have been for."""

Fault = Callable[[str], None]
"""Takes in why the connection must end."""
Streams = tuple[Any, Any]


class Rate:
    """Counts what comes in any `seconds`."""

    def __init__(self, most: int, seconds: float) -> None:
        self._most, self._seconds = most, seconds
        self._since, self._count = monotonic(), 0

    def exceeded(self, more: int = 1) -> bool:
        """Whether with `more` there were too many."""
        if (now := monotonic()) - self._since > self._seconds:
            self._since, self._count = now, 0
        self._count += more
        return self._count > self._most


class UnreadableError(ValueError):
    """A line that looks like an answer can't be parsed."""


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

    values = Rate(20 * MAX_VALUES, 10)
    with incoming, suppress(anyio.BrokenResourceError, anyio.ClosedResourceError):
        try:
            async for line in read_lines(stdout):
                if (count := values_in(line)) > MAX_VALUES:
                    return fault(f"it sent a message with more than {MAX_VALUES:,} values")
                if values.exceeded(count):
                    return fault(f"it sent more than {20 * MAX_VALUES:,} values in 10 s")
                try:
                    message = jsonrpc_message_adapter.validate_json(line, by_name=False)
                except ValueError:
                    junk(one_line(line[:1000].decode(errors="replace")))
                    if b'"jsonrpc"' in line and (b'"result"' in line or b'"error"' in line):
                        await incoming.send(UnreadableError())
                    continue
                await incoming.send(SessionMessage(message))
        except LineTooLongError:
            fault(f"it sent a line of more than {MAX_LINE >> 20} MB")
    return None


def values_in(text: bytes) -> int:
    """How many values the message `text` can hold at most, about: commas and brackets, those within texts only where
    that makes no difference."""
    if (most := marks_in(text)) <= MAX_VALUES:
        return most
    bare = text.replace(b"\\\\", b"").replace(b'\\"', b"")
    if bare.count(b'"') > 4 * MAX_VALUES:  # more texts than there may be values
        return most
    return marks_in(b"".join(bare.split(b'"')[::2]))


def marks_in(text: bytes) -> int:
    """Commas and opening brackets."""
    return text.count(b",") + text.count(b"[") + text.count(b"{")


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
    """Counts what the other side sends, ends what floods, cuts down the rest, and knows when the stream is over.

    `read` and `write` wrap the transport's streams for the session.
    """

    def __init__(self, over: Callable[[str], None]) -> None:
        """`over` is called once the stream ends, with a reason if it was ended here."""
        self._over = over
        self._burst, self._minute = Rate(MAX_BURST, 1), Rate(MAX_MESSAGES, 60)
        self._unanswered = 0
        self._pending: dict[str, Any] = {}

    def streams(self, pair: Streams) -> Streams:
        """The transport's pair, counted."""
        return _Reading(pair[0], self), _Writing(pair[1], self)

    def take(self, item: SessionMessage | Exception) -> list[SessionMessage]:
        """What the session may have for `item`. Raises `EndOfStream` when that is too much."""
        message: Any = getattr(item, "message", None)
        if hasattr(message, "method"):
            self._unanswered += hasattr(message, "id")
        else:
            self._pending.pop(str(getattr(message, "id", None)), None)
        if problem := self._problem():
            self._over(problem)
            raise anyio.EndOfStream
        if isinstance(item, Exception):
            return self._unreadable()
        return [item] if reduce_message(message) else []

    def _problem(self) -> str:
        if self._burst.exceeded():
            return f"it sent more than {MAX_BURST:,} messages in a second"
        if self._minute.exceeded():
            return f"it sent more than {MAX_MESSAGES:,} messages in a minute"
        if self._unanswered > MAX_UNANSWERED:
            return f"it sent more than {MAX_UNANSWERED} requests without reading the answers"
        return ""

    def _unreadable(self) -> list[SessionMessage]:
        """Errors for all calls under way: whose answer it was can't be told, and waiting for it would be in vain."""
        from mcp.shared.message import SessionMessage
        from mcp_types import ErrorData, JSONRPCError

        error = ErrorData(
            code=PARSE_ERROR, message="nested too deeply, or no valid JSON-RPC; the call may have taken effect"
        )
        asked, self._pending = self._pending, {}
        return [SessionMessage(JSONRPCError(jsonrpc="2.0", id=number, error=error)) for number in asked.values()]

    def sent(self, item: SessionMessage) -> None:
        """Takes in that the other side has read `item`."""
        if not hasattr(item.message, "method"):
            self._unanswered -= 1

    def asked(self, item: SessionMessage) -> None:
        """Takes in that `item` is about to be sent."""
        if hasattr(item.message, "method") and hasattr(item.message, "id"):
            self._pending[str(item.message.id)] = item.message.id

    def end(self) -> None:
        self._over("")


class _Reading:
    """A transport's read stream through a gate, in the shape the SDK takes."""

    def __init__(self, inner: Any, gate: Gate) -> None:
        self._inner, self._gate = inner, gate
        self._taken: deque[SessionMessage] = deque()

    @property
    def last_context(self) -> Any:
        return getattr(self._inner, "last_context", None)

    async def receive(self) -> Any:
        while not self._taken:
            try:
                item = await self._inner.receive()
            except (anyio.EndOfStream, anyio.ClosedResourceError, anyio.BrokenResourceError):
                self._gate.end()
                raise
            self._taken += self._gate.take(item)
        return self._taken.popleft()

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
        self._gate.asked(item)
        await self._inner.send(item)
        self._gate.sent(item)

    async def aclose(self) -> None:
        await self._inner.aclose()

    async def __aenter__(self) -> _Writing:
        await self._inner.__aenter__()
        return self

    async def __aexit__(self, *exc: Any) -> Any:
        return await self._inner.__aexit__(*exc)
