"""The program inside the sandbox: it runs cells, keeps their variables, and answers in length-prefixed JSON.

A cell's answer names the figures and the files that it made; the host then asks for their bytes, a piece at a time.
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
    from collections.abc import Iterator
    from types import FrameType
    from typing import Any

TEXT_CAP = 500_000  # characters of one value or traceback; the host refuses frames larger than 8 MB
REPLY_FD = 50  # high, so that code counting descriptors from 3 doesn't meet it, and below the limit of 64

LISTED, VISITED, DEPTH = 100, 2000, 8  # files named, entries looked at, and folders in folders, after each cell
FIGURES = "sandbox_figures"

read, write, getpid, loads, dumps = os.read, os.write, os.getpid, json.loads, json.dumps
scandir, open_file, pread, close = os.scandir, os.open, os.pread, os.close


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


class Workspace:
    """The files under the working folder, and which of them changed. Links, pipes and hidden names are passed over."""

    def __init__(self, root: str) -> None:
        self.root = root
        self.seen: dict[str, tuple[int, int, int]] = {}
        self.changed()

    def changed(self) -> list[tuple[str, int]]:
        """Path and size in bytes of what is new or different since the last time."""
        found = []
        for path, stat in self._walk():
            state = (stat.st_mtime_ns, stat.st_size, stat.st_ino)
            if self.seen.get(path) != state:
                self.seen[path] = state
                found.append((path, stat.st_size))
        return sorted(found)

    def _walk(self) -> Iterator[tuple[str, os.stat_result]]:
        pending, left = [("", 0)], VISITED
        while pending:
            prefix, depth = pending.pop()
            with suppress(OSError), scandir(f"{self.root}/{prefix}") as entries:
                for entry in entries:
                    left -= 1
                    if left < 0:
                        return
                    if entry.name.startswith((".", "__pycache__")):
                        continue
                    if entry.is_file(follow_symlinks=False):
                        yield prefix + entry.name, entry.stat(follow_symlinks=False)
                    elif depth < DEPTH and entry.is_dir(follow_symlinks=False):
                        pending.append((f"{prefix}{entry.name}/", depth + 1))

    def piece(self, path: str, offset: int, size: int) -> bytes:
        fd = open_file(f"{self.root}/{path}", os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            return pread(fd, size, offset)
        finally:
            close(fd)


class Drawing:
    """Makes matplotlib draw to PNG, by its own setting for backends, the moment it is first imported."""

    def __init__(self, folder: str) -> None:
        self.backend = os.path.join(folder, f"{FIGURES}.py")  # noqa: PTH118 - pathlib takes 5 ms to import

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """Part of the import system (a meta path finder)."""
        if name == FIGURES:
            from importlib.util import spec_from_file_location

            return spec_from_file_location(name, self.backend)
        if name == "matplotlib":
            import warnings

            scratch = os.environ.get("TMPDIR", "/tmp")
            defaults = {"MPLBACKEND": f"module://{FIGURES}", "MPLCONFIGDIR": f"{scratch}/matplotlib"}
            for key, text in {**defaults, "XDG_CACHE_HOME": f"{scratch}/cache"}.items():
                os.environ.setdefault(key, text)
            warnings.filterwarnings("ignore", message="FigureCanvas.* is non-interactive")
        return None


def pictures_of(value: Any) -> list[tuple[str, bytes]]:
    """What the last value shows itself as, by the names that notebooks use, and matplotlib's figures."""
    found: list[tuple[str, bytes]] = []
    for extension, method in (("png", "_repr_png_"), ("svg", "_repr_svg_")):
        if not found and hasattr(type(value), method):
            data = getattr(value, method)()
            data = data[0] if isinstance(data, tuple) else data  # with metadata
            found += [(extension, data if isinstance(data, bytes) else data.encode())] if data else []
    return found + drawn_figures()


def drawn_figures() -> list[tuple[str, bytes]]:
    if "matplotlib.pyplot" not in sys.modules:
        return []
    return [("png", data) for data in __import__(FIGURES).take()]


