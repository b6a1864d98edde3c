"""The program inside the sandbox: it runs cells, keeps their variables, and answers in length-prefixed JSON.

The host copies this file in as text and never imports it. Standard library only, any Python from 3.9 on. User code
shares its process, so nothing it says is trusted: the care taken here (a moved descriptor, saved functions) is against
accidents only.
"""

from __future__ import annotations

import ast
import fcntl
import json
import linecache
import os
import resource
import signal
import struct
import sys
import traceback
import types
from contextlib import suppress
from io import TextIOWrapper

TYPE_CHECKING = False  # typing's own constant, without the 3 ms that importing it takes
if TYPE_CHECKING:
    from types import FrameType
    from typing import Any

TEXT_CAP = 500_000  # characters of one value or traceback; the host refuses frames larger than 8 MB
REPLY_FD = 50  # high, so that code counting descriptors from 3 doesn't meet it, and below the limit of 64

read, write, getpid, loads, dumps = os.read, os.write, os.getpid, json.loads, json.dumps


class Channel:
    """Frames over one socket: a 4-byte big-endian length, then JSON."""

    def __init__(self, fd: int) -> None:
        self.fd = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, REPLY_FD)
        os.close(fd)

    def receive(self) -> Any:
        (size,) = struct.unpack(">I", self._exactly(4))
        return loads(self._exactly(size))

    def send(self, message: dict[str, Any]) -> None:
        data = dumps(message).encode()
        data = struct.pack(">I", len(data)) + data
        while data:
            data = data[write(self.fd, data) :]

    def _exactly(self, size: int) -> bytes:
        parts = []
        while size:
            part = read(self.fd, min(size, 1 << 16))
            if not part:
                os._exit(0)  # the host is gone
            parts.append(part)
            size -= len(part)
        return b"".join(parts)


class Cells:
    """Runs cells one after the other in one namespace, which is also the `__main__` module (so that pickling works)."""

    def __init__(self) -> None:
        self.module = types.ModuleType("__main__")
        self.names = self.module.__dict__
        self.running = False
        sys.modules["__main__"] = self.module

    def interrupt(self, signum: int, frame: FrameType | None) -> None:
        if self.running:
            raise KeyboardInterrupt

    def run(self, cell: int, code: str) -> dict[str, str | None]:
        """The reply's `value` and `error`; one of them at most is a text."""
        signal.signal(signal.SIGINT, self.interrupt)
        restore_streams()
        try:
            self.running = True
            value = self._evaluate(f"<cell {cell}>", code)
            text = None if value is None else clip(repr(value))
            self.running = False
            return {"value": text, "error": None}
        except BaseException as error:
            self.running = False
            return {"value": None, "error": clip(describe(error))}
        finally:
            flush_streams()

    def _evaluate(self, filename: str, code: str) -> Any:
        linecache.cache[filename] = (len(code), None, code.splitlines(True), filename)
        body = ast.parse(code, filename).body
        last = None
        if body and isinstance(body[-1], ast.Expr):
            last = ast.Expression(body[-1].value)
            del body[-1]
        exec(compile(ast.Module(body, []), filename, "exec", dont_inherit=True), self.names)
        if last is None:
            return None
        value = eval(compile(last, filename, "eval", dont_inherit=True), self.names)
        if value is not None:
            self.names["_"] = value
        return value


def describe(error: BaseException) -> str:
    """The traceback as Python words it: frames of the cells alone, no caret lines."""
    try:
        summary = traceback.TracebackException(type(error), error, error.__traceback__)
        keep_cell_frames(summary, set())
        return "".join(summary.format()).rstrip("\n")
    except BaseException:
        return type(error).__name__


def keep_cell_frames(summary: Any, seen: set[int]) -> None:
    if summary is None or id(summary) in seen:
        return
    seen.add(id(summary))
    summary.stack[:] = [frame for frame in summary.stack if frame.filename.startswith("<cell ")]
    for frame in summary.stack:
        frame.colno = frame.end_colno = None
    if hasattr(summary, "offset"):
        summary.offset = None
    for inner in [summary.__cause__, summary.__context__, *(getattr(summary, "exceptions", None) or [])]:
        keep_cell_frames(inner, seen)


def clip(text: str) -> str:
    """The text, its middle left out beyond `TEXT_CAP`."""
    left_out = len(text) - TEXT_CAP
    if left_out <= 0:
        return text
    half = TEXT_CAP // 2
    return f"{text[:half]}\n[... {left_out} characters left out ...]\n{text[-half:]}"


def restore_streams() -> None:
    """A line-buffered stdout and stderr, whatever an earlier cell did to them, so that output keeps its order."""
    for name, fd in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name, None)
        if getattr(stream, "closed", True) or stream is getattr(sys, f"__{name}__"):
            stream = TextIOWrapper(
                open(fd, "wb", closefd=False),  # noqa: SIM115 - the descriptor outlives the stream
                encoding="utf-8",
                errors="backslashreplace",
                line_buffering=True,
            )
            setattr(sys, name, stream)


def flush_streams() -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(BaseException):  # user code may have put anything there, or closed the descriptor
            stream.flush()


def limit(bounds: dict[str, int]) -> None:
    """Lower the limits of this process, of what it starts, and of pid 1, whose memory user code could write to."""
    for name, value in bounds.items():
        kind = getattr(resource, f"RLIMIT_{name}", None)
        for pid in (0, 1):
            if kind is not None:
                resource.prlimit(pid, kind, (value, value))


def main(fd: int, bounds: dict[str, int]) -> None:
    channel, cells, pid = Channel(fd), Cells(), getpid()
    signal.signal(signal.SIGINT, cells.interrupt)
    sys.path.append("/workspace")
    if hasattr(sys, "set_int_max_str_digits"):
        sys.set_int_max_str_digits(0)  # 2**100000 is a fair question here; the time limit bounds the cost
    limit(bounds)
    channel.send({"python": sys.version.split()[0]})
    while True:
        request = channel.receive()
        try:
            reply = cells.run(request["cell"], request["code"])
        except KeyboardInterrupt:  # it came between two statements of `run`
            reply = {"value": None, "error": "KeyboardInterrupt"}
        if getpid() != pid:
            os._exit(0)  # a child that user code forked and let fall through: it must not answer
        channel.send({"nonce": request["nonce"], **reply})


if __name__ == "__main__":
    main(int(sys.argv[1]), json.loads(sys.argv[2]))
