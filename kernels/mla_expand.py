"""What lies between latent attention and the output projection: the splits' results become one latent a query, and that,
times `w_uv`, its head's values, in one launch.

Twins: a merge by log-sum-exp, as FlashDecoding has it, and the last product of `reference.mla_absorbed`. Budget, computed:
attention leaves 2 KB of float32 a query row and split (C = 512; Hopper's kernel half of it, in bfloat16). As `kv_splits`
fills 132 SMs with tiles of 64 rows, that is 17 MB for a long sequence of Kimi-K2, 132 rows (token, split) a head, and 4.3 MB
for Moonlight. They lie in the second cache level. `w_uv` is 8.4 MB (2.1): 2.0 µs (0.5) at 4.3 TB/s, on its way before
attention has ended.

A program has one head and some of its values; a head's programs, 2 for K2 and 8 for Moonlight, all read its results. Merging
them beforehand, once and by 512 programs, was measured on an H200 and is slower, as a launch more costs more than reading
again: for one token and 132, 33 and 8 splits 8.5, 6.1 and 4.8 µs instead of 9.0, 7.4 and 6.6 for K2, 7.3, 4.9 and 3.1 instead
of 8.5, 4.4 and 4.1 for Moonlight.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from thinkloop.kernels.compile_case import POINTERS, CompileCase
from thinkloop.kernels.target import (
    HOPPER,
    INTERPRET,
    Chip,
    cast,
    chip,
    dot,
    launch_early,
    prefetch,
    starts_early,
    wait_for_inputs,
)
from torch import Tensor

MAX_ROWS = 32
"""Tokens of an `expand`: a program has all of them, so that `w_uv` is read once."""
_COLUMNS = (64, 32, 16)


@dataclass(frozen=True, slots=True)
class ExpandTiles:
    """Values and (padded) tokens of a program; whether the product is turned, `w_uv[h]ᵀ · latentᵀ`; how many tokens
    and splits are merged at a time; warps."""

    columns: int
    rows: int
    turned: bool
    tokens: int
    part: int
    num_warps: int


def expand_tiles(tokens: int, heads: int, value: int, splits: int, target: Chip) -> ExpandTiles:
    """The widest tile with which the busiest SM reads least: 128 programs of 64 values for K2, of
    16 for Moonlight. Hopper's matrix instruction has 64 rows, so the tokens go to its columns where a tile is that wide."""
    columns = min(
        (width for width in _COLUMNS if width <= value), key=lambda x: -(-heads * (value // x) // target.sms) * x
    )
    turned = columns >= 64 and target.capability >= 90
    padded = triton.next_power_of_2(tokens)
    part = max(min(16 // padded, triton.next_power_of_2(splits)), 1)  # 32 values a thread, 64 for 32 tokens
    return ExpandTiles(columns, max(padded, 16), turned, padded, part, num_warps=8)


@triton.jit
def _merged(
    p_part, p_lse, o_query, real, o_column, QUERIES: tl.constexpr, COLUMNS: tl.constexpr, LATENT: tl.constexpr,
    SPLITS: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """float32 `[QUERIES, COLUMNS]`: the splits' results, each by its share of the sum of weights. Every PART-th split has a
    maximum and sums of its own, so that threads needn't agree on one before they read."""
    o_part = tl.arange(0, PART)
    o_splits = (o_query * SPLITS)[:, None] + o_part[None, :]
    b_most = tl.full([QUERIES, PART], -1e30, tl.float32)
    for start in tl.static_range(0, SPLITS, PART):
        inside = real[:, None] & (start + o_part < SPLITS)[None, :]
        b_most = tl.maximum(b_most, tl.load(p_lse + o_splits + start, mask=inside, other=float("-inf")))
    b_total = tl.zeros([QUERIES, PART], tl.float32)
    b_sum = tl.zeros([QUERIES, PART, COLUMNS], tl.float32)
    for start in tl.static_range(0, SPLITS, PART):  # unrolled: the reads don't wait for one another
        inside = real[:, None] & (start + o_part < SPLITS)[None, :]
        b_lse = tl.load(p_lse + o_splits + start, mask=inside, other=float("-inf"))
        p_rows = p_part + (o_splits + start)[:, :, None] * LATENT + o_column[None, None, :]
        written = (b_lse > float("-inf"))[:, :, None]  # an empty split left its part as it was
        b_part = tl.load(p_rows, mask=written, other=0.0).to(tl.float32)
        b_share = tl.exp2(b_lse - b_most)
        b_total += b_share
        b_sum += b_part * b_share[:, :, None]
    b_share = tl.exp2(b_most - tl.max(b_most, 1)[:, None])
    b_total = tl.sum(b_total * b_share, 1)
    return tl.sum(b_sum * b_share[:, :, None], 1) / tl.where(b_total > 0, b_total, 1.0)[:, None]


@triton.jit(do_not_specialize=["tokens"])
def _expand_kernel(
    p_part, p_lse, p_weight, p_out, tokens,
    HEADS: tl.constexpr, LATENT: tl.constexpr, VALUE: tl.constexpr, SPLITS: tl.constexpr, COLUMNS: tl.constexpr,
    ROWS: tl.constexpr, TURNED: tl.constexpr, TOKENS: tl.constexpr, PART: tl.constexpr, EARLY: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """COLUMNS of one head's values, for all tokens."""
    i_head, i_tile = tl.program_id(0), tl.program_id(1)
    o_latent, o_value = tl.arange(0, LATENT), i_tile * COLUMNS + tl.arange(0, COLUMNS)
    o_row = tl.arange(0, ROWS)
    p_head = p_weight + i_head.to(tl.int64) * LATENT * VALUE
    prefetch(p_head + i_tile * LATENT * COLUMNS, LATENT * COLUMNS * 2, EARLY)  # the head's programs share it out
    tl.debug_barrier()  # or the assembler puts it after the loads, of which it holds 7 in flight
    b_weight = tl.load(p_head + o_latent[:, None] * VALUE + o_value[None, :])
    wait_for_inputs(EARLY)
    o_token = tl.arange(0, TOKENS)
    o_query = o_token.to(tl.int64) * HEADS + i_head
    b_latent = _merged(p_part, p_lse, o_query, o_token < tokens, o_latent, TOKENS, LATENT, LATENT, SPLITS, PART)
    b_latent = cast(b_latent, p_weight.dtype.element_ty, INTERPRET)
    b_latent = tl.broadcast_to(b_latent[None, :, :], [ROWS // TOKENS, TOKENS, LATENT])
    b_latent = tl.reshape(b_latent, [ROWS, LATENT])  # the tokens over again: fewer than the instruction has
    b_out = (
        tl.trans(dot(tl.trans(b_weight), tl.trans(b_latent), INTERPRET))
        if TURNED
        else dot(b_latent, b_weight, INTERPRET)
    )
    p_to = p_out + (o_row[:, None] * HEADS + i_head) * VALUE + o_value[None, :]
    tl.store(p_to, cast(b_out, p_out.dtype.element_ty, INTERPRET), mask=(o_row < tokens)[:, None])


def expand(part: Tensor, lse: Tensor, w_uv: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The heads' values `[T, H·V]` in `dtype`: the splits' results, merged and rounded to bfloat16, times `w_uv [H, C, V]`,
    with float32 sums.

    `part [T·H, S, C]`, the head fastest, is float32 or bfloat16; `lse [T·H, S]` holds the base-2 logarithms of the splits'
    sums of weights, float32. A split of -inf is empty and its part isn't read; without any other the result is zeros. `w_uv`
    is contiguous bfloat16, C and V powers of two from 16 up; T is at most 32. Raises `ValueError` naming the argument that
    doesn't fit.
    """
    _check_parts(part, lse)
    _check(part, w_uv)
    (heads, latent, value), splits = w_uv.shape, part.shape[1]
    tokens, target = part.shape[0] // heads, chip(part.device)
    out = torch.empty(tokens, heads * value, dtype=dtype, device=part.device)
    tiles = expand_tiles(tokens, heads, value, splits, target)
    _expand_kernel[(heads, value // tiles.columns)](
        part, lse, w_uv, out, tokens, **_constants(heads, latent, value, splits, tiles, target),
        num_warps=tiles.num_warps, num_stages=1, **launch_early(part.device),
    )  # fmt: skip
    return out


def _constants(heads: int, latent: int, value: int, splits: int, tiles: ExpandTiles, target: Chip) -> dict[str, Any]:
    return {
        "HEADS": heads, "LATENT": latent, "VALUE": value, "SPLITS": splits, "COLUMNS": tiles.columns,
        "ROWS": tiles.rows, "TURNED": tiles.turned, "TOKENS": tiles.tokens, "PART": tiles.part, "EARLY": starts_early(target),
        "INTERPRET": INTERPRET,
    }  # fmt: skip


def _check_parts(part: Tensor, lse: Tensor) -> None:
    if (
        part.dim() != 3
        or part.dtype not in (torch.float32, torch.bfloat16)
        or not part.is_contiguous()
        or not len(part)
    ):
        raise ValueError(f"`part` must be contiguous float32 or bfloat16 [Q, S, C], not {part.dtype} {part.shape}.")
    if part.shape[2] < 16 or part.shape[2] & part.shape[2] - 1:
        raise ValueError(f"`part` must have a power of two of channels, at least 16, not {part.shape[2]}.")
    if part.shape[1] < 1 or lse.shape != part.shape[:2] or lse.dtype != torch.float32 or not lse.is_contiguous():
        raise ValueError(f"`lse` must be contiguous float32 {list(part.shape[:2])}, not {lse.dtype} {lse.shape}.")


def _check(part: Tensor, w_uv: Tensor) -> None:
    latent = part.shape[2]
    fits = w_uv.dim() == 3 and w_uv.shape[1] == latent and w_uv.dtype == torch.bfloat16 and w_uv.is_contiguous()
    if not fits or w_uv.data_ptr() % 16:  # bulk prefetches begin at 16 bytes
        raise ValueError(
            f"`w_uv` must be contiguous, aligned bfloat16 [H, {latent}, V], not {w_uv.dtype} {w_uv.shape}."
        )
    heads, _, value = w_uv.shape
    if value < 16 or value & value - 1:
        raise ValueError(f"`w_uv` must have a power of two of values, at least 16, not {value}.")
    if part.shape[0] % heads or part.shape[0] > MAX_ROWS * heads:
        raise ValueError(
            f"`part` must have {heads} queries a token and at most {MAX_ROWS} tokens, not {part.shape[0]}."
        )


def compile_cases(capability: int = 90) -> Iterator[CompileCase]:
    """Kimi-K2 and Moonlight for 1, 4 and 16 tokens of sequences of any length; how many tokens there are is no constant."""
    latent, value, bf16, target = 512, 128, POINTERS[torch.bfloat16], Chip(capability, HOPPER.sms)
    sizes = ((1, 132), (1, 16), (4, 33), (16, 2))
    for (model, heads), (tokens, splits) in ((m, t) for m in (("k2", 64), ("moonlight", 16)) for t in sizes):
        to = expand_tiles(tokens, heads, value, splits, target)
        constants = _constants(heads, latent, value, splits, to, target)
        signature = {"p_part": "*fp32", "p_lse": "*fp32", "p_weight": bf16, "p_out": bf16, "tokens": "i32"}
        signature |= dict.fromkeys(constants, "constexpr")
        name = f"mla_expand-{model}-{tokens}-{splits}"
        yield CompileCase(name, _expand_kernel, signature, constants, to.num_warps, 1, decode=True)
