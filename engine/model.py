"""The forward pass of the K2 / DeepSeek family, any number of tokens onto any prefix (reference section 2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from thinkloop.engine.config import ModelConfig
from thinkloop.engine.kv_cache import BLOCK, BlockPool, LatentCache
from thinkloop.engine.linear import can_pack, project
from thinkloop.engine.mla_choice import expanded_is_cheaper
from thinkloop.engine.small import MAX_ROWS, SmallModel, is_small
from thinkloop.engine.weights import Attention, ExpertProduct, Experts, Mlp, Weights
from thinkloop.kernels.int4 import swiglu_act
from thinkloop.kernels.mla_cpu import mla_blocks
from thinkloop.kernels.reference import inv_freq, mla_absorbed, mla_expanded, rope, rope_table, route, yarn_inv_freq
from torch import Tensor

if TYPE_CHECKING:
    from thinkloop.engine.kernel_steps import KernelSteps

_SCORES = 1 << 26
"""The most attention scores (tokens × heads × prefix) held at once: 256 MiB in float32."""


@dataclass(frozen=True, slots=True)
class Segment:
    """The next tokens of one sequence in a step, and whether logits are wanted after each or only after the last."""

    cache: LatentCache
    ids: Sequence[int]
    every: bool = False


def frequencies(config: ModelConfig) -> Tensor:
    """The rotary frequencies of `config`, float32 `[rope/2]`."""
    yarn, dim = config.yarn, config.qk_rope_head_dim
    if yarn is None:
        return inv_freq(dim, config.rope_theta)
    return yarn_inv_freq(
        dim, config.rope_theta, factor=yarn.factor, original=yarn.original_max_position_embeddings,
        beta_fast=yarn.beta_fast, beta_slow=yarn.beta_slow,
    )  # fmt: skip


class Transformer:
    """One model's weights and how to run them. Not thread-safe: an engine runs it on one thread."""

    def __init__(self, config: ModelConfig, weights: Weights) -> None:
        self.config, self.weights = config, weights
        self._frequencies = frequencies(config).to(weights.device)
        self._table = torch.empty(0, config.qk_rope_head_dim // 2, dtype=torch.complex64, device=weights.device)
        self._by_blocks = can_pack(weights.dtype, weights.device)
        self._small = SmallModel(config, weights) if is_small(config, weights) else None
        self._kernels: KernelSteps | None = None
        if weights.backend == "triton":
            from thinkloop.engine.kernel_steps import KernelSteps  # Triton comes with it

            self._reserve_table(config.max_position_embeddings)
            self._kernels = KernelSteps(config, weights, self._table)

    def chunk_size(self, prefix: int, wanted: int) -> int:
        """How many of `wanted` tokens to prefill at once onto `prefix` tokens, so that scores stay in bounds."""
        if self._kernels is not None:
            return wanted  # which hold no scores
        return max(min(16, wanted), min(wanted, _SCORES // (self.config.num_attention_heads * (prefix + wanted))))

    @torch.inference_mode()
    def forward(self, segments: Sequence[Segment]) -> list[Tensor]:
        """Runs each segment's tokens after its cache's and adds them to it, all in one pass over the weights. Returns
        float32 logits for each segment, `[1, V]` after its last token or, with `every`, `[T, V]`.

        The caller keeps every sequence within the window and has reserved its rows.
        """
        self._reserve_table(max(segment.cache.length + len(segment.ids) for segment in segments))
        few = self._few(segments)
        logits: dict[int, Tensor] = {}
        for chosen, run in ((few, self._run_few), (set(range(len(segments))) - few, self._run)):
            if chosen:
                order = sorted(chosen)
                logits.update(zip(order, run([segments[index] for index in order]), strict=True))
        for segment in segments:
            segment.cache.length += len(segment.ids)
        return [logits[index] for index in range(len(segments))]

    def _few(self, segments: Sequence[Segment]) -> set[int]:
        """Which segments a path of their own takes: those of a few tokens, as long as they are few together."""
        if self._kernels is not None:
            return self._kernels.few([len(segment.ids) for segment in segments])
        few = {index for index, segment in enumerate(segments) if len(segment.ids) <= MAX_ROWS}
        rows = sum(len(segments[index].ids) for index in few)
        return few if self._small is not None and rows <= MAX_ROWS else set()

    def _run_few(self, segments: Sequence[Segment]) -> list[Tensor]:
        if self._kernels is not None:
            rows = self._kernels.decode([(segment.cache, segment.ids) for segment in segments])
            return [own if segment.every else own[-1:] for own, segment in zip(rows, segments, strict=True)]
        assert self._small is not None
        ids = [token for segment in segments for token in segment.ids]
        caches = [(segment.cache, len(segment.ids)) for segment in segments]
        return self._logits(self._small.forward(ids, caches, self._table), segments)

    def _run(self, segments: Sequence[Segment]) -> list[Tensor]:
        if self._kernels is not None:
            return self._logits(self._kernels.read([(segment.cache, segment.ids) for segment in segments]), segments)
        ids = [token for segment in segments for token in segment.ids]
        x = self._layers(torch.tensor(ids, device=self.weights.device), _places(segments, self._table))
        return self._logits(self._norm(x, self.weights.norm, self.config.rms_norm_eps), segments)

    def _logits(self, x: Tensor, segments: Sequence[Segment]) -> list[Tensor]:
        """The head's product for the rows that were asked for."""
        parts = torch.split(x, [len(segment.ids) for segment in segments])
        kept = [part if segment.every else part[-1:] for part, segment in zip(parts, segments, strict=True)]
        rows = torch.cat(kept) if len(kept) > 1 else kept[0]
        return list(torch.split(project(rows, self.weights.head).float(), [part.shape[0] for part in kept]))

    def _layers(self, ids: Tensor, places: _Places) -> Tensor:
        x = F.embedding(ids, self.weights.embed)  # [T, D]
        for index, layer in enumerate(self.weights.layers):
            x = x + self._attend(x, layer.attention, index, places)
            x = x + (self._moe(x, layer.mlp) if isinstance(layer.mlp, Experts) else self._mlp(x, layer.mlp))
        return x

    def _reserve_table(self, capacity: int) -> None:
        have = self._table.shape[0]
        if have < capacity:
            size = max(capacity, 2 * have, 1024)
            self._table = rope_table(self._frequencies, 0, size, self.config.rope_multiplier)

    @staticmethod
    def _norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], None, eps).to(x.dtype) * (1 if weight is None else weight)

    def _attend(self, x: Tensor, w: Attention, layer: int, places: _Places) -> Tensor:
        c = self.config
        joined = project(self._norm(x, w.norm, c.rms_norm_eps), w.w_in)  # [T, Q+C+R]
        latent_q, latent, k_pe = torch.split(
            joined, [joined.shape[1] - c.cache_width, c.kv_lora_rank, c.qk_rope_head_dim], dim=1
        )
        q = latent_q if w.w_q is None else project(self._norm(latent_q, w.q_norm, c.lora_norm_eps), w.w_q)
        q = torch.unflatten(q, 1, (c.num_attention_heads, c.qk_head_dim))
        q_nope, q_pe = torch.split(q, [c.qk_nope_head_dim, c.qk_rope_head_dim], dim=2)
        turned = rope(torch.cat([q_pe, k_pe[:, None]], dim=1), places.turn)  # [T, H+1, R]
        q = torch.cat([q_nope, turned[:, :-1]], dim=2)  # [T, H, N+R]
        latent = self._norm(latent, w.kv_norm, c.lora_norm_eps)
        rows = torch.cat([latent, turned[:, -1]], dim=1)
        cache = places.pool.layers[layer].index_copy_(0, places.slots, rows)
        parts = zip(torch.split(q, places.counts), places.spans, strict=True)
        mixed = [self._mix(part, cache, spans, w) for part, spans in parts]  # each [t, H, V]
        return project(torch.cat(mixed).flatten(1), w.w_o)

    def _mix(self, q: Tensor, cache: Tensor, spans: list[tuple[int, int]], w: Attention) -> Tensor:
        """Attention of one sequence's new tokens over its rows `spans` of the cache."""
        c, total = self.config, sum(stop - start for start, stop in spans)
        if expanded_is_cheaper(c, q.shape[0], total):
            return mla_expanded(q, _rows(cache, spans), w.w_uk, w.w_uv, c.softmax_scale)
        if not self._by_blocks:
            return mla_absorbed(q, _rows(cache, spans), w.w_uk, w.w_uv, c.softmax_scale)
        *full, (start, stop) = spans
        rows = _rows(cache, [*full, (start, stop + -total % BLOCK)])
        return mla_blocks(q, rows, total, w.w_uk, w.w_uv, c.softmax_scale)

    def _mlp(self, x: Tensor, w: Mlp) -> Tensor:
        return _swiglu(self._norm(x, w.norm, self.config.rms_norm_eps), w)

    def _moe(self, x: Tensor, w: Experts) -> Tensor:
        x = self._norm(x, w.norm, self.config.rms_norm_eps)
        ids, shares = self.route(x.float() @ w.w_router, w)
        out = self._chosen(x, ids[0].tolist(), shares, w) if len(x) == 1 else self._sorted(x, ids, shares, w)
        if w.shared is not None:
            out += _swiglu(x, w.shared)
        return out.to(x.dtype)

    @staticmethod
    def _chosen(x: Tensor, ids: list[int], shares: Tensor, w: Experts) -> Tensor:
        """The routed experts' share for one token `x [1, D]`, float32."""
        hidden = swiglu_act(torch.cat([w.gate_up.times(x, expert) for expert in ids]))  # [K, I]
        y = torch.cat([w.down.times(part, expert) for part, expert in zip(torch.split(hidden, 1), ids, strict=True)])
        return shares @ y.float()

    def _sorted(self, x: Tensor, ids: Tensor, shares: Tensor, w: Experts) -> Tensor:
        """The routed experts' share for many tokens, each expert at once with all that chose it, float32 `[T, D]`."""
        order, tokens, counts = _by_expert(ids, self.config.n_routed_experts)
        hidden = swiglu_act(_each(w.gate_up.times, x[tokens], counts))  # [T*K, I]
        y = _each(w.down.times, hidden, counts) * shares.flatten()[order, None]  # float32 [T*K, D]
        return torch.zeros_like(x, dtype=torch.float32).index_add_(0, tokens, y)

    def route(self, logits: Tensor, w: Experts) -> tuple[Tensor, Tensor]:
        """Chosen experts and their shares for router `logits [T, E]`."""
        c = self.config
        return route(
            logits, w.bias, top_k=c.num_experts_per_tok, groups=c.n_group, top_groups=c.topk_group,
            scale=c.routed_scaling_factor, normalise=c.norm_topk_prob, scoring=c.scoring_func,
        )  # fmt: skip


class _Places(NamedTuple):
    """Where a step's rows go and what each sequence's rows look at."""

    pool: BlockPool
    slots: Tensor  # [T]
    turn: Tensor  # [T, R/2], the rotary table's rows
    counts: list[int]
    spans: list[list[tuple[int, int]]]


def _places(segments: Sequence[Segment], table: Tensor) -> _Places:
    slots: list[int] = []
    positions: list[int] = []
    counts, spans = [], []
    for segment in segments:
        cache, count = segment.cache, len(segment.ids)
        end = cache.length + count
        slots += cache.slots(cache.length, end)
        positions += range(cache.length, end)
        counts.append(count)
        spans.append(cache.spans(end))
    turn = table[torch.tensor(positions, device=table.device)]
    return _Places(segments[0].cache.pool, torch.tensor(slots, device=table.device), turn, counts, spans)


def _rows(cache: Tensor, spans: list[tuple[int, int]]) -> Tensor:
    parts = [cache[start:stop] for start, stop in spans]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _swiglu(x: Tensor, w: Mlp) -> Tensor:
    return project(swiglu_act(project(x, w.w_gate_up)), w.w_down)


def _by_expert(ids: Tensor, experts: int) -> tuple[Tensor, Tensor, list[int]]:
    """Sorts the choices `ids [T, K]` by expert: their order, the token of each, and how many each expert has."""
    flat = ids.flatten()
    order = flat.argsort(stable=True)
    return order, order // ids.shape[1], flat.bincount(minlength=experts).tolist()


def _each(product: ExpertProduct, rows: Tensor, counts: list[int]) -> Tensor:
    """Each expert's product with its own of the sorted `rows`, in one tensor."""
    parts, at = [], 0
    for expert, count in enumerate(counts):
        if count:
            parts.append(product(rows[at : at + count], expert))
        at += count
    return torch.cat(parts)
