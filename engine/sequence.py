"""What the engine's thread knows of one session: its cache, the logits at its end, its drafts; and the job of reading."""

from __future__ import annotations

from collections.abc import Sequence as Tokens
from concurrent.futures import Future
from dataclasses import dataclass

from thinkloop.engine.drafts import Drafter, StepCost
from thinkloop.engine.kv_cache import LatentCache
from torch import Tensor

_READ = 128
"""Tokens a drafter reads in one step: up to a millisecond."""


@dataclass(slots=True)
class Sequence:
    """State behind a session. `valid` rows of the cache belong to the session's timeline."""

    cache: LatentCache
    drafter: Drafter
    valid: int = 0
    logits: Tensor | None = None
    """Float32 `[V]` after the token before row `logits_at`."""
    logits_at: int = -1
    prefilled: int = 0
    decoded: int = 0
    reused: int = 0
    drafted_to: int = 0
    """Tokens of the timeline that the drafter has read."""

    def trim(self, length: int) -> None:
        """Drops rows that don't belong to a timeline of `length` tokens: of tokens sampled ahead, of a cancelled append,
        of a truncation."""
        self.cache.truncate(min(self.valid, length))
        self.valid = self.cache.length

    def took(self, logits: Tensor) -> None:
        """The cache's rows are the timeline's, and `logits [V]` follow them."""
        self.valid = self.logits_at = self.cache.length
        alone = logits.untyped_storage().nbytes() == logits.nbytes
        self.logits = logits if alone else logits.clone()  # not the whole step's, for as long as the session lives

    def logits_after(self, length: int) -> Tensor | None:
        """What follows the first `length` tokens, where it is at hand."""
        return self.logits if self.logits_at == length else None

    def read_drafts(self, timeline: Tokens[int], length: int) -> bool:
        """Brings the drafter nearer to the first `length` tokens of the timeline; true when it is there. A little at a
        time: 100,000 tokens take 0.5 s, and others wait meanwhile."""
        if length < self.drafted_to:
            self.drafter.cut()
            self.drafted_to = length
        end = min(length, self.drafted_to + _READ)
        self.drafter.read(timeline[self.drafted_to : end])
        self.drafted_to = end
        return end == length

    def forget(self, length: int) -> None:
        """The timeline was cut to `length` tokens."""
        self.valid = min(self.valid, length)
        self.trim(length)

    def leave(self, timeline: Tokens[int]) -> None:
        """Gives the blocks back, findable by whoever begins with the same tokens."""
        self.trim(len(timeline))
        self.cache.publish(timeline[self.cache.published :])
        self.cache.release()
        self.logits, self.valid, self.logits_at = None, 0, -1

    def become(self, other: Sequence) -> None:
        """Takes over another's rows and logits."""
        self.cache.take_over(other.cache)
        self.valid, self.logits, self.logits_at = other.valid, other.logits, other.logits_at

    def restore(self, rows: Tensor) -> None:
        """Takes over `rows [layers, n, width]` of a saved session. Raises `CacheFull` and changes nothing then."""
        other = LatentCache(self.cache.pool)
        other.restore(rows)
        self.become(Sequence(other, self.drafter, rows.shape[1]))
        self.drafter.cut()
        self.drafted_to = 0

    def fork(self, length: int) -> Sequence:
        """What another one needs to share the blocks of the first `length` tokens."""
        cache = self.cache.fork()
        cache.truncate(min(self.valid, length))
        logits = self.logits_after(length)
        return Sequence(cache, self.drafter, cache.length, logits, length if logits is not None else -1)


class Reading:
    """The job of `Session.append`: computes what isn't computed of `timeline`'s first `known` tokens, then `new`."""

    def __init__(self, sequence: Sequence, timeline: Tokens[int], new: Tokens[int], reuse: bool) -> None:
        self.cache, self.done = sequence.cache, Future[None]()
        self._sequence, self._timeline, self._new = sequence, timeline, new
        self._known, self._reuse = len(timeline), reuse
        self._left: list[int] = []

    def begin(self) -> None:
        """Looks up what is computed, here or by another session."""
        sequence = self._sequence
        sequence.trim(self._known)
        if self._reuse:
            sequence.reused += self.cache.adopt(self._tail())
            sequence.valid = self.cache.length
        start = self.cache.length
        self._left = [*self._timeline[start : self._known], *self._new[max(0, start - self._known) :]]

    def wanted(self, cost: StepCost) -> Tokens[int]:
        return () if self.done.done() else self._left

    def shorten(self) -> bool:
        return False

    def flush(self) -> None:
        pass

    def computed(self, logits: Tensor, count: int) -> None:
        sequence, end = self._sequence, self.cache.length
        sequence.took(logits[-1])
        del self._left[:count]
        appended = max(0, end - max(end - count, self._known))
        sequence.prefilled += appended
        sequence.decoded += count - appended
        if not self._left:
            if self._reuse:
                self.cache.publish(self._tail())
            if self.done.set_running_or_notify_cancel():
                self.done.set_result(None)

    def _tail(self) -> list[int]:
        """The tokens of the rows that other sequences can't find yet."""
        start = self.cache.published
        return [*self._timeline[start : self._known], *self._new[max(0, start - self._known) :]]

    def fail(self, error: BaseException) -> None:
        if not self.done.done():
            self._sequence.trim(self._known)  # its blocks are free at once
        if not self.done.done() and self.done.set_running_or_notify_cancel():
            self.done.set_exception(error)
