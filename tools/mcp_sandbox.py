"""A stdio MCP server inside bubblewrap: no network, no home, the system and the command's own files read-only.

What the command needs is found from the command: the folders its program is installed in (followed through links and
virtual environments), files and folders that it names by full path, and the current folder unless that is a home or the
system's. All of that can be read inside; nothing of it can be written. /tmp and the home folder are empty and sized.
"""

from __future__ import annotations

import os
import pwd
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import anyio
import anyio.to_thread
from thinkloop.tools import bwrap, seccomp
from thinkloop.tools.bwrap import in_memory
from thinkloop.tools.mcp_messages import Fault
from thinkloop.tools.mcp_process import Launch, ServerStartError
from thinkloop.tools.process_tree import process_tree
from thinkloop.tools.sandbox import SandboxError, find_bwrap, fresh_uid, readable_inside
from thinkloop.tools.sandbox_limits import IDLE_POLL, over_limit

_MB = 1 << 20
_TMP = 256 * _MB
_HOME = "/home/server"
MEMORY = 2048 * _MB
"""Of all the server's processes together; JavaScript servers start at some 100 MB."""
_LIMITS = ("--nproc=256", "--nofile=1024", "--core=0", "--memlock=0", "--msgqueue=0", f"--fsize={_TMP}")
_SYSTEM = ("/etc/ld.so.cache", "/etc/alternatives", "/etc/localtime", "/etc/mime.types")
_SCRATCH = {"/dev/shm": 64 * _MB, "/tmp": _TMP, _HOME: _TMP}
_OWN_FOLDERS = frozenset(
    {"/", "/bin", "/dev", "/etc", "/home", "/lib", "/lib64", "/proc", "/root", "/run", "/sbin", "/sys", "/tmp", "/usr"}
)
_SYSTEM_FOLDERS = _OWN_FOLDERS | {"/boot", "/media", "/mnt", "/opt", "/srv", "/var"}
_SYSTEM_TREES = ("/boot", "/dev", "/etc", "/proc", "/run", "/sys")


def sandboxed(program: str, arguments: Sequence[str], env: Mapping[str, str], stack: ExitStack) -> Launch:
    """bubblewrap round the command. `stack` closes what is handed over. Raises `ServerStartError` for what can't be
    reached inside."""
    try:
        found = find_bwrap("sandbox of an MCP server")
    except SandboxError as error:
        raise ServerStartError(f"its sandbox can't be made: {error}") from error
    shown = list(_shown(program, arguments))
    _check_readable(program, shown)
    inside = ["/usr/bin/prlimit", *_LIMITS, "--", program, *arguments]
    seccomp_fd = in_memory(seccomp.build_filter(), stack)
    options = [*_isolation(env), *_system(), *_binds(shown), "--seccomp", str(seccomp_fd), *_seal(shown)]
    args_fd = in_memory("\0".join(options).encode(), stack)
    # bwrap itself gets no environment: /proc/1/environ would show it inside.
    return Launch([found, "--args", str(args_fd), "--", *inside], {}, "/", (args_fd, seccomp_fd), fresh_uid())


async def watch_memory(pid: int, fault: Fault) -> None:
    """Call `fault` once the processes inside together hold more than `MEMORY`."""
    while not (below := list(process_tree(pid))[1:2]):
        await anyio.sleep(IDLE_POLL)
    folders = [folder.lstrip("/") for folder in _SCRATCH]
    while not await anyio.to_thread.run_sync(over_limit, below[0], MEMORY, folders):
        await anyio.sleep(IDLE_POLL)
    fault(f"it used more than {MEMORY // _MB:,} MB of memory")


def _isolation(env: Mapping[str, str]) -> list[str]:
    own = {"PATH": os.environ.get("PATH", os.defpath), "HOME": _HOME, "LANG": "C.UTF-8"}
    return bwrap.isolation({**own, **env})


def _system() -> list[str]:
    # No zero: a shared mapping of it is memory in nobody's figures once its pages are given up.
    devices = bwrap.devices("null", "full", "random", "urandom")
    folders = [part for folder, size in _SCRATCH.items() for part in bwrap.scratch(folder, size)]
    return [*bwrap.system(), *bwrap.where_present(*_SYSTEM), *devices, *folders]


def _binds(shown: Sequence[Path]) -> list[str]:
    """Outer folders first, so that an inner one isn't covered."""
    return [part for path in sorted(shown) for part in ("--ro-bind", str(path), str(path))]


def _seal(shown: Sequence[Path]) -> list[str]:
    here = Path.cwd()
    start = str(here) if any(here.is_relative_to(path) for path in shown) else _HOME
    return ["--remount-ro", "/", "--chdir", start]


def _shown(program: str, arguments: Sequence[str]) -> Iterator[Path]:
    """Folders and files outside the system that the command may read."""
    found = [*_installed(Path(program)), *_named(arguments)]
    here = Path.cwd()
    if not _is_home_or_system(here) and readable_inside(here):
        found.append(here)
    for path in dict.fromkeys(found):
        if not path.is_relative_to("/usr"):
            yield path


def _is_home_or_system(folder: Path) -> bool:
    """Whether `folder` is somebody's home, or holds one, or is the system's rather than a project."""
    accounts = (account.pw_dir for account in pwd.getpwall() if account.pw_uid == 0 or account.pw_uid >= 1000)
    homes = {Path.home(), *map(Path, accounts)}
    return (
        str(folder) in _SYSTEM_FOLDERS
        or str(folder.parent) in ("/home", "/var")
        or any(map(folder.is_relative_to, _SYSTEM_TREES))
        or any(home.resolve().is_relative_to(folder) for home in homes)
    )


def _installed(program: Path) -> Iterator[Path]:
    """Where a program is installed: for each link on the way to it, the Python or Node installation above `bin`, else the
    file itself; and the base of a virtual environment."""
    for path in _link_chain(program.absolute()):
        prefix = path.parent.parent
        yield prefix if path.parent.name in ("bin", "sbin") and _is_installation(prefix) else path
        yield from _interpreter_of(path)


def _is_installation(prefix: Path) -> bool:
    """Whether a whole folder is of one Python or Node, and nothing of a person's beside it."""
    if prefix.name == ".local" or _is_home_or_system(prefix):
        return False
    library = prefix / "lib"
    return (prefix / "pyvenv.cfg").is_file() or (library / "node_modules").is_dir() or any(library.glob("python*"))


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


def _check_readable(program: str, shown: Sequence[Path]) -> None:
    if not Path("/usr/bin/prlimit").exists():
        raise ServerStartError("its sandbox needs `prlimit`, of the package util-linux; install that")
    for path in shown:
        if not readable_inside(path):
            raise ServerStartError(
                f"its sandbox, whose user has no rights but everyone's, can't read {path}, which {program!r} needs; "
                "install it where all may read (/opt, /usr/local, a virtual environment made by the system's Python), "
                "or run it without `sandbox`"
            )
