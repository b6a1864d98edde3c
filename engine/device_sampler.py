"""The draw of `Sampler` on a CUDA device: the id is all that is read back."""

from __future__ import annotations

import torch
from thinkloop.engine.params import ResolvedSampling
from thinkloop.kernels.sampling import argmax, sample
from torch import Tensor


class DeviceDraw:
    """One generation's sampling parameters, kept on the device."""

    def __init__(self, sampling: ResolvedSampling, device: torch.device) -> None:
        s = sampling
        self._greedy = s.temperature == 0

        def one(value: float, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.tensor([value], dtype=dtype, device=device)

        self._temperature = one(s.temperature)
        self._top_k = one(s.top_k, torch.int32) if s.top_k > 0 else None
        self._top_p = one(s.top_p) if s.top_p < 1 else None
        self._min_p = one(s.min_p) if s.min_p > 0 else None

    def __call__(self, logits: Tensor, uniform: float) -> int:
        """The token for adjusted float32 `logits [V]` and a draw in [0, 1); -1 where none can be chosen. Of tokens exactly as
        likely as the last that top-k or top-p keeps, all stay."""
        rows = logits[None]
        if self._greedy:
            return int(argmax(rows))
        draw = torch.tensor([uniform], dtype=torch.float64).to(logits.device, non_blocking=True)
        ids = sample(
            rows, temperature=self._temperature, uniform=draw, top_k=self._top_k, top_p=self._top_p, min_p=self._min_p
        )
        return int(ids)
