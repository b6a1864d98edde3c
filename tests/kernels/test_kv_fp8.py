"""Packed cache rows: the kernels give what the twins give, bit for bit; attention reads them; and how far results move."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from thinkloop.kernels.kv_fp8 import Stage, compile_cases, gather_rows, store_rows
from thinkloop.kernels.kv_rows import GROUP, PAGE, pack_rows, row_bytes, unpack_rows
from thinkloop.kernels.mla_decode import compile_cases as decode_cases
from thinkloop.kernels.mla_decode import decode_tiles, mla_decode
from thinkloop.kernels.reference import mla_absorbed
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BF16 = torch.bfloat16
SCALE = 0.1


def random_rows(count: int, width: int, seed: int = 1) -> Tensor:
    """Rows as the norm leaves them, a few channels much larger."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, width, generator=generator)
    return (rows * torch.exp(torch.randn(width, generator=generator))).to(BF16)


def error(got: Tensor, want: Tensor) -> float:
    got, want = got.float().cpu(), want.float().cpu()
    return float((got - want).norm() / want.norm())


def stored(rows: Tensor, slots: list[int], size: int, latent: int, index: torch.dtype = torch.int64) -> Tensor:
    cache = torch.full((size, row_bytes(latent, rows.shape[1] - latent)), 0xFF, dtype=torch.uint8, device=DEVICE)
    store_rows(rows.to(DEVICE), torch.tensor(slots, dtype=index, device=DEVICE), cache, latent)
    return cache.cpu()


def test_a_row_of_k2_is_656_bytes_as_flashmla_has_it() -> None:
    assert row_bytes(512, 64) == 656
    rows = random_rows(3, 576)
    packed = pack_rows(rows, 512)
    assert packed.shape == (3, 656)
    scales = packed[:, 512:528].contiguous().view(torch.float32)
    assert torch.equal(scales, rows[:, :512].float().unflatten(1, (4, 128)).abs().amax(2) / 448)
    assert torch.equal(packed[:, 528:].contiguous().view(BF16), rows[:, 512:])
    codes = packed[:, :512].contiguous().view(torch.float8_e4m3fn).float()
    assert (codes.unflatten(1, (4, 128)).abs().amax(2) == 448).all()


@pytest.mark.parametrize("shape", [(1, 128, 16), (7, 384, 6), (2, 512, 64)])
def test_unpacked_latents_are_within_a_sixteenth_and_keys_exact(shape: tuple[int, int, int]) -> None:
    count, latent, rope = shape
    rows = random_rows(count, latent + rope)
    back = unpack_rows(pack_rows(rows, latent), latent)
    groups, again = (x[:, :latent].float().unflatten(1, (-1, GROUP)) for x in (rows, back))
    least = groups.abs().amax(2, keepdim=True) / 448 * 2.0**-10  # half a step of the smallest codes
    assert ((again - groups).abs() <= torch.maximum(groups.abs() * (1 / 16 + 1 / 256), least)).all()
    assert torch.equal(back[:, latent:], rows[:, latent:])
    assert torch.equal(
        pack_rows(back, latent)[:, latent + latent // 32 :], pack_rows(rows, latent)[:, latent + latent // 32 :]
    )


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize(("latent", "rope"), [(128, 16), (256, 64), (512, 64)])
def test_stored_rows_are_the_twins_to_the_last_bit(latent: int, rope: int, index: torch.dtype) -> None:
    rows, slots = random_rows(6, latent + rope), [4, 0, -1, 9, 1, 7]
    rows[2] = float("nan")  # padding holds anything
    rows[1, :128] = 0
    rows[3, :latent] *= torch.logspace(-40, 0, latent, base=2).to(BF16)  # down to codes of few bits, and none
    cache = stored(rows, slots, 10, latent, index)
    for row, slot in zip(rows, slots, strict=True):
        if slot >= 0:
            assert torch.equal(cache[slot], pack_rows(row, latent))
    assert (cache[[2, 3, 5, 6, 8]] == 0xFF).all()


def test_every_bfloat16_below_the_largest_is_rounded_as_torch_does() -> None:
    bits = torch.arange(0, 1 << 16, dtype=torch.int32).to(torch.int16).view(BF16)
    values = bits[bits.float().abs() <= 448]  # with 448 in each group the scale is 1
    groups = torch.nn.functional.pad(values, (0, -len(values) % 127)).unflatten(0, (-1, 127))
    rows = torch.cat([groups, torch.full((len(groups), 17), 448, dtype=BF16)], dim=1)
    cache = stored(rows, list(range(len(rows))), len(rows), 128)
    assert torch.equal(cache[:, :128], rows[:, :128].float().to(torch.float8_e4m3fn).view(torch.uint8))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, of what is tested
@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), float("-inf")])
def test_what_is_no_number_stays_none(wrong: float) -> None:
    rows = random_rows(2, 272)
    rows[1, 5] = wrong
    cache = stored(rows, [0, 1], 2, 256)
    assert torch.equal(cache, pack_rows(rows, 256))
    back = unpack_rows(cache, 256)
    assert not back[1, :128].isfinite().any()
    assert back[1, 128:].isfinite().all()
    assert back[0].isfinite().all()


