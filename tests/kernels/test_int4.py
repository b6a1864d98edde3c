"""The fast INT4 products are the reference, to the last bit of the weights."""

from __future__ import annotations

import pytest
import torch
from thinkloop.kernels.int4 import (
    dequantise_planes,
    dequantise_torch_int4,
    fits_torch_int4,
    is_written_out,
    to_planes,
    to_torch_int4,
    torch_int4_mm,
)
from thinkloop.kernels.reference import GROUP, dequantise_int4, pack_int4, unpack_int4

SHAPES = [(2, 32, 32), (5, 96, 64), (8, 128, 192), (3, 40, 96)]

panels = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() != "AVX512", reason="torch lays weights out in panels under AVX-512 only"
)


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


@pytest.mark.parametrize("tokens", [1, 2, 6, 42, 64, 123])
@pytest.mark.parametrize(("rows", "features"), [(32, 32), (96, 64), (128, 192), (192, 96)])
def test_torchs_bfloat16_product_is_the_references(tokens: int, rows: int, features: int) -> None:
    words, scale = packed(2, rows, features)
    x = torch.randn(tokens, features).bfloat16()
    y = torch_int4_mm(x, to_torch_int4(words, scale), 1)
    reference = x.float() @ dequantise_int4(words, scale, torch.float32)[1].T
    assert y.shape == (tokens, rows)
    assert float((y.float() - reference).abs().max() / reference.abs().max()) < 0.01


@pytest.mark.parametrize(("experts", "rows", "features"), [(1, 64, 32), (3, 192, 96), (2, 96, 64), (2, 32, 192)])
def test_repacked_weights_are_what_torchs_own_converter_makes(experts: int, rows: int, features: int) -> None:
    words, scale = packed(experts, rows, features)
    repacked = to_torch_int4(words, scale)
    for expert in range(experts):
        nibbles = unpack_int4(words[expert]).int() + 8
        assert torch.equal(repacked.weight[expert], torch.ops.aten._convert_weight_to_int4pack_for_cpu(nibbles, 1))
    assert torch.equal(repacked.scale[..., 0], scale.transpose(1, 2))
    assert not repacked.scale[..., 1].any()


@panels
@pytest.mark.parametrize(("rows", "features"), [(64, 32), (192, 96), (128, 416)])
def test_written_out_weights_are_the_references_to_the_bit(rows: int, features: int) -> None:
    words, scale = packed(2, rows, features)
    written = dequantise_torch_int4(to_torch_int4(words, scale), 1)  # [N/64, K, 64]
    assert torch.equal(written.transpose(1, 2).flatten(0, 1), dequantise_int4(words, scale, torch.bfloat16)[1])


@panels
def test_few_tokens_are_multiplied_packed_and_many_written_out() -> None:
    assert [tokens for tokens in (1, 8, 63, 64, 1000) if is_written_out(tokens, 2816)] == [64, 1000]
    assert not is_written_out(1000, 96)


def test_torchs_product_is_used_only_where_it_fits() -> None:
    cpu = torch.device("cpu")
    assert fits_torch_int4(128, 192, torch.bfloat16, cpu)
    assert not fits_torch_int4(128, 192, torch.float32, cpu)
    assert not fits_torch_int4(40, 192, torch.bfloat16, cpu)
    assert not fits_torch_int4(128, 192, torch.bfloat16, torch.device("cuda"))
