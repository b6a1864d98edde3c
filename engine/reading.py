"""The reading of one reply over time: how far it has come, when the next piece is late, and the events that end it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from thinkloop.engine.chunks import ReplyReader
from thinkloop.engine.refusals import StreamCut
from thinkloop.traces.events import Error, Event, TurnFinished


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeouts:
    """Seconds. `idle` is the longest wait for the next piece of text (the first included: a long prompt on a busy
    server takes minutes; keep-alives don't count), `turn` the longest whole turn."""

    connect: float = 10.0
    idle: float = 600.0
    turn: float = 7200.0


class Reading:
    """How far the reading of one reply has come: what was said, when, and whether it ended well."""

    def __init__(self, reader: ReplyReader, timeouts: Timeouts) -> None:
        self._reader = reader
        self._timeouts = timeouts
        self._started = self._heard = time.monotonic()
        self._first = 0.0

    def events(self, chunk: Any) -> list[Event]:
        events = self._reader.feed(chunk)
        if events:
            self._heard = time.monotonic()
            self._first = self._first or self._heard
        return events

    def seconds_left(self) -> float:
        """Until the next deadline, at least 0."""
        until = min(self._heard + self._timeouts.idle, self._started + self._timeouts.turn)
        return max(0.0, until - time.monotonic())

    def why_late(self) -> str:
        if time.monotonic() - self._started >= self._timeouts.turn:
            return f"the turn took longer than {self._timeouts.turn:g} s"
        return f"nothing came for {self._timeouts.idle:g} s"

    def said_its_end(self) -> bool:
        """Whether the reply ended as a whole one does; `[DONE]` is forgotten by some servers, the reason by others."""
        return self._reader.finish is not None

    def progress(self) -> tuple[int, int, int]:
        """Characters of thinking, characters of content, calls begun."""
        return self._reader.thinking_chars, self._reader.content_chars, self._reader.calls_begun

    def cut(self, url: str, why: str) -> StreamCut:
        return StreamCut(url, why, *self.progress())

    def finish(self) -> list[Event]:
        """The events that end a turn."""
        reason, now = self._reader.reason(), time.monotonic()
        events: list[Event] = list(self._reader.calls(reason))
        if self._reader.finish == "content_filter":
            events.append(Error(where="server", message="the server's content filter ended the reply", recovered=True))
        first = self._first or now
        events.append(self._reader.usage_event(first - self._started, now - first))
        events.append(TurnFinished(reason=reason))
        return events
