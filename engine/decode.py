"""One token at a time on the CPU in float32, for models so small that starting an op costs more than doing it.

The maths is `Transformer._layers` for T = 1. What differs is bookkeeping: every intermediate has its place, every
view is made once, query up-projection, key absorption and softmax scale are one matrix, residuals are added by the
product. At hidden 192 an op costs 1 to 5 µs to start and less to do; this path takes about 30 ops a layer where the
general one takes over 100.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from thinkloop.engine.config import ModelConfig
from thinkloop.engine.kv_cache import LatentCache
from thinkloop.engine.weights import Attention, Experts, Mlp, Weights
from thinkloop.kernels.int4 import PlanesProduct
from thinkloop.kernels.reference import GROUP, route
from torch import Tensor

_SMALL = 8 << 20
"""The largest joined query matrix, in values a layer, for which launching fewer ops beats reading fewer bytes."""


def can_decode(config: ModelConfig, weights: Weights) -> bool:
    """Whether the fast path serves this model: float32 on the CPU, small, experts packed."""
    rows = config.q_lora_rank or config.hidden_size
    absorbed = rows * config.num_attention_heads * config.cache_width
    packed = all(layer.mlp.planes for layer in weights.layers if isinstance(layer.mlp, Experts))
    return weights.dtype == torch.float32 and weights.device.type == "cpu" and absorbed <= _SMALL and packed


class _Norm:
    """RMS norm of one row into `out`. Four ops of 1 to 3 µs; torch's own is a composite of 10 to 20 µs here."""

    def __init__(self, x: Tensor, eps: float, out: Tensor, weight: Tensor | None = None) -> None:
        self._x, self._xt, self._out, self._weight = x, x.T, out, weight
        self._eps, self._share = torch.full((1, 1), eps), 1.0 / x.shape[1]
        self._square = torch.empty(1, 1)

    def __call__(self) -> None:
        torch.addmm(self._eps, self._x, self._xt, alpha=self._share, out=self._square)
        torch.mul(self._x, self._square.rsqrt_(), out=self._out)
        if self._weight is not None:
            self._out.mul_(self._weight)


class _Attend:
    def __init__(self, config: ModelConfig, w: Attention, x: Tensor) -> None:
        c, heads = config, config.num_attention_heads
        self._w_in, self._w_uv, self._w_o, self._latent = w.w_in, w.w_uv, w.w_o, c.kv_lora_rank
        self._x, self._normed = x, torch.empty_like(x)
        self._norm = _Norm(x, c.rms_norm_eps, self._normed)
        self._joined = torch.empty(1, w.w_in.shape[1])
        rank = w.w_in.shape[1] - c.cache_width
        self._latent_q = self._joined[:, :rank]
        self._row = self._joined[:, rank:]
        self._norm_q = _Norm(self._latent_q, c.lora_norm_eps, self._latent_q) if w.w_q is not None else None
        latent = self._row[:, : c.kv_lora_rank]
        self._norm_kv = _Norm(latent, c.lora_norm_eps, latent)
        self._w_q, self._absorbed = _absorb(c, w)
        self._q = torch.empty(1, heads * c.cache_width)
        self._heads = self._q.view(heads, c.cache_width)
        self._q_pe = _pairs(self._heads[:, c.kv_lora_rank :])
        self._k_pe = _pairs(self._row[:, c.kv_lora_rank :])
        self._mixed = torch.empty(heads, c.kv_lora_rank)
        self._mixed_heads = self._mixed[:, None]  # [H, 1, C]
        self._values = torch.empty(heads, 1, c.v_head_dim)
        self._out = self._values.view(1, heads * c.v_head_dim)

    def __call__(self, rows: Tensor, position: int, turn: Tensor) -> None:
        self._norm()
        torch.mm(self._normed, self._w_in, out=self._joined)
        if self._norm_q is not None:
            self._norm_q()
        self._norm_kv()
        torch.mm(self._latent_q if self._absorbed else self._normed, self._w_q, out=self._q)
        self._q_pe.mul_(turn)
        self._k_pe.mul_(turn)
        rows[position : position + 1] = self._row
        seen = rows[: position + 1]  # [S, C+R]
        weights = torch.softmax(torch.mm(self._heads, seen.T), dim=1)  # [H, S]
        torch.mm(weights, seen[:, : self._latent], out=self._mixed)
        torch.bmm(self._mixed_heads, self._w_uv, out=self._values)
        self._x.addmm_(self._out, self._w_o)


def _absorb(config: ModelConfig, w: Attention) -> tuple[Tensor, bool]:
    """The matrix from the compressed query (or, without one, from the normed input) to scaled, absorbed queries
    `[·, H*(C+R)]`, and whether a compressed query exists."""
    c, heads = config, config.num_attention_heads
    source = w.w_in[:, : heads * c.qk_head_dim] if w.w_q is None else w.w_q
    per_head = torch.unflatten(source, 1, (heads, c.qk_head_dim))  # [Q, H, N+R]
    nope, turned = torch.split(per_head, [c.qk_nope_head_dim, c.qk_rope_head_dim], dim=2)
    absorbed = torch.cat([torch.einsum("qhn,hnc->qhc", nope, w.w_uk), turned], dim=2) * c.softmax_scale
    return absorbed.flatten(1).contiguous(), w.w_q is not None


