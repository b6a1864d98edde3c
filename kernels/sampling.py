"""Chooses tokens on the device: greedy, temperature, top-k, top-p, min-p and a mask, so that only ids reach the host.

Twin: `engine.sampler.Sampler`, which gives the same token for the same draw: the tokens that are left stand in the order
of their ids, and the one is chosen in whose stretch of the summed probabilities the draw falls.

Budget for a row of Kimi-K2 (163,840 logits, 328 KB in bfloat16, 655 KB in float32), computed: a pass takes 0.08 or 0.15
µs at 4.3 TB/s when every SM takes part, but one SM, at 64 bytes a clock, 3 or 6 µs. So a pass works on tiles of 1,024
logits, 160 programs a row, and a launch ends each: two launches for greedy (the best of each tile, the best of those),
three for a draw (the best, each tile's sum, the draw, which reads one tile again). Top-k and top-p add those of
`sampling_threshold`, which also says how probabilities are summed.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from thinkloop.kernels.compile_case import POINTERS, CompileCase
from thinkloop.kernels.router import order_key
from thinkloop.kernels.sampling_threshold import (
    MAX_VOCAB,
    find_threshold,
    load_tile,
    row_best,
    sampling_tiles,
    search_key,
    token_weights,
)
from thinkloop.kernels.target import HOPPER, Chip, early, starts_early, wait_for_inputs
from torch import Tensor

_WARPS = 8
_TYPES = (torch.bfloat16, torch.float32)


@triton.jit
def _tile_best_kernel(
    p_logits, p_allowed, p_best, s_logits, VOCAB: tl.constexpr, TILE: tl.constexpr, EARLY: tl.constexpr
):  # fmt: skip
    wait_for_inputs(EARLY)
    i_tile, i_row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b_logits, o_token = load_tile(p_logits, p_allowed, s_logits, i_row, i_tile, VOCAB, TILE)
    b_ranked = (order_key(b_logits).to(tl.int64) << 32) | (0x7FFFFFFF - o_token).to(tl.int64)
    tl.store(p_best + i_row * tl.num_programs(0) + i_tile, tl.max(b_ranked))


@triton.jit
def _argmax_kernel(p_best, p_ids, TILES: tl.constexpr, BLOCK_TILES: tl.constexpr, EARLY: tl.constexpr):
    wait_for_inputs(EARLY)
    i_row = tl.program_id(0).to(tl.int64)
    _, token = row_best(p_best, i_row, TILES, BLOCK_TILES)
    tl.store(p_ids + i_row, token)


@triton.jit
def _filtered(
    p_logits, p_allowed, p_temperature, p_min_p, p_threshold, s_logits, i_row, i_tile, peak, VOCAB: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """A tile's whole-number probabilities, 0 for what any filter drops."""
    b_logits, _ = load_tile(p_logits, p_allowed, s_logits, i_row, i_tile, VOCAB, TILE)
    min_p = 0.0 if p_min_p is None else tl.load(p_min_p + i_row)
    b_weights = token_weights(b_logits, peak, p_temperature, i_row, min_p)
    if p_threshold is not None:
        b_weights = tl.where(search_key(b_logits) >= tl.load(p_threshold + i_row), b_weights, 0)
    return b_weights


