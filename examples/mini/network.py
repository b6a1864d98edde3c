"""The mini model for training: the same maths as the engine's forward pass, written for gradients and whole batches.

Parameters are kept in the shapes of the published format. All experts are computed for every token and weighted by the router
(zero where an expert isn't chosen): at eight experts one dense matmul is faster on a CPU than sorting tokens by expert.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GROUP = 32


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of the model, under the names of the published configuration."""

    vocab_size: int
    hidden_size: int = 192
    num_hidden_layers: int = 5
    first_k_dense_replace: int = 1
    intermediate_size: int = 512
    moe_intermediate_size: int = 64
    n_routed_experts: int = 8
    num_experts_per_tok: int = 2
    n_shared_experts: int = 1
    num_attention_heads: int = 6
    q_lora_rank: int = 96
    kv_lora_rank: int = 128
    qk_nope_head_dim: int = 32
    qk_rope_head_dim: int = 32
    v_head_dim: int = 32
    routed_scaling_factor: float = 2.827
    rms_norm_eps: float = 1e-5
    rope_theta: float = 50000.0
    rope_factor: float = 64.0
    rope_original: int = 4096

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def rope_table(shape: Shape, length: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines `[length, rope/2]` of YaRN with beta_fast = beta_slow = 1 (a step between two frequencies)."""
    dim = shape.qk_rope_head_dim
    index = torch.arange(dim // 2, dtype=torch.float64)
    extra = shape.rope_theta ** (-2 * index / dim)
    turn = dim * math.log(shape.rope_original / (2 * math.pi)) / (2 * math.log(shape.rope_theta))
    low, high = math.floor(turn), math.ceil(turn)
    ramp = ((index - low) / (high - low)).clamp(0, 1)
    angles = torch.arange(length, dtype=torch.float64)[:, None] * (
        extra / shape.rope_factor * ramp + extra * (1 - ramp)
    )
    return angles.cos().float(), angles.sin().float()


def softmax_scale(shape: Shape) -> float:
    return (shape.qk_nope_head_dim + shape.qk_rope_head_dim) ** -0.5 * (0.1 * math.log(shape.rope_factor) + 1) ** 2


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Interleaved rotary embedding of `[..., T, heads, rope]`."""
    even, odd = x[..., 0::2], x[..., 1::2]
    cos, sin = cos[:, None, :].to(x.dtype), sin[:, None, :].to(x.dtype)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)


def fake_quantise(weight: Tensor) -> Tensor:
    """Weights as INT4 would hold them (groups of 32 along the input, scale = max/7, bf16), with straight-through gradient."""
    grouped = weight.detach().unflatten(-1, (-1, GROUP))
    scale = (grouped.abs().amax(-1, keepdim=True) / 7).clamp_min(1e-5).bfloat16().float()
    rounded = ((grouped / scale).round().clamp(-7, 7) * scale).flatten(-2)
    return weight + (rounded - weight.detach())


class Attention(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.s = s
        heads, qk = s.num_attention_heads, s.qk_nope_head_dim + s.qk_rope_head_dim
        self.q_a_proj = nn.Linear(s.hidden_size, s.q_lora_rank, bias=False)
        self.q_a_layernorm = nn.RMSNorm(s.q_lora_rank, eps=1e-6)
        self.q_b_proj = nn.Linear(s.q_lora_rank, heads * qk, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(s.hidden_size, s.kv_lora_rank + s.qk_rope_head_dim, bias=False)
        self.kv_a_layernorm = nn.RMSNorm(s.kv_lora_rank, eps=1e-6)
        self.kv_b_proj = nn.Linear(s.kv_lora_rank, heads * (s.qk_nope_head_dim + s.v_head_dim), bias=False)
        self.o_proj = nn.Linear(heads * s.v_head_dim, s.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # x [B, T, D]
        s, heads = self.s, self.s.num_attention_heads
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x))).unflatten(-1, (heads, -1))
        q_nope, q_pe = q.split((s.qk_nope_head_dim, s.qk_rope_head_dim), -1)
        c, k_pe = self.kv_a_proj_with_mqa(x).split((s.kv_lora_rank, s.qk_rope_head_dim), -1)
        kv = self.kv_b_proj(self.kv_a_layernorm(c)).unflatten(-1, (heads, -1))
        k_nope, v = kv.split((s.qk_nope_head_dim, s.v_head_dim), -1)
        q = torch.cat((q_nope, rotate(q_pe, cos, sin)), -1).mul(softmax_scale(s))
        k = torch.cat((k_nope, rotate(k_pe[:, :, None], cos, sin).expand(-1, -1, heads, -1)), -1)
        return self.o_proj(causal(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2).flatten(-2))


