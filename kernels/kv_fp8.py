"""The latent cache in 8 bits on the device: finished rows packed into it, rows read back for attention with keys and values
written out, and what `mla_decode` reads a tile with.

Format and twins: `kv_rows`. Budget, computed, for Kimi-K2 (C = 512, R = 64) on an H200: a row is 656 bytes instead of 1,152,
so 262,144 tokens take 10.5 GB instead of 18.4 over 61 layers. `store_rows` moves 1.8 KB a token: latency alone, one launch a
layer more. `gather_rows` moves as much for each row that is read: 100,000 rows 181 MB, 42 µs beside the 7.5 ms of the
attention that reads them.

Error, measured: unpacked latents are off by 2.6 % (root mean square of normal values; 6.25 % at most), keys by nothing. On
random rows of K2's shape attention's result moves by 2.8 % where scores have deviation 1, 6.1 % at 4 (against the same rows
in bfloat16). The mini model's logits move by 12 % over pages that it can't foresee, 1.4 % with bfloat16 rows beside float32
ones; of its 335 first choices 85 % stay (99 %). Over the 930 tokens of a run of its own 10 % (1.2 %); of the 165 that it wrote
itself all stay. Models with four scales a row and more layers were not at hand.

Values need the conversion from e4m3 of Hopper and later: `MIN_CAPABILITY`. Before it `mla_decode`'s tile, whose products take
their operands from registers there, spills 2.8 KB a thread.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from thinkloop.kernels.compile_case import CompileCase
from thinkloop.kernels.kv_rows import GROUP, LARGEST, PAGE, row_bytes
from thinkloop.kernels.target import HOPPER, INTERPRET, Chip, cast, early, starts_early, wait_for_inputs
from torch import Tensor

MIN_CAPABILITY = 90
_GATHERED = 16
"""Rows of a program that reads them back: 8 KB of codes, 64 of them a thread."""
_GROUP = tl.constexpr(GROUP)
_LARGEST = tl.constexpr(LARGEST)


@triton.jit
def load_packed(p_rows, o_row, inside, LATENT: tl.constexpr, ROPE: tl.constexpr, INTERPRET: tl.constexpr):
    """bfloat16 latents `[ROWS, LATENT]` and keys `[ROWS, ROPE]` of the packed rows `o_row` behind `p_rows`, 0 where not
    `inside`."""
    ROWS: tl.constexpr = o_row.shape[0]
    GROUPS: tl.constexpr = LATENT // _GROUP
    BYTES: tl.constexpr = LATENT + 4 * GROUPS + 2 * ROPE
    o_latent, o_group, o_rope = tl.arange(0, LATENT), tl.arange(0, GROUPS), tl.arange(0, ROPE)
    mask = inside[:, None]
    b_codes = tl.load(p_rows + o_row[:, None] * BYTES + o_latent[None, :], mask=mask, other=0)
    p_scales = (p_rows + LATENT).to(tl.pointer_type(tl.float32))
    b_scales = tl.load(p_scales + o_row[:, None] * (BYTES // 4) + o_group[None, :], mask=mask, other=0.0)
    p_keys = (p_rows + LATENT + 4 * GROUPS).to(tl.pointer_type(tl.bfloat16))
    b_keys = tl.load(p_keys + o_row[:, None] * (BYTES // 2) + o_rope[None, :], mask=mask, other=0.0)
    b_values = b_codes.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    b_values = tl.reshape(b_values, [ROWS, GROUPS, _GROUP]) * b_scales[:, :, None]
    return cast(tl.reshape(b_values, [ROWS, LATENT]), tl.bfloat16, INTERPRET), b_keys


@triton.jit
def _coded(b_x):
    """The e4m3 code nearest to float32 `b_x`, of at most 448: to even between two. By its bits, since the interpreter cuts
    off here too."""
    b_bits = b_x.to(tl.int32, bitcast=True)
    b_size = b_bits & 0x7FFFFFFF
    b_normal = ((b_size + 0x7FFFF + ((b_size >> 20) & 1)) >> 20) - (120 << 3)  # 20 bits less, exponents 120 apart
    b_small = (tl.abs(b_x) + 16384.0).to(
        tl.int32, bitcast=True
    ) & 0xFF  # below 2^-6 in steps of 2^-9, as floats from 2^14
    return (tl.where(tl.abs(b_x) < 0.015625, b_small, b_normal) | ((b_bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def _store_rows_kernel(p_rows, p_slots, p_cache, s_rows, LATENT: tl.constexpr, ROPE: tl.constexpr, EARLY: tl.constexpr):
    """One token's row."""
    wait_for_inputs(EARLY)
    GROUPS: tl.constexpr = LATENT // _GROUP
    BYTES: tl.constexpr = LATENT + 4 * GROUPS + 2 * ROPE
    i_token = tl.program_id(0).to(tl.int64)
    o_group, o_rope = tl.arange(0, GROUPS), tl.arange(0, ROPE)
    o_latent = o_group[:, None] * _GROUP + tl.arange(0, _GROUP)[None, :]
    slot = tl.load(p_slots + i_token).to(tl.int64)
    p_from, p_to = p_rows + i_token * s_rows, p_cache + slot * BYTES
    b_x = tl.load(p_from + o_latent).to(tl.float32)
    b_key = tl.load(p_from + LATENT + o_rope)
    used = slot >= 0
    b_most = tl.max(tl.where(b_x == b_x, tl.abs(b_x), float("inf")), 1)  # so that no number hides among others
    b_scale = tl.where(b_most > 0, tl.div_rn(b_most, _LARGEST), 1.0)
    b_x = tl.div_rn(b_x, tl.broadcast_to(b_scale[:, None], [GROUPS, _GROUP]))
    b_x = tl.minimum(tl.maximum(tl.where(b_x == b_x, b_x, 0.0), -_LARGEST), _LARGEST)
    tl.store(p_to + o_latent, _coded(b_x), mask=used)
    tl.store((p_to + LATENT).to(tl.pointer_type(tl.float32)) + o_group, b_scale, mask=used)
    tl.store((p_to + LATENT + 4 * GROUPS).to(tl.pointer_type(tl.bfloat16)) + o_rope, b_key, mask=used)


