"""One living sandbox: started, asked to run cells and to hand over files, interrupted, ended.

Files come out as bytes that the runner reads inside and sends in frames. The host opens nothing in there, so links, pipes,
devices and files swapped while they are read can't be turned against it.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import time
from binascii import Error as Base64Error
from binascii import a2b_base64
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import anyio
import anyio.to_thread
from thinkloop.tools.process_tree import process_tree
from thinkloop.tools.sandbox import Interpreter, Limits, SandboxError, explain_failure, find_bwrap, interpreters
from thinkloop.tools.sandbox_channel import Broken, Channel, Printed
from thinkloop.tools.sandbox_launch import Launched, kill_starting, launch
from thinkloop.tools.sandbox_limits import Watchdog, delegated_cgroup, join_cgroup, leave_cgroup
from thinkloop.traces.events import Json

GRACE = 1.0  # seconds between the interrupt and the end
START_SECONDS = 10.0
PIECE = 1 << 20  # bytes of a file that are asked for at a time
PIECE_SECONDS = 5.0
FLOOD = 64 * 1024 * 1024  # bytes of output after which a cell is stopped
_LISTED = 200  # more pictures or files than the runner ever names

Stop = Literal["", "time", "output"]


class _Flood(Exception):
    """A cell printed more than `FLOOD` bytes."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What the runner claims: the value's `repr` or the error's traceback, and what the cell drew and wrote."""

    value: str | None = None
    error: str | None = None
    pictures: tuple[tuple[str, int], ...] = ()
    """Extension (`png`, `svg`) and size in bytes; a picture is asked for by its index."""
    files: tuple[tuple[str, int], ...] = ()
    """Path in the working folder and size in bytes of what is new or changed."""
    more: int = 0
    """Changed files that aren't named."""


@dataclass(frozen=True, slots=True)
class Cell:
    """What became of one cell. `stop` says why it was cut short; `lost`, why the variables are gone (empty: kept)."""

    number: int
    printed: Printed
    reply: Reply
    stop: Stop = ""
    lost: str = ""
    seconds: float = 0.0


