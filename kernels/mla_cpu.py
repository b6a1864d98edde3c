"""Latent attention of a few new tokens on the CPU in bfloat16: `reference.mla_absorbed`, over rows in whole blocks.

oneDNN compiles a product for each shape it meets. A cache that grows by a row with each token brings two new shapes with
each token, 1.2 ms to compile for each sequence at any length, where 16 heads over 513 rows take 0.16 ms and over 2,049
rows 0.41 ms. With the rows rounded up to blocks of 64, which the cache has anyway, a shape lasts for 64 tokens and serves
other sequences too. Rounding costs nothing that can be measured.
"""

from __future__ import annotations

import torch
from torch import Tensor


def mla_blocks(q: Tensor, cache: Tensor, length: int, w_uk: Tensor, w_uv: Tensor, scale: float) -> Tensor:
    """`mla_absorbed` over the first `length` rows of `cache [S, C+R]`; what lies behind them is set to zero.

    `q [T, H, N+R]` belongs to rows `length - T` to `length - 1`; `w_uk [H, N, C]`, `w_uv [H, C, V]`. Returns `[T, H, V]`.
    """
    (new, heads), (n, c) = q.shape[:2], w_uk.shape[1:]
    cache[length:] = 0  # a weight of zero times whatever memory held could be NaN
    latent_q = torch.bmm(q[..., :n].transpose(0, 1), w_uk).transpose(0, 1)  # [T, H, C]
    whole_q = torch.cat([latent_q, q[..., n:]], dim=-1).mul_(scale)
    scores = torch.mm(whole_q.view(new * heads, -1), cache.T)
    _hide_unseen(scores.view(new, heads, -1), length)
    mixed = torch.mm(scores.softmax(-1), cache[:, :c]).view(new, heads, c)  # the softmax is in float32 inside
    return torch.bmm(mixed.transpose(0, 1), w_uv).transpose(0, 1)


def _hide_unseen(scores: Tensor, length: int) -> None:
    """Masks in `scores [T, H, S]` what lies after each token's own row, the last token's being `length - 1`."""
    new, rows = scores.shape[0], scores.shape[2]
    if new == 1:
        scores[..., length:] = float("-inf")
        return
    unseen = torch.ones(new, rows - length + new, dtype=torch.bool).triu(1)
    scores[..., length - new :].masked_fill_(unseen[:, None], float("-inf"))
