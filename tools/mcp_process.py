"""A stdio MCP server's process: in its own group, lines bounded, the end of its stderr kept, its family ended with it.

Descriptors are ours rather than asyncio's, whose transports stay open while any grandchild holds a pipe.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import anyio
from thinkloop.tools.mcp_text import last_line
from thinkloop.tools.process_tree import hold, kill_held, process_tree, signal_group, signal_name
from thinkloop.traces.events import ThinkloopError

MAX_LINE = 16 << 20
"""Bytes of one message: 10 MB of attachment take 13.4 MB in base64."""
STDERR_KEPT = 64 << 10
_CHUNK = 64 << 10
_PAUSE = 0.01
"""Seconds between two readings of stderr, and after a piece of a line under 4 kB: at most 6.4 MB/s, at 2 % of a core."""
_POLL = 0.05  # seconds; one poll is a system call of a few µs
_CLOSE_GRACE, _TERM_GRACE, _KILL_GRACE = 0.8, 0.4, 1.0  # seconds for a server to end by itself, by SIGTERM, by SIGKILL


_SCRAP = 4096
_ADOPT = """
import os, signal, sys
try:
    import ctypes
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)
except (ImportError, OSError, AttributeError):
    pass
signal.signal(signal.SIGPIPE, signal.SIG_DFL)
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
try:
    os.execv(sys.argv[1], sys.argv[1:])
except OSError as error:
    sys.exit(f"{sys.argv[1]} can't be executed: {error}")
"""
"""36 is PR_SET_CHILD_SUBREAPER, which stays over exec. Python ignores the two signals, and that would stay too."""


class ServerStartError(ThinkloopError):
    """An MCP server can't be started: says why and what to do."""


class LineTooLongError(Exception):
    """A line was longer than `MAX_LINE`."""


@dataclass(frozen=True, slots=True)
class Launch:
    """What to execute. `environment` is all the process gets; `uid` changes user and group (root only)."""

    command: Sequence[str]
    environment: Mapping[str, str]
    cwd: str | None = None
    passed: Sequence[int] = ()
    uid: int | None = None


def minimal_environment(extra: Mapping[str, str]) -> dict[str, str]:
    """`PATH`, `HOME` and `LANG` of ours, and `extra`: keys of other services stay here."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    return {"PATH": os.defpath, "LANG": "C.UTF-8", **kept, **extra}


def find_program(command: Sequence[str], environment: Mapping[str, str]) -> str:
    """The path of the program in `command`. Raises `ServerStartError` when there is none."""
    found = shutil.which(command[0], path=environment["PATH"])
    if found is None:
        raise ServerStartError(
            f"the program {command[0]!r} was not found or can't be executed; install it, or give its full path in `command`"
        )
    return found


def adopting(command: Sequence[str]) -> list[str]:
    """`command`, with orphans of its descendants coming to it and not to init: so a daemon is still found below it when
    it is ended. Adds 16 ms to the start. A namespace of processes would too, but hides the others from servers that show
    or end processes, and sudo and Chromium's sandbox fail in it."""
    return [sys.executable, "-I", "-S", "-c", _ADOPT, *command] if sys.platform == "linux" else list(command)


