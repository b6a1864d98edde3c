"""Root-mean-square norm on the device, with the residual's addition before it where one is given.

Twin: `reference.rms_norm`. Budget, computed: a row of Kimi-K2 (7,168 in bfloat16) is 14 KB; the norm reads and writes it
once (29 KB), with the residual it reads two and writes two (57 KB). At 4.3 TB/s that is 7 and 13 ns a row, so one token
is latency alone (the launch, one load, one reduction), and 4,096 tokens take 27 and 55 µs. Added apart from the norm,
the residual would move 72 KB a row and cost one launch more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from thinkloop.kernels.compile_case import POINTERS, CompileCase
from thinkloop.kernels.target import HOPPER, INTERPRET, Chip, cast, early, starts_early, wait_for_inputs
from torch import Tensor

MAX_WIDTH = 32768
"""A row is held in registers whole."""


@dataclass(frozen=True, slots=True)
class NormTiles:
    """One program a row: the power of two that holds it, and its warps."""

    block: int
    num_warps: int


def norm_tiles(width: int) -> NormTiles:
    """16 values a thread: two 16-byte loads of bfloat16 in flight at once, and 512 threads for K2's 7,168."""
    block = triton.next_power_of_2(width)
    return NormTiles(block, num_warps=min(max(block // 512, 1), 16))


@triton.jit
def normed(b_x, eps, WIDTH: tl.constexpr):
    """float32 `b_x` over its root mean square; what lies behind `WIDTH` must be 0."""
    return b_x * tl.rsqrt(tl.sum(b_x * b_x) / WIDTH + eps)


@triton.jit
def _rms_norm_kernel(
    p_x, p_residual, p_weight, p_out, s_x, s_residual, eps, WIDTH: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    i_row = tl.program_id(0).to(tl.int64)
    o_column = tl.arange(0, BLOCK)
    inside = o_column < WIDTH
    if p_weight is not None:
        b_weight = tl.load(p_weight + o_column, mask=inside, other=0.0)
    wait_for_inputs(EARLY)
    b_x = tl.load(p_x + i_row * s_x + o_column, mask=inside, other=0.0)
    if p_residual is not None:
        p_row = p_residual + i_row * s_residual + o_column
        b_residual = tl.load(p_row, mask=inside, other=0.0)
        b_x = cast(b_x.to(tl.float32) + b_residual.to(tl.float32), p_out.dtype.element_ty, INTERPRET)
        tl.store(p_row, b_x, mask=inside)
    b_out = cast(normed(b_x.to(tl.float32), eps, WIDTH), p_out.dtype.element_ty, INTERPRET)
    if p_weight is not None:
        b_out = cast(b_out.to(tl.float32) * b_weight.to(tl.float32), p_out.dtype.element_ty, INTERPRET)
    tl.store(p_out + i_row * WIDTH + o_column, b_out, mask=inside)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, *, residual: Tensor | None = None) -> Tensor:
    """The root-mean-square norm of the rows of `x [T, D]`, times `weight [D]`, in a new tensor of `x`'s dtype.

    Means what `reference.rms_norm` does: in float32, rounded to the dtype, then times the weight. With
    `residual [T, D]`, `residual += x` comes first, in place and rounded to the dtype, and that sum is what is normed.
    Rows may lie apart (a slice of a wider tensor); all tensors have one dtype: bfloat16, float16 or float32. Raises
    `ValueError` naming the argument that doesn't fit.
    """
    _check(x, weight, residual)
    rows, width = x.shape
    out = torch.empty(rows, width, dtype=x.dtype, device=x.device)
    if rows == 0:
        return out
    tiles = norm_tiles(width)
    _rms_norm_kernel[(rows,)](
        x, residual, weight, out, x.stride(0), 0 if residual is None else residual.stride(0), eps, WIDTH=width,
        BLOCK=tiles.block, INTERPRET=INTERPRET, num_warps=tiles.num_warps, **early(x.device),
    )  # fmt: skip
    return out


def _check(x: Tensor, weight: Tensor | None, residual: Tensor | None) -> None:
    if x.dim() != 2 or x.dtype not in POINTERS or x.stride(1) != 1:
        raise ValueError(f"`x` must be float [T, D] with adjacent columns, not {x.dtype} {x.shape}.")
    if not 1 <= x.shape[1] <= MAX_WIDTH:
        raise ValueError(f"`x` must have 1 to {MAX_WIDTH} columns, not {x.shape[1]}.")
    if weight is not None and (weight.shape != x.shape[1:] or weight.dtype != x.dtype or not weight.is_contiguous()):
        raise ValueError(f"`weight` must be contiguous {x.dtype} [{x.shape[1]}], not {weight.dtype} {weight.shape}.")
    if residual is None:
        return
    if residual.shape != x.shape or residual.dtype != x.dtype or residual.stride(1) != 1:
        raise ValueError(f"`residual` must be {x.dtype} {x.shape} as `x`, not {residual.dtype} {residual.shape}.")
    if residual.shape[0] > 1 and residual.stride(0) < residual.shape[1]:
        raise ValueError("`residual` must not have rows that overlap: it is written in place.")


def compile_cases(capability: int = 90) -> list[CompileCase]:
    """The hidden widths of Kimi-K2 and Moonlight with a residual, and the plain norm of K2's latent query."""
    return [
        _case("rms_norm-k2", 7168, residual=True, capability=capability),
        _case("rms_norm-moonlight", 2048, residual=True, capability=capability),
        _case("rms_norm-k2-query", 1536, residual=False, capability=capability),
    ]


def _case(name: str, width: int, *, residual: bool, capability: int) -> CompileCase:
    tiles = norm_tiles(width)
    constexprs: dict[str, Any] = {
        "WIDTH": width,
        "BLOCK": tiles.block,
        "EARLY": starts_early(Chip(capability, HOPPER.sms)),
    }
    constexprs |= {"INTERPRET": INTERPRET}
    constexprs |= {} if residual else {"p_residual": None}
    signature = dict.fromkeys(["p_x", "p_residual", "p_weight", "p_out"], POINTERS[torch.bfloat16])
    signature |= {"s_x": "i32", "s_residual": "i32", "eps": "fp32"} | dict.fromkeys(constexprs, "constexpr")
    return CompileCase(name, _rms_norm_kernel, signature, constexprs, tiles.num_warps, num_stages=1, decode=True)
