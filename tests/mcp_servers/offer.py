"""thinkloop's own MCP server with a few tools: over stdio, or (with `http`) on a free loopback port."""

import os
import sys
from pathlib import Path

import anyio
from thinkloop.tools.function import tool
from thinkloop.tools.mcp_server import serve
from thinkloop.tools.tool import Attachment, Output, ToolError

running = []


@tool
def add(a: int, b: int = 1) -> int:
    """Adds."""
    return a + b


@tool(effect="write")
async def step(name: str) -> str:
    """Takes a moment; says what ran beside it."""
    running.append(name)
    await anyio.sleep(0.1)
    seen = ",".join(running)
    running.remove(name)
    return seen


@tool(budget=10)
def long() -> str:
    """Says too much."""
    return "x" * 1000


@tool(deadline=0.2)
async def late() -> str:
    """Takes too long."""
    await anyio.sleep(60)
    return "never"


@tool
def loud() -> str:
    """Prints, and lets others print."""
    print("printed")
    os.system("echo shouted; cat")
    os.write(1, b"written\n")
    return "quiet"


@tool
def files() -> Output:
    """Gives files."""
    png, wav = Attachment("a.png", "image/png", b"\x89PNG"), Attachment("b.wav", "audio/wav", b"RIFF")
    return Output("three files", files=(png, wav, Attachment("c d.pdf", "application/pdf", b"%PDF")))


@tool
def wrong(how: str) -> str:
    """Fails."""
    if how == "exit":
        sys.exit("bye")
    raise ToolError("not like that") if how == "told" else ValueError("oops")


@tool
async def patient(path: str) -> str:
    """Notes in a file that it was cancelled."""
    try:
        await anyio.sleep(60)
    except BaseException:
        Path(path).write_text("cancelled")
        raise
    return "done"


class Shelf:
    """A toolset that says when it is entered and left."""

    async def __aenter__(self):
        print("shelf entered", file=sys.stderr, flush=True)
        return self

    async def __aexit__(self, *exc):
        print("shelf left", file=sys.stderr, flush=True)

    def tools(self):
        return [add]


anyio.run(
    lambda: serve([Shelf(), step, long, late, loud, files, wrong, patient], http=0 if "http" in sys.argv else None)
)