@triton.jit(do_not_specialize=["length"])
def _gather_rows_kernel(
    p_cache, p_table, p_out, length, LATENT: tl.constexpr, ROPE: tl.constexpr, PAGE: tl.constexpr, ROWS: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    BYTES: tl.constexpr = LATENT + 4 * (LATENT // _GROUP) + 2 * ROPE
    start = tl.program_id(0) * ROWS
    o_row, o_latent, o_rope = tl.arange(0, ROWS), tl.arange(0, LATENT), tl.arange(0, ROPE)
    inside = start + o_row < length
    page = tl.load(p_table + start // PAGE).to(tl.int64)
    p_rows = p_cache + (page * PAGE + start % PAGE) * BYTES
    b_rows, b_keys = load_packed(p_rows, o_row, inside, LATENT, ROPE, INTERPRET)
    p_to = p_out + (start + o_row).to(tl.int64)[:, None] * (LATENT + ROPE)
    tl.store(p_to + o_latent[None, :], b_rows, mask=inside[:, None])
    tl.store(p_to + LATENT + o_rope[None, :], b_keys, mask=inside[:, None])


class Stage(NamedTuple):
    """Where a step's finished rows stand in bfloat16 until they are packed: written as if it were the cache."""

    rows: Tensor  # [n, C+R]
    slots: Tensor  # [n], a row of `rows` each, -1 for padding

    @classmethod
    def of(cls, slots: Tensor, width: int) -> Stage:
        """For tokens that go to `slots` of a packed cache. Serves every layer of a step, one after the other."""
        own = torch.arange(len(slots), dtype=slots.dtype, device=slots.device)
        rows = torch.empty(len(slots), width, dtype=torch.bfloat16, device=slots.device)
        return cls(rows, torch.where(slots < 0, slots, own))


def store_rows(rows: Tensor, slots: Tensor, cache: Tensor, latent: int) -> None:
    """Packs `rows [n, C+R]`, bfloat16 with adjacent columns and C = `latent`, each into its slot of uint8
    `cache [slots, row_bytes]`; one with slot -1 is written nowhere and may hold anything.

    `slots [n]` are int32 or int64 and, -1 apart, different. C is a power of two from 128 up, R one from 16 up. Raises
    `ValueError` naming the argument that doesn't fit.
    """
    if rows.dim() != 2 or rows.dtype != torch.bfloat16 or rows.stride(1) != 1 or rows.shape[1] <= latent:
        raise ValueError(
            f"`rows` must be bfloat16 [n, {latent}+R] with adjacent columns, not {rows.dtype} {rows.shape}."
        )
    if slots.shape != rows.shape[:1] or slots.dtype not in (torch.int32, torch.int64) or not slots.is_contiguous():
        raise ValueError(f"`slots` must be contiguous int32 or int64 [{len(rows)}], not {slots.dtype} {slots.shape}.")
    check_packed(cache, latent, rows.shape[1] - latent)
    if len(rows):
        _store_rows_kernel[(len(rows),)](
            rows, slots, cache, rows.stride(0), LATENT=latent, ROPE=rows.shape[1] - latent,
            num_warps=4, **early(rows.device),
        )  # fmt: skip


def gather_rows(cache: Tensor, table: Tensor, length: int, latent: int) -> Tensor:
    """bfloat16 `[length, C+R]`: the first `length` rows of a sequence whose row i is `table[i // 64] * 64 + i % 64` of the
    packed `cache`. `table [pages]` is int32. Raises `ValueError` naming the argument that doesn't fit."""
    rope = (cache.shape[-1] - row_bytes(latent, 2)) // 2 + 2
    check_packed(cache, latent, rope)
    if table.dim() != 1 or table.dtype != torch.int32 or not table.is_contiguous() or len(table) * PAGE < length:
        raise ValueError(f"`table` must be contiguous int32 with {length} rows, not {table.dtype} {table.shape}.")
    out = torch.empty(length, latent + rope, dtype=torch.bfloat16, device=cache.device)
    if length:
        _gather_rows_kernel[(triton.cdiv(length, _GATHERED),)](
            cache,
            table,
            out,
            length,
            LATENT=latent,
            ROPE=rope,
            PAGE=PAGE,
            ROWS=_GATHERED,
            INTERPRET=INTERPRET,
            num_warps=4,
        )
    return out


def check_packed(cache: Tensor, latent: int, rope: int) -> None:
    """Raises `ValueError` unless `cache` holds packed rows of `latent + rope` values that the kernels take."""
    for name, size, least in (("latent", latent, GROUP), ("rope", rope, 16)):
        if size < least or size & size - 1:
            raise ValueError(f"`{name}` must be a power of two, at least {least}, not {size}.")
    size = row_bytes(latent, rope)
    if cache.dim() != 2 or cache.dtype != torch.uint8 or cache.shape[1] != size or not cache.is_contiguous():
        raise ValueError(f"`cache` must be contiguous uint8 [slots, {size}], not {cache.dtype} {cache.shape}.")


def compile_cases(capability: int = 90) -> Iterator[CompileCase]:
    """Rows of Kimi-K2 and Moonlight, where the chip has the conversion."""
    if capability < MIN_CAPABILITY:
        return
    shape = {"LATENT": 512, "ROPE": 64}
    constants = {**shape, "EARLY": starts_early(Chip(capability, HOPPER.sms))}
    signature = {"p_rows": "*bf16", "p_slots": "*i32", "p_cache": "*u8", "s_rows": "i32"}
    signature |= dict.fromkeys(constants, "constexpr")
    yield CompileCase("kv_store-k2-moonlight", _store_rows_kernel, signature, constants, 4, num_stages=3, decode=True)
    constants = {**shape, "PAGE": PAGE, "ROWS": _GATHERED, "INTERPRET": INTERPRET}
    signature = {"p_cache": "*u8", "p_table": "*i32", "p_out": "*bf16", "length": "i32"}
    signature |= dict.fromkeys(constants, "constexpr")
    yield CompileCase(
        "kv_gather-k2-moonlight", _gather_rows_kernel, signature, constants, 4, num_stages=3, decode=False
    )
