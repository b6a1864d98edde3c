"""Which (token, expert) pairs share a block when there are many: sorted by expert, in two small kernels, without a wait.

Budget, computed: 16 tokens of K2 (128 pairs) read 2.7 GB of experts, 633 µs at 4.3 TB/s; 4,096 tokens (32,768 pairs) cost
2.9 TFLOP. Here each of E programs reads all pairs twice from L2: 2 · 384 · 256 KB = 0.2 GB at 4,096 tokens, int64 ids.
That is two launches where sorting and padding in torch are a dozen. A block is a range of the sorted pairs.
A block without pairs has expert -1; the number of blocks is bounded from the shapes, so the host never waits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from thinkloop.kernels.compile_case import CompileCase
from thinkloop.kernels.target import Chip, early, starts_early, wait_for_inputs
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Tiles:
    """One program's tile: `rows` of the matrix times `tokens`, `features` at a time in a pipeline of `stages`."""

    tokens: int
    rows: int
    features: int
    stages: int

    @property
    def warps(self) -> int:
        """Warps of a program: each has 16 rows, a tensor core instruction's."""
        return self.rows // 16


def uses_grouped(tokens: int, experts: int, top_k: int) -> bool:
    """Whether to sort: when more than a quarter as many pairs as experts make shared experts common (K2: 13 tokens and
    more; Moonlight: 3). At 12 tokens of K2 96 pairs touch 86 experts (computed, uniform routing)."""
    return 4 * tokens * top_k > experts


def grouped_tiles(tokens: int, experts: int, top_k: int) -> Tiles:
    """Tiles of the grouped path: the fewest tokens that hold one and a half times an expert's mean, so that few experts need a
    second block (512 tokens of K2: 3.5 ms in blocks of 16, 3.9 of 32, 4.8 of 64). From 64 on, products set the time: two warp
    groups share the activations."""
    mean = tokens * top_k / experts
    block = next((size for size in (8, 16, 32, 64) if 2 * size >= 3 * mean), 128)
    if block >= 64:
        return Tiles(block, rows=128, features=128, stages=4)
    return Tiles(block, 64, 256 if block == 8 else 128, stages=4)


def max_blocks(pairs: int, experts: int, block: int) -> int:
    """The most blocks that `pairs` can need: `Σ ⌈n_e/block⌉` is largest with one pair over in every expert touched."""
    return (pairs + min(experts, pairs) * (block - 1)) // block


@triton.jit(do_not_specialize=["pairs"])
def _sort_kernel(
    p_ids, p_order, p_ranges, pairs, EXPERTS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, EARLY: tl.constexpr
):  # fmt: skip
    """Program e writes the pairs that chose expert e, in order, after those of the experts before it."""
    wait_for_inputs(EARLY)
    i_expert = tl.program_id(0)
    o_chunk = tl.arange(0, CHUNK)
    b_before = tl.zeros([CHUNK], tl.int32)
    b_count = tl.zeros([CHUNK], tl.int32)
    for i_chunk in range(CHUNKS):
        o_pair = i_chunk * CHUNK + o_chunk
        b_ids = tl.load(p_ids + o_pair, mask=o_pair < pairs, other=EXPERTS)
        b_before += (b_ids < i_expert).to(tl.int32)
        b_count += (b_ids == i_expert).to(tl.int32)
    first = tl.sum(b_before)
    end = first + tl.sum(b_count)
    tl.store(p_ranges + i_expert, first)
    tl.store(p_ranges + EXPERTS + i_expert, end)
    for i_chunk in range(CHUNKS):
        o_pair = i_chunk * CHUNK + o_chunk
        b_ids = tl.load(p_ids + o_pair, mask=o_pair < pairs, other=EXPERTS)
        b_mine = (b_ids == i_expert).to(tl.int32)
        b_rank = tl.cumsum(b_mine) - 1
        tl.store(p_order + first + b_rank, o_pair, mask=b_mine > 0)
        first += tl.sum(b_mine)


