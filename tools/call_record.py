"""Facts for the record of the call under way, kept even when the call fails or is cut short and has no output."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from thinkloop.traces.events import Json

_facts: ContextVar[Json | None] = ContextVar("facts", default=None)


def remember(**facts: Any) -> None:
    """Adds JSON values to the record of the call under way; outside of a call does nothing."""
    known = _facts.get()
    if known is not None:
        known.update(facts)


@contextmanager
def recording() -> Iterator[Json]:
    """Gathers what is remembered within it, threads of tools included."""
    facts: Json = {}
    token = _facts.set(facts)
    try:
        yield facts
    finally:
        _facts.reset(token)
