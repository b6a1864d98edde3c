"""Latent attention over whole blocks is the reference over exactly the rows there are."""

from __future__ import annotations

import pytest
import torch
from thinkloop.kernels.mla_cpu import mla_blocks
from thinkloop.kernels.reference import mla_absorbed

HEADS, NOPE, ROPE, LATENT, VALUE = 3, 16, 8, 48, 24


@pytest.mark.parametrize("new", [1, 2, 5, 17])
@pytest.mark.parametrize("length", [17, 63, 64, 65, 200])
@pytest.mark.parametrize("rows", [0, 1, 55])
def test_rows_behind_the_sequence_change_nothing_whatever_they_hold(new: int, length: int, rows: int) -> None:
    q = torch.randn(new, HEADS, NOPE + ROPE).bfloat16()
    cache = torch.randn(length + rows, LATENT + ROPE).bfloat16()
    cache[length:] = float("nan")
    w_uk, w_uv = torch.randn(HEADS, NOPE, LATENT).bfloat16() / 4, torch.randn(HEADS, LATENT, VALUE).bfloat16() / 7
    ours = mla_blocks(q, cache, length, w_uk, w_uv, 0.2).float()
    wide = [tensor.float() for tensor in (q, cache[:length], w_uk, w_uv)]
    reference = mla_absorbed(*wide, 0.2)
    assert ours.shape == (new, HEADS, VALUE)
    assert float((ours - reference).abs().max() / reference.abs().max()) < 0.03
    assert not cache[length:].any()
