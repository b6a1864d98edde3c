"""Chooses experts on the device: scores, bias, groups, the best K, their shares, in one launch.

Twin: `reference.route`. Budget for one token of Kimi-K2 (384 experts, 8 chosen), computed: 1.5 KB of logits, 1.5 KB of
bias and 64 bytes out take 1 ns at 4.3 TB/s, and the arithmetic less; what is left is latency: the launch, one load from
memory, and K dependent steps of "find the best, take it out".

A step is an integer maximum and an integer minimum over a warp, which `redux.sync` does in one instruction each on
sm_80 and later: scores are compared as integers that order as they do. One warp a token holds 12 (of 16) experts a lane
and never waits at a barrier. `tl.topk` moves values only, so it would need 64-bit keys that carry the index, which
`redux` can't take: compiled for sm_90 at K2's size that is 2,304 instructions with 476 shuffles, this kernel 400.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import triton
import triton.language as tl
from thinkloop.kernels.compile_case import CompileCase
from thinkloop.kernels.target import HOPPER, Chip, early, starts_early, wait_for_inputs
from torch import Tensor

EMPTY = tl.constexpr(-(2**31))
"""Below the key of every float: an expert that doesn't exist, was taken already, or lies in a dropped group."""


@dataclass(frozen=True, slots=True)
class RouterTiles:
    """Powers of two that hold a token's experts as `groups` by `members`, and its choice. Where there are no groups, a row of
    up to 128 takes their place, of which a lane loads 16 bytes."""

    groups: int
    members: int
    chosen: int
    num_warps: int


