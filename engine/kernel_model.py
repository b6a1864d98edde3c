"""The layers by the Triton kernels, for bfloat16 models on CUDA: the maths of `Transformer._layers`, nothing read back.

A step of few rows (`decode`) is bound by reading weights and by what lies between two kernels: of one row, a layer of experts is
10 launches, or 11 with compressed queries, most of which have their first weights on their way when the one before ends. Of
many rows (`forward`), plain products are torch's. Nothing here waits for the device or looks at values on it, so that
a step of fixed size can be captured as a CUDA graph (`kernel_steps`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from thinkloop.engine.config import ModelConfig
from thinkloop.engine.mla_choice import expanded_is_cheaper
from thinkloop.engine.weights import Attention, Experts, Mlp, Weights
from thinkloop.kernels.gate import gate, gate_pays
from thinkloop.kernels.int4 import swiglu_act
from thinkloop.kernels.int4_moe import moe_int4, moe_parts
from thinkloop.kernels.kv_fp8 import Stage, gather_rows, store_rows
from thinkloop.kernels.linear import FEW, Norm, linear
from thinkloop.kernels.mla_absorb import MAX_ROWS, absorb_and_store
from thinkloop.kernels.mla_decode import decode_parts, mla_decode
from thinkloop.kernels.mla_expand import expand
from thinkloop.kernels.mla_prefill import mla_append, mla_prefill
from thinkloop.kernels.rms_norm import rms_norm
from thinkloop.kernels.rope_cache import rope_and_store
from thinkloop.kernels.router import route
from torch import Tensor

Attend = Callable[[Tensor, Tensor, Attention], Tensor]
"""Attention of rotated queries `[n, H, N+R]` over one layer's cache `[slots, C+R]` -> `[n, H, V]`."""


class Places(NamedTuple):
    """Where a step's `n` tokens stand: position in their sequences, and slot in the cache (-1: nowhere, padding)."""

    ids: Tensor  # [n] int32 or int64, as the others
    positions: Tensor  # [n]
    slots: Tensor  # [n]


class Piece(NamedTuple):
    """One sequence's part of a long step: its rows `first` to `last - 1`, and where its `length` rows of cache lie."""

    first: int
    last: int
    length: int
    spans: Sequence[tuple[int, int]]
    table: Tensor  # [blocks] int32


_ABSORBED_RATE = 0.75
"""How long the absorbed form takes for as many operations as the other: K2's break even is at 230 tokens (measured onto 100,000
rows: 128 tokens absorbed 19 ms in four layers, 0.15 a token; 256 written out 36), not at the 171 of equal operations."""


class Few(NamedTuple):
    """A step of few rows: `n / B` tokens of each of B sequences."""

    places: Places
    turn: Tensor  # [P, R/2] complex64, the rotary table
    table: Tensor  # [B, blocks] int32
    lengths: Tensor  # [B] int32
    splits: int
    """Into how many parts each sequence's rows are split (`mla_decode.kv_splits`)."""


