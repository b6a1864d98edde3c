"""Tools of MCP servers (Model Context Protocol), over stdio or streamable HTTP, on our terms.

A server is somebody else's program: its tool list is fingerprinted and can be pinned, every call has our deadline, what
it sends is bounded and cleaned, and its end is told to the model. Needs the extra `mcp`, imported when first entered.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from time import monotonic
from typing import Any, Literal

import anyio
from thinkloop.tools.mcp_config import check_options, parse_options, parse_table
from thinkloop.tools.mcp_connection import Connection, ConnectionOverError
from thinkloop.tools.mcp_listing import Definition, Offered, changes, fingerprint, in_words, offer, read_definitions
from thinkloop.tools.mcp_process import ServerStartError
from thinkloop.tools.mcp_result import call_tool, output_of, why_failed
from thinkloop.tools.mcp_text import clean, one_line
from thinkloop.tools.mcp_transport import transport_for
from thinkloop.tools.tool import Effect, Output, Tool, ToolError
from thinkloop.traces.events import Json, ThinkloopError

BACK_OFF = 0.5
"""Seconds before a server that ended is started again."""
FORGIVEN_SECONDS = 600.0
"""A server that ran this long after a restart may be started again once more."""
MAX_READINGS, READING_PAUSE = 50, 0.05
"""How often a run reads an announced list, and seconds between two readings."""
_MARGIN = 5.0
"""What a tool's deadline adds to ours, so that ours, which tells more, comes first."""

__all__ = ["MCP", "parse_server", "servers_from"]


@dataclass(frozen=True, slots=True)
class MCPTool:
    """One tool of a server."""

    server: MCP
    name: str
    description: str
    parameters: Json
    effect: Effect
    deadline: float
    budget: int
    definition: Definition

    async def call(self, arguments: Json) -> Output:
        """Call it on the server. Raises `ToolError` for what the model should be told."""
        return await self.server.call(self.definition, arguments)


