"""A linear layer for the rows of a decode step, `x @ weight.T`, with what stands before and after it: a norm of x; `silu(gate)
· up`, or the addition of partial results and the residual stream.

Twin: `x.float() @ weight.float().T`. For up to four rows all of it is one launch. Budget, computed: weights are read once and
everything else is small, so at 4.3 TB/s K2's `w_o` (7168 × 8192, 117 MB) takes 27 µs, `w_in` (30 MB) 7 µs, Moonlight's `w_o`
(8 MB) 2 µs. That is 33 KB a microsecond and SM; a load is back after about 1 µs, so 64 KB must be on their way to an SM at
any time. Weights go straight to registers, 128 bytes a thread and step, and products are added without tensor cores: 2.9
instructions a weight (compiled for sm_90), a fifth of the issue slots. A program's first step of weights, which no kernel
writes, is on its way before the kernel ahead has ended.

Measured on an H200 in a graph of such layers, µs for one row, and cuBLAS: `w_o` 27.1 (32.6), `w_in` with its norm 9.4 (12.2
and a norm), `w_q` 11.6 (12.3), the shared experts' gate and up with SwiGLU 14.7 (19.5 without), Moonlight's `w_o` 3.1 (6.0),
its head of 671 MB 145 (156); for four rows 32, 14, 21, 18, 4.4. Asking for more of the weights beforehand (bulk prefetches)
gained nothing. By the tensor cores (16 rows of the weights a program, each warp with its part of K) it took 1.5 to 2 times as
long, whatever the number of rows. More rows go to cuBLAS, which takes no longer for 16 than for one, and one launch does the
rest.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from thinkloop.kernels.compile_case import POINTERS, CompileCase
from thinkloop.kernels.rms_norm import rms_norm
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

FEW = 4
"""Rows up to which the product is ours."""
_FINISH_BLOCK = 1024


class Norm(NamedTuple):
    """`reference.rms_norm`'s weight bfloat16 `[K]`, or None, and eps."""

    weight: Tensor | None
    eps: float


@dataclass(frozen=True, slots=True)
class LinearTiles:
    """A program's share: `rows` of the weights, by `features` a step, and its warps."""

    rows: int
    features: int
    warps: int = 4


def linear_tiles(tokens: int, rows: int, features: int, sm_count: int, *, norms: bool, adds: bool) -> LinearTiles:
    """Tiles for weights `rows × features`: 8 or 16 KB a step. Measured for K2's and Moonlight's matrices: for one token, long
    rows want ten programs an SM and more, unless each has to norm the token, and short ones want few, unless partial
    results take registers."""
    if tokens > 1:
        return LinearTiles(4, min(1024, triton.next_power_of_2(features)))
    if features >= 4096:
        return LinearTiles(4 if norms or rows >= 40 * sm_count else 2, 2048)
    size = 8 if rows >= 40 * sm_count and not adds else 4
    return LinearTiles(size, min(1024, triton.next_power_of_2(features)))


