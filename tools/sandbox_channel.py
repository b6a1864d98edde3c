"""Bytes from inside the sandbox: length-prefixed JSON on a socket, printed text in a pipe. All of it is hostile data.

User code shares its process with the runner that answers, so a reply proves nothing: it is bounded in size and checked
for shape, never unpickled, and what goes wrong with it is `Broken`, which ends the session.
"""

from __future__ import annotations

import json
import os
import re
import select
import socket
import struct
from dataclasses import dataclass, field

import anyio
from thinkloop.traces.events import Json

FRAME_CAP = 8 * 1024 * 1024  # the runner clips a text to 500,000 characters, at most 12 bytes each in JSON
STRUCTURE_CAP = 64 * 1024  # bytes of a frame outside its texts: eight bytes of `{"a":1},` become 230 as objects
PRINT_CAP = 1024 * 1024  # bytes of output kept, half from the start, half from the end
_READ = 1 << 18
_TEXT = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)


class Broken(Exception):
    """The session can't go on; the message is the reason."""


@dataclass(slots=True)
class Printed:
    """Output as it comes: the first and the last half of `PRINT_CAP`, and a count of all bytes."""

    total: int = 0
    head: bytearray = field(default_factory=bytearray)
    tail: bytearray = field(default_factory=bytearray)

    def feed(self, data: bytes) -> None:
        room = PRINT_CAP // 2 - len(self.head)
        self.total += len(data)
        self.head += data[:room]
        self.tail += data[room:]
        if len(self.tail) > PRINT_CAP:
            del self.tail[: -PRINT_CAP // 2]

    def parts(self) -> tuple[str, str, int]:
        """Head, tail, and how many bytes were dropped between them."""
        if dropped := self.total - len(self.head) - len(self.tail):
            return self.head.decode("utf-8", "replace"), self.tail.decode("utf-8", "replace"), dropped
        return (self.head + self.tail).decode("utf-8", "replace"), "", 0


class Channel:
    """The host's ends of a sandbox: `control` carries frames both ways, `output` is what is printed."""

    def __init__(self, control: socket.socket, output: int) -> None:
        self.printed = Printed()
        self.buffer = bytearray()
        """What has arrived and isn't taken yet."""
        self._control, self._output, self._pidfd = control, output, -1
        self._epoll = select.epoll()
        for source in (control.fileno(), output):
            os.set_blocking(source, False)
            self._epoll.register(source, select.EPOLLIN)

    async def readable(self) -> None:
        """Wait until something arrives."""
        await anyio.wait_readable(self._epoll)

    def readable_within(self, seconds: float) -> bool:
        """As `readable`, without an event loop; whether something arrived in time."""
        return bool(select.select([self._epoll], [], [], max(0.0, seconds))[0])

    async def send(self, message: Json) -> None:
        data = json.dumps(message).encode()
        data = struct.pack(">I", len(data)) + data
        self.pump()
        if self.buffer:
            raise Broken("it sent a reply that nobody had asked for")
        while data:
            try:
                data = data[self._control.send(data) :]
            except BlockingIOError:
                await anyio.wait_writable(self._control)
            except OSError:
                raise Broken("the Python process ended") from None

    def watch(self, pidfd: int) -> None:
        """Notice the end of a process too: what it forked may hold the other ends open."""
        self._pidfd = pidfd
        self._epoll.register(pidfd, select.EPOLLIN)

    def pump(self) -> None:
        """Take in what has arrived, without waiting. Raises `Broken` once nothing more can come."""
        sources = {source for source, _ in self._epoll.poll(0)}
        if self._output in sources and not self._read_output():
            self._epoll.unregister(self._output)
        if self._control.fileno() in sources:
            self.buffer += self._received()
        elif self._pidfd in sources:
            raise Broken("the Python process ended")

    def _received(self) -> bytes:
        try:
            data = self._control.recv(_READ)
        except OSError:
            data = b""
        if not data:
            raise Broken("the Python process ended")
        return data

    def drain(self) -> None:
        """What was printed before the reply is in the pipe by now: at most 1 MB, the most a user may make it hold."""
        for _ in range(16):
            if not self._read_output():
                return

    def take_frame(self) -> Json | None:
        """The next message, once it is whole."""
        if len(self.buffer) < 4:
            return None
        (size,) = struct.unpack_from(">I", self.buffer)
        if size > FRAME_CAP:
            raise Broken("it sent a reply that is too large")
        if len(self.buffer) < 4 + size:
            return None
        body = bytes(self.buffer[4 : 4 + size])
        del self.buffer[: 4 + size]
        return _decode(body)

    def close(self) -> None:
        self._epoll.close()
        self._control.close()
        os.close(self._output)

    def _read_output(self) -> bool:
        """Whether there was something to read."""
        try:
            data = os.read(self._output, _READ)
        except BlockingIOError:
            return False
        self.printed.feed(data)
        return bool(data)


def _decode(body: bytes) -> Json:
    if len(body) > STRUCTURE_CAP and len(_TEXT.sub(b"", body)) > STRUCTURE_CAP:
        raise Broken("it sent a reply that the runner doesn't send")
    try:
        message = json.loads(body)
    except (ValueError, RecursionError):
        message = None
    if not isinstance(message, dict):
        raise Broken("it sent a reply that the runner doesn't send")
    return message
