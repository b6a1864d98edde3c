"""What the python sandbox is made of: bubblewrap's command line, the interpreter inside, its user id.

`tools/sandbox_launch.py` starts it. There is no fallback: where bubblewrap can't work, the error says what to do.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import secrets
import shutil
import site
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from thinkloop.tools import bwrap, seccomp
from thinkloop.traces.events import Json, ThinkloopError

RUNNER = "/runner.py"
_MB = 1024 * 1024
_HIGHEST_UID = 2**31 - 2
_OLDEST_BWRAP = (0, 8)  # the first with --disable-userns
_INSTALL = "Install it with `apt-get install bubblewrap` (Fedora: `dnf install bubblewrap`), or run without"


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
    """A Python for the inside: its path there, the host folder to bind at `/opt/python` if it isn't under /usr, and
    the host folders of installed packages."""

    path: str
    prefix: Path | None = None
    packages: tuple[Path, ...] = ()

    def environment(self) -> dict[str, str]:
        """What it needs to find its own libraries."""
        return {"LD_LIBRARY_PATH": "/opt/python/lib"} if self.prefix else {}

    def binds(self) -> list[str]:
        """bubblewrap's options for its own folder."""
        return ["--ro-bind", str(self.prefix), "/opt/python"] if self.prefix else []


@dataclass(frozen=True, slots=True)
class Descriptors:
    """What bubblewrap is handed by number: the filter, the channel, the info pipe, programs and given files."""

    seccomp: int
    channel: int
    info: int
    programs: Sequence[tuple[int, str]] = ()
    """Descriptor and path inside."""
    copies: Sequence[tuple[int, str]] = ()
    """Descriptor and name in /workspace."""
    bound: Sequence[Path] = ()
    """Files too large to copy, which the inside sees where they are."""


def find_bwrap(tool: str = "python tool") -> str:
    """The path of bubblewrap. Raises `SandboxError`, which names the `tool`, where there is none, or where a sandbox can't
    work at all."""
    if sys.platform != "linux":
        raise SandboxError(
            f"The {tool} needs Linux: its sandbox is bubblewrap, and this is {sys.platform}. Run without it."
        )
    if not seccomp.supported():
        raise SandboxError(f"The {tool} has no system-call filter for {platform.machine()} (x86_64 and aarch64 only).")
    found = shutil.which("bwrap") or shutil.which("bwrap", path="/usr/bin:/bin")
    if not found:
        raise SandboxError(f"The {tool} needs bubblewrap (`bwrap`), which isn't installed. {_INSTALL} the {tool}.")
    return found


@functools.cache
def bwrap_version(path: str) -> str:
    """What `bwrap --version` says, without the name; empty if it can't be run."""
    try:
        result = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=5, env={})
    except (OSError, subprocess.SubprocessError):
        return ""
    return result.stdout.strip().removeprefix("bubblewrap ")


def explain_failure(path: str, message: str, *, tool: str = "python tool", needs: str = "/usr/bin/python3") -> str:
    """One paragraph for a person: what bubblewrap said and what to do next. `needs` is what must be there to run."""
    version = bwrap_version(path)
    said = f"The {tool}'s sandbox did not start. {path} {version} said: {message.strip() or 'nothing'}"
    return f"{said}\n{_advice(version, tool, needs)}"


def _advice(version: str, tool: str, needs: str) -> str:
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
        f"that {needs} exists. Or run without the {tool}."
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
    packages = package_folders()
    system = Interpreter("/usr/bin/python3", packages=packages)
    if not _reachable(prefix) or not (prefix / name).exists():
        return [system]
    if prefix.is_relative_to("/usr"):
        return [Interpreter(str(prefix / name), packages=packages), system]
    return [Interpreter(f"/opt/python/{name}", prefix, packages), system]


def package_folders() -> tuple[Path, ...]:
    """Where this Python's installed packages are (its virtual environment's first), as far as the inside can read."""
    return tuple(path for path in map(Path, site.getsitepackages()) if path.is_dir() and _reachable(path.resolve()))


