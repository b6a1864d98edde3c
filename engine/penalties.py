"""What a generation adds to its logits, whatever the model says: bias, bans, and penalties for what was said before."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import torch
from thinkloop.engine.params import ResolvedSampling
from torch import Tensor


class Penalties:
    """Kept as two vectors over the vocabulary, brought up to date with each token: a step costs the same after
    100,000 tokens as after one.

    `seen` are the tokens already in the context (only the repetition penalty looks at them); `banned` are never chosen.
    """

    def __init__(self, sampling: ResolvedSampling, seen: Iterable[int] = (), banned: Collection[int] = ()) -> None:
        self._sampling = sampling
        self._banned = sorted(banned)
        self._repeats = sampling.repetition_penalty != 1
        self._counts = bool(sampling.presence_penalty or sampling.frequency_penalty)
        self._seen = list(dict.fromkeys(seen)) if self._repeats else []
        self._new: list[int] = []
        self._generated: set[int] = set()
        self._bias: Tensor | None = None
        self._divisor: Tensor | None = None
        self.active = bool(self._banned or self._repeats or self._counts or sampling.logit_bias)
        """Whether any of it is asked for."""

    def record(self, token: int) -> None:
        """Counts `token` as generated."""
        if self._repeats or self._counts:
            self._new.append(token)

    def apply(self, logits: Tensor) -> Tensor:
        """New logits `[V]`: repetition first, then all that is added. Raises `SamplingError` for a `logit_bias` outside
        the vocabulary."""
        bias, divisor = self._vectors(logits)
        if divisor is not None:
            # Of l / p and l * p the penalised is the smaller for p > 1, the larger for p < 1, on either side of zero:
            # at 163,840 logits half the time of `torch.where` on their sign.
            worse = torch.minimum if self._sampling.repetition_penalty > 1 else torch.maximum
            logits = worse(logits / divisor, logits * divisor)
        return logits + bias

    def _vectors(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        if self._bias is None:
            self._bias = self._first_bias(logits)
            self._divisor = self._first_divisor(self._bias) if self._repeats else None
        for token in self._new:
            self._count(token, self._bias)
        self._new.clear()
        return self._bias, self._divisor

    def _first_bias(self, logits: Tensor) -> Tensor:
        given = self._sampling.logit_bias
        self._sampling.check_vocabulary(logits.shape[0])
        bias = torch.zeros(logits.shape[0], device=logits.device)
        if given:
            bias[torch.tensor(list(given))] = torch.tensor(list(given.values()), dtype=bias.dtype, device=bias.device)
        bias[torch.tensor(self._banned, dtype=torch.int64)] = float("-inf")
        return bias

    def _first_divisor(self, like: Tensor) -> Tensor:
        divisor = torch.ones_like(like)
        divisor[torch.tensor(self._seen, dtype=torch.int64)] = self._sampling.repetition_penalty
        return divisor

    def _count(self, token: int, bias: Tensor) -> None:
        if self._divisor is not None:
            self._divisor[token] = self._sampling.repetition_penalty
        if self._counts:
            bias[token] -= self._sampling.frequency_penalty
            if token not in self._generated:
                self._generated.add(token)
                bias[token] -= self._sampling.presence_penalty
