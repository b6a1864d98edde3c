"""One live connection to an MCP server. The SDK's session runs in a task of its own, and so does each request.

Plain asyncio tasks, not a task group's: a task group waits for its tasks, and the point is that a request or a session
which swallows its cancellation is left behind after `ABANDON_SECONDS`, its server cut off, instead of hanging the run.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, TypeVar

import anyio
from thinkloop.tools.mcp_messages import Gate
from thinkloop.tools.mcp_process import ServerStartError
from thinkloop.tools.mcp_text import one_line, said
from thinkloop.tools.mcp_transport import Transport

if TYPE_CHECKING:
    from mcp import ClientSession

ABANDON_SECONDS = 2.0
"""How long a cancelled request, or a session that is closed, may take to end."""
_HANDSHAKE_ERRORS = (-32601, -32602, -32022)
"""What servers that only speak the protocol without a handshake (2026-07-28 on) say to `initialize`."""

_CLOSED = ("Connection closed", "Session terminated", "SSE stream ended", "SSE stream failed")

T = TypeVar("T")


class ConnectionOverError(Exception):
    """The connection ended; the text says how."""


class Connection:
    """A session with a server, from `open` to its end. `protocol` is the negotiated version.

    `on_change` is called when the server announces another tool list, `on_end` once the connection is over and cleaned
    up.
    """

    def __init__(
        self, transport: Transport, on_change: Callable[[], None], on_end: Callable[[Connection], None]
    ) -> None:
        self.transport = transport
        self.protocol = ""
        self._on_change, self._on_end = on_change, on_end
        self._reason = ""
        self._over, self._ready = anyio.Event(), anyio.Event()
        self._session: ClientSession | None = None
        self._task: asyncio.Task[None] | None = None
        self._error: BaseException | None = None

    async def open(self, seconds: float) -> None:
        """Connect and shake hands. Raises `ServerStartError`, with everything cleaned up, and when cancelled too."""
        self._task = asyncio.create_task(self._live())
        waits = [asyncio.create_task(event.wait()) for event in (self._ready, self._over)]
        try:
            await asyncio.wait({self._task, *waits}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            timed_out = not (self._ready.is_set() or self.is_over)
            if timed_out or self.is_over:
                await self.close()
                raise ServerStartError(self._why_not_started(seconds if timed_out else None))
        except asyncio.CancelledError:
            await self.close()
            raise
        finally:
            for wait in waits:
                wait.cancel()

    @property
    def has_ended(self) -> bool:
        """Whether all of it is cleaned up."""
        return self._task is not None and self._task.done()

    @property
    def is_over(self) -> bool:
        """Whether nothing can be asked of it any more."""
        return self._over.is_set() or self._task is None or self._task.done()

    def how_it_ended(self) -> str:
        """A few words for the model or a person."""
        return one_line(self._how(), 500) or "it closed the connection"

    def _how(self) -> str:
        ended = self.transport.how_it_ended()
        return "; ".join(
            dict.fromkeys(filter(None, (self._reason, "" if self._reason and ended == "exit 0" else ended)))
        )

    async def request(self, work: Callable[[ClientSession], Awaitable[T]], seconds: float) -> T:
        """What `work` gives for the session. Raises `TimeoutError` after `seconds`, `ConnectionOverError` when the
        connection ends first, and what `work` raises. The server is told of a call that is given up."""
        if self._session is None or self._task is None or self.is_over:
            await self.close()  # until it is known how it ended
            raise ConnectionOverError(self.how_it_ended())
        task = asyncio.ensure_future(work(self._session))
        try:
            await asyncio.wait({task, self._task}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            if not task.done() and not self._task.done():
                raise TimeoutError
            if task.done() and not _says_closed(task):
                return task.result()
        finally:
            await self._give_up(task)
        await self.close()
        raise ConnectionOverError(self.how_it_ended())

    async def close(self) -> None:
        """End the session and its server: politely, then not. Takes at most `ABANDON_SECONDS` and a little."""
        self._over.set()
        if self._task is None:
            return
        if not self._ready.is_set():
            self._task.cancel()  # it may be waiting for an answer that won't come
        with anyio.CancelScope(shield=True):
            await asyncio.wait({self._task}, timeout=ABANDON_SECONDS)
            if not self._task.done():
                self.cut_off("it did not end when asked to")
                self._task.cancel()
                await asyncio.wait({self._task}, timeout=ABANDON_SECONDS)

    def cut_off(self, reason: str) -> None:
        """End it without asking."""
        self._reason = self._reason or reason
        self.transport.kill()
        self._over.set()

    async def _give_up(self, task: asyncio.Future[Any]) -> None:
        if task.done():
            if not task.cancelled():
                task.exception()  # taken note of, or asyncio reports it as never retrieved
            return
        task.cancel()
        with anyio.CancelScope(shield=True):
            await asyncio.wait({task}, timeout=ABANDON_SECONDS)
        if not task.done():
            self.cut_off("a cancelled call did not end")

    def _end(self, reason: str) -> None:
        self._reason = self._reason or reason
        self._over.set()

    async def _live(self) -> None:
        try:
            async with AsyncExitStack() as stack:
                await self._connect(stack)
                self._ready.set()
                await self._over.wait()
        except asyncio.CancelledError:
            self._end("it was cut off")
            raise
        except BaseException as error:
            self._error = _first(error)
            self._end(_in_words(self._error))
            if not isinstance(self._error, Exception):
                raise
        finally:
            self._over.set()
            self._on_end(self)

    async def _connect(self, stack: AsyncExitStack) -> None:
        from mcp import ClientSession
        from mcp_types import Implementation

        _quiet()
        gate = Gate(self._end)
        read, write = gate.streams(await stack.enter_async_context(self.transport.streams(self._end)))
        info = Implementation(name="thinkloop", version=version("thinkloop"))
        session = ClientSession(read, write, client_info=info, message_handler=self._hear)
        await stack.enter_async_context(session)
        await _shake_hands(session)
        self.protocol = session.protocol_version or ""
        await self._listen(session, stack)
        self._session = session

    async def _listen(self, session: ClientSession, stack: AsyncExitStack) -> None:
        """Ask for changes of the tool list where they come by subscription only."""
        from mcp.client.subscriptions import listen
        from mcp_types.version import MODERN_PROTOCOL_VERSIONS

        tools = session.server_capabilities and session.server_capabilities.tools
        if session.protocol_version in MODERN_PROTOCOL_VERSIONS and tools and tools.list_changed:
            await stack.enter_async_context(listen(session, tools_list_changed=True))

    async def _hear(self, message: Any) -> None:
        if getattr(message, "method", "") == "notifications/tools/list_changed":
            self._on_change()

    def _why_not_started(self, seconds: float | None) -> str:
        if isinstance(self._error, ServerStartError):
            return str(self._error)
        if seconds is not None:
            parts = [f"it did not answer the MCP handshake within {seconds:g} s", self.transport.hint()]
        else:
            parts = [self._how() or "it closed the connection", self.transport.hint()]
        return "; ".join(filter(None, parts))


async def _shake_hands(session: ClientSession) -> None:
    """`initialize`, which all servers with a handshake know, first; `server/discover` for those without one.

    The SDK's own order is the other way round, and costs 10 s with a server that ignores what it doesn't know.
    """
    from mcp import MCPError

    try:
        await session.initialize()
    except MCPError as error:
        if error.code not in _HANDSHAKE_ERRORS:
            raise
        await session.discover()


def _says_closed(task: asyncio.Future[Any]) -> bool:
    """Whether a request failed because its connection is gone."""
    error = None if task.cancelled() else task.exception()
    return isinstance(error, anyio.ClosedResourceError | anyio.BrokenResourceError) or (
        error is not None and _is_closed(error)
    )


def _is_closed(error: BaseException) -> bool:
    """By the SDK's words: its code for this, -32000, is what many servers use for any error of theirs."""
    from mcp import MCPError

    return isinstance(error, MCPError) and error.message.startswith(_CLOSED)


def _first(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _in_words(error: BaseException) -> str:
    from mcp import MCPError

    if isinstance(error, ServerStartError):
        return str(error)
    if _is_closed(error):
        return ""
    if isinstance(error, MCPError):
        return f"it refused the MCP handshake: {one_line(error.message)} ({error.code})"
    return f"{type(error).__name__}: {said(error)}"


def _quiet() -> None:
    """Keeps the SDK's warnings, which quote servers, off the terminal of a program that hasn't set up logging."""
    for name in ("mcp", "client", "httpx2"):
        logger = logging.getLogger(name)
        if not logger.handlers:
            logger.addHandler(logging.NullHandler())
