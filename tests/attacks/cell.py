"""What the sandbox's rows share: running a cell as a model would, and looking at the session from the host."""

from __future__ import annotations

import platform
import time
from pathlib import Path

import anyio
from thinkloop.tools import seccomp
from thinkloop.tools.python import Python
from thinkloop.tools.sandbox_limits import process_tree
from thinkloop.tools.tool import Output

CALL = """
import ctypes, errno, os, socket
libc = ctypes.CDLL(None, use_errno=True)
def call(number, *arguments):
    result = libc.syscall(ctypes.c_long(number), *[ctypes.c_long(a) for a in arguments])
    return "allowed" if result >= 0 else errno.errorcode[ctypes.get_errno()]
def attempt(action, *arguments):
    try:
        return action(*arguments)
    except OSError as error:
        return errno.errorcode.get(error.errno, str(error))
"""
"""Runs before a row's own code: `call` makes a raw system call, `attempt` gives the name of what refused an action."""

NUMBERS = {name: row[platform.machine() == "aarch64"] for name, row in {**seccomp._DENIED, **seccomp._SPECIAL}.items()}


async def cell(toolset: Python, code: str) -> Output:
    return await toolset.tools()[0].call({"code": code})


async def run(toolset: Python, code: str) -> str:
    return (await cell(toolset, code)).content


async def refused(toolset: Python, code: str, *names: str) -> str:
    """The error, one of `names`, that `code` met."""
    said = (await run(toolset, code)).strip("'")
    assert said in names, said
    return said


def inside(toolset: Python) -> list[int]:
    """The host's numbers of all processes of the running session."""
    assert toolset._session is not None
    return list(process_tree(toolset._session._process.pid))


async def gone(pids: list[int], seconds: float = 3.0) -> bool:
    """Whether all of them have ended within the time (a zombie has)."""
    until = time.monotonic() + seconds
    while any(map(alive, pids)):
        if time.monotonic() > until:
            return False
        await anyio.sleep(0.02)
    return True


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
