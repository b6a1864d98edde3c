"""Stop strings over a stream of text: what may be shown so far, and when a stop was written."""

from __future__ import annotations

from collections.abc import Sequence

from thinkloop.engine.params import SamplingError


class StopStrings:
    """Fed the pieces of a text in order. The stop that is complete first wins, of two that end together the longer, so
    that the outcome doesn't depend on how the text is cut into pieces.

    Only what may turn out to be the beginning of a stop is held back. Raises `SamplingError` for an empty stop.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if isinstance(stops, str) or not all(isinstance(stop, str) and stop for stop in stops):
            raise SamplingError(f"Stop strings are texts, none of them empty, but were {stops!r}.")
        self._stops = tuple(stops)
        self._held = ""
        self.hit: str | None = None
        """The stop that ended the text; None as long as none has."""

    def feed(self, piece: str) -> str:
        """The text that may be shown now. After a hit that is nothing: the stop and what follows it are dropped."""
        if self.hit is not None:
            return ""
        text = self._held + piece
        found = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            _, start, self.hit = min(found)
            self._held = ""
            return text[:start]
        keep = self._possible_prefix(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """What was held back, once the text is over."""
        held, self._held = self._held, ""
        return held

    def _possible_prefix(self, text: str) -> int:
        """Length of the longest end of `text` that a stop begins with."""
        longest = min(len(text), max((len(stop) for stop in self._stops), default=1) - 1)
        return next((n for n in range(longest, 0, -1) if self._begins(text[-n:])), 0)

    def _begins(self, end: str) -> bool:
        return any(stop.startswith(end) for stop in self._stops)
