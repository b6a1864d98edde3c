"""Our MCP server over streamable HTTP: on 127.0.0.1 alone, for whoever has the token, and not for pages in a browser."""

from __future__ import annotations

import hmac
import secrets
import socket
import sys
from typing import TYPE_CHECKING, Any

import anyio
from thinkloop.traces.events import ThinkloopError

if TYPE_CHECKING:
    import uvicorn
    from mcp.server import Server

HOST, PATH = "127.0.0.1", "/mcp"
_IDLE_SECONDS = 1800.0
_SESSIONS = 64


async def serve_http(server: Server[Any], port: int) -> None:
    """Serve until cancelled or interrupted. Prints the address and the token to standard error. Raises `ThinkloopError`
    when the port is taken."""
    import uvicorn

    with _bound(port) as listener:
        number = listener.getsockname()[1]
        token = secrets.token_urlsafe(32)
        config = uvicorn.Config(
            Guarded(_app(server, number), token), log_config=None, access_log=False, server_header=False,
            timeout_graceful_shutdown=1,
        )  # fmt: skip
        print(
            f"thinkloop mcp: http://{HOST}:{number}{PATH}\nAuthorization: Bearer {token}", file=sys.stderr, flush=True
        )
        await _run(uvicorn.Server(config), listener)


async def _run(server: uvicorn.Server, listener: socket.socket) -> None:
    """uvicorn in a task of its own, which closes its connections before a cancellation goes through."""
    async with anyio.create_task_group() as group:
        done = anyio.Event()

        async def run() -> None:
            with anyio.CancelScope(shield=True):
                await server.serve(sockets=[listener])
            done.set()

        group.start_soon(run)
        try:
            await done.wait()
        finally:
            server.should_exit = True


def _bound(port: int) -> socket.socket:
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((HOST, port))
    except (OSError, OverflowError) as error:
        listener.close()
        raise ThinkloopError(f"Port {port} on {HOST} can't be used: {error}. Give another, or 0 for any.") from error
    return listener


def _app(server: Server[Any], port: int) -> Any:
    from mcp.server.transport_security import TransportSecuritySettings

    own = [f"{HOST}:{port}", f"localhost:{port}"]
    security = TransportSecuritySettings(allowed_hosts=own, allowed_origins=[f"http://{name}" for name in own])
    return server.streamable_http_app(
        streamable_http_path=PATH, transport_security=security, host=HOST, session_idle_timeout=_IDLE_SECONDS,
        max_sessions=_SESSIONS,
    )  # fmt: skip


class Guarded:
    """An ASGI app behind a bearer token, compared in constant time."""

    def __init__(self, app: Any, token: str) -> None:
        self._app, self._expected = app, f"Bearer {token}".encode()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and not hmac.compare_digest(self._given(scope), self._expected):
            headers = [(b"content-type", b"text/plain"), (b"www-authenticate", b"Bearer")]
            await send({"type": "http.response.start", "status": 401, "headers": headers})
            await send(
                {"type": "http.response.body", "body": b"The token that `thinkloop mcp` printed is missing or wrong.\n"}
            )
            return
        await self._app(scope, receive, send)

    @staticmethod
    def _given(scope: Any) -> bytes:
        return next((value for name, value in scope["headers"] if name == b"authorization"), b"")