class Session:
    """A sandboxed Python process with its variables, from `start` to `end`. See `launch` for which thread to use."""

    isolation: ClassVar[str] = "bubblewrap"

    def __init__(self, interpreter: Interpreter, limits: Limits, files: Sequence[Path] = ()) -> None:
        self.interpreter, self.limits, self.python, self.sum_limit, self.cells = interpreter, limits, "", "watchdog", 0
        self.runner = 0
        """The runner's process, by the host's number; 0 until it is ready."""
        self._lost, self._ended = "", False
        self._pidfds: list[int] = []  # of what to kill, then of what to interrupt
        self._stop: Stop = ""
        self._watchdog: Watchdog | None = None
        self._cgroup: Path | None = None
        launched = self._launch(files)
        self._process, self._info = launched.process, launched.info
        self._channel = Channel(launched.channel, launched.output)

    @property
    def lost(self) -> str:
        """Why this session can't be used any more; empty while it can."""
        if not self._lost and self._has_ended():
            self._lose("the Python process ended")
        return self._lost

    async def ready(self) -> None:
        """Wait until it can run cells; later calls return at once. Raises `SandboxError`; the session is over then."""
        try:
            with anyio.fail_after(START_SECONDS):
                while not self.python and not self._greeted():
                    await self._channel.readable()
        except (TimeoutError, Broken) as error:
            raise await anyio.to_thread.run_sync(self._failure, error) from None

    def ready_blocking(self) -> None:
        """As `ready`, without an event loop."""
        until = time.monotonic() + START_SECONDS
        try:
            while not self._greeted():
                if not self._channel.readable_within(until - time.monotonic()):
                    raise Broken
        except Broken as error:
            raise self._failure(error) from None

    async def execute(self, code: str, timeout: float) -> Cell:
        """Run one cell for at most `timeout` seconds, then interrupt it, then (after `GRACE`) end the session.

        Cancelling interrupts the cell the same way, and `lost` tells whether the variables survived.
        """
        self.cells += 1
        self._channel.printed, started, reply = Printed(), time.perf_counter(), Reply()
        try:
            reply = _reply(await self._ask({"cell": self.cells, "code": code}, timeout))
        except Broken as error:
            self._lose(str(error))
        finally:
            self._channel.drain()
        seconds = time.perf_counter() - started
        return Cell(self.cells, self._channel.printed, reply, self._stop, self._lost, seconds)

    async def piece(self, what: int | str, offset: int) -> bytes:
        """Up to `PIECE` bytes of a picture (by index) or a file (by path) that the last reply named.

        Empty at its end, and where it is gone or the session was lost. The bytes are what the inside says they are.
        """
        try:
            message = await self._ask({"take": what, "offset": offset, "size": PIECE}, PIECE_SECONDS)
            data = a2b_base64(message.get("data", ""), strict_mode=True)
            if len(data) > PIECE:
                raise Broken("it sent a reply that the runner doesn't send")
        except (Broken, Base64Error, TypeError, ValueError) as error:
            self._lose(str(error) if isinstance(error, Broken) else "it sent a reply that the runner doesn't send")
            return b""
        return data

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
        self._channel.close()
        for fd in (self._info, *self._pidfds):
            if fd >= 0:
                os.close(fd)

    # Starting

    def _launch(self, files: Sequence[Path]) -> Launched:
        self._bwrap = find_bwrap()
        return launch(self._bwrap, self.interpreter, self.limits, files)

    def _greeted(self) -> bool:
        """Whether the runner has said hello, which is before any user code runs; then take hold of its processes."""
        self._channel.pump()
        message = self._channel.take_frame()
        if message is None:
            return False
        self._take_hold()
        self.python = str(message.get("python", "?"))[:20]
        return True

    def _take_hold(self) -> None:
        try:
            inside, self.runner = self._processes()
            self._pidfds += [os.pidfd_open(inside), os.pidfd_open(self.runner)]
        except (OSError, ValueError, LookupError) as error:
            raise Broken(f"its processes can't be seen in /proc ({error})") from error
        self._channel.watch(self._pidfds[1])
        if group := delegated_cgroup():
            pids = list(process_tree(self._process.pid))
            self._cgroup = join_cgroup(group, pids, self.limits.total_bytes, self.limits.processes + 8)
            self.sum_limit = "cgroup" if self._cgroup else "watchdog"
        self._watchdog = Watchdog(inside, self.limits.total_bytes, self._lose)
        self._watchdog.start()

    def _processes(self) -> tuple[int, int]:
        """Pid 1 of the inside, and the runner, by the host's numbers."""
        inside = int(json.loads(os.read(self._info, 4096))["child-pid"])
        return inside, int(Path(f"/proc/{inside}/task/{inside}/children").read_text().split()[0])

    def _failure(self, error: Exception) -> SandboxError:
        self._reap()
        self._channel.drain()
        said = self._channel.printed.parts()[0] or str(error) or f"no answer after {START_SECONDS:.0f} s"
        self.end()
        return SandboxError(self._explain(said))

    def _explain(self, said: str) -> str:
        return explain_failure(self._bwrap, said)

    # One request

    async def _ask(self, request: Json, timeout: float) -> Json:
        """The runner's answer within `timeout` seconds, or within `GRACE` of being interrupted; `Broken` if none comes."""
        nonce = secrets.token_hex(16)
        self._pace(busy=True)
        try:
            return await self._exchange({"nonce": nonce, **request}, nonce, timeout)
        finally:
            self._pace(busy=False)

    async def _exchange(self, request: Json, nonce: str, timeout: float) -> Json:
        self._stop = ""
        try:
            with anyio.move_on_after(timeout):
                await self._channel.send(request)
                return await self._receive(nonce)
            self._stop = "time"
        except _Flood:
            self._stop = "output"
        except anyio.get_cancelled_exc_class():
            await self._settle_cancelled(nonce)
            raise
        return await self._settle(nonce)

    async def _settle(self, nonce: str) -> Json:
        """Interrupt the cell and wait for its reply; `Broken` if none comes."""
        self._signal(signal.SIGINT)
        with anyio.move_on_after(GRACE, shield=True):
            return await self._receive(nonce, flood=False)
        raise Broken("it did not stop when interrupted")

    async def _settle_cancelled(self, nonce: str) -> None:
        try:
            await self._settle(nonce)
        except Broken as error:
            self._lose(str(error))

    async def _receive(self, nonce: str, flood: bool = True) -> Json:
        while (message := self._channel.take_frame()) is None:
            await self._channel.readable()
            self._channel.pump()
            if flood and self._channel.printed.total > FLOOD:
                raise _Flood
        if message.get("nonce") != nonce or self._channel.buffer:
            raise Broken("it sent a reply that the runner doesn't send")
        return message

    # Ending

    def _pace(self, busy: bool) -> None:
        if self._watchdog:
            self._watchdog.watch(busy)

    def _has_ended(self) -> bool:
        return self._process.poll() is not None

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


def _reply(message: Json) -> Reply:
    """The answer to a cell, checked for shape. Raises `Broken`."""
    value, error, more = message.get("value"), message.get("error"), message.get("more", 0)
    if not all(text is None or isinstance(text, str) for text in (value, error)) or type(more) is not int:
        raise Broken("it sent a reply that the runner doesn't send")
    return Reply(value, error, _named(message.get("pictures", [])), _named(message.get("files", [])), more)


def _named(rows: Any) -> tuple[tuple[str, int], ...]:
    if not isinstance(rows, list) or len(rows) > _LISTED or not all(map(_is_named, rows)):
        raise Broken("it sent a reply that the runner doesn't send")
    return tuple((name, size) for name, size in rows)


def _is_named(row: Any) -> bool:
    return isinstance(row, list) and len(row) == 2 and isinstance(row[0], str) and type(row[1]) is int and row[1] >= 0


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
