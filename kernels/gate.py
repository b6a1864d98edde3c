"""A layer's norm, its router's product and the choice of experts for a few tokens, in one launch.

Twin: `reference.rms_norm`, a float32 product, `reference.route`. Budget for one token, computed: Kimi-K2's router is 5.5 MB in
bfloat16, 1.3 µs at 4.3 TB/s, Moonlight's 0.3 MB; all else is latency. No kernel writes the weights, so programs have them
in registers before the kernel ahead has ended. What is left for K2, in cycles of 1.75 GHz: the token's row from the second
cache level 600, its sum of squares 500, the norm 250, products 500, their sums 400, fence and counter 1,300, all logits
350, the choice 2,000: 3.4 µs. Measured on an H200: 5.0 µs, 2.9 for Moonlight. Apart they were five launches: 17.6 µs, and what
lies between them.

A program holds a few experts' rows and has one token: it norms the whole row (redundantly; a program an SM has nothing else
to do while it waits), writes its part of it and its logits. The last program of a token to arrive chooses. Which one that
is changes nothing: it reads what all have written, and no sum's order depends on it. It chooses by `router.choose` with one
token a warp, of which only the first is real: the others keep a reduction from becoming one over warps, with barriers.

The weights are read once for each token, from the second cache level but for the first: at about 5 TB/s K2's take 1.1 µs a
token, which a norm, a product and a choice apart do not (8 µs for up to 32 tokens): `gate_pays` knows up to where.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import triton
import triton.language as tl
from thinkloop.kernels.compile_case import POINTERS, CompileCase
from thinkloop.kernels.rms_norm import MAX_WIDTH, norm_tiles, normed
from thinkloop.kernels.router import RouterTiles, check_choice, choose, router_tiles
from thinkloop.kernels.target import (
    HOPPER,
    INTERPRET,
    Chip,
    cast,
    chip,
    launch_early,
    prefetch,
    starts_early,
    wait_for_inputs,
)
from torch import Tensor

MAX_TOKENS = 32
_READ_AGAIN = 10 << 20
"""Bytes of weights that all tokens together may read. Measured on an H200, beside the parts: K2 4.7 µs against 5.6 for one
token, 7.9 against 6.2 for two; Moonlight 2.7 against 3.1, and 7.2 against 10.3 for 32."""


@dataclass(frozen=True, slots=True)
class GateTiles:
    """A program's `block` holds a token's row, its `rows` are experts, `part` columns of the normed row are written by it.
    `copies` of the token are in the choice, which `choice` describes."""

    block: int
    rows: int
    part: int
    copies: int
    choice: RouterTiles
    num_warps: int


def gate_tiles(experts: int, width: int, groups: int, top_k: int, sm_count: int) -> GateTiles:
    """At most a program an SM, which for K2 is 96 of 4 experts, for Moonlight 64 of one. At most 8 warps, two a scheduler:
    the choice is made by all of them, and by 16 takes longer than by one. At most 128 weights a thread, in 64 registers."""
    block, warps = triton.next_power_of_2(width), min(norm_tiles(width).num_warps, 8)
    rows = triton.next_power_of_2(triton.cdiv(experts, sm_count))
    rows = min(rows, max(128 * 32 * warps // block, 1))
    part = max(triton.next_power_of_2(triton.cdiv(width, triton.cdiv(experts, rows))), 8)  # 16 bytes at least
    choice = router_tiles(experts, groups, top_k)
    vector = min(max(choice.groups * choice.members // 32, 1), 4)  # logits that a thread loads at once
    copies = warps * max(32 * vector // choice.members, 1)  # as many as give each warp its own
    return GateTiles(block, rows, part, copies, choice, warps)


def gate_pays(tokens: int, w_router: Tensor) -> bool:
    """Whether `gate` is faster than its parts: one token of K2, up to 32 of Moonlight."""
    return tokens == 1 or (tokens <= MAX_TOKENS and tokens * w_router.nbytes <= _READ_AGAIN)


@triton.jit
def _wide(b_value, INTERPRET: tl.constexpr):
    """As float32. Two bfloat16 of a register take an instruction each, where Triton takes three for both, and takes them
    long before: K2's weights would lie in twice the registers."""
    if INTERPRET or b_value.dtype != tl.bfloat16:
        return b_value.to(tl.float32)
    return tl.inline_asm_elementwise(
        "shl.b32 $0, $2, 16;\nand.b32 $1, $2, 0xffff0000;", "=f,=f,r", [b_value], dtype=tl.float32, is_pure=True, pack=2
    )


