"""What lies between the projections and attention, in one launch: the query's rotation, the latent's norm, the shared
key's rotation, and the finished row in the KV cache.

Twin: `reference.rms_norm` and `reference.rope`, then a row assignment. Budget for one token of Kimi-K2, computed: 64
heads of 64 rotated channels read and written (16.4 KB) and one row of 576 (2.3 KB) take 4 ns at 4.3 TB/s. One token is
latency alone, which is why it is one launch; 4,096 tokens are 77 MB and 18 µs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from thinkloop.kernels.compile_case import POINTERS, CompileCase
from thinkloop.kernels.rms_norm import normed
from thinkloop.kernels.target import HOPPER, Chip, early, starts_early, wait_for_inputs
from torch import Tensor

MAX_LATENT = 8192
"""A latent is held in registers whole."""


@dataclass(frozen=True, slots=True)
class RopeTiles:
    """Programs of a token: one for its row, and one for each `heads` heads of its query."""

    latent: int
    rotated: int
    heads: int
    programs: int
    num_warps: int = 4


def rope_tiles(heads: int, latent: int, rotated: int) -> RopeTiles:
    """About 1,024 rotated channels a program, 8 (one 16-byte load) a thread: K2's 64 heads are 4 programs."""
    width = triton.next_power_of_2(rotated)
    block = min(max(1024 // width, 1), triton.next_power_of_2(heads))
    return RopeTiles(triton.next_power_of_2(latent), width, block, programs=1 + triton.cdiv(heads, block))


@triton.jit
def rotated_pairs(b_x, b_turn, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """`b_x [ROWS, WIDTH]` with each pair turned by `b_turn [WIDTH]`, which holds cosine and sine by turns."""
    b_even, b_odd = tl.split(tl.reshape(b_x.to(tl.float32), [ROWS, WIDTH // 2, 2]))
    b_cos, b_sin = tl.split(tl.reshape(b_turn, [1, WIDTH // 2, 2]))
    b_pairs = tl.join(b_even * b_cos - b_odd * b_sin, b_even * b_sin + b_odd * b_cos)
    return tl.reshape(b_pairs, [ROWS, WIDTH])


@triton.jit
def _rope_and_store_kernel(
    p_q, p_row, p_norm, p_table, p_positions, p_slots, p_cache, s_q_token, s_q_head, s_row, s_table, s_cache, eps,
    HEADS: tl.constexpr, NOPE: tl.constexpr, LATENT: tl.constexpr, ROTATED: tl.constexpr,
    BLOCK_HEADS: tl.constexpr, BLOCK_LATENT: tl.constexpr, BLOCK_ROTATED: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(EARLY)
    i_token, i_part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(p_slots + i_token).to(tl.int64)
    position = tl.load(p_positions + i_token).to(tl.int64)
    o_channel = tl.arange(0, BLOCK_ROTATED)
    rotates = o_channel < ROTATED
    used = slot >= 0
    p_turn = p_table + position * s_table + o_channel  # only followed where `used`
    # Each branch asks for its data first: it is then under way while position and table, one after the other, come in.
    if i_part == 0:
        p_from, p_to = p_row + i_token * s_row, p_cache + slot * s_cache
        o_latent = tl.arange(0, BLOCK_LATENT)
        b_latent = tl.load(p_from + o_latent, mask=o_latent < LATENT, other=0.0).to(tl.float32)
        b_key = tl.load(p_from + LATENT + o_channel, mask=rotates, other=0.0)
        if p_norm is not None:
            b_norm = tl.load(p_norm + o_latent, mask=o_latent < LATENT, other=0.0).to(tl.float32)
        b_turn = tl.load(p_turn, mask=rotates & used, other=0.0)
        b_latent = normed(b_latent, eps, LATENT).to(p_cache.dtype.element_ty)
        if p_norm is not None:
            b_latent = (b_latent.to(tl.float32) * b_norm).to(p_cache.dtype.element_ty)
        b_key = tl.reshape(rotated_pairs(b_key, b_turn, 1, BLOCK_ROTATED), [BLOCK_ROTATED])
        tl.store(p_to + o_latent, b_latent, mask=(o_latent < LATENT) & used)
        tl.store(p_to + LATENT + o_channel, b_key.to(p_cache.dtype.element_ty), mask=rotates & used)
    else:
        o_head = (i_part - 1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
        p_pairs = p_q + i_token * s_q_token + o_head[:, None] * s_q_head + NOPE + o_channel[None, :]
        inside = (o_head[:, None] < HEADS) & rotates[None, :]
        b_pairs = tl.load(p_pairs, mask=inside, other=0.0)
        b_turn = tl.load(p_turn, mask=rotates & used, other=0.0)
        b_pairs = rotated_pairs(b_pairs, b_turn, BLOCK_HEADS, BLOCK_ROTATED)
        tl.store(p_pairs, b_pairs.to(p_q.dtype.element_ty), mask=inside & used)


def rope_and_store(
    q: Tensor, row: Tensor, kv_norm: Tensor | None, eps: float, table: Tensor, positions: Tensor, slots: Tensor,
    cache: Tensor,
) -> None:  # fmt: skip
    """Rotates `q [T, H, N+R]` in place on its last R channels and writes each token's finished row into `cache [S, C+R]`.

    `row [T, C+R]` holds the raw latent and the unrotated shared key; its rows, and those of `q`, may be slices of a
    wider tensor. The latent is normed (`reference.rms_norm` with weight `kv_norm [C]` and `eps`), the key and the query
    are turned (`reference.rope`) by row `positions[t]` of `table`: complex64 `[P, R/2]`, or its float32 view
    `[P, R/2, 2]`. The row goes to `slots[t]`, which no other token of the call may have; a token at slot -1 is padding,
    of which nothing is changed and no position is looked up. `positions` and `slots` are int32 or int64 `[T]` on the
    device and aren't checked against P and S. Raises `ValueError` naming the argument that doesn't fit.
    """
    if table.dtype == torch.complex64:
        table = torch.view_as_real(table)
    check_rows(q, row, kv_norm, table, positions, slots, cache)
    tokens, heads, channels = q.shape
    if tokens == 0:
        return
    rotated = 2 * table.shape[1]
    latent = row.shape[1] - rotated
    tiles = rope_tiles(heads, latent, rotated)
    _rope_and_store_kernel[(tokens, tiles.programs)](
        q, row, kv_norm, table, positions, slots, cache, q.stride(0), q.stride(1), row.stride(0), table.stride(0),
        cache.stride(0), eps, HEADS=heads, NOPE=channels - rotated, LATENT=latent, ROTATED=rotated,
        BLOCK_HEADS=tiles.heads, BLOCK_LATENT=tiles.latent, BLOCK_ROTATED=tiles.rotated,
        num_warps=tiles.num_warps, **early(q.device),
    )  # fmt: skip


def check_rows(
    q: Tensor, row: Tensor, kv_norm: Tensor | None, table: Tensor, positions: Tensor, slots: Tensor, cache: Tensor
) -> None:
    if table.dim() != 3 or table.dtype != torch.float32 or table.shape[2] != 2 or not table[:1].is_contiguous():
        raise ValueError(f"`table` must be complex64 [P, R/2] or float32 [P, R/2, 2], not {table.dtype} {table.shape}.")
    rotated = 2 * table.shape[1]
    if q.dim() != 3 or q.dtype not in POINTERS or q.shape[2] < rotated or q.stride(2) != 1:
        raise ValueError(f"`q` must be float [T, H, N+{rotated}] with adjacent channels, not {q.dtype} {q.shape}.")
    tokens = q.shape[0]
    if row.dim() != 2 or row.shape[0] != tokens or row.dtype != q.dtype or row.stride(1) != 1:
        raise ValueError(f"`row` must be {q.dtype} [{tokens}, C+{rotated}], not {row.dtype} {row.shape}.")
    latent = row.shape[1] - rotated
    if not 1 <= latent <= MAX_LATENT:
        raise ValueError(f"`row` must have 1 to {MAX_LATENT} channels before the last {rotated}, not {latent}.")
    if kv_norm is not None and (kv_norm.shape != (latent,) or kv_norm.dtype != q.dtype or not kv_norm.is_contiguous()):
        raise ValueError(f"`kv_norm` must be contiguous {q.dtype} [{latent}], not {kv_norm.dtype} {kv_norm.shape}.")
    if cache.dim() != 2 or cache.shape[1] != row.shape[1] or cache.dtype != q.dtype or cache.stride(1) != 1:
        raise ValueError(f"`cache` must be {q.dtype} [S, {row.shape[1]}], not {cache.dtype} {cache.shape}.")
    for name, index in (("positions", positions), ("slots", slots)):
        if index.shape != (tokens,) or index.dtype not in (torch.int32, torch.int64) or not index.is_contiguous():
            raise ValueError(f"`{name}` must be contiguous int32 or int64 [{tokens}], not {index.dtype} {index.shape}.")


def compile_cases(capability: int = 90) -> list[CompileCase]:
    """Kimi-K2 and Moonlight."""
    return [_case("rope_cache-k2", 64, capability), _case("rope_cache-moonlight", 16, capability)]


def _case(name: str, heads: int, capability: int) -> CompileCase:
    nope, latent, rotated = 128, 512, 64
    tiles = rope_tiles(heads, latent, rotated)
    constexprs = {
        "HEADS": heads, "NOPE": nope, "LATENT": latent, "ROTATED": rotated, "BLOCK_HEADS": tiles.heads,
        "BLOCK_LATENT": tiles.latent, "BLOCK_ROTATED": tiles.rotated, "EARLY": starts_early(Chip(capability, HOPPER.sms)),
    }  # fmt: skip
    signature = dict.fromkeys(["p_q", "p_row", "p_norm"], POINTERS[torch.bfloat16])
    signature |= {"p_table": "*fp32", "p_positions": "*i64", "p_slots": "*i64", "p_cache": POINTERS[torch.bfloat16]}
    signature |= dict.fromkeys(["s_q_token", "s_q_head", "s_row", "s_table", "s_cache"], "i32") | {"eps": "fp32"}
    signature |= dict.fromkeys(constexprs, "constexpr")
    return CompileCase(name, _rope_and_store_kernel, signature, constexprs, tiles.num_warps, num_stages=1, decode=True)
