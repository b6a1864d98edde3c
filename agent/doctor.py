"""What `thinkloop doctor` looks at: each finding says what is there and, when something is missing, how to mend it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from thinkloop.traces.events import ThinkloopError

LEAST_PYTHON = (3, 11)
LEAST_MEMORY = 2 << 30
"""Bytes: the mini model with torch takes under 1 GiB."""

State = Literal["ok", "warn", "missing"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report. `fix` is empty when nothing is to be done; `missing` makes the command fail."""

    name: str
    state: State
    detail: str
    fix: str = ""


def examine(checkpoint: Path | None = None) -> Iterator[Finding]:
    """All findings, in order, as they are known: on this machine, or on the checkpoint in a folder."""
    if checkpoint is not None:
        from thinkloop.agent.checkpoint_report import examine_checkpoint

        yield from examine_checkpoint(checkpoint)
        return
    checks: tuple[Callable[[], Finding], ...] = (
        _python,
        _torch,
        _cores,
        _memory,
        _sandbox,
        _browser,
        _extras,
        _mini,
        _writable,
    )
    for check in checks:
        yield check()


def mini_folder() -> Path:
    """Where the package keeps the mini model and its sample world."""
    return Path(__file__).resolve().parent.parent / "engine" / "mini"


def _python() -> Finding:
    detail = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info[:2] < LEAST_PYTHON:
        return Finding("python", "missing", detail, "install Python 3.11 or later")
    return Finding("python", "ok", detail)


def _torch() -> Finding:
    try:
        import torch
    except ImportError as error:
        return Finding("torch", "missing", str(error), "pip install torch (thinkloop runs models with it)")
    if torch.cuda.is_available():
        return Finding("torch", "ok", f"{torch.__version__} on {torch.cuda.get_device_name()}")
    return Finding("torch", "ok", f"{torch.__version__} on the CPU (no CUDA device)")


def _cores() -> Finding:
    return Finding(
        "cores", "ok", str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
    )


def _memory() -> Finding:
    free = available_memory()
    if free is None:
        return Finding("memory", "warn", "unknown", "this system doesn't say; the mini model takes under 1 GiB")
    if free < LEAST_MEMORY:
        return Finding("memory", "warn", f"{free / 2**30:.1f} GiB free", "close other programs: 2 GiB are comfortable")
    return Finding("memory", "ok", f"{free / 2**30:.1f} GiB free")


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes that can be used now: the system's, or what the control group leaves when that is less. None if unknown."""
    found = [size for size in (_system_memory(root), _group_memory(root)) if size is not None]
    return min(found, default=None)


def _system_memory(root: Path) -> int | None:
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _group_memory(root: Path) -> int | None:
    group = root / "sys/fs/cgroup"
    try:
        most, used = (group / "memory.max").read_text().strip(), (group / "memory.current").read_text()
    except OSError:
        return None
    return None if most == "max" else int(most) - int(used)


def _sandbox() -> Finding:
    from thinkloop.tools.python import isolation_report

    try:
        report = isolation_report()
    except ThinkloopError as error:
        report = {"works": False, "error": str(error)}
    if not report["works"]:
        return Finding("sandbox", "missing", str(report["error"]), "or run without the tool: --tools search,open")
    layers = [layer for layer in report["layers"] if isinstance(layer, dict)]
    holds = ", ".join(str(layer["name"]) for layer in layers if layer["holds"])
    lacks = [f"{layer['name']}: {layer['detail']}" for layer in layers if not layer["holds"]]
    detail = f"bubblewrap {report['version']}, Python {report['python']}; {holds}; memory by {report['sum_limit']}"
    fixes = [str(layer["fix"]) for layer in layers if layer["fix"]]
    return Finding("sandbox", "ok", "; ".join([detail, *(f"not {lack}" for lack in lacks)]), "; ".join(fixes))


def _browser() -> Finding:
    if not _installed("playwright"):
        return Finding("browser", "warn", "playwright isn't installed", "pip install 'thinkloop[browser]'")
    from thinkloop.tools.browser_sandbox import check_machine, find_chromium

    try:
        check_machine()
        return Finding("browser", "ok", f"{find_chromium(None)}, in bubblewrap, behind thinkloop's own proxy")
    except ThinkloopError as error:
        return Finding("browser", "warn", str(error))


EXTRAS = {"grammar": "llguidance", "browser": "playwright", "search": "tantivy", "mcp": "mcp"}
"""Extras and a package that each brings."""


def _extras() -> Finding:
    absent = [name for name, package in EXTRAS.items() if not _installed(package)]
    there = [name for name in EXTRAS if name not in absent]
    detail = f"{', '.join(there) or 'none'} installed" + (f"; not: {', '.join(absent)}" if absent else "")
    return Finding("extras", "ok", detail, f"pip install 'thinkloop[{','.join(absent)}]'" if absent else "")


def _installed(package: str) -> bool:
    from importlib.util import find_spec

    return find_spec(package) is not None


def _mini() -> Finding:
    folder = mini_folder()
    absent = [
        name for name in ("config.json", "*.safetensors", "tiktoken.model", "world/*.md") if not any(folder.glob(name))
    ]
    if absent:
        return Finding(
            "mini model", "missing", f"{folder} lacks {', '.join(absent)}",
            "install thinkloop again, or train it with examples/mini/train.py",
        )  # fmt: skip
    size = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    return Finding("mini model", "ok", f"{size / 1e6:.1f} MB in {folder}")


def _writable() -> Finding:
    here = Path.cwd()
    if os.access(here, os.W_OK):
        return Finding("traces", "ok", f"can be written in {here}")
    return Finding("traces", "missing", f"{here} can't be written", "change to a folder of yours, or use --trace DIR")
