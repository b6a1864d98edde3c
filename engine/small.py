"""A few tokens at a time on the CPU in float32, for models so small that starting an op costs as much as doing it.

The maths is `Transformer._layers`. What differs is bookkeeping: intermediates have their places, query up-projection, key
absorption and softmax scale are one matrix, norms are folded in, and a layer's experts are two matrices. At hidden 192 an
op costs 1 to 3 µs to start; for one row this takes 54 a layer, views among them, where the general path takes 120. What is
left is mostly reading: 9 MB of weights for one row of the embedded model, from the second cache level on, and of each
sequence 190 KB of cache a layer behind 300 tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from thinkloop.engine.config import ModelConfig
from thinkloop.engine.kv_cache import LatentCache
from thinkloop.engine.small_attention import Rows, Scratch, Together, arrange
from thinkloop.engine.weights import Attention, Experts, Mlp, Weights
from thinkloop.kernels.int4 import dequantise_planes
from thinkloop.kernels.reference import route
from torch import Tensor

MAX_ROWS = 128
"""Above this the general path is as fast: its experts get enough tokens each."""
_STEPS = 24
"""Numbers of rows whose scratch is kept, up to 7 MB each for the embedded model."""
_LAYER_VALUES = 1 << 20
"""The most values a layer's experts, or its joined query matrix, may have: 4 MiB in float32, a few of which fit the cache
of a core."""


def is_small(config: ModelConfig, weights: Weights) -> bool:
    """Whether this path serves the model: float32 on the CPU, layers of at most a few MiB."""
    query = (config.q_lora_rank or config.hidden_size) * config.num_attention_heads * config.cache_width
    experts = config.n_routed_experts * 3 * config.hidden_size * config.moe_intermediate_size
    packed = all(layer.mlp.gate_up.planes for layer in weights.layers if isinstance(layer.mlp, Experts))
    plain = weights.dtype == torch.float32 and weights.device.type == "cpu"
    return plain and packed and query <= _LAYER_VALUES and experts <= _LAYER_VALUES


class _Norm:
    """RMS norm of `x [n, D]` into `out`, in four ops of 1 µs; torch's own is a composite of 9 µs."""

    def __init__(self, x: Tensor, eps: float, out: Tensor) -> None:
        self._x, self._out, self._share = x, out, 1.0 / x.shape[1]
        self._eps, self._size = torch.full((x.shape[0], 1), eps), torch.empty(x.shape[0], 1)

    def __call__(self) -> None:
        torch.linalg.vector_norm(self._x, dim=1, keepdim=True, out=self._size)
        torch.addcmul(self._eps, self._size, self._size, value=self._share, out=self._size)
        torch.mul(self._x, self._size.rsqrt_(), out=self._out)


