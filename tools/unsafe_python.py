"""The python tool without a sandbox, for those who ask for it by name: the same runner as an ordinary process.

It can do all that the user of this process can. What remains is meant against accidents only: an empty environment, a
temporary folder, resource limits, the watchdog over memory, the time limit, and an end with the run.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import ClassVar

from thinkloop.tools.process_tree import kill_all, process_tree, signal_group
from thinkloop.tools.sandbox import Interpreter, Limits, SandboxError, runner_settings
from thinkloop.tools.sandbox_launch import COPY_CAP, Launched
from thinkloop.tools.sandbox_session import Session

WARNING = (
    "WARNING: this python runs WITHOUT A SANDBOX (unsafe). What the model writes can read, change and send "
    "everything that you can."
)
_UNCOUNTED = ("NPROC", "SIGPENDING")  # these count all that the user runs, not only what a session runs
_PASSES = 3  # over the process tree, for what forks meanwhile


class UnsafeSession(Session):
    """A session whose process is an ordinary child of this one. Linux only, like the one it stands in for."""

    isolation: ClassVar[str] = "none"

    def end(self) -> None:
        super().end()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _launch(self, files: Sequence[Path]) -> Launched:
        self._folder = Path(tempfile.mkdtemp(prefix="thinkloop-python-"))
        try:
            return _launch(self.interpreter, self.limits, files, self._folder)
        except BaseException:
            shutil.rmtree(self._folder, ignore_errors=True)
            raise

    def _processes(self) -> tuple[int, int]:
        return self._process.pid, self._process.pid

    def _explain(self, said: str) -> str:
        return f"The python tool's process did not start. {self.interpreter.path} said: {said.strip()}"

    def _has_ended(self) -> bool:
        """Without collecting the process, whose number also names its group as long as it isn't collected."""
        with suppress(ChildProcessError):
            return os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        return True

    def _kill(self) -> None:
        """Stopped first, the process keeps its descendants, so that they can be found; then its group, which is what is
        left where it has ended by itself."""
        if self._process.returncode is not None:
            return
        with suppress(ProcessLookupError):
            os.kill(self._process.pid, signal.SIGSTOP)
        for _ in range(_PASSES):
            kill_all(pid for pid in process_tree(self._process.pid) if pid != self._process.pid)
        signal_group(self._process.pid)


def _launch(interpreter: Interpreter, limits: Limits, files: Sequence[Path], folder: Path) -> Launched:
    workspace, scratch = folder / "workspace", folder / "tmp"
    workspace.mkdir()
    scratch.mkdir()
    _give(files, workspace)
    with ExitStack() as kept, ExitStack() as handed:
        channel, guest = socket.socketpair()
        kept.callback(channel.close)
        handed.callback(guest.close)
        output, output_end = os.pipe()
        kept.callback(os.close, output)
        handed.callback(os.close, output_end)
        process = _popen(_command(interpreter, limits, guest.fileno()), output_end, guest.fileno(), workspace, scratch)
        kept.pop_all()
        return Launched(process, channel, output)


def _command(interpreter: Interpreter, limits: Limits, channel_fd: int) -> list[str]:
    rlimits = {name: value for name, value in limits.rlimits().items() if name not in _UNCOUNTED}
    settings = json.dumps({**runner_settings(rlimits), "host": os.getpid()})
    runner = Path(__file__).with_name("sandbox_runner.py")
    return [interpreter.path, "-I", "-B", "-X", "utf8", str(runner), str(channel_fd), settings]


def _popen(command: list[str], output: int, channel: int, workspace: Path, scratch: Path) -> subprocess.Popen[bytes]:
    environment = {"PATH": os.environ.get("PATH", "/usr/bin:/bin"), "LANG": "C.UTF-8"}
    environment |= {"HOME": str(workspace), "TMPDIR": str(scratch)}
    try:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment, cwd=workspace,
            pass_fds=[channel], start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        raise SandboxError(f"The python tool's process can't be started: {error}") from error


def _give(files: Sequence[Path], workspace: Path) -> None:
    """Copies, read-only as far as that goes here; a link to what is too large to copy."""
    for path in files:
        target = workspace / path.name
        try:
            if path.stat().st_size > COPY_CAP:
                target.symlink_to(path)
            else:
                shutil.copyfile(path, target)
                target.chmod(0o444)
        except OSError as error:
            raise SandboxError(f"{path} can't be given to the python tool: {error.strerror}.") from error


async def start_unsafe(limits: Limits, files: Sequence[Path] = ()) -> Session:
    """A session that is ready, with this process's own Python. Raises `SandboxError` if it can't be had."""
    if sys.platform != "linux":
        raise SandboxError(f"The python tool needs Linux even without its sandbox, and this is {sys.platform}.")
    session = UnsafeSession(Interpreter(sys.executable), limits, files)
    try:
        await session.ready()
    except SandboxError:
        raise
    except BaseException:
        session.end()
        raise
    return session
