"""The INT4 experts' kernels agree with their twin, whatever the path, the shape, and what lies in unused memory."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from thinkloop.kernels import reference
from torch import Tensor

pytest.importorskip("triton")

from thinkloop.kernels.int4_moe import (
    PackedExperts,
    compile_cases,
    decode_tiles,
    grouped_tiles,
    moe_int4,
    pack_experts,
    unpack_experts,
    uses_grouped,
)
from thinkloop.kernels.int4_moe_grouped import group_by_expert, max_blocks

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
K2 = {"experts": 384, "top_k": 8, "width": 7168, "inner": 2048}
MOONLIGHT = {"experts": 64, "top_k": 6, "width": 2048, "inner": 1408}


@pytest.fixture
def _poisoned() -> Iterator[None]:
    """`torch.empty` comes filled with NaN, or with the largest integer."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def _random_int4(*shape: int) -> tuple[Tensor, Tensor]:
    """Published-layout INT4 with every code, -8 too, and scales that differ."""
    *head, features = shape
    values = torch.randint(-8, 8, shape, dtype=torch.int8)
    return reference.pack_int4(values), (torch.rand(*head, features // 32) * 0.02 + 0.001).bfloat16()


def _error(out: Tensor, twin: Tensor) -> float:
    return float((out.float() - twin).norm() / twin.norm())


def _case(tokens: int, experts: int, top_k: int, width: int, inner: int) -> tuple[Tensor, ...]:
    gate_up, down = _random_int4(experts, 2 * inner, width), _random_int4(experts, width, inner)
    memory = torch.full((tokens + 9, width), float("nan"))  # what lies behind x must not matter
    memory[:tokens] = torch.randn(tokens, width)
    ids = torch.rand(tokens, experts).topk(top_k).indices
    return memory.bfloat16().to(DEVICE)[:tokens], ids, torch.rand(tokens, top_k), *gate_up, *down


def _run(x: Tensor, ids: Tensor, shares: Tensor, *weights: Tensor) -> Tensor:
    packed = [pack_experts(w.to(DEVICE), s.to(DEVICE)) for w, s in (weights[:2], weights[2:])]
    return moe_int4(x, ids.to(DEVICE), shares.to(DEVICE), *packed).cpu()


def _twin(x: Tensor, ids: Tensor, shares: Tensor, *weights: Tensor) -> Tensor:
    return reference.moe_int4(x.cpu().float(), ids, shares, weights[:2], weights[2:])


@pytest.mark.parametrize(("rows", "features"), [(8, 32), (24, 96), (16, 128), (40, 416)])
def test_packing_loses_nothing(rows: int, features: int) -> None:
    packed, scale = _random_int4(3, rows, features)
    experts = pack_experts(packed, scale)
    again, scale_again = unpack_experts(experts)
    assert torch.equal(again, packed)
    assert torch.equal(scale_again, scale)
    assert experts.weight.shape == (3, rows // 8, -(-features // 128) * 128)


def test_experts_packed_one_by_one_can_be_stacked() -> None:
    packed, scale = _random_int4(2, 16, 96)
    whole, parts = pack_experts(packed, scale), [pack_experts(packed[e : e + 1], scale[e : e + 1]) for e in range(2)]
    assert torch.equal(whole.weight, torch.cat([part.weight for part in parts]))
    assert torch.equal(whole.scale, torch.cat([part.scale for part in parts]))


def test_a_nibble_lies_where_the_layout_says() -> None:
    feature = 64 * 1 + 32 * 0 + 16 * 1 + 8 * 1 + 2 * 3 + 1  # ihi, jhi, ilo, jlo, c, pair
    values = torch.zeros(1, 16, 256, dtype=torch.int8)
    values[0, 8 + 5, 128 + feature] = 7
    experts = pack_experts(reference.pack_int4(values), torch.ones(1, 16, 8, dtype=torch.bfloat16))
    word = int(experts.weight[0, 1, 128 + 5 * 16 + 3 * 4 + 1 * 2 + 1]) & 0xFFFFFFFF
    assert word == 0x88888888 + (7 << 16 * 1 + 8 * 0 + 4 * 1)


@pytest.mark.usefixtures("_poisoned")
@pytest.mark.parametrize(
    ("tokens", "experts", "top_k", "width", "inner"),
    [
        (1, 8, 2, 256, 128),  # whole tiles
        (1, 16, 3, 160, 96),  # neither matrix a multiple of 128 features or 64 rows
        (2, 24, 3, 96, 352),  # two tokens, each pair on its own; inner = 11 · 32, as Moonlight's 1408 = 11 · 128
    ],
)
def test_decoding_agrees_with_the_twin(tokens: int, experts: int, top_k: int, width: int, inner: int) -> None:
    assert not uses_grouped(tokens, experts, top_k)
    case = _case(tokens, experts, top_k, width, inner)
    assert _error(_run(*case), _twin(*case)) <= 1e-2


@pytest.mark.usefixtures("_poisoned")
@pytest.mark.parametrize(
    ("tokens", "experts", "top_k", "width", "inner", "block"),
    [
        (3, 6, 2, 160, 64, 8),
        (13, 7, 3, 96, 160, 16),
        (31, 5, 2, 160, 32, 32),
        (67, 3, 1, 64, 96, 64),
        (65, 2, 2, 32, 32, 128),
    ],
)
def test_grouped_agrees_with_the_twin(
    tokens: int, experts: int, top_k: int, width: int, inner: int, block: int
) -> None:
    assert uses_grouped(tokens, experts, top_k)
    assert grouped_tiles(tokens, experts, top_k).tokens == block
    case = _case(tokens, experts, top_k, width, inner)
    assert _error(_run(*case), _twin(*case)) <= 1e-2


def test_every_token_may_choose_the_same_expert() -> None:
    x, _, shares, *weights = _case(20, 16, 1, 64, 32)
    ids = torch.full((20, 1), 11)
    assert _error(_run(x, ids, shares, *weights), _twin(x, ids, shares, *weights)) <= 1e-2


@pytest.mark.parametrize("tokens", [1, 5])
def test_the_same_input_gives_the_same_bits_for_either_type_of_ids(tokens: int) -> None:
    x, ids, shares, *weights = _case(tokens, 8, 2, 64, 32)
    assert torch.equal(_run(x, ids, shares, *weights), _run(x, ids.int(), shares, *weights))


def test_no_tokens_give_no_rows() -> None:
    x, ids, shares, *weights = _case(1, 4, 2, 64, 32)
    assert _run(x[:0], ids[:0], shares[:0], *weights).shape == (0, 64)


def test_what_does_not_fit_is_named() -> None:
    x, ids, shares, gate, gate_scale, down, down_scale = (part.to(DEVICE) for part in _case(2, 4, 2, 64, 32))
    gate_up, w_down = pack_experts(gate, gate_scale), pack_experts(down, down_scale)
    for name, arguments in {
        "x": (x.float(), ids, shares, gate_up, w_down),
        "ids": (x, ids[:1], shares, gate_up, w_down),
        "shares": (x, ids, shares.double(), gate_up, w_down),
        "gate_up": (x, ids, shares, w_down, w_down),
        "down": (x, ids, shares, gate_up, gate_up),
    }.items():
        with pytest.raises(ValueError, match=f"^{name} must"):
            moe_int4(*arguments)
    with pytest.raises(ValueError, match=r"^scale must"):
        pack_experts(gate, gate_scale[..., :1])
    with pytest.raises(ValueError, match=r"^packed must"):
        pack_experts(gate[:, :7], gate_scale[:, :7])


@pytest.mark.usefixtures("_poisoned")
@pytest.mark.parametrize(("tokens", "experts", "top_k", "block"), [(5, 9, 2, 8), (40, 6, 1, 16), (700, 4, 2, 8)])
def test_blocks_hold_every_pair_once_with_its_expert(tokens: int, experts: int, top_k: int, block: int) -> None:
    ids = torch.rand(tokens, experts).topk(top_k).indices
    ids[ids == 1] = 2  # an expert that nobody chose
    order, blocks = (part.cpu() for part in group_by_expert(ids.to(DEVICE), experts, block))
    assert torch.equal(order.long(), ids.flatten().argsort(stable=True))
    seen = []
    for expert, first, end in blocks.T.tolist():
        held = order[first : min(end, first + block)].tolist() if expert >= 0 else []
        assert all(ids.flatten()[pair] == expert for pair in held)
        seen += held
    assert sorted(seen) == list(range(tokens * top_k))


def test_the_bound_on_blocks_is_reached_and_never_passed() -> None:
    for pairs, experts, block in itertools.product(range(1, 12), range(1, 5), (1, 2, 3, 8)):
        splits = [s for s in itertools.product(range(pairs + 1), repeat=experts) if sum(s) == pairs]
        assert max(sum(-(-n // block) for n in split) for split in splits) == max_blocks(pairs, experts, block)


@pytest.mark.parametrize("model", [K2, MOONLIGHT], ids=["K2", "Moonlight"])
def test_one_token_keeps_every_sm_busy(model: dict[str, int]) -> None:
    matrices = [(2 * model["inner"], model["width"]), (model["width"], model["inner"])]
    for (rows, features), sm_count in itertools.product(matrices, (132, 108)):
        tiles = decode_tiles(1, rows, features, model["top_k"], sm_count)
        programs = model["top_k"] * -(-rows // tiles.rows)
        assert programs >= sm_count
        assert programs / (sm_count * -(-programs // sm_count)) >= 0.75  # of whole rounds
        assert features % tiles.features == 0


def test_sorting_starts_when_shared_experts_are_common() -> None:
    assert [uses_grouped(tokens, 384, 8) for tokens in (1, 8, 12, 13, 4096)] == [False, False, False, True, True]
    assert [uses_grouped(tokens, 64, 6) for tokens in (1, 2, 3)] == [False, False, True]


def test_blocks_grow_with_the_tokens_of_an_expert() -> None:
    assert [grouped_tiles(tokens, 384, 8).tokens for tokens in (16, 64, 512, 1024, 4096)] == [8, 8, 16, 32, 128]


def test_compile_cases_are_distinct_and_cover_both_paths() -> None:
    cases = list(compile_cases())
    assert len({case.name for case in cases}) == len(cases)
    assert {case.decode for case in cases} == {True, False}
    for case in cases:
        assert set(case.constexprs) == {name for name, kind in case.signature.items() if kind == "constexpr"}
        assert list(case.signature) == case.kernel.arg_names


def test_packed_experts_say_how_many_they_are() -> None:
    assert PackedExperts(torch.empty(5, 1, 128), torch.empty(5, 1, 32), 8, 128).experts == 5
