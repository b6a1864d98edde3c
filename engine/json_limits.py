"""What JSON allows and the reader of calls doesn't (`call_form.parse_arguments`): numbers beyond float64 and more than
64 levels. Both are also where a model loops without end: 0.33333…, [[[[…"""

from __future__ import annotations

from thinkloop.engine.call_form import MAX_DEPTH as MAX_LEVELS
from thinkloop.engine.vocabulary import Allowed, Vocabulary

MOST_OPEN = MAX_LEVELS - 1
"""Brackets and braces that may be open at once: the innermost has one more level inside."""
MOST_DIGITS = 200
"""In a number, its exponent apart."""
MOST_EXPONENT_DIGITS = 2
"""10^200 · 10^99 is still a float64."""

_NUMBER = b"+-.0123456789eE"
_NEAR = 16
"""How close to a limit tokens are looked at, in levels or digits: more than any one token adds."""


class JsonLimits:
    """Follows a JSON text and takes out the tokens that would lead beyond a limit."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._in_string = self._escaped = False
        self._depth = 0
        self._number = b""

    def accept(self, text: bytes) -> None:
        for at, byte in enumerate(text):
            if self._in_string:
                self._string_byte(byte)
            elif byte in _NUMBER:
                self._number += text[at : at + 1]
            else:
                self._number = b""
                self._in_string = byte == ord('"')
                self._depth += (byte in b"[{") - (byte in b"]}")

    def apply(self, allowed: Allowed) -> Allowed:
        """`allowed` or, close to a limit, the part of it that keeps the limit (all of it when that part is empty)."""
        within = allowed
        if self._depth > MOST_OPEN - _NEAR:
            within = within & (self._vocabulary.openers <= MOST_OPEN - self._depth)
        digits = self._digits_left()
        if digits < _NEAR:
            within = within & (self._vocabulary.leading_digits <= digits)
        return within if within is allowed or within.any() else allowed

    def _digits_left(self) -> int:
        """Digits that the number being written may still have; many where none is."""
        mantissa, exponent, power = self._number.lower().partition(b"e")
        if exponent:
            return MOST_EXPONENT_DIGITS - sum(map(_is_digit, power))
        return MOST_DIGITS - sum(map(_is_digit, mantissa))

    def _string_byte(self, byte: int) -> None:
        if self._escaped:
            self._escaped = False
        elif byte == ord("\\"):
            self._escaped = True
        elif byte == ord('"'):
            self._in_string = False


def _is_digit(byte: int) -> bool:
    return byte in b"0123456789"
