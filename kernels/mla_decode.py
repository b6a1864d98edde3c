"""Latent attention of a few new tokens a sequence, absorbed, over a paged cache: the decode step.

Twin: `reference.mla_absorbed` without its projections. Formula: DeepSeek-V2 (arXiv 2405.04434) section 2.1, one shared
key of C+R values a row, of which the first C are the value too; FlashDecoding's split over rows with a merge by
log-sum-exp.

Budget for Kimi-K2 (64 heads, 576 values a row), computed: a row is 1,152 bytes, 131,072 rows 151 MB, 35 µs at 4.3 TB/s.
One query token takes 2·64·(576 + 512) flop a row, 18 Gflop at 128K, in those 35 µs 520 TFLOP/s: at the edge of what the
tensor cores give, so each row is read once and serves as key and, turned, as value. All 64 heads lie in one tile; an SM
holds one program, so one sequence is split over all of them. A split leaves 64·512 float32 behind, 17 MB for 132 of them:
they stay in the second cache level (50 MB) until the merge reads them.

Measured on an H200: 81 µs without the merge. Triton 3.6 asks for a tile's rows at the end of the step before and waits for
them at once, so that loading and computing take turns, and gives both warp groups the whole score product (`warpsPerCTA = [8,
1]` in its IR). `mla_decode_hopper` does without both, in 44 µs, and serves Hopper but for small steps; this one serves every
other GPU, rows of other widths, and rows of fp8.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache as remembered
from typing import Any

import torch
import triton
import triton.language as tl
from thinkloop.kernels import kv_rows
from thinkloop.kernels.compile_case import CompileCase
from thinkloop.kernels.kv_fp8 import MIN_CAPABILITY, check_packed, load_packed
from thinkloop.kernels.target import (
    HOPPER,
    INTERPRET,
    Chip,
    cast,
    chip,
    dot,
    launch_early,
    starts_early,
    wait_for_inputs,
)
from torch import Tensor

PAGE = kv_rows.PAGE
MAX_TOKENS = 8
LOG2_E = 1.4426950408889634
_LEAST_ROWS = 64
"""Least share of a split: with 32, a step onto 1,024 rows takes no less time and leaves twice the results to merge."""
_PROGRAM_ROWS = 1024
"""What a program costs besides its share, in rows of the cache. By bytes 292 for K2 (64 for its queries, 228 for what it
leaves and the merge reads); more here, as a graph made for the longest sequence mostly runs on shorter ones."""
_MERGE_COLUMNS, _MERGE_SPLITS = 64, 32  # a tile of 8 KB: 512 programs at K2's batch 1, 5 loads in flight for 132 splits


@dataclass(frozen=True, slots=True)
class DecodeTiles:
    """Query rows (token, head) and cache rows of a tile, warps and pipeline stages."""

    queries: int
    rows: int
    num_warps: int
    num_stages: int


def decode_tiles(queries: int, capability: int = 90, fp8: bool = False) -> DecodeTiles:
    """For `queries` rows (tokens times heads). K2's 64 fill a warp group's matrix instruction; the accumulator [64, 512] is
    128 registers a thread over 8 warps. Moonlight's 16 take half of that over 4. Shared memory holds the queries
    (72 KB for K2) and two tiles of rows: 64 of them (72 KB each) on Hopper, 32 on the A100 with its 163 KB.

    `fp8`: packed rows, on Hopper and later. They always take the warp group's instruction, which has its operands in shared
    memory: a smaller one would hold the unpacked tile in more registers than there are."""
    if fp8:
        return DecodeTiles(64, 64, num_warps=8, num_stages=2)
    size = min(64, max(16, triton.next_power_of_2(queries)))
    rows = 64 if capability >= 90 else 32
    return DecodeTiles(size, rows, num_warps=4 if size == 16 else 8, num_stages=2)


def kv_splits(batch: int, heads: int, tokens: int, max_length: int, sm_count: int) -> int:
    """Into how many parts each sequence's rows are split, for a step of this shape whatever the lengths turn out to be.

    As many as fill the SMs once, or twice where once leaves many idle: 72 tiles on 132 SMs take two thirds of the time in
    3 splits and two waves. No part is under 64 rows. Scratch: 131 KB a program, so at most 35 MB on 132 SMs, or one
    program a tile where there are more tiles.
    """
    tiles = batch * -(-heads * tokens // decode_tiles(heads * tokens).queries)

    def rows(splits: int) -> float:
        return -(-tiles * splits // sm_count) * (max_length / splits + _PROGRAM_ROWS)

    most = -(-max_length // _LEAST_ROWS)
    return min((max(1, min(waves * sm_count // tiles, most)) for waves in (1, 2)), key=rows)


@triton.jit(do_not_specialize=["pages"])
def _decode_kernel(
    p_q, p_cache, p_table, p_lengths, p_part, p_lse, scale, pages,
    HEADS: tl.constexpr, TOKENS: tl.constexpr, LATENT: tl.constexpr, ROPE: tl.constexpr, SPLITS: tl.constexpr,
    PAGE: tl.constexpr, QUERIES: tl.constexpr, ROWS: tl.constexpr, LEAST: tl.constexpr, FP8: tl.constexpr,
    EARLY: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """One split of one sequence for one tile of query rows. `scale` includes log2(e). FP8: rows as in `kv_rows`."""
    wait_for_inputs(EARLY)
    WIDTH: tl.constexpr = LATENT + ROPE
    BYTES: tl.constexpr = LATENT + LATENT // 32 + 2 * ROPE if FP8 else WIDTH  # see `kv_rows`; or values
    i_split, i_tile, i_batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(p_lengths + i_batch)
    share = tl.cdiv(length, SPLITS)  # by the length there is, so that short sequences use all splits too
    share = tl.where(share <= LEAST, LEAST, tl.cdiv(share, ROWS) * ROWS)  # either way no tile crosses a page
    first = i_split * share
    last = tl.minimum(first + share, length)

    o_query = i_tile * QUERIES + tl.arange(0, QUERIES)
    real = o_query < TOKENS * HEADS
    o_batch = i_batch.to(tl.int64) * TOKENS * HEADS
    p_q += o_batch * WIDTH
    p_part += (o_batch * SPLITS + i_split) * LATENT
    o_part = o_query * SPLITS
    if FP8:
        o_lse = i_batch * (TOKENS * HEADS * SPLITS) + i_split + o_part  # 32 bits: a register less, or one is spilled
    else:
        p_lse += o_batch * SPLITS + i_split
        o_lse = o_part
    if first >= last:
        tl.store(p_lse + o_lse, tl.full([QUERIES], float("-inf"), tl.float32), mask=real)
        return

    o_latent, o_rope, o_row = tl.arange(0, LATENT), LATENT + tl.arange(0, ROPE), tl.arange(0, ROWS)
    o_rows = o_row[:, None] * WIDTH  # 32 bits within a tile; 64 for every row spill registers
    b_q = tl.load(p_q + o_query[:, None] * WIDTH + o_latent[None, :], mask=real[:, None], other=0.0)
    b_q_rope = tl.load(p_q + o_query[:, None] * WIDTH + o_rope[None, :], mask=real[:, None], other=0.0)
    b_seen = tl.minimum(length - TOKENS + o_query // HEADS + 1, last)  # rows that a query's token sees, of this split's
    b_max = tl.full([QUERIES], -1e30, tl.float32)  # finite: a row may see nothing of a tile
    b_sum = tl.zeros([QUERIES], tl.float32)
    b_mixed = tl.zeros([QUERIES, LATENT], tl.float32)
    for start in range(first, last, ROWS):
        page = tl.load(p_table + i_batch * pages + start // PAGE).to(tl.int64)
        inside = start + o_row < last
        p_rows = p_cache + (page * PAGE + start % PAGE) * BYTES
        # [S, C]: key, then value
        if FP8:
            b_rows, b_keys = load_packed(p_rows, o_row, inside, LATENT, ROPE, INTERPRET)
        else:
            b_rows = tl.load(p_rows + o_rows + o_latent[None, :], mask=inside[:, None], other=0.0)
            b_keys = tl.load(p_rows + o_rows + o_rope[None, :], mask=inside[:, None], other=0.0)
        b_scores = dot(b_q, tl.trans(b_rows), INTERPRET) + dot(b_q_rope, tl.trans(b_keys), INTERPRET)
        b_scores = tl.where((start + o_row)[None, :] < b_seen[:, None], b_scores * scale, float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_scores, 1))
        b_weights = tl.exp2(b_scores - b_new[:, None])
        b_keep = tl.exp2(b_max - b_new)
        b_sum = b_sum * b_keep + tl.sum(b_weights, 1)
        b_mixed = b_mixed * b_keep[:, None] + dot(b_weights.to(b_rows.dtype), b_rows, INTERPRET)
        b_max = b_new
    b_some = b_sum > 0
    tl.store(p_lse + o_lse, tl.where(b_some, b_max + tl.log2(tl.where(b_some, b_sum, 1.0)), float("-inf")), mask=real)
    b_mixed /= tl.where(b_some, b_sum, 1.0)[:, None]
    tl.store(p_part + o_part[:, None] * LATENT + o_latent[None, :], b_mixed, mask=real[:, None])


@triton.jit
def _merge_kernel(
    p_part, p_lse, p_out, LATENT: tl.constexpr, SPLITS: tl.constexpr, PADDED: tl.constexpr, PART: tl.constexpr,
    COLUMNS: tl.constexpr, EARLY: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """One query row, COLUMNS of its latent: the splits' results, each by its share of the sum of weights."""
    wait_for_inputs(EARLY)
    i_query, i_column = tl.program_id(0).to(tl.int64), tl.program_id(1)
    o_all, o_column = tl.arange(0, PADDED), i_column * COLUMNS + tl.arange(0, COLUMNS)
    b_lse = tl.load(p_lse + i_query * SPLITS + o_all, mask=o_all < SPLITS, other=float("-inf"))
    most = tl.maximum(tl.max(b_lse), -1e30)
    total = tl.sum(tl.exp2(b_lse - most))
    b_sum = tl.zeros([PART, COLUMNS], tl.float32)
    for start in tl.static_range(0, SPLITS, PART):  # unrolled: the loads don't wait for one another
        o_split = start + tl.arange(0, PART)
        b_lse = tl.load(p_lse + i_query * SPLITS + o_split, mask=o_split < SPLITS, other=float("-inf"))
        written = b_lse > float("-inf")  # an empty split left its part as it was
        p_rows = p_part + (i_query * SPLITS + o_split)[:, None] * LATENT
        b_part = tl.load(p_rows + o_column[None, :], mask=written[:, None], other=0.0)
        b_sum += b_part * tl.exp2(b_lse - most)[:, None]
    b_out = tl.sum(b_sum, 0) / tl.where(total > 0, total, 1.0)
    tl.store(p_out + i_query * LATENT + o_column, cast(b_out, p_out.dtype.element_ty, INTERPRET))


