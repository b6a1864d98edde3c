"""Functions that another process imports by name: tools that run in a process of their own, and misbehave there."""

from __future__ import annotations

import os
import subprocess
import sys
import time

from thinkloop.tools.function import tool


@tool(process=True, deadline=1.5)
def hang(mark: str, own_session: bool) -> str:
    """Never returns, and starts something that doesn't either."""
    subprocess.Popen(["sleep", mark], start_new_session=own_session)
    while True:
        time.sleep(1)


@tool(process=True)
def vanish() -> str:
    """Ends its process."""
    os._exit(3)


@tool(process=True)
def crash() -> str:
    """Ends its process by a signal."""
    os.kill(os.getpid(), 11)
    return "still here"


@tool(process=True)
def scribble() -> str:
    """Writes into every descriptor that it has."""
    for fd in range(1, 64):
        try:
            os.write(fd, b"\xff{]\x1b" * 1000)
        except OSError:
            continue
    return "scribbled"


@tool(process=True)
def huge() -> bytes:
    """Gives 300 MB that are no text."""
    return b"\xff" * 300_000_000


@tool(process=True)
def deep() -> int:
    """Calls itself without end."""
    sys.setrecursionlimit(100_000)
    return deep.function() + 1
