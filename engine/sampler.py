"""From logits to the next token. Randomness is a function of (seed, position): nothing else that happens can shift a
draw."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from thinkloop.engine.params import Sampling, SamplingError
from thinkloop.engine.penalties import Penalties
from torch import Tensor

if TYPE_CHECKING:
    from thinkloop.engine.device_sampler import DeviceDraw

LARGEST_ON_DEVICE = 1 << 18
"""The largest vocabulary that the sampling kernels take."""
_MASK = (1 << 64) - 1
_NUCLEI = (32, 512)


def _mix(x: int) -> int:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014): 1 µs, where making a Philox generator takes 15 µs."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & _MASK
    return x ^ (x >> 31)


def uniform(seed: int, position: int) -> float:
    """The draw of `seed` at `position`, in [0, 1) with 53 bits."""
    stream = _mix(seed + 0x9E3779B97F4A7C15 & _MASK)
    return float(_mix(stream + (position + 1) * 0x9E3779B97F4A7C15 & _MASK) >> 11) * 2.0**-53


def check_sampling(sampling: Sampling, vocab_size: int | None = None) -> None:
    """Raises `SamplingError` for what tokens alone can't do (stop strings), and for a `logit_bias` outside the
    vocabulary where its size is given."""
    if sampling.stop:
        raise SamplingError(
            "`stop` needs text, and a session sees token ids only: give it `stop_ids`, or use the stop strings with a model."
        )
    if vocab_size is not None:
        sampling.check_vocabulary(vocab_size)


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural logarithms of probabilities that the model itself gave, before sampling parameters and masks."""

    chosen: float
    """That of the token that was chosen."""
    top: list[tuple[int, float]]
    """The likeliest token ids with theirs, best first."""