class KernelModel:
    """The layers of one model. Weights were loaded for the `triton` backend."""

    def __init__(self, config: ModelConfig, weights: Weights) -> None:
        self.config, self.weights = config, weights
        c = config
        self._choice: dict[str, Any] = {
            "top_k": c.num_experts_per_tok, "groups": c.n_group, "top_groups": c.topk_group,
            "scale": c.routed_scaling_factor, "normalise": c.norm_topk_prob, "scoring": c.scoring_func,
        }  # fmt: skip
        self._arrived = torch.zeros(MAX_ROWS, dtype=torch.int32, device=weights.device)

    def decode(self, step: Few, layers: Sequence[Tensor]) -> Tensor:
        """Float32 logits `[n, V]` of a step of up to `MAX_ROWS` rows."""
        x, stage = F.embedding(step.places.ids, self.weights.embed), self._stage(step.places, layers)
        for layer, cache in zip(self.weights.layers, layers, strict=True):
            x = self._few_attend(x, layer.attention, cache, step, stage)
            few = self._few_experts if isinstance(layer.mlp, Experts) else self._few_mlp
            x = few(x, layer.mlp)  # type: ignore[arg-type]  # as was just looked at
        return linear(x, self.weights.head.T, norm=self._norm_of(self.weights.norm), dtype=torch.float32)

    def _norm_of(self, weight: Tensor | None) -> Norm:
        return Norm(weight, self.config.rms_norm_eps)

    def _stage(self, places: Places, layers: Sequence[Tensor]) -> Stage | None:
        """Where finished rows stand before they are packed, if they are."""
        return Stage.of(places.slots, self.config.cache_width) if layers[0].dtype == torch.uint8 else None

    def _few_attend(self, x: Tensor, w: Attention, cache: Tensor, step: Few, stage: Stage | None) -> Tensor:
        """The residual stream `x [n, D]` after attention."""
        c, (batch, places) = self.config, (step.lengths.shape[0], step.places)
        joined = linear(x, w.w_in.T, norm=self._norm_of(w.norm))  # [n, Q+C+R]
        q, row = torch.split(joined, [joined.shape[1] - c.cache_width, c.cache_width], dim=1)
        if w.w_q is not None:
            q = linear(q, w.w_q.T, norm=Norm(w.q_norm, c.lora_norm_eps))
        q = torch.unflatten(q, 1, (c.num_attention_heads, c.qk_head_dim))
        rows, slots = stage or (cache, places.slots)
        q = absorb_and_store(q, row, w.kv_norm, c.lora_norm_eps, step.turn, places.positions, slots, rows, w.w_uk)
        if stage is not None:
            store_rows(stage.rows, places.slots, cache, c.kv_lora_rank)
        parts = decode_parts(
            torch.unflatten(q, 0, (batch, -1)), cache, step.table, step.lengths, c.softmax_scale, splits=step.splits
        )
        return linear(expand(*parts, w.w_uv), w.w_o.T, residual=x)

    def _few_mlp(self, x: Tensor, w: Mlp) -> Tensor:
        hidden = linear(x, w.w_gate_up.T, norm=self._norm_of(w.norm), gated=True)
        return linear(hidden, w.w_down.T, residual=x)

    def _few_experts(self, x: Tensor, w: Experts) -> Tensor:
        # The shared expert comes first and norms x itself: what comes after it has x, and of few rows goes on beside it.
        shared = None if w.shared is None else linear(x, w.shared.w_gate_up.T, norm=self._norm_of(w.norm), gated=True)
        h, ids, shares = self._few_gate(x, w)
        if w.gate_up.packed is not None and w.down.packed is not None:
            routed = moe_parts(h, ids, shares, w.gate_up.packed, w.down.packed)
        else:
            routed = self._stacked(h, ids, shares, w)[:, None]
        if shared is None or w.shared is None:
            return x + routed.sum(1).to(x.dtype)
        return linear(shared, w.shared.w_down.T, add=routed, residual=x, settled=True)

    def _few_gate(self, x: Tensor, w: Experts) -> tuple[Tensor, Tensor, Tensor]:
        """The normed rows, the experts they choose, and their shares."""
        eps, router = self.config.rms_norm_eps, w.w_router.T
        if gate_pays(len(x), router):
            # Beside the shared expert's product, but not of many rows: that one reads what is already given back.
            settled = w.shared is not None and len(x) <= FEW
            return gate(x, w.norm, eps, router, w.bias, self._arrived, **self._choice, settled=settled)
        h = rms_norm(x, w.norm, eps)
        logits = linear(h, router, dtype=torch.float32) if router.dtype == h.dtype else h.float() @ router.T
        return h, *route(logits, w.bias, **self._choice)

    def forward(self, places: Places, layers: Sequence[Tensor], turn: Tensor, attend: Attend) -> Tensor:
        """The last layer's normed output `[n, D]`. `layers` are the cache's, `turn` the rotary table `[P, R/2]`."""
        c = self.config
        x, stage = F.embedding(places.ids, self.weights.embed), self._stage(places, layers)
        update: Tensor | None = None
        for layer, cache in zip(self.weights.layers, layers, strict=True):
            h = self._norm(x, update, layer.attention.norm)
            update = self._attend(h, layer.attention, cache, places, turn, attend, stage)
            h = self._norm(x, update, layer.mlp.norm)
            update = self._experts(h, layer.mlp) if isinstance(layer.mlp, Experts) else _swiglu(h, layer.mlp)
        assert update is not None
        return rms_norm(update, self.weights.norm, c.rms_norm_eps, residual=x)

    def _norm(self, x: Tensor, update: Tensor | None, weight: Tensor | None) -> Tensor:
        """The norm of the residual stream `x`, after `update` was added to it."""
        if update is None:
            return rms_norm(x, weight, self.config.rms_norm_eps)
        return rms_norm(update, weight, self.config.rms_norm_eps, residual=x)

    def _attend(
        self, h: Tensor, w: Attention, cache: Tensor, places: Places, turn: Tensor, attend: Attend, stage: Stage | None
    ) -> Tensor:
        c = self.config
        joined = h @ w.w_in  # [n, Q+C+R]
        latent_q, row = torch.split(joined, [joined.shape[1] - c.cache_width, c.cache_width], dim=1)
        q = latent_q.contiguous() if w.w_q is None else rms_norm(latent_q, w.q_norm, c.lora_norm_eps) @ w.w_q
        q = torch.unflatten(q, 1, (c.num_attention_heads, c.qk_head_dim))
        rows, slots = stage or (cache, places.slots)
        rope_and_store(q, row, w.kv_norm, c.lora_norm_eps, turn, places.positions, slots, rows)
        if stage is not None:
            store_rows(stage.rows, places.slots, cache, c.kv_lora_rank)
        return attend(q, cache, w).flatten(1) @ w.w_o

    def _experts(self, h: Tensor, w: Experts) -> Tensor:
        ids, shares = route(h.float() @ w.w_router.float(), w.bias, **self._choice)
        gate_up, down = w.gate_up, w.down
        if gate_up.packed is not None and down.packed is not None:
            out = moe_int4(h, ids, shares, gate_up.packed, down.packed)
        else:
            out = self._stacked(h, ids, shares, w)
        return out if w.shared is None else out.add_(_swiglu(h, w.shared))

    @staticmethod
    def _stacked(h: Tensor, ids: Tensor, shares: Tensor, w: Experts) -> Tensor:
        assert w.gate_up.stacked is not None
        assert w.down.stacked is not None
        return grouped_experts(h, ids, shares, w.gate_up.stacked, w.down.stacked)