class _Attend:
    def __init__(
        self, config: ModelConfig, w: Attention, w_q: Tensor, x: Tensor, normed: Tensor, scratch: Scratch
    ) -> None:
        c, rows, heads = config, x.shape[0], config.num_attention_heads
        self._w_in, self._w_q, self._w_uv, self._w_o, self._latent = w.w_in, w_q, w.w_uv, w.w_o, c.kv_lora_rank
        self._x, self._normed, self._heads = x, normed, heads
        self._norm = _Norm(x, c.rms_norm_eps, normed)
        self._joined = torch.empty(rows, w.w_in.shape[1])
        rank = w.w_in.shape[1] - c.cache_width
        latent_q, self._row = self._joined[:, :rank], self._joined[:, rank:]
        self._norm_q = _Norm(latent_q, c.lora_norm_eps, latent_q) if w.w_q is not None else None
        self._source = normed if w.w_q is None else latent_q
        latent = self._row[:, : c.kv_lora_rank]
        self._norm_kv = _Norm(latent, c.lora_norm_eps, latent)
        self._q = torch.empty(rows, heads * c.cache_width)
        self._queries = self._q.view(rows * heads, c.cache_width)
        self._q_pe = _pairs(self._q.view(rows, heads, c.cache_width)[:, :, c.kv_lora_rank :])
        self._k_pe = _pairs(self._row[:, c.kv_lora_rank :])
        self._mixed, self._scratch = torch.empty(rows * heads, c.kv_lora_rank), scratch
        self._mixed_rows = self._mixed.view(rows, -1)
        self._mixed_heads = self._mixed.view(rows, heads, -1).transpose(0, 1)  # [H, n, C]
        self._out = torch.empty(rows, heads * c.v_head_dim)
        self._values = self._out.view(rows, heads, -1).transpose(0, 1)  # [H, n, V]

    def __call__(
        self, held: Tensor, slots: Tensor, turn: Tensor, together: Sequence[Together], alone: Sequence[Rows]
    ) -> None:
        self._norm()
        torch.mm(self._normed, self._w_in, out=self._joined)
        if self._norm_q is not None:
            self._norm_q()
        self._norm_kv()
        torch.mm(self._source, self._w_q, out=self._q)
        self._q_pe.mul_(turn[:, None])
        self._k_pe.mul_(turn)
        held.index_copy_(0, slots, self._row)
        for several in together:
            several.mix(held, self._q, self._mixed_rows, self._scratch)
        for rows in alone:
            self._mix(held, rows)
        torch.bmm(self._mixed_heads, self._w_uv, out=self._values)
        self._x.addmm_(self._out, self._w_o)

    def _mix(self, held: Tensor, rows: Rows) -> None:
        """Softmax over one sequence's cache, and the mean of its latents by it, for each head of its rows."""
        own = slice(rows.first * self._heads, rows.last * self._heads)
        queries, seen = self._queries[own], [held[start:stop] for start, stop in rows.spans]
        parts = [torch.mm(queries, span.T) for span in seen]
        scores = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)  # [t·H, S]
        new = rows.last - rows.first
        if new > 1:
            scores.view(new, self._heads, -1)[:, :, -new:].add_(_future(new))
        weights = torch.softmax(scores, dim=1)
        if len(seen) == 1:
            torch.mm(weights, seen[0][:, : self._latent], out=self._mixed[own])
            return
        sizes = [stop - start for start, stop in rows.spans]
        mixed = self._mixed[own].zero_()
        for part, span in zip(torch.split(weights, sizes, dim=1), seen, strict=True):
            mixed.addmm_(part, span[:, : self._latent])


@cache
def _future(rows: int) -> Tensor:
    """Added to the scores of the newest columns: what lies after each row is out of sight. Not made at import: torch's
    threads stop spinning for the engine's once another thread has used them, which halves the speed of wide steps."""
    return torch.full((rows, rows), float("-inf")).triu_(1).view(rows, 1, rows)


def _absorb(config: ModelConfig, w: Attention) -> Tensor:
    """The matrix from the compressed query (or, without one, from the normed input) to scaled, absorbed queries
    `[·, H·(C+R)]`."""
    c, heads = config, config.num_attention_heads
    source = w.w_in[:, : heads * c.qk_head_dim] if w.w_q is None else w.w_q
    per_head = torch.unflatten(source, 1, (heads, c.qk_head_dim))  # [Q, H, N+R]
    nope, turned = torch.split(per_head, [c.qk_nope_head_dim, c.qk_rope_head_dim], dim=2)
    absorbed = torch.cat([torch.einsum("qhn,hnc->qhc", nope, w.w_uk), turned], dim=2) * c.softmax_scale
    return absorbed.flatten(1).contiguous()


def _pairs(x: Tensor) -> Tensor:
    return torch.view_as_complex(torch.unflatten(x, -1, (-1, 2)))


class _Dense:
    def __init__(self, config: ModelConfig, w: Mlp, x: Tensor, normed: Tensor) -> None:
        self._x, self._normed, self._w_gate_up, self._w_down = x, normed, w.w_gate_up, w.w_down
        self._norm = _Norm(x, config.rms_norm_eps, normed)
        self._both = torch.empty(x.shape[0], w.w_gate_up.shape[1])
        self._gate, self._up = self._both.chunk(2, dim=1)

    def __call__(self) -> None:
        self._norm()
        torch.mm(self._normed, self._w_gate_up, out=self._both)
        self._x.addmm_(F.silu(self._gate).mul_(self._up), self._w_down)


class _Joined(NamedTuple):
    """A layer's experts as two matrices, the shared ones first (one of width k·I counts as k of width I): `up [D, E router
    | X times (I gate, I up)]` and `down [X·I, D]` with X = shared + routed. Norm folded in."""

    up: Tensor
    down: Tensor
    bias: Tensor | None
    shared: int
    width: int


