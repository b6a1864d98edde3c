"""`mla_decode`'s first kernel for Hopper: the attention of each split, for rows of 512 and 64 values (Kimi-K2, Moonlight).

Means what `mla_decode.decode_parts` does; written in Gluon, which leaves layouts, barriers and the order of loads to the kernel.
A program has one split of one sequence, 64 query rows and three groups of 4 warps: one makes scores and weights (`_weigh`),
two sum the values, 256 columns each, and load (`_mix`).

Budget a tile of 64 cache rows and SM, computed for an H200 (132 SMs at 1.755 GHz, 4.3 TB/s): its 73,728 bytes are 2.26 µs of
the bandwidth, 35 µs for 131,072 rows. The tensor cores take 1,152 + 1,024 clocks, 1.24 µs, and 4,096 exponentials 256 more.
Shared memory holds the queries, two tiles and the weights, 229,376 bytes of 232,448: a tile is loaded by the copy engine into
the buffer that was just freed. So of the 4.5 µs of two tiles a load has what scores, softmax and values leave, which are about
3,000 clocks, 1.7 µs. Several query tiles of a sequence have the rows from the second cache level. Each program leaves 66 KB
behind, 8.7 MB in all.

What that takes, and why. One group makes all scores: with 32 columns each, two groups would read the queries twice, 24 clocks a
product instead of 16. It works ahead while the others sum. A tile's latent comes in CHUNKS with a barrier each, so that scores
start at the first one's arrival, and its reload when its own values are summed. The sums are scaled only when a row's maximum
has grown by more than 2^TAU: weights up to 2^TAU lose nothing, as they and their sums are floats. The page of the tile after
next is read an iteration before it is needed. Results, bfloat16, leave by the copy engine, from the buffers of the latent.

Measured on an H200, 131,072 rows, 64 heads, 132 splits: 44.3 µs, 51.0 with the merge; `mla_decode`'s own kernel took 81. Tried
and dropped: bfloat16 results from registers, 48.5; float32 ones, 48.3, and 48.1 through the copy engine. With float32 ones from
registers, nothing (48.3 to 48.5) came of 4 CHUNKS, of scaling whenever a maximum grows, of descriptors fetched ahead, and of
rows loaded before the last kernel has ended. Two groups that each make scores and sum took 49.2, and 147 for 4 tokens, where
three take 121; 264 splits 58.7; 16 heads 43.2; 16,384 rows 13.6, in 64 splits 13.1, with 16 heads 11.0; 8 × 16,384 rows in 16
splits each 47.7.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
from thinkloop.kernels.compile_case import CompileCase
from thinkloop.kernels.target import early, wait_for_inputs
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

LOG2_E = 1.4426950408889634
TILE = gl.constexpr(64)
"""Query rows of a program, and cache rows of a tile: a page of the cache."""
LATENT, ROPE = gl.constexpr(512), gl.constexpr(64)
CHUNKS = gl.constexpr(2)
"""Parts of a tile's latent with a barrier of their own."""
WIDTH = gl.constexpr(LATENT.value // CHUNKS.value)
TAU = gl.constexpr(8.0)
"""By how much, as a power of two, a maximum may grow before the sums are scaled."""
NUM_WARPS = 8
"""Of the groups that sum; `warp_specialize` adds the four others."""
SHARED = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2))
STAGE = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4))
"""Of results on their way out: [sequence, query row, split, column]."""


def fits(latent: int, rope: int, capability: int, dtype: torch.dtype) -> bool:
    """Whether this kernel serves rows of `latent + rope` values on a GPU of this compute capability (its matrix instruction
    is 9.0's alone)."""
    return (latent, rope, capability, dtype) == (LATENT.value, ROPE.value, 90, torch.bfloat16)


@gluon.jit
def _load(d_from, row, column, b_ready, b_to, go=True):
    tma.async_copy_global_to_shared(d_from, [row, column], b_ready, b_to, pred=go)


@gluon.jit
def _load_tile(d_rows, d_keys, b_rows, b_keys, b_ready, b_keys_ready, slot, BUFFER: gl.constexpr, go):
    _load(d_keys, slot, LATENT, b_keys_ready.index(BUFFER), b_keys.index(BUFFER), go)
    for c in gl.static_range(CHUNKS):
        _load(d_rows, slot, c * WIDTH, b_ready[c].index(BUFFER), b_rows[c].index(BUFFER), go)


