"""Schema errors in words: short, for a model that will write the call again."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from typing import Any

MOST_SHOWN = 4
MAX_TEXT = 900

_LIMITS = {
    "minimum": "at least {}", "maximum": "at most {}", "exclusiveMinimum": "more than {}",
    "exclusiveMaximum": "less than {}", "multipleOf": "a multiple of {}", "minLength": "at least {} characters long",
    "maxLength": "at most {} characters long", "minItems": "a list of at least {}", "maxItems": "a list of at most {}",
    "minProperties": "an object of at least {} members", "maxProperties": "an object of at most {} members",
    "pattern": "text that matches the regular expression {}", "const": "{}", "uniqueItems": "a list without repeats",
}  # fmt: skip


def explained(errors: Sequence[Any]) -> str:
    """One short paragraph for `jsonschema` errors: the most telling few, each with its place, what is there and what
    was expected. At most `MAX_TEXT` characters."""
    texts = list(dict.fromkeys(_told(error) for error in sorted(errors, key=_rank)))
    more = len(texts) - MOST_SHOWN
    shown = texts[:MOST_SHOWN] + ([f"and {more} more"] if more > 0 else [])
    return _cut("; ".join(shown), MAX_TEXT)


def _rank(error: Any) -> tuple[bool, int]:
    """What is missing or too much says most, then what is nearest to the top."""
    return error.validator not in ("required", "additionalProperties"), len(error.path)


def _told(error: Any) -> str:
    where = _place(error)
    if error.validator in ("anyOf", "oneOf") and error.context:
        return _alternatives(where, error)
    if error.validator == "required":
        return _missing(where, error)
    if error.validator == "additionalProperties":
        return _unknown(where, error)
    if error.validator is None:
        return f"{where} is not allowed here"
    expected = _expected(error.validator, error.validator_value)
    if expected:
        return f"{where} must be {expected}, not {_short(error.instance)}"
    return f"{where} breaks `{error.validator}`: {_short(error.validator_value)}; it is {_short(error.instance)}"


def _place(error: Any) -> str:
    path = ""
    for part in error.absolute_path:
        path += f"[{part}]" if isinstance(part, int) else f".{_cut(part, 60)}" if path else _cut(part, 60)
    return f"`{path}`" if path else "the arguments as a whole"


def _expected(keyword: str, value: Any) -> str:
    if keyword == "type":
        return " or ".join(map(_kind, value if isinstance(value, list) else [value]))
    if keyword == "enum":
        return "one of " + _cut(", ".join(_short(item, 40) for item in value[:30]), 300)
    return _LIMITS[keyword].format(_short(value, 120)) if keyword in _LIMITS else ""


def _kind(name: Any) -> str:
    article = "an" if str(name)[:1] in "aeiou" else "a"
    return "null" if name == "null" else f"{article} {name}"


def _missing(where: str, error: Any) -> str:
    names = [name for name in error.validator_value if name not in error.instance]
    shown = ", ".join(_described(name, error.schema) for name in names[:10])
    within = "" if not error.absolute_path else f" in {where}"
    return f"{shown} {'is' if len(names) == 1 else 'are'} missing{within}"


def _described(name: str, schema: Any) -> str:
    properties = schema.get("properties", {}) if isinstance(schema, dict) else {}
    wanted = properties.get(name)
    kind = wanted.get("type") if isinstance(wanted, dict) else None
    return f"`{_cut(name, 60)}`" + (f" ({_expected('type', kind)})" if kind else "")


def _unknown(where: str, error: Any) -> str:
    extras = list(getattr(error, "details", ()))[:5]
    known = list(error.schema.get("properties", {}))
    within = "" if not error.absolute_path else f" in {where}"
    listed = ", ".join(f"`{_cut(name, 60)}`" for name in extras)
    near = difflib.get_close_matches(str(extras[0])[:60] if extras else "", known[:200], n=1)
    hint = f"did you mean `{near[0]}`?" if near else f"known are {_cut(', '.join(f'`{name}`' for name in known), 200)}"
    return f"{listed} {'is' if len(extras) == 1 else 'are'} not known{within}: {hint if known else 'none are'}"


def _alternatives(where: str, error: Any) -> str:
    """All that an `anyOf` would take where they are simple; else what is wrong with the one that came nearest."""
    kinds = [option.get("type") if isinstance(option, dict) else None for option in error.validator_value]
    at_place = [inner for inner in error.context if not inner.relative_path and inner.validator == "type"]
    if len(at_place) == len(kinds) and all(isinstance(kind, str) for kind in kinds):
        return f"{where} must be {_expected('type', kinds)}, not {_short(error.instance)}"
    nearest = max(error.context, key=lambda inner: (len(inner.relative_path), inner.validator != "type"))
    return f"{where} fits none of its {len(kinds)} alternatives; in the nearest, {_told(nearest)}"


def _short(value: Any, most: int = 80) -> str:
    """A value as JSON, cut; large ones by their kind, for nobody reads them."""
    if isinstance(value, str):
        return _cut(json.dumps(value[:most], ensure_ascii=False), most) + ("…" if len(value) > most else "")
    if isinstance(value, (dict, list)) and len(value) > 5:
        return f"{'an object of' if isinstance(value, dict) else 'a list of'} {len(value)}"
    if isinstance(value, dict):
        return _cut("an object with " + (", ".join(f"`{key[:30]}`" for key in value) or "nothing in it"), most)
    if isinstance(value, list):
        return _cut("[" + ", ".join(_short(item, 20) for item in value) + "]", most)
    return _cut(json.dumps(value), most)


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