def _join(config: ModelConfig, w: Experts) -> _Joined:
    assert w.gate_up.planes is not None
    assert w.down.planes is not None
    every, width = range(config.n_routed_experts), config.moe_intermediate_size
    pairs = [dequantise_planes(w.gate_up.planes, expert, torch.float32) for expert in every]
    downs = [dequantise_planes(w.down.planes, expert, torch.float32) for expert in every]
    shared = 0
    if w.shared is not None:
        gate, up = w.shared.w_gate_up.chunk(2, dim=1)
        split = zip(torch.split(gate, width, dim=1), torch.split(up, width, dim=1), strict=True)
        before = [part for pair in split for part in pair]
        pairs, downs, shared = [*before, *pairs], [w.shared.w_down, *downs], len(before) // 2
    first = torch.cat([w.w_router, *pairs], dim=1) * w.norm[:, None]
    return _Joined(first.contiguous(), torch.cat(downs).contiguous(), w.bias, shared, width)


class _Router:
    """`reference.route` of `logits [n, E]`, in fewer ops where there are no groups: ids and shares `[n, K]`."""

    def __init__(self, config: ModelConfig, bias: Tensor | None, logits: Tensor) -> None:
        self._config, self._bias, self._logits = config, bias, logits
        self._plain = config.n_group == 1 and config.scoring_func == "sigmoid"

    def __call__(self) -> tuple[Tensor, Tensor]:
        c, bias = self._config, self._bias
        if not self._plain or bias is None:
            return route(
                self._logits, bias, top_k=c.num_experts_per_tok, groups=c.n_group, top_groups=c.topk_group,
                scale=c.routed_scaling_factor, normalise=c.norm_topk_prob, scoring=c.scoring_func,
            )  # fmt: skip
        scores = self._logits.sigmoid()
        ids = torch.topk(scores + bias, c.num_experts_per_tok)[1]
        shares = scores.gather(1, ids)
        if c.norm_topk_prob:
            shares.div_(shares.sum(1, keepdim=True).add_(1e-20))
        return ids, shares.mul_(c.routed_scaling_factor)


class _Mixture:
    """Experts for several rows: all of them, with shares of zero for those that weren't chosen."""

    def __init__(self, config: ModelConfig, w: _Joined, x: Tensor, normed: Tensor) -> None:
        rows, routed = x.shape[0], config.n_routed_experts
        self._w, self._x, self._normed = w, x, normed
        self._norm = _Norm(x, config.rms_norm_eps, normed)
        self._first = torch.empty(rows, w.up.shape[1])
        self._router = _Router(config, w.bias, self._first[:, :routed])
        pairs = self._first[:, routed:].view(rows, w.shared + routed, 2, w.width)
        self._gate, self._up = pairs[:, :, 0], pairs[:, :, 1]
        self._hidden = torch.empty(rows, w.down.shape[0])
        self._each = self._hidden.view(rows, w.shared + routed, w.width)
        self._shares = torch.ones(rows, w.shared + routed, 1)
        self._routed_shares = self._shares[:, w.shared :, 0]

    def __call__(self) -> None:
        self._norm()
        torch.mm(self._normed, self._w.up, out=self._first)
        ids, shares = self._router()
        self._routed_shares.zero_().scatter_(1, ids, shares)
        torch.mul(F.silu(self._gate), self._up, out=self._each)
        self._each.mul_(self._shares)
        self._x.addmm_(self._hidden, self._w.down)


