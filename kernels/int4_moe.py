"""Routed INT4 experts: `Σ_k share[t,k] · down_e(silu(gate_e(x_t)) · up_e(x_t))`, twin of `reference.moe_int4`.

Budget for K2-Thinking (D 7168, I 2048, 384 experts, 8 a token), computed, on an H200 (4.3 TB/s copied, 132 SMs, 1.75 GHz):

- Bytes: an expert is 44.0 M weights at 4.5 bits = 24.8 MB, so a token reads 198 MB: 46 µs. 16 tokens touch 110 experts:
  633 µs.
- Instructions: unpacking is 15 for 8 weights (4 masks and 3 shifts at half rate, 4 subtractions, 4 products with the
  scale): 352 M weights · 1.875 / (132 · 128 · 1.75 GHz) = 22 µs a token, under the reading. A product on the plain
  float32 units instead of the tensor cores would add a conversion and an FMA: 1.875 + 2 = 3.9 a weight, 46 µs, no room left.
  Compiled for sm_90, K2's whole gate/up loop is 372 for a thread's 128 weights: 2.9 a weight, 35 µs of issue slots.
- Shared memory: 4 bits in and out of the pipeline's buffers. Unpacked weights going through it would be 4 bytes a weight:
  47 µs at 128 bytes a clock. Hence `int4_layout`: unpacked registers already are the tensor core's fragments.

Weights are the left operand (64 rows, 16 a warp) and tokens the narrow right one: 8 are the least, of which decoding uses
one. Gate and up rows alternate in eights within a tile, so `silu(gate) · up` finds both in the same thread.

Decoding doesn't sort: a program is one (token, expert) pair and one tile of rows. Pairs run fastest, so where two tokens
chose the same expert the second finds the tile in L2; at 8 tokens of K2 that is 7 % of the pairs under uniform routing, and
gathering them would put a search through all ids before every program's first load.

The sum over a token's experts is a kernel of its own, or part of whatever comes next. Within the down product, one program
would have to walk all 8 experts (no float atomics: same input, same bits): 112 tiles of 64 rows for 132 SMs. Apart, it moves
2 · 8 · 7168 · 4 B = 0.46 MB a token, 0.1 µs, plus a launch.

Gate and up of a few tokens aren't launched early: their programs all fit on the 132 SMs at once, and would crowd on those that
the kernel before leaves first. Measured in a layer of one token: 65 µs instead of 38 for K2, 19 instead of 9 for Moonlight.
Where there are several rounds of programs it evens out, and starting early pays: 16 tokens of K2 take 738 µs instead of 811.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from thinkloop.kernels.compile_case import CompileCase
from thinkloop.kernels.int4_layout import (
    PackedExperts,
    pack_experts,
    padded_features,
    unpack_experts,
    unpack_words,
)
from thinkloop.kernels.int4_moe_grouped import (
    Tiles,
    group_by_expert,
    grouped_tiles,
    grouping_cases,
    uses_grouped,
)
from thinkloop.kernels.target import (
    HOPPER,
    INTERPRET,
    Chip,
    cast,
    chip,
    early,
    launch_early,
    starts_early,
    wait_for_inputs,
)
from torch import Tensor

__all__ = [
    "PackedExperts",
    "Tiles",
    "compile_cases",
    "decode_tiles",
    "grouped_tiles",
    "moe_int4",
    "moe_parts",
    "pack_experts",
    "unpack_experts",
    "uses_grouped",
]

_BLOCKS_TOGETHER = 8  # grouped: blocks that visit a tile of rows together, to read an expert's rows once from L2
_COMBINE_BLOCK = 1024
_AT_ONCE = 14
"""Programs an SM, twice as many as one holds."""


def decode_tiles(tokens: int, rows: int, features: int, experts_per_token: int, sm_count: int) -> Tiles:
    """Tiles for one matrix `rows × features` and few tokens, each pair on its own.

    64 rows, or 32 where that leaves fewer SMs idle at the end (Moonlight's down product, 1 token: 192 programs of 64 rows
    fill 73 % of two rounds of 132 SMs). Three stages: more leave room for fewer programs on an SM, which costs more than it
    gains (K2's down product, 1 token: 22 µs with three, 25 with four, 26 with six).
    """

    def programs(size: int) -> int:
        return tokens * experts_per_token * -(-rows // size)

    def busy(size: int) -> float:
        return programs(size) / (sm_count * -(-programs(size) // sm_count))

    size = 32 if busy(32) > 1.1 * busy(64) else 64
    return Tiles(8, size, *((256, 3) if features % 256 == 0 else (128, 4)))


@triton.jit(do_not_specialize=["blocks", "together"])
def _experts_kernel(
    p_x, p_weight, p_scale, p_experts, p_order, p_shares, p_out, blocks, together,
    ROWS: tl.constexpr, FEATURES: tl.constexpr, PADDED: tl.constexpr, PAIRS_PER_ROW: tl.constexpr,
    SORTED: tl.constexpr, GATED: tl.constexpr, WGMMA: tl.constexpr, INTERPRET: tl.constexpr,
    TOKENS: tl.constexpr, WARPS: tl.constexpr, BLOCK_K: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One tile of rows of one expert, times one block of (token, expert) pairs.

    GATED: the matrix is gate over up, out `[pairs, ROWS/2]` is `silu(gate) · up`; else out `[pairs, ROWS]` is the product
    times the pair's share. Row `pair // PAIRS_PER_ROW` of x `[·, FEATURES]` belongs to a pair. SORTED: `p_experts` is the
    table of `group_by_expert`, else `ids`, and each block is a pair.
    """
    STEPS: tl.constexpr = BLOCK_K // 128
    WIDTH: tl.constexpr = ROWS // 2 if GATED else ROWS
    TILE: tl.constexpr = 8 * WARPS if GATED else 16 * WARPS
    TILES: tl.constexpr = (WIDTH + TILE - 1) // TILE
    i_program = tl.program_id(0)
    i_first = i_program // (together * TILES) * together
    i_within = i_program % (together * TILES)
    height = tl.minimum(blocks - i_first, together)
    i_block, i_tile = i_first + i_within % height, i_within // height

    if GATED:
        wait_for_inputs(EARLY)
    expert = tl.load(p_experts + i_block).to(tl.int64)
    # Granules by (half, warp): a warp's 16 rows are two granules, gate and up where GATED, else neighbours.
    o_half, o_warp = tl.arange(0, 2 * WARPS) // WARPS, tl.arange(0, 2 * WARPS) % WARPS
    if GATED:
        o_row = tl.minimum(i_tile * WARPS + o_warp, ROWS // 16 - 1) + o_half * (ROWS // 16)
    else:
        o_row = tl.minimum((i_tile * WARPS + o_warp) * 2 + o_half, ROWS // 8 - 1)
    o_granule = tl.maximum(expert, 0) * (ROWS // 8) + o_row
    if not GATED:  # who chose whom was written before the product ahead was launched
        wait_for_inputs(EARLY)
    o_m = tl.arange(0, TOKENS)
    if SORTED:
        if expert < 0:
            return
        o_place = tl.load(p_experts + blocks + i_block) + o_m
        b_real = o_place < tl.load(p_experts + 2 * blocks + i_block)
        b_pair = tl.load(p_order + o_place, mask=b_real, other=0)
    else:
        b_real = o_m == 0
        b_pair = i_block + 0 * o_m

    o_step = tl.arange(0, STEPS)[:, None, None]
    b_base = o_granule[None, :, None]
    p_words = p_weight + b_base * PADDED + o_step * 128 + tl.arange(0, 128)[None, None, :]
    p_factors = p_scale + b_base * (PADDED // 8) + o_step * 16 + tl.arange(0, 16)[None, None, :]  # pairs of bfloat16
    o_k = tl.arange(0, BLOCK_K)
    p_rows = p_x + (b_pair // PAIRS_PER_ROW).to(tl.int64)[:, None] * FEATURES + o_k[None, :]

    b_acc = tl.zeros([16 * WARPS, TOKENS], tl.float32)
    for k in range(0, PADDED, BLOCK_K):
        b_words = tl.reshape(tl.load(p_words + k), [STEPS, 2, WARPS, 8, 4, 2, 2])
        b_scales = tl.reshape(tl.load(p_factors + k // 8), [STEPS, 2, WARPS, 8, 1, 2, 1])
        if FEATURES % BLOCK_K == 0:
            b_x = tl.load(p_rows + k, mask=b_real[:, None], other=0.0)
        else:
            b_x = tl.load(p_rows + k, mask=b_real[:, None] & (o_k < FEATURES - k)[None, :], other=0.0)
        b_scales = tl.broadcast_to(b_scales, [STEPS, 2, WARPS, 8, 4, 2, 2])
        b_w = unpack_words(b_words, b_scales, INTERPRET)  # [step, half, warp, r, c, ihi, ilo, pair, jhi, jlo]
        if WGMMA:
            b_w = tl.permute(b_w, (2, 1, 3, 0, 5, 8, 6, 9, 4, 7))  # rows, then features as they are
        else:
            # Triton gives mma.sync four neighbouring features a thread, wgmma two: (c, jlo), not (jlo, c).
            b_w = tl.permute(b_w, (2, 1, 3, 0, 5, 8, 6, 4, 9, 7))
            b_x = tl.permute(tl.reshape(b_x, [TOKENS, BLOCK_K // 16, 2, 4, 2]), (0, 1, 3, 2, 4))
            b_x = tl.reshape(b_x, [TOKENS, BLOCK_K])
        b_w = tl.reshape(b_w, [16 * WARPS, BLOCK_K])
        if INTERPRET:  # its bfloat16 product is wrong
            b_w, b_x = b_w.to(tl.float32), b_x.to(tl.float32)
        b_acc = tl.dot(b_w, tl.trans(b_x), b_acc)

    o_n = i_tile * TILE + tl.arange(0, TILE)
    p_tile = p_out + b_pair.to(tl.int64)[None, :] * WIDTH + o_n[:, None]
    b_inside = b_real[None, :] & (o_n < WIDTH)[:, None]
    if GATED:
        b_halves = tl.permute(tl.reshape(b_acc, [WARPS, 2, 8, TOKENS]), (0, 2, 3, 1))
        b_gate, b_up = tl.split(b_halves)
        b_out = tl.reshape(b_gate * tl.sigmoid(b_gate) * b_up, [TILE, TOKENS])
    else:
        b_out = b_acc * tl.load(p_shares + b_pair, mask=b_real, other=0.0)[None, :]
    tl.store(p_tile, cast(b_out, p_out.dtype.element_ty, INTERPRET), mask=b_inside)


@triton.jit
def _combine_kernel(
    p_partial, p_out, WIDTH: tl.constexpr, TOP_K: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """`out [T, WIDTH] = Σ_k partial [T, TOP_K, WIDTH]`, in the order of k, in float32."""
    wait_for_inputs(EARLY)
    i_token = tl.program_id(0).to(tl.int64)
    o_n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    b_sum = tl.zeros([BLOCK], tl.float32)
    for k in tl.static_range(TOP_K):
        b_sum += tl.load(p_partial + (i_token * TOP_K + k) * WIDTH + o_n, mask=o_n < WIDTH, other=0.0).to(tl.float32)
    tl.store(p_out + i_token * WIDTH + o_n, cast(b_sum, p_out.dtype.element_ty, INTERPRET), mask=o_n < WIDTH)


def _plan(
    tokens: int, experts: int, top_k: int, rows: int, features: int, *, gated: bool, target: Chip
) -> tuple[Tiles, dict[str, Any]]:
    """Tiles and constexprs of one product."""
    in_groups = uses_grouped(tokens, experts, top_k)
    tiles = (
        grouped_tiles(tokens, experts, top_k) if in_groups else decode_tiles(tokens, rows, features, top_k, target.sms)
    )
    padded = padded_features(features)
    return tiles, {
        "ROWS": rows, "FEATURES": features, "PADDED": padded, "PAIRS_PER_ROW": top_k if gated else 1,
        "SORTED": in_groups, "GATED": gated,
        "WGMMA": target.capability == 90 and tiles.tokens >= 16,  # Triton's choice, which sets the order within a thread
        "INTERPRET": INTERPRET,
        "TOKENS": tiles.tokens, "WARPS": tiles.warps, "BLOCK_K": tiles.features if padded % tiles.features == 0 else 128,
        "EARLY": starts_early(target),
    }  # fmt: skip


def _check(x: Tensor, ids: Tensor, shares: Tensor, gate_up: PackedExperts, down: PackedExperts) -> None:
    if x.dim() != 2 or x.dtype != torch.bfloat16 or not x.is_contiguous():
        raise ValueError(f"x must be contiguous bfloat16 [T, D], not {x.dtype} {list(x.shape)}")
    if ids.dim() != 2 or ids.shape[0] != x.shape[0] or ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"ids must be int32 or int64 [{x.shape[0]}, K], not {ids.dtype} {list(ids.shape)}")
    if shares.shape != ids.shape or shares.dtype != torch.float32:
        raise ValueError(f"shares must be float32 {list(ids.shape)}, not {shares.dtype} {list(shares.shape)}")
    if gate_up.features != x.shape[1] or gate_up.rows % 16:
        raise ValueError(f"gate_up must be [E, 2I, {x.shape[1]}], I in eights, not {gate_up.rows} × {gate_up.features}")
    expected, found = [gate_up.experts, x.shape[1], gate_up.rows // 2], [down.experts, down.rows, down.features]
    if found != expected:
        raise ValueError(f"down must be {expected}, not {found}")


def moe_int4(x: Tensor, ids: Tensor, shares: Tensor, gate_up: PackedExperts, down: PackedExperts) -> Tensor:
    """`Σ_k shares[t,k] · expert_{ids[t,k]}(x[t])` from packed INT4 experts -> bfloat16 `[T, D]`: the sum of `moe_parts`."""
    parts = moe_parts(x, ids, shares, gate_up, down)
    out = torch.empty_like(x)
    if parts.numel() == 0:
        return out.zero_()
    tokens, top_k, width = parts.shape
    _combine_kernel[(tokens, triton.cdiv(width, _COMBINE_BLOCK))](
        parts, out, WIDTH=width, TOP_K=top_k, BLOCK=_COMBINE_BLOCK, INTERPRET=INTERPRET,
        **early(x.device),
    )  # fmt: skip
    return out


def moe_parts(x: Tensor, ids: Tensor, shares: Tensor, gate_up: PackedExperts, down: PackedExperts) -> Tensor:
    """`shares[t,k] · expert_{ids[t,k]}(x[t])` from packed INT4 experts -> `[T, K, D]`: float32, or bfloat16 for many tokens.

    `x` bfloat16 `[T, D]`, `ids` int32 or int64 `[T, K]` in `[0, E)` (not checked: that would be a wait), `shares` float32
    `[T, K]`, `gate_up` `[E, 2I, D]` (gate first), `down` `[E, D, I]`. The same input gives the same bits. Which path runs
    depends on shapes alone. Raises ValueError for other shapes or types.
    """
    _check(x, ids, shares, gate_up, down)
    tokens, top_k = ids.shape
    pairs = tokens * top_k
    if pairs == 0:
        return torch.empty(tokens, top_k, down.rows, dtype=torch.float32, device=x.device)
    ids, shares = ids.contiguous(), shares.contiguous()
    experts, in_groups = gate_up.experts, uses_grouped(tokens, gate_up.experts, top_k)
    target = chip(x.device)
    order, table, blocks = ids, ids, pairs  # ungrouped, a block is a pair
    if in_groups:
        order, table = group_by_expert(ids, experts, grouped_tiles(tokens, experts, top_k).tokens)
        blocks = table.shape[1]

    def product(rows_in: Tensor, matrices: PackedExperts, rows_out: Tensor, gated: bool) -> None:
        rows, features = matrices.rows, matrices.features
        tiles, constants = _plan(tokens, experts, top_k, rows, features, gated=gated, target=target)
        programs = blocks * triton.cdiv(rows, tiles.rows)
        launch = launch_early(x.device) if not gated or programs > _AT_ONCE * target.sms else {}
        _experts_kernel[(programs,)](
            rows_in, matrices.weight, matrices.scale.view(torch.int32), table, order, shares, rows_out,
            blocks, _BLOCKS_TOGETHER if in_groups else blocks,
            **constants, num_warps=tiles.warps, num_stages=tiles.stages, **launch,
        )  # fmt: skip

    hidden = torch.empty(pairs, down.features, dtype=x.dtype, device=x.device)
    # Grouped, the products are rounded before the sum: at 4,096 tokens float32 would move another 0.9 GB.
    parts = torch.empty(tokens, top_k, down.rows, dtype=x.dtype if in_groups else torch.float32, device=x.device)
    product(x, gate_up, hidden, True)
    product(hidden, down, parts, False)
    return parts


def _product_cases(tokens: int, experts: int, top_k: int, width: int, inner: int, capability: int) -> list[CompileCase]:
    """Both products and the sum, for one model and number of tokens."""
    in_groups = uses_grouped(tokens, experts, top_k)
    kinds = {"p_x": "*bf16", "p_weight": "*i32", "p_scale": "*i32", "p_experts": "*i32", "p_order": "*i32"}
    partial = "*bf16" if in_groups else "*fp32"
    cases, target = [], Chip(capability, HOPPER.sms)
    for name, rows, features, out in (("gate_up", 2 * inner, width, "*bf16"), ("down", width, inner, partial)):
        tiles, constants = _plan(tokens, experts, top_k, rows, features, gated=name == "gate_up", target=target)
        signature = {**kinds, "p_shares": "*fp32", "p_out": out, "blocks": "i32", "together": "i32"}
        signature |= dict.fromkeys(constants, "constexpr")
        cases.append(CompileCase(name, _experts_kernel, signature, constants, tiles.warps, tiles.stages, not in_groups))
    constants = {
        "WIDTH": width, "TOP_K": top_k, "BLOCK": _COMBINE_BLOCK, "EARLY": starts_early(target), "INTERPRET": INTERPRET,
    }  # fmt: skip
    signature = {"p_partial": partial, "p_out": "*bf16", **dict.fromkeys(constants, "constexpr")}
    return [*cases, CompileCase("combine", _combine_kernel, signature, constants, 4, 3, not in_groups)]


def compile_cases(capability: int = 90) -> Iterator[CompileCase]:
    """Every kernel at the tile sizes for K2 and Moonlight and 1 to 4,096 tokens, each once."""
    seen = []
    models = (("k2", 384, 8, 7168, 2048), ("moonlight", 64, 6, 2048, 1408))
    for (model, experts, top_k, width, inner), tokens in itertools.product(models, (1, 2, 4, 8, 16, 64, 512, 4096)):
        cases = _product_cases(tokens, experts, top_k, width, inner, capability)
        if uses_grouped(tokens, experts, top_k):
            cases += grouping_cases(
                tokens * top_k, experts, grouped_tiles(tokens, experts, top_k).tokens, Chip(capability, HOPPER.sms)
            )
        for case in cases:
            if replace(case, name="") not in seen:
                seen.append(replace(case, name=""))
                yield replace(case, name=f"{model}-{tokens}-{case.name}")