@triton.jit
def _row_of(o_row, i_tile, ROWS: tl.constexpr, GATED: tl.constexpr, TILE: tl.constexpr):
    """The rows of the weights that a tile holds; GATED: of gate and of up by turns. Behind the last row comes that again."""
    if GATED:
        o_row = o_row % 2 * (ROWS // 2) + tl.minimum(i_tile * (TILE // 2) + o_row // 2, ROWS // 2 - 1)
    else:
        o_row = tl.minimum(i_tile * TILE + o_row, ROWS - 1)
    return o_row.to(tl.int64)


@triton.jit
def _step(p_from, o_k, k, FEATURES: tl.constexpr, BLOCK_K: tl.constexpr, POLICY: tl.constexpr):
    """What lies at columns k + `o_k`; 0 behind the last one."""
    if FEATURES % BLOCK_K == 0:
        return tl.load(p_from + k, eviction_policy=POLICY)
    return tl.load(p_from + k, mask=o_k < FEATURES - k, other=0, eviction_policy=POLICY)


@triton.jit
def _scales(p_x, s_x, eps, tokens, FEATURES: tl.constexpr, TOKENS: tl.constexpr, PADDED: tl.constexpr):
    """What each row is multiplied by, float32 `[TOKENS, 1]`."""
    o_t, o_k = tl.arange(0, TOKENS)[:, None], tl.arange(0, PADDED)[None, :]
    b_x = tl.load(p_x + tl.minimum(o_t, tokens - 1) * s_x + o_k, mask=o_k < FEATURES, other=0.0).to(tl.float32)
    return tl.rsqrt(tl.sum(b_x * b_x, 1) / FEATURES + eps)[:, None]


@triton.jit
def _product(b_w, b_x, b_acc, TILE: tl.constexpr, TOKENS: tl.constexpr, BLOCK_K: tl.constexpr):
    """`b_acc [TILE, TOKENS, BLOCK_K/8]` and one step's products: `b_w` int32 `[TILE, BLOCK_K/2]`, a pair each, `b_x [TOKENS,
    BLOCK_K]`."""
    b_w = tl.reshape(b_w, [TILE, 1, BLOCK_K // 8, 4])
    b_even, b_odd = tl.split(tl.reshape(b_x.to(tl.float32), [1, TOKENS, BLOCK_K // 8, 4, 2]))
    b_even *= (b_w << 16).to(tl.float32, bitcast=True)
    b_odd *= (b_w & -65536).to(tl.float32, bitcast=True)
    return b_acc + tl.sum(b_even, 3) + tl.sum(b_odd, 3)


@triton.jit
def _input(p_rows, p_norm, b_scale, o_k, k, FEATURES: tl.constexpr, BLOCK_K: tl.constexpr, INTERPRET: tl.constexpr):
    """One step's x, normed where there is a scale."""
    b_x = _step(p_rows, o_k, k, FEATURES, BLOCK_K, "")
    if b_scale is not None:
        kind: tl.constexpr = b_x.dtype
        b_x = cast(b_x.to(tl.float32) * b_scale, kind, INTERPRET)
        if p_norm is not None:
            b_norm = _step(p_norm + o_k, o_k, k, FEATURES, BLOCK_K, "")
            b_x = cast(b_x.to(tl.float32) * b_norm.to(tl.float32), kind, INTERPRET)
    return b_x


@triton.jit
def _added(p_add, p_residual, o_n, o_t, inside, WIDTH: tl.constexpr, PARTS: tl.constexpr):
    """What a result has added to it."""
    b_add = tl.zeros([o_n.shape[0], o_t.shape[1]], tl.float32)
    if p_residual is not None:
        b_add += tl.load(p_residual + o_t * WIDTH + o_n, mask=inside, other=0.0).to(tl.float32)
    for i_part in tl.static_range(PARTS):
        b_add += tl.load(p_add + (o_t * PARTS + i_part) * WIDTH + o_n, mask=inside, other=0.0).to(tl.float32)
    return b_add


@triton.jit(do_not_specialize=["tokens", "features"])
def _linear_kernel(
    p_x, p_norm, p_weight, p_add, p_residual, p_out, eps, tokens, features, s_x,
    ROWS: tl.constexpr, FEATURES: tl.constexpr, NORMS: tl.constexpr, GATED: tl.constexpr, PARTS: tl.constexpr,
    TILE: tl.constexpr, TOKENS: tl.constexpr, BLOCK_K: tl.constexpr, PADDED: tl.constexpr, SETTLED: tl.constexpr,
    EARLY: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """`features` is FEATURES, but unknown to the compiler, which would unroll the loop. SETTLED: x was there before the last
    launch, and only what is added has to be waited for."""
    WIDTH: tl.constexpr = ROWS // 2 if GATED else ROWS
    OUT: tl.constexpr = TILE // 2 if GATED else TILE
    i_tile = tl.program_id(0)
    o_t, o_k, o_pair = (
        tl.arange(0, TOKENS)[:, None],
        tl.arange(0, BLOCK_K)[None, :],
        tl.arange(0, BLOCK_K // 2)[None, :],
    )
    o_row = _row_of(tl.arange(0, TILE)[:, None], i_tile, ROWS, GATED, TILE)
    p_w = p_weight.to(tl.pointer_type(tl.int32)) + o_row * (FEATURES // 2) + o_pair
    p_rows = p_x + tl.minimum(o_t, tokens - 1) * s_x + o_k
    b_w = _step(p_w, o_pair, 0, FEATURES // 2, BLOCK_K // 2, "evict_first")
    if not SETTLED:
        wait_for_inputs(EARLY)
    b_scale = _scales(p_x, s_x, eps, tokens, FEATURES, TOKENS, PADDED) if NORMS else None
    b_acc = tl.zeros([TILE, TOKENS, BLOCK_K // 8], tl.float32)
    o_n, o_t = i_tile * OUT + tl.arange(0, OUT)[:, None], tl.arange(0, TOKENS)[None, :]
    inside = (o_n < WIDTH) & (o_t < tokens)
    ADDED: tl.constexpr = PARTS > 0 or p_residual is not None
    if ADDED and not SETTLED:
        b_add = _added(p_add, p_residual, o_n, o_t, inside, WIDTH, PARTS)
        if not INTERPRET:  # held fast, or every thread would load all that the reduction leaves it: 154 registers
            b_add = tl.inline_asm_elementwise(
                "mov.b32 $0, $1;", "=r,r", [b_add], dtype=tl.float32, is_pure=False, pack=1
            )
        # Into one of the sums, as registers that stay taken would be loads less on their way.
        b_acc = tl.where((tl.arange(0, BLOCK_K // 8) == 0)[None, None, :], b_add[:, :, None], b_acc)

    b_x = _input(p_rows, p_norm, b_scale, o_k, 0, FEATURES, BLOCK_K, INTERPRET)
    b_acc = _product(b_w, b_x, b_acc, TILE, TOKENS, BLOCK_K)
    for k in tl.range(BLOCK_K, features, BLOCK_K, num_stages=1):
        b_w = _step(p_w, o_pair, k // 2, FEATURES // 2, BLOCK_K // 2, "evict_first")
        b_x = _input(p_rows, p_norm, b_scale, o_k, k, FEATURES, BLOCK_K, INTERPRET)
        b_acc = _product(b_w, b_x, b_acc, TILE, TOKENS, BLOCK_K)

    b_out = tl.sum(b_acc, 2)
    if GATED:
        b_gate, b_up = tl.split(tl.permute(tl.reshape(b_out, [OUT, 2, TOKENS]), (0, 2, 1)))
        b_out = b_gate * tl.sigmoid(b_gate) * b_up
    if SETTLED:
        wait_for_inputs(EARLY)
        if ADDED:
            b_out += _added(p_add, p_residual, o_n, o_t, inside, WIDTH, PARTS)
    tl.store(p_out + o_t * WIDTH + o_n, cast(b_out, p_out.dtype.element_ty, INTERPRET), mask=inside)


@triton.jit
def _finish_kernel(
    p_from, p_add, p_residual, p_out, WIDTH: tl.constexpr, GATED: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
    EARLY: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """One row's BLOCK columns of what follows the product of many rows."""
    wait_for_inputs(EARLY)
    i_row, o_n = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = o_n < WIDTH
    p_row = p_from + i_row * (2 * WIDTH if GATED else WIDTH) + o_n
    b_out = tl.load(p_row, mask=inside, other=0.0).to(tl.float32)
    if GATED:
        b_out = b_out * tl.sigmoid(b_out) * tl.load(p_row + WIDTH, mask=inside, other=0.0).to(tl.float32)
    if p_residual is not None:
        b_out += tl.load(p_residual + i_row * WIDTH + o_n, mask=inside, other=0.0).to(tl.float32)
    for i_part in tl.static_range(PARTS):
        b_out += tl.load(p_add + (i_row * PARTS + i_part) * WIDTH + o_n, mask=inside, other=0.0).to(tl.float32)
    tl.store(p_out + i_row * WIDTH + o_n, cast(b_out, p_out.dtype.element_ty, INTERPRET), mask=inside)


def linear(
    x: Tensor, weight: Tensor, *, norm: Norm | None = None, gated: bool = False, dtype: torch.dtype = torch.bfloat16,
    add: Tensor | None = None, residual: Tensor | None = None, settled: bool = False, tiles: LinearTiles | None = None,
) -> Tensor:  # fmt: skip
    """`x @ weight.T`, summed in float32, in `dtype`: bfloat16 (the default) or float32.

    `x` is bfloat16 `[T, K]`; its rows may lie apart (fast where they do so by a multiple of 16). `weight` is contiguous
    bfloat16 `[N, K]`, K a multiple of 8. `norm`: x is normed first. `gated`: `weight [2I, K]` is gate over up, and the result
    `silu(gate) · up [T, I]`. `residual [T, N]` and `add`, `[T, N]` or `[T, P, N]`, contiguous bfloat16 or float32, are added
    in float32. `settled`: x was written before the last launch, so that the product can go on beside that one; only what is
    added is waited for. The same input gives the same bits. `tiles` overrides `linear_tiles`. Raises ValueError naming the
    argument that doesn't fit.
    """
    _check(x, weight, gated, dtype)
    _check_added(add, residual, x.shape[0], weight.shape[0], gated)
    (tokens, features), rows = x.shape, weight.shape[0]
    out = torch.empty(tokens, rows // 2 if gated else rows, dtype=dtype, device=x.device)
    if tokens == 0:
        return out
    parts = 0 if add is None else add.numel() // out.numel()
    if tokens > FEW and tiles is None:
        return _many(x, weight, norm, out, gated, parts, add, residual)
    target = chip(x.device)
    norms = norm is not None
    tiles = tiles or linear_tiles(tokens, rows, features, target.sms, norms=norms, adds=parts > 1)
    _linear_kernel[(triton.cdiv(rows, max(tiles.rows, 2) if gated else tiles.rows),)](
        x, norm and norm.weight, weight, add, residual, out, norm.eps if norm else 0.0, tokens, features,
        x.stride(0) if tokens > 1 else 0,
        **_constants(tiles, tokens, rows, features, norms=norms, gated=gated, parts=parts, settled=settled, target=target),
        num_warps=tiles.warps, **launch_early(x.device),
    )  # fmt: skip
    return out


def _many(
    x: Tensor, weight: Tensor, norm: Norm | None, out: Tensor, gated: bool, parts: int, add: Tensor | None,
    residual: Tensor | None,
) -> Tensor:  # fmt: skip
    if norm is not None:
        x = rms_norm(x, *norm)
    if not gated and parts == 0 and residual is None:
        return x @ weight.T if out.dtype == x.dtype else _float32(x, weight)
    _finish_kernel[(out.shape[0], triton.cdiv(out.shape[1], _FINISH_BLOCK))](
        x @ weight.T, add, residual, out, WIDTH=out.shape[1], GATED=gated, PARTS=parts, BLOCK=_FINISH_BLOCK,
        INTERPRET=INTERPRET, **early(x.device),
    )  # fmt: skip
    return out


def _float32(x: Tensor, weight: Tensor) -> Tensor:
    """The product without rounding: on CUDA from bfloat16 as it lies."""
    return torch.mm(x, weight.T, out_dtype=torch.float32) if x.is_cuda else x.float() @ weight.float().T


def _constants(
    tiles: LinearTiles,
    tokens: int,
    rows: int,
    features: int,
    *,
    norms: bool,
    gated: bool,
    parts: int,
    settled: bool,
    target: Chip,
) -> dict[str, Any]:
    """What the kernel knows when it is compiled."""
    return {
        "ROWS": rows, "FEATURES": features, "NORMS": norms, "GATED": gated, "PARTS": parts,
        "TILE": max(tiles.rows, 2) if gated else tiles.rows, "TOKENS": triton.next_power_of_2(tokens),
        "BLOCK_K": tiles.features, "PADDED": triton.next_power_of_2(features), "SETTLED": settled,
        "EARLY": starts_early(target), "INTERPRET": INTERPRET,
    }  # fmt: skip


def _check(x: Tensor, weight: Tensor, gated: bool, dtype: torch.dtype) -> None:
    if x.dim() != 2 or x.dtype != torch.bfloat16 or x.stride(1) != 1:
        raise ValueError(f"`x` must be bfloat16 [T, K] with adjacent columns, not {x.dtype} {list(x.shape)}.")
    features = x.shape[1]
    if weight.dim() != 2 or weight.dtype != torch.bfloat16 or not weight.is_contiguous() or weight.data_ptr() % 16:
        raise ValueError(f"`weight` must be contiguous, aligned bfloat16 [N, K], not {weight.dtype} {weight.shape}.")
    if weight.shape[1] != features or features % 8 or weight.numel() == 0 or (gated and weight.shape[0] % 2):
        expected = f"{'2I' if gated else 'N'}, {features}], {features} a multiple of 8"
        raise ValueError(f"`weight` must be [{expected}, not {list(weight.shape)}.")
    if dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"`dtype` must be bfloat16 or float32, not {dtype}.")


def _check_added(add: Tensor | None, residual: Tensor | None, tokens: int, rows: int, gated: bool) -> None:
    for name, value, dims in (("add", add, (2, 3)), ("residual", residual, (2,))):
        if value is None:
            continue
        if gated or value.dtype not in (torch.bfloat16, torch.float32) or not value.is_contiguous():
            raise ValueError(f"`{name}` must be contiguous bfloat16 or float32, and nothing gated, not {value.dtype}.")
        if value.dim() not in dims or value.shape[0] != tokens or value.shape[-1] != rows or 0 in value.shape[1:]:
            expected = f"[{tokens}, {'(P,) ' if name == 'add' else ''}{rows}]"
            raise ValueError(f"`{name}` must be {expected}, not {list(value.shape)}.")


def compile_cases(capability: int = 90) -> Iterator[CompileCase]:
    """The projections and shared experts of Kimi-K2 and Moonlight for one and for four tokens, and what follows for more."""
    target = Chip(capability, HOPPER.sms)
    models = (("k2", 7168, 2112, 8192, 2048, 8), ("moonlight", 2048, 3648, 2048, 2816, 6))
    for model, width, inputs, heads, inner, top_k in models:
        shapes = {"w_in": (inputs, width, True, False, 0), "w_o": (width, heads, False, False, 0),
                  "gate_up": (2 * inner, width, False, True, 0), "down": (width, inner, False, False, top_k)}  # fmt: skip
        for tokens, (name, (rows, features, norms, gated, parts)) in ((t, s) for t in (1, FEW) for s in shapes.items()):
            tiles = linear_tiles(tokens, rows, features, target.sms, norms=norms, adds=parts > 1)
            constants = _constants(
                tiles, tokens, rows, features, norms=norms, gated=gated, parts=parts, settled=parts > 0, target=target
            )
            constants |= dict.fromkeys(["p_add"] if not parts else []) | dict.fromkeys(["p_norm"] if not norms else [])
            constants |= {} if name in ("w_o", "down") else {"p_residual": None}
            signature = dict.fromkeys(("p_x", "p_norm", "p_weight"), "*bf16") | {
                "p_add": "*fp32",
                "p_residual": "*bf16",
            }
            signature |= {"p_out": "*bf16", "eps": "fp32"} | dict.fromkeys(("tokens", "features", "s_x"), "i32")
            signature |= dict.fromkeys(constants, "constexpr")
            yield CompileCase(
                f"linear-{model}-{tokens}-{name}", _linear_kernel, signature, constants, tiles.warps, 1, True
            )
    for name, gated, parts in (("gated", True, 0), ("added", False, 8)):
        constants = {"WIDTH": 2048, "GATED": gated, "PARTS": parts, "BLOCK": _FINISH_BLOCK}
        constants |= {"EARLY": starts_early(target), "INTERPRET": INTERPRET} | (
            {"p_add": None, "p_residual": None} if gated else {}
        )
        signature = {"p_from": "*bf16", "p_add": "*fp32", "p_residual": "*bf16", "p_out": POINTERS[torch.bfloat16]}
        signature |= dict.fromkeys(constants, "constexpr")
        yield CompileCase(f"linear-finish-{name}", _finish_kernel, signature, constants, 4, 3, True)
