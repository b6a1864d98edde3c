"""Regular expressions of JSON Schemas, matched in time linear in the text, whatever the expression.

Python's `re` backtracks: `^(a+)+$` takes an hour over 40 characters, holds the interpreter all the while, and a schema
may come from a stranger. Here an expression becomes a nondeterministic automaton whose states are walked side by side
(Thompson, "Regular Expression Search Algorithm", CACM 11(6), 1968): the work is at most text x states, and bounded.

The dialect is ECMA 262's as JSON Schema uses it (unanchored, `^` and `$` mean the text's ends, `\\d`, `\\w` are ASCII),
with `\\p{L}`-style categories and look-ahead. Back-references and look-behind can't be matched so and are refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from thinkloop.tools.expression import Alt, At, Char, Look, Node, Parser, PatternError, Repeat, Seq, Test, is_word

MAX_PATTERN = 2000
MAX_STATES = 5000
MAX_STEPS = 200_000
"""States visited in one search: 0.1 to 0.5 s of this Python."""


def search(pattern: str, text: str) -> bool:
    """Whether `pattern` matches anywhere in `text`. Raises `PatternError`."""
    return _compiled(pattern).search(text)


def check(pattern: str) -> None:
    """Raises `PatternError` if `pattern` can't be used."""
    _compiled(pattern)


@lru_cache(maxsize=512)
def _compiled(pattern: str) -> _Automaton:
    if len(pattern) > MAX_PATTERN:
        raise PatternError(f"it is longer than {MAX_PATTERN:,} characters")
    return _Automaton(Parser(pattern).parse(), [MAX_STATES])


@dataclass(frozen=True, slots=True)
class _Ahead:
    automaton: _Automaton
    negative: bool


_Instruction = Char | At | _Ahead | tuple[int, ...] | None
"""What to read or to hold before the next instruction; a tuple goes on at each of its targets; None is a match."""


class _Automaton:
    """The code of one expression. `room` counts down what may still be built, look-aheads and copies included."""

    def __init__(self, node: Node, room: list[int]) -> None:
        self._code: list[_Instruction] = []
        self._room = room
        self._emit(node)
        self._code.append(None)

    def _emit(self, node: Node) -> None:
        self._room[0] -= 1
        if self._room[0] < 0:
            raise PatternError(f"it needs more than {MAX_STATES:,} states; repeat less")
        match node:
            case Char() | At():
                self._code.append(node)
            case Look():
                self._code.append(_Ahead(_Automaton(node.inner, self._room), node.negative))
            case Seq():
                for part in node.parts:
                    self._emit(part)
            case Alt():
                self._emit_branches(node)
            case Repeat():
                self._emit_repeat(node)

    def _emit_branches(self, node: Alt) -> None:
        fork = self._reserve()
        starts, leaps = [], []
        for branch in node.branches:
            starts.append(len(self._code))
            self._emit(branch)
            leaps.append(self._reserve())
        self._code[fork] = tuple(starts)
        for leap in leaps:
            self._code[leap] = (len(self._code),)

    def _emit_repeat(self, node: Repeat) -> None:
        for _ in range(node.least):
            self._emit(node.inner)
        if node.most is None:
            self._emit_loop(node.inner)
            return
        forks = []
        for _ in range(node.most - node.least):
            forks.append(self._reserve())
            self._emit(node.inner)
        for fork in forks:
            self._code[fork] = (fork + 1, len(self._code))

    def _emit_loop(self, inner: Node) -> None:
        loop = self._reserve()
        self._emit(inner)
        self._code.append((loop,))
        self._code[loop] = (loop + 1, len(self._code))

    def _reserve(self) -> int:
        self._code.append(())
        return len(self._code) - 1

    def search(self, text: str) -> bool:
        return self._run(text, 0, [MAX_STEPS], anchored=False)

    def _run(self, text: str, start: int, steps: list[int], *, anchored: bool) -> bool:
        waiting = [0]
        for position in range(start, len(text) + 1):
            readers = self._readers(waiting, text, position, steps)
            if readers is None:
                return True
            if position == len(text) or (anchored and not readers):
                return False
            char = text[position]
            waiting = [state + 1 for state, test in readers if test(char)] + ([] if anchored else [0])
        return False

    def _readers(self, states: list[int], text: str, position: int, steps: list[int]) -> list[tuple[int, Test]] | None:
        """The reading instructions that `states` lead to without reading; None when they lead to a match."""
        seen: set[int] = set()
        readers: list[tuple[int, Test]] = []
        stack = states
        while stack:
            state = stack.pop()
            if state in seen:
                continue
            seen.add(state)
            steps[0] -= 1
            if steps[0] < 0:
                raise PatternError("it takes too much work on a text this long")
            instruction = self._code[state]
            if instruction is None:
                return None
            if isinstance(instruction, tuple):
                stack += instruction
            elif isinstance(instruction, Char):
                readers.append((state, instruction.test))
            elif _holds(instruction, text, position, steps):
                stack.append(state + 1)
        return readers


def _holds(instruction: At | _Ahead, text: str, position: int, steps: list[int]) -> bool:
    if isinstance(instruction, At):
        return _at(instruction.where, text, position)
    return instruction.automaton._run(text, position, steps, anchored=True) != instruction.negative


def _at(where: str, text: str, position: int) -> bool:
    if where == "^":
        return position == 0
    if where == "$":
        return position == len(text)
    before = position > 0 and is_word(text[position - 1])
    after = position < len(text) and is_word(text[position])
    return (before != after) == (where == "b")
