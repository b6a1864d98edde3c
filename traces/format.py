"""The trace folder on disk: `events.jsonl`, one checksummed line an event, and `blobs/` for long strings and for files.

A line is `{"v":1,"seq":n,"t":wall,"mono":µs,"sum":"<16 hex>","event":{…}}` in exactly this order. Its body is the line
with `sum` left out, and `sum` is the start of sha256(sum of the line before + body): an edit, a loss or a swap shows.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from thinkloop.traces.events import Json, ThinkloopError

VERSION = 1
EVENTS = "events.jsonl"
BLOBS = "blobs"
BLOB_LIMIT = 4096
"""Strings of more bytes than this go to a blob, bytes always."""
FIRST_SUM = "0" * 16

_BLOB = "$blob"
_BYTES = "$bytes"
_LITERAL = "$literal"
_MARKS = {_BLOB, _BYTES, _LITERAL}
_LINE = re.compile(
    rb'\{"v":(?P<v>[1-9]\d{0,5}),"seq":(?P<seq>\d{1,15}),"t":(?P<t>\d+\.\d+),"mono":(?P<mono>\d{1,18}),'
    rb'"sum":"(?P<sum>[0-9a-f]{16})","event":(?P<event>\{.*\})\}'
)
_SHA256 = re.compile(r"[0-9a-f]{64}")


class TraceError(ThinkloopError):
    """A trace can't be written or read: the message says which folder, where in it, and what to do."""


def chained(previous: str, body: bytes) -> str:
    """The checksum of a line whose predecessor's is `previous`."""
    return hashlib.sha256(previous.encode("ascii") + body).hexdigest()[:16]


def line_bytes(seq: int, t: float, mono: int, event: Json, previous: str) -> tuple[bytes, str]:
    """One line, newline included, and its checksum. `t` is in seconds since 1970, `mono` in µs of the trace."""
    head = f'{{"v":{VERSION},"seq":{seq},"t":{t:.6f},"mono":{mono},'.encode("ascii")
    tail = b'"event":' + _dumps(event) + b"}"
    checksum = chained(previous, head + tail)
    return head + f'"sum":"{checksum}",'.encode("ascii") + tail + b"\n", checksum


def match_line(line: bytes) -> re.Match[bytes] | None:
    """The parts of a line (without its newline), or None when it isn't laid out as one."""
    return _LINE.fullmatch(line)


def body_of(line: bytes, match: re.Match[bytes]) -> bytes:
    """The line with `sum` left out: what the checksum is taken over."""
    start, end = match.span("sum")
    return line[: start - len('"sum":"')] + line[end + len('",') :]


def blob_path(folder: Path, digest: str) -> Path:
    return folder / BLOBS / digest[:2] / digest


def text_bytes(text: str) -> bytes:
    """UTF-8; lone surrogates, which a model can write as JSON escapes, survive the round trip."""
    return text.encode("utf-8", "surrogatepass")


class Reference(NamedTuple):
    """Stands for a blob in an event. `text` says whether the blob is a string or bytes."""

    digest: str
    size: int
    text: bool

    def to_json(self) -> Json:
        return {_BLOB if self.text else _BYTES: self.digest, "bytes": self.size}


def parse_reference(value: Json) -> Reference | None:
    """The reference when `value` stands for a blob. Only a real digest passes: no other file can be named."""
    text = _BLOB in value
    digest, size = value.get(_BLOB if text else _BYTES), value.get("bytes")
    if len(value) == 2 and isinstance(digest, str) and isinstance(size, int) and _SHA256.fullmatch(digest):
        return Reference(digest, size, text)
    return None


def escaped(value: Json) -> Json:
    """A model may write `{"$blob": …}` as an argument: marked, it's never taken for a reference of ours."""
    return {_LITERAL: value} if _MARKS & value.keys() else value


def literal(value: Json) -> Any:
    """What `escaped` wrapped, or None."""
    return value[_LITERAL] if len(value) == 1 and isinstance(value.get(_LITERAL), dict) else None


def _dumps(event: Json) -> bytes:
    try:
        return json.dumps(event, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    except UnicodeEncodeError:
        return json.dumps(event, separators=(",", ":")).encode("ascii")