def _pairs(x: Tensor) -> Tensor:
    return torch.view_as_complex(torch.unflatten(x, -1, (-1, 2)))


class _Dense:
    def __init__(self, config: ModelConfig, w: Mlp, x: Tensor) -> None:
        self._x, self._w_gate_up, self._w_down = x, w.w_gate_up, w.w_down
        self._normed = torch.empty_like(x)
        self._norm = _Norm(x, config.rms_norm_eps, self._normed)
        self._both = torch.empty(1, w.w_gate_up.shape[1])
        self._gate, self._up = self._both.chunk(2, dim=1)

    def __call__(self) -> None:
        self._norm()
        torch.mm(self._normed, self._w_gate_up, out=self._both)
        self._x.addmm_(F.silu(self._gate).mul_(self._up), self._w_down)


class _Mixture:
    def __init__(self, config: ModelConfig, w: Experts, x: Tensor, up: PlanesProduct, down: PlanesProduct) -> None:
        if w.w_first is None or w.planes is None:
            raise ValueError("one-token decoding needs float32 weights and packed experts in planes")
        self._config, self._x, self._w_first, self._bias = config, x, w.w_first, w.bias
        self._planes_up, self._planes_down = w.planes
        self._up_product, self._down_product = up, down
        self._normed = torch.empty_like(x)
        self._norm = _Norm(x, config.rms_norm_eps, self._normed, w.norm)
        self._first = torch.empty(1, w.w_first.shape[1])
        shared, self._logits = self._first.tensor_split([w.w_first.shape[1] - config.n_routed_experts], dim=1)
        self._gate, self._up = shared.chunk(2, dim=1)
        self._w_down = None if w.shared is None else w.shared.w_down
        chosen = config.num_experts_per_tok
        self._input = torch.empty(chosen * x.shape[1] // GROUP, 1, GROUP)
        self._spread = self._input.view(chosen, -1, 1, GROUP)
        self._groups = self._normed.view(1, -1, 1, GROUP).expand_as(self._spread)
        self._plain = config.n_group == 1 and config.norm_topk_prob

    def __call__(self) -> None:
        self._norm()
        torch.mm(self._normed, self._w_first, out=self._first)
        ids, shares = self._route()
        self._spread.copy_(self._groups)
        gate, up = self._up_product(self._planes_up, ids, self._input).chunk(2, dim=1)  # [K, I] each
        hidden = F.silu(gate).mul_(up)
        self._x.addmm_(shares, self._down_product(self._planes_down, ids, hidden.view(-1, 1, GROUP)))
        if self._w_down is not None:
            self._x.addmm_(F.silu(self._gate).mul_(self._up), self._w_down)

    def _route(self) -> tuple[Tensor, Tensor]:
        """`reference.route` for one row, in fewer ops where there are no groups: ids `[K]`, shares `[1, K]`."""
        c = self._config
        if not self._plain or self._bias is None:
            ids, shares = route(
                self._logits, self._bias, top_k=c.num_experts_per_tok, groups=c.n_group, top_groups=c.topk_group,
                scale=c.routed_scaling_factor, normalise=c.norm_topk_prob, scoring=c.scoring_func,
            )  # fmt: skip
            return ids[0], shares
        scores = self._logits.sigmoid()
        ids = torch.topk(scores + self._bias, c.num_experts_per_tok)[1]
        shares = scores.gather(1, ids)
        return ids[0], shares.div_(shares.sum() + 1e-20).mul_(c.routed_scaling_factor)


def _second(
    config: ModelConfig, w: Mlp | Experts, x: Tensor, products: tuple[PlanesProduct, PlanesProduct] | None
) -> _Dense | _Mixture:
    if isinstance(w, Mlp) or products is None:
        assert isinstance(w, Mlp)
        return _Dense(config, w, x)
    return _Mixture(config, w, x, *products)


def _products(config: ModelConfig, weights: Weights) -> tuple[PlanesProduct, PlanesProduct] | None:
    """The two packed products, with scratch that all layers share."""
    planes = [layer.mlp.planes for layer in weights.layers if isinstance(layer.mlp, Experts)]
    if not planes or planes[0] is None:
        return None
    up, down = planes[0]
    return PlanesProduct(up, config.num_experts_per_tok), PlanesProduct(down, config.num_experts_per_tok)


class Decoder:
    """Runs one token through the whole model with scratch of its own: one thread, one token at a time."""

    @torch.inference_mode()
    def __init__(self, config: ModelConfig, weights: Weights) -> None:
        self._weights = weights
        self._x = torch.empty(1, config.hidden_size)
        products = _products(config, weights)
        self._layers = [
            (_Attend(config, layer.attention, self._x), _second(config, layer.mlp, self._x, products))
            for layer in weights.layers
        ]
        self._normed = torch.empty_like(self._x)
        self._norm = _Norm(self._x, config.rms_norm_eps, self._normed, weights.norm)

    def step(self, token: int, cache: LatentCache, table: Tensor) -> Tensor:
        """Float32 logits `[V]` after `token`, whose row is written at `cache.length` in every layer."""
        position = cache.length
        turn = table[position]
        self._x.copy_(self._weights.embed[token])
        for (attend, second), rows in zip(self._layers, cache.layers, strict=True):
            attend(rows, position, turn)
            second()
        self._norm()
        return torch.mm(self._normed, self._weights.head)[0]
