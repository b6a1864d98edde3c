"""How the sampling kernels read a row of logits, and the search for where top-k and top-p cut it.

Either keeps the tokens from some logit upwards. Floats order as their integer keys do, so that logit is found exactly by
fixing its key from the highest bits down, 4 in a launch: 16 thresholds are tried at once, each tile adds what it has
above each of them to 16 sums, and the next launch reads from the sums where to go on. A bfloat16 logit has 16 bits of
key, so 4 launches find it; float32 takes 8. One more writes the result down.

Budget of a launch for a row of Kimi-K2 (163,840 logits, 328 KB in bfloat16), computed: 0.08 µs at 4.3 TB/s, and 20,000
comparisons an SM. It is latency, so few launches count, not few comparisons; a sort would take more of both.

Probabilities are whole numbers, 2^44 for the likeliest token: their sums don't depend on the order of summation, never
shrink, and come out the same in every kernel. 262,144 tokens at most keep them within 2^62. A token 2^44 times less
likely than the likeliest is never drawn. They come from a float64 `exp` of float32 quotients, as rounded by the CPU's
sampler, so a draw differs from the CPU's only where it falls within that sampler's rounding of a border.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from thinkloop.kernels.compile_case import POINTERS, CompileCase
from thinkloop.kernels.router import key_value, order_key
from thinkloop.kernels.target import HOPPER, Chip, early, starts_early, wait_for_inputs
from torch import Tensor

MAX_VOCAB = 2**18
KEY_BITS = 4
"""Bits of a key that a step of the search fixes."""

_ONE = tl.constexpr(2.0**44)
_NEVER = tl.constexpr(2**62)
_WARPS = 16  # 2 values a thread by 16 thresholds: 64 registers on sm_90, where 4 warps spill


@dataclass(frozen=True, slots=True)
class SamplingTiles:
    """A row as `count` tiles of `width` logits, and the power of two that holds a value for each tile."""

    width: int
    count: int
    block: int


def sampling_tiles(vocab_size: int) -> SamplingTiles:
    """1,024 logits a tile: K2's 163,840 make 160 programs, enough for an H200's 132 SMs, each with one 16-byte load of
    float32 a thread."""
    count = triton.cdiv(vocab_size, 1024)
    return SamplingTiles(1024, count, triton.next_power_of_2(count))


def search_steps(dtype: torch.dtype) -> int:
    """Launches that find a threshold exactly."""
    return 4 if dtype == torch.bfloat16 else 8


@triton.jit
def load_tile(p_logits, p_allowed, s_logits, i_row, i_tile, VOCAB: tl.constexpr, TILE: tl.constexpr):
    """A tile's logits in float32, -inf where a token is out, and their tokens."""
    o_token = i_tile * TILE + tl.arange(0, TILE)
    inside = o_token < VOCAB
    b_logits = tl.load(p_logits + i_row * s_logits + o_token, mask=inside, other=float("-inf")).to(tl.float32)
    if p_allowed is not None:
        b_allowed = tl.load(p_allowed + i_row * VOCAB + o_token, mask=inside, other=0)
        b_logits = tl.where(b_allowed != 0, b_logits, float("-inf"))
    return b_logits, o_token


@triton.jit
def row_best(p_best, i_row, TILES: tl.constexpr, BLOCK_TILES: tl.constexpr):
    """A row's largest logit and the first token that has it; 0 and -1 where it isn't finite. `p_best [B, TILES]` has a
    key in the upper half of an int64 and 2^31 - 1 less the token in the lower."""
    o_tile = tl.minimum(tl.arange(0, BLOCK_TILES), TILES - 1)
    best = tl.max(tl.load(p_best + i_row * TILES + o_tile))
    peak = key_value((best >> 32).to(tl.int32))
    finite = tl.abs(peak) < float("inf")
    return tl.where(finite, peak, 0.0), tl.where(finite, 0x7FFFFFFF - (best & 0x7FFFFFFF), -1)


@triton.jit
def search_key(b_logits):
    """`order_key`, counted from 0: int64 below 2^32."""
    return order_key(b_logits).to(tl.int64) + 0x80000000


