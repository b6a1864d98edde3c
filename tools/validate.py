"""Whether a call's arguments fit the tool's JSON Schema, and if not, what to tell the model.

Schema and arguments may both come from strangers, so nothing here can run away: sizes and depths are checked first,
without recursion; each keyword spends from a budget of work and time; patterns are matched by an automaton
(`tools.pattern`); `$ref` never leaves the schema. jsonschema (Draft 2020-12) does the rest; it takes 60 ms to import,
so only the first check does.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from itertools import islice
from typing import Any

from thinkloop.tools.expression import PatternError
from thinkloop.tools.mismatch import explained
from thinkloop.tools.pattern import check, search
from thinkloop.traces.events import Json

MAX_DEPTH = 64
MAX_SCHEMA_NODES, MAX_SCHEMA_CHARS = 20_000, 500_000
MAX_VALUE_NODES, MAX_VALUE_CHARS = 100_000, 4_000_000
MAX_WORK = 300_000
"""Keyword evaluations and the items they go through, in one check."""
MAX_SECONDS = 1.0
MAX_ERRORS = 50
QUICK_WORK = 200_000
"""Objects of a schema times characters of arguments, up to which a check is quick."""
MAX_INT_BITS = 4096

_DATA = ("const", "enum", "default", "examples")
_UNBOUNDED = frozenset(("pattern", "patternProperties", "$ref", "$dynamicRef"))


class _Refused(Exception):
    """Checking stopped at a guard; the text says which."""


def check_arguments(schema: Json, arguments: object) -> str | None:
    """None if `arguments` fit `schema`, else a short paragraph for the model: where, what is wrong, what was expected.

    A schema is compiled once and remembered by identity and content: don't change one that has been used. Never raises;
    a schema that can't be used gives a text that says so.
    """
    compiled = _compiled(schema)
    if compiled.problem:
        return f"the tool's own schema can't be used, which no call can mend: {compiled.problem}"
    try:
        _measure(arguments, "the arguments", MAX_VALUE_NODES, MAX_VALUE_CHARS)
        errors = _errors(compiled.validator, arguments)
    except _Refused as refused:
        return str(refused)
    return explained(errors) if errors else None


def misfits(schema: Json, arguments: object) -> list[tuple[str | int, ...]] | None:
    """The places in `arguments` that don't fit `schema`; None when that can't be told. Never raises."""
    compiled = _compiled(schema)
    if compiled.problem:
        return None
    try:
        _measure(arguments, "the arguments", MAX_VALUE_NODES, MAX_VALUE_CHARS)
        return [tuple(error.absolute_path) for error in _errors(compiled.validator, arguments)]
    except _Refused:
        return None


def is_quick(schema: Json, chars: int) -> bool:
    """Whether checking arguments of so many characters takes a few ms at most; if not, it belongs in a thread."""
    compiled = _compiled(schema)
    return bool(compiled.problem) or chars * compiled.weight <= QUICK_WORK


def check_schema(schema: Json) -> str | None:
    """None if `schema` can be checked against, else what is wrong with it, for the person who wrote the tool."""
    return _compiled(schema).problem or None


@dataclass(frozen=True, slots=True)
class _Compiled:
    """`weight` is the number of objects in the schema, or far more where it holds patterns or references."""

    problem: str
    validator: Any = None
    weight: int = 0


_by_identity: OrderedDict[int, tuple[Json, _Compiled]] = OrderedDict()
_by_content: OrderedDict[str, _Compiled] = OrderedDict()
_MOST_KEPT = 256


def _compiled(schema: Json) -> _Compiled:
    known = _by_identity.get(id(schema))
    if known is not None and known[0] is schema:
        return known[1]
    compiled = _compiled_by_content(schema)
    _keep(_by_identity, id(schema), (schema, compiled))  # holding the schema keeps its id from being used again
    return compiled


def _compiled_by_content(schema: Json) -> _Compiled:
    try:
        _measure(schema, "the schema", MAX_SCHEMA_NODES, MAX_SCHEMA_CHARS)
        key = json.dumps(schema)
    except (_Refused, TypeError, ValueError) as refused:
        return _Compiled(str(refused))
    compiled = _by_content.get(key)
    if compiled is None:
        compiled = _compile(schema)
        _keep(_by_content, key, compiled)
    return compiled


def _keep(kept: OrderedDict[Any, Any], key: Any, value: Any) -> None:
    kept[key] = value
    while len(kept) > _MOST_KEPT:
        kept.popitem(last=False)


def _compile(schema: Any) -> _Compiled:
    from jsonschema import Draft202012Validator, FormatChecker, SchemaError
    from referencing import Registry

    if not isinstance(schema, dict):
        return _Compiled("it is not a JSON object")
    try:
        _check_keywords(schema)
        own = {key: value for key, value in schema.items() if key != "$schema"}
        Draft202012Validator.check_schema(own, format_checker=FormatChecker(formats=()))
    except _Refused as refused:
        return _Compiled(str(refused))
    except SchemaError as error:
        return _Compiled(f"{'.'.join(map(str, error.path)) or 'it'} is not valid JSON Schema: {error.message[:200]}")
    except RecursionError:
        return _Compiled("it is nested too deeply")
    registry: Registry[Any] = Registry(retrieve=_not_fetched)  # type: ignore[call-arg]  # the same
    return _Compiled("", _guarded()(own, registry=registry), _weight(own))


def _weight(schema: Json) -> int:
    nodes = [node for node, is_data in _objects(schema) if not is_data]
    unbounded = any(not _UNBOUNDED.isdisjoint(node) for node in nodes)
    return QUICK_WORK if unbounded else len(nodes)


def _not_fetched(uri: str) -> Any:
    from referencing.exceptions import NoSuchResource

    raise NoSuchResource(ref=uri)  # type: ignore[call-arg]  # an attrs class mypy can't see through


def _measure(value: object, what: str, most_nodes: int, most_chars: int) -> None:
    """Raises `_Refused` unless `value` is JSON of a bearable size. Iterative: depth can't overflow the stack, and a
    value that contains itself is merely too deep."""
    nodes = chars = 0
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        below: list[Any] = []
        for item in level:
            nodes, chars = nodes + 1, chars + _length(item, what)
            below += _children(item)
            if nodes + len(below) > most_nodes or chars > most_chars:
                raise _Refused(
                    f"{what} are too large to check: more than {most_nodes:,} values or {most_chars:,} characters"
                )
        if not below:
            return
        level = below
    raise _Refused(f"{what} nest more than {MAX_DEPTH} levels deep")


def _length(item: object, what: str) -> int:
    """Characters of one value, its keys included. Raises `_Refused` for what isn't JSON."""
    match item:
        case str():
            return len(item)
        case bool() | None | list():
            return 1
        case int() if item.bit_length() <= MAX_INT_BITS:
            return 1
        case float() if math.isfinite(item):
            return 1
        case dict() if all(isinstance(key, str) for key in item):
            return sum(map(len, item))
        case int() | float():
            raise _Refused(f"{what} hold a number out of range (infinite, no number, or far too long)")
        case _:
            raise _Refused(f"{what} hold a {type(item).__name__}, which is not JSON")


