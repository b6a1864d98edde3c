"""The one way to the network for what a model points at: a forward proxy that connects to checked public addresses only.

It speaks plain HTTP (absolute form) and CONNECT, one request a connection. A name is resolved once per request and the
connection goes to the address that was checked, so neither redirects nor names that change their answer lead elsewhere.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
from thinkloop.tools.addresses import Policy, Resolver, system_resolver
from thinkloop.tools.proxy_rules import Exchange, Rules
from thinkloop.tools.proxy_wire import CHUNK, Wire
from thinkloop.traces.events import ThinkloopError

if TYPE_CHECKING:
    from thinkloop.tools.proxy_relay import Relay

__all__ = ["Exchange", "Proxy"]

_KEPT = 1000  # exchanges
_USER = "thinkloop"
_BUSY = b"HTTP/1.1 503 Too many connections\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


class Proxy:
    """A forward proxy on 127.0.0.1, behind a random token, and on `unix_socket` where one is named, without.

        async with Proxy(Policy.of(("localhost:8000",))) as proxy:
            httpx.AsyncClient(proxy=proxy.url, trust_env=False)

    `max_bytes` bounds one response or tunnel, `timeout` the seconds without progress, `max_seconds` one exchange in all,
    `connections` how many are served at once. `on_exchange` is called after each exchange and must not raise. A refusal
    is a 403 with one sentence in its reason and body (a name that isn't found 502, no answer 504). It may be entered and
    left by different tasks of one event loop.
    """

    def __init__(
        self,
        policy: Policy = Policy(),  # noqa: B008 - frozen
        *,
        unix_socket: Path | None = None,
        max_bytes: int = 50_000_000,
        timeout: float = 30.0,
        max_seconds: float = 120,
        connections: int = 64,
        on_exchange: Callable[[Exchange], None] | None = None,
        resolver: Resolver = system_resolver,
    ) -> None:
        self.exchanges: list[Exchange] = []
        """The last 1,000, oldest first. What a browser asks for itself, and requests without the token, aren't here."""
        self._rules = Rules(policy, max_bytes, timeout, max_seconds, resolver)
        self._unix_socket = unix_socket
        self._connections = connections
        self._on_exchange = on_exchange
        self._token = secrets.token_urlsafe(24)
        self._servers: list[asyncio.Server] = []
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        """`http://user:token@127.0.0.1:PORT`. Raises `ThinkloopError` unless the proxy runs."""
        if not self._servers:
            raise ThinkloopError("The proxy isn't running: use it inside `async with`.")
        port: int = self._servers[0].sockets[0].getsockname()[1]
        return f"http://{_USER}:{self._token}@127.0.0.1:{port}"

    async def __aenter__(self) -> Proxy:
        from thinkloop.tools.proxy_relay import Relay, credentials

        secret = credentials(_USER, self._token)
        serve = self._server(lambda wire: Relay(wire, self._rules, secret))
        self._servers.append(await asyncio.start_server(serve, "127.0.0.1", 0, limit=CHUNK))
        if self._unix_socket:
            try:
                await self._listen(self._unix_socket, self._server(lambda wire: Relay(wire, self._rules, None)))
            except BaseException:
                await self.__aexit__()
                raise
        return self

    async def __aexit__(self, *exc: Any) -> None:
        servers, self._servers = self._servers, []
        for server in servers:
            server.close()
        if self._unix_socket and len(servers) > 1:
            self._unix_socket.unlink(missing_ok=True)
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        with anyio.CancelScope(shield=True):  # they stop at once: none awaits anything when cancelled
            await asyncio.gather(*tasks, return_exceptions=True)
            await asyncio.sleep(0)  # closed transports let go of their sockets in the loop's next round

    async def _listen(self, path: Path, serve: Callable[..., None]) -> None:
        if all(folder.stat().st_mode & 0o001 for folder in path.absolute().parents):
            raise ThinkloopError(
                f"{path} would be open to every user of this machine: put it into a folder of mode 700."
            )
        try:
            self._servers.append(await asyncio.start_unix_server(serve, path, limit=CHUNK))
        except OSError as error:
            raise ThinkloopError(f"The proxy can't listen at {path}: {error.strerror or error}.") from error
        path.chmod(0o666)  # the folder is the guard; a browser may run as another user

    def _server(self, relay: Callable[[Wire], Relay]) -> Callable[..., None]:
        def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            wire = Wire(reader, writer)
            if not self._servers or len(self._tasks) >= self._connections:
                writer.write(_BUSY)
                writer.close()
                return
            task = asyncio.create_task(relay(wire).run(self._record))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

        return accept

    def _record(self, exchange: Exchange) -> None:
        self.exchanges.append(exchange)
        del self.exchanges[:-_KEPT]
        if self._on_exchange:
            self._on_exchange(exchange)
