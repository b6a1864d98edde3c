"""The two texts of a call while they are written: its header and its arguments."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from itertools import takewhile
from typing import Protocol

import numpy as np
from thinkloop.engine.call_form import parse_arguments
from thinkloop.engine.schema_grammar import Document, SchemaGrammar
from thinkloop.engine.vocabulary import Allowed, GrammarError, Vocabulary


class Writer(Protocol):
    """A text that a grammar holds, from its first token to its last."""

    @property
    def complete(self) -> bool:
        """Whether the text so far is whole."""
        ...

    def allowed(self) -> Allowed:
        """Ordinary tokens that may come next, a new array."""
        ...

    def accept(self, token: int) -> None:
        """Raises `GrammarError` for a token that doesn't fit; the text is as before then."""
        ...

    def forced(self) -> list[int]:
        """Tokens of the text that must come next."""
        ...

    def ends_after(self, tokens: list[int]) -> bool:
        """Whether the text is whole after these, and nothing can follow it."""
        ...


class Header:
    """One of `functions.{tool}:{index}`, the index given."""

    def __init__(self, vocabulary: Vocabulary, names: Collection[str], index: int) -> None:
        self._vocabulary = vocabulary
        self._left: Mapping[str, bytes] = {name: f"functions.{name}:{index}".encode() for name in names}
        self._tokens: list[int] = []
        self._at = 0

    @property
    def complete(self) -> bool:
        return any(len(text) == self._at for text in self._left.values())

    @property
    def name(self) -> str:
        """The tool, once only one is left."""
        return next(iter(self._left))

    def allowed(self) -> Allowed:
        allowed = np.zeros(self._vocabulary.size, np.bool_)
        for text in self._left.values():
            allowed[[token for _, token in self._vocabulary.prefixes(text, self._at)]] = True
        return allowed

    def accept(self, token: int) -> None:
        text = self._vocabulary.tokenizer.token_bytes(token)
        left = {name: whole for name, whole in self._left.items() if whole.startswith(text, self._at)}
        if not left:
            raise GrammarError(f"Token {token} names no tool here: choose from what `mask()` allows.")
        self._left = left
        self._at += len(text)
        self._tokens.append(token)

    def forced(self) -> list[int]:
        """What the spellings of all headers that are left have in common."""
        spellings = [self._vocabulary.tokenizer.encode(text.decode()) for text in self._left.values()]
        common = [column[0] for column in takewhile(lambda c: len(set(c)) == 1, zip(*spellings, strict=False))]
        return common[len(self._tokens) :] if common[: len(self._tokens)] == self._tokens else []

    def ends_after(self, tokens: list[int]) -> bool:
        return self._at + len(self._vocabulary.tokenizer.decode_bytes(tokens)) in map(len, self._left.values())


class Arguments(Document):
    """A call's arguments, which may not come to be one of `forbidden` unless there is nothing else to write."""

    def __init__(self, vocabulary: Vocabulary, grammar: SchemaGrammar, forbidden: Collection[bytes]) -> None:
        super().__init__(vocabulary, grammar)
        self._forbidden = list(forbidden)
        self._at = 0

    def allowed(self) -> Allowed:
        allowed = super().allowed()
        repeating = list(self._repeating(allowed)) if self._forbidden and not self.failure else []
        if not repeating:
            return allowed
        others = allowed.copy()
        others[repeating] = False
        return others if others.any() else allowed

    def accept(self, token: int) -> None:
        super().accept(token)
        if self._forbidden:
            text = self._vocabulary.tokenizer.token_bytes(token)
            self._forbidden = [whole for whole in self._forbidden if whole.startswith(text, self._at)]
            self._at += len(text)

    def _repeating(self, allowed: Allowed) -> Iterator[int]:
        """Tokens that would complete a forbidden text, or leave nothing but the rest of it to write."""
        for whole in self._forbidden:
            for end, token in self._vocabulary.prefixes(whole, self._at):
                if allowed[token] and (end == len(whole) or self.forced_text(token) == whole[end:]):
                    yield token


def spellings(text: str) -> set[bytes]:
    """Argument text as it was written, and as JSON with and without spaces behind commas and colons."""
    value, _ = parse_arguments(text)
    separators = ((",", ":"), (", ", ": ")) if value is not None else ()
    return {text.encode(), *(json.dumps(value, ensure_ascii=False, separators=pair).encode() for pair in separators)}
