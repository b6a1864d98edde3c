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


@pytest.mark.parametrize("splits", [1, 3, 7, None])
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


def test_fewer_rows_than_new_tokens_leave_the_first_tokens_zeros() -> None:
    cache, table, rows = paged([2], 80)
    q = torch.randn(1, 4, 3, 80, generator=torch.Generator().manual_seed(2)).bfloat16()
    out = mla_decode(q.to(DEVICE), cache, table, torch.tensor([2], dtype=torch.int32, device=DEVICE), SCALE)[0]
    assert (out[:2] == 0).all()
    assert error(out[2:], reference(q[0, 2:], rows[0], 64)) < 1e-2


@pytest.mark.parametrize("splits", [40, 70])
def test_more_splits_than_there_are_rows_for_are_merged(splits: int) -> None:
    cache, table, rows = paged([200], 80)
    q = torch.randn(1, 2, 3, 80, generator=torch.Generator().manual_seed(2)).bfloat16()
    ends = torch.tensor([200], dtype=torch.int32, device=DEVICE)
    out = mla_decode(q.to(DEVICE), cache, table, ends, SCALE, splits=splits)
    assert error(out[0], reference(q[0], rows[0], 64)) < 1e-2


def test_rows_lie_beyond_two_thousand_million_values() -> None:
    page = (1 << 31) // (PAGE * 80) + 1
    cache = torch.empty(
        (page + 1) * PAGE, 80, dtype=torch.bfloat16, device=DEVICE
    )  # 4 GB, of which one page is touched
    rows = torch.randn(PAGE, 80, generator=torch.Generator().manual_seed(1)).bfloat16()
    cache[page * PAGE :] = rows.to(DEVICE)
    q = torch.randn(1, 1, 3, 80, generator=torch.Generator().manual_seed(2)).bfloat16()
    table, ends = (torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in ([[page]], [PAGE]))
    out = mla_decode(q.to(DEVICE), cache, table, ends, SCALE)
    assert error(out[0], reference(q[0], rows, 64)) < 1e-2


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


def programs(batch: int, heads: int, tokens: int, length: int) -> int:
    tiles = -(-heads * tokens // decode_tiles(heads * tokens).queries)
    return batch * tiles * kv_splits(batch, heads, tokens, length, 132)


@pytest.mark.parametrize("heads", [16, 64, 128])
@pytest.mark.parametrize("tokens", range(1, 9))
@pytest.mark.parametrize("length", [10_000, 1 << 17, 1 << 18])
def test_one_sequence_keeps_nine_of_ten_sms_busy_from_10000_rows_up(heads: int, tokens: int, length: int) -> None:
    assert 0.9 * 132 <= programs(1, heads, tokens, length) <= 132


@pytest.mark.parametrize("tokens", [1, 3, 8])
@pytest.mark.parametrize("length", [1, 63, 4096, 1 << 18])
def test_splits_and_scratch_stay_bounded(tokens: int, length: int) -> None:
    for batch in range(1, 300):
        tiles = batch * tokens
        splits = kv_splits(batch, 64, tokens, length, 132)
        assert 1 <= splits <= max(1, -(-length // 32))
        assert splits == 1 or splits * tiles * 64 * 512 * 4 <= 35e6  # bytes of partial results, half of an H200's L2


@pytest.mark.parametrize("batch", range(1, 133))
def test_no_batch_leaves_more_than_a_third_of_the_sms_time_unused(batch: int) -> None:
    count = programs(batch, 64, 1, 1 << 18)
    assert count / (132 * -(-count // 132)) > 2 / 3


def test_short_sequences_are_split_less() -> None:
    assert kv_splits(1, 64, 1, 32, 132) == 1
    assert kv_splits(1, 64, 1, 1024, 132) == 16
    assert kv_splits(1, 64, 1, 4096, 132) == 64
