"""Mends a call's arguments where they can mean one thing only; where two readings are possible there is no repair.

The text: a code fence around it, an object written as a JSON string, Python's `True`, `None` and single quotes, raw
line breaks in strings, a comma too many before a bracket, closing brackets too many or missing at the very end. The
values: `"3"` for 3 and `"true"` for true, an object or list given as JSON text, one item where a list of such is asked.
What comes out fits the schema. Texts that were cut off by a limit aren't for this: nobody knows what was to follow.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Iterator, Sequence
from copy import deepcopy
from itertools import combinations_with_replacement
from typing import Any, NamedTuple, NoReturn

from thinkloop.tools.validate import check_arguments, misfits
from thinkloop.traces.events import Json

MAX_CHARS = 100_000
"""Longer texts are not mended."""
MAX_TRIES = 300_000
"""Tokens gone through in the search for other readings; a text that needs more isn't mended."""
MAX_SECONDS = 1.0
"""After which no further reading of a value is tried."""
MAX_MISSING = 2
MAX_MISFITS = 8

Path = tuple[str | int, ...]


def repaired(schema: Json, raw: str, arguments: Json | None = None) -> Json | None:
    """The only object that `raw` can mean under `schema`, or None. `arguments` is what `raw` says where it is a JSON
    object already, and only doesn't fit. Never raises; takes about 2 s at most (usually 1 ms)."""
    if len(raw) > MAX_CHARS:
        return None
    value = arguments if arguments is not None else read_text(raw)
    if value is None:
        return None
    if arguments is None and check_arguments(schema, value) is None:
        return value
    return _coerced(schema, value)


# The text

_BLANK = " \t\r\n\ufeff\u200b\u00a0"
_FENCE, _LANGUAGE = "```", re.compile(r"[\w-]{0,20}")
_TOKEN = re.compile(
    r"""(?P<space>[ \t\r\n]+)|(?P<string>"[^"\\]*(?:\\.[^"\\]*)*")|(?P<single>'[^'\\]*(?:\\.[^'\\]*)*')"""
    r"""|(?P<word>[A-Za-z_]\w*)|(?P<number>-?\d[\d.eE+-]*)|(?P<mark>[][{},:])""",
    re.DOTALL,
)
_WORDS = {"True": "true", "False": "false", "None": "null", "true": "true", "false": "false", "null": "null"}
_TAIL = re.compile(r"[\s\]})`;]{0,8}")
_CLOSER = {"{": "}", "[": "]"}


class _Token(NamedTuple):
    kind: str
    text: str
    end: int


def read_text(raw: str) -> Json | None:
    """The only object that a malformed text can mean, or None."""
    text = _unfenced(raw.strip(_BLANK))
    if not text:
        return None
    found = _strict(text)
    if isinstance(found, str):
        found = _strict(found)
    if isinstance(found, dict):
        return found
    return _mended(text) if text.startswith("{") else None


def _unfenced(text: str) -> str:
    if len(text) < 2 * len(_FENCE) or not (text.startswith(_FENCE) and text.endswith(_FENCE)):
        return text
    return _LANGUAGE.sub("", text[len(_FENCE) : -len(_FENCE)], count=1).strip(_BLANK)


def _mended(text: str) -> Json | None:
    tokens = _without_trailing_commas(_tokens(text))
    end, stack = _end_of_object(tokens)
    if end is not None:
        whole = tokens[: end + 1]
        rest = text[whole[-1].end :]
        return _object(_joined(whole)) if _TAIL.fullmatch(rest) else None
    if not tokens or not stack or tokens[-1].end < len(text) or len(stack) > MAX_MISSING:
        return None
    return _closed(tokens, len(stack))


def _tokens(text: str) -> list[_Token]:
    """The tokens up to the first thing that is none, in JSON's spelling, without white space."""
    found: list[_Token] = []
    at = 0
    while match := _TOKEN.match(text, at):
        at = match.end()
        kind = str(match.lastgroup)
        spelled = _spelled(kind, match[0])
        if spelled is None:
            break
        if kind == "space" and found:
            found[-1] = found[-1]._replace(end=at)
        elif kind != "space":
            found.append(_Token("string" if kind == "single" else kind, spelled, at))
    return found


def _spelled(kind: str, text: str) -> str | None:
    if kind == "word":
        return _WORDS.get(text)
    if kind == "string":
        return _escaped(text)
    if kind == "single":
        inner = re.sub(r"""\\(['"])|(")""", lambda match: "'" if match[1] == "'" else '\\"', text[1:-1])
        return _escaped(f'"{inner}"')
    return text


def _escaped(text: str) -> str:
    return re.sub(r"[\x00-\x1f]", lambda match: json.dumps(match[0])[1:-1], text)


def _without_trailing_commas(tokens: Sequence[_Token]) -> list[_Token]:
    kept: list[_Token] = []
    for token in tokens:
        if token.text in ("}", "]") and len(kept) > 1 and kept[-1].text == "," and kept[-2].text not in _OPEN:
            kept.pop()
        kept.append(token)
    return kept