class Sampler:
    """Chooses tokens for one generation, counting what it chose for the penalties.

    `seen` are the tokens already in the context (only the repetition penalty looks at them); `banned` are never chosen.
    Choosing token after token at consecutive positions is all that exact speculation needs: a draft is right as long as
    it says what `choose` says for the logits after it.
    """

    def __init__(self, sampling: Sampling, seen: Iterable[int] = (), banned: Collection[int] = ()) -> None:
        check_sampling(sampling)
        self.sampling = sampling.resolved()
        self._penalties = Penalties(self.sampling, seen, banned)
        self._on_device: DeviceDraw | None = None

    def choose(self, logits: Tensor, position: int, allowed: Tensor | None = None) -> int:
        """The token for float `logits [V]` at draw `position`, recorded as chosen. `logits` stays as it is.

        Where the bool mask `allowed [V]` is false a token is out before anything else is looked at, greedy or not.
        Raises `SamplingError` when no token is left, or the logits are not numbers.
        """
        logits = self._adjusted(logits, allowed)
        if logits.is_cuda and logits.shape[0] <= LARGEST_ON_DEVICE:
            token = self._draw_on_device(logits, position)
        elif self.sampling.temperature == 0:
            token = int(logits.argmax())
            if not math.isfinite(logits[token]):
                raise _unusable(logits)
        else:
            token = self._draw(logits, uniform(self.sampling.seed, position))
        self.record(token)
        return token

    def _draw_on_device(self, logits: Tensor, position: int) -> int:
        if self._on_device is None:
            from thinkloop.engine.device_sampler import DeviceDraw  # Triton comes with it

            self._on_device = DeviceDraw(self.sampling, logits.device)
        greedy = self.sampling.temperature == 0
        token = self._on_device(logits, 0.0 if greedy else uniform(self.sampling.seed, position))
        if token < 0:
            raise _unusable(logits)
        return token

    def record(self, token: int) -> None:
        """Counts `token` as generated (for one that was forced rather than chosen)."""
        self._penalties.record(token)

    def probabilities(self, logits: Tensor, allowed: Tensor | None = None) -> Tensor:
        """The distribution `[V]` (float64) that `choose` draws from. Raises as `choose` does."""
        logits = self._adjusted(logits, allowed)
        if not math.isfinite(logits.max()):
            raise _unusable(logits)
        chances = torch.zeros(logits.shape[0], dtype=torch.float64, device=logits.device)
        if self.sampling.temperature == 0:
            chances[logits.argmax()] = 1
            return chances
        weights, ids = self._filtered(logits)
        chances[... if ids is None else ids] = weights.double()
        return chances / chances.sum()

    @staticmethod
    def logprobs(logits: Tensor, token: int, top: int = 0) -> TokenLogprobs:
        """Log probabilities of `token` and of the `top` likeliest for the model's own `logits [V]`, in float32. Raises
        `SamplingError` for a `top` below 0; one above V gives all there are."""
        if top < 0:
            raise SamplingError(f"`top` log probabilities were asked for as {top}; give 0 or more.")
        logprobs = logits.float().log_softmax(-1)
        values, ids = logprobs.topk(min(top, logprobs.shape[0]))
        return TokenLogprobs(float(logprobs[token]), list(zip(ids.tolist(), values.tolist(), strict=True)))

    def _adjusted(self, logits: Tensor, allowed: Tensor | None) -> Tensor:
        logits = logits.float()
        if allowed is not None:
            if allowed.shape != logits.shape:
                raise SamplingError(f"A mask of shape {list(allowed.shape)} for logits of {list(logits.shape)}.")
            logits = torch.where(allowed.to(logits.device, non_blocking=True), logits, -math.inf)
        return self._penalties.apply(logits) if self._penalties.active else logits

    def _draw(self, logits: Tensor, u: float) -> int:
        weights, ids = self._filtered(logits)
        sums = weights.cumsum(-1, dtype=torch.float64)  # float32 can't tell tokens of 1e-8 apart near 1
        total = float(sums[-1])
        if not total > 0:
            raise _unusable(logits)
        index = int(torch.searchsorted(sums, total * u, right=True))  # u <= 1 - 2**-53: the product is below the total
        return index if ids is None else int(ids[index])

    def _filtered(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """Weights (not necessarily of sum 1) of the tokens that the filters leave, and their ids; None: all in order.

        Tokens stand in the order of their ids, not of their weights: two near-equal logits that change places, because
        another batch or another kernel rounds differently, then don't change the draw.
        """
        s = self.sampling
        if 0 < s.top_k < logits.shape[0]:
            values, ids = logits.topk(s.top_k)
            weights = (values / s.temperature).softmax(-1)
        elif s.top_p < 1:
            weights, ids = _nucleus((logits / s.temperature).softmax(-1), s.top_p)
        else:
            weights = (logits / s.temperature).softmax(-1)
            return (weights.masked_fill_(weights < s.min_p * weights.max(), 0) if s.min_p else weights), None
        kept = (
            len(ids) if s.top_p == 1 else 1 + int(torch.searchsorted(weights.cumsum(-1, dtype=torch.float64), s.top_p))
        )
        if s.min_p:
            kept = min(kept, len(ids) - int((weights < s.min_p * weights[0]).sum()))
        ids, order = ids[:kept].sort()
        return weights[order], ids


def _nucleus(probabilities: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """The likeliest tokens, best first, and their probabilities: as many as `top_p` needs, or more."""
    for count in _NUCLEI:  # at V = 163,840 a whole sort takes 12.5 ms, these two steps 0.27 and 0.36
        if count < probabilities.shape[0]:
            values, ids = probabilities.topk(count)
            if float(values.sum()) > top_p:
                return values, ids
    return probabilities.sort(descending=True)


def _unusable(logits: Tensor) -> SamplingError:
    best = float(logits.max())
    if best == -math.inf:
        return SamplingError("No token is left to choose: every one is banned, or outside the mask that was given.")
    return SamplingError(
        f"The model's logits are not numbers (the largest is {best}): its weights or a kernel are broken."
    )
