"""A server made with the official SDK, over stdio or (with `http`) streamable HTTP on a free loopback port."""

import os
import socket
import sys

import anyio
import uvicorn
from mcp.server import MCPServer
from mcp.server.mcpserver import Context, Image
from mcp_types import ToolAnnotations

PNG = bytes.fromhex("89504e470d0a1a0a")
server = MCPServer("shop")


@server.tool(annotations=ToolAnnotations(read_only_hint=True))
def price(item: str, count: int = 1) -> str:
    """What something costs."""
    return f"{item}: {3 * count}"


@server.tool()
async def order(item: str) -> dict[str, str]:
    """Order something."""
    return {"ordered": item}


@server.tool(structured_output=False)
def picture() -> list[object]:
    """A picture of the shop."""
    return ["the shop", Image(data=PNG, format="png")]


@server.tool()
def fail() -> str:
    """Always fails."""
    raise ValueError("sold out")


@server.tool()
async def wait(seconds: float, context: Context) -> str:
    """Waits."""
    await anyio.sleep(seconds)
    return "waited"


@server.tool()
def leave() -> str:
    """Ends the server."""
    print("closing time", file=sys.stderr, flush=True)
    os._exit(7)


async def serve_http() -> None:
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    print(listener.getsockname()[1], flush=True)
    config = uvicorn.Config(server.streamable_http_app(), log_level="critical")
    await uvicorn.Server(config).serve(sockets=[listener])


if sys.argv[1:] == ["http"]:
    anyio.run(serve_http)
else:
    server.run("stdio")
