"""Regular expressions of JSON Schemas, matched in time linear in the text, whatever the expression.

Python's `re` backtracks: `^(a+)+$` takes an hour over 40 characters, holds the interpreter all the while, and a schema
may come from a stranger. Here an expression becomes a nondeterministic automaton whose states are walked side by side
(Thompson, "Regular Expression Search Algorithm", CACM 11(6), 1968): the work is at most text x states, and bounded.

The dialect is ECMA 262's as JSON Schema uses it (unanchored, `^` and `$` mean the text's ends, `\\d`, `\\w` are ASCII),
with `\\p{L}`-style categories and look-ahead. Back-references and look-behind can't be matched so and are refused.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

MAX_PATTERN = 2000
MAX_STATES = 5000
MAX_STEPS = 200_000
"""States visited in one search: 0.1 to 0.5 s of this Python."""

_DEPTH = 40


class PatternError(ValueError):
    """An expression that can't be used: malformed, of a kind that isn't supported, or too much work."""


Test = Callable[[str], bool]


@dataclass(frozen=True, slots=True)
class _Char:
    test: Test


@dataclass(frozen=True, slots=True)
class _At:
    where: str


@dataclass(frozen=True, slots=True)
class _Look:
    inner: _Node
    negative: bool


@dataclass(frozen=True, slots=True)
class _Seq:
    parts: tuple[_Node, ...]


@dataclass(frozen=True, slots=True)
class _Alt:
    branches: tuple[_Node, ...]


@dataclass(frozen=True, slots=True)
class _Repeat:
    inner: _Node
    least: int
    most: int | None


_Node = _Char | _At | _Look | _Seq | _Alt | _Repeat


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
    return _Automaton(_Parser(pattern).parse(), [MAX_STATES])


@dataclass(frozen=True, slots=True)
class _Ahead:
    automaton: _Automaton
    negative: bool


_Instruction = _Char | _At | _Ahead | tuple[int, ...] | None
"""What to read or to hold before the next instruction; a tuple goes on at each of its targets; None is a match."""


class _Automaton:
    """The code of one expression. `room` counts down what may still be built, look-aheads and copies included."""

    def __init__(self, node: _Node, room: list[int]) -> None:
        self._code: list[_Instruction] = []
        self._room = room
        self._emit(node)
        self._code.append(None)

    def _emit(self, node: _Node) -> None:
        self._room[0] -= 1
        if self._room[0] < 0:
            raise PatternError(f"it needs more than {MAX_STATES:,} states; repeat less")
        match node:
            case _Char() | _At():
                self._code.append(node)
            case _Look():
                self._code.append(_Ahead(_Automaton(node.inner, self._room), node.negative))
            case _Seq():
                for part in node.parts:
                    self._emit(part)
            case _Alt():
                self._emit_branches(node)
            case _Repeat():
                self._emit_repeat(node)

    def _emit_branches(self, node: _Alt) -> None:
        fork = self._reserve()
        starts, leaps = [], []
        for branch in node.branches:
            starts.append(len(self._code))
            self._emit(branch)
            leaps.append(self._reserve())
        self._code[fork] = tuple(starts)
        for leap in leaps:
            self._code[leap] = (len(self._code),)

    def _emit_repeat(self, node: _Repeat) -> None:
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

    def _emit_loop(self, inner: _Node) -> None:
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
            elif isinstance(instruction, _Char):
                readers.append((state, instruction.test))
            elif _holds(instruction, text, position, steps):
                stack.append(state + 1)
        return readers


def _holds(instruction: _At | _Ahead, text: str, position: int, steps: list[int]) -> bool:
    if isinstance(instruction, _At):
        return _at(instruction.where, text, position)
    return instruction.automaton._run(text, position, steps, anchored=True) != instruction.negative


def _at(where: str, text: str, position: int) -> bool:
    if where == "^":
        return position == 0
    if where == "$":
        return position == len(text)
    before = position > 0 and _is_word(text[position - 1])
    after = position < len(text) and _is_word(text[position])
    return (before != after) == (where == "b")


def _is_digit(char: str) -> bool:
    return "0" <= char <= "9"


def _is_word(char: str) -> bool:
    return char == "_" or (char.isascii() and char.isalnum())


def _is_any(char: str) -> bool:
    return char not in "\n\r\u2028\u2029"


_CLASSES: dict[str, Test] = {"d": _is_digit, "w": _is_word, "s": str.isspace}
_CONTROLS = {"t": "\t", "n": "\n", "r": "\r", "f": "\f", "v": "\v", "0": "\0", "a": "\a"}
_HEX = {"x": 2, "u": 4}


class _Parser:
    """Recursive descent over one expression, at most `_DEPTH` groups deep."""

    def __init__(self, pattern: str) -> None:
        self._pattern = pattern
        self._at = 0
        self._depth = 0

    def parse(self) -> _Node:
        node = self._alternatives()
        if self._at < len(self._pattern):
            raise PatternError(f"a `)` too many at character {self._at}")
        return node

    def _peek(self) -> str:
        return self._pattern[self._at : self._at + 1]

    def _next(self) -> str:
        char = self._peek()
        if not char:
            raise PatternError("it ends too early")
        self._at += 1
        return char

    def _took(self, text: str) -> bool:
        if not self._pattern.startswith(text, self._at):
            return False
        self._at += len(text)
        return True

    def _alternatives(self) -> _Node:
        self._depth += 1
        if self._depth > _DEPTH:
            raise PatternError(f"its groups are more than {_DEPTH} deep")
        branches = [self._sequence()]
        while self._took("|"):
            branches.append(self._sequence())
        self._depth -= 1
        return branches[0] if len(branches) == 1 else _Alt(tuple(branches))

    def _sequence(self) -> _Node:
        parts: list[_Node] = []
        while self._peek() not in ("", "|", ")"):
            parts.append(self._quantified(self._atom()))
        return parts[0] if len(parts) == 1 else _Seq(tuple(parts))

    def _quantified(self, node: _Node) -> _Node:
        bounds = self._bounds()
        if bounds is None:
            return node
        self._took("?")  # lazy or greedy is the same to a search that only says yes or no
        if self._bounds() is not None:
            raise PatternError(f"two quantifiers in a row at character {self._at - 1}")
        return _Repeat(node, *bounds)

    def _bounds(self) -> tuple[int, int | None] | None:
        for sign, bounds in (("*", (0, None)), ("+", (1, None)), ("?", (0, 1))):
            if self._took(sign):
                return bounds
        end = self._pattern.find("}", self._at)
        if self._peek() != "{" or end < 0:
            return None
        least, comma, most = self._pattern[self._at + 1 : end].partition(",")
        if not (least.isascii() and least.isdigit() and (most == "" or (most.isascii() and most.isdigit()))):
            return None
        self._at = end + 1
        return _checked_bounds(least, most if comma else least)

    def _atom(self) -> _Node:
        char = self._next()
        if char in "^$":
            return _At(char)
        if char == ".":
            return _Char(_is_any)
        if char == "(":
            return self._group()
        if char == "[":
            return _Char(self._class())
        if char == "\\":
            return self._escape()
        if char in "*+?":
            raise PatternError(f"nothing to repeat before `{char}` at character {self._at - 1}")
        return _Char(char.__eq__)

    def _group(self) -> _Node:
        look = self._look()
        inner = self._alternatives()
        if not self._took(")"):
            raise PatternError("a `)` is missing")
        return inner if look is None else _Look(inner, look)

    def _look(self) -> bool | None:
        """Reads what follows a group's `(?`. Whether it is a negative look-ahead; None for a plain group."""
        if not self._took("?"):
            return None
        if self._took(":"):
            return None
        if self._took("="):
            return False
        if self._took("!"):
            return True
        named = self._took("P<") or (not self._pattern.startswith(("<=", "<!"), self._at) and self._took("<"))
        end = self._pattern.find(">", self._at)
        if not named or end < 0:
            raise PatternError("look-behind and inline flags are not supported")
        self._at = end + 1
        return None

    def _escape(self) -> _Node:
        char = self._next()
        if char in "bB":
            return _At(char)
        if char in "AZz":
            return _At("^" if char == "A" else "$")
        if char in "123456789k":
            raise PatternError("back-references are not supported")
        test = self._escaped_class(char)
        return _Char(test if test is not None else self._escaped_char(char).__eq__)

    def _escaped_class(self, char: str) -> Test | None:
        if char.lower() in _CLASSES:
            test = _CLASSES[char.lower()]
            return test if char.islower() else _not(test)
        if char in "pP":
            category = self._category()
            return category if char == "p" else _not(category)
        return None

    def _category(self) -> Test:
        end = self._pattern.find("}", self._at)
        name = self._pattern[self._at + 1 : end].rpartition("=")[2]
        short = _CATEGORIES.get(name, name)
        if self._peek() != "{" or end < 0 or not 1 <= len(short) <= 2:
            raise PatternError(f"the category in `\\p` at character {self._at} is not supported")
        self._at = end + 1
        return lambda char: unicodedata.category(char).startswith(short)

    def _escaped_char(self, char: str) -> str:
        if char in _CONTROLS:
            return _CONTROLS[char]
        if char == "c":
            return chr(ord(self._next()) % 32)
        if char not in _HEX:
            return char
        digits = self._pattern[self._at : self._at + _HEX[char]]
        if char == "u" and digits.startswith("{"):
            digits = self._pattern[self._at : self._pattern.find("}", self._at) + 1]
        self._at += len(digits)
        try:
            return chr(int(digits.strip("{}"), 16))
        except (ValueError, OverflowError):
            raise PatternError(f"`\\{char}{digits}` is no character") from None

    def _class(self) -> Test:
        negative = self._took("^")
        tests: list[Test] = []
        first = True
        while first or self._peek() != "]":
            tests.append(self._class_item())
            first = False
            if self._peek() == "":
                raise PatternError("a `]` is missing")
        self._at += 1
        return _not(_any_of(tests)) if negative else _any_of(tests)

    def _class_item(self) -> Test:
        low = self._class_char()
        if not isinstance(low, str):
            return low
        if self._peek() != "-" or self._pattern[self._at + 1 : self._at + 2] in ("]", ""):
            return low.__eq__
        self._at += 1
        high = self._class_char()
        if not isinstance(high, str):
            return _any_of([low.__eq__, "-".__eq__, high])
        if high < low:
            raise PatternError(f"the range {low}-{high} is upside down")
        return lambda char: low <= char <= high

    def _class_char(self) -> str | Test:
        char = self._next()
        if char != "\\":
            return char
        escaped = self._next()
        if escaped == "b":
            return "\b"
        test = self._escaped_class(escaped)
        return test if test is not None else self._escaped_char(escaped)


_CATEGORIES = {
    "Letter": "L", "Lowercase_Letter": "Ll", "Uppercase_Letter": "Lu", "Mark": "M", "Number": "N", "Punctuation": "P",
    "Symbol": "S", "Separator": "Z", "Other": "C", "Decimal_Number": "Nd",
}  # fmt: skip


def _checked_bounds(least: str, most: str) -> tuple[int, int | None]:
    if len(least) > 4 or len(most) > 4:
        raise PatternError(f"it repeats more than {MAX_STATES:,} times")
    low, high = int(least), int(most) if most else None
    if high is not None and high < low:
        raise PatternError(f"the repeat {{{low},{high}}} is upside down")
    return low, high


def _not(test: Test) -> Test:
    return lambda char: not test(char)


def _any_of(tests: list[Test]) -> Test:
    return tests[0] if len(tests) == 1 else lambda char: any(test(char) for test in tests)
