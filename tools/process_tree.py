"""A process of ours and what it started: found, measured, held by descriptors, and ended.

Linux where /proc is read; signals and their names work everywhere.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

_PAGE = os.sysconf("SC_PAGE_SIZE")


def process_tree(root: int) -> Iterator[int]:
    """`root` and its descendants, by the kernel's own lists; what ends meanwhile is left out."""
    pending = [root]
    while pending:
        pid = pending.pop()
        yield pid
        for task in _threads(pid):
            with suppress(OSError):
                pending += map(int, Path(f"/proc/{pid}/task/{task}/children").read_text().split())


def _threads(pid: int) -> list[str]:
    with suppress(OSError):
        return os.listdir(f"/proc/{pid}/task")  # noqa: PTH208 - names are all that is needed, twenty times a second
    return []


def resident_bytes(pid: int) -> int:
    """What a process has in memory; 0 for one that is gone, and without /proc."""
    with suppress(OSError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE
    return 0


def hold(pid: int) -> int | None:
    """A descriptor of a process, which can't come to mean another one later as its number can; None if it is gone."""
    with suppress(OSError):
        return os.pidfd_open(pid)
    return None


def kill_held(descriptors: Iterable[int]) -> None:
    """Kill what is still there of processes held by `hold`. The descriptors stay open."""
    for descriptor in descriptors:
        with suppress(OSError):
            signal.pidfd_send_signal(descriptor, signal.SIGKILL)


def kill_all(pids: Iterable[int]) -> None:
    """Kill what is still there of `pids`."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def adopt_orphans() -> None:
    """Have orphans among this process's descendants come to it and not to init, so that they are still found below it
    (Linux)."""
    import ctypes

    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER


def kill_family(pid: int) -> None:
    """Kill the descendants of `pid`, those in sessions of their own too, then the group that it leads. In passes: some may
    have begun while others were killed."""
    for _ in range(5):
        held = [handle for below in list(process_tree(pid))[1:] if (handle := hold(below)) is not None]
        kill_held(held)
        for handle in held:
            os.close(handle)
        if not held:
            break
    signal_group(pid)


def signal_group(pid: int, number: signal.Signals = signal.SIGKILL) -> None:
    """Send a signal to the process group that `pid` leads; one that is gone already is no error."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, number)


def signal_name(number: int) -> str:
    """`SIGKILL` for 9; `signal 40` for one without a name."""
    with suppress(ValueError):
        return signal.Signals(number).name
    return f"signal {number}"
