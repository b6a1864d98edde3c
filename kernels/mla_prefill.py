"""Latent attention of many new tokens onto any prefix: keys and values written out by pieces, or absorbed where they are
few.

Twin: `reference.mla_expanded`. FlashAttention's running softmax within a piece, a merge by log-sum-exp between pieces
(FlashAttention-2, arXiv 2307.08691; DeepSeek-V2, arXiv 2405.04434, section 2.1).

Budget for Kimi-K2 (64 heads, nope 128, rope 64, value 128), computed: a pair of query and key takes 2·64·(192 + 128) =
41 kflop written out and 2·64·(576 + 512) = 139 kflop absorbed; writing out one cache row takes 2·512·64·256 = 16.8 Mflop,
so that 171 new tokens are the break-even by operations, whatever the prefix, and 230 by the clock of an H200. 1,024 tokens
onto 100,000 rows: 4.2 Tflop in attention and 1.7 in writing out, 7.5 ms at 790 TFLOP/s; measured 16 ms. Written out, 4,096
rows are 134 MB of keys and values, and the second cache level holds 50 MB: heads run in the grid's outer dimension, so that
one head's 2 MB stay there for all its query tiles.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from thinkloop.kernels.compile_case import CompileCase
from thinkloop.kernels.mla_decode import LOG2_E, MAX_TOKENS, mla_decode
from thinkloop.kernels.target import INTERPRET, chip, dot
from torch import Tensor

CHUNK = 4096
"""Cache rows written out at once."""


@dataclass(frozen=True, slots=True)
class PrefillTiles:
    """Queries and keys of a tile, warps and pipeline stages."""

    queries: int
    keys: int
    num_warps: int
    num_stages: int


def prefill_tiles(tokens: int, capability: int = 90) -> PrefillTiles:
    """128 queries fill two warp groups' matrix instructions; short pieces take 64. 1,024 queries of K2 onto 4,096 keys take 428
    µs with 64 keys a tile and three stages, 464 with 128 and two, 550 with 64 and two."""
    if tokens <= 64:
        return PrefillTiles(64, 64, num_warps=4, num_stages=2)
    return PrefillTiles(128, 64, num_warps=8, num_stages=3 if capability >= 90 else 2)


@triton.jit(do_not_specialize=["queries", "keys", "offset"])
def _prefill_kernel(
    p_q, p_nope, p_rope, p_value, p_out, p_lse, scale, queries, keys, offset, s_rope, s_nope_head, s_nope, s_value_head,
    s_value, HEADS: tl.constexpr, NOPE: tl.constexpr, ROPE: tl.constexpr, VALUE: tl.constexpr, QUERIES: tl.constexpr,
    KEYS: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """One head and tile of queries over all keys. Query t sees the keys up to t + offset. `scale` includes log2(e)."""
    i_tile, i_head = tl.program_id(0), tl.program_id(1)
    o_query, o_key = i_tile * QUERIES + tl.arange(0, QUERIES), tl.arange(0, KEYS)
    o_nope, o_rope, o_value = tl.arange(0, NOPE), tl.arange(0, ROPE), tl.arange(0, VALUE)
    real = o_query < queries
    p_row = p_q + (o_query.to(tl.int64) * HEADS + i_head)[:, None] * (NOPE + ROPE)
    b_q = tl.load(p_row + o_nope[None, :], mask=real[:, None], other=0.0)
    b_q_rope = tl.load(p_row + NOPE + o_rope[None, :], mask=real[:, None], other=0.0)
    b_max = tl.full([QUERIES], -1e30, tl.float32)
    b_sum = tl.zeros([QUERIES], tl.float32)
    b_out = tl.zeros([QUERIES, VALUE], tl.float32)
    last = tl.minimum(keys, (i_tile + 1) * QUERIES + offset)
    for start in range(0, last, KEYS):
        o_row = (start + o_key).to(tl.int64)
        inside = (o_row < keys)[:, None]
        b_nope = tl.load(
            p_nope + i_head * s_nope_head + o_row[:, None] * s_nope + o_nope[None, :], mask=inside, other=0.0
        )
        b_rope = tl.load(p_rope + o_row[:, None] * s_rope + o_rope[None, :], mask=inside, other=0.0)
        b_scores = dot(b_q, tl.trans(b_nope), INTERPRET) + dot(b_q_rope, tl.trans(b_rope), INTERPRET)
        seen = (o_row[None, :] <= (o_query + offset)[:, None]) & (o_row < keys)[None, :]
        b_scores = tl.where(seen, b_scores * scale, float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_scores, 1))
        b_weights = tl.exp2(b_scores - b_new[:, None])
        b_keep = tl.exp2(b_max - b_new)
        b_sum = b_sum * b_keep + tl.sum(b_weights, 1)
        b_value = tl.load(
            p_value + i_head * s_value_head + o_row[:, None] * s_value + o_value[None, :], mask=inside, other=0.0
        )
        b_out = b_out * b_keep[:, None] + dot(b_weights.to(b_value.dtype), b_value, INTERPRET)
        b_max = b_new
    b_some = b_sum > 0
    o_out = o_query.to(tl.int64) * HEADS + i_head
    tl.store(p_lse + o_out, tl.where(b_some, b_max + tl.log2(tl.where(b_some, b_sum, 1.0)), float("-inf")), mask=real)
    b_out /= tl.where(b_some, b_sum, 1.0)[:, None]
    tl.store(p_out + o_out[:, None] * VALUE + o_value[None, :], b_out, mask=real[:, None])


def attend(
    q: Tensor, nope: Tensor, rope: Tensor, value: Tensor, scale: float, *, causal_offset: int | None = None
) -> tuple[Tensor, Tensor]:
    """Attention of `q [T, H, N+R]` over keys `nope [H, S, N]` beside `rope [S, R]`, shared by the heads and so not copied
    to each, and `value [H, S, V]`, bfloat16: query t sees the keys up to `t + causal_offset`; None: all of them.

    Returns float32 `[T, H, V]` and the base-2 logarithm of each sum of weights, `[T, H]`; zeros and -inf where a query
    sees nothing. N, R and V are powers of two from 16 up. Raises `ValueError` naming the argument that doesn't fit.
    """
    _check(q, nope, rope, value)
    queries, heads, _ = q.shape
    out = torch.empty(queries, heads, value.shape[2], dtype=torch.float32, device=q.device)
    lse = torch.empty(queries, heads, dtype=torch.float32, device=q.device)
    tiles = prefill_tiles(queries, chip(q.device).capability)
    _prefill_kernel[(triton.cdiv(queries, tiles.queries), heads)](
        q, nope, rope, value, out, lse, scale * LOG2_E, queries, nope.shape[1],
        nope.shape[1] if causal_offset is None else causal_offset,
        rope.stride(0), nope.stride(0), nope.stride(1), value.stride(0), value.stride(1),
        **_constants(heads, nope.shape[2], rope.shape[1], value.shape[2], tiles),
        num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip
    return out, lse


def merge(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Two results of `attend` for the same queries over different keys, as one over all of them."""
    lse = torch.logaddexp2(first[1], second[1])
    shares = [torch.exp2(part[1] - lse).nan_to_num_(0.0) for part in (first, second)]  # -inf - -inf: nothing seen yet
    return first[0] * shares[0][..., None] + second[0] * shares[1][..., None], lse


