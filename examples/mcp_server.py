"""Offer your own tools to any MCP client: `python mcp_server.py` (stdio), or `python mcp_server.py 8765` (loopback HTTP).

`thinkloop mcp` does the same for the tools that come with thinkloop.
"""

from __future__ import annotations

import sys

import anyio
from thinkloop.tools.mcp_server import serve

import thinkloop as tl

TIDES = {"Tarbul": ["04:10 low", "10:25 high", "16:40 low", "22:50 high"]}


@tl.tool
def tides(island: str, after: str = "00:00") -> list[str]:
    """Today's tides of an island.

    Args:
        island: Name of the island.
        after: Only those after this time, as HH:MM.
    """
    if island not in TIDES:
        raise tl.ToolError(f"no tides are known for {island}; islands are {', '.join(TIDES)}")
    return [tide for tide in TIDES[island] if tide > after]


if __name__ == "__main__":
    port = int(sys.argv[1]) if len(sys.argv) > 1 else None
    anyio.run(lambda: serve([tides], http=port))
