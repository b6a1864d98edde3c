"""Use the tools of an MCP server: `python mcp_client.py COMMAND ARGUMENTS`. Without arguments: mcp_server.py beside this.

An `MCP` is a toolset, so an agent takes it like any other: `tl.Agent(model=…, tools=[MCP(…)])`. Here its tools are listed
and the first one is called. The hash goes into `thinkloop.toml` as `pin`: then a server that changes its tools is refused.
"""

from __future__ import annotations

import sys
from pathlib import Path

import anyio
from thinkloop.tools.mcp_client import MCP


async def main(command: list[str]) -> None:
    async with MCP(name="harbour", command=command, deadline=30) as server:
        for tool in server.tools():
            print(f"{tool.name} ({tool.effect}): {tool.description}")
        print(f"pin = {server.hash!r}")
        for note in server.notes:
            print(f"note: {note}")
        if server.tools()[0].name == "harbour_tides":
            result = await server.tools()[0].call({"island": "Tarbul", "after": "12:00"})
            print(result.content)


if __name__ == "__main__":
    own = [sys.executable, str(Path(__file__).with_name("mcp_server.py"))]
    anyio.run(main, sys.argv[1:] or own)