def mla_prefill(q: Tensor, rows: Tensor, w_uk: Tensor, w_uv: Tensor, scale: float, *, chunk: int = CHUNK) -> Tensor:
    """Latent attention with keys and values written out, `chunk` cache rows at a time: bfloat16 `[T, H, V]`.

    `q [T, H, N+R]` (rotated) belongs to the last of `rows [S, C+R]` (normed latent, rotated key), `w_uk [H, N, C]`,
    `w_uv [H, C, V]`, all bfloat16. Scratch: `chunk · H · (N + V)` values.
    """
    latent, total, tokens = w_uk.shape[2], rows.shape[0], q.shape[0]
    result: tuple[Tensor, Tensor] | None = None
    for start in range(0, total, chunk):
        piece = rows[start : start + chunk]
        shared = piece[:, :latent].expand(w_uk.shape[0], -1, -1)  # a view
        nope, value = torch.bmm(shared, w_uk.transpose(1, 2)), torch.bmm(shared, w_uv)  # [H, s, N], [H, s, V]
        part = attend(q, nope, piece[:, latent:], value, scale, causal_offset=total - tokens - start)
        result = part if result is None else merge(result, part)
    if result is None:
        raise ValueError("`rows` must hold at least the new tokens' own.")
    return result[0].to(q.dtype)


