"""Weights made ready to compute with: transposed to `[in, out]`, projections of the same input joined, norms folded.

In float32 a norm's weight is folded into the matrix that follows it (exact up to rounding, one op less); in bfloat16 it
stays apart, because folding would round the published weights again. Routed experts stay packed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from thinkloop.engine.checkpoint import Checkpoint, as_float
from thinkloop.engine.config import ModelConfig
from thinkloop.kernels.int4 import (
    Planes,
    dequantise_planes,
    fits_torch_int4,
    to_planes,
    to_torch_int4,
    torch_int4_mm,
)
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Attention:
    """One layer's latent attention. `Q` is q_lora_rank, or all query channels where there is no query compression."""

    norm: Tensor | None
    w_in: Tensor  # [D, Q + C + R]
    q_norm: Tensor | None
    w_q: Tensor | None  # [Q, H*(N+R)]
    kv_norm: Tensor | None
    w_uk: Tensor  # [H, N, C]
    w_uv: Tensor  # [H, C, V]
    w_o: Tensor  # [H*V, D]


@dataclass(frozen=True, slots=True)
class Mlp:
    """A SwiGLU block: `w_gate_up [D, 2I]` (gate first), `w_down [I, D]`."""

    norm: Tensor | None
    w_gate_up: Tensor
    w_down: Tensor


ExpertProduct = Callable[[Tensor, int], Tensor]
"""`(x [M, in], expert) -> [M, out]`."""


@dataclass(frozen=True, slots=True)
class Experts:
    """Router, shared expert and routed experts of one layer. The norm stays apart: packed weights can't take it in.
    `w_first` joins shared gate, up and router where one dtype serves all (float32); the parts are views of it then."""

    norm: Tensor
    w_router: Tensor  # [D, E] float32
    bias: Tensor | None  # [E] float32
    shared: Mlp | None
    w_first: Tensor | None  # [D, 2I_shared + E]
    gate_up: ExpertProduct
    down: ExpertProduct
    planes: tuple[Planes, Planes] | None
    """Packed gate_up and down, where they are kept in the planes layout."""


@dataclass(frozen=True, slots=True)
class Layer:
    attention: Attention
    mlp: Mlp | Experts


@dataclass(frozen=True, slots=True)
class Weights:
    """A whole model: `embed [vocab, D]`, `head [D, vocab]`."""

    embed: Tensor
    layers: tuple[Layer, ...]
    norm: Tensor | None
    head: Tensor
    dtype: torch.dtype
    device: torch.device


