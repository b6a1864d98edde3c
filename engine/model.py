"""The forward pass of the K2 / DeepSeek family, any number of tokens onto any prefix (reference section 2)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from thinkloop.engine.config import ModelConfig
from thinkloop.engine.decode import Decoder, can_decode
from thinkloop.engine.kv_cache import LatentCache
from thinkloop.engine.weights import Attention, Experts, Mlp, Weights
from thinkloop.kernels.int4 import swiglu_act
from thinkloop.kernels.reference import inv_freq, mla_absorbed, mla_expanded, rope, rope_table, route, yarn_inv_freq
from torch import Tensor

_CHUNK = 256
_SCORES = 1 << 26
"""The most attention scores (tokens × heads × prefix) held at once: 256 MiB in float32."""


def frequencies(config: ModelConfig) -> Tensor:
    """The rotary frequencies of `config`, float32 `[rope/2]`."""
    yarn, dim = config.yarn, config.qk_rope_head_dim
    if yarn is None:
        return inv_freq(dim, config.rope_theta)
    return yarn_inv_freq(
        dim, config.rope_theta, factor=yarn.factor, original=yarn.original_max_position_embeddings,
        beta_fast=yarn.beta_fast, beta_slow=yarn.beta_slow,
    )  # fmt: skip


def expanded_is_cheaper(config: ModelConfig, new: int, total: int) -> bool:
    """Whether expanding keys and values per head takes fewer products than absorbing them, for `new` tokens looking at
    `total`. For K2 the switch lies at about 170 new tokens, whatever the prefix."""
    c, heads = config, config.num_attention_heads
    absorbed = new * heads * (total * (2 * c.kv_lora_rank + c.qk_rope_head_dim)
                              + c.kv_lora_rank * (c.qk_nope_head_dim + c.v_head_dim))  # fmt: skip
    expanded = new * heads * total * (c.qk_head_dim + c.v_head_dim)
    expanded += total * heads * c.kv_lora_rank * (c.qk_nope_head_dim + c.v_head_dim)
    return expanded < absorbed


class Transformer:
    """One model's weights and how to run them. Not thread-safe: an engine runs it on one thread."""

    def __init__(self, config: ModelConfig, weights: Weights) -> None:
        self.config, self.weights = config, weights
        self._frequencies = frequencies(config).to(weights.device)
        self._table = torch.empty(0, config.qk_rope_head_dim // 2, dtype=torch.complex64, device=weights.device)
        self._decoder = Decoder(config, weights) if can_decode(config, weights) else None

    def new_cache(self) -> LatentCache:
        """An empty cache for one sequence."""
        return LatentCache(self.config, self.weights.dtype, self.weights.device)

    def chunk_size(self, prefix: int) -> int:
        """How many tokens to prefill at once onto `prefix` tokens, so that scores stay in bounds."""
        return max(16, min(_CHUNK, _SCORES // (self.config.num_attention_heads * (prefix + _CHUNK))))

    @torch.inference_mode()
    def forward(self, ids: list[int], cache: LatentCache, *, every: bool = False) -> Tensor:
        """Runs `ids` after the cache's tokens and adds them to it. Returns float32 logits, `[V]` of the last token
        or, with `every`, `[T, V]`. The caller keeps `cache.length + len(ids)` within the window."""
        start, end = cache.length, cache.length + len(ids)
        cache.reserve(end)
        self._reserve_table(cache.capacity)
        if len(ids) == 1 and self._decoder is not None and not every:
            logits = self._decoder.step(ids[0], cache, self._table)
            cache.length = end
            return logits
        x = self._layers(torch.tensor(ids, device=self.weights.device), cache, start, end)
        cache.length = end
        x = self._norm(x if every else x[-1:], self.weights.norm, self.config.rms_norm_eps)
        logits = (x @ self.weights.head).float()
        return logits if every else logits[0]

    def _layers(self, ids: Tensor, cache: LatentCache, start: int, end: int) -> Tensor:
        x, table = F.embedding(ids, self.weights.embed), self._table[start:end]  # [T, D]
        for layer, rows in zip(self.weights.layers, cache.layers, strict=True):
            x = x + self._attend(x, layer.attention, rows, start, end, table)
            x = x + (self._moe(x, layer.mlp) if isinstance(layer.mlp, Experts) else self._mlp(x, layer.mlp))
        return x

    def _reserve_table(self, capacity: int) -> None:
        if self._table.shape[0] < capacity:
            self._table = rope_table(self._frequencies, 0, capacity, self.config.rope_multiplier)

    @staticmethod
    def _norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], None, eps).to(x.dtype) * (1 if weight is None else weight)

    def _attend(self, x: Tensor, w: Attention, rows: Tensor, start: int, end: int, table: Tensor) -> Tensor:
        c = self.config
        joined = self._norm(x, w.norm, c.rms_norm_eps) @ w.w_in  # [T, Q+C+R]
        latent_q, latent, k_pe = torch.split(
            joined, [joined.shape[1] - c.cache_width, c.kv_lora_rank, c.qk_rope_head_dim], dim=1
        )
        q = latent_q if w.w_q is None else self._norm(latent_q, w.q_norm, c.lora_norm_eps) @ w.w_q
        q = torch.unflatten(q, 1, (c.num_attention_heads, c.qk_head_dim))  # [T, H, N+R]
        q_nope, q_pe = torch.split(q, [c.qk_nope_head_dim, c.qk_rope_head_dim], dim=2)
        q = torch.cat([q_nope, rope(q_pe, table)], dim=2)
        rows[start:end, : c.kv_lora_rank] = self._norm(latent, w.kv_norm, c.lora_norm_eps)
        rows[start:end, c.kv_lora_rank :] = rope(k_pe, table)
        attend = mla_expanded if expanded_is_cheaper(c, end - start, end) else mla_absorbed
        return attend(q, rows[:end], w.w_uk, w.w_uv, c.softmax_scale).flatten(1) @ w.w_o

    def _mlp(self, x: Tensor, w: Mlp) -> Tensor:
        return swiglu_act(self._norm(x, w.norm, self.config.rms_norm_eps) @ w.w_gate_up) @ w.w_down

    def _moe(self, x: Tensor, w: Experts) -> Tensor:
        x = self._norm(x, w.norm, self.config.rms_norm_eps)
        ids, shares = self.route(x.float() @ w.w_router, w)
        out = torch.zeros_like(x, dtype=torch.float32)
        for expert, tokens, slots in _by_expert(ids, self.config.n_routed_experts):
            y = w.down(swiglu_act(w.gate_up(x[tokens], expert)), expert)
            out.index_add_(0, tokens, y.float() * shares[tokens, slots, None])
        if w.shared is not None:
            out += swiglu_act(x @ w.shared.w_gate_up) @ w.shared.w_down
        return out.to(x.dtype)

    def route(self, logits: Tensor, w: Experts) -> tuple[Tensor, Tensor]:
        """Chosen experts and their shares for router `logits [T, E]`."""
        c = self.config
        return route(
            logits, w.bias, top_k=c.num_experts_per_tok, groups=c.n_group, top_groups=c.topk_group,
            scale=c.routed_scaling_factor, normalise=c.norm_topk_prob, scoring=c.scoring_func,
        )  # fmt: skip


def _by_expert(ids: Tensor, experts: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Each expert that was chosen, with the tokens that chose it and in which slot: `ids [T, K]`."""
    flat = ids.flatten()
    order = flat.argsort(stable=True)
    tokens, slots, at = order // ids.shape[1], order % ids.shape[1], 0
    for expert, count in enumerate(flat.bincount(minlength=experts).tolist()):
        if count:
            yield expert, tokens[at : at + count], slots[at : at + count]
        at += count
