"""What Playwright's driver executes in the browser's place: drops root, then becomes bubblewrap with an empty environment.

    python -I -S browser_launch.py PLAN.json [ARGUMENT...]

With the standard library alone, because it starts with every browser. The plan is made by `browser_sandbox.plan`.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def _in_memory(data: bytes) -> int:
    """An inherited descriptor to read `data` from."""
    fd = os.memfd_create("thinkloop", 0)
    os.write(fd, data)
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def _drop_root(uid: int) -> None:
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)


def _browser_arguments(given: Sequence[str], profile: str) -> list[str]:
    """Playwright's arguments, with the profile where there is one inside."""
    return [f"--user-data-dir={profile}" if a.startswith("--user-data-dir=") else a for a in given]


def _bwrap_arguments(plan: dict[str, Any]) -> bytes:
    """Through a descriptor, since the command line can be read inside and these name the host's folders."""
    arguments = list(plan["arguments"])
    for target, text in plan["files"].items():
        arguments += ["--perms", "0444", "--file", str(_in_memory(text.encode())), target]
    arguments += ["--seccomp", str(_in_memory(bytes.fromhex(plan["filter"])))]
    return "\0".join([*arguments, *plan["seal"]]).encode()


def _record(path: Path, given: Sequence[str]) -> None:
    """For whoever ends the browser: this process, which becomes bubblewrap, the driver, and the driver's profile folder."""
    profile = next((a.partition("=")[2] for a in given if a.startswith("--user-data-dir=")), "")
    draft = path.with_suffix(".new")
    draft.write_text(json.dumps({"bwrap": os.getpid(), "driver": os.getppid(), "profile": profile}))
    draft.rename(path)


def main(plan_path: str, *given: str) -> None:
    """Never returns: `execve`."""
    plan = json.loads(Path(plan_path).read_text())
    _record(Path(plan["pids"]), given)
    for name, value in plan["rlimits"].items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))
    if plan["uid"] is not None:
        _drop_root(plan["uid"])
    options = ["--args", str(_in_memory(_bwrap_arguments(plan))), "--", *plan["command"]]
    os.execve(plan["bwrap"], [plan["bwrap"], *options, *_browser_arguments(given, plan["profile"])], {})


if __name__ == "__main__":
    main(*sys.argv[1:])
