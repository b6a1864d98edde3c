"""`thinkloop mcp`: the tools of a command, offered to other programs."""

from __future__ import annotations

import anyio
from thinkloop.agent.doctor import mini_folder
from thinkloop.agent.toolsets import ToolRequest, open_toolsets
from thinkloop.tools.mcp_server import serve


def execute(request: ToolRequest, http: int | None) -> None:
    """Serve until the other side hangs up or Ctrl-C. Raises `ThinkloopError` when a tool can't be had."""

    async def run() -> None:
        await serve(open_toolsets(request, mini_folder() / "world"), http=http)

    anyio.run(run)
