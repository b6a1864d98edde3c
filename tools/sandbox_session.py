"""One living sandbox: started, asked to run cells, interrupted, ended. Everything that comes out of it is hostile data.

User code shares its process with the runner that answers, so a reply proves nothing: it is size-capped, checked for
shape, never unpickled, and what goes wrong with it ends the session.
"""

from __future__ import annotations

import json
import os
import secrets
import select
import signal
import struct
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import anyio
import anyio.to_thread
from thinkloop.tools.sandbox import (
    Interpreter,
    Limits,
    SandboxError,
    explain_failure,
    find_bwrap,
    interpreters,
    kill_starting,
    launch,
)
from thinkloop.tools.sandbox_limits import Watchdog, delegated_cgroup, join_cgroup, leave_cgroup, process_tree
from thinkloop.traces.events import Json

GRACE = 1.0  # seconds between the interrupt and the end
START_SECONDS = 10.0
FRAME_CAP = 8 * 1024 * 1024  # the runner clips a text to 500,000 characters, at most 12 bytes each in JSON
PRINT_CAP = 1024 * 1024  # bytes of output kept, half from the start, half from the end
FLOOD = 64 * 1024 * 1024  # bytes of output after which a cell is stopped
_READ = 1 << 16

Stop = Literal["", "time", "output"]


class _Broken(Exception):
    """The session can't go on; the message is the reason."""


class _Flood(Exception):
    """A cell printed more than `FLOOD` bytes."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What the runner claims: the value's `repr`, or the error's traceback."""

    value: str | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Cell:
    """What became of one cell. `stop` says why it was cut short; `lost`, why the variables are gone (empty: kept)."""

    number: int
    printed: Printed
    reply: Reply
    stop: Stop = ""
    lost: str = ""
    seconds: float = 0.0


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


