"""What `thinkloop doctor` is told about the python sandbox: one session is started, and its process is looked at."""

from __future__ import annotations

import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from thinkloop.tools import seccomp
from thinkloop.tools.sandbox import Limits, bwrap_version, find_bwrap
from thinkloop.tools.sandbox_session import Session, start_blocking
from thinkloop.traces.events import Json, ThinkloopError

_DELEGATE = (
    "optional, for a bound that the kernel holds: run thinkloop in a control group of its own, "
    "`systemd-run --user --pty -p Delegate=yes -p DelegateSubgroup=main thinkloop ...` (systemd 254 or newer)"
)
_PACKAGES = (
    "to import them inside, make the virtual environment and the Python that it was made from readable for others, with "
    "the folders above them"
)


@dataclass(frozen=True, slots=True)
class Layer:
    """One thing that holds the sandbox, or doesn't; `fix` says how to get it, if it can be had."""

    name: str
    holds: bool
    detail: str
    fix: str = ""


def isolation_report() -> Json:
    """Facts for `thinkloop doctor`: starts one session (about 50 ms) and says what holds in it.

    Keys: `works`, `error` (empty if it works), `bwrap`, `version`, `python`, `seccomp`, `uid_drop`, `sum_limit`
    (`cgroup` or `watchdog`: what bounds the memory of all processes together), `packages` (folders of installed packages
    that can be imported inside), and `layers`: each with `name`, `holds`, `detail` and `fix`, as seen from outside on the
    running process.
    """
    facts: Json = {"works": False, "error": "", "bwrap": "", "version": "", "python": "", "packages": [], "layers": []}
    facts |= {"seccomp": seccomp.supported(), "uid_drop": os.geteuid() == 0, "sum_limit": ""}
    try:
        facts["bwrap"] = find_bwrap()
        facts["version"] = bwrap_version(facts["bwrap"])
        session = start_blocking(Limits())
    except ThinkloopError as error:
        return facts | {"error": str(error)}
    try:
        facts |= {"works": True, "python": session.python, "sum_limit": session.sum_limit}
        facts["packages"] = _packages(session)
        facts["layers"] = [asdict(layer) for layer in _layers(session)]
    finally:
        session.end()
    return facts


def _layers(session: Session) -> list[Layer]:
    rows = Path(f"/proc/{session.runner}/status").read_text().splitlines()
    status = dict(row.split(":\t", 1) for row in rows if ":\t" in row)
    bound = "by the kernel (control group)" if session.sum_limit == "cgroup" else "by a watchdog, 20 times a second"
    packages = ", ".join(_packages(session))
    return [
        *(_namespace(session.runner, kind, name) for kind, name in _NAMESPACES.items()),
        Layer("system calls filtered", status.get("Seccomp") == "2", "seccomp"),
        Layer("no privileges", not int(status["CapEff"], 16) and status["NoNewPrivs"] == "1", "and no way to get any"),
        _user(status),
        Layer("memory and processes of all together", True, bound, "" if session.sum_limit == "cgroup" else _DELEGATE),
        Layer("installed packages", bool(packages), packages or "none", "" if packages else _PACKAGES),
    ]


def _packages(session: Session) -> list[str]:
    """Folders that can be imported from inside: readable there, and for the version of Python that runs there."""
    fits = session.python.split(".")[:2] == [str(number) for number in sys.version_info[:2]]
    return [str(folder) for folder in session.interpreter.packages] if fits else []


_NAMESPACES = {
    "user": "own user namespace",
    "mnt": "read-only system",
    "pid": "own processes",
    "net": "no network",
    "ipc": "own shared memory",
}


def _namespace(pid: int, kind: str, name: str) -> Layer:
    ours, theirs = (Path(f"/proc/{who}/ns/{kind}").readlink() for who in ("self", pid))
    return Layer(name, ours != theirs, f"{kind} namespace")


def _user(status: dict[str, str]) -> Layer:
    uid = int(status["Uid"].split()[0])
    if uid == os.geteuid():
        return Layer("own user id", False, f"yours ({uid}), in its own user namespace; only root can give another")
    return Layer("own user id", True, f"{uid}, for this session alone")
