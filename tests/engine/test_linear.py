"""Packed matrices multiply as plain ones do."""

from __future__ import annotations

import pytest
import torch
from thinkloop.engine.linear import can_pack, pack, project

CPU = torch.device("cpu")
packs = pytest.mark.skipif(not can_pack(torch.bfloat16, CPU), reason="this CPU's oneDNN doesn't compute in bfloat16")


@packs
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 42, 123])
@pytest.mark.parametrize(("features", "width"), [(64, 32), (48, 100), (192, 431)])
def test_a_packed_matrix_gives_the_plain_ones_product_for_any_number_of_rows(
    rows: int, features: int, width: int
) -> None:
    weight, x = torch.randn(features, width).bfloat16(), torch.randn(rows, features).bfloat16()
    ours, reference = project(x, pack(weight)).float(), x.float() @ weight.float()
    assert ours.shape == (rows, width)
    assert float((ours - reference).abs().max() / reference.abs().max()) < 0.01


@packs
def test_rows_may_be_part_of_a_wider_tensor() -> None:
    weight, wide = torch.randn(48, 64).bfloat16(), torch.randn(6, 100).bfloat16()
    packed = pack(weight)
    for rows in (1, 3, 6):
        x = wide[:rows, 20:68]
        assert torch.equal(project(x, packed), project(x.contiguous(), packed))


@packs
def test_packing_keeps_every_weight() -> None:
    weight = torch.randn(100, 37).bfloat16()
    assert torch.equal(pack(weight).to_dense(torch.bfloat16).T, weight)


def test_other_matrices_stay_plain() -> None:
    weight, x = torch.randn(5, 7), torch.randn(3, 5)
    assert torch.equal(project(x, weight), x @ weight)
    assert not can_pack(torch.float32, CPU)
    assert not can_pack(torch.bfloat16, torch.device("cuda"))