class ServerProcess:
    """A running server. `stdin`, `stdout` and `stderr` are descriptors, none of which blocks."""

    def __init__(self, launch: Launch) -> None:
        """Starts it. Call from the event loop's thread, which outlives it. Raises `ServerStartError`."""
        try:
            self._process = subprocess.Popen(
                list(launch.command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0,
                env=dict(launch.environment), cwd=launch.cwd, start_new_session=True, pass_fds=tuple(launch.passed),
                user=launch.uid, group=launch.uid, extra_groups=None if launch.uid is None else [],
            )  # fmt: skip
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            raise ServerStartError(f"{launch.command[0]!r} could not be started: {error}") from error
        pipes = (self._process.stdin, self._process.stdout, self._process.stderr)
        self.stdin, self.stdout, self.stderr = (pipe.fileno() for pipe in pipes if pipe is not None)
        for fd in (self.stdin, self.stdout, self.stderr):
            os.set_blocking(fd, False)
        self.kept_stderr = bytearray()
        self._signalled = False

    @property
    def pid(self) -> int:
        return self._process.pid

    def ended(self) -> bool:
        """Whether the process is over."""
        return self._process.poll() is not None

    def stderr_text(self) -> str:
        """The last 64 kB that the server wrote to stderr."""
        return self.kept_stderr.decode(errors="replace")

    def how_it_ended(self) -> str:
        """`exit 1: the end of its stderr`; empty while it runs and when it was ended here."""
        code = self._process.poll()
        if code is None or self._signalled:
            return ""
        said = last_line(self.stderr_text())
        return f"{_exit(code)}: {said}" if said else _exit(code)

    async def wait(self) -> None:
        """Until the process is over, its pipes held open by children or not."""
        while not self.ended():
            await anyio.sleep(_POLL)

    async def keep_stderr(self) -> None:
        """Read stderr to its end, keeping the last 64 kB. Who writes faster than it is read waits."""
        while chunk := await read_some(self.stderr):
            self._keep(chunk)
            await anyio.sleep(_PAUSE)

    async def stop(self) -> None:
        """End the process and all it started: stdin closed, then SIGTERM, then SIGKILL; at most 2.2 s. Not cancellable.

        What a server left behind when it ended by itself, in a session of its own, isn't found.
        """
        family = self._family()
        with anyio.CancelScope(shield=True):
            self._close(self._process.stdin)
            if not await self._ends_within(_CLOSE_GRACE):
                self._signalled = True
                signal_group(self.pid, signal.SIGTERM)
                await self._ends_within(_TERM_GRACE)
            self._kill(family)
            await self._ends_within(_KILL_GRACE)
            self._drain_stderr()
            for pipe in (self._process.stdout, self._process.stderr):
                self._close(pipe)

    def kill(self) -> None:
        """End the process, its descendants and its group at once."""
        self._signalled = self._signalled or not self.ended()
        self._kill(self._family())

    def _family(self) -> list[int]:
        """Handles of its descendants, those in sessions of their own too: a number could be another process's later."""
        family = [] if self.ended() else list(process_tree(self.pid))[1:]
        return [handle for pid in family if (handle := hold(pid)) is not None]

    def _kill(self, family: Sequence[int]) -> None:
        signal_group(self.pid)
        kill_held(family)
        for handle in family:
            os.close(handle)

    async def _ends_within(self, seconds: float) -> bool:
        until = time.monotonic() + seconds
        while not self.ended() and time.monotonic() < until:
            await anyio.sleep(0.01)
        return self.ended()

    def _drain_stderr(self) -> None:
        with suppress(OSError):
            while chunk := os.read(self.stderr, _CHUNK):
                self._keep(chunk)

    def _keep(self, chunk: bytes) -> None:
        self.kept_stderr += chunk
        del self.kept_stderr[:-STDERR_KEPT]

    @staticmethod
    def _close(pipe: object) -> None:
        with suppress(OSError):
            pipe.close()  # type: ignore[attr-defined]  # one of Popen's pipes


def _exit(code: int) -> str:
    return f"exit {code}" if code >= 0 else f"killed by {signal_name(-code)}"


async def read_some(fd: int) -> bytes:
    """Up to 64 kB, empty at the end. Always lets other tasks run first, so that a firehose starves nobody."""
    while True:
        await _readable(fd)
        try:
            return os.read(fd, _CHUNK)
        except BlockingIOError:
            continue
        except OSError:  # a terminal or socket that went away
            return b""


async def _readable(fd: int) -> None:
    try:
        await anyio.wait_readable(fd)
    except PermissionError:  # a regular file: never waits, and epoll refuses it
        await anyio.sleep(0)


async def write_all(fd: int, data: bytes) -> None:
    """Write `data` without blocking the loop. Raises `OSError` when nobody reads any more."""
    view = memoryview(data)
    while view:
        try:
            await anyio.wait_writable(fd)
        except PermissionError:
            await anyio.sleep(0)
        with suppress(BlockingIOError):
            view = view[os.write(fd, view[:4096]) :]  # a writable pipe takes 4,096 bytes without blocking


async def read_lines(fd: int, most: int = MAX_LINE) -> AsyncIterator[bytes]:
    """Lines without their newline. Raises `LineTooLongError` before one takes more than `most` bytes of memory."""
    buffer = bytearray()
    while chunk := await read_some(fd):
        searched = len(buffer)
        buffer += chunk
        while (end := buffer.find(b"\n", searched)) >= 0:
            line = bytes(buffer[:end])
            del buffer[: end + 1]
            searched = 0
            yield line
        if len(buffer) > most:
            raise LineTooLongError
        if buffer and len(chunk) < _SCRAP:  # sent byte by byte, a line of 16 MB would take minutes of a core
            await anyio.sleep(_PAUSE)
