"""Plays a trace again at the speed of the record, faster, or at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace

from thinkloop.traces.events import Content, Event, RunFinished, Thinking
from thinkloop.traces.format import TraceError
from thinkloop.traces.reader import Record, TraceReader

PIECE = 4
"""Characters of stored text that are shown at a time: about a token."""
FRAME = 0.02
"""Seconds below which a wait isn't worth making: it's added to the next."""


class Player:
    """The events of a trace in time. `now` gives the record's time in seconds, for whoever shows them."""

    def __init__(
        self, reader: TraceReader, *, speed: float | None = 1.0, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        """`speed` 2 is twice as fast as recorded, None is at once."""
        self._reader, self._speed, self._sleep = reader, speed, sleep
        self._position = 0.0
        self._slept = 0.0

    def now(self) -> float:
        return self._position

    def events(self) -> Iterator[Event]:
        """The events, each at its time; text comes in pieces, as it was written.

        Raises `TraceError` at damage, and after the last event when the record doesn't reach the end of the run.
        """
        last: Event | None = None
        for record, following in _with_next(iter(self._reader)):
            last = record.event
            self._wait_until(record.mono / 1e6)
            if self._speed and isinstance(last, Thinking | Content) and following:
                yield from self._spoken(last, record.mono / 1e6, following.mono / 1e6)
            else:
                yield last
        if not isinstance(last, RunFinished):
            raise TraceError(unfinished(self._reader))

    def _spoken(self, event: Thinking | Content, start: float, end: float) -> Iterator[Event]:
        text = event.text
        for index in range(0, len(text), PIECE):
            self._wait_until(start + (end - start) * index / len(text))
            yield replace(event, text=text[index : index + PIECE])

    def _wait_until(self, position: float) -> None:
        self._position = max(position, self._position)
        if self._speed and (seconds := self._position / self._speed - self._slept) >= FRAME:
            self._sleep(seconds)
            self._slept += seconds


def unfinished(reader: TraceReader) -> str:
    """What to say of a trace that has no end."""
    torn = reader.torn()
    tail = f"; the last {torn} bytes are half a line" if torn else ""
    return (
        f"The trace {str(reader.folder)!r} stops before the end of its run{tail}: the run was killed, or is still "
        "going on. What is there was shown; run the task again for a whole one."
    )


def _with_next(records: Iterator[Record]) -> Iterator[tuple[Record, Record | None]]:
    """Each record with the one after. Damage after a record is raised once that record has been given."""
    previous: Record | None = None
    try:
        for record in records:
            if previous is not None:
                yield previous, record
            previous = record
    except TraceError:
        if previous is not None:
            yield previous, None
        raise
    if previous is not None:
        yield previous, None
