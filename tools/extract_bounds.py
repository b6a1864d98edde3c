"""The bounds of an extraction, and the clock that ends a part of it inside the worker."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Literal

TOTAL_CHARS = 2_000_000
LINE_CHARS = 500
MAX_LINES = 200_000
TITLE_CHARS = 300
NOTE_CHARS = 300
ERROR_CHARS = 500
MAX_LINKS = 500
LINK_TEXT_CHARS = 200
URL_CHARS = 2000
MEMORY_MB = 1500  # address space of the worker, of which it has 80 MB when idle


@dataclass(frozen=True, slots=True)
class Document:
    """What a parser found: the text not yet cut into lines, links as (text, url), and a note on what is missing."""

    kind: Literal["html", "pdf", "text"]
    title: str
    text: str
    links: list[tuple[str, str]]
    note: str = ""


def join_notes(*notes: str) -> str:
    """The notes that say something, each once."""
    return "; ".join(dict.fromkeys(filter(None, notes)))


class DocumentError(Exception):
    """What is wrong with the document, for the model."""


class OutOfTime(BaseException):
    """The time for a part is over. Not an `Exception`: parsers swallow those."""


def _ring(number: int, frame: FrameType | None) -> None:
    raise OutOfTime


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raise `OutOfTime` in the body after `seconds`, and again every 0.2 s, should a parser have swallowed it."""
    signal.signal(signal.SIGALRM, _ring)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.01), 0.2)
    try:
        yield
    finally:
        signal.signal(signal.SIGALRM, signal.SIG_IGN)
        signal.setitimer(signal.ITIMER_REAL, 0)
