"""The layers by the Triton kernels, for bfloat16 models on CUDA: the maths of `Transformer._layers`, nothing read back.

A layer of experts takes 25 launches (counted here): norms with the residual's addition, rotation with the writing of the
cache and the router are a kernel each, the experts three, plain products are torch's. Nothing here waits for the device or
looks at values on it, so that a step of fixed size can be captured as a CUDA graph (`kernel_steps`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from thinkloop.engine.config import ModelConfig
from thinkloop.engine.mla_choice import expanded_is_cheaper
from thinkloop.engine.weights import Attention, Experts, Mlp, Weights
from thinkloop.kernels.int4 import swiglu_act
from thinkloop.kernels.int4_moe import moe_int4
from thinkloop.kernels.mla_decode import mla_decode
from thinkloop.kernels.mla_prefill import mla_append, mla_prefill
from thinkloop.kernels.rms_norm import rms_norm
from thinkloop.kernels.rope_cache import rope_and_store
from thinkloop.kernels.router import route
from torch import Tensor

Attend = Callable[[Tensor, Tensor, Attention], Tensor]
"""Attention of rotated queries `[n, H, N+R]` over one layer's cache `[slots, C+R]` -> `[n, H, V]`."""


class Places(NamedTuple):
    """Where a step's `n` tokens stand: position in their sequences, and slot in the cache (-1: nowhere, padding)."""

    ids: Tensor  # [n] int64
    positions: Tensor  # [n] int64
    slots: Tensor  # [n] int64


class Piece(NamedTuple):
    """One sequence's part of a long step: its rows `first` to `last - 1`, and where its `length` rows of cache lie."""

    first: int
    last: int
    length: int
    spans: Sequence[tuple[int, int]]
    table: Tensor  # [blocks] int32


class KernelModel:
    """The layers of one model. Weights were loaded for the `triton` backend."""

    def __init__(self, config: ModelConfig, weights: Weights) -> None:
        self.config, self.weights = config, weights

    def forward(self, places: Places, layers: Sequence[Tensor], turn: Tensor, attend: Attend) -> Tensor:
        """The last layer's normed output `[n, D]`. `layers` are the cache's, `turn` the rotary table `[P, R/2]`."""
        c = self.config
        x = F.embedding(places.ids, self.weights.embed)
        update: Tensor | None = None
        for layer, cache in zip(self.weights.layers, layers, strict=True):
            h = self._norm(x, update, layer.attention.norm)
            update = self._attend(h, layer.attention, cache, places, turn, attend)
            h = self._norm(x, update, layer.mlp.norm)
            update = self._experts(h, layer.mlp) if isinstance(layer.mlp, Experts) else _swiglu(h, layer.mlp)
        assert update is not None
        return rms_norm(update, self.weights.norm, c.rms_norm_eps, residual=x)

    def _norm(self, x: Tensor, update: Tensor | None, weight: Tensor | None) -> Tensor:
        """The norm of the residual stream `x`, after `update` was added to it."""
        if update is None:
            return rms_norm(x, weight, self.config.rms_norm_eps)
        return rms_norm(update, weight, self.config.rms_norm_eps, residual=x)

    def _attend(self, h: Tensor, w: Attention, cache: Tensor, places: Places, turn: Tensor, attend: Attend) -> Tensor:
        c = self.config
        joined = h @ w.w_in  # [n, Q+C+R]
        latent_q, row = torch.split(joined, [joined.shape[1] - c.cache_width, c.cache_width], dim=1)
        q = latent_q.contiguous() if w.w_q is None else rms_norm(latent_q, w.q_norm, c.lora_norm_eps) @ w.w_q
        q = torch.unflatten(q, 1, (c.num_attention_heads, c.qk_head_dim))
        rope_and_store(q, row, w.kv_norm, c.lora_norm_eps, turn, places.positions, places.slots, cache)
        return attend(q, cache, w).flatten(1) @ w.w_o

    def _experts(self, h: Tensor, w: Experts) -> Tensor:
        c = self.config
        ids, shares = route(
            h.float() @ w.w_router, w.bias, top_k=c.num_experts_per_tok, groups=c.n_group, top_groups=c.topk_group,
            scale=c.routed_scaling_factor, normalise=c.norm_topk_prob, scoring=c.scoring_func,
        )  # fmt: skip
        gate_up, down = w.gate_up, w.down
        if gate_up.packed is not None and down.packed is not None:
            out = moe_int4(h, ids, shares, gate_up.packed, down.packed)
        else:
            assert gate_up.stacked is not None
            assert down.stacked is not None
            out = grouped_experts(h, ids, shares, gate_up.stacked, down.stacked)
        return out if w.shared is None else out.add_(_swiglu(h, w.shared))


def decode_attention(config: ModelConfig, table: Tensor, lengths: Tensor) -> Attend:
    """Attention of a few tokens a sequence, absorbed: `n / B` tokens for each of `lengths [B]`; `table [B, blocks]`."""
    nope, batch = config.qk_nope_head_dim, lengths.shape[0]

    def attend(q: Tensor, cache: Tensor, w: Attention) -> Tensor:
        latent = torch.bmm(q[..., :nope].transpose(0, 1), w.w_uk).transpose(0, 1)  # [n, H, C]
        whole = torch.unflatten(torch.cat([latent, q[..., nope:]], dim=-1), 0, (batch, -1))  # [B, T, H, C+R]
        mixed = mla_decode(whole, cache, table, lengths, config.softmax_scale)
        return torch.bmm(mixed.flatten(0, 1).transpose(0, 1), w.w_uv).transpose(0, 1)

    return attend


def reading_attention(config: ModelConfig, pieces: Sequence[Piece]) -> Attend:
    """Attention of long pieces, one sequence after the other: absorbed or with keys and values written out."""
    scale = config.softmax_scale

    def attend(q: Tensor, cache: Tensor, w: Attention) -> Tensor:
        parts = []
        for piece in pieces:
            own = q[piece.first : piece.last]
            if expanded_is_cheaper(config, len(own), piece.length):
                part = mla_prefill(own, _rows(cache, piece.spans), w.w_uk, w.w_uv, scale)
            else:
                part = mla_append(own, cache, piece.table, piece.length, w.w_uk, w.w_uv, scale)
            parts.append(part)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    return attend


def grouped_experts(x: Tensor, ids: Tensor, shares: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """`reference.moe` of bfloat16 experts `gate_up [E, D, 2I]`, `down [E, I, D]`, by torch's grouped products: `x [T, D]`,
    `ids [T, K]`, `shares [T, K]` -> `[T, D]`."""
    order = ids.flatten().argsort(stable=True)
    tokens = order // ids.shape[1]
    ends = F.one_hot(ids.flatten().long(), gate_up.shape[0]).sum(0).cumsum(0).int()
    hidden = swiglu_act(F.grouped_mm(x[tokens], gate_up, offs=ends))
    y = torch.empty(len(order), x.shape[1], dtype=torch.float32, device=x.device)
    y[order] = F.grouped_mm(hidden, down, offs=ends).float()  # and a sum in a fixed order, not by atomic additions
    return torch.bmm(shares.float()[:, None], torch.unflatten(y, 0, ids.shape))[:, 0].to(x.dtype)


def _rows(cache: Tensor, spans: Sequence[tuple[int, int]]) -> Tensor:
    parts = [cache[start:stop] for start, stop in spans]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _swiglu(x: Tensor, w: Mlp) -> Tensor:
    return swiglu_act(x @ w.w_gate_up) @ w.w_down
