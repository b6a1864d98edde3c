"""A tokenizer as grammars see it: which token goes on with which text."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from functools import cached_property
from threading import Lock
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from thinkloop.engine.tokenizer import Tokenizer
from thinkloop.traces.events import ThinkloopError

if TYPE_CHECKING:
    from llguidance import LLTokenizer

Allowed = NDArray[np.bool_]
"""Tokens that may come next, `[V]`."""

_MOST_KEPT = 4


class GrammarError(ThinkloopError):
    """A grammar can't be had (a tool or schema is wrong, llguidance is missing), or a masked token was accepted."""


class Vocabulary:
    """Get it from `vocabulary`. Safe to share between threads; what is costly is made when it is first asked for."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.size = tokenizer.n_vocab
        self.end = tokenizer.special("<|im_end|>")
        self._fixed: dict[tuple[bool, frozenset[int]], Allowed] = {}

    @cached_property
    def llguidance(self) -> LLTokenizer:
        """For llguidance's matchers: 0.5 s and 100 MB for 163,840 tokens, 4 ms for the mini model's 2,927.

        Raises `GrammarError` when llguidance isn't installed.
        """
        try:
            from llguidance import LLTokenizer, TokenizerWrapper
        except ImportError as error:
            raise GrammarError(
                "Constrained decoding needs llguidance, which isn't installed: pip install 'thinkloop[grammar]'."
            ) from error
        return LLTokenizer(TokenizerWrapper(_Source(self.tokenizer, self.end)))

    @cached_property
    def ids(self) -> Mapping[bytes, int]:
        """Token bytes to id, special tokens left out."""
        return {self.tokenizer.token_bytes(token): token for token in range(self.tokenizer.n_ranks)}

    @cached_property
    def leading_digits(self) -> NDArray[np.int16]:
        """How many digits each token begins with, `[V]`."""
        return self._counts(lambda text: len(text) - len(text.lstrip(b"0123456789")))

    @cached_property
    def openers(self) -> NDArray[np.int16]:
        """How many opening brackets and braces each token has, `[V]`."""
        return self._counts(lambda text: text.count(b"[") + text.count(b"{"))

    def prefixes(self, text: bytes, start: int) -> Iterator[tuple[int, int]]:
        """Tokens that `text` can go on with at `start`: where each ends, and its id."""
        for end in range(start + 1, min(len(text), start + self._longest) + 1):
            token = self.ids.get(text[start:end])
            if token is not None:
                yield end, token

    def fixed(self, text: bool, specials: Collection[int]) -> Allowed:
        """All ordinary tokens or none, and these special ones: the same array each time, not to be written to."""
        key = (text, frozenset(specials))
        known = self._fixed.get(key)
        if known is None:
            known = self._fixed[key] = np.zeros(self.size, np.bool_)
            known[: self.tokenizer.n_ranks] = text
            known[list(specials)] = True
        return known

    @cached_property
    def _longest(self) -> int:
        return max(map(len, self.ids))

    def _counts(self, count: Callable[[bytes], int]) -> NDArray[np.int16]:
        counts = np.zeros(self.size, np.int16)
        counts[: self.tokenizer.n_ranks] = [count(text) for text in self.ids]
        return counts


class _Source:
    """What `llguidance.TokenizerWrapper` asks of a tokenizer."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, end: int) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = end
        self.tokens = [tokenizer.token_bytes(token) for token in range(tokenizer.n_vocab)]
        self.special_token_ids = sorted(tokenizer.specials.values())

    def __call__(self, text: bytes) -> list[int]:
        return self._tokenizer.encode(text.decode())


_known: dict[str, Vocabulary] = {}
_lock = Lock()


def vocabulary(tokenizer: Tokenizer) -> Vocabulary:
    """The tokenizer's vocabulary, made once for each set of tokens.

    Raises `TokenizerError` when it lacks the special tokens of a chat.
    """
    with _lock:
        known = _known.get(tokenizer.hash)
        if known is None:
            known = _known[tokenizer.hash] = Vocabulary(tokenizer)
            if len(_known) > _MOST_KEPT:
                del _known[next(iter(_known))]
    return known
