"""Ways to reach an MCP server: a process on this machine over stdio, or a URL over streamable HTTP."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, ExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import anyio
from thinkloop.tools.addresses import AddressError, Policy, checked_url, resolve
from thinkloop.tools.mcp_messages import MAX_JUNK, Fault, Streams, line_streams
from thinkloop.tools.mcp_process import (
    MAX_LINE,
    Launch,
    ServerProcess,
    ServerStartError,
    adopting,
    find_program,
    minimal_environment,
)
from thinkloop.tools.mcp_text import last_line

_DAY = 24 * 3600.0  # seconds
_DRAIN_SECONDS = 0.1
"""From a process's end to the stream's, when a child of it still holds the pipe."""


class Transport(Protocol):
    """One connection's way to its server."""

    def streams(self, fault: Fault) -> AbstractAsyncContextManager[Streams]:
        """Connect. `fault` is told why the connection must end. Raises `ServerStartError`."""
        ...

    def how_it_ended(self) -> str:
        """What is known of the end, such as `exit 1: …`; empty when nothing is."""
        ...

    def hint(self) -> str:
        """What else was seen that may explain a failure to start."""
        ...

    def stderr(self) -> str: ...

    def kill(self) -> None:
        """Cut it off at once."""
        ...


@dataclass(slots=True)
class StdioTransport:
    """A server process, spoken to in lines. `sandbox` runs it in bubblewrap without network."""

    command: Sequence[str]
    env: Mapping[str, str]
    sandbox: bool
    _process: ServerProcess | None = None
    _junk: str = ""
    _junk_lines: int = 0
    _fault: Fault | None = None

    @asynccontextmanager
    async def streams(self, fault: Fault) -> AsyncIterator[Streams]:
        self._fault = fault
        with ExitStack() as stack:
            self._process = process = ServerProcess(self._launch(stack))
        async with anyio.create_task_group() as group:
            try:
                group.start_soon(process.keep_stderr)
                if self.sandbox:
                    from thinkloop.tools.mcp_sandbox import watch_memory

                    group.start_soon(watch_memory, process.pid, fault)
                async with line_streams(process.stdout, process.stdin, fault, self._take_junk) as pair:
                    group.start_soon(self._end_with_process, process, fault)
                    yield pair
            finally:
                group.cancel_scope.cancel()
                await process.stop()

    def _launch(self, stack: ExitStack) -> Launch:
        environment = minimal_environment(self.env)
        program = find_program(self.command, environment)
        if self.sandbox:
            from thinkloop.tools.mcp_sandbox import sandboxed

            return sandboxed(program, self.command[1:], self.env, stack)
        return Launch(adopting([program, *self.command[1:]]), environment)

    async def _end_with_process(self, process: ServerProcess, fault: Fault) -> None:
        await process.wait()
        await anyio.sleep(_DRAIN_SECONDS)
        fault("")

    def _take_junk(self, line: str) -> None:
        self._junk = self._junk or line
        self._junk_lines += 1
        if self._junk_lines > MAX_JUNK and self._fault is not None:
            self._fault(f"it wrote more than {MAX_JUNK:,} lines that are no MCP messages to its standard output")

    def how_it_ended(self) -> str:
        return self._process.how_it_ended() if self._process else ""

    def hint(self) -> str:
        parts = []
        if self._junk:
            parts.append(
                f"it wrote {self._junk_lines:,} lines to its standard output that are no MCP messages: {self._junk!r}"
            )
        if self._process and (said := last_line(self.stderr())) and not self._process.ended():
            parts.append(f"the end of its stderr: {said}")
        return "; ".join(parts)

    def stderr(self) -> str:
        return self._process.stderr_text() if self._process else ""

    def kill(self) -> None:
        if self._process:
            self._process.kill()


@dataclass(slots=True)
class HttpTransport:
    """A server at a URL. Private hosts only with `allow_hosts`; redirects stay within the URL's origin."""

    url: str
    headers: Mapping[str, str]
    allow_hosts: Sequence[str]
    _seen: Any = None

    @asynccontextmanager
    async def streams(self, fault: Fault) -> AsyncIterator[Streams]:
        from mcp.client.streamable_http import streamable_http_client
        from thinkloop.tools.mcp_http import Seen, http_client
        from thinkloop.tools.proxy import Proxy

        policy = Policy.of(self.allow_hosts)
        await self._check(policy)
        self._seen = Seen(fault)
        # One connection's streams last as long as the run, and each message is bounded on its own.
        async with (
            Proxy(policy, max_bytes=1 << 40, timeout=_DAY, max_seconds=_DAY, on_exchange=self._seen.exchange) as proxy,
            http_client(proxy.url, self.headers, self._seen) as client,
            streamable_http_client(self.url, http_client=client, max_sse_event_size=MAX_LINE) as pair,
        ):
            yield pair

    async def _check(self, policy: Policy) -> None:
        try:
            _, host, port = checked_url(self.url)
            await resolve(host, port, policy)
        except AddressError as error:
            raise ServerStartError(f"{error} For an MCP server: `allow_hosts` in its table.") from error

    def how_it_ended(self) -> str:
        return self._seen.problem if self._seen else ""

    def hint(self) -> str:
        return ""

    def stderr(self) -> str:
        return ""

    def kill(self) -> None:
        if self._seen:
            self._seen.refuse = True


def transport_for(
    command: Sequence[str] | None, url: str | None, env: Mapping[str, str], headers: Mapping[str, str],
    allow_hosts: Sequence[str], sandbox: bool,
) -> Transport:  # fmt: skip
    """The transport of a server's options, not connected yet."""
    if command is not None:
        return StdioTransport(command, env, sandbox)
    assert url is not None
    return HttpTransport(url, headers, allow_hosts)