@triton.jit
def token_weights(b_logits, peak, p_temperature, i_row, min_p):
    """Whole-number probabilities, 2^44 at `peak`; 0 below the share `min_p` of that, and for NaN. Greedy rows are weighed
    at temperature 1: their draw isn't used."""
    temperature = tl.load(p_temperature + i_row).to(tl.float64)
    inverse = 1.0 / tl.where(temperature > 0, temperature, 1.0)
    # Float64 products round to the same float32 as quotients: no quotient of two float32 is so near a rounding border.
    b_below = (b_logits * inverse).to(tl.float32) - (peak * inverse).to(tl.float32)
    b_share = tl.exp(b_below.to(tl.float64))
    return (tl.where((b_logits <= peak) & (b_share >= min_p), b_share, 0.0) * _ONE).to(tl.int64)


@triton.jit
def _found(p_sums, p_wanted, i_row, step, MASS: tl.constexpr, STEPS: tl.constexpr, BITS: tl.constexpr):
    """The threshold after `step` steps: the largest from which on the tokens are as many, or weigh as much, as is wanted;
    0 if there is none. `p_sums [B, STEPS, 16]` has what lies above each threshold that was tried."""
    WAYS: tl.constexpr = 1 << BITS
    o_step, o_way = tl.arange(0, STEPS), tl.arange(0, WAYS)
    p_row = p_sums + i_row * STEPS * WAYS
    b_sums = tl.load(p_row + o_step[:, None] * WAYS + o_way[None, :], mask=o_step[:, None] < step, other=0)
    wanted = tl.load(p_wanted + i_row)
    if MASS:
        whole = tl.load(p_row)  # above threshold 0 lies everything
        need = tl.where(wanted < 1, tl.minimum(tl.ceil(wanted.to(tl.float64) * whole).to(tl.int64), whole), whole)
    else:
        need = tl.where(wanted > 0, wanted.to(tl.int64), _NEVER)
    b_met = tl.sum((b_sums >= need).to(tl.int64), axis=1)  # thresholds rise and sums fall
    b_digit = tl.where(o_step < step, tl.maximum(b_met - 1, 0), 0)
    return tl.sum(b_digit << (32 - BITS * (o_step + 1)).to(tl.int64))