_OPEN = ("{", "[", ",", ":")


def _end_of_object(tokens: Sequence[_Token]) -> tuple[int | None, list[str]]:
    """The index of the token that closes the first object, else what is still open; nothing where brackets cross."""
    stack: list[str] = []
    for index, token in enumerate(tokens):
        if token.kind != "mark" or token.text in ",:":
            continue
        if token.text in _CLOSER:
            stack.append(token.text)
        elif not stack or _CLOSER[stack.pop()] != token.text:
            return None, []
        elif not stack:
            return index, []
    return None, stack


def _closed(tokens: Sequence[_Token], missing: int) -> Json | None:
    """The object with its missing brackets, if there is one place only where they can stand."""
    last = tokens[-1]
    if last.kind == "number" or last.text in _OPEN:
        return None  # 12 may have been to become 125, and after a comma something was to follow
    places = [index for index, token in enumerate(tokens) if token.text == "," and token.kind == "mark"]
    places.append(len(tokens))
    choices = math.comb(len(places) + missing - 1, missing)
    if choices * len(tokens) > MAX_TRIES:
        return None
    found: dict[str, Json] = {}
    for chosen in combinations_with_replacement(places, missing):
        text = _with_closers(tokens, chosen)
        value = _object(text) if text else None
        if value is not None:
            found[json.dumps(value, sort_keys=True)] = value
    return next(iter(found.values())) if len(found) == 1 else None


def _with_closers(tokens: Sequence[_Token], places: Sequence[int]) -> str | None:
    """The text with whatever bracket is open closed at each of the places; None where that can't be."""
    pieces, stack = list[str](), list[str]()
    for index in range(len(tokens) + 1):
        for _ in range(places.count(index)):
            if not stack:
                return None
            pieces.append(_CLOSER[stack.pop()])
        if index == len(tokens):
            break
        text = tokens[index].text
        if index and not stack:
            return None
        if text in _CLOSER:
            stack.append(text)
        elif text in "]}" and _CLOSER[stack.pop()] != text:
            return None
        pieces.append(text)
    return None if stack else "".join(pieces)


def _joined(tokens: Sequence[_Token]) -> str:
    return "".join(token.text for token in tokens)


def _object(text: str) -> Json | None:
    value = _strict(text)
    return value if isinstance(value, dict) else None


def _strict(text: str) -> Any:
    """What a JSON text says. None for what isn't JSON, names a key twice, or holds what can't be passed on."""
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite)
        json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        return None
    return value


def _unique(pairs: list[tuple[str, Any]]) -> Json:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError("a key stands twice")
    return value


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError("a number is out of range")
    return number


# The values

_SCALARS: dict[str, Any] = {"true": True, "True": True, "false": False, "False": False, "null": None, "None": None}
_INTEGER = re.compile(r"-?(0|[1-9]\d{0,15})", re.ASCII)
_NUMBER = re.compile(r"-?(0|[1-9]\d{0,15})\.\d{1,16}", re.ASCII)
_SEVERAL = re.compile(r"[,;\n]")


def _coerced(schema: Json, arguments: Json) -> Json | None:
    """The arguments with each value that doesn't fit replaced by the only reading of it that does."""
    places = sorted(set(misfits(schema, arguments) or ()), key=len)
    if not places or not places[0] or len(places) > MAX_MISFITS:
        return None
    value: Json = deepcopy(arguments)
    until = time.monotonic() + MAX_SECONDS
    for place in places:
        readings = [reading for reading in _readings(_at(value, place)) if _fits(schema, value, place, reading)]
        if time.monotonic() > until or len({json.dumps(reading, sort_keys=True) for reading in readings}) != 1:
            return None
        _put(value, place, readings[0])
    return value if check_arguments(schema, value) is None else None


def _fits(schema: Json, value: Json, place: Path, reading: Any) -> bool:
    before = _at(value, place)
    _put(value, place, reading)
    left = misfits(schema, value)
    _put(value, place, before)
    return left is not None and all(other[: len(place)] != place for other in left)


def _readings(value: Any) -> Iterator[Any]:
    """What a value may have been meant to be, besides what it is."""
    if isinstance(value, str):
        yield from _readings_of_text(value.strip())
        if not _SEVERAL.search(value) and value.strip()[:1] not in ("[", "{"):
            yield [value]
    elif not isinstance(value, list):
        yield [value]


def _readings_of_text(text: str) -> Iterator[Any]:
    if text in _SCALARS:
        yield _SCALARS[text]
    elif _INTEGER.fullmatch(text) or _NUMBER.fullmatch(text):
        number = json.loads(text)
        yield number
        yield [number]
    elif text[:1] in ("[", "{"):
        whole = _strict(text)
        if whole is not None:
            yield whole


def _at(value: Any, place: Path) -> Any:
    for step in place:
        value = value[step]
    return value


def _put(value: Any, place: Path, new: Any) -> None:
    _at(value, place[:-1])[place[-1]] = new