def test_rows_of_a_wider_tensor_are_stored_too() -> None:
    wide = random_rows(3, 200)
    assert torch.equal(stored(wide[:, 10:154], [2, 0, 1], 3, 128)[[2, 0, 1]], pack_rows(wide[:, 10:154], 128))


def test_a_stage_takes_the_place_of_the_cache_and_leaves_padding_out() -> None:
    stage = Stage.of(torch.tensor([70, -1, 3], dtype=torch.int32, device=DEVICE), 144)
    assert stage.slots.tolist() == [0, -1, 2]
    assert stage.slots.dtype == torch.int32
    assert (stage.rows.shape, stage.rows.dtype) == ((3, 144), BF16)


def paged(lengths: list[int], latent: int, rope: int, pages: int = 4) -> tuple[Tensor, Tensor, list[Tensor]]:
    """A packed cache that is no number wherever no row lies, pages in any order, and each sequence's rows."""
    cache = torch.full((len(lengths) * pages * PAGE, row_bytes(latent, rope)), 0xFF, dtype=torch.uint8)
    table = torch.randperm(len(lengths) * pages, generator=torch.Generator().manual_seed(1)).view(-1, pages).int()
    rows = [random_rows(length, latent + rope, seed) for seed, length in enumerate(lengths)]
    for own, pages_of in zip(rows, table.tolist(), strict=True):
        for index, row in enumerate(pack_rows(own, latent)):
            cache[pages_of[index // PAGE] * PAGE + index % PAGE] = row
    return cache.to(DEVICE), table.to(DEVICE), rows


@pytest.mark.parametrize("length", [0, 1, 15, 64, 65, 200])
def test_gathered_rows_are_the_twins_to_the_last_bit(length: int) -> None:
    cache, table, (rows,) = paged([length], 128, 16)
    got = gather_rows(cache, table[0], length, 128)
    assert torch.equal(got.cpu(), unpack_rows(pack_rows(rows, 128), 128))


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize(
    ("tokens", "heads", "latent", "rope", "lengths"),
    [(1, 4, 128, 16, [130, 1]), (3, 5, 256, 32, [65, 200, 3]), (8, 3, 128, 64, [70])],
)
def test_attention_over_packed_rows_is_that_over_what_they_unpack_to(
    tokens: int, heads: int, latent: int, rope: int, lengths: list[int], splits: int | None
) -> None:
    cache, table, rows = paged(lengths, latent, rope)
    plain = torch.zeros(len(cache), latent + rope, dtype=BF16)
    for own, pages in zip(rows, table.tolist(), strict=True):
        for index, row in enumerate(unpack_rows(pack_rows(own, latent), latent)):
            plain[pages[index // PAGE] * PAGE + index % PAGE] = row
    q = torch.randn(len(lengths), tokens, heads, latent + rope, generator=torch.Generator().manual_seed(2)).to(BF16)
    ends = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    got = mla_decode(q.to(DEVICE), cache, table, ends, SCALE, splits=splits)
    assert error(got, mla_decode(q.to(DEVICE), plain.to(DEVICE), table, ends, SCALE, splits=splits)) < 3e-3


def test_a_sequence_without_rows_reads_nothing() -> None:
    cache, table, _ = paged([70, 0], 128, 16)
    table[1] = 1 << 30  # would be far outside
    q = torch.ones(2, 1, 4, 144, dtype=BF16, device=DEVICE)
    out = mla_decode(q, cache, table, torch.tensor([70, 0], dtype=torch.int32, device=DEVICE), SCALE)
    assert (out[1] == 0).all()
    assert out.isfinite().all()


@pytest.mark.parametrize("sharp", [1.0, 4.0])
def test_how_far_attention_moves(sharp: float) -> None:
    """Against the same rows unpacked: K2's shape, 1,024 rows, scores of deviation `sharp`."""
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(1024, 576, generator=generator).to(BF16)
    q = torch.randn(1, 64, 576, generator=generator)
    eye = torch.eye(512).expand(64, -1, -1)
    scale = sharp / 576**0.5
    want = mla_absorbed(q, rows.float(), eye, eye, scale)
    moved = error(mla_absorbed(q, unpack_rows(pack_rows(rows, 512), 512).float(), eye, eye, scale), want)
    print(f"\nfp8 rows, scores of deviation {sharp}: attention moves by {moved:.4f}")
    assert 1e-3 < moved < (0.04 if sharp == 1.0 else 0.12)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("rows", {"rows": torch.zeros(2, 144)}), ("rows", {"rows": torch.zeros(2, 128, dtype=BF16)}),
        ("slots", {"slots": torch.zeros(3, dtype=torch.int64)}), ("slots", {"slots": torch.zeros(2)}),
        ("cache", {"cache": torch.zeros(4, 164, dtype=torch.int8)}), ("cache", {"cache": torch.zeros(4, 163, dtype=torch.uint8)}),
        ("latent", {"latent": 64}), ("latent", {"latent": 96}),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(name: str, change: dict[str, Any]) -> None:
    arguments = {
        "rows": torch.zeros(2, 144, dtype=BF16), "slots": torch.zeros(2, dtype=torch.int64),
        "cache": torch.zeros(4, 164, dtype=torch.uint8), "latent": 128,
    } | change  # fmt: skip
    with pytest.raises(ValueError, match=f"`{name}` must be"):
        store_rows(**arguments)


def test_what_does_not_fit_is_named_for_reading() -> None:
    cache, table = torch.zeros(128, 164, dtype=torch.uint8), torch.zeros(2, dtype=torch.int32)
    wide = torch.zeros(128, 200, dtype=torch.uint8)
    for name, arguments in (
        ("table", (cache, table, 129, 128)), ("table", (cache, table.long(), 1, 128)), ("latent", (cache, table, 1, 64)),
        ("rope", (cache[:, :160], table, 1, 128)), ("cache", (wide[:, :164], table, 1, 128)),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"`{name}` must be"):
            gather_rows(*arguments)
    q, ends = torch.zeros(1, 1, 2, 144, dtype=BF16), torch.ones(1, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"`cache` must be contiguous uint8 \[slots, 164\]"):
        mla_decode(q, cache[:, :160].contiguous(), table[None], ends, SCALE)
    with pytest.raises(ValueError, match="`latent` must be a multiple of 128"):
        row_bytes(100, 64)
    with pytest.raises(ValueError, match="`rope` must be even"):
        row_bytes(128, 3)


def test_packed_tiles_are_for_chips_that_convert() -> None:
    assert decode_tiles(16, fp8=True).queries == 64
    assert list(compile_cases(80)) == []
    assert len(list(compile_cases(90))) == 2
    assert [sum("fp8" in case.name for case in decode_cases(capability)) for capability in (80, 90)] == [0, 8]
