"""The norm is the reference's norm, and its residual is the sum."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from thinkloop.kernels import reference
from thinkloop.kernels.rms_norm import MAX_WIDTH, norm_tiles, rms_norm
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def error(out: Tensor, twin: Tensor) -> float:
    return float((out.float() - twin.float()).norm() / twin.float().norm())


def allowed(dtype: torch.dtype) -> float:
    return 1e-6 if dtype == torch.float32 else 1e-2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 6, 42, 123, 431, 2048, 7168])
@pytest.mark.parametrize("weighted", [True, False])
def test_the_norm_is_the_references(dtype: torch.dtype, width: int, weighted: bool) -> None:
    x = torch.randn(3, width, device=DEVICE).to(dtype)
    weight = torch.randn(width, device=DEVICE).to(dtype) if weighted else None
    out = rms_norm(x, weight, 1e-5)
    twin = reference.rms_norm(x.float(), None if weight is None else weight.float(), 1e-5)
    assert out.dtype == dtype
    assert error(out, twin) <= allowed(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [42, 431])
def test_the_residual_is_added_in_place_and_its_rounded_sum_is_normed(dtype: torch.dtype, width: int) -> None:
    x, residual = (torch.randn(5, width, device=DEVICE).to(dtype) for _ in range(2))
    weight = torch.randn(width, device=DEVICE).to(dtype)
    total = residual + x
    out = rms_norm(x, weight, 1e-6, residual=residual)
    assert torch.equal(residual, total)
    assert error(out, reference.rms_norm(residual.float(), weight.float(), 1e-6)) <= allowed(dtype)


def test_rows_may_be_a_slice_and_what_lies_around_them_stays_out() -> None:
    wide, other = torch.full((2, 4, 100), float("nan"), device=DEVICE)
    wide[:, 7:50], other[:, 50:93] = torch.randn(2, 4, 43, device=DEVICE)
    weight = torch.full((64,), float("nan"), device=DEVICE)
    weight[:43] = torch.randn(43, device=DEVICE)
    x, residual = wide[:, 7:50], other[:, 50:93]
    total = residual + x
    out = rms_norm(x, weight[:43], 1e-6, residual=residual)
    torch.testing.assert_close(out, reference.rms_norm(total, weight[:43], 1e-6))
    assert torch.equal(residual, total)
    assert other[:, :50].isnan().all()
    assert other[:, 93:].isnan().all()


def test_it_is_in_float32_inside_and_a_broken_row_stays_alone() -> None:
    x = torch.full((3, 64), 300.0, dtype=torch.float16, device=DEVICE)  # its square overflows float16
    x[1] = float("nan")
    out = rms_norm(x, torch.full((64,), 2.0, dtype=torch.float16, device=DEVICE), 1e-6)
    assert out[0].tolist() == out[2].tolist() == [2.0] * 64
    assert out[1].isnan().all()


def test_a_row_of_zeros_stays_zero_and_no_rows_give_none() -> None:
    assert rms_norm(torch.zeros(1, 12, device=DEVICE), None, 1e-6).tolist() == [[0.0] * 12]
    assert rms_norm(torch.empty(0, 12, device=DEVICE), None, 1e-6).shape == (0, 12)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("x", {"x": torch.zeros(12)}),
        ("x", {"x": torch.zeros(12, 3).T}),
        ("x", {"x": torch.zeros(1, MAX_WIDTH + 1)}),
        ("weight", {"weight": torch.zeros(11)}),
        ("weight", {"weight": torch.zeros(12, dtype=torch.bfloat16)}),
        ("residual", {"residual": torch.zeros(2, 12)}),
        ("residual", {"residual": torch.zeros(1, 12).expand(3, 12)}),
    ],
)
def test_what_does_not_fit_is_named(name: str, change: dict[str, Any]) -> None:
    arguments = {"x": torch.zeros(3, 12), "weight": None, "eps": 1e-6} | change
    with pytest.raises(ValueError, match=f"`{name}`"):
        rms_norm(**arguments)  # type: ignore[arg-type]  # the point


@pytest.mark.parametrize("width", [1, 576, 1536, 2048, 7168, MAX_WIDTH])
def test_a_row_fits_its_threads(width: int) -> None:
    tiles = norm_tiles(width)
    assert tiles.block >= width
    assert tiles.block <= 64 * 32 * tiles.num_warps  # at most 64 values a thread, in registers