def mla_decode(
    q: Tensor, cache: Tensor, table: Tensor, lengths: Tensor, scale: float, *, splits: int | None = None
) -> Tensor:
    """Attention of `T` new tokens a sequence, 1 to 8, in the latent space: bfloat16 `[B, T, H, C]`.

    `q [B, T, H, C+R]` are absorbed, rotated queries, bfloat16 as the cache. Row `i` of a sequence lies in slot
    `table[b, i // 64] * 64 + i % 64` of `cache [slots, C+R]`, or uint8 `[slots, row_bytes]` of packed rows (`kv_rows`,
    C from 128 up); `table [B, pages]` and `lengths [B]` are int32. The new tokens' rows are the last of `lengths`, and a
    token sees the rows up to its own. A length of 0 gives zeros, and nothing is read for it. `splits` None: `kv_splits` for
    the longest sequence that the table has room for. C and R are powers of two from 16 up. Raises `ValueError` naming the
    argument that doesn't fit.
    """
    part, lse = decode_parts(q, cache, table, lengths, scale, splits=splits)
    queries, splits, latent = part.shape
    out = torch.empty(*q.shape[:3], latent, dtype=q.dtype, device=q.device)
    _merge_kernel[(queries, triton.cdiv(latent, _columns(latent)))](
        part, lse, out, **_merge_constants(latent, splits, chip(q.device)), num_warps=4, **launch_early(q.device)
    )
    return out


