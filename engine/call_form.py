"""The form of a call: which tool its header names, which index it has, what its argument text says.

Well-formed headers are `functions.{name}:{index}`. Other forms that models write (`search:2`, `functions_search_0`,
`functions(search):2.0`, `functions.search30`) count only when they lead to a tool that was declared.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

from thinkloop.traces.events import Json

Declared = Mapping[str, Json]
"""Names of the declared tools, each with its parameter schema."""

MAX_DEPTH = 64
MAX_INDEX_JUMP = 10_000
"""How far ahead of the next free index a model's own index may be and still be kept."""

_IN_ID = re.compile(r"[^\s:<|]{1,64}")
_MAX_HEADER = 200
_WELL_FORMED = re.compile(r"functions\.([A-Za-z_][\w.-]{0,63}):([0-9]{1,9})", re.ASCII)
_UNDECLARED = re.compile(r"(?:functions\.)?([A-Za-z_][\w.-]{0,63})(?::[0-9]+)?", re.ASCII)
_BARE = re.compile(r"(?:functions)?[._:]?[0-9]*", re.ASCII)
_PREFIX = re.compile(r"functions[._:(]?", re.ASCII)
_INDEX = re.compile(r"[._:]?[0-9]+(?:\.[0-9]+)?$", re.ASCII)


def declared_tools(tools: Sequence[Json]) -> Declared:
    """Name to schema from declarations in OpenAI form; entries without a name are left out."""
    functions = [tool.get("function") or {} for tool in tools]
    return {str(f["name"]): f.get("parameters") or {} for f in functions if f.get("name")}


def call_name(header: str, declared: Declared) -> str:
    """The tool that a call's header names, "" when it names none. Whitespace in the header doesn't count. A name that
    was not declared comes back only from a well-formed header: the model called something that doesn't exist."""
    compact = "".join(header.split())
    if len(compact) > _MAX_HEADER:
        return ""
    for name in _candidates(compact):
        if name in declared:
            return name
    form = None if _BARE.fullmatch(compact) else _UNDECLARED.fullmatch(compact)
    return form[1] if form else ""


def _candidates(compact: str) -> Iterator[str]:
    """Names that a header may mean, the likeliest first."""
    form = _WELL_FORMED.fullmatch(compact)
    if form:
        yield form[1]
    for base in (compact, _PREFIX.sub("", compact, count=1)):
        for name in (base, re.sub(r"[.:_][0-9.]+$", "", base), _INDEX.sub("", base)):
            plain = name.strip("().:")
            yield from (plain, plain.replace("-", "_"), plain.replace("_", "-"), "_".join(plain.split("_")[::-1]))


def infer_name(header: str, arguments: Json | None, declared: Declared) -> str:
    """The one declared tool that a call without a name can mean by its argument keys, "" when none or several fit."""
    if not arguments or not _BARE.fullmatch("".join(header.split())):
        return ""
    fitting = [name for name, schema in declared.items() if _fits(set(arguments), schema)]
    return fitting[0] if len(fitting) == 1 else ""


def _fits(keys: set[str], schema: Json) -> bool:
    return keys <= set(schema.get("properties") or ()) and keys >= set(schema.get("required") or ())


def id_index(header: str, name: str, next_index: int) -> int:
    """The index in a well-formed header when it isn't used yet, else `next_index`."""
    form = _WELL_FORMED.fullmatch("".join(header.split()))
    if form is None or form[1] != name:
        return next_index
    index = int(form[2])
    return index if next_index <= index <= next_index + MAX_INDEX_JUMP else next_index


def call_id(name: str, index: int) -> str:
    """`functions.{name}:{index}`, with `unnamed` for what can't stand in an id."""
    return f"functions.{name if _IN_ID.fullmatch(name) else 'unnamed'}:{index}"


def parse_arguments(raw: str) -> tuple[Json | None, str]:
    """The arguments that a call's text says, and what is wrong with it ("" when nothing is). Strict JSON, an object, no
    NaN or infinities, at most `MAX_DEPTH` levels; empty text is an empty object."""
    if not raw.strip():
        return {}, ""
    try:
        value = json.loads(raw, parse_constant=_no_constant, parse_float=_finite)
    except RecursionError:
        return None, f"the arguments are nested more than {MAX_DEPTH} levels deep"
    except ValueError as error:
        return None, f"the arguments are not valid JSON: {error}"
    return _checked(value)


def _checked(value: Any) -> tuple[Json | None, str]:
    if not isinstance(value, dict):
        return None, f"the arguments must be a JSON object, not {type(value).__name__}"
    if _too_deep(value):
        return None, f"the arguments are nested more than {MAX_DEPTH} levels deep"
    if not _encodable(value):
        return None, "the arguments contain half a surrogate pair, which is not text"
    return value, ""


def _too_deep(value: Any) -> bool:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [child for item in level for child in _children(item)]
        if not level:
            return False
    return True


def _children(value: Any) -> Sequence[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else ()


def _encodable(value: Json) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"the number {text[:20]} is out of range")
    return number
