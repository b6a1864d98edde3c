"""`thinkloop mcp`: the tools of a command, offered to other programs."""

from __future__ import annotations

import sys

import anyio
from thinkloop.agent.doctor import mini_folder
from thinkloop.agent.plain import clean
from thinkloop.agent.toolsets import ToolRequest, open_toolsets
from thinkloop.tools.mcp_server import serve


def execute(request: ToolRequest, http: int | None) -> None:
    """Serve until the other side hangs up or Ctrl-C. Raises `ThinkloopError` when a tool can't be had."""

    tools = open_toolsets(request, mini_folder() / "world")
    for note in (note for toolset in tools for note in getattr(toolset, "notes", ())):
        print(f"thinkloop mcp: {clean(note)}", file=sys.stderr)

    async def run() -> None:
        await serve(tools, http=http)

    anyio.run(run)
