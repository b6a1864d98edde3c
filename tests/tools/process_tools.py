"""Functions that another process imports by name, for the tests of tools that run in a process."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel
from thinkloop.tools.function import tool
from thinkloop.tools.retry import Retry
from thinkloop.tools.tool import Attachment, Output, ToolError


class Point(BaseModel):
    x: int
    y: int = 0


@tool(process=True)
def where(at: Point, tags: Annotated[list[str], "words"] | None = None) -> str:
    """Says where."""
    print("printed into the pipe?")
    return f"{type(at).__name__} {at.x} {at.y} {tags} {os.getpid()}"


@tool(process=True)
async def later(text: str) -> Output:
    import anyio

    await anyio.sleep(0.01)
    return Output(text, display="shown", record={"a": [1]}, ok=False, files=(Attachment("f.bin", "x/y", b"\0\xff"),))


@tool(process=True)
def stuck(marker: str) -> str:
    """Never returns, nor does what it starts; nothing but a kill ends either."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    Path(marker).write_text(f"{os.getpid()} {child.pid}")
    while True:
        try:
            time.sleep(600)
        except BaseException:
            continue


@tool(process=True)
def leaves_one_behind() -> str:
    return str(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]).pid)


@tool(process=True)
def fails(how: str) -> object:
    match how:
        case "error":
            return 1 // 0
        case "told":
            raise ToolError("no such city")
        case "exit":
            raise SystemExit(3)
        case "os exit":
            os._exit(7)
        case "kill":
            os.kill(os.getpid(), 11)
        case "interrupt":
            raise KeyboardInterrupt
        case "huge":
            return "x" * 300_000_000
        case "forged":
            for pipe in range(3, 20):
                try:
                    os.write(pipe, b"\xff\xff\xff\xff lies")
                except OSError:
                    continue
            return "honest"
    return object()


@tool(process=True, retry=Retry(times=2, wait=0, on=(ConnectionError,)))
def flaky(marker: str) -> str:
    path = Path(marker)
    tries = int(path.read_text() or 0) if path.exists() else 0
    path.write_text(str(tries + 1))
    if tries < 1:
        raise ConnectionResetError("gone")
    return f"after {tries}"


def plain(text: str) -> str:
    return text


class Holder:
    @staticmethod
    def inside(n: int) -> int:
        return n + 1

    def method(self, n: int) -> int:
        return n
