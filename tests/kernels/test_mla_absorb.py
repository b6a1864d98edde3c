"""One launch gives the absorbed, rotated queries of the reference and the cache rows of `rope_and_store`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from thinkloop.kernels import reference
from thinkloop.kernels.mla_absorb import MAX_ROWS, absorb_and_store, absorb_tiles
from thinkloop.kernels.rope_cache import rope_and_store
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAN = float("nan")
SHAPES = [(1, 3, 128, 512, 64), (5, 3, 16, 32, 16), (17, 2, 128, 32, 64), (32, 1, 16, 128, 16), (2, 70, 16, 64, 64)]
"""Tokens, heads, nope, latent, rotated."""


@dataclass(frozen=True, slots=True)
class Case:
    """Arguments of a call; 50 positions, and a cache of 40 rows full of NaN."""

    q: Tensor
    row: Tensor
    kv_norm: Tensor | None
    table: Tensor
    positions: Tensor
    slots: Tensor
    cache: Tensor
    w_uk: Tensor

    def run(self) -> Tensor:
        return absorb_and_store(
            self.q, self.row, self.kv_norm, 1e-6, self.table, self.positions, self.slots, self.cache, self.w_uk
        )

    def only(self, tokens: slice) -> Case:
        own = {name: getattr(self, name)[tokens].clone() for name in ("q", "row", "positions", "slots")}
        return replace(self, **own, cache=torch.full_like(self.cache, NAN))


def make(tokens: int, heads: int, nope: int, latent: int, rotated: int) -> Case:
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).bfloat16().to(DEVICE)

    return Case(
        q=randn(tokens, heads, nope + rotated),
        row=randn(tokens, latent + rotated),
        kv_norm=randn(latent),
        table=reference.rope_table(reference.inv_freq(rotated, 50000.0).to(DEVICE), 0, 50, 1.1),
        positions=torch.randint(50, (tokens,), generator=generator).to(DEVICE),
        slots=torch.randperm(40, generator=generator)[:tokens].to(DEVICE),
        cache=torch.full((40, latent + rotated), NAN, dtype=torch.bfloat16, device=DEVICE),
        w_uk=randn(heads, nope, latent) / nope**0.5,
    )


def queries(case: Case) -> Tensor:
    """float32 `[T, H, C+R]`."""
    nope = case.w_uk.shape[1]
    latent = torch.einsum("thn,hnc->thc", case.q[..., :nope].float(), case.w_uk.float())
    return torch.cat([latent, reference.rope(case.q[..., nope:].float(), case.table[case.positions])], dim=-1)


def rows(case: Case) -> Tensor:
    """The cache as `rope_and_store` leaves it."""
    cache = torch.full_like(case.cache, NAN)
    q, row = case.q.clone(), case.row.clone()
    rope_and_store(q, row, case.kv_norm, 1e-6, case.table, case.positions, case.slots, cache)
    return cache


def assert_rounded(out: Tensor, twin: Tensor) -> None:
    """`out` is `twin`, summed in float32 and rounded to the nearest bfloat16."""
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), twin, rtol=2**-8 + 1e-4, atol=1e-5)


def assert_same(out: Tensor, twin: Tensor) -> None:
    torch.testing.assert_close(out, twin, rtol=0, atol=0, equal_nan=True)


def assert_rows(case: Case, twin: Case) -> None:
    """A GPU adds the norm's squares up in another order with other warps, so that a value may round to its neighbour."""
    torch.testing.assert_close(case.cache, rows(twin), rtol=2**-7 if DEVICE == "cuda" else 0, atol=0, equal_nan=True)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_queries_are_the_references_and_rows_those_of_rope_and_store(shape: tuple[int, ...]) -> None:
    case = make(*shape)
    before = case.q.clone()
    out = case.run()
    assert out.is_contiguous()
    assert_rounded(out, queries(case))
    assert_rows(case, case)
    assert torch.equal(case.q, before)


def test_query_and_row_may_be_slices_of_one_tensor() -> None:
    case = make(4, 3, 16, 32, 16)
    joined = torch.full((4, 8 + 96 + 48 + 5), NAN, dtype=torch.bfloat16, device=DEVICE)
    joined[:, 8:104], joined[:, 104:152] = case.q.flatten(1), case.row
    cache = torch.full((40, 60), NAN, dtype=torch.bfloat16, device=DEVICE)
    q, row = torch.unflatten(joined[:, 8:104], 1, (3, 32)), joined[:, 104:152]
    sliced = replace(case, q=q, row=row, cache=cache[:, 7:55])
    assert_rounded(sliced.run(), queries(case))
    assert_rows(sliced, case)
    assert cache[:, :7].isnan().all()
    assert cache[:, 55:].isnan().all()


def test_heads_may_lie_apart() -> None:
    case = make(4, 3, 16, 32, 16)
    wide = torch.full((3, 4, 40), NAN, dtype=torch.bfloat16, device=DEVICE)
    wide[..., 8:] = case.q.transpose(0, 1)
    assert_rounded(replace(case, q=wide.transpose(0, 1)[..., 8:]).run(), queries(case))


