"""A stdio MCP server inside bubblewrap: no network, no home, the system and the command's own files read-only.

What the command needs is found from the command: the folders its program is installed in (followed through links and
virtual environments), files and folders that it names by full path, and the current folder. All of that can be read
inside; nothing of it can be written. /tmp and the home folder are empty and sized.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import anyio
import anyio.to_thread
from thinkloop.tools import seccomp
from thinkloop.tools.mcp_messages import Fault
from thinkloop.tools.mcp_process import Launch, ServerStartError
from thinkloop.tools.sandbox import SandboxError, find_bwrap, fresh_uid
from thinkloop.tools.sandbox_limits import IDLE_POLL, over_limit, process_tree

_MB = 1 << 20
_TMP = 256 * _MB
_HOME = "/home/server"
MEMORY = 2048 * _MB
"""Of all the server's processes together; JavaScript servers start at some 100 MB."""
_LIMITS = ("--nproc=256", "--nofile=1024", "--core=0", "--memlock=0", "--msgqueue=0", f"--fsize={_TMP}")
_SYSTEM = ("/etc/ld.so.cache", "/etc/alternatives", "/etc/localtime", "/etc/mime.types")
_OWN_FOLDERS = frozenset(
    {"/", "/bin", "/dev", "/etc", "/home", "/lib", "/lib64", "/proc", "/root", "/run", "/sbin", "/sys", "/tmp", "/usr"}
)


def sandboxed(program: str, arguments: Sequence[str], env: Mapping[str, str], stack: ExitStack) -> Launch:
    """bubblewrap round the command. `stack` closes what is handed over. Raises `ServerStartError` for what can't be
    reached inside."""
    try:
        bwrap = find_bwrap()
    except SandboxError as error:
        raise ServerStartError(
            f"its sandbox can't be made: {str(error).replace('The python tool', 'A sandbox')}"
        ) from error
    uid = fresh_uid()
    shown = list(_shown(program, arguments, uid))
    _check_reachable(program, shown, uid)
    inside = ["/usr/bin/prlimit", *_LIMITS, "--", program, *arguments]
    seccomp_fd = _in_memory(seccomp.build_filter(), stack)
    options = [*_isolation(env), *_system(), *_binds(shown), "--seccomp", str(seccomp_fd), *_seal(shown)]
    args_fd = _in_memory("\0".join(options).encode(), stack)
    # bwrap itself gets no environment: /proc/1/environ would show it inside.
    return Launch([bwrap, "--args", str(args_fd), "--", *inside], {}, "/", (args_fd, seccomp_fd), uid)


async def watch_memory(pid: int, fault: Fault) -> None:
    """Call `fault` once the processes inside together hold more than `MEMORY`."""
    while not (below := list(process_tree(pid))[1:2]):
        await anyio.sleep(IDLE_POLL)
    while not await anyio.to_thread.run_sync(over_limit, below[0], MEMORY):
        await anyio.sleep(IDLE_POLL)
    fault(f"it used more than {MEMORY // _MB:,} MB of memory")


def _isolation(env: Mapping[str, str]) -> list[str]:
    # fmt: off
    options = ["--unshare-all", "--unshare-user", "--disable-userns", "--new-session", "--die-with-parent",
               "--cap-drop", "ALL", "--uid", "1000", "--gid", "1000", "--hostname", "sandbox", "--clearenv"]
    # fmt: on
    for key, value in {"PATH": os.environ.get("PATH", os.defpath), "HOME": _HOME, "LANG": "C.UTF-8", **env}.items():
        options += ["--setenv", key, value]
    return options


def _system() -> list[str]:
    options = ["--ro-bind", "/usr", "/usr", "--proc", "/proc", "--dir", "/dev"]
    for name in ("bin", "sbin", "lib", "lib32", "lib64", "libx32"):
        path = Path("/", name)
        if path.is_symlink():
            options += ["--symlink", str(path.readlink()), str(path)]
        elif path.is_dir():
            options += ["--ro-bind", str(path), str(path)]
    for path in map(Path, _SYSTEM):
        options += ["--ro-bind-try", str(path), str(path)]
    for device in ("null", "zero", "full", "random", "urandom"):
        options += ["--dev-bind", f"/dev/{device}", f"/dev/{device}"]
    for name, target in (("fd", "fd"), ("stdin", "fd/0"), ("stdout", "fd/1"), ("stderr", "fd/2")):
        options += ["--symlink", f"/proc/self/{target}", f"/dev/{name}"]
    for folder, size in (("/dev/shm", 64 * _MB), ("/tmp", _TMP), (_HOME, _TMP)):
        options += ["--size", str(size), "--tmpfs", folder]
    return options