class MCP:
    """The tools of one MCP server, as a toolset. Each is named `NAME_tool`.

    `hash` is the fingerprint of its tool list (with `only`, of those), to be given as `pin`; `notes` says what was left
    out and what happened, for a person. Both are filled in on entering.
    """

    def __init__(
        self,
        *,
        name: str,
        command: Sequence[str] | None = None,
        url: str | None = None,
        env: Mapping[str, str] = {},
        headers: Mapping[str, str] = {},
        allow_hosts: Sequence[str] = (),
        sandbox: bool = False,
        effect: Literal["read", "write", "hint"] = "hint",
        deadline: float = 60.0,
        budget: int = 2000,
        only: Sequence[str] = (),
        pin: str | None = None,
    ) -> None:
        """`command` starts a server with `PATH`, `HOME`, `LANG` and `env` alone; `url` is a running one, reached with
        `headers`, on a private host only if `allow_hosts` names it. `sandbox` runs a command without network or home.
        `effect` `hint` trusts the server's mark of what only reads. `deadline` (seconds) holds for the start and for each
        call, `budget` is in tokens, `only` names the server's tools to offer, `pin` is a `hash` that its list must have.

        Raises `ThinkloopError` for options that don't go together.
        """
        self.name, self.effect, self.deadline, self.budget = name, effect, deadline, budget
        self.hash = ""
        self.notes: list[str] = []
        self._only, self._pin = tuple(only), pin
        check_options(
            name, command=command, url=url, env=env, headers=headers, sandbox=sandbox, effect=effect, deadline=deadline,
            budget=budget,
        )  # fmt: skip
        self._transport = partial(
            transport_for, tuple(command) if command is not None else None, url, dict(env), dict(headers),
            tuple(allow_hosts), sandbox,
        )  # fmt: skip
        self._connection: Connection | None = None
        self._definitions: list[Definition] = []
        self._tools: list[MCPTool] = []
        self._refused: dict[str, str] = {}
        self._given_up = self._told = ""
        self._closing = False
        self._restarted_at: float | None = None
        self._background: asyncio.Task[None] | None = None
        self._entered = self._stale = False
        self._readings = 0

    def tools(self) -> Sequence[Tool]:
        """The tools, once entered."""
        return tuple(self._tools)

    async def __aenter__(self) -> MCP:
        """Connect and read the tool list. Raises `ThinkloopError` that says why it can't be and what to do."""
        _need_sdk()
        self._closing, self._given_up, self._told, self._restarted_at = False, "", "", None
        self.notes, self._refused, self._readings = [], {}, 0
        self._entered = self._stale = False
        started = monotonic()
        try:
            self._connection = await self._connect(self.deadline)
            await self._take_list(self._connection, max(1.0, self.deadline - (monotonic() - started)))
        except BaseException as error:
            await self.__aexit__()
            if isinstance(error, ServerStartError):
                raise ThinkloopError(
                    f"The MCP server {self.name!r} can't be used: {str(error).rstrip('.')}."
                ) from error
            raise
        self._entered = True
        if self._connection.has_ended:
            self._connection_ended(self._connection)
        elif self._stale:
            self._list_changed()
        return self

    async def __aexit__(self, *exc: Any) -> None:
        """End the connection, and a server that was started, with all it started."""
        self._closing = True
        if self._background is not None:
            self._background.cancel()
            with anyio.CancelScope(shield=True):
                await asyncio.wait({self._background})
        if self._connection is not None:
            await self._connection.close()

    async def call(self, definition: Definition, arguments: Json) -> Output:
        """Call a tool by its definition at the start. Raises `ToolError`."""
        started = monotonic()
        connection = await self._ready(started)
        if definition.name in self._refused:
            raise ToolError(self._refused[definition.name])
        record = {"server": self.name, "tool": definition.name, "hash": self.hash, "protocol": connection.protocol}
        try:
            result = await connection.request(
                partial(call_tool, name=definition.name, arguments=arguments), self._left(started)
            )
        except TimeoutError:
            raise ToolError(self._too_late(definition.name)) from None
        except ConnectionOverError as over:
            told = f"error: {self._ended_words(str(over))} The call was cut off; whether it took effect is not known."
            return Output(told, ok=False, record=record | {"stderr": clean(connection.transport.stderr())})
        except Exception as error:
            raise ToolError(f"the MCP server {self.name!r} {why_failed(error)}") from error
        if not hasattr(result, "content"):
            raise ToolError(
                f"{definition.name!r} of the MCP server {self.name!r} asks a person for input, which isn't offered"
            )
        return self._with_news(output_of(result, definition.name, record))

    # Being ready for a call

    async def _ready(self, started: float) -> Connection:
        """The connection to call on, after a restart or a new reading of the list that is under way."""
        while self._background is not None and not self._background.done():
            await asyncio.wait({self._background}, timeout=self._left(started))
            if monotonic() - started >= self.deadline:
                raise ToolError(
                    f"the MCP server {self.name!r} is not ready yet, after {self.deadline:g} s; the call was not made"
                )
        if self._given_up:
            raise ToolError(self._given_up)
        if self._connection is None or self._closing:
            raise ToolError(f"the MCP server {self.name!r} is not running")
        return self._connection

    def _left(self, started: float) -> float:
        return max(0.05, self.deadline - (monotonic() - started))

    def _too_late(self, tool: str) -> str:
        return (
            f"the MCP server {self.name!r} did not answer within {self.deadline:g} s ({one_line(tool, 80)}); the call was "
            "cancelled and the server told so; whether it took effect is not known"
        )

    def _with_news(self, output: Output) -> Output:
        """The output with what the model should know first: a restart, a changed list."""
        if not self._told:
            return output
        told, self._told = self._told, ""
        return Output(
            f"[{told}]\n{output.content}", output.display, output.record | {"news": told}, output.ok, output.files
        )

    # Connecting, and what happens to connections

    async def _connect(self, seconds: float) -> Connection:
        connection = Connection(self._transport(), self._list_changed, self._connection_ended)
        await connection.open(seconds)
        return connection

    async def _take_list(self, connection: Connection, seconds: float) -> None:
        """Read the list for the first time, check it against the pin and make the tools."""
        definitions, notes = await self._read_list(connection, seconds)
        self.hash = fingerprint(definitions)
        if self._pin and self._pin != self.hash:
            names = ", ".join(one_line(tool.name, 60) for tool in definitions[:20])
            raise ServerStartError(
                f"its tool list is not the pinned one: `pin` is {self._pin!r}, the list's hash is {self.hash!r} (tools now: "
                f"{names}). Read their descriptions, then set the new pin, or leave the server out"
            )
        offered, more = offer(definitions, self.name)
        self._definitions, self._tools = definitions, [self._tool(entry) for entry in offered]
        self.notes += [*notes, *more]

    async def _read_list(self, connection: Connection, seconds: float) -> tuple[list[Definition], list[str]]:
        """Raises `ServerStartError`."""
        try:
            return await connection.request(partial(read_definitions, only=self._only), seconds)
        except TimeoutError:
            raise ServerStartError(f"it did not give its tool list within {self.deadline:g} s") from None
        except ConnectionOverError as over:
            raise ServerStartError(f"it ended before it gave its tool list: {over}") from over
        except Exception as error:
            raise ServerStartError(f"its tool list can't be read: it {why_failed(error)}") from error

    def _tool(self, entry: Offered) -> MCPTool:
        read = self.effect == "read" or (self.effect == "hint" and entry.definition.read_only)
        return MCPTool(
            self, entry.name, entry.description, entry.parameters, "read" if read else "write",
            self.deadline + _MARGIN, self.budget, entry.definition,
        )  # fmt: skip

    def _list_changed(self) -> None:
        """The server announced another list: no call goes out before it is read."""
        self._stale = True
        if self._entered and not self._closing and (self._background is None or self._background.done()):
            self._background = asyncio.create_task(self._read_again())

    async def _read_again(self) -> None:
        """Until there is no newer announcement."""
        self._stale = True
        while self._stale and self._connection is not None:
            self._stale = False
            self._readings += 1
            if self._readings > MAX_READINGS:
                return self._give_up(f"announced another tool list more than {MAX_READINGS} times")
            try:
                definitions, _ = await self._read_list(self._connection, self.deadline)
            except ServerStartError as error:
                if not self._connection.is_over:
                    self._give_up(f"announced another tool list, but {error}")
                return None
            self._compare(definitions)
            await asyncio.sleep(READING_PAUSE)
        return None

    def _compare(self, definitions: Sequence[Definition]) -> None:
        """Refuse from now on, whatever comes later, what isn't what it was at the start."""
        changed = changes(self._definitions, definitions)
        self._refused |= {
            name: f"{name!r} of the MCP server {self.name!r} is refused from now on: {what} since the start, so it may not do "
            "what it said. A person must look at it and start again."
            for name, what in changed.items()
            if what != "it is new"
        }
        if changed:
            self._tell(f"the MCP server {self.name!r} now has another tool list: {in_words(changed)}")

    def _tell(self, news: str) -> None:
        if news not in self.notes and len(self.notes) < 100:
            self.notes.append(news)
            self._told = f"{self._told}; {news}" if self._told else news

    def _connection_ended(self, connection: Connection) -> None:
        if self._closing or not self._entered or connection is not self._connection:
            return
        if self._restarted_at is not None and monotonic() - self._restarted_at < FORGIVEN_SECONDS:
            self._give_up(f"ended again ({connection.how_it_ended()})")
            return
        self._restarted_at = monotonic()
        if self._background is not None:
            self._background.cancel()
        self._background = asyncio.create_task(self._restart(connection.how_it_ended()))

    def _ended_words(self, how: str) -> str:
        if self._given_up:
            return f"{self._given_up}."
        return f"the MCP server {self.name!r} ended ({how}); it is being started again."

    def _give_up(self, what: str) -> None:
        self._given_up = f"the MCP server {self.name!r} {what}; it is not used any more in this run"
        self.notes.append(self._given_up)

    async def _restart(self, ended: str) -> None:
        await asyncio.sleep(BACK_OFF)
        try:
            self._connection = connection = await self._connect(self.deadline)
        except ServerStartError as error:
            return self._give_up(f"ended ({ended}) and can't be started again: {error}")
        if connection.is_over:
            return self._give_up(f"ended again ({connection.how_it_ended()})")
        self._tell(f"the MCP server {self.name!r} ended ({ended}) and was started again; what it remembered is gone")
        return await self._read_again()


def _need_sdk() -> None:
    if find_spec("mcp") is None:
        raise ThinkloopError("MCP servers need the official SDK: `pip install 'thinkloop[mcp]'`.")


def servers_from(config: Mapping[str, Any]) -> list[MCP]:
    """The servers of a settings file's `[mcp.NAME]` tables, by name. Raises `ThinkloopError` that names table and key."""
    return [MCP(**parse_table(name, table)) for name, table in config.items()]


def parse_server(text: str, *, allow_hosts: Sequence[str] = ()) -> MCP:
    """The server of `NAME=COMMAND ARGUMENTS` or `NAME=https://…`. Raises `ThinkloopError`."""
    return MCP(**parse_options(text), allow_hosts=allow_hosts)
