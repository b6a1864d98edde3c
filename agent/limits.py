"""What a run may spend, and the meter that says when to warn the model and when to ask it for the answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from typing import Literal

import anyio
from thinkloop.traces.events import EndReason, Json, LimitReached, ThinkloopError, Usage

LimitName = Literal["steps", "tokens", "time", "cost"]

WARN_AT = 0.8
"""Share of a limit at which the model is told, once."""
WARN_STEPS_LEFT = 3
"""Short runs are warned by steps left: 80 % of 10 would leave time for one call."""
ANSWER_SHARE = 0.25
"""The last step may take this share of `seconds` on top, so that a run out of time still answers."""
ANSWER_SECONDS = 2.0
"""The least time that the last step gets."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bounds of one run; None means no bound. A run that meets one ends with an answer, never with an exception.

    `steps` counts model turns, the answer's included. `tokens` counts what the model samples over the run, thinking
    included. `thinking_per_step` and `thinking`, over the run, are in tokens: past them an engine of this process closes the
    thinking itself (a remote server can't be made to). `seconds` is wall time, `cost` is in the currency of the model's prices.
    `bad_turns` is how many turns in a row may hold nothing but calls that can't be run.

    Raises `ThinkloopError` for a bound that isn't a positive number.
    """

    steps: int = 300
    tokens: int | None = None
    thinking_per_step: int | None = None
    thinking: int | None = None
    seconds: float | None = None
    cost: float | None = None
    bad_turns: int = 5

    def __post_init__(self) -> None:
        for field in fields(self):
            _check(field.name, getattr(self, field.name))

    def to_json(self) -> Json:
        return asdict(self)


_WHOLE = ("steps", "tokens", "thinking_per_step", "thinking", "bad_turns")
_REQUIRED = ("steps", "bad_turns")


def _check(name: str, value: object) -> None:
    if value is None and name not in _REQUIRED:
        return
    kinds = (int,) if name in _WHOLE else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not value > 0:
        kind = "whole number" if name in _WHOLE else "number"
        none = "" if name in _REQUIRED else ", or None for no limit"
        raise ThinkloopError(f"Limits(`{name}`={value!r}) makes no sense: give a positive {kind}{none}.")


class Meter:
    """Counts what a run has spent against its `Limits`. Every method takes constant time."""

    def __init__(self, limits: Limits, clock: Callable[[], float] = anyio.current_time) -> None:
        self.limits = limits
        self.steps = 0
        self.usage = Usage(prompt_tokens=0, completion_tokens=0)
        self._clock = clock
        self._started = clock()
        self._warned: set[str] = set()

    @property
    def seconds(self) -> float:
        return self._clock() - self._started

    @property
    def work_deadline(self) -> float:
        """Clock time at which work is cut short, so that the last step can answer; infinite without a time limit."""
        return self._started + (self.limits.seconds or float("inf"))

    @property
    def answer_deadline(self) -> float:
        """Clock time at which even the last step is cut short."""
        seconds = self.limits.seconds
        return self.work_deadline + max(ANSWER_SECONDS, ANSWER_SHARE * seconds) if seconds else float("inf")

    @property
    def tokens_left(self) -> int | None:
        """Tokens that the model may still sample before the last step; None without a limit."""
        tokens = self.limits.tokens
        return None if tokens is None else max(tokens - self.usage.completion_tokens, 0)

    @property
    def thinking_allowed(self) -> int | None:
        """Thinking tokens of the next step; None without a limit. One is always left: a turn opens with it."""
        limits = self.limits
        if limits.thinking is None:
            return limits.thinking_per_step
        left = max(limits.thinking - self.usage.thinking_tokens, 1)
        return min(left, limits.thinking_per_step or left)

    def add(self, usage: Usage) -> None:
        """Adds one turn's counts and times to the sums."""
        old = self.usage
        self.usage = Usage(**{f.name: getattr(old, f.name) + getattr(usage, f.name) for f in fields(Usage)})

    def reached(self) -> LimitReached | None:
        """The limit that makes the next step the last one, with the text that asks the model for its answer."""
        for name, used, allowed in self._spent():
            if used >= (allowed - 1 if name == "steps" else allowed):
                text = final_text(f"the limit of {_amount(name, allowed)} is reached")
                return LimitReached(limit=name, used=used, allowed=allowed, final=True, message=text)
        return None

    def warnings(self) -> Iterator[LimitReached]:
        """Limits that are near and haven't been told of yet."""
        for name, used, allowed in self._spent():
            if name not in self._warned and _near(name, used, allowed):
                self._warned.add(name)
                spent = f"{_used(name, used)} of {_amount(name, allowed)} used"
                text = f"[note: {spent}; come to an answer before they are gone]"
                yield LimitReached(limit=name, used=used, allowed=allowed, final=False, message=text)

    def _spent(self) -> Iterator[tuple[LimitName, float, float]]:
        limits = self.limits
        yield "steps", self.steps, limits.steps
        if limits.tokens is not None:
            yield "tokens", self.usage.completion_tokens, limits.tokens
        if limits.seconds is not None:
            yield "time", self.seconds, limits.seconds
        if limits.cost is not None:
            yield "cost", self.usage.cost, limits.cost


def final_text(why: str) -> str:
    """The user message that opens the last step."""
    return f"Stop here: {why}. Call no more tools. Answer the task now, as well as what you have found allows."


def end_reason(limit: LimitReached) -> EndReason:
    """Why a run ended whose last step was forced by `limit`."""
    if limit.limit == "thinking":
        raise ThinkloopError("the thinking limit closes a step's thinking; it never ends a run")
    return limit.limit


def _near(name: LimitName, used: float, allowed: float) -> bool:
    return used >= WARN_AT * allowed or (name == "steps" and allowed - used <= WARN_STEPS_LEFT)


def _used(name: LimitName, used: float) -> str:
    return f"{used:,.0f}" if name in ("steps", "tokens") else f"{used:.2f}"


def _amount(name: LimitName, allowed: float) -> str:
    unit = {"steps": "steps", "tokens": "tokens", "time": "seconds", "cost": "cost"}[name]
    return f"{allowed:,g} {unit}"