@triton.jit(do_not_specialize=["step"])
def _search_kernel(
    p_logits, p_allowed, p_best, p_temperature, p_wanted, p_floor, p_sums, s_logits, step, VOCAB: tl.constexpr,
    TILE: tl.constexpr, TILES: tl.constexpr, BLOCK_TILES: tl.constexpr, MASS: tl.constexpr, STEPS: tl.constexpr,
    BITS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(EARLY)
    i_tile, i_row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b_logits, o_token = load_tile(p_logits, p_allowed, s_logits, i_row, i_tile, VOCAB, TILE)
    b_key = search_key(b_logits)
    if MASS:
        peak, _ = row_best(p_best, i_row, TILES, BLOCK_TILES)
        b_measure = token_weights(b_logits, peak, p_temperature, i_row, 0.0)
        if p_floor is not None:
            b_measure = tl.where(b_key >= tl.load(p_floor + i_row), b_measure, 0)
    else:
        b_measure = (o_token < VOCAB).to(tl.int64)
    o_way = tl.arange(0, 1 << BITS)
    b_tried = _found(p_sums, p_wanted, i_row, step, MASS, STEPS, BITS)
    b_tried += o_way.to(tl.int64) << (32 - BITS * (step + 1))
    b_above = tl.sum(tl.where(b_key[:, None] >= b_tried[None, :], b_measure[:, None], 0), axis=0)
    tl.atomic_add(p_sums + ((i_row * STEPS + step) << BITS) + o_way, b_above, sem="relaxed")


@triton.jit
def _threshold_kernel(
    p_sums, p_wanted, p_threshold, MASS: tl.constexpr, STEPS: tl.constexpr, BITS: tl.constexpr, EARLY: tl.constexpr
):  # fmt: skip
    wait_for_inputs(EARLY)
    i_row = tl.program_id(0).to(tl.int64)
    tl.store(p_threshold + i_row, _found(p_sums, p_wanted, i_row, STEPS, MASS, STEPS, BITS))


def find_threshold(
    logits: Tensor, mask: Tensor | None, best: Tensor, temperature: Tensor, wanted: Tensor, floor: Tensor | None
) -> Tensor:
    """The `search_key` of the last token that `wanted` keeps in each row of `logits [B, V]`: int64 `[B]`.

    Integer `wanted [B]` is a number of tokens (top-k; 0 keeps all), float32 a share of the probability of the tokens from
    key `floor [B]` up (top-p). `mask` uint8 `[B, V]`, `best` as in `row_best`, `temperature` float32 `[B]`. Nothing is
    checked here; `sampling.sample` does.
    """
    (rows, vocab), tiles, steps = logits.shape, sampling_tiles(logits.shape[1]), search_steps(logits.dtype)
    sums = torch.zeros(rows, steps, 1 << KEY_BITS, dtype=torch.int64, device=logits.device)
    threshold = torch.empty(rows, dtype=torch.int64, device=logits.device)
    mass, options = wanted.is_floating_point(), early(logits.device)
    for step in range(steps):
        _search_kernel[(tiles.count, rows)](
            logits, mask, best, temperature, wanted, floor, sums, logits.stride(0), step, VOCAB=vocab, TILE=tiles.width,
            TILES=tiles.count, BLOCK_TILES=tiles.block, MASS=mass, STEPS=steps, BITS=KEY_BITS,
            num_warps=_WARPS, **options,
        )  # fmt: skip
    _threshold_kernel[(rows,)](sums, wanted, threshold, MASS=mass, STEPS=steps, BITS=KEY_BITS, num_warps=1, **options)
    return threshold


def compile_cases(capability: int = 90) -> list[CompileCase]:
    """Top-k and top-p over the vocabulary that Kimi-K2 and Moonlight share, from bfloat16 and from float32."""
    starts = starts_early(Chip(capability, HOPPER.sms))
    return [
        case
        for logits in (torch.bfloat16, torch.float32)
        for mass in (False, True)
        for case in (_search_case(logits, mass, starts), _threshold_case(logits, mass, starts))
    ]


def _search_case(logits: torch.dtype, mass: bool, starts: bool) -> CompileCase:
    tiles = sampling_tiles(163840)
    constexprs = {
        "VOCAB": 163840, "TILE": tiles.width, "TILES": tiles.count, "BLOCK_TILES": tiles.block, "MASS": mass,
        "STEPS": search_steps(logits), "BITS": KEY_BITS, "EARLY": starts,
    }  # fmt: skip
    signature = {
        "p_logits": POINTERS[logits], "p_allowed": "*u8", "p_best": "*i64", "p_temperature": "*fp32",
        "p_wanted": "*fp32" if mass else "*i32", "p_floor": "*i64", "p_sums": "*i64", "s_logits": "i32", "step": "i32",
    } | dict.fromkeys(constexprs, "constexpr")  # fmt: skip
    name = f"sampling-search-{'top_p' if mass else 'top_k'}-{POINTERS[logits][1:]}"
    return CompileCase(name, _search_kernel, signature, constexprs, _WARPS, num_stages=1, decode=True)


def _threshold_case(logits: torch.dtype, mass: bool, starts: bool) -> CompileCase:
    constexprs = {"MASS": mass, "STEPS": search_steps(logits), "BITS": KEY_BITS, "EARLY": starts}
    signature = {"p_sums": "*i64", "p_wanted": "*fp32" if mass else "*i32", "p_threshold": "*i64"}
    signature |= dict.fromkeys(constexprs, "constexpr")
    name = f"sampling-threshold-{'top_p' if mass else 'top_k'}-{POINTERS[logits][1:]}"
    return CompileCase(name, _threshold_kernel, signature, constexprs, num_warps=1, num_stages=1, decode=True)
