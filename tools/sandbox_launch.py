"""Starting the python sandbox: bubblewrap with its descriptors and nothing else of ours, and ending one half started."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from thinkloop.tools import seccomp
from thinkloop.tools.bwrap import in_memory
from thinkloop.tools.process_tree import kill_all, process_tree
from thinkloop.tools.sandbox import (
    RUNNER,
    Descriptors,
    Interpreter,
    Limits,
    SandboxError,
    bwrap_arguments,
    bwrap_command,
    explain_failure,
    fresh_uid,
)

COPY_CAP = 64 << 20
"""Bytes of a given file up to which the inside gets a copy, which needs no rights there; a larger one is bound."""

PROGRAMS = {RUNNER: "sandbox_runner.py", "/sandbox_figures.py": "sandbox_figures.py"}
"""Path inside, and the file beside this one."""


@dataclass(frozen=True, slots=True)
class Launched:
    """A sandbox that is starting, and the host's ends: to talk, to read its output, to learn its pid (-1: none)."""

    process: subprocess.Popen[bytes]
    channel: socket.socket
    output: int
    info: int = -1


def launch(bwrap: str, interpreter: Interpreter, limits: Limits, files: Sequence[Path]) -> Launched:
    """Start bubblewrap; it and the runner come up on their own. Raises `SandboxError`.

    Call it in a thread that lives as long as the sandbox: the kernel's parent-death signal, which ends the sandbox when
    thinkloop dies, is sent when the starting thread ends.
    """
    with ExitStack() as kept, ExitStack() as handed:
        channel, guest = socket.socketpair()
        kept.callback(channel.close)
        handed.callback(guest.close)
        output, output_end = _pipe(kept, handed)
        info, info_end = _pipe(kept, handed)
        copies, bound = _given(files, handed)
        programs = [(in_memory(_text(name), handed), path) for path, name in PROGRAMS.items()]
        filter_fd = in_memory(seccomp.build_filter(), handed)
        fds = Descriptors(filter_fd, guest.fileno(), info_end, programs, copies, bound)
        arguments = "\0".join(bwrap_arguments(interpreter, limits, fds)).encode()
        args_fd = in_memory(arguments, handed)
        command = bwrap_command(bwrap, interpreter, limits, args_fd, fds.channel)
        passed = [args_fd, fds.seccomp, fds.channel, fds.info, *(fd for fd, _ in (*programs, *copies))]
        process = _popen(command, output_end, passed)
        kept.pop_all()
        return Launched(process, channel, output, info)


def kill_starting(process: subprocess.Popen[bytes]) -> None:
    """Kill a bubblewrap that may still be setting up, and its child, which asks to die with its parent only later.

    Killing bubblewrap alone would leave the child waiting for it for ever; so stop it first: then nothing is missed.
    """
    with suppress(ProcessLookupError, ChildProcessError):
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        kill_all(list(process_tree(process.pid)))


def _popen(command: list[str], output: int, passed: list[int]) -> subprocess.Popen[bytes]:
    """With no environment, because pid 1 inside keeps showing it, and not in the group that Ctrl-C signals."""
    uid = fresh_uid()
    try:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={},
            cwd="/",
            pass_fds=passed,
            start_new_session=True,
            user=uid,
            group=uid,
            extra_groups=None if uid is None else [],
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise SandboxError(explain_failure(command[0], str(error))) from error


def _pipe(kept: ExitStack, handed: ExitStack) -> tuple[int, int]:
    ours, theirs = os.pipe()
    kept.callback(os.close, ours)
    handed.callback(os.close, theirs)
    return ours, theirs


def _text(name: str) -> bytes:
    return Path(__file__).with_name(name).read_bytes()


def _given(files: Sequence[Path], stack: ExitStack) -> tuple[list[tuple[int, str]], list[Path]]:
    """Descriptors of files to copy with their names, and files to bind."""
    opened = [(_open(path, stack), path) for path in files]
    copies = [(fd, path.name) for fd, path in opened if os.fstat(fd).st_size <= COPY_CAP]
    return copies, [path for fd, path in opened if os.fstat(fd).st_size > COPY_CAP]


def _open(path: Path, stack: ExitStack) -> int:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise SandboxError(f"{path} can't be given to the sandbox: {error.strerror}.") from error
    stack.callback(os.close, fd)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        raise SandboxError(f"{path} can't be given to the sandbox: it is not a regular file any more.")
    return fd
