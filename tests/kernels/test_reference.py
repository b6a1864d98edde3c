"""The reference functions mean what the papers and the file formats say."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from thinkloop.kernels.reference import (
    dequantise_fp8,
    dequantise_int4,
    mla_absorbed,
    mla_expanded,
    moe,
    moe_int4,
    pack_int4,
    quantise_int4,
    rms_norm,
    rope,
    rope_table,
    route,
    unpack_int4,
)


def compressed_tensors_packing() -> ModuleType:
    """The package's packing module alone: importing the package brings in dependencies that packing doesn't need."""
    package = importlib.util.find_spec("compressed_tensors")
    if package is None or package.origin is None:
        pytest.skip("compressed-tensors isn't installed")
    path = Path(package.origin).parent / "compressors" / "pack_quantized" / "helpers.py"
    spec = importlib.util.spec_from_file_location("compressed_tensors_packing", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_int4_packs_the_references_test_vector() -> None:
    packed = pack_int4(torch.tensor([[-8, -7, -1, 0, 1, 2, 6, 7]], dtype=torch.int8))
    assert packed.tolist() == [[-22444272]]
    assert list(packed.numpy().tobytes()) == [0x10, 0x87, 0xA9, 0xFE]
    assert unpack_int4(packed).tolist() == [[-8, -7, -1, 0, 1, 2, 6, 7]]


@pytest.mark.parametrize(("rows", "features"), [(1, 32), (7, 96), (33, 256)])
def test_int4_packing_is_compressed_tensors(rows: int, features: int) -> None:
    theirs = compressed_tensors_packing()
    values = torch.randint(-8, 8, (rows, features), dtype=torch.int8)
    packed = theirs.pack_to_int32(values, 4)
    assert torch.equal(pack_int4(values), packed)
    assert torch.equal(unpack_int4(packed), values)
    assert torch.equal(theirs.unpack_from_int32(pack_int4(values), 4, values.shape), values)


def test_packing_refuses_rows_that_fill_no_word() -> None:
    with pytest.raises(ValueError, match="multiple of 8"):
        pack_int4(torch.zeros(1, 12, dtype=torch.int8))


def test_quantising_what_was_dequantised_gives_the_same_bits() -> None:
    packed, scale = quantise_int4(torch.randn(40, 96))
    again, scale_again = quantise_int4(dequantise_int4(packed, scale, torch.float32))
    assert torch.equal(packed, again)
    assert torch.equal(scale, scale_again)


def test_quantisation_error_is_at_most_half_a_step() -> None:
    weight = torch.randn(40, 96)
    packed, scale = quantise_int4(weight)
    error = (dequantise_int4(packed, scale, torch.float32) - weight).abs().unflatten(-1, (-1, 32))
    assert (error <= scale.float()[..., None] * 0.55).all()  # .05 for the bfloat16 scale


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (128, 128), (256, 384), (200, 300), (576, 7)])
def test_fp8_is_written_out_as_compressed_tensors_does(rows: int, columns: int) -> None:
    package = pytest.importorskip("compressed_tensors.quantization")
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    blocks = package.QuantizationArgs(num_bits=8, type="float", strategy="block", block_structure=[128, 128])
    weight = torch.randn(rows, columns).to(torch.float8_e4m3fn)
    scale = torch.rand(-(-rows // 128), -(-columns // 128))
    theirs = dequantize(weight, scale, args=blocks, dtype=torch.float32)
    assert torch.equal(dequantise_fp8(weight, scale, torch.float32), theirs)


def test_fp8_is_rounded_once() -> None:
    weight, scale = torch.full((2, 3), 1.125).to(torch.float8_e4m3fn), torch.full((1, 1), 1.0039)
    assert dequantise_fp8(weight, scale, torch.bfloat16)[0, 0] == torch.tensor(1.125 * 1.0039).bfloat16()


def test_rope_turns_interleaved_pairs_and_keeps_relative_positions() -> None:
    table = rope_table(torch.tensor([1.0, 0.1]), 0, 64)
    x = torch.tensor([[1.0, 0.0, 0.0, 1.0]])
    turned = rope(x, table[3:4])[0]
    assert turned.tolist() == pytest.approx(
        [torch.tensor(3.0).cos().item(), torch.tensor(3.0).sin().item(), -torch.tensor(0.3).sin().item(),
         torch.tensor(0.3).cos().item()], abs=1e-6)  # fmt: skip
    q, k = torch.randn(1, 4), torch.randn(1, 4)
    near = rope(q, table[5:6]) @ rope(k, table[2:3]).T
    far = rope(q, table[50:51]) @ rope(k, table[47:48]).T
    assert near.item() == pytest.approx(far.item(), abs=1e-5)


def test_rms_norm_is_in_float32_whatever_comes_in() -> None:
    x = torch.full((1, 64), 300.0, dtype=torch.bfloat16)  # its square overflows float16 and loses bits in bfloat16
    assert rms_norm(x, torch.full((64,), 2.0, dtype=torch.bfloat16), 1e-6).tolist() == [[2.0] * 64]


@pytest.mark.parametrize(("new", "prefix"), [(1, 0), (1, 41), (5, 0), (17, 23)])
def test_absorbed_and_expanded_attention_are_the_same(new: int, prefix: int) -> None:
    heads, nope, turned, latent, value = 3, 10, 6, 14, 8
    q, cache = torch.randn(new, heads, nope + turned), torch.randn(prefix + new, latent + turned)
    w_uk, w_uv = torch.randn(heads, nope, latent), torch.randn(heads, latent, value)
    one, other = (f(q, cache, w_uk, w_uv, 0.2) for f in (mla_absorbed, mla_expanded))
    torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("attend", [mla_absorbed, mla_expanded])
def test_no_token_sees_the_future(attend: object) -> None:
    q, cache = torch.randn(4, 2, 12), torch.randn(9, 16)
    w_uk, w_uv = torch.randn(2, 8, 12), torch.randn(2, 12, 8)
    before = attend(q, cache, w_uk, w_uv, 0.3)  # type: ignore[operator]  # both have one signature
    cache[7:] = 50
    after = attend(q, cache, w_uk, w_uv, 0.3)  # type: ignore[operator]  # as above
    torch.testing.assert_close(before[:2], after[:2])
    assert not torch.allclose(before[2:], after[2:])


def test_the_bias_decides_who_is_chosen_but_not_the_weight() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    ids, weights = route(logits, torch.tensor([0.0, 0.0, 0.0, 5.0]), top_k=2, scale=2.827)
    assert sorted(ids[0].tolist()) == [0, 3]
    scores = logits.sigmoid()[0]
    share = dict(zip(ids[0].tolist(), weights[0].tolist(), strict=True))
    assert share[3] == pytest.approx(2.827 * float(scores[3] / (scores[0] + scores[3])), rel=1e-6)


def test_groups_are_chosen_by_their_two_best_and_the_others_masked() -> None:
    logits = torch.tensor([[9.0, -9.0, -9.0, 0.0, 0.0, 0.0, -9.0, -9.0, -9.0]])
    ids, _ = route(logits, torch.zeros(9), top_k=3, groups=3, top_groups=1)
    assert sorted(ids[0].tolist()) == [0, 1, 2] or sorted(ids[0].tolist()) == [3, 4, 5]
    scores = logits.sigmoid().view(3, 3).topk(2).values.sum(-1)
    assert ids[0, 0] // 3 == scores.argmax()


def test_under_softmax_a_group_counts_its_best_expert() -> None:
    logits = torch.tensor([[3.0, -9.0, -9.0, 2.5, 2.4, -9.0, -9.0, -9.0, -9.0]])  # by two best, the second group leads
    ids, weights = route(logits, None, top_k=2, groups=3, top_groups=1, scale=16.0, normalise=False, scoring="softmax")
    assert ids[0, 0] == 0
    assert ids[0, 1] in (1, 2)
    torch.testing.assert_close(weights, 16.0 * logits.softmax(-1).gather(1, ids))


def test_softmax_routing_without_groups_takes_the_likeliest() -> None:
    logits = torch.randn(7, 12)
    ids, weights = route(logits, None, top_k=3, normalise=False, scoring="softmax")
    best = logits.softmax(-1).topk(3)
    assert torch.equal(ids, best.indices)
    torch.testing.assert_close(weights, best.values)


def test_masked_groups_lose_even_against_negative_scores() -> None:
    logits = torch.tensor([[3.0, 3.0, -9.0, -9.0]])
    ids, _ = route(logits, torch.tensor([-5.0, -5.0, -9.0, -9.0]), top_k=2, groups=2, top_groups=1)
    assert sorted(ids[0].tolist()) == [0, 1]


def test_packed_experts_mean_their_dequantised_form() -> None:
    gate_up, down = quantise_int4(torch.randn(4, 64, 32)), quantise_int4(torch.randn(4, 32, 32))
    x, ids = torch.randn(5, 32), torch.randint(0, 4, (5, 2))
    shares = torch.rand(5, 2)
    whole = moe(x, ids, shares, *(dequantise_int4(*m, torch.float32) for m in (gate_up, down)))
    assert torch.equal(moe_int4(x, ids, shares, gate_up, down), whole)