class Cells:
    """Runs cells one after the other in one namespace, which is also the `__main__` module (so that pickling works)."""

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        self.pictures: list[tuple[str, bytes]] = []
        self.module = types.ModuleType("__main__")
        self.names = self.module.__dict__
        self.running = False
        sys.modules["__main__"] = self.module

    def interrupt(self, signum: int, frame: FrameType | None) -> None:
        if self.running:
            raise KeyboardInterrupt

    def run(self, cell: int, code: str) -> dict[str, Any]:
        """The reply: `value` and `error`, one of them at most a text, and what was drawn and written, if anything."""
        signal.signal(signal.SIGINT, self.interrupt)
        restore_streams()
        self.pictures = []
        try:
            self.running = True
            text = self._shown(f"<cell {cell}>", code)
            self.running = False
            reply: dict[str, Any] = {"value": text, "error": None}
        except BaseException as error:
            self.running = False
            reply = {"value": None, "error": clip(describe(error))}
        finally:
            flush_streams()
        return {**reply, **self._made()}

    def piece(self, request: dict[str, Any]) -> dict[str, str]:
        """The reply to a request for bytes of a picture (by its index) or of a file (by its path), in base64."""
        from binascii import b2a_base64

        what, offset, size = request["take"], request["offset"], request["size"]
        data = b""
        with suppress(Exception):  # gone, or no memory left: the host gets less than it asked for
            is_picture = isinstance(what, int)
            data = self.pictures[what][1][offset : offset + size] if is_picture else b""
            data = data if is_picture else self.workspace.piece(what, offset, size)
        return {"data": b2a_base64(data, newline=False).decode()}

    def _shown(self, filename: str, code: str) -> str | None:
        try:
            value = self._evaluate(filename, code)
        except Exception:  # what was drawn before an error is shown too; after an interrupt there is no time for it
            with suppress(Exception):
                self.pictures += drawn_figures()
            raise
        text = None if value is None else clip(repr(value))
        self.pictures += pictures_of(value)
        return text

    def _made(self) -> dict[str, Any]:
        made: dict[str, Any] = {}
        with suppress(Exception):
            if self.pictures:
                made["pictures"] = [(extension, len(data)) for extension, data in self.pictures]
            if files := self.workspace.changed():
                made["files"], made["more"] = files[:LISTED], max(len(files) - LISTED, 0)
        return made

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


def limit(bounds: dict[str, int], others: list[int]) -> None:
    """Lower the limits of this process, of what it starts, and of others (pid 1, whose memory user code could write)."""
    for name, value in bounds.items():
        kind = getattr(resource, f"RLIMIT_{name}", None)
        for pid in (0, *others):
            if kind is not None:
                resource.prlimit(pid, kind, (value, value))


def add_packages(settings: dict[str, Any]) -> None:
    """Make installed packages importable, without what their `.pth` files would run, if they are for this Python."""
    if settings["version"] == list(sys.version_info[:2]):
        sys.path += settings["packages"]
    for library in ("OPENBLAS", "OMP", "MKL"):  # one thread for each of many cores would meet the limits
        os.putenv(f"{library}_NUM_THREADS", str(min(os.cpu_count() or 1, 4)))


def follow(host: int) -> None:
    """Without bubblewrap: die with the host, and stay the parent of what a cell's processes leave behind."""
    import ctypes

    prctl = ctypes.CDLL(None).prctl
    prctl(1, int(signal.SIGKILL))  # PR_SET_PDEATHSIG
    prctl(36, 1)  # PR_SET_CHILD_SUBREAPER
    if os.getppid() != host:
        os._exit(0)


def main(fd: int, settings: dict[str, Any]) -> None:
    channel, pid, folder = Channel(fd), getpid(), os.getcwd()  # noqa: PTH109 - pathlib takes 5 ms to import
    if settings.get("host"):
        follow(settings["host"])
    cells = Cells(Workspace(folder))
    signal.signal(signal.SIGINT, cells.interrupt)
    sys.meta_path.insert(0, Drawing(os.path.dirname(sys.argv[0])))  # noqa: PTH120
    sys.path.append(folder)
    add_packages(settings)
    if hasattr(sys, "set_int_max_str_digits"):
        sys.set_int_max_str_digits(0)  # 2**100000 is a fair question here; the time limit bounds the cost
    limit(settings["rlimits"], settings["lowered"])
    channel.send({"python": sys.version.split()[0]})
    while True:
        request = channel.receive()
        try:
            reply = cells.piece(request) if "take" in request else cells.run(request["cell"], request["code"])
        except KeyboardInterrupt:  # it came between two statements of `run`
            reply = {"value": None, "error": "KeyboardInterrupt"}
        if getpid() != pid:
            os._exit(0)  # a child that user code forked and let fall through: it must not answer
        channel.send({"nonce": request["nonce"], **reply})


if __name__ == "__main__":
    main(int(sys.argv[1]), loads(sys.argv[2]))
