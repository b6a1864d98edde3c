"""Reads a trace line by line: whole, cut, damaged, or still being written. Memory doesn't grow with the trace."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from thinkloop.traces import format as fmt
from thinkloop.traces.events import Event, from_json
from thinkloop.traces.format import TraceError


@dataclass(frozen=True, slots=True)
class Record:
    """An event as stored: `seq` counts from 0, `t` is in seconds since 1970, `mono` in µs since the trace began."""

    seq: int
    t: float
    mono: int
    event: Event


@dataclass(frozen=True, slots=True)
class Problem:
    """Damage in a trace: the line counts from 1, `offset` is the line's first byte in `events.jsonl`."""

    line: int
    offset: int
    message: str

    def __str__(self) -> str:
        return f"line {self.line} (byte {self.offset}): {self.message}"


@dataclass(slots=True)
class _Chain:
    """What the next line must fit. `checksum` is None after a line whose checksum can't be known."""

    seq: int = 0
    checksum: str | None = fmt.FIRST_SUM


@dataclass(frozen=True, slots=True)
class TraceReader:
    """An open trace: iterate it for `Record`s in order.

    A last line without its newline (a crash, or a writer at work) is left out, never an error. Any other damage raises
    `TraceError` at its position when `strict`; otherwise what can't be read is skipped and a lost blob's text says so.
    """

    folder: Path
    strict: bool = True

    @classmethod
    def open(cls, folder: str | os.PathLike[str], *, strict: bool = True) -> TraceReader:
        """The trace in `folder`. Raises `TraceError` when there is none."""
        path = Path(folder)
        if not (path / fmt.EVENTS).is_file():
            raise TraceError(
                f"There is no trace in {str(path)!r}: it has no {fmt.EVENTS}. "
                "`thinkloop trace ls DIR` lists the traces below a folder."
            )
        return cls(path, strict)

    def __iter__(self) -> Iterator[Record]:
        return self._records(self._raise if self.strict else _ignore)

    def events(self) -> Iterator[Event]:
        """The events alone."""
        return (record.event for record in self)

    def problems(self) -> list[Problem]:
        """Every damage in the trace, in order; empty for a whole one, and for one whose last line is torn."""
        found: list[Problem] = []
        for _ in self._records(found.append):
            pass
        return found

    def torn(self) -> int:
        """Bytes of a last line that has no end: 0 for a trace that was closed."""
        with self._events() as file:
            return sum(len(line) for line in file if not line.endswith(b"\n"))

    def decode(self, line: bytes) -> Event | None:
        """The event of one line (without its newline) taken out of order, its chain unchecked; None if unreadable."""
        match = fmt.match_line(line)
        try:
            return self._decoded(match)[0].event if match else None
        except _Unreadable:
            return None

    def _events(self) -> BinaryIO:
        try:
            return (self.folder / fmt.EVENTS).open("rb")
        except OSError as error:
            raise TraceError(
                f"Can't read the trace {str(self.folder)!r}: {error.strerror}. Check the permissions of {fmt.EVENTS}."
            ) from error

    def _raise(self, problem: Problem) -> None:
        raise TraceError(
            f"The trace {str(self.folder)!r} is damaged at {problem}. The events before are whole: "
            "`thinkloop trace show` lists what can still be read."
        )

    def _records(self, report: Callable[[Problem], None]) -> Iterator[Record]:
        chain, offset = _Chain(), 0
        with self._events() as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    return
                try:
                    record, complaint = self._record(line[:-1], chain)
                except _Unreadable as error:
                    record, complaint = None, str(error)
                if complaint:
                    report(Problem(number, offset, complaint))
                if record is not None:
                    yield record
                offset += len(line)

    def _record(self, line: bytes, chain: _Chain) -> tuple[Record | None, str]:
        """The line's record and what is wrong with it. A line that fails its checksum gives no record."""
        match = fmt.match_line(line)
        if match is None:
            chain.seq, chain.checksum = chain.seq + 1, None
            return None, "this isn't a trace line"
        seq, expected, previous = int(match["seq"]), chain.seq, chain.checksum
        chain.seq, chain.checksum = seq + 1, match["sum"].decode("ascii")
        if int(match["v"]) > fmt.VERSION:
            raise _Unreadable(
                f"format version {int(match['v'])} is newer than this program's {fmt.VERSION}: update thinkloop"
            )
        if seq != expected:
            # The checksum can't fit either, since it continues the line that is missing.
            return self._decoded(match)[0], f"event {seq} stands where event {expected} belongs"
        if previous is not None and fmt.chained(previous, fmt.body_of(line, match)) != chain.checksum:
            return None, "the checksum doesn't fit: this line or the one before was changed"
        return self._decoded(match)

    def _decoded(self, match: re.Match[bytes]) -> tuple[Record, str]:
        lost: list[str] = []
        try:
            data = self._restored(json.loads(match["event"]), lost)
            record = Record(int(match["seq"]), float(match["t"]), int(match["mono"]), from_json(data))
        except (ValueError, TypeError, RecursionError) as error:
            raise _Unreadable(f"the event can't be understood: {error}") from error
        return record, "; ".join(lost)

    def _restored(self, value: Any, lost: list[str]) -> Any:
        if isinstance(value, list):
            return [item if type(item) is int else self._restored(item, lost) for item in value]
        if not isinstance(value, dict):
            return value
        inner = fmt.literal(value)
        if inner is not None:
            return {key: self._restored(item, lost) for key, item in inner.items()}
        reference = fmt.parse_reference(value)
        if reference is not None:
            return self._blob(reference, lost)
        return {key: self._restored(item, lost) for key, item in value.items()}

    def _blob(self, blob: fmt.Reference, lost: list[str]) -> str | bytes:
        """The blob, or in its place a text that says what became of it; no bytes where bytes are lost."""
        try:
            data = fmt.blob_path(self.folder, blob.digest).read_bytes()
        except OSError:
            lost.append(f"blob {blob.digest} is missing")
            return f"[lost: {blob.size} bytes of text, blob {blob.digest[:12]}]" if blob.text else b""
        if len(data) != blob.size or hashlib.sha256(data).hexdigest() != blob.digest:
            lost.append(f"blob {blob.digest} was changed")
            return f"[damaged: {blob.size} bytes of text, blob {blob.digest[:12]}]" if blob.text else b""
        return data.decode("utf-8", "surrogatepass") if blob.text else data


class _Unreadable(Exception):
    """Why one line gives no record."""


def _ignore(problem: Problem) -> None:
    """Lenient reading goes on."""
