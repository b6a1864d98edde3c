"""What each kernel means, in plain torch: slow, short, and the definition that every fast twin is tested against.

Formulas: DeepSeek-V2 (arXiv 2405.04434) section 2.1 for latent attention, DeepSeek-V3 (arXiv 2412.19437) section 2.1
for routing, YaRN (arXiv 2309.00071) for positions, compressed-tensors `pack-quantized` for INT4.
Shapes: T new tokens, S tokens in the cache, D hidden, H heads, C latent, N nope, R rope, V value, E experts, K chosen.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

GROUP = 32
"""INT4 weights share one scale per this many input features."""

FP8_BLOCK = 128
"""FP8 weights share one scale per square of this many rows and columns."""


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Root-mean-square norm over the last dimension: in float32, cast back to `x.dtype`, then times `weight`."""
    wide = x.float()
    normed = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)
    return normed if weight is None else normed * weight


def inv_freq(dim: int, theta: float) -> Tensor:
    """Plain rotary frequencies `theta^(-2i/dim)`, float32 `[dim/2]`."""
    return 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)


def yarn_inv_freq(
    dim: int, theta: float, *, factor: float, original: int, beta_fast: float, beta_slow: float
) -> Tensor:
    """YaRN's frequencies, float32 `[dim/2]`: high ones kept, low ones divided by `factor`, a ramp between.

    With K2's `beta_fast = beta_slow = 1` the ramp is a step: pairs 0..19 of 32 are kept, 20..31 divided.
    """

    def turns(rotations: float) -> float:
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = max(math.floor(turns(beta_fast)), 0), min(math.ceil(turns(beta_slow)), dim - 1)
    width = (high - low) or 0.001
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    extrapolated = inv_freq(dim, theta)
    return extrapolated / factor * ramp + extrapolated * (1 - ramp)


def rope_table(frequencies: Tensor, start: int, end: int, multiplier: float = 1.0) -> Tensor:
    """`multiplier · e^{i·position·frequency}` for positions `start..end-1`: complex64 `[end - start, R/2]`."""
    angles = torch.outer(torch.arange(start, end, dtype=torch.float32, device=frequencies.device), frequencies)
    return torch.polar(torch.full_like(angles, multiplier), angles)


def rope(x: Tensor, table: Tensor) -> Tensor:
    """Rotates interleaved pairs `(x[2i], x[2i+1])` of `x [T, ..., R]` by `table [T, R/2]`, in float32."""
    pairs = torch.view_as_complex(torch.unflatten(x.float(), -1, (-1, 2)).contiguous())  # [T, ..., R/2]
    table = table.view(table.shape[0], *[1] * (pairs.dim() - 2), table.shape[1])
    return torch.view_as_real(pairs * table).flatten(-2).to(x.dtype)


def _hide_future(scores: Tensor, new: int, tokens: int) -> Tensor:
    """Masks, in place, what lies after each of the `new` tokens counted along dimension `tokens`; only the last `new`
    columns can, so the prefix isn't touched."""
    if new > 1:
        future = torch.ones(new, new, dtype=torch.bool, device=scores.device).triu(1)
        scores[..., -new:].masked_fill_(future.unsqueeze(1 - tokens), float("-inf"))
    return scores


def _softmax(scores: Tensor) -> Tensor:
    return scores.softmax(-1)  # summed in float32 whatever the dtype


def _expand(latent: Tensor, weight: Tensor) -> Tensor:
    """`latent [S, C]` through `weight [C, H, X]` -> `[H, S, X]`, as one product of width H·X rather than H narrow
    ones."""
    return torch.unflatten(latent @ weight.flatten(1), 1, weight.shape[1:]).transpose(0, 1)


def mla_expanded(q: Tensor, cache: Tensor, w_uk: Tensor, w_uv: Tensor, scale: float) -> Tensor:
    """Latent attention with keys and values expanded per head; cheapest for many new tokens.

    `q [T, H, N+R]` (rotated), `cache [S, C+R]` (normed latent, rotated key; the new tokens last), `w_uk [H, N, C]`,
    `w_uv [H, C, V]`. Returns `[T, H, V]`.
    """
    latent, k_pe = torch.split(cache, [w_uk.shape[2], cache.shape[1] - w_uk.shape[2]], dim=-1)
    k_nope = _expand(latent, w_uk.permute(2, 0, 1))  # [H, S, N]
    k = torch.cat([k_nope, k_pe.expand(k_nope.shape[0], -1, -1)], dim=-1)  # [H, S, N+R]
    v = _expand(latent, w_uv.permute(1, 0, 2))  # [H, S, V]
    scores = torch.bmm(q.transpose(0, 1) * scale, k.transpose(1, 2))  # [H, T, S]
    return torch.bmm(_softmax(_hide_future(scores, q.shape[0], 1)), v).transpose(0, 1)


def mla_absorbed(q: Tensor, cache: Tensor, w_uk: Tensor, w_uv: Tensor, scale: float) -> Tensor:
    """Latent attention in the latent space: one shared key of `C+R` per token, read once for all heads. Shapes as
    above."""
    n, c = w_uk.shape[1], w_uk.shape[2]
    latent_q = torch.einsum("thn,hnc->thc", q[..., :n], w_uk)  # [T, H, C]
    scores = (torch.cat([latent_q, q[..., n:]], dim=-1) * scale) @ cache.T  # [T, H, S]
    mixed = _softmax(_hide_future(scores, q.shape[0], 0)) @ cache[:, :c]
    return torch.einsum("thc,hcv->thv", mixed, w_uv)