def mla_append(
    q: Tensor, cache: Tensor, table: Tensor, length: int, w_uk: Tensor, w_uv: Tensor, scale: float
) -> Tensor:
    """The same absorbed, over a paged cache as in `mla_decode` (`table [pages]`, `length` rows, the new ones included):
    groups of up to 8 tokens side by side, each as long as its own last token. Zeros in front fill the first group."""
    tokens, nope = q.shape[0], w_uk.shape[1]
    group = min(tokens, MAX_TOKENS)
    groups = -(-tokens // group)
    pad = groups * group - tokens
    latent = torch.bmm(q[..., :nope].transpose(0, 1), w_uk).transpose(0, 1)  # [T, H, C]
    whole = F.pad(torch.cat([latent, q[..., nope:]], dim=-1), (0, 0, 0, 0, pad, 0))
    whole = torch.unflatten(whole, 0, (groups, group))  # [groups, 8, H, C+R]
    ends = torch.arange(length - (groups - 1) * group, length + 1, group, dtype=torch.int32, device=q.device)
    mixed = mla_decode(whole, cache, table.repeat(groups, 1), ends, scale).flatten(0, 1)[pad:]
    return torch.bmm(mixed.transpose(0, 1), w_uv).transpose(0, 1)


def _constants(heads: int, nope: int, rope: int, value: int, tiles: PrefillTiles) -> dict[str, Any]:
    return {
        "HEADS": heads, "NOPE": nope, "ROPE": rope, "VALUE": value, "QUERIES": tiles.queries, "KEYS": tiles.keys,
        "INTERPRET": INTERPRET,
    }  # fmt: skip


def _check(q: Tensor, nope: Tensor, rope: Tensor, value: Tensor) -> None:
    if q.dim() != 3 or q.dtype != torch.bfloat16 or not q.is_contiguous():
        raise ValueError(f"`q` must be contiguous bfloat16 [T, H, N+R], not {q.dtype} {q.shape}.")
    heads, rows = q.shape[1], rope.shape[0]
    for name, part, lead in (("nope", nope, (heads, rows)), ("value", value, (heads, rows)), ("rope", rope, (rows,))):
        if part.dtype != q.dtype or part.shape[:-1] != lead or part.stride(-1) != 1:
            raise ValueError(
                f"`{name}` must be {q.dtype} {[*lead, '·']} with adjacent columns, not {part.dtype} {part.shape}."
            )
        if part.shape[-1] < 16 or part.shape[-1] & part.shape[-1] - 1:
            raise ValueError(f"`{name}` must be a power of two wide, at least 16, not {part.shape[-1]}.")
    if nope.shape[2] + rope.shape[1] != q.shape[2]:
        raise ValueError(f"`q` must be as wide as `nope` and `rope` together, {nope.shape[2]} + {rope.shape[1]}.")


def compile_cases(capability: int = 90) -> Iterator[CompileCase]:
    """Kimi-K2 and Moonlight, a short piece and a long one."""
    pointers = ("p_q", "p_nope", "p_rope", "p_value")
    numbers = ("queries", "keys", "offset", "s_rope", "s_nope_head", "s_nope", "s_value_head", "s_value")
    for (model, heads), tokens in ((m, t) for m in (("k2", 64), ("moonlight", 16)) for t in (64, 1024)):
        tiles = prefill_tiles(tokens, capability)
        constants = _constants(heads, 128, 64, 128, tiles)
        signature = dict.fromkeys(pointers, "*bf16") | {"p_out": "*fp32", "p_lse": "*fp32", "scale": "fp32"}
        signature |= dict.fromkeys(numbers, "i32") | dict.fromkeys(constants, "constexpr")
        name = f"mla_prefill-{model}-{tokens}"
        yield CompileCase(name, _prefill_kernel, signature, constants, tiles.num_warps, tiles.num_stages, decode=False)
