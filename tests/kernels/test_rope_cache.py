"""One launch leaves the query and the cache as the reference's norm and rotation do."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from thinkloop.kernels import reference
from thinkloop.kernels.rope_cache import rope_and_store, rope_tiles
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


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

    def run(self) -> None:
        rope_and_store(self.q, self.row, self.kv_norm, 1e-6, self.table, self.positions, self.slots, self.cache)


def make(heads: int, nope: int, rotated: int, latent: int, dtype: torch.dtype = torch.float32) -> Case:
    torch.manual_seed(0)
    wide = torch.randn(5, 3 + latent + rotated, device=DEVICE).to(dtype)
    return Case(
        q=torch.randn(5, heads, nope + rotated, device=DEVICE).to(dtype),
        row=wide[:, 3:],
        kv_norm=torch.randn(latent, device=DEVICE).to(dtype),
        table=reference.rope_table(reference.inv_freq(rotated, 50000.0).to(DEVICE), 0, 50, 1.1),
        positions=torch.tensor([7, 0, 49, 8, 9], device=DEVICE),
        slots=torch.tensor([3, 39, 0, 12, 13], device=DEVICE),
        cache=torch.full((40, latent + rotated), float("nan"), dtype=dtype, device=DEVICE),
    )


def expected(case: Case) -> tuple[Tensor, Tensor]:
    """The rotated query `[T, H, N+R]` and the rows `[T, C+R]`, in float32."""
    turn, rotated = case.table[case.positions], 2 * case.table.shape[1]
    q, row = case.q.float(), case.row.float()
    norm = None if case.kv_norm is None else case.kv_norm.float()
    latent = reference.rms_norm(row[:, :-rotated], norm, 1e-6)
    whole_q = torch.cat([q[..., :-rotated], reference.rope(q[..., -rotated:], turn)], dim=-1)
    return whole_q, torch.cat([latent, reference.rope(row[:, -rotated:], turn)], dim=-1)


def error(out: Tensor, twin: Tensor) -> float:
    return float((out.float() - twin).norm() / twin.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("heads", "nope", "rotated", "latent"), [(64, 128, 64, 512), (3, 10, 6, 14), (17, 1, 2, 5), (1, 0, 64, 576)]
)
def test_query_and_cache_are_the_references(heads: int, nope: int, rotated: int, latent: int, dtype: Any) -> None:
    case = make(heads, nope, rotated, latent, dtype)
    q, rows = expected(case)
    before = case.q.clone()
    case.run()
    limit = 1e-6 if dtype == torch.float32 else 1e-2
    assert error(case.q, q) <= limit
    assert torch.equal(case.q[..., :nope], before[..., :nope])
    assert error(case.cache[case.slots], rows) <= limit


def test_only_the_slots_are_written() -> None:
    case = make(3, 10, 6, 14)
    case.run()
    written = ~case.cache.isnan().any(dim=1)
    assert written.nonzero()[:, 0].tolist() == [0, 3, 12, 13, 39]
    assert case.cache[~written].isnan().all()


def test_padding_changes_nothing_and_is_not_read() -> None:
    case = make(3, 10, 6, 14)
    case.slots[1:4] = -1
    case.positions[1:4] = 2**40
    case.q[1:4], case.row[1:4] = float("nan"), float("nan")
    kept = replace(case, positions=case.positions[::4], q=case.q[::4].clone(), row=case.row[::4])
    q, rows = expected(kept)
    case.run()
    torch.testing.assert_close(case.q[::4], q)
    assert case.q[1:4].isnan().all()
    torch.testing.assert_close(case.cache[[3, 13]], rows)
    assert (~case.cache.isnan()).any(dim=1).nonzero()[:, 0].tolist() == [3, 13]


def test_what_lies_between_the_rows_stays_as_it_is() -> None:
    case = make(3, 10, 6, 14)
    wide = torch.full((5, 4, 20), float("nan"), device=DEVICE)
    q = wide[:, :3, 2:18]
    q.copy_(case.q)
    sliced = replace(case, q=q, cache=torch.full((40, 31), float("nan"), device=DEVICE)[:, 7:27])
    whole_q, rows = expected(case)
    sliced.run()
    torch.testing.assert_close(q, whole_q)
    torch.testing.assert_close(sliced.cache[case.slots], rows)
    assert wide[:, 3].isnan().all()
    assert wide[..., :2].isnan().all()
    assert wide[..., 18:].isnan().all()


def test_real_tables_32_bit_indices_and_no_norm_weight_do_as_well() -> None:
    case = make(3, 10, 6, 14)
    q, rows = expected(replace(case, kv_norm=None))
    replace(
        case, kv_norm=None, table=torch.view_as_real(case.table), positions=case.positions.int(), slots=case.slots.int()
    ).run()
    torch.testing.assert_close(case.q, q)
    torch.testing.assert_close(case.cache[case.slots], rows)


def test_no_tokens_change_nothing() -> None:
    case = make(3, 10, 6, 14)
    replace(case, q=case.q[:0], row=case.row[:0], positions=case.positions[:0], slots=case.slots[:0]).run()
    assert case.cache.isnan().all()


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("q", {"q": torch.zeros(5, 3, 4)}),
        ("q", {"q": torch.zeros(5, 16, 3).transpose(1, 2)}),
        ("row", {"row": torch.zeros(4, 20)}),
        ("row", {"row": torch.zeros(5, 6)}),
        ("row", {"row": torch.zeros(5, 20, dtype=torch.bfloat16)}),
        ("kv_norm", {"kv_norm": torch.zeros(13)}),
        ("table", {"table": torch.zeros(50, 3)}),
        ("positions", {"positions": torch.zeros(5)}),
        ("slots", {"slots": torch.zeros(4, dtype=torch.int64)}),
        ("cache", {"cache": torch.zeros(40, 21)}),
    ],
)
def test_what_does_not_fit_is_named(name: str, change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"`{name}`"):
        replace(make(3, 10, 6, 14), **change).run()


@pytest.mark.parametrize(("heads", "rotated"), [(64, 64), (16, 64), (1, 64), (128, 64), (3, 6)])
def test_the_programs_cover_all_heads_and_the_row(heads: int, rotated: int) -> None:
    tiles = rope_tiles(heads, 512, rotated)
    assert (tiles.programs - 1) * tiles.heads >= heads
    assert tiles.rotated >= rotated