def decode_parts(
    q: Tensor, cache: Tensor, table: Tensor, lengths: Tensor, scale: float, *, splits: int | None = None
) -> tuple[Tensor, Tensor]:
    """`mla_decode` before its merge: each split's own result, float32 or bfloat16 `[B·T·H, splits, C]`, and the base-2 logarithm
    of its sum of weights, float32 `[B·T·H, splits]`; -inf where a split has no rows, and its result was not written then."""
    latent = _check(q, cache, table, lengths)
    batch, tokens, heads, width = q.shape
    target, fp8 = chip(q.device), cache.dtype == torch.uint8
    if splits is None:
        splits = kv_splits(batch, heads, tokens, table.shape[1] * PAGE, target.sms)
    tiles, queries = decode_tiles(tokens * heads, target.capability, fp8), batch * tokens * heads
    lse = torch.empty(queries, splits, dtype=torch.float32, device=q.device)
    hopper = _hopper() if q.is_cuda and not _is_small(tokens * heads, batch * splits) else None
    if hopper is not None and hopper.fits(latent, width - latent, target.capability, cache.dtype):
        part = torch.empty(queries, splits, latent, dtype=q.dtype, device=q.device)
        hopper.decode_parts(q, cache, table, lengths, scale, splits, part, lse)
        return part, lse
    part = torch.empty(queries, splits, latent, dtype=torch.float32, device=q.device)
    grid = (splits, triton.cdiv(tokens * heads, tiles.queries), batch)
    _decode_kernel[grid](
        q, cache, table, lengths, part, lse, scale * LOG2_E, table.shape[1],
        **_constants(heads, tokens, latent, width - latent, splits, tiles, target, fp8),
        num_warps=tiles.num_warps, num_stages=tiles.num_stages, **launch_early(q.device),
    )  # fmt: skip
    return part, lse


