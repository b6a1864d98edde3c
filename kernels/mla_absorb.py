"""What lies between a decode step's projections and latent attention, in one launch: the absorption of the queries into the
latent space, their rotation, and the finished row in the KV cache.

Twin: the first product of `reference.mla_absorbed`, `reference.rope`, and what `rope_and_store` writes. Budget for Kimi-K2,
computed: `w_uk` is 8.4 MB a layer, 2.0 µs at 4.3 TB/s whatever the tokens (1 to 32), beside which one token's query
(25 KB), result (74 KB) and row (2 KB) are nothing; Moonlight's is 2.1 MB, 0.5 µs. No kernel writes `w_uk`: it is asked for
before the kernel ahead has ended, so that one round from the query to the result is left, about 1 µs.

A program holds one head's tile of `w_uk` for all tokens. The product is turned, `w_uk[h]ᵀ · qᵀ`, so that the channels are
the 64 rows of a warp group's matrix instruction and the tokens, padded to 16, its columns: about 180 instructions a thread
by 8 warps for 128 channels, where products added up without the tensor cores take 530 by 4 warps for one token, 770 for two.
A token's result doesn't depend on how many others there are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from thinkloop.kernels.compile_case import POINTERS, CompileCase
from thinkloop.kernels.rms_norm import normed
from thinkloop.kernels.rope_cache import check_rows, rotated_pairs
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
"""A program has all tokens, so that `w_uk` is read once; above it a plain product is as good."""
_COLUMNS = (128, 64, 32, 16)
"""Widths a tile may have. Not measured."""


@dataclass(frozen=True, slots=True)
class AbsorbTiles:
    """Channels of the latent and (padded) tokens of a program; `heads` whose rotation is one program, and how many programs
    a token has for that and its row; warps."""

    columns: int
    tokens: int
    heads: int
    parts: int
    num_warps: int


def absorb_tiles(tokens: int, heads: int, latent: int, rotated: int, sm_count: int) -> AbsorbTiles:
    """The widest tile with which the busiest SM reads least: K2's 64 heads give 256 programs of 128 channels (two an SM),
    Moonlight's 16 give 128 of 64 (one), where 64 of 128 would leave half of the SMs without. A warp for every 16 channels,
    so that a warp group has the 64 of its matrix instruction; 8 rotated channels a thread."""
    widths = [width for width in _COLUMNS if width <= latent]
    columns = min(widths, key=lambda width: -(-heads * (latent // width) // sm_count) * width)
    warps = max(columns // 16, 4)
    block = min(max(256 * warps // rotated, 1), triton.next_power_of_2(heads))
    return AbsorbTiles(columns, 16 if tokens <= 16 else 32, block, 1 + triton.cdiv(heads, block), warps)


@triton.jit(do_not_specialize=["tokens"])
def _absorb_kernel(
    p_q, p_row, p_norm, p_table, p_positions, p_slots, p_cache, p_weight, p_out, s_q_token, s_q_head, s_row, s_table,
    s_cache, eps, tokens,
    HEADS: tl.constexpr, NOPE: tl.constexpr, LATENT: tl.constexpr, ROTATED: tl.constexpr, COLUMNS: tl.constexpr,
    TOKENS: tl.constexpr, BLOCK_HEADS: tl.constexpr, PARTS: tl.constexpr, EARLY: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """First the programs of the rows and rotations, which read position, table and data one after the other."""
    WIDTH: tl.constexpr = LATENT + ROTATED
    i_program = tl.program_id(0)
    if i_program < tokens * PARTS:
        i_token, i_part = (i_program // PARTS).to(tl.int64), i_program % PARTS
        o_channel, o_latent = tl.arange(0, ROTATED), tl.arange(0, LATENT)
        if i_part == 0:
            if p_norm is not None:
                b_norm = tl.load(p_norm + o_latent).to(tl.float32)
            wait_for_inputs(EARLY)
            slot = tl.load(p_slots + i_token).to(tl.int64)
            position = tl.load(p_positions + i_token).to(tl.int64)
            p_from = p_row + i_token * s_row
            b_latent = tl.load(p_from + o_latent).to(tl.float32)
            b_key = tl.load(p_from + LATENT + o_channel)
            used = slot >= 0
            b_turn = tl.load(p_table + position * s_table + o_channel, mask=used, other=0.0)
            b_latent = normed(b_latent, eps, LATENT).to(p_cache.dtype.element_ty)
            if p_norm is not None:
                b_latent = (b_latent.to(tl.float32) * b_norm).to(p_cache.dtype.element_ty)
            b_key = tl.reshape(rotated_pairs(b_key, b_turn, 1, ROTATED), [ROTATED]).to(p_cache.dtype.element_ty)
            tl.store(p_cache + slot * s_cache + o_latent, b_latent, mask=used)
            tl.store(p_cache + slot * s_cache + LATENT + o_channel, b_key, mask=used)
        else:
            wait_for_inputs(EARLY)
            slot = tl.load(p_slots + i_token).to(tl.int64)
            position = tl.load(p_positions + i_token).to(tl.int64)
            o_head = (i_part - 1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
            inside = o_head[:, None] < HEADS
            p_pairs = p_q + i_token * s_q_token + o_head[:, None] * s_q_head + NOPE + o_channel[None, :]
            b_pairs = tl.load(p_pairs, mask=inside, other=0.0)
            used = slot >= 0
            b_turn = tl.load(p_table + position * s_table + o_channel, mask=used, other=0.0)
            b_pairs = tl.where(used, rotated_pairs(b_pairs, b_turn, BLOCK_HEADS, ROTATED), 0.0)
            p_to = p_out + (i_token * HEADS + o_head[:, None]) * WIDTH + LATENT + o_channel[None, :]
            tl.store(p_to, cast(b_pairs, p_out.dtype.element_ty, INTERPRET), mask=inside)
    else:
        i_tile = i_program - tokens * PARTS
        TILES: tl.constexpr = LATENT // COLUMNS
        SHARE: tl.constexpr = NOPE * COLUMNS  # of a head's weights, which lie together
        prefetch(p_weight + i_tile.to(tl.int64) * SHARE, SHARE * 2, EARLY)
        tl.debug_barrier()  # or the assembler puts it after the loads, of which it holds half in flight
        i_head, o_column = i_tile // TILES, i_tile % TILES * COLUMNS + tl.arange(0, COLUMNS)
        o_nope, o_token = tl.arange(0, NOPE), tl.arange(0, TOKENS)
        p_head = p_weight + i_head.to(tl.int64) * NOPE * LATENT
        b_weight = tl.load(p_head + o_nope[:, None] * LATENT + o_column[None, :])
        wait_for_inputs(EARLY)
        real = o_token < tokens
        b_slot = tl.load(p_slots + o_token, mask=real, other=-1)
        p_nope = p_q + i_head * s_q_head + o_token[:, None] * s_q_token + o_nope[None, :]
        b_q = tl.load(p_nope, mask=real[:, None], other=0.0)
        b_q = tl.where((b_slot >= 0)[:, None], b_q, 0.0)  # padding may be no number
        b_out = tl.trans(dot(tl.trans(b_weight), tl.trans(b_q), INTERPRET))
        p_to = p_out + (o_token[:, None] * HEADS + i_head) * WIDTH + o_column[None, :]
        tl.store(p_to, cast(b_out, p_out.dtype.element_ty, INTERPRET), mask=real[:, None])


def absorb_and_store(
    q: Tensor, row: Tensor, kv_norm: Tensor | None, eps: float, table: Tensor, positions: Tensor, slots: Tensor,
    cache: Tensor, w_uk: Tensor,
) -> Tensor:  # fmt: skip
    """Absorbed, rotated queries, bfloat16 `[T, H, C+R]`; and each token's finished row is written into `cache [S, C+R]`.

    The first C channels are `q [T, H, N+R]`'s first N times `w_uk [H, N, C]`, the others its last R, turned. `q` is not
    changed. `row [T, C+R]` and the others mean what they do for `rope_and_store`, and the cache's rows are the same; all
    floats are bfloat16 here, T is at most 32, and N, C and R are powers of two from 16 up. A token at slot -1 is padding:
    its row isn't written, its queries are zeros. Raises `ValueError` naming the argument that doesn't fit.
    """
    if table.dtype == torch.complex64:
        table = torch.view_as_real(table)
    _check(q, row, kv_norm, table, positions, slots, cache, w_uk)
    tokens, heads = q.shape[:2]
    nope, latent, turned = w_uk.shape[1], w_uk.shape[2], 2 * table.shape[1]
    out = torch.empty(tokens, heads, latent + turned, dtype=q.dtype, device=q.device)
    if tokens == 0:
        return out
    target = chip(q.device)
    tiles = absorb_tiles(tokens, heads, latent, turned, target.sms)
    _absorb_kernel[(tokens * tiles.parts + heads * (latent // tiles.columns),)](
        q, row, kv_norm, table, positions, slots, cache, w_uk, out, q.stride(0), q.stride(1), row.stride(0),
        table.stride(0), cache.stride(0), eps, tokens, **_constants(heads, nope, latent, turned, tiles, target),
        num_warps=tiles.num_warps, num_stages=1, **launch_early(q.device),
    )  # fmt: skip
    return out


def _constants(heads: int, nope: int, latent: int, rotated: int, tiles: AbsorbTiles, target: Chip) -> dict[str, int]:
    return {
        "HEADS": heads, "NOPE": nope, "LATENT": latent, "ROTATED": rotated, "COLUMNS": tiles.columns,
        "TOKENS": tiles.tokens, "BLOCK_HEADS": tiles.heads, "PARTS": tiles.parts, "EARLY": starts_early(target),
        "INTERPRET": INTERPRET,
    }  # fmt: skip


def _check(
    q: Tensor, row: Tensor, kv_norm: Tensor | None, table: Tensor, positions: Tensor, slots: Tensor, cache: Tensor,
    w_uk: Tensor,
) -> None:  # fmt: skip
    check_rows(q, row, kv_norm, table, positions, slots, cache)
    if q.dtype != torch.bfloat16 or q.shape[0] > MAX_ROWS:
        raise ValueError(f"`q` must be bfloat16 with at most {MAX_ROWS} tokens, not {q.dtype} {q.shape}.")
    rotated = 2 * table.shape[1]
    shape = (q.shape[1], q.shape[2] - rotated, row.shape[1] - rotated)
    fits = w_uk.shape == shape and w_uk.dtype == q.dtype and w_uk.is_contiguous() and w_uk.data_ptr() % 16 == 0
    if not fits:  # bulk prefetches begin at 16 bytes
        raise ValueError(f"`w_uk` must be contiguous, aligned {q.dtype} {list(shape)}, not {w_uk.dtype} {w_uk.shape}.")
    for name, width in (("table", rotated), ("q", shape[1]), ("row", shape[2])):
        if width < 16 or width & width - 1:
            raise ValueError(f"`{name}` must give N, C and R that are powers of two from 16 up, not {width}.")


def compile_cases(capability: int = 90) -> Iterator[CompileCase]:
    """Kimi-K2 and Moonlight, up to 16 and up to 32 tokens: how many there are is no constant of the kernel."""
    nope, latent, rotated, target = 128, 512, 64, Chip(capability, HOPPER.sms)
    for (model, heads), tokens in ((m, t) for m in (("k2", 64), ("moonlight", 16)) for t in (16, 32)):
        tiles = absorb_tiles(tokens, heads, latent, rotated, target.sms)
        constants = _constants(heads, nope, latent, rotated, tiles, target)
        floats, index = POINTERS[torch.bfloat16], "*i64"
        signature = dict.fromkeys(["p_q", "p_row", "p_norm"], floats) | {"p_table": "*fp32", "p_positions": index}
        signature |= {"p_slots": index, "p_cache": floats, "p_weight": floats, "p_out": floats}
        signature |= dict.fromkeys(["s_q_token", "s_q_head", "s_row", "s_table", "s_cache"], "i32")
        signature |= {"eps": "fp32", "tokens": "i32"} | dict.fromkeys(constants, "constexpr")
        name = f"mla_absorb-{model}-{tokens}"
        yield CompileCase(name, _absorb_kernel, signature, constants, tiles.num_warps, num_stages=1, decode=True)
