"""What a checkpoint folder says about running it: its optional `thinkloop.json`."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from thinkloop.engine.params import Sampling
from thinkloop.traces.events import Json, ThinkloopError


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSettings:
    """What a checkpoint says about running it, in its optional `thinkloop.json`."""

    window: int | None = None
    """Tokens of context that it was trained for, when they are fewer than `max_position_embeddings`."""
    context_policy: Literal["hide_results", "drop_steps"] = "hide_results"
    system: str | None = None
    sampling: Json = field(default_factory=dict)
    """Its own defaults, keys as in `Sampling`."""

    @classmethod
    def load(cls, folder: str | Path) -> ModelSettings:
        """Reads `folder/thinkloop.json`; all defaults when there is none. Raises `ThinkloopError` for a wrong field."""
        path = Path(folder) / "thinkloop.json"
        if not path.is_file():
            return cls()
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ThinkloopError(f"{path} is not readable JSON ({error}); mend or remove it.") from error
        return _checked_settings(path, data)


def _checked_settings(path: Path, data: Any) -> ModelSettings:
    if not isinstance(data, dict):
        raise ThinkloopError(f"{path} holds {type(data).__name__}, expected a JSON object; mend or remove it.")
    for key, value in data.items():
        allowed = _FIELDS.get(key)
        if allowed is None:
            raise ThinkloopError(f"{path} has an unknown field {key!r}; known: {', '.join(_FIELDS)}.")
        if not allowed[0](value):
            raise ThinkloopError(f"{path}: {key} is {value!r}, but must be {allowed[1]}.")
    return ModelSettings(**data)


def _is_sampling(value: Any) -> bool:
    return isinstance(value, dict) and value.keys() <= _SAMPLING


_SAMPLING = {f.name for f in fields(Sampling)}
_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "window": (lambda v: v is None or (type(v) is int and v > 0), "a number of tokens"),
    "context_policy": (lambda v: v in ("hide_results", "drop_steps"), '"hide_results" or "drop_steps"'),
    "system": (lambda v: v is None or isinstance(v, str), "a text"),
    "sampling": (_is_sampling, f"an object with some of {', '.join(sorted(_SAMPLING))}"),
}
"""Fields of `thinkloop.json`: what is allowed, and how to say it."""