def _is_small(queries: int, programs: int) -> bool:
    """Whether a step is left to the kernel here, whose programs of 16 queries and 94 KB find room beside others: Moonlight's
    single tokens onto up to 4,096 rows. A model of its size decoded 762 tokens a second so; 595 with the other one and the
    experts' down product not started early. Which of the two it was isn't known."""
    return queries <= 16 and programs <= 64


@remembered
def _hopper() -> Any:
    """The kernel for Hopper, in a language of Triton's that is still changing: None but for the version it was written in."""
    if INTERPRET or not triton.__version__.startswith("3.6."):
        return None
    try:
        from thinkloop.kernels import mla_decode_hopper
    except ImportError:
        return None
    return mla_decode_hopper


def _constants(
    heads: int, tokens: int, latent: int, rope: int, splits: int, tiles: DecodeTiles, target: Chip, fp8: bool = False
) -> dict[str, Any]:
    # Packed rows are unpacked in all 255 registers that a thread has; with shares of 64 rows the compiler spills one or two
    return {
        "HEADS": heads, "TOKENS": tokens, "LATENT": latent, "ROPE": rope, "SPLITS": splits, "PAGE": PAGE,
        "QUERIES": tiles.queries, "ROWS": tiles.rows, "LEAST": 32 if fp8 else min(tiles.rows, _LEAST_ROWS),
        "FP8": fp8, "EARLY": starts_early(target), "INTERPRET": INTERPRET,
    }  # fmt: skip