def readable_inside(path: Path) -> bool:
    """Whether a sandbox's user can read a file or folder of the host where it is; root's gives up its rights beforehand."""
    if os.geteuid() != 0:
        return os.access(path, os.R_OK)
    try:
        need = 0o005 if path.is_dir() else 0o004
        return path.stat().st_mode & need == need and _reachable(path.parent)
    except OSError:
        return False


def _reachable(folder: Path) -> bool:
    if os.geteuid() != 0:
        return os.access(folder, os.R_OK | os.X_OK)
    return all(parent.stat().st_mode & 0o001 for parent in (folder, *folder.parents))


def bwrap_arguments(interpreter: Interpreter, limits: Limits, fds: Descriptors) -> list[str]:
    """Options for `bwrap --args`: namespaces, the read-only system, sized scratch folders, the filter, in order."""
    environment = {"PATH": "/usr/bin:/bin", "HOME": "/workspace", "LANG": "C.UTF-8", "TMPDIR": "/tmp"}
    isolate = bwrap.isolation(environment | interpreter.environment())
    seal = ["--seccomp", str(fds.seccomp), "--info-fd", str(fds.info), "--remount-ro", "/", "--chdir", "/workspace"]
    return [*isolate, *_system(interpreter), *_devices(limits), *_scratch(limits, fds), *seal]


def _system(interpreter: Interpreter) -> list[str]:
    files = bwrap.where_present("/etc/ld.so.cache", "/etc/fonts")  # libraries, and where matplotlib looks for fonts
    arguments = [*bwrap.system(), *files, *interpreter.binds()]
    for folder, inside in zip(interpreter.packages, _packages_inside(interpreter), strict=True):
        if str(folder) != inside:
            arguments += ["--ro-bind", str(folder), inside]
    return arguments


def _packages_inside(interpreter: Interpreter) -> list[str]:
    """Where the inside finds each folder of packages; those under /usr are there already."""
    folders = enumerate(interpreter.packages)
    return [str(path) if path.is_relative_to("/usr") else f"/opt/packages/{index}" for index, path in folders]


def _devices(limits: Limits) -> list[str]:
    """A few harmless devices. Not /dev/zero: shared mappings of it are memory that stays while no process counts it."""
    return [*bwrap.devices("null", "full", "random", "urandom"), *bwrap.scratch("/dev/shm", limits.shm_mb * _MB)]


def _scratch(limits: Limits, fds: Descriptors) -> list[str]:
    """Two folders to write to. Given files are read-only mounts: not even their owner can change or replace them."""
    disk = limits.disk_mb * _MB
    arguments = [*bwrap.scratch("/tmp", disk), *bwrap.scratch("/workspace", disk + _MB)]
    for fd, name in fds.copies:
        arguments += ["--perms", "0444", "--ro-bind-data", str(fd), f"/workspace/{name}"]
    for path in fds.bound:
        arguments += ["--ro-bind", str(path), f"/workspace/{path.name}"]
    for fd, inside in fds.programs:
        arguments += ["--perms", "0444", "--file", str(fd), inside]
    return arguments


def bwrap_command(program: str, interpreter: Interpreter, limits: Limits, args_fd: int, channel_fd: int) -> list[str]:
    """What to execute: /proc/1/cmdline shows it inside, so the host's paths are in the `--args` file instead."""
    settings = runner_settings(limits.rlimits(), _packages_inside(interpreter), lowered=[1])
    python = [interpreter.path, "-I", "-S", "-B", "-X", "utf8", RUNNER, str(channel_fd), json.dumps(settings)]
    return [program, "--args", str(args_fd), "--", *python]


def runner_settings(rlimits: dict[str, int], packages: Sequence[str] = (), lowered: Sequence[int] = ()) -> Json:
    """What the runner is told. `packages` are for the Python version of this process only; `lowered` are processes
    besides the runner itself that get the limits."""
    version = list(sys.version_info[:2])
    return {"rlimits": rlimits, "lowered": list(lowered), "packages": list(packages), "version": version}
