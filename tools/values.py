"""A function's value as a tool's output: text as it is, anything else as compact JSON, and what has no JSON as its
`repr`. Values may be of any size and may misbehave; what is made of them is bounded."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import AsyncIterator, Iterator
from functools import partial
from itertools import islice
from typing import Any

from thinkloop.tools.outcome import MAX_CHARS, told
from thinkloop.tools.tool import Attachment, Output

MAX_ITEMS = 50_000
"""Items and characters (`MAX_CHARS`) up to which a value is written in one go; beyond, piece by piece until there is
enough of it."""
SHOWN_BYTES = 32

_SETS = (set, frozenset, deque)
_encoder = partial(json.JSONEncoder, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def as_output(value: Any) -> Output:
    """`value` as an `Output`; one that is an `Output` already passes as it is. Raises `TypeError` for what gives its
    values one by one (generators, open files): it may never end."""
    if isinstance(value, (Output, str)):
        return value if isinstance(value, Output) else Output(value)
    if isinstance(value, (bytes, bytearray, memoryview)):
        return _binary(bytes(value))
    if isinstance(value, (Iterator, AsyncIterator)):
        raise TypeError(f"the function returned a {type(value).__name__}, which gives its values one by one: "
                        "return a list")  # fmt: skip
    try:
        return Output(_as_json(value))
    except (ValueError, TypeError, RecursionError):
        return Output(_shown(value))


def _binary(data: bytes) -> Output:
    """Bytes that are text become text; others are kept as a file."""
    if b"\0" not in data:
        try:
            return Output(data.decode("utf-8"))
        except UnicodeDecodeError:
            pass
    first = data[:SHOWN_BYTES].hex(" ")
    file = Attachment("result.bin", "application/octet-stream", data)
    return Output(f"[{len(data):,} bytes that are not text; the first are {first}]", files=(file,))


def _as_json(value: Any) -> str:
    if not _is_small(value):
        return _streamed(value)
    try:
        return _encoder().encode(value)
    except TypeError:  # dataclasses, models, dates, sets
        return _encoder().encode(_jsonable(value))


def _jsonable(value: Any) -> Any:
    from pydantic_core import to_jsonable_python

    return to_jsonable_python(value, by_alias=False)


def _is_small(value: Any) -> bool:
    items = chars = 0
    level = [value]
    while level:
        below: list[Any] = []
        for item in level:
            if isinstance(item, (Iterator, AsyncIterator)):
                raise TypeError("it holds what gives its values one by one")
            chars += len(item) if isinstance(item, (str, bytes)) else 0
            below += islice(_parts(item), MAX_ITEMS + 1)
            items += 1
            if items + len(below) > MAX_ITEMS or chars > MAX_CHARS:
                return False
        level = below
    return True


def _parts(item: Any) -> Any:
    if isinstance(item, dict):
        return item.values()
    return item if isinstance(item, (list, tuple, *_SETS)) else ()


def _streamed(value: Any) -> str:
    """As much of the JSON as a result may have."""
    pieces, chars = list[str](), 0
    for piece in _encoder(default=_one).iterencode(value):
        pieces.append(piece[:MAX_CHARS])
        chars += len(piece)
        if chars > MAX_CHARS:
            pieces.append(f"\n[… cut after {MAX_CHARS:,} characters]")
            break
    return "".join(pieces)


def _one(value: Any) -> Any:
    """The next level of a value that isn't JSON."""
    return list(islice(value, MAX_CHARS)) if isinstance(value, _SETS) else _jsonable(value)


def _shown(value: Any) -> str:
    try:
        return repr(value)
    except Exception as error:
        return f"<a {type(value).__name__} that can't be shown: {told(error)}>"