def load_weights(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> Weights:
    """Reads and prepares every weight, one layer at a time: at most one layer is held twice."""
    return _Loader(checkpoint, dtype, device).model()


class _Loader:
    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> None:
        self.checkpoint, self.config = checkpoint, checkpoint.config
        self.dtype, self.device = dtype, device
        self.fold = dtype == torch.float32

    def model(self) -> Weights:
        embed, norm = self.read("model.embed_tokens.weight"), self.read("model.norm.weight")
        tied = self.config.tie_word_embeddings
        head = (embed if tied else self.read("lm_head.weight")).T.contiguous()  # [D, vocab]
        layers = tuple(self.layer(i) for i in range(self.config.num_hidden_layers))
        norm_left, (head,) = self.folded(norm, head)
        return Weights(embed, layers, norm_left, head, self.dtype, self.device)

    def layer(self, index: int) -> Layer:
        prefix = f"model.layers.{index}."
        mlp = self.experts(prefix) if self.config.is_moe(index) else self.dense(prefix)
        return Layer(self.attention(prefix), mlp)

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        return as_float(self.checkpoint.tensor(name), dtype or self.dtype, self.device)

    def linear(self, name: str) -> Tensor:
        return self.read(f"{name}.weight").T

    def folded(self, norm: Tensor, *matrices: Tensor) -> tuple[Tensor | None, tuple[Tensor, ...]]:
        """Folds a norm's weight into the `[in, out]` matrices that read its output, or hands both back."""
        if not self.fold:
            return norm, matrices
        return None, tuple((norm[:, None] * matrix).contiguous() for matrix in matrices)

    def attention(self, prefix: str) -> Attention:
        c, at = self.config, f"{prefix}self_attn."
        compressed = c.q_lora_rank is not None
        first = self.linear(f"{at}q_a_proj" if compressed else f"{at}q_proj")
        joined = torch.cat([first, self.linear(f"{at}kv_a_proj_with_mqa")], dim=1).contiguous()
        norm, (w_in,) = self.folded(self.read(f"{prefix}input_layernorm.weight"), joined)
        q_norm, w_q = None, None
        if compressed:
            q_norm, (w_q,) = self.folded(
                self.read(f"{at}q_a_layernorm.weight"), self.linear(f"{at}q_b_proj").contiguous()
            )
        kv_norm, (w_kv,) = self.folded(self.read(f"{at}kv_a_layernorm.weight"), self.linear(f"{at}kv_b_proj"))
        per_head = torch.unflatten(w_kv, 1, (c.num_attention_heads, -1))  # [C, H, N+V]
        w_uk, w_uv = torch.split(per_head, [c.qk_nope_head_dim, c.v_head_dim], dim=-1)
        return Attention(
            norm, w_in, q_norm, w_q, kv_norm, w_uk.permute(1, 2, 0).contiguous(), w_uv.permute(1, 0, 2).contiguous(),
            self.linear(f"{at}o_proj").contiguous(),
        )  # fmt: skip

    def gate_up(self, prefix: str) -> Tensor:
        return torch.cat([self.linear(f"{prefix}gate_proj"), self.linear(f"{prefix}up_proj")], dim=1).contiguous()

    def dense(self, prefix: str) -> Mlp:
        norm, (w_gate_up,) = self.folded(
            self.read(f"{prefix}post_attention_layernorm.weight"), self.gate_up(f"{prefix}mlp.")
        )
        return Mlp(norm, w_gate_up, self.linear(f"{prefix}mlp.down_proj").contiguous())

    def experts(self, prefix: str) -> Experts:
        c, at = self.config, f"{prefix}mlp."
        w_router = self.read(f"{at}gate.weight", torch.float32).T.contiguous()
        shared = self.shared(f"{at}shared_experts.") if c.n_shared_experts else None
        w_first = w_router
        if shared is not None and self.fold:
            w_first = torch.cat([shared.w_gate_up, w_router], dim=1)
            w_gate_up, w_router = torch.split(w_first, [shared.w_gate_up.shape[1], w_router.shape[1]], dim=1)
            shared = Mlp(None, w_gate_up, shared.w_down)
        bias = f"{at}gate.e_score_correction_bias"
        gate_up, up_planes = self.routed(at, ("gate_proj", "up_proj"))
        down, down_planes = self.routed(at, ("down_proj",))
        return Experts(
            self.read(f"{prefix}post_attention_layernorm.weight"),
            w_router,
            self.read(bias, torch.float32) if c.scoring_func == "sigmoid" else None,
            shared,
            w_first if self.fold else None,
            gate_up,
            down,
            (up_planes, down_planes) if up_planes and down_planes else None,
        )

    def shared(self, prefix: str) -> Mlp:
        return Mlp(None, self.gate_up(prefix), self.linear(f"{prefix}down_proj").contiguous())

    def routed(self, prefix: str, names: tuple[str, ...]) -> tuple[ExpertProduct, Planes | None]:
        """The routed experts' product over `names`, rows joined in that order, and its planes where it has some."""
        if not self.config.int4_experts:
            stacked = as_float(self.stack(prefix, names, "weight"), self.dtype, self.device)
            weight = stacked.transpose(1, 2).contiguous()  # [E, in, out]
            return (lambda x, expert: x @ weight[expert]), None
        packed, scale = self.stack(prefix, names, "weight_packed"), self.stack(prefix, names, "weight_scale")
        if fits_torch_int4(packed.shape[1], packed.shape[2] * 8, self.dtype, self.device):
            matrices = to_torch_int4(packed, scale)
            return (lambda x, expert: torch_int4_mm(x, matrices, expert)), None
        planes = to_planes(packed.to(self.device), scale.to(self.device))
        return (lambda x, expert: x @ dequantise_planes(planes, expert, x.dtype)), planes

    def stack(self, prefix: str, names: tuple[str, ...], part: str) -> Tensor:
        read, experts = self.checkpoint.tensor, range(self.config.n_routed_experts)
        return torch.stack([torch.cat([read(f"{prefix}experts.{e}.{n}.{part}") for n in names]) for e in experts])


def resident_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes of everything but the routed experts in `dtype`: what float32 would double."""
    c = config
    attention = c.hidden_size * (c.cache_width + c.num_attention_heads * c.v_head_dim) + c.kv_lora_rank * (
        c.num_attention_heads * (c.qk_nope_head_dim + c.v_head_dim)
    )
    q_width = c.num_attention_heads * c.qk_head_dim
    attention += c.hidden_size * q_width if c.q_lora_rank is None else c.q_lora_rank * (c.hidden_size + q_width)
    total = 2 * c.vocab_size * c.hidden_size
    for layer in range(c.num_hidden_layers):
        width = c.moe_intermediate_size * c.n_shared_experts if c.is_moe(layer) else c.intermediate_size
        total += attention + 3 * c.hidden_size * width
    return total * dtype.itemsize
