"""How the host and the extraction worker talk: frames of a JSON header and raw bytes over one socket.

A frame is two big-endian 4-byte lengths, the header, the body. Both sides bound both lengths; nothing is unpickled.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from typing import Any

Json = dict[str, Any]
Read = Callable[[int], bytes]

_LENGTHS = struct.Struct(">II")
REQUEST_HEADER_CAP = 64 * 1024
REQUEST_BODY_CAP = 50 * 1024 * 1024
REPLY_HEADER_CAP = 8 * 1024 * 1024  # 500 links of 2,300 characters, at most 4 bytes each, with room
REPLY_BODY_CAP = 9 * 1024 * 1024  # 2,000,000 characters, at most 4 bytes each, with room


class BadFrame(Exception):
    """The other side sent what it should not; the message says what."""


def encode(header: Json, body: bytes = b"") -> tuple[bytes, bytes]:
    """A frame, as two parts so that a large body isn't copied. Lone surrogates become `?`."""
    text = json.dumps(header, ensure_ascii=False).encode("utf-8", "replace")
    return _LENGTHS.pack(len(text), len(body)) + text, body


def receive(read: Read, header_cap: int, body_cap: int) -> tuple[Json, bytes]:
    """One frame, through `read(n)`, which gives exactly `n` bytes. Raises `BadFrame`."""
    header_size, body_size = _LENGTHS.unpack(read(_LENGTHS.size))
    if header_size > header_cap or body_size > body_cap:
        raise BadFrame("a frame that is too large")
    text = read(header_size)
    return _object(text), read(body_size)


def _object(text: bytes) -> Json:
    try:
        header = json.loads(text)
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict):
        raise BadFrame("a header that is not a JSON object")
    return header
