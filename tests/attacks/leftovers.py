"""What this process has at a moment, and what of it a row could leave behind."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from thinkloop.tools.sandbox_limits import process_tree


@dataclass(frozen=True, slots=True)
class Left:
    """Processes below this one with their commands, its sockets and pipes, its threads."""

    processes: frozenset[str]
    descriptors: frozenset[str]
    threads: frozenset[str]

    @classmethod
    def now(cls) -> Self:
        own = os.getpid()
        below = (f"{pid} {_read(pid, 'cmdline')[:200]}" for pid in process_tree(own) if pid != own and _lives(pid))
        threads = (_read(own, f"task/{path.name}/comm") for path in Path(f"/proc/{own}/task").iterdir())
        return cls(frozenset(below), frozenset(_descriptors()), frozenset(threads))


def _descriptors() -> list[str]:
    found = []
    for path in Path("/proc/self/fd").iterdir():
        try:
            target = str(path.readlink())
        except OSError:
            continue
        if target.startswith(("socket:", "pipe:", "/memfd:")) or "/thinkloop" in target:
            found.append(target)
    return found


def _lives(pid: int) -> bool:
    return bool(_read(pid, "cmdline"))


def _read(pid: int, name: str) -> str:
    try:
        return Path(f"/proc/{pid}/{name}").read_text().replace("\0", " ").strip()
    except OSError:
        return ""