def _children(item: object) -> Iterable[Any]:
    if isinstance(item, dict):
        return item.values()
    return item if isinstance(item, list) else ()


def _check_keywords(schema: Json) -> None:
    """Raises `_Refused` for what would get around the guards: foreign dialects, references out, unusable patterns."""
    ids: set[str] = set()
    refs: set[str] = set()
    names: set[str] = set()
    for node, is_data in _objects(schema):
        names |= node.keys()
        if node is not schema and isinstance(node.get("$schema"), str):
            raise _Refused("`$schema` may stand at its root only")
        ids |= {value for key in ("$id",) if isinstance(value := node.get(key), str)}
        refs |= {value for key in ("$ref", "$dynamicRef") if isinstance(value := node.get(key), str)}
        if not is_data:
            _check_patterns(node)
    outside = sorted(ref for ref in refs if not ref.startswith("#") and ref.partition("#")[0] not in ids)
    if outside:
        raise _Refused(
            f"it refers to {outside[0][:100]!r}, outside itself; nothing is fetched: put the definition into `$defs`"
        )
    if {"unevaluatedProperties", "patternProperties"} <= names:
        raise _Refused("`unevaluatedProperties` together with `patternProperties` is not supported")


def _objects(schema: Json) -> Iterator[tuple[Json, bool]]:
    """Every object in the schema, and whether it is data rather than schema (inside `const` and the like)."""
    stack: list[tuple[Any, bool]] = [(schema, False)]
    while stack:
        node, is_data = stack.pop()
        if isinstance(node, dict):
            yield node, is_data
            stack += [(value, is_data or key in _DATA) for key, value in node.items()]
        elif isinstance(node, list):
            stack += [(value, is_data) for value in node]


def _check_patterns(node: Json) -> None:
    several = node.get("patternProperties")
    patterns = [*([node["pattern"]] if "pattern" in node else []), *(several if isinstance(several, dict) else ())]
    for pattern in patterns:
        if not isinstance(pattern, str):
            continue
        try:
            check(pattern)
        except PatternError as error:
            raise _Refused(f"the pattern {pattern[:80]!r} can't be used: {error}") from None


# The guarded validator