def test_padding_gives_zeros_writes_nothing_and_is_not_looked_up() -> None:
    case = make(5, 3, 16, 32, 16)
    kept = case.only(slice(None, None, 4))
    case.slots[1:4] = -1
    case.positions[1:4] = 2**40
    q, row = case.q.clone(), case.row.clone()
    q[1:4], row[1:4] = NAN, NAN
    out = replace(case, q=q, row=row).run()
    assert (out[1:4] == 0).all()
    assert_rounded(out[::4], queries(kept))
    assert_rows(case, kept)


def test_real_tables_32_bit_indices_and_no_norm_weight_do_as_well() -> None:
    case = replace(make(5, 3, 16, 32, 16), kv_norm=None)
    other = replace(
        case, table=torch.view_as_real(case.table), positions=case.positions.int(), slots=case.slots.int(),
        cache=torch.full_like(case.cache, NAN),
    )  # fmt: skip
    assert_same(other.run(), case.run())
    assert_rows(other, case)
    assert_rows(case, case)


def test_a_token_is_the_same_alone_and_among_others() -> None:
    case = make(MAX_ROWS, 2, 32, 64, 16)
    out = case.run()
    for tokens in (1, 2, 16):
        assert_same(case.only(slice(tokens)).run(), out[:tokens])


def test_no_tokens_change_nothing() -> None:
    case = make(5, 3, 16, 32, 16).only(slice(0))
    assert case.run().shape == (0, 3, 48)
    assert case.cache.isnan().all()


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("q", {"q": torch.zeros(5, 3, 8, dtype=torch.bfloat16)}),
        ("q", {"q": torch.zeros(5, 3, 40, dtype=torch.bfloat16), "w_uk": torch.zeros(3, 24, 32, dtype=torch.bfloat16)}),
        ("row", {"row": torch.zeros(5, 48)}),
        ("kv_norm", {"kv_norm": torch.zeros(31, dtype=torch.bfloat16)}),
        ("table", {"table": torch.zeros(50, 8)}),
        (
            "table",
            {"table": torch.zeros(50, 4, 2), "w_uk": torch.zeros(3, 24, 40, dtype=torch.bfloat16), "kv_norm": None},
        ),
        ("positions", {"positions": torch.zeros(5)}),
        ("slots", {"slots": torch.zeros(4, dtype=torch.int64)}),
        ("cache", {"cache": torch.zeros(40, 49, dtype=torch.bfloat16)}),
        ("w_uk", {"w_uk": torch.zeros(3, 32, 32, dtype=torch.bfloat16)}),
        ("w_uk", {"w_uk": torch.zeros(3, 16, 32)}),
        ("w_uk", {"w_uk": torch.zeros(3, 32, 16, dtype=torch.bfloat16).transpose(1, 2)}),
        ("w_uk", {"w_uk": torch.zeros(3 * 16 * 32 + 1, dtype=torch.bfloat16, device=DEVICE)[1:].view(3, 16, 32)}),
    ],
)
def test_what_does_not_fit_is_named(name: str, change: dict[str, Any]) -> None:
    for key, value in change.items():
        change[key] = value if value is None else value.to(DEVICE)
    with pytest.raises(ValueError, match=f"`{name}` must"):
        replace(make(5, 3, 16, 32, 16), **change).run()


def test_more_tokens_than_a_program_has_and_other_floats_are_refused() -> None:
    with pytest.raises(ValueError, match=r"`q` must be bfloat16 with at most 32 tokens"):
        make(MAX_ROWS + 1, 1, 16, 16, 16).run()
    case = make(5, 3, 16, 32, 16)
    floats: dict[str, Any] = {name: getattr(case, name).float() for name in ("q", "row", "kv_norm", "cache", "w_uk")}
    with pytest.raises(ValueError, match=r"`q` must be bfloat16"):
        replace(case, **floats).run()


def test_a_row_of_no_power_of_two_is_refused() -> None:
    case = make(5, 3, 16, 32, 16)
    assert case.kv_norm is not None
    change = {
        "row": case.row[:, :40], "kv_norm": case.kv_norm[:24], "cache": case.cache[:, :40], "w_uk": case.w_uk[..., :24],
    }  # fmt: skip
    with pytest.raises(ValueError, match="`row` must give"):
        replace(case, **{name: value.contiguous() for name, value in change.items()}).run()


@pytest.mark.parametrize("tokens", [1, 16, 17, 32])
@pytest.mark.parametrize("heads", [1, 3, 8, 16, 64, 128])
@pytest.mark.parametrize("latent", [16, 32, 512])
@pytest.mark.parametrize("rotated", [16, 64])
def test_the_programs_cover_everything_once(tokens: int, heads: int, latent: int, rotated: int) -> None:
    tiles = absorb_tiles(tokens, heads, latent, rotated, 132)
    assert latent % tiles.columns == 0
    assert 16 <= tiles.tokens >= tokens
    assert heads <= tiles.heads * (tiles.parts - 1) < heads + tiles.heads
    assert 256 <= tiles.columns * tiles.tokens <= 64 * 32 * tiles.num_warps  # at most 64 sums a thread, in registers


@pytest.mark.parametrize(("heads", "programs"), [(8, 128), (16, 128), (64, 256), (128, 512)])
def test_every_sm_has_its_share_of_the_weights(heads: int, programs: int) -> None:
    columns = absorb_tiles(1, heads, 512, 64, 132).columns
    assert heads * 512 // columns == programs
    assert -(-programs // 132) * columns == min(-(-heads * 512 // (c * 132)) * c for c in (16, 32, 64, 128))
