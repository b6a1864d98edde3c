"""The host's end of an extraction worker: start it, ask it, kill it. What it answers is untrusted.

The worker parses hostile documents, so its replies are bounded, checked for shape and cleaned again, as if the document
had written them itself.
"""

from __future__ import annotations

import secrets
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass

from thinkloop.tools.extract_bounds import (
    ERROR_CHARS,
    LINE_CHARS,
    LINK_TEXT_CHARS,
    MAX_LINES,
    MAX_LINKS,
    NOTE_CHARS,
    TITLE_CHARS,
    TOTAL_CHARS,
)
from thinkloop.tools.extract_frame import REPLY_BODY_CAP, REPLY_HEADER_CAP, BadFrame, Json, encode, receive
from thinkloop.tools.extract_kind import Kind
from thinkloop.tools.extract_text import clean, clean_line, web_url
from thinkloop.tools.process_tree import resident_bytes
from thinkloop.tools.sandbox import fresh_uid
from thinkloop.tools.tool import ToolError

_BLOATED_BYTES = 400_000_000  # 60 MB are usual
START_SECONDS = 30.0  # 0.4 s is usual; a cold disk and a busy machine take longer


class WorkerEnded(ToolError):
    """The worker is gone: killed, out of time or memory, or it answered what it should not."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A checked reply: clean text within bounds, or `error`. `missing` names a library that isn't installed."""

    kind: Kind
    title: str
    note: str
    lines: tuple[str, ...]
    links: tuple[tuple[str, str], ...]
    error: str = ""
    missing: str = ""


class Worker:
    """A worker process. `ask` blocks, one call at a time; `kill` may come from any thread and makes `ask` return."""

    def __init__(self, memory: int) -> None:
        """Start it, with at most `memory` megabytes of address space. Raises `WorkerEnded`."""
        self.uses, self.failed = 0, False
        self._busy = threading.Lock()
        self._socket, guest = socket.socketpair()
        try:
            self._process = _start(memory, guest)
        except OSError as error:
            self._socket.close()
            raise WorkerEnded(f"its process did not start: {error}") from error
        finally:
            guest.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return not self.failed and self._process.poll() is None

    def greet(self) -> None:
        """Wait until it has loaded its libraries. Raises `WorkerEnded`."""
        errors = self._process.stderr
        assert errors is not None
        with errors:
            try:
                self._exchange({}, b"", START_SECONDS, "hello")
            except WorkerEnded as error:
                said = errors.read().decode("utf-8", "replace").strip().rpartition("\n")[2]
                raise WorkerEnded(f"{error} ({clean_line(said, ERROR_CHARS)})" if said else str(error)) from None

    def ask(self, header: Json, body: bytes, deadline: float) -> Answer:
        """Extract one document within `deadline` seconds. After a `WorkerEnded` the worker is dead and reaped."""
        self.uses += 1
        nonce = secrets.token_hex(8)
        reply, data = self._exchange({**header, "id": nonce, "deadline": deadline}, body, deadline, nonce)
        if reply.get("final") or self._is_bloated():
            self.kill()
        try:
            return _checked(reply, data)
        except BadFrame as error:
            raise self._ended(f"its process answered with {error}") from None

    def kill(self) -> None:
        """Kill it at once; doesn't wait."""
        self.failed = True
        with suppress(OSError):
            self._process.kill()

    def end(self) -> None:
        """Kill it, wait for an `ask` under way to return, and free what belongs to it. May be called twice."""
        self.kill()
        with self._busy:
            self._process.wait()
            self._socket.close()
            if self._process.stderr:
                self._process.stderr.close()

    def _exchange(self, header: Json, body: bytes, deadline: float, nonce: str) -> tuple[Json, bytes]:
        until = time.monotonic() + deadline
        with self._busy:
            try:
                if header:
                    self._send(header, body, until)
                reply, data = receive(lambda size: self._exactly(size, until), REPLY_HEADER_CAP, REPLY_BODY_CAP)
                if reply.get("id") != nonce:
                    raise BadFrame("a reply to another request")
            except TimeoutError:
                raise self._ended(f"it took longer than {deadline:g} s") from None
            except BadFrame as error:
                raise self._ended(f"its process answered with {error}") from None
            except OSError:
                raise self._ended(self._cause()) from None
        return reply, data

    def _is_bloated(self) -> bool:
        """Whether the document left it so large that a fresh one serves better. Unknown without /proc: no."""
        return resident_bytes(self.pid) > _BLOATED_BYTES

    def _send(self, header: Json, body: bytes, until: float) -> None:
        for part in encode(header, body):
            self._socket.settimeout(_left(until))
            self._socket.sendall(part)

    def _exactly(self, size: int, until: float) -> bytes:
        data = bytearray(size)
        view = memoryview(data)
        while view:
            self._socket.settimeout(_left(until))
            count = self._socket.recv_into(view)
            if not count:
                raise ConnectionError
            view = view[count:]
        return bytes(data)

    def _cause(self) -> str:
        with suppress(subprocess.TimeoutExpired):
            code = self._process.wait(1.0)
            return f"its process was ended by signal {-code}" if code < 0 else f"its process ended with status {code}"
        return "its process closed the connection"

    def _ended(self, reason: str) -> WorkerEnded:
        self.kill()
        self._process.wait()
        return WorkerEnded(reason)