def _binds(shown: Sequence[Path]) -> list[str]:
    """Outer folders first, so that an inner one isn't covered."""
    return [part for path in sorted(shown) for part in ("--ro-bind", str(path), str(path))]


def _seal(shown: Sequence[Path]) -> list[str]:
    here = Path.cwd()
    start = str(here) if any(here.is_relative_to(path) for path in shown) else _HOME
    return ["--remount-ro", "/", "--chdir", start]


def _shown(program: str, arguments: Sequence[str], uid: int | None) -> Iterator[Path]:
    """Folders and files outside the system that the command may read."""
    found = [*_installed(Path(program)), *_named(arguments)]
    here = Path.cwd()
    if str(here) not in _OWN_FOLDERS and here != Path.home() and _reachable(here, uid):
        found.append(here)
    for path in dict.fromkeys(found):
        if not path.is_relative_to("/usr"):
            yield path


def _installed(program: Path) -> Iterator[Path]:
    """Where a program is installed: for each link on the way to it, the folder above `bin`, else the file itself; and the
    base of a virtual environment."""
    for path in _link_chain(program.absolute()):
        prefix = path.parent.parent
        own = str(prefix) in _OWN_FOLDERS or prefix in (Path.home(), Path.home() / ".local")
        whole = path.parent.name in ("bin", "sbin") and not own
        yield prefix if whole else path
        yield from _interpreter_of(path)


def _interpreter_of(script: Path) -> Iterator[Path]:
    """The interpreter that a script's first line names, with where that is installed."""
    if script.is_symlink():
        return
    with script.open("rb") as file:
        first = file.readline(512)
    words = first[2:].decode(errors="replace").split() if first.startswith(b"#!") else []
    if words and words[0].endswith("/env"):
        words = [found] if len(words) > 1 and (found := shutil.which(words[1])) else []
    if words and Path(words[0]).is_file() and Path(words[0]) != script and not words[0].startswith(("/usr/", "/bin/")):
        yield from _installed(Path(words[0]))


def _link_chain(path: Path) -> Iterator[Path]:
    for _ in range(40):
        yield path
        if not path.is_symlink():
            break
        path = Path(os.path.normpath(path.parent / path.readlink()))
    yield path.resolve()


def _named(arguments: Sequence[str]) -> Iterator[Path]:
    for argument in arguments:
        path = Path(os.path.normpath(argument))
        if path.is_absolute() and str(path) not in _OWN_FOLDERS and os.path.lexists(path):
            yield path


def _check_reachable(program: str, shown: Sequence[Path], uid: int | None) -> None:
    if not Path("/usr/bin/prlimit").exists():
        raise ServerStartError("its sandbox needs `prlimit`, of the package util-linux; install that")
    for path in shown:
        if not _reachable(path, uid):
            raise ServerStartError(
                f"its sandbox, whose user has no rights but everyone's, can't read {path}, which {program!r} needs; "
                "install it where all may read (/opt, /usr/local, a virtual environment made by the system's Python), "
                "or run it without `sandbox`"
            )


def _reachable(path: Path, uid: int | None) -> bool:
    """Whether the sandbox's user can get at `path`."""
    if uid is None:
        return os.access(path, os.R_OK)
    try:
        need = 0o005 if path.is_dir() else 0o004
        return path.stat().st_mode & need == need and all(parent.stat().st_mode & 0o001 for parent in path.parents)
    except OSError:
        return False


def _in_memory(data: bytes, stack: ExitStack) -> int:
    fd = os.memfd_create("thinkloop")
    stack.callback(os.close, fd)
    os.write(fd, data)
    os.lseek(fd, 0, os.SEEK_SET)
    return fd
