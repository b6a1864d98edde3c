"""From logits to the next token. Randomness is a function of (seed, position): nothing else that happens can shift a
draw."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable

import torch
from thinkloop.engine.params import Sampling
from thinkloop.traces.events import ThinkloopError
from torch import Tensor

_MASK = (1 << 64) - 1
_NUCLEI = (32, 512)


class SamplingError(ThinkloopError):
    """A sampling parameter out of its range."""


def _mix(x: int) -> int:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014): 1 µs, where making a Philox generator takes 15 µs."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & _MASK
    return x ^ (x >> 31)


def uniform(seed: int, position: int) -> float:
    """The draw of `seed` at `position`, in [0, 1) with 53 bits."""
    stream = _mix((seed & _MASK) + 0x9E3779B97F4A7C15 & _MASK)
    return float(_mix(stream + (position + 1) * 0x9E3779B97F4A7C15 & _MASK) >> 11) * 2.0**-53


def check_sampling(sampling: Sampling) -> None:
    """Raises `SamplingError` naming the parameter that is out of range."""
    ranges = {
        "temperature": (sampling.temperature >= 0, "0 (greedy) or more"),
        "top_k": (sampling.top_k >= 0, "0 (off) or more"),
        "top_p": (0 < sampling.top_p <= 1, "above 0 and at most 1 (off)"),
        "min_p": (0 <= sampling.min_p < 1, "0 (off) or more and below 1"),
        "repetition_penalty": (sampling.repetition_penalty > 0, "above 0; 1 is off"),
    }
    for name, (good, wanted) in ranges.items():
        if not good:
            raise SamplingError(f"`{name}` is {getattr(sampling, name)!r}; it must be {wanted}.")


class Sampler:
    """Chooses tokens for one generation, counting what it chose for the penalties.

    `seen` are the tokens already in the context (only the repetition penalty looks at them); `banned` are never chosen.
    """

    def __init__(self, sampling: Sampling, seen: Iterable[int] = (), banned: Collection[int] = ()) -> None:
        check_sampling(sampling)
        self.sampling = sampling
        self._banned = torch.tensor(sorted(banned), dtype=torch.int64) if banned else None
        self._repeats = sampling.repetition_penalty != 1
        self._counts_matter = bool(sampling.presence_penalty or sampling.frequency_penalty)
        self._seen = set(seen) if self._repeats else set()
        self._counts: Counter[int] = Counter()

    def choose(self, logits: Tensor, position: int) -> int:
        """The token for float `logits [V]` at draw `position`, recorded as chosen. `logits` stays as it is."""
        logits = self._adjusted(logits)
        if self.sampling.temperature == 0:
            token = int(logits.argmax())
        else:
            token = self._draw(logits, uniform(self.sampling.seed, position))
        self.record(token)
        return token

    def record(self, token: int) -> None:
        """Counts `token` as generated (for one that was forced rather than chosen)."""
        if self._repeats:
            self._seen.add(token)
        if self._counts_matter:
            self._counts[token] += 1

    def _adjusted(self, logits: Tensor) -> Tensor:
        changes = self._banned is not None or self._seen or self._counts
        if not changes:
            return logits
        logits = logits.clone()
        if self._seen:
            self._repetition(logits)
        if self._counts:
            self._presence_and_frequency(logits)
        if self._banned is not None:
            logits[self._banned] = float("-inf")
        return logits

    def _repetition(self, logits: Tensor) -> None:
        ids = torch.tensor(sorted(self._seen), device=logits.device)
        values, penalty = logits[ids], self.sampling.repetition_penalty
        logits[ids] = torch.where(values > 0, values / penalty, values * penalty)

    def _presence_and_frequency(self, logits: Tensor) -> None:
        ids = torch.tensor(list(self._counts), device=logits.device)
        counts = torch.tensor(list(self._counts.values()), dtype=logits.dtype, device=logits.device)
        logits[ids] -= self.sampling.presence_penalty + self.sampling.frequency_penalty * counts

    def _draw(self, logits: Tensor, u: float) -> int:
        s = self.sampling
        scaled = logits.double() / s.temperature  # float64: a sum of 163,840 float32 terms loses the tail
        if s.top_k or s.top_p < 1:
            return self._draw_sorted(scaled, u)
        probabilities = scaled.softmax(-1)
        if s.min_p:
            probabilities[probabilities < s.min_p * probabilities.max()] = 0
        return _at(probabilities, u)

    def _draw_sorted(self, scaled: Tensor, u: float) -> int:
        """Filters in Hugging Face's order: top-k, top-p of what is left, min-p of what is left."""
        s = self.sampling
        probabilities, ids = self._best(scaled)
        if s.top_p < 1:
            before = probabilities.cumsum(-1) - probabilities
            probabilities[before >= s.top_p] = 0
        if s.min_p:
            probabilities[probabilities < s.min_p * probabilities[0]] = 0
        return int(ids[_at(probabilities, u)])

    def _best(self, scaled: Tensor) -> tuple[Tensor, Tensor]:
        """The likeliest tokens, best first, and their probabilities: `top_k`, or as many as `top_p` needs."""
        s, vocabulary = self.sampling, scaled.shape[0]
        if 0 < s.top_k < vocabulary:
            values, ids = scaled.topk(s.top_k)
            return values.softmax(-1), ids
        probabilities = scaled.softmax(-1)
        for count in _NUCLEI:  # a whole sort of 3,000 takes 400 µs, these two steps 20 and 60
            if count < vocabulary:
                values, ids = probabilities.topk(count)
                if float(values.sum()) > s.top_p:
                    return values, ids
        return probabilities.sort(descending=True)


def _at(probabilities: Tensor, u: float) -> int:
    """The index where the running sum of `probabilities` (not necessarily of sum 1) passes share `u`."""
    sums = probabilities.cumsum(-1)
    target = sums[-1:] * u
    index = int(torch.searchsorted(sums, target, right=True))
    return min(index, int(torch.searchsorted(sums, sums[-1:])))