@triton.jit
def _tile_sum_kernel(
    p_logits, p_allowed, p_best, p_temperature, p_min_p, p_threshold, p_sums, s_logits, VOCAB: tl.constexpr,
    TILE: tl.constexpr, TILES: tl.constexpr, BLOCK_TILES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(EARLY)
    i_tile, i_row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    peak, _ = row_best(p_best, i_row, TILES, BLOCK_TILES)
    b_weights = _filtered(
        p_logits, p_allowed, p_temperature, p_min_p, p_threshold, s_logits, i_row, i_tile, peak, VOCAB, TILE
    )
    tl.store(p_sums + i_row * TILES + i_tile, tl.sum(b_weights))


@triton.jit
def _draw_kernel(
    p_logits, p_allowed, p_best, p_temperature, p_min_p, p_threshold, p_sums, p_uniform, p_ids, s_logits,
    VOCAB: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr, BLOCK_TILES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(EARLY)
    i_row = tl.program_id(0).to(tl.int64)
    peak, best = row_best(p_best, i_row, TILES, BLOCK_TILES)
    o_tile = tl.arange(0, BLOCK_TILES)
    b_sums = tl.load(p_sums + i_row * TILES + o_tile, mask=o_tile < TILES, other=0)
    total = tl.sum(b_sums)
    target = tl.minimum((tl.load(p_uniform + i_row) * total).to(tl.int64), total - 1)  # the product may round up
    i_tile = tl.sum((tl.cumsum(b_sums) <= target).to(tl.int32))  # the first tile whose stretch ends behind the target
    b_weights = _filtered(
        p_logits, p_allowed, p_temperature, p_min_p, p_threshold, s_logits, i_row, i_tile, peak, VOCAB, TILE
    )
    b_until = tl.cumsum(b_weights) + tl.sum(tl.where(o_tile < i_tile, b_sums, 0))
    token = i_tile * TILE + tl.sum((b_until <= target).to(tl.int32))
    greedy = (best < 0) | (tl.load(p_temperature + i_row) == 0)
    tl.store(p_ids + i_row, tl.where(greedy, best, token.to(tl.int64)))


def argmax(logits: Tensor, allowed: Tensor | None = None) -> Tensor:
    """The first token of the largest logit of each row, int64 `[B]`, among those that bool `allowed [B, V]` has true.

    `logits [B, V]` is float32 or bfloat16. -1 where the largest logit isn't finite: no token is left, or the logits are
    broken (a NaN counts as the largest). Raises `ValueError` naming the argument that doesn't fit.
    """
    mask = _checked(logits, allowed)
    rows, tiles = logits.shape[0], sampling_tiles(logits.shape[1])
    ids = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if rows:
        best = _tile_best(logits, mask)
        _argmax_kernel[(rows,)](
            best, ids, TILES=tiles.count, BLOCK_TILES=tiles.block, num_warps=1, **early(logits.device)
        )
    return ids


def sample(
    logits: Tensor, *, temperature: Tensor, uniform: Tensor, top_k: Tensor | None = None, top_p: Tensor | None = None,
    min_p: Tensor | None = None, allowed: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """A token for each row of `logits [B, V]` (float32 or bfloat16), int64 `[B]`, as `Sampler.choose` would choose it.

    Each row has its own parameters, `[B]` on the device, with the meaning and order of `engine.params.Sampling`:
    `temperature`, `top_p` and `min_p` float32, `top_k` int32 or int64. Those that no row uses are better left None: they
    cost launches. `uniform` float64 holds the draws that `engine.sampler.uniform` gives. `allowed` and the token -1 are
    as in `argmax`. Tokens exactly as likely as the last one that `top_k` or `top_p` keeps stay too, where the CPU keeps
    only as many as are wanted. Raises `ValueError` naming the argument that doesn't fit.
    """
    mask = _checked(logits, allowed)
    _check_row(logits, "temperature", temperature, torch.float32)
    _check_row(logits, "uniform", uniform, torch.float64)
    _check_row(logits, "top_k", top_k, torch.int32, torch.int64)
    _check_row(logits, "top_p", top_p, torch.float32)
    _check_row(logits, "min_p", min_p, torch.float32)
    rows, tiles = logits.shape[0], sampling_tiles(logits.shape[1])
    ids = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if not rows:
        return ids
    best, threshold = _tile_best(logits, mask), None
    for wanted in (top_k, top_p):
        if wanted is not None:
            threshold = find_threshold(logits, mask, best, temperature, wanted, threshold)
    sums = torch.empty_like(best)
    arguments = logits, mask, best, temperature, min_p, threshold, sums
    options = {"VOCAB": logits.shape[1], "TILE": tiles.width, "TILES": tiles.count, "BLOCK_TILES": tiles.block}
    options |= {"num_warps": _WARPS} | early(logits.device)
    _tile_sum_kernel[(tiles.count, rows)](*arguments, logits.stride(0), **options)
    _draw_kernel[(rows,)](*arguments, uniform, ids, logits.stride(0), **options)
    return ids


def _tile_best(logits: Tensor, mask: Tensor | None) -> Tensor:
    """What `row_best` reads: the largest logit of each tile and its first token, int64 `[B, tiles]`."""
    (rows, vocab), tiles = logits.shape, sampling_tiles(logits.shape[1])
    best = torch.empty(rows, tiles.count, dtype=torch.int64, device=logits.device)
    _tile_best_kernel[(tiles.count, rows)](
        logits, mask, best, logits.stride(0), VOCAB=vocab, TILE=tiles.width, num_warps=_WARPS, **early(logits.device)
    )
    return best


def _checked(logits: Tensor, allowed: Tensor | None) -> Tensor | None:
    """`allowed` as bytes."""
    if logits.dim() != 2 or logits.dtype not in _TYPES or logits.stride(1) != 1:
        raise ValueError(
            f"`logits` must be float32 or bfloat16 [B, V], tokens adjacent, not {logits.dtype} {logits.shape}."
        )
    if not 1 <= logits.shape[1] <= MAX_VOCAB:
        raise ValueError(f"`logits` must have 1 to {MAX_VOCAB} tokens a row, not {logits.shape[1]}.")
    if allowed is None:
        return None
    if allowed.shape != logits.shape or allowed.dtype != torch.bool or not allowed.is_contiguous():
        raise ValueError(f"`allowed` must be contiguous bool {logits.shape}, not {allowed.dtype} {allowed.shape}.")
    return allowed.view(torch.uint8)


def _check_row(logits: Tensor, name: str, value: Tensor | None, *dtypes: torch.dtype) -> None:
    if value is not None and (
        value.shape != logits.shape[:1] or value.dtype not in dtypes or not value.is_contiguous()
    ):
        raise ValueError(f"`{name}` must be {dtypes[0]} [{logits.shape[0]}], not {value.dtype} {value.shape}.")


def compile_cases(capability: int = 90) -> list[CompileCase]:
    """Each kernel with every filter and with none, over the vocabulary that Kimi-K2 and Moonlight share."""
    tiled = (_tile_best_kernel, _tile_sum_kernel, _draw_kernel)
    cases = [
        _case(kernel, logits, every, capability) for kernel in tiled for logits in _TYPES for every in (False, True)
    ]
    return [*cases, _case(_argmax_kernel, torch.float32, True, capability)]


def _case(kernel: Any, logits: torch.dtype, every: bool, capability: int) -> CompileCase:
    tiles, optional = sampling_tiles(163840), ("p_allowed", "p_min_p", "p_threshold")
    types = {
        "p_logits": POINTERS[logits], "p_allowed": "*u8", "p_temperature": "*fp32", "p_min_p": "*fp32",
        "p_uniform": "*fp64", "s_logits": "i32",
    }  # fmt: skip
    values: dict[str, Any] = {"VOCAB": 163840, "TILE": tiles.width, "TILES": tiles.count, "BLOCK_TILES": tiles.block}
    values |= {"EARLY": starts_early(Chip(capability, HOPPER.sms))} | ({} if every else dict.fromkeys(optional))
    signature = {name: "constexpr" if name in values else types.get(name, "*i64") for name in kernel.arg_names}
    constexprs = {name: value for name, value in values.items() if name in signature}
    name = (
        f"sampling{kernel.__name__.removesuffix('_kernel')}-{POINTERS[logits][1:]}-{'every' if every else 'no'}_filter"
    )
    warps = 1 if kernel is _argmax_kernel else _WARPS
    return CompileCase(name, kernel, signature, constexprs, warps, num_stages=1, decode=True)
