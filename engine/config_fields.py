"""One JSON object of a `config.json`, with names and places at hand for errors that say which field is wrong."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from thinkloop.traces.events import ThinkloopError

_PUBLISHED = "Use a checkpoint of the Kimi-K2 / DeepSeek family in its published form."


LARGEST = 1 << 24
"""No size in a configuration is larger: 16 times the longest windows and the largest vocabularies there are."""


class ConfigError(ThinkloopError):
    """A `config.json` that can't be read, or that asks for maths this engine doesn't have."""


class Fields:
    """The fields of one object: `where` names the file, `prefix` the way from its root (`"rope_scaling."`)."""

    def __init__(self, data: Mapping[str, Any], where: str, prefix: str = "") -> None:
        self._data, self._where, self._prefix = data, where, prefix

    def __contains__(self, name: str) -> bool:
        return name in self._data

    def get(self, name: str, default: Any = None) -> Any:
        """The field's value; `default` when it is absent or null."""
        value = self._data.get(name)
        return default if value is None else value

    def nested(self, name: str) -> Fields | None:
        """The object in field `name`, None when there is none. Raises `ConfigError` when it is something else."""
        value = self._data.get(name)
        if not value:
            return None
        if not isinstance(value, Mapping):
            raise self.refuse(name, "but an object belongs there")
        return Fields(value, self._where, f"{self._prefix}{name}.")

    def objects(self, name: str) -> list[Fields]:
        """The objects inside the object `name`, one per key."""
        inside = self.nested(name)
        found = [inside.nested(key) for key in inside._data] if inside else []
        return [one for one in found if one is not None]

    def refuse(self, name: str, why: str, advice: str = _PUBLISHED) -> ConfigError:
        """The error for a field that can't be honoured."""
        return ConfigError(f"{self._where}: `{self._prefix}{name}` is {self._data.get(name)!r}, {why}. {advice}")

    def whole(self, name: str, default: int | None = None, *, least: int = 1, most: int = LARGEST) -> int:
        """A whole number from `least` to `most`; `default` when it is absent or null."""
        value = self.get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise self.refuse(name, f"but a whole number from {least} to {most:,} is needed")
        return value

    def number(self, name: str, default: float | None = None, *, above: float = 0.0) -> float:
        """A number above `above`; `default` when it is absent or null."""
        value = self.get(name, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not value > above:
            raise self.refuse(name, f"but a number above {above:g} is needed")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """True or false; `default` when it is absent or null."""
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise self.refuse(name, "but true or false is needed")
        return value

    def only(self, **allowed: Any) -> None:
        """Refuses each named field that is neither absent, nor null, nor the one value that is computed here."""
        for name, value in allowed.items():
            if self.get(name, value) != value:
                raise self.refuse(name, f"but only {value!r} is computed")

    def known(self, names: Iterable[str]) -> None:
        """Refuses a field outside `names` that says anything: what it does to the maths can't be known."""
        names = frozenset(names)
        for name, value in self._data.items():
            if name in names or name.startswith("_") or not _says_something(value):
                continue
            near = difflib.get_close_matches(name, names, n=1, cutoff=0.8)
            meant = f" (is `{near[0]}` meant?)" if near else ""
            raise self.refuse(
                name, f"a field this engine doesn't know{meant}",
                "Use the published config.json; if the field has no part in the forward pass, take it out.",
            )  # fmt: skip


def _says_something(value: Any) -> bool:
    return value is not None and value is not False and value != {} and value != [] and value != ""


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises `ConfigError`."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"{path} can't be read ({error.strerror}). Point to a folder with a published checkpoint."
        ) from error
    except (ValueError, RecursionError) as error:  # the latter when it nests some thousands deep
        raise ConfigError(f"{path} isn't JSON ({error}). Fetch the file again.") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path} holds a {type(data).__name__}, not an object. Fetch the file again.")
    return data