def decode_attention(config: ModelConfig, table: Tensor, lengths: Tensor, splits: int) -> Attend:
    """Attention of a few tokens a sequence, absorbed: `n / B` tokens for each of `lengths [B]`; `table [B, blocks]`."""
    nope, batch = config.qk_nope_head_dim, lengths.shape[0]

    def attend(q: Tensor, cache: Tensor, w: Attention) -> Tensor:
        latent = torch.bmm(q[..., :nope].transpose(0, 1), w.w_uk).transpose(0, 1)  # [n, H, C]
        whole = torch.unflatten(torch.cat([latent, q[..., nope:]], dim=-1), 0, (batch, -1))  # [B, T, H, C+R]
        mixed = mla_decode(whole, cache, table, lengths, config.softmax_scale, splits=splits)
        return torch.bmm(mixed.flatten(0, 1).transpose(0, 1), w.w_uv).transpose(0, 1)

    return attend


def reading_attention(config: ModelConfig, pieces: Sequence[Piece]) -> Attend:
    """Attention of long pieces, one sequence after the other: absorbed or with keys and values written out."""
    scale = config.softmax_scale

    def attend(q: Tensor, cache: Tensor, w: Attention) -> Tensor:
        parts = []
        for piece in pieces:
            own = q[piece.first : piece.last]
            if expanded_is_cheaper(config, int(_ABSORBED_RATE * len(own)), piece.length):
                part = mla_prefill(own, _rows(cache, piece, config.kv_lora_rank), w.w_uk, w.w_uv, scale)
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


def _rows(cache: Tensor, piece: Piece, latent: int) -> Tensor:
    """A sequence's rows, bfloat16 `[length, C+R]`."""
    if cache.dtype == torch.uint8:
        return gather_rows(cache, piece.table, piece.length, latent)
    parts = [cache[start:stop] for start, stop in piece.spans]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _swiglu(x: Tensor, w: Mlp) -> Tensor:
    return swiglu_act(x @ w.w_gate_up) @ w.w_down