def _columns(latent: int) -> int:
    return min(latent, _MERGE_COLUMNS)


def _merge_constants(latent: int, splits: int, target: Chip) -> dict[str, Any]:
    padded = triton.next_power_of_2(splits)
    return {
        "LATENT": latent, "SPLITS": splits, "PADDED": padded, "PART": min(padded, _MERGE_SPLITS),
        "COLUMNS": _columns(latent), "EARLY": starts_early(target), "INTERPRET": INTERPRET,
    }  # fmt: skip


def _check(q: Tensor, cache: Tensor, table: Tensor, lengths: Tensor) -> int:
    """The width of the latent: the largest power of two below a row's."""
    if q.dim() != 4 or q.dtype != torch.bfloat16 or not q.is_contiguous() or not 1 <= q.shape[1] <= MAX_TOKENS:
        raise ValueError(f"`q` must be contiguous bfloat16 [B, 1 to {MAX_TOKENS}, H, C+R], not {q.dtype} {q.shape}.")
    latent = 1 << (q.shape[3] - 1).bit_length() - 1
    rope = q.shape[3] - latent
    if rope < 16 or rope & rope - 1:
        raise ValueError(f"`q` must have rows of two powers of two, the smaller of at least 16, not {q.shape[3]}.")
    if cache.dtype == torch.uint8:
        check_packed(cache, latent, rope)
    elif cache.dim() != 2 or cache.dtype != q.dtype or not cache.is_contiguous() or cache.shape[1] != q.shape[3]:
        raise ValueError(
            f"`cache` must be contiguous {q.dtype} [slots, {q.shape[3]}], not {cache.dtype} {cache.shape}."
        )
    for name, value, shape in (("table", table, (q.shape[0], -1)), ("lengths", lengths, (q.shape[0],))):
        fits = value.dim() == len(shape) and value.shape[0] == shape[0] and value.shape.numel() > 0
        if not fits or value.dtype != torch.int32 or not value.is_contiguous():
            raise ValueError(f"`{name}` must be contiguous int32 {list(shape)}, not {value.dtype} {value.shape}.")
    return latent


def compile_cases(capability: int = 90) -> Iterator[CompileCase]:
    """Both kernels for Kimi-K2 and Moonlight, 1 to 8 tokens, one sequence of up to 262,144 rows, as they are and packed; and
    the merge of a single split, as long appends have it."""
    merged, target = {1}, Chip(capability, HOPPER.sms)
    formats = (False, True) if capability >= MIN_CAPABILITY else (False,)
    shapes = ((m, t, fp8) for m in (("k2", 64), ("moonlight", 16)) for t in (1, 2, 4, 8) for fp8 in formats)
    for (model, heads), tokens, fp8 in shapes:
        splits, tiles = kv_splits(1, heads, tokens, 1 << 18, HOPPER.sms), decode_tiles(heads * tokens, capability, fp8)
        merged.add(splits)
        constants = _constants(heads, tokens, 512, 64, splits, tiles, target, fp8)
        signature = {"p_q": "*bf16", "p_cache": "*u8" if fp8 else "*bf16", "p_table": "*i32", "p_lengths": "*i32",
                     "p_part": "*fp32", "p_lse": "*fp32", "scale": "fp32", "pages": "i32"}  # fmt: skip
        signature |= dict.fromkeys(constants, "constexpr")
        name = f"mla_decode-{model}-{tokens}" + ("-fp8" if fp8 else "")
        yield CompileCase(name, _decode_kernel, signature, constants, tiles.num_warps, tiles.num_stages, decode=True)
    for splits, part in ((splits, part) for splits in sorted(merged) for part in ("fp32", "bf16")):
        constants = _merge_constants(512, splits, target)
        signature = {"p_part": f"*{part}", "p_lse": "*fp32", "p_out": "*bf16", **dict.fromkeys(constants, "constexpr")}
        yield CompileCase(f"mla_merge-{splits}-{part}", _merge_kernel, signature, constants, 4, 3, decode=True)
