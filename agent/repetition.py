"""Notices the same calls over and over: one call again and again, or a cycle of two or three steps."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Sequence
from typing import Literal

from thinkloop.traces.events import ToolCall

REMIND_AT = 3
"""Times in a row after which the result carries a reminder."""
REFUSE_AT = 5
"""Times in a row after which the call isn't run: its earlier result is pointed at."""
STOP_AT = 8
"""Times in a row after which the run goes to its last step."""
LONGEST_CYCLE = 3
"""Steps in the longest cycle that is noticed (A-B-C-A-B-C)."""

Verdict = Literal["run", "remind", "refuse", "stop"]


def call_key(call: ToolCall) -> str:
    """What makes two calls the same: name and canonical JSON arguments (raw text when it isn't a JSON object)."""
    if call.arguments is None:
        return f"{call.name}\0{call.raw}"
    canonical = json.dumps(call.arguments, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return f"{call.name} {canonical}"


class Repetition:
    """Counts repeats over steps, remembering the last few steps only: constant time and space per step.

    A repeat is counted per call (the same call in each of the last N steps, whatever stands beside it) and per cycle
    (whole steps that equal those one, two or three before); the higher count decides.
    """

    def __init__(self) -> None:
        self._streaks: dict[str, int] = {}
        self._recent: deque[frozenset[str]] = deque(maxlen=LONGEST_CYCLE)
        self._matches = [0] * (LONGEST_CYCLE + 1)
        self._first_ids: deque[dict[str, str]] = deque(maxlen=LONGEST_CYCLE)
        self._repeats: dict[str, int] = {}
        self._calls: deque[Sequence[ToolCall]] = deque(maxlen=LONGEST_CYCLE)

    def step(self, calls: Sequence[ToolCall], keys: Sequence[str]) -> None:
        """Takes in one step's calls (none for a step without), with their keys."""
        step = frozenset(keys)
        self._streaks = {key: self._streaks.get(key, 0) + 1 for key in step}
        cycles = self._cycles(step)
        self._repeats = {key: max(self._streaks[key], cycles) for key in step}
        ids = {key: call.id for call, key in zip(reversed(calls), reversed(keys), strict=True)}
        self._first_ids.append({key: self.first_id(key) or ids[key] for key in step})
        self._recent.append(step)
        self._calls.append(calls)

    def recent(self) -> tuple[tuple[str, str], ...]:
        """The well-formed calls of the last steps: tool and argument text."""
        return tuple((call.name, call.raw) for calls in self._calls for call in calls if call.arguments is not None)

    def repeats(self, key: str) -> int:
        """How many times in a row the call has been made, this step included; 0 when it isn't in this step."""
        return self._repeats.get(key, 0)

    def most(self) -> int:
        """The highest count of this step."""
        return max(self._repeats.values(), default=0)

    def first_id(self, key: str) -> str:
        """Id of the call that began the present run of repeats; empty when there is none."""
        return next((ids[key] for ids in reversed(self._first_ids) if key in ids), "")

    def _cycles(self, step: frozenset[str]) -> int:
        for period in range(1, LONGEST_CYCLE + 1):
            same = len(self._recent) >= period and self._recent[-period] == step
            self._matches[period] = self._matches[period] + 1 if same else 0
        return max(self._matches[period] // period + 1 for period in range(1, LONGEST_CYCLE + 1))


def verdict(repeats: int) -> Verdict:
    """Which rung of the ladder a count stands on."""
    if repeats >= STOP_AT:
        return "stop"
    if repeats >= REFUSE_AT:
        return "refuse"
    return "remind" if repeats >= REMIND_AT else "run"


def reminder(repeats: int) -> str:
    """What is added to the result of a call that keeps coming back."""
    return (
        f"[reminder: this call has been made {repeats} times in a row with the same arguments; "
        "try something else, or answer with what you have]"
    )


def refusal(repeats: int, first_id: str) -> str:
    """What stands in place of a result that isn't fetched again."""
    return (
        f"error: not run again: this call has been made {repeats} times in a row; its result is the one of {first_id} "
        f"above. Do something else now, or answer: after {STOP_AT} times the run is ended."
    )
