"""The router chooses the experts that the reference chooses, in an order that is promised."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from thinkloop.kernels import reference
from thinkloop.kernels.router import route, router_tiles
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

SHAPES: list[dict[str, Any]] = [
    {"experts": 384, "top_k": 8, "scale": 2.827},  # Kimi-K2
    {"experts": 64, "top_k": 6, "scale": 2.446},  # Moonlight
    {"experts": 256, "top_k": 8, "groups": 8, "top_groups": 4, "scale": 2.5},  # DeepSeek-V3
    {"experts": 64, "top_k": 6, "normalise": False, "scoring": "softmax"},  # DeepSeek-V2-Lite
    {"experts": 160, "top_k": 6, "groups": 8, "top_groups": 3, "scale": 16.0, "normalise": False, "scoring": "softmax"},
    {"experts": 21, "top_k": 5, "groups": 3, "top_groups": 2},
    {"experts": 7, "top_k": 7},
    {"experts": 1, "top_k": 1, "scoring": "softmax"},
]


def stable_route(logits: Tensor, bias: Tensor, top_k: int) -> Tensor:
    """The ids under sigmoid scoring, the lower index first among equals."""
    return (logits.sigmoid() + bias).sort(dim=-1, descending=True, stable=True).indices[:, :top_k]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape['experts']}/{shape['top_k']}")
@pytest.mark.parametrize("biased", [True, False])
def test_it_chooses_what_the_reference_chooses(shape: dict[str, Any], biased: bool) -> None:
    torch.manual_seed(0)
    arguments = dict(shape)
    experts = arguments.pop("experts")
    logits = torch.randn(3, experts, device=DEVICE)
    bias = 0.3 * torch.randn(experts, device=DEVICE) if biased else None
    ids, shares = route(logits, bias, **arguments)
    expected_ids, expected_shares = reference.route(logits, bias, **arguments)
    assert ids.dtype == torch.int32
    assert torch.equal(ids.long(), expected_ids)
    torch.testing.assert_close(shares, expected_shares, rtol=1e-5, atol=0)


def test_of_equal_experts_the_lower_index_comes_first() -> None:
    torch.manual_seed(0)
    logits = torch.randint(-2, 3, (8, 40), device=DEVICE).float()
    bias = torch.randint(0, 2, (40,), device=DEVICE).float()
    ids, _ = route(logits, bias, top_k=12)
    assert torch.equal(ids.long(), stable_route(logits, bias, 12))


def test_of_equal_groups_the_first_is_kept() -> None:
    ids, _ = route(torch.zeros(1, 12, device=DEVICE), None, top_k=4, groups=4, top_groups=2)
    assert ids.tolist() == [[0, 1, 2, 3]]
    ids, _ = route(torch.zeros(1, 12, device=DEVICE), None, top_k=6, groups=4, top_groups=2)
    assert ids.tolist() == [[0, 1, 2, 3, 4, 5]]


def test_negative_choices_and_infinite_biases_are_ordered_too() -> None:
    bias = torch.tensor([-3.0, -2.0, float("-inf"), -5.0, float("inf")], device=DEVICE)
    ids, _ = route(torch.zeros(1, 5, device=DEVICE), bias, top_k=5)
    assert ids.tolist() == [[4, 1, 0, 3, 2]]


@pytest.mark.filterwarnings("ignore:invalid value")  # numpy on NaN, under the interpreter
@pytest.mark.parametrize("scoring", ["sigmoid", "softmax"])
@pytest.mark.parametrize("groups", [1, 4])
def test_nan_logits_give_nan_shares_and_ids_in_range(scoring: Any, groups: int) -> None:
    logits = torch.zeros(4, 12, device=DEVICE)
    logits[0] = float("nan")
    logits[1, 7] = float("nan")
    logits[2, 7] = -float("nan")
    ids, shares = route(logits, None, top_k=5, groups=groups, top_groups=2 if groups > 1 else 1, scoring=scoring)
    assert all(len(set(row)) == 5 and min(row) >= 0 and max(row) < 12 for row in ids.tolist())
    assert shares[:3].isnan().any(dim=1).all()
    assert not shares[3].isnan().any()


def test_nan_behind_the_rows_and_between_them_reaches_nothing() -> None:
    wide = torch.full((5, 64), float("nan"), device=DEVICE)
    wide[1:4, 16:37] = torch.randn(3, 21, device=DEVICE)
    logits = wide[1:4, 16:37]
    bias = torch.full((64,), float("nan"), device=DEVICE)
    bias[:21] = torch.randn(21, device=DEVICE)
    ids, shares = route(logits, bias[:21], top_k=5)
    expected_ids, expected_shares = reference.route(logits, bias[:21], top_k=5)
    assert torch.equal(ids.long(), expected_ids)
    torch.testing.assert_close(shares, expected_shares)


def test_no_tokens_give_no_choice() -> None:
    ids, shares = route(torch.empty(0, 12, device=DEVICE), None, top_k=5)
    assert ids.shape == shares.shape == (0, 5)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("top_k", {"top_k": 13}),
        ("top_k", {"top_k": 0}),
        ("top_k", {"groups": 4, "top_groups": 1}),  # 3 experts to choose 4 from
        ("groups", {"groups": 5}),
        ("groups", {"groups": 12}),
        ("top_groups", {"groups": 4, "top_groups": 5}),
        ("scoring", {"scoring": "tanh"}),
        ("bias", {"bias": torch.zeros(11)}),
        ("logits", {"logits": torch.zeros(2, 12, dtype=torch.bfloat16)}),
    ],
)
def test_what_does_not_fit_is_named(name: str, change: dict[str, Any]) -> None:
    arguments = {"logits": torch.zeros(2, 12), "bias": None, "top_k": 4} | change
    with pytest.raises(ValueError, match=f"`{name}`"):
        route(**arguments)  # type: ignore[arg-type]  # the point


def test_one_warp_holds_the_experts_of_every_model() -> None:
    for experts, groups, top_k in [(384, 1, 8), (64, 1, 6), (256, 8, 8)]:
        tiles = router_tiles(experts, groups, top_k)
        assert tiles.num_warps == 1
        assert tiles.groups * tiles.members >= experts
        assert tiles.chosen >= top_k
