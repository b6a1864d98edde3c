"""How the python sandbox is built: bubblewrap's command line, the interpreter inside, its user id.

`tools/sandbox_session.py` runs it. There is no fallback: where bubblewrap can't work, the error says what to do.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import secrets
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from thinkloop.tools import seccomp
from thinkloop.tools.sandbox_limits import process_tree
from thinkloop.traces.events import ThinkloopError

_MB = 1024 * 1024
_HIGHEST_UID = 2**31 - 2
_OLDEST_BWRAP = (0, 8)  # the first with --disable-userns
_INSTALL = (
    "Install it with `apt-get install bubblewrap` (Fedora: `dnf install bubblewrap`), or run without the python tool."
)


class SandboxError(ThinkloopError):
    """The sandbox can't be started; the message quotes bubblewrap and names the fix."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one session. `memory_mb` holds for each process and, by watchdog or cgroup, for all together."""

    memory_mb: int = 512
    processes: int = 64
    open_files: int = 64
    disk_mb: int = 64
    """Of /tmp and of /workspace, each; also the largest file."""
    shm_mb: int = 16
    cpu_seconds: int = 3600
    """Of one process over the whole session; a cell is bounded by its timeout."""

    @property
    def total_bytes(self) -> int:
        """Of all processes together: 64 MB above one process's, so that one alone meets MemoryError, not the end."""
        return (self.memory_mb + 64) * _MB

    def rlimits(self) -> dict[str, int]:
        """By name without `RLIMIT_`. AS bounds page tables, SIGPENDING timers, NOFILE uncounted socket buffers."""
        memory, file = self.memory_mb * _MB, self.disk_mb * _MB
        sizes = {"DATA": memory, "AS": memory + 1024 * _MB, "FSIZE": file, "CORE": 0, "MEMLOCK": 0, "MSGQUEUE": 0}
        return {**sizes, "NPROC": self.processes, "NOFILE": self.open_files, "CPU": self.cpu_seconds, "SIGPENDING": 256}


@dataclass(frozen=True, slots=True)
class Interpreter:
    """A Python for the inside: its path there, and the host folder to bind at `/opt/python` if it isn't under /usr."""

    path: str
    prefix: Path | None = None


@dataclass(frozen=True, slots=True)
class Descriptors:
    """What bubblewrap is handed, by number: the runner's text, the filter, the channel, the info pipe, files."""

    runner: int
    seccomp: int
    channel: int
    info: int
    files: Sequence[tuple[int, str, int]] = ()
    """Descriptor, name in /workspace, size in bytes."""


def find_bwrap() -> str:
    """The path of bubblewrap. Raises `SandboxError` where there is none, or where the sandbox can't work at all."""
    if sys.platform != "linux":
        raise SandboxError(
            f"The python tool needs Linux: its sandbox is bubblewrap, and this is {sys.platform}. Run without it."
        )
    if not seccomp.supported():
        raise SandboxError(
            f"The python tool has no system-call filter for {platform.machine()} (x86_64 and aarch64 only)."
        )
    found = shutil.which("bwrap") or shutil.which("bwrap", path="/usr/bin:/bin")
    if not found:
        raise SandboxError(f"The python tool needs bubblewrap (`bwrap`), which isn't installed. {_INSTALL}")
    return found


@functools.cache
def bwrap_version(path: str) -> str:
    """What `bwrap --version` says, without the name; empty if it can't be run."""
    try:
        result = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=5, env={})
    except (OSError, subprocess.SubprocessError):
        return ""
    return result.stdout.strip().removeprefix("bubblewrap ")


def explain_failure(path: str, message: str) -> str:
    """One paragraph for a person: what bubblewrap said and what to do next."""
    version = bwrap_version(path)
    said = f"The python tool's sandbox did not start. {path} {version} said: {message.strip() or 'nothing'}"
    return f"{said}\n{_advice(version)}"


def _advice(version: str) -> str:
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if numbers and numbers < _OLDEST_BWRAP:
        return "It is too old: version 0.8 or newer is needed."
    if _sysctl("kernel/apparmor_restrict_unprivileged_userns") == "1":
        return (
            "AppArmor forbids user namespaces here. Allow them for bubblewrap: write to /etc/apparmor.d/bwrap\n"
            "  abi <abi/4.0>,\n  include <tunables/global>\n"
            "  profile bwrap /usr/bin/bwrap flags=(unconfined) { userns, }\n"
            "and run `apparmor_parser -r /etc/apparmor.d/bwrap` as root."
        )
    if _sysctl("kernel/unprivileged_userns_clone") == "0":
        return "User namespaces are switched off: run `sysctl -w kernel.unprivileged_userns_clone=1` as root."
    if _sysctl("user/max_user_namespaces") == "0":
        return "User namespaces are switched off: run `sysctl -w user.max_user_namespaces=10000` as root."
    return (
        "If this is a container, let it make user namespaces (Docker: `--security-opt seccomp=unconfined "
        "--security-opt apparmor=unconfined --security-opt systempaths=unconfined`); otherwise check "
        "that /usr/bin/python3 exists. Or run without the python tool."
    )


def _sysctl(name: str) -> str:
    try:
        return Path("/proc/sys", name).read_text().strip()
    except OSError:
        return ""


