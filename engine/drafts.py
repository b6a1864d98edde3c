"""Guesses of what comes next, from the sequence's own text: where its last tokens have stood before, what followed them.

A suffix automaton (Blumer et al. 1985) over everything the sequence has held gives, for each new token and in amortised
constant time (5 to 8 µs in Python), the longest suffix that occurred before, and where last. Agents write much that they have
read: names, paths, JSON keys, earlier calls. Drafts are checked by the model, so they cost time at worst, never a token;
how many are worth checking follows from what a step costs and how often they held so far.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Iterable

MAX_DRAFT = 15
"""With the token before them at most 16 rows: more are hardly ever right together."""
_KEEP = 1 << 20
"""Tokens an automaton holds before it starts again with the newer half: about 500 MB by then."""
_WALK = 32
"""Suffixes whose last place is brought up to date for each token, longest first."""
_LONG = 3
"""More tokens than this are a long match."""
_SEPARATOR = -1


class SuffixAutomaton:
    """All substrings of a growing text, and where each ended last."""

    def __init__(self) -> None:
        self.text: list[int] = []
        self.match = 0
        """Length of the longest suffix of the text that occurred before."""
        self.follows = 0
        """Index of the token that followed it there."""
        self._next: dict[tuple[int, int], int] = {}
        self._moves: list[list[int]] = [[]]  # tokens out of each state
        self._link, self._length, self._end = [-1], [0], [-1]
        self._last = 0

    def extend(self, token: int) -> None:
        """Adds one token."""
        position = len(self.text)
        self.text.append(token)
        state = self._state(self._length[self._last] + 1, position)
        p = self._last
        while p >= 0 and (p, token) not in self._next:
            self._move(p, token, state)
            p = self._link[p]
        self._link[state] = self._target(p, token) if p >= 0 else 0
        self._last = state
        self._note(position)

    def _state(self, length: int, end: int) -> int:
        self._link.append(0)
        self._length.append(length)
        self._end.append(end)
        self._moves.append([])
        return len(self._link) - 1

    def _move(self, state: int, token: int, target: int) -> None:
        self._next[state, token] = target
        self._moves[state].append(token)

    def _target(self, p: int, token: int) -> int:
        """The state of exactly the suffix ending in `p` then `token`, split off from a longer one where needed."""
        q = self._next[p, token]
        if self._length[p] + 1 == self._length[q]:
            return q
        clone = self._state(self._length[p] + 1, self._end[q])
        for move in self._moves[q]:
            self._move(clone, move, self._next[q, move])
        self._link[clone] = self._link[q]
        self._link[q] = clone
        while p >= 0 and self._next.get((p, token)) == q:
            self._next[p, token] = clone
            p = self._link[p]
        return clone

    def _note(self, position: int) -> None:
        """Reads the match off the suffix links, then marks all those suffixes as ending here."""
        state = self._link[self._last]
        self.match, self.follows = self._length[state], self._end[state] + 1
        for _ in range(_WALK):
            if state <= 0:
                return
            self._end[state] = position
            state = self._link[state]


class StepCost:
    """Seconds of a step by how many rows it has, learned from the steps themselves.

    For each number of rows it follows the quick steps (a fifth of the way down to a quicker one, a fiftieth up to a
    slower one), so that a step which lost the processor for a while doesn't count for much. Numbers of rows not seen yet
    are taken to cost an eighth of a step more each than the nearest seen below: little enough to be tried.
    """

    def __init__(self) -> None:
        self.sequences = 1
        """How many decoded together in the last step."""
        self._seconds: dict[int, float] = {}
        self._sizes: list[int] = []

    def learn(self, rows: int, seconds: float) -> None:
        """Takes in one measured step."""
        if rows not in self._seconds:
            insort(self._sizes, rows)
        known = self._seconds.setdefault(rows, seconds)
        self._seconds[rows] = known + (0.2 if seconds < known else 0.02) * (seconds - known)

    def seconds(self, rows: int) -> float:
        """What a step of `rows` rows takes."""
        at = bisect_right(self._sizes, rows)
        if at == 0:
            return 1.0
        below, base = self._sizes[at - 1], self._seconds[self._sizes[at - 1]]
        if below == rows or at == len(self._sizes):
            return base * (1 + 0.125 * (rows - below) / below)
        above = self._sizes[at]
        return base + (self._seconds[above] - base) * (rows - below) / (above - below)

    def ratios(self, most: int) -> list[float]:
        """How many times a step without drafts a step takes in which every sequence has 1, 2, … `most` drafts."""
        plain = self.seconds(self.sequences)
        return [self.seconds(self.sequences * (1 + drafts)) / plain for drafts in range(1, most + 1)]


class Confidence:
    """How often a guess holds, by the token before it and whether many tokens before that agree: learned from every
    token that was sampled, drafted or not, over all sessions of an engine. After `functions.open:` the next index is new
    each time; after `<|tool_calls_section_begin|>` there is nothing to guess wrong."""

    _RATE = 0.1
    _UNKNOWN = 0.6

    def __init__(self) -> None:
        self._holds: dict[tuple[int, bool], float] = {}

    def of(self, before: int, match: int) -> float:
        """The chance that the token which followed `before` last time, `match` equal tokens long, follows it now."""
        return self._holds.get((before, match > _LONG), self._UNKNOWN)

    def learn(self, before: int, match: int, held: bool) -> None:
        """Takes in whether it did."""
        key = before, match > _LONG
        known = self._holds.get(key, self._UNKNOWN)
        self._holds[key] = known + self._RATE * (held - known)


class Drafter:
    """Drafts for one sequence."""

    def __init__(self, confidence: Confidence) -> None:
        self._automaton, self._confidence = SuffixAutomaton(), confidence

    def read(self, tokens: Iterable[int]) -> None:
        """Takes in text that the sequence holds now."""
        for token in tokens:
            self._automaton.extend(token)
        if len(self._automaton.text) > _KEEP:
            text, self._automaton = self._automaton.text, SuffixAutomaton()
            self.read(text[_KEEP // 2 :])

    def sampled(self, tokens: Iterable[int]) -> None:
        """Takes in what the model wrote, and learns from it how good guesses are."""
        for token in tokens:
            a = self._automaton
            if a.match:
                self._confidence.learn(a.text[-1], a.match, a.text[a.follows] == token)
            a.extend(token)

    def cut(self) -> None:
        """The sequence goes on elsewhere: what was read stays, but what comes next doesn't follow it."""
        self._automaton.extend(_SEPARATOR)

    def propose(self, cost: StepCost, most: int) -> list[int]:
        """Up to `most` tokens that may come next: as many as give the most tokens a second, as far as can be told."""
        a = self._automaton
        if a.match == 0 or most <= 0:
            return []
        guesses = a.text[a.follows : a.follows + min(most, MAX_DRAFT)]
        if _SEPARATOR in guesses:
            guesses = guesses[: guesses.index(_SEPARATOR)]
        chance = expected = best = 1.0
        count, before = 0, a.text[-1]
        for length, (guess, ratio) in enumerate(zip(guesses, cost.ratios(len(guesses)), strict=True), 1):
            chance *= self._confidence.of(before, a.match + length - 1)
            expected += chance
            if expected / ratio > best:
                best, count = expected / ratio, length
            before = guess
        return guesses[:count]
