"""Server-sent events, decoded a chunk at a time: bytes as they come in, JSON payloads out.

Lines end in LF, CRLF or CR, wherever the network cut them; a line is decoded only when it is whole, so a character
split between two chunks is no special case. Everything is linear in the bytes read, and nothing grows past `max_line`.
"""

from __future__ import annotations

import json
from typing import Any

from thinkloop.traces.events import ThinkloopError

MAX_LINE = 4 * 2**20
"""Longest line, and longest event of several lines, in bytes: far above any real delta, far below what would hurt."""

DONE = "[DONE]"


class BadStream(ThinkloopError):
    """The bytes are not an event stream: a line past the limit, or data that is not JSON."""


class SseDecoder:
    """Turns an event stream's bytes into the JSON values of its `data` fields, and notices `[DONE]`.

    A `data` line that is JSON by itself is given at once (some servers forget the blank line between events); otherwise
    lines are joined until the blank line, as the standard says. Comments, `id` and `retry` are skipped. The data of an
    event named `error` comes as `{"error": data}`.
    """

    def __init__(self, max_line: int = MAX_LINE) -> None:
        self.done = False
        self._max_line = max_line
        self._tail: list[bytes] = []
        self._tail_size = 0
        self._data: list[str] = []
        self._data_size = 0
        self._event = ""
        self._first = True

    def feed(self, chunk: bytes) -> list[Any]:
        """The payloads that this chunk completes. Raises `BadStream`."""
        if not chunk:
            return []
        if b"\n" not in chunk and b"\r" not in chunk and not self._ends_in_cr():
            self._keep(chunk)
            return []
        buffer = b"".join([*self._tail, chunk])
        whole, rest = _split_lines(buffer)
        self._tail, self._tail_size = [], 0
        if rest:
            self._keep(rest)
        return self._lines(whole)

    def close(self) -> list[Any]:
        """The payloads left when the stream ends without a last blank line. Half an event is dropped, not an error."""
        last = b"".join(self._tail).rstrip(b"\r")
        self._tail, self._tail_size = [], 0
        try:
            return self._lines([last, b""] if last else [b""])
        except BadStream:
            return []

    def _ends_in_cr(self) -> bool:
        return bool(self._tail) and self._tail[-1].endswith(b"\r")

    def _keep(self, rest: bytes) -> None:
        self._tail.append(rest)
        self._tail_size += len(rest)
        self._check(self._tail_size)

    def _check(self, size: int) -> None:
        if size > self._max_line:
            raise BadStream(f"a line of the reply is longer than {self._max_line:,} bytes")

    def _lines(self, lines: list[bytes]) -> list[Any]:
        out: list[Any] = []
        for line in lines:
            self._check(len(line))
            out += self._line(line.decode("utf-8", "replace"))
        return out

    def _line(self, line: str) -> list[Any]:
        if self._first:
            line, self._first = line.removeprefix("\ufeff"), False
        if not line:
            return self._dispatch()
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "event":
            self._event = value
        if name != "data":
            return []
        return self._data_line(value)

    def _data_line(self, value: str) -> list[Any]:
        if value.strip() == DONE:
            self.done = True
            return []
        if not self._data:
            try:
                return [self._named(loads(value))]
            except ValueError:
                pass
        self._data.append(value)
        self._data_size += len(value) + 1
        self._check(self._data_size)
        return []

    def _dispatch(self) -> list[Any]:
        text, self._data, self._data_size = "\n".join(self._data), [], 0
        try:
            return [self._named(loads(text))] if text.strip() else []
        except ValueError:
            raise BadStream(f"the reply has an event that is not JSON: {text[:200]!r}") from None
        finally:
            self._event = ""

    def _named(self, value: Any) -> Any:
        if self._event == "error" and not (isinstance(value, dict) and "error" in value):
            return {"error": value}
        return value


def loads(text: str | bytes) -> Any:
    """`json.loads` that says `ValueError` for all that can go wrong, nesting past the interpreter's depth included."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _split_lines(buffer: bytes) -> tuple[list[bytes], bytes]:
    """Whole lines without their ends, and what follows the last end. A CR at the very end may be half a CRLF."""
    end = max(buffer.rfind(b"\n"), buffer.rfind(b"\r", 0, len(buffer) - 1)) + 1
    return buffer[:end].splitlines(), buffer[end:]
