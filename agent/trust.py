"""Whether a settings file may do what it asks for. A folder that came from somewhere may bring a `thinkloop.toml` that
starts programs, sends keys or texts away, or reads and writes outside of it: such a file counts only once its user has
said so, and again after each change.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

from thinkloop.traces.events import ThinkloopError

STORE = "trusted.json"


def wishes(settings: Mapping[str, Any]) -> list[str]:
    """What a settings file asks for that needs trust, in words; empty for a harmless one."""
    return [wish for key, value in settings.items() for wish in _wishes_of(key.replace("_", "-"), value)]


def check_trusted(path: Path, settings: Mapping[str, Any]) -> None:
    """Raises `ThinkloopError`, which lists the wishes, unless there are none or the file is trusted as it stands."""
    asked = wishes(settings)
    if asked and _store().get(str(path.resolve())) != _digest(path):
        listed = "; ".join(asked)
        raise ThinkloopError(
            f"{path.resolve()} is not trusted, and it would {listed}. If that is what you want, run `thinkloop trust` in "
            "its folder; otherwise take it out, or move the file away."
        )


def trust(path: Path) -> None:
    """Remembers the file as it stands now. Raises `ThinkloopError` for one that others could have written."""
    status = path.stat()
    if status.st_uid not in (0, os.geteuid()) or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ThinkloopError(f"{path} can be written by others: make it yours alone (`chmod go-w`), then trust it.")
    trusted = _store() | {str(path.resolve()): _digest(path)}
    store = _store_path()
    store.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    temporary = store.with_name(f".{STORE}.{os.getpid()}")
    temporary.write_text(json.dumps(trusted, indent=1), "utf-8")
    temporary.replace(store)


def _wishes_of(key: str, value: Any) -> Iterator[str]:
    values = [str(item) for item in value] if isinstance(value, list) else str(value).split(",")
    match key:
        case "mcp" if isinstance(value, dict):
            for name, table in value.items():
                what = table.get("url") or table.get("command") if isinstance(table, dict) else table
                yield f"use the MCP server {name!r} ({what})"
        case "tools":
            own = [name for name in values if any(mark in name for mark in ":./")]
            yield from (f"run the code of {name!r}" for name in own)
        case "model" if "://" in str(value):
            yield f"send the task, and a key, to {value}"
        case "web":
            yield from (f"send queries to {name.partition('=')[2]}" for name in values if "=" in name)
        case "allow-host":
            yield f"reach the private hosts {', '.join(values)}"
        case "corpus" | "file" | "keep" | "trace":
            outside = [name for name in values if not _is_inside(name)]
            verb = "write to" if key in ("keep", "trace") else "read"
            yield from (f"{verb} {name!r}" for name in outside)


def _is_inside(name: str) -> bool:
    path = PurePath(name)
    return not path.is_absolute() and ".." not in path.parts and Path(name).resolve().is_relative_to(Path.cwd())


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _store_path() -> Path:
    base = os.environ.get("XDG_CONFIG_HOME", "")
    return (Path(base) if base.startswith("/") else Path.home() / ".config") / "thinkloop" / STORE


def _store() -> dict[str, str]:
    try:
        found = json.loads(_store_path().read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
