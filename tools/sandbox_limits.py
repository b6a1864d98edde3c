"""The bound rlimits can't give: memory in sum. A watchdog always polls it, and a delegated cgroup helps."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import cache
from pathlib import Path
from threading import Event, Thread

from thinkloop.tools.process_tree import process_tree, resident_bytes

BUSY_POLL, IDLE_POLL = 0.05, 0.2  # seconds; one poll of three processes costs about 0.1 ms
INODE_BYTES = 1200  # a tmpfs inode with its directory entry, which a tmpfs size limit doesn't count
SOCKET_BYTES = (
    212_992  # what one holds at most: the system's default for its send buffer, which can't be changed inside
)
SCRATCH = ("tmp", "workspace", "dev/shm")  # where the python tool's sandbox may write, below its root
_PSS_SECONDS = (
    0.5  # a tree that takes longer to add up is treated as over the limit: mappings by the ten thousand are an attack
)


def _proportional(pid: int) -> int:
    """Resident plus swapped bytes, shared pages divided among their sharers; else the resident size."""
    try:
        rows = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return resident_bytes(pid)
    return sum(int(row.split()[1]) * 1024 for row in rows if row.startswith(("Pss:", "SwapPss:")))


def _inode_bytes(pid: int, folders: Iterable[str]) -> int:
    """What the empty files of the scratch folders cost. The host's own folders, which a process sees without a sandbox and
    while one is being set up, don't count."""
    total = 0
    for mount in folders:
        folder = f"/proc/{pid}/root/{mount}"
        with suppress(OSError):
            if os.stat(folder).st_dev not in _host_devices():  # noqa: PTH116 - twenty times a second
                stat = os.statvfs(folder)
                total += (stat.f_files - stat.f_ffree) * INODE_BYTES
    return total


def _socket_bytes(pid: int) -> int:
    """What the sockets of its network may hold. The host's own network, which a process sees without a sandbox and while
    one is being set up, doesn't count."""
    with suppress(OSError, ValueError, IndexError):
        if os.stat(f"/proc/{pid}/ns/net").st_ino != _host_network():  # noqa: PTH116 - twenty times a second
            row = Path(f"/proc/{pid}/net/sockstat").read_text().split("\n", 1)[0]  # `sockets: used 4`
            return int(row.split()[2]) * SOCKET_BYTES
    return 0


@cache
def _host_network() -> int:
    return Path("/proc/self/ns/net").stat().st_ino


@cache
def _host_devices() -> frozenset[int]:
    folders = (Path(name) for name in ("/", "/tmp", "/dev/shm"))
    return frozenset(folder.stat().st_dev for folder in folders if folder.exists())


def over_limit(root: int, limit: int, scratch: Iterable[str] = SCRATCH) -> bool:
    """Whether the tree under `root` holds more than `limit` bytes, with the files of its `scratch` folders and what its
    sockets may hold. Resident sizes first: cheap, and never too small."""
    beside, pids = _inode_bytes(root, scratch) + _socket_bytes(root), list(process_tree(root))
    if beside + sum(map(resident_bytes, pids)) <= limit:
        return False
    total, until = beside, time.monotonic() + _PSS_SECONDS
    for pid in pids:
        total += _proportional(pid)
        if total > limit or time.monotonic() > until:
            return True
    return False


class Watchdog(Thread):
    """Calls `on_excess` with a reason, once, when the tree under `root` holds more than `limit` bytes."""

    def __init__(self, root: int, limit: int, on_excess: Callable[[str], None]) -> None:
        super().__init__(name="thinkloop-sandbox-watchdog", daemon=True)
        self.busy = False
        self._root, self._limit, self._on_excess, self._wake, self._ended = root, limit, on_excess, Event(), False

    def run(self) -> None:
        while not self._ended:
            self._wake.clear()
            if reason := self._objection():
                self._on_excess(reason)
                return
            self._wake.wait(BUSY_POLL if self.busy else IDLE_POLL)

    def _objection(self) -> str:
        try:
            over = over_limit(self._root, self._limit)
        except Exception as error:  # unwatched is unbounded, so whatever went wrong ends the session
            return f"its memory could not be watched ({error!r})"
        return f"it used more than {self._limit >> 20} MB of memory" if over else ""

    def watch(self, busy: bool) -> None:
        """Poll at the busy or the idle pace from now on."""
        self.busy = busy
        if busy:
            self._wake.set()

    def end(self) -> None:
        self._ended = True
        self._wake.set()


def delegated_cgroup(
    mounts: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")
) -> Path | None:
    """A cgroup (version 2) in which sessions may get groups of their own, with the memory and pids controllers, else
    `None`.

    That is this process's group, or its parent if systemd marked that as handed over: the kernel refuses children with
    controllers to a group that has processes itself. Being root isn't a delegation: a group whose manager hasn't enabled
    both controllers for its children is left alone.
    """
    try:
        own = next(line[3:] for line in membership.read_text().splitlines() if line.startswith("0::"))
    except (OSError, StopIteration):
        return None
    folder = mounts / own.lstrip("/")
    if _has_controllers(folder):
        return folder
    if folder == mounts or not _handed_over(folder.parent):
        return None
    with suppress(OSError), (folder.parent / "cgroup.subtree_control").open("r+") as control:
        control.write("+memory +pids")
    return folder.parent if _has_controllers(folder.parent) else None


def _has_controllers(group: Path) -> bool:
    """Whether children of `group` can be bounded, and we may make them."""
    try:
        enabled = set((group / "cgroup.subtree_control").read_text().split())
    except OSError:
        return False
    return {"memory", "pids"} <= enabled and os.access(group, os.W_OK)


def _handed_over(group: Path) -> bool:
    for mark in ("user.delegate", "trusted.delegate"):
        with suppress(OSError):
            return os.getxattr(group, mark) == b"1"
    return False


def join_cgroup(parent: Path, pids: list[int], memory: int, processes: int) -> Path | None:
    """A new child of `parent` holding `pids`, with `memory` bytes and `processes` at most; `None` if refused."""
    child = parent / f"thinkloop-{secrets.token_hex(6)}"
    try:
        child.mkdir()
        (child / "memory.max").write_text(str(memory))
        (child / "pids.max").write_text(str(processes))
        for pid in pids:
            (child / "cgroup.procs").write_text(str(pid))
        for name, value in (("memory.swap.max", "0"), ("memory.oom.group", "1")):
            with suppress(OSError):  # absent where swap accounting is off
                (child / name).write_text(value)
    except OSError:
        leave_cgroup(child)
        return None
    return child


def leave_cgroup(child: Path) -> None:
    """Remove an empty child group; one that still holds dying processes is left to the kernel."""
    with suppress(OSError):
        child.rmdir()
