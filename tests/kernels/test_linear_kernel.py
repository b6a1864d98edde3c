"""A layer is its norm, its product in float32 and what follows, whatever the shape and what lies around its rows; of few rows
in one launch, of many in several."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from thinkloop.kernels.linear import FEW, LinearTiles, Norm, linear, linear_tiles
from thinkloop.kernels.reference import rms_norm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOKENS = [1, 2, 3, 8, 17]
FEWS = [1, FEW]
"""Rows that one launch takes."""


def poisoned(rows: int, columns: int, *, beside: int = 0) -> Tensor:
    """bfloat16 `[rows, columns]` with NaN behind the last row, and beside each one."""
    memory = torch.full((rows + 40, columns + beside), float("nan"), dtype=torch.bfloat16, device=DEVICE)
    memory[:rows, :columns] = torch.randn(rows, columns, device=DEVICE)
    return memory[:rows, :columns]


def zeros(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.zeros(*shape, dtype=dtype, device=DEVICE)


def twin(
    x: Tensor, weight: Tensor, *, norm: Norm | None = None, gated: bool = False, add: Tensor | None = None
) -> Tensor:
    if norm is not None:
        x = rms_norm(x, *norm)
    out = x.float() @ weight.float().T
    if gated:
        gate, up = out.chunk(2, dim=1)
        out = torch.nn.functional.silu(gate) * up
    if add is not None:
        out += add.float() if add.dim() == 2 else add.float().sum(1)
    return out


def error(out: Tensor, expected: Tensor) -> float:
    return float((out.float() - expected).norm() / expected.norm())


def allowed(tokens: int) -> float:
    return 1e-5 if tokens <= FEW else 5e-3  # of many rows the product is rounded before anything follows


@pytest.mark.parametrize(("tokens", "shape"), [*itertools.product(TOKENS, [(1, 8), (7, 40), (18, 2816), (32, 256)])])
def test_it_is_the_product(tokens: int, shape: tuple[int, int]) -> None:
    rows, features = shape
    x, weight = poisoned(tokens, features, beside=24), poisoned(rows, features)
    out = linear(x, weight, dtype=torch.float32)
    assert out.dtype == torch.float32
    assert error(out, twin(x, weight)) <= 1e-5
    assert error(linear(x, weight), twin(x, weight)) <= 5e-3


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize(("inner", "features"), [(1, 8), (12, 520)])
def test_gate_and_up_become_one(tokens: int, inner: int, features: int) -> None:
    x, weight = poisoned(tokens, features, beside=1), poisoned(2 * inner, features)
    out = linear(x, weight, gated=True, dtype=torch.float32)
    assert error(out, twin(x, weight, gated=True)) <= allowed(tokens)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("features", [8, 200, 2816])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("gated", [True, False])
def test_a_norm_comes_first(tokens: int, features: int, weighted: bool, gated: bool) -> None:
    x, weight = poisoned(tokens, features, beside=16), poisoned(10, features)
    norm = Norm(poisoned(1, features)[0] if weighted else None, 1e-5)
    out = linear(x, weight, norm=norm, gated=gated, dtype=torch.float32)
    # A row's factor may differ in its last bit, and with it a product's rounding to bfloat16.
    assert error(out, twin(x, weight, norm=norm, gated=gated)) <= 1e-2


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("settled", [False, True])
@pytest.mark.parametrize("parts", [None, 1, 6])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_partial_results_are_added(tokens: int, parts: int | None, dtype: torch.dtype, settled: bool) -> None:
    x, weight = poisoned(tokens, 40), poisoned(9, 40)
    add = torch.randn((tokens, 9) if parts is None else (tokens, parts, 9), device=DEVICE).to(dtype)
    residual = None if parts == 1 else poisoned(tokens, 9)
    out = linear(x, weight, add=add, residual=residual, dtype=torch.float32, settled=settled)
    expected = twin(x, weight, add=add)
    assert error(out, expected if residual is None else expected + residual.float()) <= allowed(tokens)


@pytest.mark.parametrize("tokens", FEWS)
@pytest.mark.parametrize("follows", ["nothing", "gate", "add", "residual"])
def test_a_result_of_few_rows_is_rounded_once(tokens: int, follows: str) -> None:
    x, weight = poisoned(tokens, 72), poisoned(20, 72)
    more: dict[str, Any] = {
        "gate": {"gated": True},
        "add": {"add": torch.randn(tokens, 3, 20, device=DEVICE)},
        "residual": {"residual": torch.randn(tokens, 20, device=DEVICE)},
    }
    options = more.get(follows, {})
    out = linear(x, weight, **options)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, linear(x, weight, dtype=torch.float32, **options).bfloat16())


@pytest.mark.parametrize("tokens", TOKENS)
def test_parts_are_summed_in_their_order(tokens: int) -> None:
    parts = torch.tensor([2.0**24, 1.0, -(2.0**24), 1.0], device=DEVICE)  # another order gives 0 or 2
    add = parts[None, :, None].expand(tokens, 4, 9).contiguous()
    out = linear(poisoned(tokens, 16), zeros(9, 16), add=add)
    assert out.unique().tolist() == [1.0]


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("tiles", [LinearTiles(4, 64, 1), LinearTiles(1, 256), LinearTiles(8, 128, 2)], ids=str)
def test_other_tiles_give_the_same(tiles: LinearTiles, gated: bool) -> None:
    x, weight = poisoned(3, 200), poisoned(22, 200)
    out = linear(x, weight, gated=gated, dtype=torch.float32, tiles=tiles)
    assert error(out, twin(x, weight, gated=gated)) <= 1e-5


def test_the_same_input_gives_the_same_bits_beside_any_other_row() -> None:
    x, weight = poisoned(2, 1032), poisoned(30, 1032)
    assert torch.equal(linear(x, weight), linear(x, weight))
    torch.testing.assert_close(linear(x[:1], weight), linear(x, weight)[:1], rtol=2**-7, atol=0)


def test_no_rows_give_none_and_a_broken_row_stays_alone() -> None:
    assert linear(zeros(0, 16), zeros(4, 16)).shape == (0, 4)
    x = poisoned(2, 64)
    x[1] = float("nan")
    out = linear(x, poisoned(5, 64), norm=Norm(None, 1e-5))
    assert out[0].isfinite().all()
    assert out[1].isnan().all()


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("x", {"x": zeros(2, 16, dtype=torch.float32)}),
        ("x", {"x": zeros(16)}),
        ("x", {"x": zeros(16, 2).T}),
        ("weight", {"weight": zeros(4, 24)}),
        ("weight", {"weight": zeros(4, 16, dtype=torch.float32)}),
        ("weight", {"weight": zeros(16, 4).T}),
        ("weight", {"weight": zeros(65)[1:].view(4, 16)}),
        ("weight", {"x": zeros(2, 12), "weight": zeros(4, 12)}),
        ("weight", {"weight": zeros(3, 16), "gated": True}),
        ("dtype", {"dtype": torch.float16}),
        ("add", {"add": zeros(2, 5)}),
        ("add", {"add": zeros(2, 0, 4)}),
        ("add", {"add": zeros(2, 4), "gated": True}),
        ("add", {"add": zeros(4, 2).T}),
        ("residual", {"residual": zeros(1, 4)}),
        ("residual", {"residual": zeros(2, 4, dtype=torch.float16)}),
        ("residual", {"residual": zeros(2, 4), "gated": True}),
    ],
)
def test_what_does_not_fit_is_named(name: str, change: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {"x": zeros(2, 16), "weight": zeros(4, 16)} | change
    with pytest.raises(ValueError, match=f"`{name}`"):
        linear(arguments.pop("x"), arguments.pop("weight"), **arguments)


@pytest.mark.parametrize(
    ("shape", "programs"), [((4096, 7168), 2048), ((12288, 1536), 1536), ((7168, 8192), 1792), ((2048, 2048), 512)]
)
def test_every_sm_has_programs_enough(shape: tuple[int, int], programs: int) -> None:
    tiles = linear_tiles(1, *shape, 132, norms=False, adds=False)
    assert shape[0] // tiles.rows == programs
    assert tiles.rows * tiles.features * 2 <= 16 << 10  # 128 bytes a thread
