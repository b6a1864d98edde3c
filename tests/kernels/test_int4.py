"""The fast INT4 products are the reference, to the last bit of the weights."""

from __future__ import annotations

import pytest
import torch
from thinkloop.kernels.int4 import (
    PlanesProduct,
    dequantise_planes,
    fits_torch_int4,
    to_planes,
    to_torch_int4,
    torch_int4_mm,
)
from thinkloop.kernels.reference import GROUP, dequantise_int4, pack_int4

SHAPES = [(2, 32, 32), (5, 96, 64), (8, 128, 192), (3, 40, 96)]


def packed(experts: int, rows: int, features: int) -> tuple[torch.Tensor, torch.Tensor]:
    values = torch.randint(-8, 8, (experts, rows, features), dtype=torch.int8)
    return pack_int4(values), torch.rand(experts, rows, features // GROUP).bfloat16()


@pytest.mark.parametrize(("experts", "rows", "features"), SHAPES)
def test_planes_hold_every_weight_exactly(experts: int, rows: int, features: int) -> None:
    words, scale = packed(experts, rows, features)
    planes, whole = to_planes(words, scale), dequantise_int4(words, scale, torch.float32)
    assert planes.weight.nbytes == words.nbytes
    for expert in range(experts):
        assert torch.equal(dequantise_planes(planes, expert, torch.float32), whole[expert].T)


@pytest.mark.parametrize(("experts", "rows", "features"), SHAPES)
def test_the_product_of_one_token_is_the_references(experts: int, rows: int, features: int) -> None:
    words, scale = packed(experts, rows, features)
    planes, whole = to_planes(words, scale), dequantise_int4(words, scale, torch.float32)
    product = PlanesProduct(planes, 2)
    for ids in ([0, 1], [1, 0], [experts - 1, 0]):  # scratch of an earlier call must not show
        x = torch.randn(2, features)
        y = product(planes, torch.tensor(ids), x.view(-1, 1, GROUP))
        torch.testing.assert_close(y, torch.einsum("kf,krf->kr", x, whole[ids]), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("tokens", [1, 2, 6, 42, 123])
@pytest.mark.parametrize(("rows", "features"), [(32, 32), (96, 64), (128, 192)])
def test_torchs_bfloat16_product_is_the_references(tokens: int, rows: int, features: int) -> None:
    words, scale = packed(2, rows, features)
    x = torch.randn(tokens, features).bfloat16()
    y = torch_int4_mm(x, to_torch_int4(words, scale), 1)
    reference = x.float() @ dequantise_int4(words, scale, torch.float32)[1].T
    assert float((y.float() - reference).abs().max() / reference.abs().max()) < 0.01


def test_torchs_product_is_used_only_where_it_fits() -> None:
    cpu = torch.device("cpu")
    assert fits_torch_int4(128, 192, torch.bfloat16, cpu)
    assert not fits_torch_int4(128, 192, torch.float32, cpu)
    assert not fits_torch_int4(40, 192, torch.bfloat16, cpu)
    assert not fits_torch_int4(128, 192, torch.bfloat16, torch.device("cuda"))
