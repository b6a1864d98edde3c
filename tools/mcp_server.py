"""thinkloop's tools for other programs: an MCP server over stdio, or over streamable HTTP on this machine only."""

from __future__ import annotations

import base64
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import anyio
from thinkloop.tools.outcome import message_of, plain_output, told
from thinkloop.tools.tool import CHARACTERS_PER_TOKEN, Attachment, Output, Tool, ToolError, Toolset, entered
from thinkloop.tools.validate import check_arguments
from thinkloop.traces.events import Json, ThinkloopError

if TYPE_CHECKING:
    from mcp.server import Server

MAX_CALLS = 32
"""Calls that may wait or run at the same time; more are refused."""
_INSTRUCTIONS = (
    "Tools of thinkloop. Results are cut to each tool's budget; ask for less, or for the next part, when one is."
)


async def serve(tools: Sequence[Tool | Toolset], *, http: int | None = None) -> None:
    """Offer the tools until the other side hangs up, or for ever with `http`, a port on 127.0.0.1 (0: any that is free).

    Toolsets are entered here. Over stdio the process's own standard output carries messages only: what tools print goes
    to standard error. Over HTTP each request needs the bearer token that standard error shows. Raises `ThinkloopError`
    when the SDK is missing, two tools share a name or one has a bad schema, or the port is taken.
    """
    if find_spec("mcp") is None:
        raise ThinkloopError("`thinkloop mcp` needs the official SDK: `pip install 'thinkloop[mcp]'`.")
    async with AsyncExitStack() as stack:
        offer = Offer(await entered(tools, stack))
        if http is not None:
            from thinkloop.tools.mcp_server_http import serve_http

            await serve_http(offer.server(), http)
        else:
            await _serve_stdio(offer.server())


@dataclass(slots=True)
class Offer:
    """The tools, with what all connections share: one writing call at a time, a bound on calls."""

    tools: Mapping[str, Tool]
    _writing: anyio.Lock = field(default_factory=anyio.Lock)
    _calls: int = 0

    def server(self) -> Server[Any]:
        """An SDK server with these tools."""
        from mcp.server import Server

        return Server(
            "thinkloop", version=version("thinkloop"), instructions=_INSTRUCTIONS,
            on_list_tools=self._list, on_call_tool=self._call,
        )  # fmt: skip

    async def _list(self, context: Any, params: Any) -> Any:
        from mcp_types import ListToolsResult

        return ListToolsResult(tools=[_declared(tool) for tool in self.tools.values()])

    async def _call(self, context: Any, params: Any) -> Any:
        output, budget = await self.call(params.name, params.arguments or {})
        return _result(output, budget)

    async def call(self, name: str, arguments: Json) -> tuple[Output, int]:
        """The output of a call and the characters it may have. Never raises but when cancelled."""
        tool = self.tools.get(name)
        if tool is None:
            return _failed(f"there is no tool {name[:80]!r}; the tools are {', '.join(self.tools)}"), 4000
        if self._calls >= MAX_CALLS:
            return _failed(f"{MAX_CALLS} calls are under way; wait for one to end"), 4000
        self._calls += 1
        try:
            return await self._checked(tool, arguments), tool.budget * CHARACTERS_PER_TOKEN
        finally:
            self._calls -= 1

    async def _checked(self, tool: Tool, arguments: Json) -> Output:
        wrong = check_arguments(tool.parameters, arguments)
        if wrong:
            return _failed(f"the arguments don't fit {tool.name}: {wrong}")
        if tool.effect == "read":
            return await _run(tool, arguments)
        async with self._writing:
            return await _run(tool, arguments)


async def _run(tool: Tool, arguments: Json) -> Output:
    try:
        with anyio.fail_after(tool.deadline) as scope:
            return plain_output(await tool.call(arguments))
    except ToolError as problem:
        return _failed(message_of(problem))
    except (Exception, SystemExit) as problem:
        if isinstance(problem, TimeoutError) and scope.cancelled_caught:
            return _failed(f"{tool.name} took longer than its deadline of {tool.deadline:g} s and was stopped")
        return _failed(f"{tool.name} failed: {told(problem)}")


def _failed(message: str) -> Output:
    return Output(f"error: {message}", ok=False)


def _declared(tool: Tool) -> Any:
    from mcp_types import Tool as Declaration
    from mcp_types import ToolAnnotations

    hints = ToolAnnotations(read_only_hint=tool.effect == "read", destructive_hint=None)
    return Declaration(
        name=tool.name,
        description=tool.description,
        input_schema={"type": "object", **tool.parameters},
        annotations=hints,
    )


def _result(output: Output, characters: int) -> Any:
    from mcp_types import CallToolResult, TextContent

    text = output.content
    if len(text) > characters:
        text = f"{text[:characters]}\n[cut here: {len(text) - characters:,} of {len(text):,} characters left out]"
    content = [TextContent(text=text), *map(_content, output.files)]
    return CallToolResult(content=content, is_error=not output.ok)


def _content(file: Attachment) -> Any:
    from mcp_types import AudioContent, BlobResourceContents, EmbeddedResource, ImageContent

    data, kind = base64.b64encode(file.data).decode(), file.media_type
    if kind.startswith("image/"):
        return ImageContent(data=data, mime_type=kind)
    if kind.startswith("audio/"):
        return AudioContent(data=data, mime_type=kind)
    name = "".join(character if character.isalnum() or character in "._-" else "_" for character in file.name)
    return EmbeddedResource(resource=BlobResourceContents(uri=f"thinkloop:///{name}", mime_type=kind, blob=data))


async def _serve_stdio(server: Server[Any]) -> None:
    from thinkloop.tools.mcp_messages import line_streams

    with _own_standard_streams() as (read_fd, write_fd):
        async with line_streams(read_fd, write_fd, _complain, _complain) as (read, write):
            await server.run(read, write, server.create_initialization_options())


def _complain(what: str) -> None:
    print(f"thinkloop mcp: from the client: {what or 'an empty line'}", file=sys.stderr, flush=True)


@contextmanager
def _own_standard_streams() -> Iterator[tuple[int, int]]:
    """Copies of standard input and output. Meanwhile 0 reads nothing and 1 leads to standard error, for prints of tools
    and of what they start."""
    sys.stdout.flush()
    wire = os.dup(0), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    os.close(nothing)
    try:
        yield wire
    finally:
        sys.stdout.flush()
        for number, copy in enumerate(wire):
            os.dup2(copy, number)
            os.close(copy)