class _MixtureOfOne:
    """Experts for one row: only those it chose, two ops more for two experts and a quarter of the bytes less."""

    def __init__(self, config: ModelConfig, w: _Joined, x: Tensor, normed: Tensor) -> None:
        routed, chosen, pair = config.n_routed_experts, config.num_experts_per_tok, 2 * w.width
        self._x, self._normed = x, normed
        self._norm = _Norm(x, config.rms_norm_eps, normed)
        always = routed + w.shared * pair
        self._first = torch.empty(1, always + chosen * pair)
        self._w_always, self._always = w.up[:, :always], self._first[:, :always]
        self._router = _Router(config, w.bias, self._first[:, :routed])
        self._ups = torch.split(w.up[:, always:], pair, dim=1)
        self._outs = torch.split(self._first[:, always:], pair, dim=1)
        pairs = self._first[:, routed:].view(w.shared + chosen, 2, w.width)
        self._gate, self._up = pairs[:, 0], pairs[:, 1]
        self._hidden = torch.empty(w.shared + chosen, w.width)
        self._shared = self._hidden[: w.shared].view(1, -1)
        self._routed = self._hidden[w.shared :]
        self._parts = torch.split(self._routed, 1)
        self._w_shared = w.down[: w.shared * w.width]
        self._downs = torch.split(w.down[w.shared * w.width :], w.width)

    def __call__(self) -> None:
        self._norm()
        torch.mm(self._normed, self._w_always, out=self._always)
        ids, shares = self._router()
        chosen: list[int] = ids[0].tolist()
        for expert, out in zip(chosen, self._outs, strict=True):
            torch.mm(self._normed, self._ups[expert], out=out)
        torch.mul(F.silu(self._gate), self._up, out=self._hidden)
        self._routed.mul_(shares.T)
        self._x.addmm_(self._shared, self._w_shared)
        for expert, part in zip(chosen, self._parts, strict=True):
            self._x.addmm_(part, self._downs[expert])


def _second(config: ModelConfig, w: Mlp | _Joined, x: Tensor, normed: Tensor) -> _Dense | _Mixture | _MixtureOfOne:
    if isinstance(w, Mlp):
        return _Dense(config, w, x, normed)
    return (_MixtureOfOne if x.shape[0] == 1 else _Mixture)(config, w, x, normed)


class _Step:
    """The model for exactly `rows` rows, with scratch of its own."""

    def __init__(self, small: SmallModel, rows: int) -> None:
        config, weights = small.config, small.weights
        self.x, self.normed = torch.empty(rows, config.hidden_size), torch.empty(rows, config.hidden_size)
        self.layers = [
            (
                _Attend(config, layer.attention, w_q, self.x, self.normed, small.scratch),
                _second(config, second, self.x, self.normed),
            )
            for layer, w_q, second in zip(weights.layers, small.queries, small.seconds, strict=True)
        ]
        self.norm = _Norm(self.x, config.rms_norm_eps, self.normed)


class SmallModel:
    """Runs up to `MAX_ROWS` tokens of any number of sequences: one thread at a time."""

    @torch.inference_mode()
    def __init__(self, config: ModelConfig, weights: Weights) -> None:
        self.config, self.weights = config, weights
        self.queries = [_absorb(config, layer.attention) for layer in weights.layers]
        self.seconds = [
            _join(config, layer.mlp) if isinstance(layer.mlp, Experts) else layer.mlp for layer in weights.layers
        ]
        self.scratch = Scratch()
        self._steps: dict[int, _Step] = {}

    def _step(self, rows: int) -> _Step:
        step = self._steps.pop(rows, None) or _Step(self, rows)
        self._steps[rows] = step  # as the most recently used
        if len(self._steps) > _STEPS:
            del self._steps[next(iter(self._steps))]
        return step

    def forward(self, ids: Sequence[int], caches: Sequence[tuple[LatentCache, int]], table: Tensor) -> Tensor:
        """The last layer's normed output `[n, D]` for each of `ids`, the next tokens of `caches` in order, as many of each
        as said; valid until the next call. Room is reserved; lengths are the caller's to move."""
        step, heads = self._step(len(ids)), self.config.num_attention_heads
        slots: list[int] = []
        positions: list[int] = []
        sequences: list[Rows] = []
        for held, count in caches:
            start, end, first = held.length, held.length + count, len(slots)
            slots += held.slots(start, end)
            positions += range(start, end)
            sequences.append(Rows(first, first + count, held.spans(end)))
        together, alone = arrange(sequences, heads)
        where, turn = torch.tensor(slots), table[torch.tensor(positions)]
        torch.index_select(self.weights.embed, 0, torch.tensor(ids), out=step.x)
        for (attend, second), layer in zip(step.layers, caches[0][0].pool.layers, strict=True):
            attend(layer, where, turn, together, alone)
            second()
        step.norm()
        return step.normed
