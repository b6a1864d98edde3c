"""Prefill attention, written out by pieces or absorbed, is the reference's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from thinkloop.kernels.mla_decode import PAGE
from thinkloop.kernels.mla_prefill import attend, merge, mla_append, mla_prefill, prefill_tiles
from thinkloop.kernels.reference import mla_expanded
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HEADS, LATENT, NOPE, ROPE, VALUE, SCALE = 3, 64, 32, 16, 32, 0.12


def made(tokens: int, total: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, rows and the two projections, bfloat16."""
    generator = torch.Generator().manual_seed(tokens)
    q = torch.randn(tokens, HEADS, NOPE + ROPE, generator=generator)
    rows = torch.randn(total, LATENT + ROPE, generator=generator)
    w_uk = torch.randn(HEADS, NOPE, LATENT, generator=generator) * LATENT**-0.5
    w_uv = torch.randn(HEADS, LATENT, VALUE, generator=generator) * LATENT**-0.5
    return q.bfloat16(), rows.bfloat16(), w_uk.bfloat16(), w_uv.bfloat16()


def error(got: Tensor, want: Tensor) -> float:
    assert got.shape == want.shape
    return float((got.float().cpu() - want).norm() / want.norm())


@pytest.mark.parametrize(("tokens", "total", "chunk"), [(1, 1, 64), (70, 70, 4096), (130, 200, 64), (5, 150, 100)])
def test_written_out_by_pieces_it_is_the_references_attention(tokens: int, total: int, chunk: int) -> None:
    q, rows, w_uk, w_uv = made(tokens, total)
    want = mla_expanded(q.float(), rows.float(), w_uk.float(), w_uv.float(), SCALE)
    got = mla_prefill(q.to(DEVICE), rows.to(DEVICE), w_uk.to(DEVICE), w_uv.to(DEVICE), SCALE, chunk=chunk)
    assert error(got, want) < 1e-2


@pytest.mark.parametrize(("tokens", "total"), [(1, 1), (8, 70), (9, 9), (13, 100), (21, 21)])
def test_absorbed_it_is_the_same(tokens: int, total: int) -> None:
    q, rows, w_uk, w_uv = made(tokens, total)
    pages = -(-total // PAGE)
    cache = torch.full(((pages + 1) * PAGE, LATENT + ROPE), float("nan"), dtype=torch.bfloat16)
    table = torch.arange(pages, 0, -1, dtype=torch.int32)
    for index, row in enumerate(rows):
        cache[int(table[index // PAGE]) * PAGE + index % PAGE] = row
    want = mla_expanded(q.float(), rows.float(), w_uk.float(), w_uv.float(), SCALE)
    got = mla_append(q.to(DEVICE), cache.to(DEVICE), table.to(DEVICE), total, w_uk.to(DEVICE), w_uv.to(DEVICE), SCALE)
    assert error(got, want) < 1e-2


def test_queries_that_see_nothing_get_zeros_and_leave_a_merge_as_it_was() -> None:
    q, rows, w_uk, w_uv = (one.to(DEVICE) for one in made(4, 10))
    nope, value = torch.matmul(rows[:, :LATENT], w_uk.transpose(1, 2)), torch.matmul(rows[:, :LATENT], w_uv)
    nothing = attend(q, nope, rows[:, LATENT:], value, SCALE, causal_offset=-4)
    assert (nothing[0] == 0).all()
    assert (nothing[1] == -torch.inf).all()
    something = attend(q, nope, rows[:, LATENT:], value, SCALE, causal_offset=6)
    out, lse = merge(something, nothing)
    torch.testing.assert_close(out, something[0])
    torch.testing.assert_close(lse, something[1])
    assert merge(nothing, nothing)[0].isfinite().all()


def test_without_a_causal_offset_everything_is_seen() -> None:
    q, rows, w_uk, w_uv = (one.to(DEVICE) for one in made(4, 10))
    nope, value = torch.matmul(rows[:, :LATENT], w_uk.transpose(1, 2)), torch.matmul(rows[:, :LATENT], w_uv)
    everything = attend(q, nope, rows[:, LATENT:], value, SCALE)
    assert torch.equal(everything[0], attend(q, nope, rows[:, LATENT:], value, SCALE, causal_offset=9)[0])
    assert not torch.equal(everything[0], attend(q, nope, rows[:, LATENT:], value, SCALE, causal_offset=6)[0])


class FromHost(TorchDispatchMode):
    """Counts what makes the host wait for a device: values taken from it, and tensors made of Python's numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name() in ("aten::_local_scalar_dense", "aten::lift_fresh", "aten::nonzero"):
            self.found.append(func.name())
        return func(*args, **(kwargs or {}))


def test_nothing_makes_the_host_wait() -> None:
    q, rows, w_uk, w_uv = (one.to(DEVICE) for one in made(13, 50))
    table = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    cache = torch.zeros(PAGE, LATENT + ROPE, dtype=torch.bfloat16, device=DEVICE)
    with FromHost() as host:
        mla_append(q, cache, table, 50, w_uk, w_uv, SCALE)
        mla_prefill(q, rows, w_uk, w_uv, SCALE, chunk=32)
    assert host.found == []
    with FromHost() as host:
        torch.tensor([1, 2], device=DEVICE).sum().item()
    assert "aten::_local_scalar_dense" in host.found


def test_what_does_not_fit_is_named() -> None:
    q, rows, w_uk, w_uv = (one.to(DEVICE) for one in made(4, 10))
    nope, value = torch.matmul(rows[:, :LATENT], w_uk.transpose(1, 2)), torch.matmul(rows[:, :LATENT], w_uv)
    rope = rows[:, LATENT:]
    for arguments, name in (
        ((q.float(), nope, rope, value), "q"), ((q, nope[:, :3], rope, value), "nope"),
        ((q, nope, rope, value[..., :20]), "value"), ((q[..., :40].contiguous(), nope, rope, value), "q"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"`{name}` must be"):
            attend(*arguments, SCALE)
    with pytest.raises(ValueError, match="at least the new tokens"):
        mla_prefill(q, rows[:0], w_uk, w_uv, SCALE)


def test_short_pieces_take_smaller_tiles() -> None:
    assert prefill_tiles(8).queries < prefill_tiles(1024).queries