@triton.jit
def _blocks_kernel(
    p_ranges, p_blocks, EXPERTS: tl.constexpr, EXPERTS_PAD: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr
):  # fmt: skip
    """Program b writes block b: its expert or -1, its first pair, and the end of that expert's pairs."""
    wait_for_inputs(EARLY)
    i_block = tl.program_id(0)
    blocks = tl.num_programs(0)
    o_e = tl.arange(0, EXPERTS_PAD)
    b_first = tl.load(p_ranges + o_e, mask=o_e < EXPERTS, other=0)
    b_end = tl.load(p_ranges + EXPERTS + o_e, mask=o_e < EXPERTS, other=0)
    b_blocks = (b_end - b_first + BLOCK - 1) // BLOCK
    b_after = tl.cumsum(b_blocks)  # blocks of this expert and those before it
    b_within = i_block - (b_after - b_blocks)
    b_mine = (b_within >= 0) & (i_block < b_after)  # true of one expert, or of none
    tl.store(p_blocks + i_block, tl.sum(tl.where(b_mine, o_e + 1, 0)) - 1)
    tl.store(p_blocks + blocks + i_block, tl.sum(tl.where(b_mine, b_first + b_within * BLOCK, 0)))
    tl.store(p_blocks + 2 * blocks + i_block, tl.sum(tl.where(b_mine, b_end, 0)))


def _sort_constants(pairs: int, experts: int) -> dict[str, Any]:
    """Powers of two, so that few variants are compiled."""
    chunk = min(triton.next_power_of_2(pairs), 1024)
    return {"EXPERTS": experts, "CHUNK": chunk, "CHUNKS": triton.next_power_of_2(triton.cdiv(pairs, chunk))}


def group_by_expert(ids: Tensor, experts: int, block: int) -> tuple[Tensor, Tensor]:
    """Sorts the pairs of `ids [T, K]` (int32 or int64, each in `[0, experts)`) by expert, stably, and cuts them into
    blocks of at most `block`.

    Returns `order` int32 `[T·K]`, the pairs' numbers `t·K + k`, and `blocks` int32 `[3, max_blocks]`: the expert (-1:
    no block), the first place in `order`, and the end of the expert's places.
    """
    pairs = ids.numel()
    order = torch.empty(pairs, dtype=torch.int32, device=ids.device)
    ranges = torch.empty(2, experts, dtype=torch.int32, device=ids.device)
    blocks = torch.empty(3, max_blocks(pairs, experts, block), dtype=torch.int32, device=ids.device)
    options = early(ids.device)
    _sort_kernel[(experts,)](ids, order, ranges, pairs, **_sort_constants(pairs, experts), **options)
    _blocks_kernel[(blocks.shape[1],)](
        ranges, blocks, EXPERTS=experts, EXPERTS_PAD=triton.next_power_of_2(experts), BLOCK=block, num_warps=1, **options
    )  # fmt: skip
    return order, blocks


def grouping_cases(pairs: int, experts: int, block: int, target: Chip) -> list[CompileCase]:
    """Both kernels of this file."""
    early = {"EARLY": starts_early(target)}
    sort = _sort_constants(pairs, experts) | early
    cut: dict[str, Any] = {"EXPERTS": experts, "EXPERTS_PAD": triton.next_power_of_2(experts), "BLOCK": block} | early
    sort_signature = {"p_ids": "*i64", "p_order": "*i32", "p_ranges": "*i32", "pairs": "i32"}
    cut_signature = {"p_ranges": "*i32", "p_blocks": "*i32"}
    return [
        CompileCase("sort", _sort_kernel, sort_signature | dict.fromkeys(sort, "constexpr"), sort, 4, 3, False),
        CompileCase("blocks", _blocks_kernel, cut_signature | dict.fromkeys(cut, "constexpr"), cut, 1, 3, False),
    ]