class Session:
    """A sandboxed Python process with its variables, from `start` to `end`. See `launch` for which thread to use."""

    def __init__(self, interpreter: Interpreter, limits: Limits, files: Sequence[Path] = ()) -> None:
        self.interpreter, self.limits, self.python, self.sum_limit, self.cells = interpreter, limits, "", "watchdog", 0
        self._bwrap = find_bwrap()
        launched = launch(self._bwrap, interpreter, limits, files)
        self._process, self._channel = launched.process, launched.channel
        self._output, self._info = launched.output, launched.info
        self._buffer, self._printed, self._lost, self._ended = bytearray(), Printed(), "", False
        self._stop: Stop = ""
        self._pidfds: list[int] = []  # pid 1 of the inside, then the runner
        self._watchdog: Watchdog | None = None
        self._cgroup: Path | None = None
        self._epoll = select.epoll()
        for source in (self._channel.fileno(), self._output):
            os.set_blocking(source, False)
            self._epoll.register(source, select.EPOLLIN)

    @property
    def lost(self) -> str:
        """Why this session can't be used any more; empty while it can."""
        if not self._lost and self._process.poll() is not None:
            self._lose("the Python process ended")
        return self._lost

    async def ready(self) -> None:
        """Wait until it can run cells; later calls return at once. Raises `SandboxError`; the session is over then."""
        try:
            with anyio.fail_after(START_SECONDS):
                while not self.python and not self._greeted():
                    await anyio.wait_readable(self._epoll)
        except (TimeoutError, _Broken) as error:
            raise await anyio.to_thread.run_sync(self._failure, error) from None

    def ready_blocking(self) -> None:
        """As `ready`, without an event loop."""
        until = time.monotonic() + START_SECONDS
        try:
            while not self._greeted():
                if not select.select([self._epoll], [], [], max(0.0, until - time.monotonic()))[0]:
                    raise _Broken
        except _Broken as error:
            raise self._failure(error) from None

    async def execute(self, code: str, timeout: float) -> Cell:
        """Run one cell for at most `timeout` seconds, then interrupt it, then (after `GRACE`) end the session.

        Cancelling interrupts the cell the same way, and `lost` tells whether the variables survived.
        """
        self.cells += 1
        self._printed, self._stop, started, reply = Printed(), "", time.perf_counter(), Reply()
        self._pace(busy=True)
        try:
            reply = await self._converse(code, timeout)
        except _Broken as error:
            self._lose(str(error))
        finally:
            self._pace(busy=False)
            self._drain()
        return Cell(self.cells, self._printed, reply, self._stop, self._lost, time.perf_counter() - started)

    def end(self) -> None:
        """Kill everything inside and free what belongs to it. Blocks for a few milliseconds; may be called twice."""
        if self._ended:
            return
        self._ended = True
        self._lose("the session was ended")
        self._reap()
        if self._watchdog:
            self._watchdog.end()
            self._watchdog.join()
        if self._cgroup:
            leave_cgroup(self._cgroup)
        self._epoll.close()
        self._channel.close()
        for fd in (self._output, self._info, *self._pidfds):
            os.close(fd)

    # Starting

    def _greeted(self) -> bool:
        """Whether the runner has said hello, which is before any user code runs; then take hold of its processes."""
        self._pump()
        message = self._take_frame()
        if message is None:
            return False
        self._take_hold()
        self.python = str(message.get("python", "?"))[:20]
        return True

    def _take_hold(self) -> None:
        try:
            inside = int(json.loads(os.read(self._info, 4096))["child-pid"])
            runner = int(Path(f"/proc/{inside}/task/{inside}/children").read_text().split()[0])
            self._pidfds += [os.pidfd_open(inside), os.pidfd_open(runner)]
        except (OSError, ValueError, LookupError) as error:
            raise _Broken(f"its processes can't be seen in /proc ({error})") from error
        if group := delegated_cgroup():
            pids = list(process_tree(self._process.pid))
            self._cgroup = join_cgroup(group, pids, self.limits.total_bytes, self.limits.processes + 8)
            self.sum_limit = "cgroup" if self._cgroup else "watchdog"
        self._watchdog = Watchdog(inside, self.limits.total_bytes, self._lose)
        self._watchdog.start()

    def _failure(self, error: Exception) -> SandboxError:
        self._reap()
        self._drain()
        said = self._printed.parts()[0] or str(error) or f"no answer after {START_SECONDS:.0f} s"
        self.end()
        return SandboxError(explain_failure(self._bwrap, said))

    # One cell

    async def _converse(self, code: str, timeout: float) -> Reply:
        nonce = secrets.token_hex(16)
        try:
            with anyio.move_on_after(timeout):
                await self._send({"nonce": nonce, "cell": self.cells, "code": code})
                return await self._receive(nonce)
            self._stop = "time"
        except _Flood:
            self._stop = "output"
        except anyio.get_cancelled_exc_class():
            await self._settle_cancelled(nonce)
            raise
        return await self._settle(nonce)

    async def _settle(self, nonce: str) -> Reply:
        """Interrupt the cell and wait for its reply; `_Broken` if none comes."""
        self._signal(signal.SIGINT)
        with anyio.move_on_after(GRACE, shield=True):
            return await self._receive(nonce, flood=False)
        raise _Broken("it did not stop when interrupted")

    async def _settle_cancelled(self, nonce: str) -> None:
        try:
            await self._settle(nonce)
        except _Broken as error:
            self._lose(str(error))

    async def _send(self, message: Json) -> None:
        data = json.dumps(message).encode()
        data = struct.pack(">I", len(data)) + data
        self._pump()
        if self._buffer:
            raise _Broken("it sent a reply that nobody had asked for")
        while data:
            try:
                data = data[self._channel.send(data) :]
            except BlockingIOError:
                await anyio.wait_writable(self._channel)
            except OSError:
                raise _Broken("the Python process ended") from None

    async def _receive(self, nonce: str, flood: bool = True) -> Reply:
        while (message := self._take_frame()) is None:
            await anyio.wait_readable(self._epoll)
            self._pump()
            if flood and self._printed.total > FLOOD:
                raise _Flood
        return self._checked(message, nonce)

    def _checked(self, message: Json, nonce: str) -> Reply:
        texts = (message.get("value"), message.get("error"))
        if (
            message.get("nonce") != nonce
            or self._buffer
            or not all(text is None or isinstance(text, str) for text in texts)
        ):
            raise _Broken("it sent a reply that the runner doesn't send")
        return Reply(*texts)

    # Bytes

    def _pump(self) -> None:
        """Take in what has arrived, without waiting."""
        for source, _ in self._epoll.poll(0):
            if source == self._output:
                if not self._read_output():
                    self._epoll.unregister(self._output)
                continue
            try:
                data = self._channel.recv(_READ)
            except OSError:
                data = b""
            if not data:
                raise _Broken("the Python process ended")
            self._buffer += data

    def _read_output(self) -> bool:
        """Whether there was something to read."""
        try:
            data = os.read(self._output, _READ)
        except BlockingIOError:
            return False
        self._printed.feed(data)
        return bool(data)

    def _drain(self) -> None:
        """What was printed before the reply is in the pipe by now: at most 1 MB, the most a user may make it hold."""
        for _ in range(16):
            if not self._read_output():
                return

    def _take_frame(self) -> Json | None:
        if len(self._buffer) < 4:
            return None
        (size,) = struct.unpack_from(">I", self._buffer)
        if size > FRAME_CAP:
            raise _Broken("it sent a reply that is too large")
        if len(self._buffer) < 4 + size:
            return None
        body = bytes(self._buffer[4 : 4 + size])
        del self._buffer[: 4 + size]
        return _decode(body)

    # Ending

    def _pace(self, busy: bool) -> None:
        if self._watchdog:
            self._watchdog.watch(busy)

    def _lose(self, reason: str) -> None:
        """Record the first reason and kill. Also called by the watchdog's thread, so it does nothing that blocks."""
        self._lost = self._lost or reason
        self._kill()

    def _kill(self) -> None:
        """Kill pid 1 of the inside, with which everything there dies; bubblewrap itself then ends and is reaped."""
        if self._pidfds:
            self._signal(signal.SIGKILL, who=0)
        else:
            kill_starting(self._process)

    def _signal(self, number: signal.Signals, who: int = 1) -> None:
        with suppress(ProcessLookupError, OSError):
            signal.pidfd_send_signal(self._pidfds[who], number)

    def _reap(self) -> None:
        try:
            self._process.wait(2.0)
        except subprocess.TimeoutExpired:
            kill_starting(self._process)
            self._process.wait()


def _decode(body: bytes) -> Json:
    try:
        message = json.loads(body)
    except (ValueError, RecursionError):
        message = None
    if not isinstance(message, dict):
        raise _Broken("it sent a reply that the runner doesn't send")
    return message


async def start(limits: Limits, files: Sequence[Path] = ()) -> Session:
    """A session that is ready, with the first interpreter that works inside. Raises `SandboxError` if none does."""
    failure = SandboxError("no Python was found for the sandbox")
    for interpreter in interpreters():
        session = Session(interpreter, limits, files)
        try:
            await session.ready()
        except SandboxError as error:
            failure = error
        except BaseException:
            session.end()
            raise
        else:
            return session
    raise failure


def start_blocking(limits: Limits) -> Session:
    """As `start`, without an event loop."""
    failure = SandboxError("no Python was found for the sandbox")
    for interpreter in interpreters():
        session = Session(interpreter, limits)
        try:
            session.ready_blocking()
        except SandboxError as error:
            failure = error
        else:
            return session
    raise failure