def route(
    logits: Tensor, bias: Tensor | None, *, top_k: int, groups: int = 1, top_groups: int = 1, scale: float = 1.0,
    normalise: bool = True, scoring: str = "sigmoid",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Chooses experts: `logits` float32 `[T, E]` -> ids `[T, K]` int64, weights `[T, K]` float32.

    `bias` only decides who is chosen; weights come from the unbiased scores. With groups, only experts of the
    `top_groups` best groups can be chosen: under sigmoid scoring a group counts the sum of its two best (DeepSeek-V3's
    `noaux_tc`), under softmax its best (V2's `group_limited_greedy`). Experts of dropped groups are masked with -inf,
    as in transformers 5 and the original V3 code; V2's masks with 0, which no softmax falls under.
    """
    scores = logits.sigmoid() if scoring == "sigmoid" else logits.softmax(-1)
    choice = scores if bias is None else scores + bias
    if groups > 1:
        grouped = torch.unflatten(choice, -1, (groups, -1))  # [T, G, E/G]
        best = grouped.topk(2 if scoring == "sigmoid" else 1, dim=-1).values.sum(-1)  # [T, G]
        kept = best.topk(top_groups, dim=-1).indices  # [T, top_groups]
        dropped = torch.ones(grouped.shape[:-1], dtype=torch.bool, device=logits.device).scatter(-1, kept, False)
        choice = grouped.masked_fill(dropped[..., None], float("-inf")).flatten(-2)
    ids = choice.topk(top_k, dim=-1).indices
    weights = scores.gather(-1, ids)
    if normalise:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return ids, weights * scale


def swiglu(x: Tensor, w_gate_up: Tensor, w_down: Tensor) -> Tensor:
    """`silu(x·gate) * (x·up)` then down: `x [T, D]`, `w_gate_up [D, 2I]` (gate first), `w_down [I, D]`."""
    gate, up = (x @ w_gate_up).chunk(2, dim=-1)
    return (F.silu(gate) * up) @ w_down


def pack_int4(values: Tensor) -> Tensor:
    """Packs int8 values in [-8, 7], `[..., N, K]`, into int32 `[..., N, K/8]`: offset-binary (q+8), lowest nibble
    first."""
    if values.shape[-1] % 8:
        raise ValueError(f"pack_int4 needs a multiple of 8 input features, not {values.shape[-1]}")
    nibbles = torch.unflatten(values.to(torch.int64) + 8, -1, (-1, 8))
    words = (nibbles << torch.arange(0, 32, 4, device=values.device)).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def unpack_int4(packed: Tensor) -> Tensor:
    """The inverse of `pack_int4`: int32 `[..., N, K/8]` -> int8 `[..., N, K]`. Byte by byte (words are little-endian on
    every machine torch runs on): 0.8 GB/s a core, where shifting words gives 0.09."""
    pairs = packed.contiguous().view(torch.uint8)  # [..., N, K/2]
    values = torch.empty(*packed.shape[:-1], 8 * packed.shape[-1], dtype=torch.int8, device=packed.device)
    nibbles = torch.unflatten(values.view(torch.uint8), -1, (-1, 2))
    torch.bitwise_and(pairs, 15, out=nibbles[..., 0])
    torch.bitwise_right_shift(pairs, 4, out=nibbles[..., 1])
    return values.sub_(8)


def dequantise_int4(packed: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`(nibble - 8) * scale` per group of 32 input features: `[..., N, K/8]`, `[..., N, K/32]` -> `[..., N, K]`."""
    grouped = torch.unflatten(unpack_int4(packed), -1, (-1, GROUP)).float()
    return (grouped * scale.float()[..., None]).flatten(-2).to(dtype)


def quantise_int4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric INT4 of `weight [..., N, K]`, group 32, in [-7, 7] as K2 was trained: packed int32, scale bfloat16."""
    grouped = torch.unflatten(weight.float(), -1, (-1, GROUP))
    scale = (grouped.abs().amax(-1) / 7).clamp_min(1e-5).bfloat16()
    values = (grouped / scale.float()[..., None]).round().clamp(-7, 7).to(torch.int8)
    return pack_int4(values.flatten(-2)), scale


def dequantise_fp8(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`weight · scale` per 128×128 block: float8_e4m3fn `[N, K]`, float `[⌈N/128⌉, ⌈K/128⌉]` -> `[N, K]`, multiplied in
    float32 and rounded once. The checkpoints' `weight_scale_inv` is this scale, in spite of its name."""
    rows, columns = weight.shape
    per_row = scale.float().repeat_interleave(FP8_BLOCK, 0)[:rows]  # [N, K/128]
    return (weight.float() * per_row.repeat_interleave(FP8_BLOCK, 1)[:, :columns]).to(dtype)


def moe(x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """`Σ_k weights[t,k] · expert_{ids[t,k]}(x[t])` over dense experts `gate_up [E, 2I, D]`, `down [E, D, I]`."""
    out = torch.zeros_like(x, dtype=torch.float32)
    for token, (chosen, share) in enumerate(zip(ids.tolist(), weights, strict=True)):
        for expert, weight in zip(chosen, share, strict=True):
            out[token] += weight * swiglu(x[token : token + 1], gate_up[expert].T, down[expert].T)[0].float()
    return out.to(x.dtype)


def moe_int4(
    x: Tensor, ids: Tensor, weights: Tensor, gate_up: tuple[Tensor, Tensor], down: tuple[Tensor, Tensor]
) -> Tensor:
    """`moe` from packed experts: each pair is int32 `[E, N, K/8]` and scale `[E, N, K/32]` in the published layout."""
    return moe(x, ids, weights, dequantise_int4(*gate_up, x.dtype), dequantise_int4(*down, x.dtype))
