"""Calls made again when they fail in a way that may pass: how often, after how long, for which errors."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from time import perf_counter

import anyio
from thinkloop.tools.call_record import remember
from thinkloop.tools.process import WorkerError, reason
from thinkloop.tools.signature import DefinitionError
from thinkloop.tools.thread import Outcome
from thinkloop.traces.events import Json

MOST_TIMES = 10
LONGEST_WAIT = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Retry:
    """Up to `times` further attempts, after `wait` seconds and twice as long each time (a minute at most), when an error
    is one of `on`. All attempts share the tool's deadline; a wait that would outlast it isn't begun.

    Raises `DefinitionError` for values that make no sense.
    """

    times: int = 2
    wait: float = 0.5
    on: tuple[type[Exception], ...] = (TimeoutError, ConnectionError)

    def __post_init__(self) -> None:
        if isinstance(self.times, bool) or not isinstance(self.times, int) or not 0 <= self.times <= MOST_TIMES:
            raise DefinitionError(f"Retry(times={self.times!r}): give a whole number from 0 to {MOST_TIMES}.")
        if not 0 <= self.wait <= LONGEST_WAIT:
            raise DefinitionError(f"Retry(wait={self.wait!r}): give 0 to {LONGEST_WAIT:g} seconds.")
        if not (isinstance(self.on, tuple) and self.on and all(map(_is_error, self.on))):
            raise DefinitionError(f"Retry(on={self.on!r}): give a tuple of exception classes, as in (TimeoutError,).")

    def pause(self, attempts: int) -> float:
        """Seconds to wait after so many failed attempts."""
        return float(min(self.wait * 2 ** (attempts - 1), LONGEST_WAIT))


def _is_error(kind: object) -> bool:
    return isinstance(kind, type) and issubclass(kind, Exception)


NO_RETRY = Retry(times=0)


async def retried(retry: Retry, attempt: Callable[[], Awaitable[Outcome]]) -> Outcome:
    """The outcome of the first attempt that succeeds, else of the last. The call's record says of each attempt how long
    it took and how it failed, once one has failed."""
    attempts: list[Json] = []
    while True:
        started = perf_counter()
        outcome = await attempt()
        error = outcome.error
        attempts.append({"seconds": perf_counter() - started, "error": reason(error) if error else ""})
        if retry.times and (error or len(attempts) > 1):
            remember(attempts=list(attempts))
        if error is None or len(attempts) > retry.times or not is_one_of(error, retry.on):
            return outcome
        pause = retry.pause(len(attempts))
        if anyio.current_time() + pause >= anyio.current_effective_deadline():
            return outcome
        await anyio.sleep(pause)


def is_one_of(error: BaseException, kinds: tuple[type[Exception], ...]) -> bool:
    """Whether an error is of one of these classes, be it that it was raised in another process."""
    names = error.kinds if isinstance(error, WorkerError) else ()
    return isinstance(error, kinds) or any(f"{kind.__module__}.{kind.__qualname__}" in names for kind in kinds)