class _Budget:
    """Work and time left to one check."""

    def __init__(self) -> None:
        self.work = MAX_WORK
        self.until = time.monotonic() + MAX_SECONDS

    def spend(self, work: int) -> None:
        self.work -= work
        if self.work < 0 or time.monotonic() > self.until:
            raise _Refused(
                "the arguments take too long to check against the tool's schema; make them smaller and simpler"
            )


_budget: ContextVar[_Budget] = ContextVar("budget")
Keyword = Callable[[Any, Any, Any, Any], Iterable[Any] | None]


@cache
def _guarded() -> Any:
    """Draft 2020-12 with every keyword on a budget and with our own patterns and uniqueness."""
    from jsonschema import Draft202012Validator
    from jsonschema.validators import extend

    own: dict[str, Keyword] = {
        "pattern": _pattern,
        "patternProperties": _pattern_properties,
        "additionalProperties": _additional_properties,
        "uniqueItems": _unique_items,
    }
    keywords = {**Draft202012Validator.VALIDATORS, **own}
    guarded = {name: _on_budget(keyword) for name, keyword in keywords.items()}
    return extend(Draft202012Validator, guarded)  # type: ignore[no-untyped-call]  # jsonschema leaves it untyped


def _on_budget(keyword: Keyword) -> Keyword:
    def guarded(validator: Any, value: Any, instance: Any, schema: Any) -> Iterator[Any]:
        _budget.get().spend(1 + _items(value) + _items(instance))
        yield from keyword(validator, value, instance, schema) or ()

    return guarded


def _items(value: Any) -> int:
    return len(value) if isinstance(value, (dict, list)) else 0


def _found(pattern: str, text: str) -> bool:
    _budget.get().spend(1 + len(text))
    try:
        return search(pattern, text)
    except PatternError as error:
        raise _Refused(
            f"a text of {len(text):,} characters can't be checked against the pattern {pattern[:80]!r}: {error}"
        ) from None


def _pattern(validator: Any, pattern: str, instance: Any, schema: Json) -> Iterator[Any]:
    if isinstance(instance, str) and not _found(pattern, instance):
        yield _error("pattern")


def _pattern_properties(validator: Any, patterns: Json, instance: Any, schema: Json) -> Iterator[Any]:
    if not isinstance(instance, dict):
        return
    for pattern, subschema in patterns.items():
        for key, value in instance.items():
            if _found(pattern, key):
                yield from validator.descend(value, subschema, path=key, schema_path=pattern)


def _additional_properties(validator: Any, allowed: Any, instance: Any, schema: Json) -> Iterator[Any]:
    if not isinstance(instance, dict):
        return
    known, patterns = schema.get("properties", {}), schema.get("patternProperties", {})
    extras = [key for key in instance if key not in known and not any(_found(pattern, key) for pattern in patterns)]
    if isinstance(allowed, dict):
        for key in extras:
            yield from validator.descend(instance[key], allowed, path=key)
    elif allowed is False and extras:
        yield _error("additionalProperties", extras)


def _unique_items(validator: Any, wanted: Any, instance: Any, schema: Json) -> Iterator[Any]:
    """Linear where jsonschema's own compares each with each. 1 and 1.0 are equal in JSON Schema; 1 and true are not."""
    if wanted and isinstance(instance, list) and len({_canonical(item) for item in instance}) < len(instance):
        yield _error("uniqueItems")


def _canonical(item: Any) -> str:
    text = _encode(item)
    return _encode(_with_whole_numbers(item)) if _FLOAT.search(text) else text


_encode = json.JSONEncoder(sort_keys=True).encode
_FLOAT = re.compile(r"[0-9](?:\.0|e)")


def _with_whole_numbers(value: Any) -> Any:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, dict):
        return {key: _with_whole_numbers(item) for key, item in value.items()}
    return [_with_whole_numbers(item) for item in value] if isinstance(value, list) else value


def _error(message: str, details: Any = ()) -> Any:
    from jsonschema import ValidationError

    error = ValidationError(message)
    error.details = details  # type: ignore[attr-defined]  # read by `mismatch`: the properties that are too many
    return error


def _errors(validator: Any, arguments: object) -> list[Any]:
    """The first errors. Raises `_Refused` when the schema can't be followed or the budget is spent."""
    token = _budget.set(_Budget())
    try:
        return list(islice(validator.iter_errors(arguments), MAX_ERRORS))
    except _Refused:
        raise
    except RecursionError:
        raise _Refused("the tool's schema refers to itself without end, which no call can mend") from None
    except Exception as error:  # whatever a hostile schema brings out of a library must not end a run
        raise _Refused(
            f"the arguments can't be checked against the tool's schema ({type(error).__name__}: {str(error)[:200]})"
        ) from None
    finally:
        _budget.reset(token)
