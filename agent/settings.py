"""Options of `thinkloop run` from `thinkloop.toml` in the current folder."""

from __future__ import annotations

import tomllib
from collections.abc import Collection
from pathlib import Path
from typing import Any

from thinkloop.traces.events import ThinkloopError

FILE = "thinkloop.toml"


def read_settings(known: Collection[str], path: Path = Path(FILE)) -> dict[str, Any]:
    """The file's options by parameter name (`max_steps`); empty when there is no file.

    Keys are the long options without dashes in front (`max-steps = 40`). `known` has the names that exist. Raises
    `ThinkloopError` for a file that isn't TOML, a key that is no option, or a value that can't be one.
    """
    try:
        data = tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ThinkloopError(f"{path} can't be read as TOML: {error}. Correct it, or move it away.") from error
    return {_name(key, known, path): _value(key, value, path) for key, value in data.items()}


def _name(key: str, known: Collection[str], path: Path) -> str:
    name = key.replace("-", "_")
    if name not in known:
        options = ", ".join(option.replace("_", "-") for option in sorted(known))
        raise ThinkloopError(f"{path} has an unknown option {key!r}. Known are: {options}.")
    return name


def _value(key: str, value: Any, path: Path) -> Any:
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return ",".join(value)
    if isinstance(value, str | bool | int | float):
        return value
    raise ThinkloopError(f"{path}: {key!r} must be a text, number, true or false (or, for tools, a list of names).")