def fresh_uid() -> int | None:
    """As root, a high user id that nothing else is likely to have, within what is mapped here; otherwise `None`."""
    if os.geteuid() != 0:
        return None
    rows = [line.split() for line in Path("/proc/self/uid_map").read_text().splitlines()]
    end = min(max(int(first) + int(count) for first, _, count in rows), _HIGHEST_UID)
    return end - 1 - secrets.randbelow(max(1, min(1 << 20, end // 2)))


def interpreters() -> list[Interpreter]:
    """Pythons that may work inside: the one running now if the sandbox's user can reach it, then the system's."""
    prefix, name = Path(sys.base_prefix).resolve(), f"bin/python{sys.version_info.major}.{sys.version_info.minor}"
    system = Interpreter("/usr/bin/python3")
    if not _reachable(prefix) or not (prefix / name).exists():
        return [system]
    if prefix.is_relative_to("/usr"):
        return [Interpreter(str(prefix / name)), system]
    return [Interpreter(f"/opt/python/{name}", prefix), system]


def _reachable(folder: Path) -> bool:
    if os.geteuid() != 0:
        return os.access(folder, os.R_OK | os.X_OK)
    return all(parent.stat().st_mode & 0o001 for parent in (folder, *folder.parents))


def bwrap_arguments(interpreter: Interpreter, limits: Limits, fds: Descriptors) -> list[str]:
    """Options for `bwrap --args`: namespaces, the read-only system, sized scratch folders, the filter, in order."""
    # fmt: off
    isolate = ["--unshare-all", "--unshare-user", "--disable-userns", "--new-session", "--die-with-parent",
               "--cap-drop", "ALL", "--uid", "1000", "--gid", "1000", "--hostname", "sandbox", "--clearenv"]
    # fmt: on
    environment = {"PATH": "/usr/bin:/bin", "HOME": "/workspace", "LANG": "C.UTF-8", "TMPDIR": "/tmp"}
    if interpreter.prefix:
        environment["LD_LIBRARY_PATH"] = "/opt/python/lib"
    for key, value in environment.items():
        isolate += ["--setenv", key, value]
    seal = ["--seccomp", str(fds.seccomp), "--info-fd", str(fds.info), "--remount-ro", "/", "--chdir", "/workspace"]
    return [*isolate, *_system(interpreter), *_devices(limits), *_scratch(limits, fds), *seal]


def _system(interpreter: Interpreter) -> list[str]:
    arguments = [
        "--ro-bind",
        "/usr",
        "/usr",
        "--ro-bind-try",
        "/etc/ld.so.cache",
        "/etc/ld.so.cache",
        "--proc",
        "/proc",
    ]
    for name in ("bin", "sbin", "lib", "lib32", "lib64", "libx32"):
        path = Path("/", name)
        if path.is_symlink():
            arguments += ["--symlink", str(path.readlink()), str(path)]
        elif path.is_dir():
            arguments += ["--ro-bind", str(path), str(path)]
    if interpreter.prefix:
        arguments += ["--ro-bind", str(interpreter.prefix), "/opt/python"]
    return arguments


def _devices(limits: Limits) -> list[str]:
    """A few harmless devices. Not /dev/zero: shared mappings of it are memory that stays while no process counts it."""
    arguments = ["--dir", "/dev"]
    for name in ("null", "full", "random", "urandom"):
        arguments += ["--dev-bind", f"/dev/{name}", f"/dev/{name}"]
    for name, target in (("fd", "fd"), ("stdin", "fd/0"), ("stdout", "fd/1"), ("stderr", "fd/2")):
        arguments += ["--symlink", f"/proc/self/{target}", f"/dev/{name}"]
    return [*arguments, "--size", str(limits.shm_mb * _MB), "--tmpfs", "/dev/shm"]


def _scratch(limits: Limits, fds: Descriptors) -> list[str]:
    disk, given = limits.disk_mb * _MB, sum(size for _, _, size in fds.files)
    arguments = ["--size", str(disk), "--tmpfs", "/tmp", "--size", str(disk + given + _MB), "--tmpfs", "/workspace"]
    for fd, name, _ in fds.files:
        arguments += ["--perms", "0644", "--file", str(fd), f"/workspace/{name}"]
    return [*arguments, "--perms", "0444", "--file", str(fds.runner), "/runner.py"]


def bwrap_command(bwrap: str, interpreter: Interpreter, limits: Limits, args_fd: int, channel_fd: int) -> list[str]:
    """What to execute: /proc/1/cmdline shows it inside, so the host's paths are in the `--args` file instead."""
    python = [
        interpreter.path,
        "-I",
        "-S",
        "-B",
        "-X",
        "utf8",
        "/runner.py",
        str(channel_fd),
        json.dumps(limits.rlimits()),
    ]
    return [bwrap, "--args", str(args_fd), "--", *python]


@dataclass(frozen=True, slots=True)
class Launched:
    """A bubblewrap that is starting, and the host's ends: to talk, to read its output, to learn its pid."""

    process: subprocess.Popen[bytes]
    channel: socket.socket
    output: int
    info: int


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
        copies = [_open_file(path, handed) for path in files]
        runner = _in_memory(Path(__file__).with_name("sandbox_runner.py").read_bytes(), handed)
        fds = Descriptors(runner, _in_memory(seccomp.build_filter(), handed), guest.fileno(), info_end, copies)
        arguments = "\0".join(bwrap_arguments(interpreter, limits, fds)).encode()
        args_fd = _in_memory(arguments, handed)
        command = bwrap_command(bwrap, interpreter, limits, args_fd, fds.channel)
        passed = [args_fd, fds.runner, fds.seccomp, fds.channel, fds.info, *(fd for fd, _, _ in copies)]
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
        for pid in list(process_tree(process.pid)):
            os.kill(pid, signal.SIGKILL)


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


def _in_memory(data: bytes, stack: ExitStack) -> int:
    fd = os.memfd_create("thinkloop")
    stack.callback(os.close, fd)
    os.write(fd, data)
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def _open_file(path: Path, stack: ExitStack) -> tuple[int, str, int]:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise SandboxError(f"{path} can't be copied into the sandbox: {error.strerror}.") from error
    stack.callback(os.close, fd)
    return fd, path.name, os.fstat(fd).st_size