def _left(until: float) -> float:
    left = until - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _command(memory: int) -> list[str]:
    uid = fresh_uid() if sys.platform == "linux" else None
    program = [sys.executable, "-I", "-B", "-X", "utf8", "-m", "thinkloop.tools.extract_worker", str(memory)]
    return program if uid is None else [*program, str(uid)]


def _start(memory: int, guest: socket.socket) -> subprocess.Popen[bytes]:
    """With no environment, and not in the group that Ctrl-C signals: this side decides when it ends."""
    return subprocess.Popen(
        _command(memory),
        stdin=guest.fileno(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={},
        cwd="/",
        start_new_session=True,
    )


def _checked(reply: Json, data: bytes) -> Answer:
    error, missing = _text(reply, "error", ERROR_CHARS), _text(reply, "missing", ERROR_CHARS)
    title, note = _text(reply, "title", TITLE_CHARS), _text(reply, "note", NOTE_CHARS)
    return Answer(
        _kind(reply.get("kind", "text")), title, note, _lines(data), _links(reply.get("links", [])), error, missing
    )


def _kind(value: object) -> Kind:
    match value:
        case "html" | "pdf" | "text":
            return value
    raise BadFrame("an unknown kind")


def _text(reply: Json, key: str, limit: int) -> str:
    value = reply.get(key, "")
    if not isinstance(value, str) or len(value) > limit:
        raise BadFrame(f"a bad {key}")
    return clean(value).replace("\n", " ")


def _lines(data: bytes) -> tuple[str, ...]:
    text = clean(data.decode("utf-8", "replace"))
    if len(text) > TOTAL_CHARS * 1.01:  # breaking long lines adds a newline each
        raise BadFrame("too much text")
    lines = tuple(text.split("\n")) if text else ()
    if len(lines) > MAX_LINES or any(len(line) > LINE_CHARS for line in lines):
        raise BadFrame("lines that are too long or too many")
    return lines


def _links(found: object) -> tuple[tuple[str, str], ...]:
    if not isinstance(found, list) or len(found) > MAX_LINKS:
        raise BadFrame("a bad list of links")
    return tuple(_link(pair) for pair in found)


def _link(pair: object) -> tuple[str, str]:
    match pair:
        case [str(text), str(url)] if len(text) <= LINK_TEXT_CHARS:
            if web_url("", url) == url:
                return clean(text).replace("\n", " "), url
    raise BadFrame("a bad link")
