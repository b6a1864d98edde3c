"""The syntax of regular expressions in JSON Schemas (ECMA 262's, without what an automaton can't match), as a tree."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from dataclasses import dataclass

_DEPTH = 40


class PatternError(ValueError):
    """An expression that can't be used: malformed, of a kind that isn't supported, or too much work."""


Test = Callable[[str], bool]


@dataclass(frozen=True, slots=True)
class Char:
    test: Test


@dataclass(frozen=True, slots=True)
class At:
    where: str


@dataclass(frozen=True, slots=True)
class Look:
    inner: Node
    negative: bool


@dataclass(frozen=True, slots=True)
class Seq:
    parts: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Alt:
    branches: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Repeat:
    inner: Node
    least: int
    most: int | None


Node = Char | At | Look | Seq | Alt | Repeat


def _is_digit(char: str) -> bool:
    return "0" <= char <= "9"


def is_word(char: str) -> bool:
    """Whether ECMA's `\\w` takes the character: ASCII letters, digits and `_`."""
    return char == "_" or (char.isascii() and char.isalnum())


def _is_any(char: str) -> bool:
    return char not in "\n\r\u2028\u2029"


_CLASSES: dict[str, Test] = {"d": _is_digit, "w": is_word, "s": str.isspace}
_CONTROLS = {"t": "\t", "n": "\n", "r": "\r", "f": "\f", "v": "\v", "0": "\0", "a": "\a"}
_HEX = {"x": 2, "u": 4}


class Parser:
    """Recursive descent over one expression, at most `_DEPTH` groups deep."""

    def __init__(self, pattern: str) -> None:
        self._pattern = pattern
        self._at = 0
        self._depth = 0

    def parse(self) -> Node:
        """The tree of the whole expression. Raises `PatternError`."""
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

    def _alternatives(self) -> Node:
        self._depth += 1
        if self._depth > _DEPTH:
            raise PatternError(f"its groups are more than {_DEPTH} deep")
        branches = [self._sequence()]
        while self._took("|"):
            branches.append(self._sequence())
        self._depth -= 1
        return branches[0] if len(branches) == 1 else Alt(tuple(branches))

    def _sequence(self) -> Node:
        parts: list[Node] = []
        while self._peek() not in ("", "|", ")"):
            parts.append(self._quantified(self._atom()))
        return parts[0] if len(parts) == 1 else Seq(tuple(parts))

    def _quantified(self, node: Node) -> Node:
        bounds = self._bounds()
        if bounds is None:
            return node
        self._took("?")  # lazy or greedy is the same to a search that only says yes or no
        if self._bounds() is not None:
            raise PatternError(f"two quantifiers in a row at character {self._at - 1}")
        return Repeat(node, *bounds)

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

    def _atom(self) -> Node:
        char = self._next()
        if char in "^$":
            return At(char)
        if char == ".":
            return Char(_is_any)
        if char == "(":
            return self._group()
        if char == "[":
            return Char(self._class())
        if char == "\\":
            return self._escape()
        if char in "*+?":
            raise PatternError(f"nothing to repeat before `{char}` at character {self._at - 1}")
        return Char(char.__eq__)

    def _group(self) -> Node:
        look = self._look()
        inner = self._alternatives()
        if not self._took(")"):
            raise PatternError("a `)` is missing")
        return inner if look is None else Look(inner, look)

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

    def _escape(self) -> Node:
        char = self._next()
        if char in "bB":
            return At(char)
        if char in "AZz":
            return At("^" if char == "A" else "$")
        if char in "123456789k":
            raise PatternError("back-references are not supported")
        test = self._escaped_class(char)
        return Char(test if test is not None else self._escaped_char(char).__eq__)

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
        raise PatternError("it repeats more than 9,999 times")
    low, high = int(least), int(most) if most else None
    if high is not None and high < low:
        raise PatternError(f"the repeat {{{low},{high}}} is upside down")
    return low, high


def _not(test: Test) -> Test:
    return lambda char: not test(char)


def _any_of(tests: list[Test]) -> Test:
    return tests[0] if len(tests) == 1 else lambda char: any(test(char) for test in tests)