@triton.jit
def _gate_kernel(
    p_x, p_norm, p_weight, p_bias, p_h, p_logits, p_ids, p_shares, p_counters, s_logits, eps, scale, top_k, top_groups,
    WIDTH: tl.constexpr, EXPERTS: tl.constexpr, GROUPS: tl.constexpr, SIGMOID: tl.constexpr, NORMALISE: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, PART: tl.constexpr, COPIES: tl.constexpr, BLOCK_GROUPS: tl.constexpr,
    BLOCK_MEMBERS: tl.constexpr, BLOCK_K: tl.constexpr, AHEAD: tl.constexpr, SETTLED: tl.constexpr,
    EARLY: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """SETTLED: x was there before the last launch, which has nothing else to do with this one: waited for all the same, but
    last, as whoever waits for this kernel waits for all before it."""
    i_tile, i_token = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_column, o_expert = tl.arange(0, BLOCK), i_tile * ROWS + tl.arange(0, ROWS)
    inside, real = o_column < WIDTH, o_expert < EXPERTS
    p_tile = p_weight + o_expert[:, None] * WIDTH + o_column[None, :]
    b_weight = tl.load(p_tile, mask=real[:, None] & inside[None, :], other=0.0)
    b_norm = tl.load(p_norm + o_column, mask=inside, other=0.0)
    if AHEAD:
        prefetch(p_bias, EXPERTS * 4, EARLY)
    if not SETTLED:
        wait_for_inputs(EARLY)

    b_x = tl.load(p_x + i_token * WIDTH + o_column, mask=inside, other=0.0)
    b_h = cast(normed(_wide(b_x, INTERPRET), eps, WIDTH), p_h.dtype.element_ty, INTERPRET)
    b_h = cast(b_h.to(tl.float32) * b_norm.to(tl.float32), p_h.dtype.element_ty, INTERPRET)
    tl.store(p_h + i_token * WIDTH + o_column, b_h, mask=inside & (o_column // PART == i_tile))
    b_logits = tl.sum(_wide(b_weight, INTERPRET) * _wide(b_h, INTERPRET)[None, :], axis=1)
    tl.store(p_logits + i_token * s_logits + o_expert, b_logits, mask=real)

    tl.debug_barrier()  # the logits are written before one thread says so
    arrived = tl.atomic_add(p_counters + i_token, 1, sem="acq_rel", scope="gpu")
    if arrived == tl.num_programs(0) - 1:  # the others' logits are seen: to acquire is also to drop what L1 holds
        tl.store(p_counters + i_token, 0)
        o_copy = tl.arange(0, COPIES)[:, None, None]
        choose(
            p_logits, p_bias, p_ids, p_shares, s_logits, scale, top_k, top_groups, i_token + o_copy, o_copy == 0, EXPERTS,
            GROUPS, SIGMOID, NORMALISE, BLOCK_GROUPS, BLOCK_MEMBERS, BLOCK_K,
        )  # fmt: skip
    if SETTLED:
        wait_for_inputs(EARLY)


def gate(
    x: Tensor, norm: Tensor, eps: float, w_router: Tensor, bias: Tensor | None, counters: Tensor, *,
    top_k: int, groups: int = 1, top_groups: int = 1, scale: float = 1.0, normalise: bool = True,
    scoring: Literal["sigmoid", "softmax"] = "sigmoid", logits: Tensor | None = None, settled: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The normed rows `h` of `x`, and the experts chosen by them: `x` bfloat16 `[T, D]`, T at most 32 -> h bfloat16
    `[T, D]`, ids int32 `[T, K]`, shares float32 `[T, K]`.

    `h` is `reference.rms_norm(x, norm, eps)`, `norm` bfloat16 `[D]`. The logits are `h` times `w_router`, `[E, D]` in bfloat16
    or float32, summed in float32; ids and shares are those that `router.route` gives for them. `logits`, float32 `[T, E]`,
    receives them where it is given. A token's results don't depend on how many others there are. `settled`: x was written
    before the last launch, which reads and writes nothing that this one writes (nor memory given back to the allocator since);
    the two then go on side by side.

    `counters`, int32 with at least T elements, must be zero and is left zero. Launches that may run at the same time, on two
    streams, need their own. Raises `ValueError` naming the argument that doesn't fit.
    """
    _check(x, norm, w_router, counters)
    (tokens, width), experts = x.shape, w_router.shape[0]
    if logits is None:
        logits = torch.empty(tokens, experts, dtype=torch.float32, device=x.device)
    if logits.shape != (tokens, experts):
        raise ValueError(f"`logits` must be float32 [{tokens}, {experts}], not {logits.dtype} {logits.shape}.")
    check_choice(logits, bias, top_k, groups, top_groups, scoring)
    h = torch.empty_like(x)
    ids = torch.empty(tokens, top_k, dtype=torch.int32, device=x.device)
    shares = torch.empty(tokens, top_k, dtype=torch.float32, device=x.device)
    if tokens == 0:
        return h, ids, shares
    target = chip(x.device)
    tiles, early = gate_tiles(experts, width, groups, top_k, target.sms), starts_early(target)
    ahead = early and bias is not None and experts % 4 == 0 and bias.data_ptr() % 16 == 0
    _gate_kernel[(triton.cdiv(experts, tiles.rows), tokens)](
        x, norm, w_router, bias, h, logits, ids, shares, counters, logits.stride(0), eps, scale, top_k, top_groups,
        WIDTH=width, EXPERTS=experts, GROUPS=groups, SIGMOID=scoring == "sigmoid", NORMALISE=normalise,
        **_constants(tiles, ahead, settled, early), num_warps=tiles.num_warps, num_stages=1, **launch_early(x.device),
    )  # fmt: skip
    return h, ids, shares


def _constants(tiles: GateTiles, ahead: bool, settled: bool, early: bool) -> dict[str, int]:
    return {
        "BLOCK": tiles.block, "ROWS": tiles.rows, "PART": tiles.part, "COPIES": tiles.copies,
        "BLOCK_GROUPS": tiles.choice.groups, "BLOCK_MEMBERS": tiles.choice.members, "BLOCK_K": tiles.choice.chosen,
        "AHEAD": ahead, "SETTLED": settled, "EARLY": early, "INTERPRET": INTERPRET,
    }  # fmt: skip


def _check(x: Tensor, norm: Tensor, w_router: Tensor, counters: Tensor) -> None:
    if x.dim() != 2 or x.dtype != torch.bfloat16 or not x.is_contiguous() or x.shape[0] > MAX_TOKENS:
        raise ValueError(f"`x` must be contiguous bfloat16 [T <= {MAX_TOKENS}, D], not {x.dtype} {x.shape}.")
    tokens, width = x.shape
    if not 2 <= width <= MAX_WIDTH:
        raise ValueError(f"`x` must have 2 to {MAX_WIDTH} columns, not {width}.")
    if norm.shape != (width,) or norm.dtype != x.dtype or not norm.is_contiguous():
        raise ValueError(f"`norm` must be contiguous {x.dtype} [{width}], not {norm.dtype} {norm.shape}.")
    kinds = (torch.bfloat16, torch.float32)
    if w_router.dim() != 2 or w_router.shape[1] != width or w_router.dtype not in kinds or not w_router.is_contiguous():
        raise ValueError(
            f"`w_router` must be contiguous bfloat16 or float32 [E, {width}], not {w_router.dtype} {w_router.shape}."
        )
    if counters.dtype != torch.int32 or counters.dim() != 1 or len(counters) < tokens or not counters.is_contiguous():
        raise ValueError(f"`counters` must be int32 [{tokens} or more], not {counters.dtype} {counters.shape}.")


def compile_cases(capability: int = 90) -> Iterator[CompileCase]:
    """Kimi-K2 and Moonlight, with weights as they are published and in float32. How many tokens there are is a side of the
    grid, so that these are the kernels for all of them."""
    for name, experts, width, top_k in (("k2", 384, 7168, 8), ("moonlight", 64, 2048, 6)):
        for dtype in (torch.bfloat16, torch.float32):
            tiles = gate_tiles(experts, width, 1, top_k, HOPPER.sms)
            constants = {"WIDTH": width, "EXPERTS": experts, "GROUPS": 1, "SIGMOID": True, "NORMALISE": True}
            early = starts_early(Chip(capability, HOPPER.sms))
            constants |= _constants(tiles, early, True, early)
            bf16, fp32 = POINTERS[torch.bfloat16], POINTERS[torch.float32]
            signature = {"p_x": bf16, "p_norm": bf16, "p_weight": POINTERS[dtype], "p_bias": fp32, "p_h": bf16,
                         "p_logits": fp32, "p_ids": "*i32", "p_shares": fp32, "p_counters": "*i32", "s_logits": "i32",
                         "eps": "fp32", "scale": "fp32", "top_k": "i32", "top_groups": "i32"}  # fmt: skip
            signature |= dict.fromkeys(constants, "constexpr")
            case = f"gate-{name}" + ("" if dtype == torch.bfloat16 else "-float32")
            yield CompileCase(case, _gate_kernel, signature, constants, tiles.num_warps, num_stages=1, decode=True)
