"""Decode attention over a paged cache is the reference's absorbed attention, and reads nothing that isn't there."""

from __future__ import annotations

import pytest
import torch
from thinkloop.kernels.mla_decode import PAGE, decode_tiles, kv_splits, mla_decode
from thinkloop.kernels.reference import mla_absorbed
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SCALE = 0.1


def paged(lengths: list[int], width: int, pages: int = 5) -> tuple[Tensor, Tensor, list[Tensor]]:
    """A cache that is no number wherever no row lies, a table with pages in any order, and each sequence's rows."""
    generator = torch.Generator().manual_seed(1)
    cache = torch.full((len(lengths) * pages * PAGE + PAGE, width), float("nan"), dtype=torch.bfloat16)
    table = torch.randperm(len(lengths) * pages, generator=generator).view(len(lengths), pages).int()
    rows = [torch.randn(length, width, generator=generator).bfloat16() for length in lengths]
    for pages_of, own in zip(table.tolist(), rows, strict=True):
        for index, row in enumerate(own):
            cache[pages_of[index // PAGE] * PAGE + index % PAGE] = row
    return cache.to(DEVICE), table.to(DEVICE), rows


def reference(q: Tensor, rows: Tensor, latent: int) -> Tensor:
    """`mla_absorbed` with projections that change nothing: float32 `[T, H, C]`."""
    eye = torch.eye(latent).expand(q.shape[1], -1, -1)
    return mla_absorbed(q.float(), rows.float(), eye, eye, SCALE)


def error(got: Tensor, want: Tensor) -> float:
    return float((got.float().cpu() - want).norm() / want.norm())


@pytest.mark.parametrize("splits", [1, 3, None])
@pytest.mark.parametrize(
    ("tokens", "heads", "latent", "rope", "lengths"),
    [(1, 4, 64, 16, [130, 1]), (3, 5, 32, 16, [65, 200, 3]), (8, 6, 128, 32, [300]), (2, 64, 64, 32, [64])],
)
def test_it_is_the_references_attention(
    tokens: int, heads: int, latent: int, rope: int, lengths: list[int], splits: int | None
) -> None:
    cache, table, rows = paged(lengths, latent + rope)
    q = torch.randn(len(lengths), tokens, heads, latent + rope, generator=torch.Generator().manual_seed(2)).bfloat16()
    ends = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    out = mla_decode(q.to(DEVICE), cache, table, ends, SCALE, splits=splits)
    assert out.shape == (len(lengths), tokens, heads, latent)
    for got, query, own in zip(out, q, rows, strict=True):
        assert error(got, reference(query, own, latent)) < 1e-2


def test_a_sequence_without_rows_gives_zeros_and_reads_nothing() -> None:
    cache, table, rows = paged([70, 0], 80)
    table[1] = 1 << 30  # would be far outside
    q = torch.ones(2, 1, 4, 80, dtype=torch.bfloat16, device=DEVICE)
    out = mla_decode(q, cache, table, torch.tensor([70, 0], dtype=torch.int32, device=DEVICE), SCALE)
    assert (out[1] == 0).all()
    assert error(out[0], reference(q[0].cpu(), rows[0], 64)) < 1e-2


def test_large_scores_do_not_overflow() -> None:
    cache, table, rows = paged([100], 80)
    q = torch.full((1, 1, 4, 80), 100.0, dtype=torch.bfloat16, device=DEVICE)
    out = mla_decode(q, cache, table, torch.tensor([100], dtype=torch.int32, device=DEVICE), SCALE, splits=2)
    assert error(out[0], reference(q[0].cpu(), rows[0], 64)) < 1e-2


@pytest.mark.parametrize("change", ["q", "cache", "table", "lengths"])
def test_what_does_not_fit_is_named(change: str) -> None:
    cache, table, _ = paged([70], 80)
    arguments = {
        "q": torch.ones(1, 1, 4, 80, dtype=torch.bfloat16, device=DEVICE), "cache": cache, "table": table,
        "lengths": torch.tensor([70], dtype=torch.int32, device=DEVICE),
    }  # fmt: skip
    arguments[change] = arguments[change].float()
    with pytest.raises(ValueError, match=f"`{change}` must be"):
        mla_decode(*arguments.values(), SCALE)


def test_a_width_that_is_no_two_powers_of_two_is_refused() -> None:
    cache, table, _ = paged([70], 88)
    with pytest.raises(ValueError, match="powers of two"):
        mla_decode(
            torch.ones(1, 1, 4, 88, dtype=torch.bfloat16, device=DEVICE), cache, table,
            torch.tensor([70], dtype=torch.int32, device=DEVICE), SCALE,
        )  # fmt: skip


@pytest.mark.parametrize("heads", [16, 64, 128])
@pytest.mark.parametrize("tokens", [1, 2, 4, 8])
def test_one_long_sequence_keeps_every_sm_busy_and_splits_stay_bounded(heads: int, tokens: int) -> None:
    tiles = -(-heads * tokens // decode_tiles(heads * tokens).queries)
    for batch in (1, 2, 8, 32):
        programs = kv_splits(batch, heads, tokens, 1 << 18, 132) * tiles * batch
        assert programs > 66 or batch * tiles > 66
        assert programs <= max(132, batch * tiles)
    assert kv_splits(1, heads, tokens, 1 << 18, 132) * heads * tokens * 512 * 4 <= 20e6  # bytes of partial results


def test_short_sequences_are_split_less() -> None:
    assert kv_splits(1, 64, 1, 256, 132) == 1
    assert kv_splits(1, 64, 1, 4096, 132) == 16