def causal(q: Tensor, k: Tensor, v: Tensor, chunk: int = 128) -> Tensor:
    """Causal attention `[B, H, T, d]` in chunks of queries: each sees only the keys before its end (half the work)."""
    out = []
    for start in range(0, q.shape[2], chunk):
        end = min(start + chunk, q.shape[2])
        scores = q[:, :, start:end] @ k[:, :, :end].transpose(-1, -2)
        mask = torch.ones(end - start, end - start, dtype=torch.bool, device=q.device).triu(1)
        scores[..., start:].masked_fill_(mask, -1e4)
        out.append(scores.softmax(-1) @ v[:, :, :end])
    return torch.cat(out, 2)


class Mlp(nn.Module):
    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Moe(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.s, inner = s, s.moe_intermediate_size
        self.gate = nn.Parameter(torch.empty(s.n_routed_experts, s.hidden_size).normal_(std=s.hidden_size**-0.5))
        self.register_buffer("e_score_correction_bias", torch.zeros(s.n_routed_experts))
        self.gate_proj = nn.Parameter(
            torch.empty(s.n_routed_experts, inner, s.hidden_size).normal_(std=s.hidden_size**-0.5)
        )
        self.up_proj = nn.Parameter(
            torch.empty(s.n_routed_experts, inner, s.hidden_size).normal_(std=s.hidden_size**-0.5)
        )
        self.down_proj = nn.Parameter(torch.empty(s.n_routed_experts, s.hidden_size, inner).normal_(std=inner**-0.5))
        self.shared_experts = Mlp(s.hidden_size, inner * s.n_shared_experts)
        self.quantise = False
        self.load = torch.zeros(s.n_routed_experts)

    def forward(self, x: Tensor) -> Tensor:  # [B, T, D]
        weights = self._route(x)  # [B, T, E]
        gate, up, down = (
            (fake_quantise(w) if self.quantise else w).to(x.dtype)
            for w in (self.gate_proj, self.up_proj, self.down_proj)
        )
        inner = F.silu(F.linear(x, gate.flatten(0, 1))) * F.linear(x, up.flatten(0, 1))  # [B, T, E*I]
        inner = (inner.unflatten(-1, (weights.shape[-1], -1)) * weights[..., None].to(x.dtype)).flatten(-2)
        return F.linear(inner, down.transpose(0, 1).flatten(1)) + self.shared_experts(x)

    def _route(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            scores = F.linear(x.float(), self.gate).sigmoid()
        chosen = (scores + self.e_score_correction_bias).topk(self.s.num_experts_per_tok, -1).indices
        mask = torch.zeros_like(scores).scatter_(-1, chosen, 1.0)
        if self.training:
            self.load = mask.detach().flatten(0, -2).mean(0)
        weights = scores * mask
        return weights / (weights.sum(-1, keepdim=True) + 1e-20) * self.s.routed_scaling_factor

    def balance(self, step: float) -> None:
        """Nudge the selection bias of crowded experts down and of idle ones up."""
        self.e_score_correction_bias += step * (self.load.mean() - self.load).sign()


class Block(nn.Module):
    def __init__(self, s: Shape, index: int) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(s.hidden_size, eps=s.rms_norm_eps)
        self.self_attn = Attention(s)
        self.post_attention_layernorm = nn.RMSNorm(s.hidden_size, eps=s.rms_norm_eps)
        dense = index < s.first_k_dense_replace
        self.mlp: nn.Module = Mlp(s.hidden_size, s.intermediate_size) if dense else Moe(s)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Network(nn.Module):
    """`forward(ids [B, T], pick [N])` gives logits `[N, V]` at the picked flat positions (all of them when None)."""

    def __init__(self, shape: Shape, max_length: int = 2048) -> None:
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        nn.init.normal_(self.embed_tokens.weight, std=1.0)
        self.layers = nn.ModuleList(Block(shape, index) for index in range(shape.num_hidden_layers))
        self.norm = nn.RMSNorm(shape.hidden_size, eps=shape.rms_norm_eps)
        self.lm_head = nn.Linear(shape.hidden_size, shape.vocab_size, bias=False)
        cos, sin = rope_table(shape, max_length)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        for block in self.layers:
            nn.init.zeros_(block.self_attn.o_proj.weight)

    def moes(self) -> list[Moe]:
        return [block.mlp for block in self.layers if isinstance(block.mlp, Moe)]

    def forward(self, ids: Tensor, pick: Tensor | None = None) -> Tensor:
        cos, sin = self.cos[: ids.shape[1]], self.sin[: ids.shape[1]]
        x = self.embed_tokens(ids)
        for block in self.layers:
            x = block(x, cos, sin)
        x = x.flatten(0, 1)
        return self.lm_head(self.norm(x if pick is None else x[pick]))
