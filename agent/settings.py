"""Options of `thinkloop run` from `thinkloop.toml` in the current folder."""

from __future__ import annotations

import tomllib
from collections.abc import Collection
from pathlib import Path
from typing import Any

from thinkloop.agent.trust import check_trusted, trust, wishes
from thinkloop.traces.events import Json, ThinkloopError

FILE = "thinkloop.toml"


JOINED = frozenset({"tools", "web"})
REPEATED = frozenset({"corpus", "file", "allow-host"})
"""Options that take a list: comma-separated, or given again, on the command line."""
SERVERS = "mcp"
"""The table of MCP servers, `[mcp.NAME]`; the option of the same name is for the command line."""


def read_settings(known: Collection[str], path: Path = Path(FILE)) -> dict[str, Any]:
    """The file's options by parameter name (`max_steps`); empty when there is no file.

    Keys are the long options without dashes in front (`max-steps = 40`). `known` has the names that exist. Raises
    `ThinkloopError` for a file that isn't TOML, a key that is no option, a value that can't be one, or a file that asks
    for what needs trust and hasn't got it.
    """
    data = _read(path)
    check_trusted(path, data)
    data.pop(SERVERS, None)
    return {_name(key, known, path): _value(key, value, path) for key, value in data.items()}


def read_servers(path: Path = Path(FILE)) -> dict[str, Json]:
    """The file's `[mcp.NAME]` tables. Raises `ThinkloopError` when they are no tables."""
    servers = _read(path).get(SERVERS, {})
    if not isinstance(servers, dict) or not all(isinstance(table, dict) for table in servers.values()):
        raise ThinkloopError(f'{path}: MCP servers are tables, as in `[mcp.files]` with `command = ["…"]` below it.')
    return servers


def trust_settings(path: Path = Path(FILE)) -> list[str]:
    """Trusts the file as it stands, and gives what it asks for. Raises `ThinkloopError` when there is none."""
    if not path.is_file():
        raise ThinkloopError(f"There is no {path} here. Settings are read from the current folder.")
    asked = wishes(_read(path))
    trust(path)
    return asked


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ThinkloopError(f"{path} can't be read as TOML: {error}. Correct it, or move it away.") from error


def _name(key: str, known: Collection[str], path: Path) -> str:
    name = key.replace("-", "_")
    if name not in known:
        options = ", ".join(option.replace("_", "-") for option in sorted(known))
        raise ThinkloopError(f"{path} has an unknown option {key!r}. Known are: {options}.")
    return name


def _value(key: str, value: Any, path: Path) -> Any:
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        if key in REPEATED:
            return value
        if key in JOINED:
            return ",".join(value)
    if isinstance(value, str | bool | int | float):
        return value
    raise ThinkloopError(
        f"{path}: {key!r} must be a text, number, true or false (or, for {', '.join(sorted(JOINED | REPEATED))}, a list)."
    )