@gluon.jit
def _expect_tile(b_ready, b_keys_ready, buffer, go):
    mbarrier.expect(b_keys_ready.index(buffer), TILE * ROPE * 2, pred=go)
    for c in gl.static_range(CHUNKS):
        mbarrier.expect(b_ready[c].index(buffer), TILE * WIDTH * 2, pred=go)


@gluon.jit
def _weigh(
    b_q, b_q_rope, b_q_ready, b_rows, b_keys, b_ready, b_keys_ready, b_weights, b_keep, b_full, b_free, p_lse, scale,
    first, last, length, splits, i_tile,
    HEADS: gl.constexpr, TOKENS: gl.constexpr,
):  # fmt: skip
    """Scores, and weights by the maximum so far: a tile's into `b_weights`, with what the sums are to be scaled by in
    `b_keep`, and at the end the sums of weights, inverted."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    QUERY: gl.constexpr = gl.SliceLayout(1, SCORES)
    tiles = gl.cdiv(last - first, TILE)
    o_query = i_tile * TILE + gl.arange(0, TILE, QUERY)
    o_row = gl.arange(0, TILE, gl.SliceLayout(0, SCORES))
    b_seen = gl.minimum(length - TOKENS + o_query // HEADS + 1, last)  # rows that a query's token sees, of this split's
    all_see = gl.minimum(length - TOKENS + 1, last)
    b_max = gl.full([TILE], -1e30, gl.float32, QUERY)  # finite: a row may see nothing of a tile
    b_sum = gl.zeros([TILE, TILE], gl.float32, SCORES)  # summed over columns only at the end
    mbarrier.wait(b_q_ready, 0)
    for i in range(tiles):
        buffer, phase = i & 1, (i >> 1) & 1
        start = first + i * TILE
        mbarrier.wait(b_keys_ready.index(buffer), phase)
        b_scores = warpgroup_mma(
            b_q_rope, b_keys.index(buffer).permute((1, 0)), gl.zeros([TILE, TILE], gl.float32, SCORES), use_acc=False,
            is_async=True,
        )  # fmt: skip
        for c in gl.static_range(CHUNKS):
            mbarrier.wait(b_ready[c].index(buffer), phase)
            b_scores = warpgroup_mma(b_q[c], b_rows[c].index(buffer).permute((1, 0)), b_scores, is_async=True)
        b_scores = warpgroup_mma_wait(0, deps=(b_scores,))
        if start + TILE > all_see:
            b_scores = gl.where((start + o_row)[None, :] < b_seen[:, None], b_scores, float("-inf"))
        b_most = gl.max(b_scores, 1)
        b_new = gl.where((b_most - b_max) * scale > TAU, b_most, b_max)
        b_by = gl.exp2((b_max - b_new) * scale)
        b_p = gl.exp2(b_scores * scale - (b_new * scale)[:, None])
        mbarrier.wait(b_free, (i & 1) ^ 1)  # the weights before were used
        b_weights.store(b_p.to(gl.bfloat16))
        b_keep.store(b_by)
        fence_async_shared()  # each thread's writes, before the barrier: for the products of others
        gl.thread_barrier()
        mbarrier.arrive(b_full, count=1)
        b_sum = b_sum * b_by[:, None] + b_p
        b_max = b_new
    b_total = gl.sum(b_sum, 1)
    b_some = b_total > 0
    b_total = gl.where(b_some, b_total, 1.0)
    b_lse = gl.where(b_some, b_max * scale + gl.log2(b_total), float("-inf"))
    gl.store(p_lse + o_query * splits, b_lse, mask=o_query < TOKENS * HEADS)
    mbarrier.wait(b_free, (tiles & 1) ^ 1)
    b_keep.store(1.0 / b_total)
    gl.thread_barrier()
    mbarrier.arrive(b_full, count=1)


@gluon.jit
def _mix(
    d_rows, d_keys, d_part, b_rows, b_keys, b_ready, b_keys_ready, b_weights, b_keep, b_full, b_free, p_table,
    first, last, i_split, i_tile, i_batch,
):  # fmt: skip
    """Sums values by their weights, and loads the next tile but one where a tile was."""
    MIXED: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, WIDTH // 2, 16])
    QUERY: gl.constexpr = gl.SliceLayout(1, MIXED)
    WHOLE: gl.constexpr = gl.DistributedLinearLayout(  # all 64 rows at every warp
        [[32]], [[1], [2], [4], [8], [16]], [[0], [0], [0]], [], [64]
    )
    COPY: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0])
    tiles = gl.cdiv(last - first, TILE)
    b_mixed = gl.tuple([])
    for _ in gl.static_range(CHUNKS):
        b_mixed += (gl.zeros([TILE, WIDTH], gl.float32, MIXED),)
    for i in range(tiles):
        buffer, phase = i & 1, (i >> 1) & 1
        start = first + i * TILE
        slot = gl.load(p_table + gl.minimum(i + 2, tiles - 1)) * TILE
        for c in gl.static_range(CHUNKS):
            mbarrier.wait(b_ready[c].index(buffer), phase)
        if start + TILE > last:
            # What lies behind the last row may be no number, which no weight of 0 undoes. Its scores, that may be being
            # made of either, are masked
            inside = start + gl.arange(0, TILE, gl.SliceLayout(1, COPY)) < last
            for c in gl.static_range(CHUNKS):
                for k in gl.static_range(WIDTH // 64):
                    b_piece = b_rows[c].index(buffer).slice(64 * k, 64, dim=1)
                    b_piece.store(gl.where(inside[:, None], b_piece.load(COPY), 0.0))
            fence_async_shared()
            gl.thread_barrier()
        mbarrier.wait(b_full, i & 1)
        changed = gl.max((b_keep.load(WHOLE) != 1.0).to(gl.int32), 0)
        if changed > 0:  # in every warp or in none
            b_by = b_keep.load(QUERY)[:, None]
            b_scaled = gl.tuple([])
            for c in gl.static_range(CHUNKS):
                b_scaled += (b_mixed[c] * b_by,)
            b_mixed = b_scaled
        b_next, b_done = gl.tuple([]), gl.tuple([])
        for c in gl.static_range(CHUNKS):
            b_next += (warpgroup_mma(b_weights, b_rows[c].index(buffer), b_mixed[c], is_async=True),)
        more = i + 2 < tiles
        _expect_tile(b_ready, b_keys_ready, buffer, more)
        for c in gl.static_range(CHUNKS):
            b_done += (warpgroup_mma_wait(CHUNKS - 1 - c, deps=(b_next[c],)),)
            gl.thread_barrier()  # both groups have read the chunk
            if more:
                if c == 0:
                    _load(d_keys, slot, LATENT, b_keys_ready.index(buffer), b_keys.index(buffer))
                _load(d_rows, slot, c * WIDTH, b_ready[c].index(buffer), b_rows[c].index(buffer))
        mbarrier.arrive(b_free, count=1)
        b_mixed = b_done
    mbarrier.wait(b_full, tiles & 1)
    b_by = b_keep.load(QUERY)[:, None]
    for c in gl.static_range(CHUNKS):
        b_stage = b_rows[c]._reinterpret(gl.bfloat16, [1, TILE, 1, WIDTH], STAGE)
        b_stage.store(gl.reshape((b_mixed[c] * b_by).to(gl.bfloat16), [1, TILE, 1, WIDTH]))
        fence_async_shared()
        tma.async_copy_shared_to_global(d_part, [i_batch, i_tile * TILE, i_split, c * WIDTH], b_stage)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["pages", "splits"])
def _decode_hopper_kernel(
    d_q, d_q_rope, d_rows, d_keys, d_part, p_table, p_lengths, p_lse, scale, pages, splits,
    HEADS: gl.constexpr, TOKENS: gl.constexpr, EARLY: gl.constexpr,
):  # fmt: skip
    """One split of one sequence for one tile of query rows. `scale` includes log2(e)."""
    LINE: gl.constexpr = gl.BlockedLayout([1], [32], [8], [0])
    i_split, i_tile, i_batch = gl.program_id(0), gl.program_id(1), gl.program_id(2)

    # Barriers of the copies lie in allocations of their own: Triton has the threads wait between two uses of one
    b_q, b_rows, b_ready = gl.tuple([]), gl.tuple([]), gl.tuple([])
    for _ in gl.static_range(CHUNKS):
        b_q += (gl.allocate_shared_memory(gl.bfloat16, [TILE, WIDTH], SHARED),)
        b_rows += (gl.allocate_shared_memory(gl.bfloat16, [2, TILE, WIDTH], SHARED),)
        b_ready += (gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout()),)
    b_q_rope = gl.allocate_shared_memory(gl.bfloat16, [TILE, ROPE], SHARED)
    b_keys = gl.allocate_shared_memory(gl.bfloat16, [2, TILE, ROPE], SHARED)
    b_weights = gl.allocate_shared_memory(gl.bfloat16, [TILE, TILE], SHARED)
    b_keep = gl.allocate_shared_memory(gl.float32, [TILE], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    b_keys_ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    b_q_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    b_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    b_free = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(b_q_ready, count=1)
    mbarrier.init(b_full, count=1)
    mbarrier.init(b_free, count=1)
    for k in gl.static_range(2):
        mbarrier.init(b_keys_ready.index(k), count=1)
        for c in gl.static_range(CHUNKS):
            mbarrier.init(b_ready[c].index(k), count=1)
    fence_async_shared()  # the copy engine must see them initialised

    i_query = i_batch * TOKENS * HEADS + i_tile * TILE  # behind a sequence's last query lie the next one's, or zeros
    wait_for_inputs(EARLY)
    length = gl.load(p_lengths + i_batch)
    mbarrier.expect(b_q_ready, TILE * (LATENT + ROPE) * 2)
    _load(d_q_rope, i_query, LATENT, b_q_ready, b_q_rope)
    for c in gl.static_range(CHUNKS):
        _load(d_q, i_query, c * WIDTH, b_q_ready, b_q[c])
    share = gl.maximum(gl.cdiv(gl.cdiv(length, splits), TILE), 1) * TILE  # by the length there is, so that short
    first = i_split * share  # sequences use all splits too; no tile crosses a page
    last = gl.minimum(first + share, length)
    p_lse += i_batch.to(gl.int64) * TOKENS * HEADS * splits + i_split
    if first >= last:
        mbarrier.wait(b_q_ready, 0)  # nothing may be on its way to a program that has ended
        o_query = i_tile * TILE + gl.arange(0, TILE, LINE)
        b_none = gl.full([TILE], float("-inf"), gl.float32, LINE)
        gl.store(p_lse + o_query * splits, b_none, mask=o_query < TOKENS * HEADS)
    else:
        more = last - first > TILE
        p_table += i_batch * pages + first // TILE
        slot = gl.load(p_table) * TILE
        slot_1 = gl.load(p_table + more.to(gl.int32)) * TILE
        _expect_tile(b_ready, b_keys_ready, 0, True)
        _expect_tile(b_ready, b_keys_ready, 1, more)
        gl.thread_barrier()
        go = first >= 0  # always; what was measured has it
        _load_tile(d_rows, d_keys, b_rows, b_keys, b_ready, b_keys_ready, slot, 0, go)
        _load_tile(d_rows, d_keys, b_rows, b_keys, b_ready, b_keys_ready, slot_1, 1, more)
        gl.warp_specialize(
            [
                (_mix, (
                    d_rows, d_keys, d_part, b_rows, b_keys, b_ready, b_keys_ready, b_weights, b_keep, b_full, b_free,
                    p_table, first, last, i_split, i_tile, i_batch,
                )),
                (_weigh, (
                    b_q, b_q_rope, b_q_ready, b_rows, b_keys, b_ready, b_keys_ready, b_weights, b_keep, b_full, b_free,
                    p_lse, scale, first, last, length, splits, i_tile, HEADS, TOKENS,
                )),
            ],
            [4], [128],
        )  # fmt: skip


def decode_parts(
    q: Tensor, cache: Tensor, table: Tensor, lengths: Tensor, scale: float, splits: int, part: Tensor, lse: Tensor
) -> None:
    """Writes each split's own result to `part [B·T·H, splits, C]`, bfloat16, and the base-2 logarithm of its sum of weights
    to `lse [B·T·H, splits]`, float32: -inf where a split has no rows, whose result is not written then.

    `q`, `cache`, `table`, `lengths` as `mla_decode` has them, with C = 512, R = 64, and `scale` above 0. Raises `ValueError`
    naming the argument that doesn't fit.
    """
    batch, tokens, heads = _check(q, cache, table, lengths, scale, splits, part, lse)
    rows, parts = q.view(batch * tokens * heads, -1), part.view(batch, tokens * heads, splits, -1)
    _decode_hopper_kernel[splits, triton.cdiv(tokens * heads, TILE.value), batch](
        TensorDescriptor.from_tensor(rows, [TILE.value, WIDTH.value], SHARED.value),
        TensorDescriptor.from_tensor(rows, [TILE.value, ROPE.value], SHARED.value),
        TensorDescriptor.from_tensor(cache, [TILE.value, WIDTH.value], SHARED.value),
        TensorDescriptor.from_tensor(cache, [TILE.value, ROPE.value], SHARED.value),
        TensorDescriptor.from_tensor(parts, [1, TILE.value, 1, WIDTH.value], STAGE.value),
        table, lengths, lse, scale * LOG2_E, table.shape[1], splits,
        HEADS=heads, TOKENS=tokens, num_warps=NUM_WARPS, **early(q.device),
    )  # fmt: skip


def _check(
    q: Tensor, cache: Tensor, table: Tensor, lengths: Tensor, scale: float, splits: int, part: Tensor, lse: Tensor
) -> tuple[int, int, int]:
    width = LATENT.value + ROPE.value
    if q.dim() != 4 or q.dtype != torch.bfloat16 or not q.is_contiguous() or q.shape[3] != width:
        raise ValueError(f"`q` must be contiguous bfloat16 [B, T, H, {width}], not {q.dtype} {q.shape}.")
    batch, tokens, heads, _ = q.shape
    if cache.dim() != 2 or cache.dtype != q.dtype or not cache.is_contiguous() or cache.shape[1] != width:
        raise ValueError(f"`cache` must be contiguous {q.dtype} [slots, {width}], not {cache.dtype} {cache.shape}.")
    for name, value, shape in (("table", table, (batch, -1)), ("lengths", lengths, (batch,))):
        fitting = value.dim() == len(shape) and value.shape[0] == batch and value.numel() > 0
        if not fitting or value.dtype != torch.int32 or not value.is_contiguous():
            raise ValueError(f"`{name}` must be contiguous int32 {list(shape)}, not {value.dtype} {value.shape}.")
    if scale <= 0:
        raise ValueError(f"`scale` must be above 0, not {scale}: the largest product has to give the largest score.")
    parts = (batch * tokens * heads, splits)
    whole = (*parts, LATENT.value)
    if part.shape != whole or part.dtype != q.dtype or not part.is_contiguous():
        raise ValueError(f"`part` must be contiguous {q.dtype} {whole}, not {part.dtype} {part.shape}.")
    if lse.shape != parts or lse.dtype != torch.float32 or not lse.is_contiguous():
        raise ValueError(f"`lse` must be contiguous float32 {parts}, not {lse.dtype} {lse.shape}.")
    for name, value in (("q", q), ("cache", cache), ("part", part)):
        if value.data_ptr() % 16:
            raise ValueError(f"`{name}` must start at a multiple of 16 bytes, for the copy engine.")
    return batch, tokens, heads


def compile_cases(capability: int = 90) -> Iterator[CompileCase]:
    """Kimi-K2 and Moonlight, 1 to 8 tokens. None for a GPU that `fits` has not."""
    if not fits(LATENT.value, ROPE.value, capability, torch.bfloat16):
        return
    wide, narrow = (f"tensordesc<bf16[{TILE.value}, {w.value}],{SHARED.value!r}>" for w in (WIDTH, ROPE))
    part = f"tensordesc<bf16[1, {TILE.value}, 1, {WIDTH.value}],{STAGE.value!r}>"
    for (model, heads), tokens in ((m, t) for m in (("k2", 64), ("moonlight", 16)) for t in (1, 2, 4, 8)):
        constants = {"HEADS": heads, "TOKENS": tokens, "EARLY": True}
        signature = {"d_q": wide, "d_q_rope": narrow, "d_rows": wide, "d_keys": narrow, "d_part": part, "p_table": "*i32",
                     "p_lengths": "*i32", "p_lse": "*fp32", "scale": "fp32", "pages": "i32", "splits": "i32"}  # fmt: skip
        signature |= dict.fromkeys(constants, "constexpr")
        name = f"mla_decode_hopper-{model}-{tokens}"
        yield CompileCase(name, _decode_hopper_kernel, signature, constants, NUM_WARPS, num_stages=1, decode=True)
