"""The gate is the norm, the product and the choice that it takes the place of."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from thinkloop.kernels import reference
from thinkloop.kernels.gate import MAX_TOKENS, gate, gate_pays, gate_tiles
from thinkloop.kernels.router import route
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-5

SHAPES: list[dict[str, Any]] = [
    {"tokens": 1, "experts": 384, "width": 72, "top_k": 8, "scale": 2.827},  # as many as Kimi-K2 has, 4 a program
    {"tokens": 1, "experts": 64, "width": 2048, "top_k": 6, "scale": 2.446},  # Moonlight
    {"experts": 6, "width": 40, "top_k": 2},
    {"tokens": 1, "experts": 133, "width": 431, "top_k": 5},  # 2 a program, and one is missing in the last
    {"experts": 24, "width": 40, "top_k": 4, "groups": 4, "top_groups": 2, "scale": 2.5},
    {"experts": 64, "width": 99, "top_k": 6, "normalise": False, "scoring": "softmax"},
    {"experts": 40, "width": 33, "top_k": 6, "groups": 8, "top_groups": 3, "scoring": "softmax"},
    {"experts": 1, "width": 2, "top_k": 1, "scoring": "softmax"},
]


class Inputs(NamedTuple):
    x: Tensor
    norm: Tensor
    w_router: Tensor
    bias: Tensor


def inputs(tokens: int, experts: int, width: int, dtype: torch.dtype = torch.bfloat16) -> Inputs:
    torch.manual_seed(0)
    x = (3 * torch.randn(tokens, width, device=DEVICE)).bfloat16()
    norm = (1 + 0.2 * torch.randn(width, device=DEVICE)).bfloat16()
    w_router = (torch.randn(experts, width, device=DEVICE) / width**0.5).to(dtype)
    return Inputs(x, norm, w_router, 0.3 * torch.randn(experts, device=DEVICE))


def zeros(tokens: int) -> Tensor:
    return torch.zeros(tokens, dtype=torch.int32, device=DEVICE)


def run(given: Inputs, counters: Tensor | None = None, **choice: Any) -> tuple[Tensor, Tensor, Tensor]:
    counters = zeros(len(given.x)) if counters is None else counters
    return gate(given.x, given.norm, EPS, given.w_router, given.bias, counters, **choice)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape['experts']}x{shape['width']}/{shape['top_k']}")
@pytest.mark.parametrize(("dtype", "biased"), [(torch.bfloat16, True), (torch.float32, False)], ids=str)
@pytest.mark.filterwarnings("ignore:invalid value")  # numpy on -inf less -inf, where there is no token
def test_it_is_the_norm_the_product_and_the_choice(shape: dict[str, Any], dtype: torch.dtype, biased: bool) -> None:
    choice = dict(shape)
    tokens = choice.pop("tokens", 3)
    given = inputs(tokens, choice.pop("experts"), choice.pop("width"), dtype)
    bias = given.bias if biased else None
    counters, logits = zeros(5), torch.full((tokens, len(given.w_router)), float("nan"), device=DEVICE)
    h, ids, shares = gate(given.x, given.norm, EPS, given.w_router, bias, counters, logits=logits, **choice)

    twin = reference.rms_norm(given.x, given.norm, EPS)
    torch.testing.assert_close(h, twin, rtol=2**-7, atol=0)  # a sum in another order may round to the neighbour
    assert (h != twin).float().mean() <= 0.01
    product = h.double() @ given.w_router.double().T
    assert float((logits - product).norm() / product.norm()) <= 1e-6

    expected_ids, expected_shares = route(logits, bias, **choice)
    assert torch.equal(ids, expected_ids)
    exact = choice.get("scoring") != "softmax"  # its sum over experts, on a GPU, may be in another order
    torch.testing.assert_close(shares, expected_shares, rtol=0 if exact else 1e-6, atol=0)
    assert ids.dtype == torch.int32
    assert not counters.any()


def test_a_token_is_alone_and_every_launch_is_the_same() -> None:
    given, counters = inputs(3, 12, 96), zeros(3)
    first = run(given, counters, top_k=6)
    for _ in range(100 if DEVICE == "cuda" else 1):
        again = run(given, counters, top_k=6)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not counters.any()
    alone = [run(given._replace(x=given.x[token : token + 1]), top_k=6) for token in range(3)]
    for whole, parts in zip(first, zip(*alone, strict=True), strict=True):
        assert torch.equal(whole, torch.cat(parts))


def test_of_equal_experts_the_lower_index_comes_first() -> None:
    given = inputs(1, 150, 40)
    bias = torch.randint(0, 2, (150,), device=DEVICE).float()
    _, ids, _ = run(given._replace(w_router=given.w_router[:1].repeat(150, 1), bias=bias), top_k=12)
    best = bias.sort(descending=True, stable=True).indices[:12]
    assert ids.tolist() == [best.tolist()]


@pytest.mark.filterwarnings("ignore:invalid value")  # numpy on NaN, under the interpreter
def test_a_broken_row_stays_alone() -> None:
    given, counters = inputs(3, 12, 64), zeros(3)
    whole = run(given, top_k=6)
    given.x[1, 7] = float("nan")
    h, ids, shares = run(given, counters, top_k=6)
    assert h[1].isnan().all()
    assert shares[1].isnan().all()
    assert len(set(ids[1].tolist())) == 6
    assert 0 <= int(ids.min()) <= int(ids.max()) < 12
    for now, before in zip((h, ids, shares), whole, strict=True):
        assert torch.equal(now[::2], before[::2])
    assert not counters.any()


def test_nan_around_everything_reaches_nothing_and_nothing_is_written_there() -> None:
    given = inputs(2, 21, 43)
    logits = torch.full((4, 32), float("nan"), device=DEVICE)
    inside = logits[1:3, 4:25]
    clean = run(given, top_k=5)
    around = Inputs(*(torch.cat([part[:1] * float("nan"), part, part[:1] * float("nan")])[1:-1] for part in given))
    counters = zeros(4)
    dirty = gate(around.x, around.norm, EPS, around.w_router, around.bias, counters[1:3], top_k=5, logits=inside)
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))
    assert inside.isfinite().all()
    assert int(logits.isnan().sum()) == logits.numel() - inside.numel()
    assert not counters.any()


def test_no_tokens_give_no_choice() -> None:
    h, ids, shares = run(inputs(0, 12, 40), top_k=5)
    assert h.shape == (0, 40)
    assert ids.shape == shares.shape == (0, 5)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("x", {"x": torch.zeros(2, 40)}),
        ("x", {"x": torch.zeros(40, 2).bfloat16().T}),
        ("x", {"x": torch.zeros(MAX_TOKENS + 1, 40).bfloat16()}),
        ("x", {"x": torch.zeros(2, 0).bfloat16()}),
        ("norm", {"norm": torch.zeros(39).bfloat16()}),
        ("norm", {"norm": torch.zeros(40)}),
        ("w_router", {"w_router": torch.zeros(40, 12).T}),
        ("w_router", {"w_router": torch.zeros(12, 41)}),
        ("w_router", {"w_router": torch.zeros(12, 40).half()}),
        ("counters", {"counters": torch.zeros(1, dtype=torch.int32)}),
        ("counters", {"counters": torch.zeros(2)}),
        ("bias", {"bias": torch.zeros(11)}),
        ("logits", {"logits": torch.zeros(2, 11)}),
        ("logits", {"logits": torch.zeros(2, 12).bfloat16()}),
        ("top_k", {"top_k": 13}),
        ("top_groups", {"groups": 4, "top_groups": 5}),
        ("scoring", {"scoring": "tanh"}),
    ],
)
def test_what_does_not_fit_is_named(name: str, change: dict[str, Any]) -> None:
    arguments = {
        "x": torch.zeros(2, 40).bfloat16(), "norm": torch.zeros(40).bfloat16(), "eps": EPS,
        "w_router": torch.zeros(12, 40), "bias": None, "counters": torch.zeros(2, dtype=torch.int32), "top_k": 4,
    } | change  # fmt: skip
    with pytest.raises(ValueError, match=f"`{name}`"):
        gate(**arguments)  # type: ignore[arg-type]  # the point


@pytest.mark.parametrize(("experts", "width"), [(384, 7168), (64, 2048), (256, 7168), (6, 40), (512, 32768), (1, 2)])
def test_tiles_hold_all_that_there_is(experts: int, width: int) -> None:
    tiles = gate_tiles(experts, width, 1, 1, sm_count=132)
    programs = -(-experts // tiles.rows)
    assert width <= tiles.block
    assert width <= tiles.part * programs
    assert tiles.rows * tiles.block <= 128 * 32 * tiles.num_warps
    assert tiles.copies >= tiles.num_warps
    assert programs <= 132 or tiles.rows * tiles.block * 2 > 128 * 32 * tiles.num_warps


def test_it_pays_while_weights_are_not_read_too_often() -> None:
    def most(experts: int, width: int, dtype: torch.dtype) -> int:
        weight = torch.empty(experts, width, dtype=dtype)
        return sum(gate_pays(tokens, weight) for tokens in range(1, 100))

    assert most(384, 7168, torch.bfloat16) == most(384, 7168, torch.float32) == 1
    assert most(64, 2048, torch.bfloat16) == MAX_TOKENS