def router_tiles(experts: int, groups: int, top_k: int) -> RouterTiles:
    """One warp up to 1,024 experts, 32 a lane; beyond, registers are worth more than barriers cost."""
    rows, columns = triton.next_power_of_2(groups), triton.next_power_of_2(experts // groups)
    if groups == 1:
        rows, columns = triton.cdiv(columns, 128), min(columns, 128)
    return RouterTiles(rows, columns, triton.next_power_of_2(top_k), num_warps=1 if rows * columns <= 1024 else 4)


@triton.jit
def order_key(b_value):
    """int32 keys that order as float32 values do. NaN of either sign is the largest, as in `torch.topk`; -0 equals 0."""
    b_bits = tl.where(b_value == 0, 0.0, b_value).to(tl.int32, bitcast=True)
    b_bits = tl.where(b_bits < 0, b_bits ^ 0x7FFFFFFF, b_bits)
    return tl.where(b_value != b_value, 0x7FFFFFFF, b_bits)


@triton.jit
def key_value(b_key):
    """The float32 that has this key."""
    return tl.where(b_key < 0, b_key ^ 0x7FFFFFFF, b_key).to(tl.float32, bitcast=True)


@triton.jit
def _most(b_value):
    """Each token's largest, of `[tokens, rows, members]`; of one token a scalar, which threads needn't exchange to use."""
    ONE: tl.constexpr = b_value.shape[0] == 1
    return tl.max(b_value) if ONE else tl.max(tl.max(b_value, axis=1, keep_dims=True), axis=2, keep_dims=True)


@triton.jit
def _least(b_value):
    ONE: tl.constexpr = b_value.shape[0] == 1
    return tl.min(b_value) if ONE else tl.min(tl.min(b_value, axis=1, keep_dims=True), axis=2, keep_dims=True)


@triton.jit
def _sum(b_value):
    ONE: tl.constexpr = b_value.shape[0] == 1
    return tl.sum(b_value) if ONE else tl.sum(tl.sum(b_value, axis=1, keep_dims=True), axis=2, keep_dims=True)


@triton.jit
def _without_lesser_groups(b_key, top_groups, SIGMOID: tl.constexpr, GROUPS: tl.constexpr):
    """`b_key [tokens, groups, members]`, EMPTY outside the `top_groups` best groups; of equal groups the first is better."""
    o_group, o_member = tl.arange(0, b_key.shape[1])[None, :, None], tl.arange(0, b_key.shape[2])[None, None, :]
    b_worth = tl.max(b_key, axis=2, keep_dims=True)
    if SIGMOID:  # the sum of the two best
        o_best = tl.min(tl.where(b_key == b_worth, o_member, b_key.shape[2]), axis=2, keep_dims=True)
        b_second = tl.max(tl.where(o_member == o_best, EMPTY, b_key), axis=2, keep_dims=True)
        b_worth = order_key(key_value(b_worth) + key_value(b_second))
    b_worth = tl.where(o_group < GROUPS, b_worth, EMPTY)
    kept = 0
    while kept < top_groups:
        o_winner = _least(tl.where(b_worth == _most(b_worth), o_group, b_key.shape[1]))
        b_worth = tl.where(o_group == o_winner, EMPTY, b_worth)
        kept += 1
    return tl.where(b_worth == EMPTY, b_key, EMPTY)


@triton.jit
def choose(
    p_logits, p_bias, p_ids, p_shares, s_logits, scale, top_k, top_groups, o_token, b_real, EXPERTS: tl.constexpr,
    GROUPS: tl.constexpr, SIGMOID: tl.constexpr, NORMALISE: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr, BLOCK_MEMBERS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Chooses for each of `o_token [tokens, 1, 1]` that is real. Where there are as many as warps, each warp has one, and no
    reduction waits at a barrier."""
    MEMBERS: tl.constexpr = EXPERTS // GROUPS if GROUPS > 1 else BLOCK_MEMBERS
    o_group, o_member = tl.arange(0, BLOCK_GROUPS)[None, :, None], tl.arange(0, BLOCK_MEMBERS)[None, None, :]
    o_k = tl.arange(0, BLOCK_K)[None, None, :]
    o_expert = o_group * MEMBERS + o_member
    exists = (o_member < MEMBERS) & (o_expert < EXPERTS)
    p_rows = p_logits + o_token * s_logits
    b_logits = tl.load(p_rows + o_expert, mask=exists & b_real, other=float("-inf"))
    if SIGMOID:
        b_choice = tl.sigmoid(b_logits)
    else:
        peak = _most(b_logits)
        total = _sum(tl.exp(b_logits - peak))
        b_choice = tl.exp(b_logits - peak) / total
    if p_bias is not None:
        o_own = o_expert + 0 * o_token  # each token's own: loaded once for all, it would have to be handed around
        b_choice += tl.load(p_bias + o_own, mask=exists & b_real, other=0.0)
    b_key = tl.where(exists, order_key(b_choice), EMPTY)
    if GROUPS > 1:
        b_key = _without_lesser_groups(b_key, top_groups, SIGMOID, GROUPS)

    b_ids = tl.zeros([o_token.shape[0], 1, BLOCK_K], tl.int32)
    k = 0
    while k < top_k:  # a bound known at run time: for K2 half the instructions of the unrolled loop, which load cold
        o_winner = _least(tl.where(b_key == _most(b_key), o_expert, EXPERTS))
        b_key = tl.where(o_expert == o_winner, EMPTY, b_key)
        b_ids = tl.where(o_k == k, o_winner, b_ids)
        k += 1

    # Loading the chosen logits again, from L1, is one step; keeping their scores would take a reduction for each.
    b_chosen = tl.load(p_rows + b_ids, mask=b_real, other=0.0)
    b_shares = tl.sigmoid(b_chosen) if SIGMOID else tl.exp(b_chosen - peak) / total
    if NORMALISE:
        b_shares = b_shares / (_sum(tl.where(o_k < top_k, b_shares, 0.0)) + 1e-20)
    o_out = o_token * top_k + o_k
    inside = (o_k < top_k) & b_real
    tl.store(p_ids + o_out, b_ids, mask=inside)
    tl.store(p_shares + o_out, b_shares * scale, mask=inside)


@triton.jit
def _route_kernel(
    p_logits, p_bias, p_ids, p_shares, s_logits, scale, top_k, top_groups, EXPERTS: tl.constexpr,
    GROUPS: tl.constexpr, SIGMOID: tl.constexpr, NORMALISE: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr, BLOCK_MEMBERS: tl.constexpr, BLOCK_K: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(EARLY)
    o_token = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)[:, None, None]
    choose(
        p_logits, p_bias, p_ids, p_shares, s_logits, scale, top_k, top_groups, o_token, o_token >= 0, EXPERTS, GROUPS,
        SIGMOID, NORMALISE, BLOCK_GROUPS, BLOCK_MEMBERS, BLOCK_K,
    )  # fmt: skip


def route(
    logits: Tensor, bias: Tensor | None, *, top_k: int, groups: int = 1, top_groups: int = 1, scale: float = 1.0,
    normalise: bool = True, scoring: Literal["sigmoid", "softmax"] = "sigmoid",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Chooses experts: `logits` float32 `[T, E]`, `bias` float32 `[E]` -> ids int32 `[T, K]`, shares float32 `[T, K]`.

    Means what `reference.route` does. Ids stand best first; of equally good experts (or groups) the lower index comes
    first, which `torch.topk` doesn't promise. A NaN counts as the largest score, as in torch: its expert is chosen and
    the share is NaN. Ids are always distinct and in range. Raises `ValueError` naming the argument that doesn't fit.
    """
    check_choice(logits, bias, top_k, groups, top_groups, scoring)
    tokens, experts = logits.shape
    ids = torch.empty(tokens, top_k, dtype=torch.int32, device=logits.device)
    shares = torch.empty(tokens, top_k, dtype=torch.float32, device=logits.device)
    if tokens == 0:
        return ids, shares
    tiles = router_tiles(experts, groups, top_k)
    _route_kernel[(tokens,)](
        logits, bias, ids, shares, logits.stride(0), scale, top_k, top_groups, EXPERTS=experts, GROUPS=groups,
        SIGMOID=scoring == "sigmoid", NORMALISE=normalise, BLOCK_GROUPS=tiles.groups, BLOCK_MEMBERS=tiles.members,
        BLOCK_K=tiles.chosen, num_warps=tiles.num_warps, **early(logits.device),
    )  # fmt: skip
    return ids, shares


def check_choice(logits: Tensor, bias: Tensor | None, top_k: int, groups: int, top_groups: int, scoring: str) -> None:
    if logits.dim() != 2 or logits.dtype != torch.float32 or logits.stride(1) != 1:
        raise ValueError(f"`logits` must be float32 [T, E] with adjacent experts, not {logits.dtype} {logits.shape}.")
    experts = logits.shape[1]
    if bias is not None and (bias.shape != (experts,) or bias.dtype != torch.float32 or not bias.is_contiguous()):
        raise ValueError(f"`bias` must be contiguous float32 [{experts}], not {bias.dtype} {bias.shape}.")
    if scoring not in ("sigmoid", "softmax"):
        raise ValueError(f"`scoring` must be 'sigmoid' or 'softmax', not {scoring!r}.")
    if groups < 1 or experts % groups:
        raise ValueError(f"`groups` must divide the {experts} experts; {groups} doesn't.")
    if groups > 1 and scoring == "sigmoid" and experts // groups < 2:
        raise ValueError(f"`groups` of one expert each ({groups}) have no two best to sum under sigmoid scoring.")
    if not 1 <= top_groups <= groups:
        raise ValueError(f"`top_groups` must be from 1 to {groups}, not {top_groups}.")
    within = experts if groups == 1 else top_groups * (experts // groups)
    if not 1 <= top_k <= within:
        raise ValueError(f"`top_k` must be from 1 to {within}, the experts that can be chosen, not {top_k}.")


def compile_cases(capability: int = 90) -> list[CompileCase]:
    """Kimi-K2, Moonlight, DeepSeek-V3 and DeepSeek-V2-Lite."""
    return [
        _case("router-k2", capability, 384, 8),
        _case("router-moonlight", capability, 64, 6),
        _case("router-v3", capability, 256, 8, groups=8),
        _case("router-v2-lite", capability, 64, 6, sigmoid=False),
    ]


def _case(
    name: str, capability: int, experts: int, top_k: int, *, groups: int = 1, sigmoid: bool = True
) -> CompileCase:
    tiles = router_tiles(experts, groups, top_k)
    constexprs = {
        "EXPERTS": experts, "GROUPS": groups, "SIGMOID": sigmoid, "NORMALISE": sigmoid, "BLOCK_GROUPS": tiles.groups,
        "BLOCK_MEMBERS": tiles.members, "BLOCK_K": tiles.chosen,
        "EARLY": starts_early(Chip(capability, HOPPER.sms)),
    } | ({} if sigmoid else {"p_bias": None})  # fmt: skip
    signature = {"p_logits": "*fp32", "p_bias": "*fp32", "p_ids": "*i32", "p_shares": "*fp32", "s_logits": "i32",
                 "scale": "fp32", "top_k": "i32", "top_groups": "i32"} | dict.fromkeys(constexprs, "constexpr")  # fmt: skip
    return CompileCase(name, _route_kernel, signature, constexprs, tiles.num_warps, num_stages=1, decode=True)
