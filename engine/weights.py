"""Weights made ready to compute with: transposed to `[in, out]`, projections of the same input joined, norms folded.

In float32 a norm's weight is folded into the matrix that follows it (exact up to rounding, one op less); in bfloat16 it
stays apart, because folding would round the published weights again. INT4 experts stay packed, FP8 is written out. On
the CPU a bfloat16 matrix is packed for oneDNN, and `[in, out]` below is then what `linear.project` makes of it.

Each matrix gets its memory once, and tensors are copied into it from the mapped file one after the other (packed
experts: repacked one after the other), so that loading needs little more than the model itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import chain, starmap
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from thinkloop.engine.config import ModelConfig
from thinkloop.engine.device import Backend, EngineError
from thinkloop.engine.linear import can_pack, pack, project
from thinkloop.kernels.int4 import (
    Planes,
    TorchInt4,
    dequantise_planes,
    fits_torch_int4,
    to_planes,
    to_torch_int4,
    torch_int4_mm,
)
from torch import Tensor

if TYPE_CHECKING:  # Triton comes with it
    from thinkloop.kernels.int4_layout import PackedExperts


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


class Routed(NamedTuple):
    """One matrix of every routed expert, gate and up joined or down, in a form that suits the backend: what isn't None."""

    product: ExpertProduct | None = None
    planes: Planes | None = None
    """What `product` reads, where it is packed in this layout."""
    packed: PackedExperts | None = None
    """For the Triton kernels, which take all experts at once: there is no product with one of them then."""
    stacked: Tensor | None = None
    """`[E, in, out]`, where they aren't packed."""

    def times(self, x: Tensor, expert: int) -> Tensor:
        """`x [M, in]` through one expert's matrix, `[M, out]`."""
        assert self.product is not None
        return self.product(x, expert)


@dataclass(frozen=True, slots=True)
class Experts:
    """Router, shared expert and routed experts of one layer. The norm stays apart: packed weights can't take it in."""

    norm: Tensor
    w_router: Tensor  # [D, E] float32; for the kernels bfloat16, where it is published so
    bias: Tensor | None  # [E] float32
    shared: Mlp | None
    gate_up: Routed
    down: Routed


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
    backend: Backend


Progress = Callable[[int, int], None]
"""Told `(bytes read, bytes in all)` as tensors arrive."""


class Tensors(Protocol):
    """Where weights come from: a `Checkpoint`, or random ones (`synthetic.RandomTensors`)."""

    config: ModelConfig
    nbytes: int

    def read(self, name: str, out: Tensor) -> int: ...
    def view(self, name: str) -> AbstractContextManager[Tensor]: ...
    def size(self, name: str) -> int: ...


def load_weights(
    checkpoint: Tensors, dtype: torch.dtype, device: torch.device, *, backend: Backend = "torch",
    progress: Progress | None = None,
) -> Weights:  # fmt: skip
    """Reads and prepares every weight that `checkpoint.config` asks for: the whole model, or its slice of layers.

    Beyond the model itself this keeps one tensor of the checkpoint resident, and scratch of a few times one expert.
    """
    return _Loader(checkpoint, dtype, device, backend, progress).model()


def _published_scales(packed: Iterator[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """As they come; the kernels keep scales as they are published, and don't round others. Raises `EngineError`."""
    for weight, scale in packed:
        if scale.dtype != torch.bfloat16:
            raise EngineError(
                f"INT4 scales are {scale.dtype}; on 'cuda' they must be bfloat16, as published. Use 'cpu'."
            )
        yield weight, scale


class _Loader:
    def __init__(
        self, checkpoint: Tensors, dtype: torch.dtype, device: torch.device, backend: Backend, progress: Progress | None
    ) -> None:
        self.checkpoint, self.config = checkpoint, checkpoint.config
        self.dtype, self.device, self.backend = dtype, device, backend
        self.fold = dtype == torch.float32
        self.packs = backend == "torch" and can_pack(dtype, device)
        self.progress, self.done = progress, 0
        self.arrived(0)

    def arrived(self, nbytes: int) -> None:
        self.done += nbytes
        if self.progress is not None:
            self.progress(self.done, self.checkpoint.nbytes)

    def model(self) -> Weights:
        c = self.config
        embed, head = self.new(c.vocab_size, c.hidden_size), self.matrix(c.hidden_size, c.vocab_size)
        self.read("model.embed_tokens.weight", embed)
        if c.tie_word_embeddings:
            head.T.copy_(embed)
        else:
            self.read("lm_head.weight", head.T)
        layers = tuple(self.layer(i) for i in range(c.num_hidden_layers))
        norm = self.norm("model.norm.weight", c.hidden_size, head)
        return Weights(embed, layers, norm, self.ready(head), self.dtype, self.device, self.backend)

    def layer(self, index: int) -> Layer:
        prefix = f"model.layers.{self.config.first_layer + index}."
        if self.config.is_moe(index):
            return Layer(self.attention(prefix), self.experts(prefix))
        mlp = self.mlp(f"{prefix}mlp.", self.config.intermediate_size)
        norm = self.norm(f"{prefix}post_attention_layernorm.weight", self.config.hidden_size, mlp.w_gate_up)
        return Layer(self.attention(prefix), self.ready_mlp(replace(mlp, norm=norm)))

    def new(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype, device=self.device)

    def matrix(self, features: int, rows: int) -> Tensor:
        """Place for a matrix `[in, out]`, laid out as it is published where `ready` packs it or the kernels read it."""
        published = self.packs or self.backend == "triton"
        return self.new(rows, features).T if published else self.new(features, rows)

    def ready(self, matrix: Tensor) -> Tensor:
        """A filled matrix, as `project` takes it best."""
        return pack(matrix) if self.packs else matrix

    def ready_mlp(self, mlp: Mlp) -> Mlp:
        return Mlp(mlp.norm, self.ready(mlp.w_gate_up), self.ready(mlp.w_down))

    def read(self, name: str, out: Tensor) -> None:
        """Copies a tensor to its place: `out` has the published shape, so a matrix's place is passed transposed."""
        self.arrived(self.checkpoint.read(name, out))

    def vector(self, name: str, size: int, dtype: torch.dtype | None = None) -> Tensor:
        out = self.new(size, dtype=dtype)
        self.read(name, out)
        return out

    def norm(self, name: str, size: int, *readers: Tensor) -> Tensor | None:
        """A norm's weight; or None, when it could be folded into the matrices `[in, ...]` that read its output."""
        weight = self.vector(name, size)
        if not self.fold:
            return weight
        for matrix in readers:
            matrix.mul_(weight.view(-1, *[1] * (matrix.dim() - 1)))
        return None

    def attention(self, prefix: str) -> Attention:
        c, at = self.config, f"{prefix}self_attn."
        queries = c.num_attention_heads * c.qk_head_dim
        rank = c.q_lora_rank or queries
        w_in = self.matrix(c.hidden_size, rank + c.cache_width)
        self.read(f"{at}q_a_proj.weight" if c.q_lora_rank else f"{at}q_proj.weight", w_in[:, :rank].T)
        self.read(f"{at}kv_a_proj_with_mqa.weight", w_in[:, rank:].T)
        q_norm, w_q = None, None
        if c.q_lora_rank:
            w_q = self.matrix(rank, queries)
            self.read(f"{at}q_b_proj.weight", w_q.T)
            q_norm, w_q = self.norm(f"{at}q_a_layernorm.weight", rank, w_q), self.ready(w_q)
        w_uk, w_uv = self.expansion(f"{at}kv_b_proj.weight")
        w_o = self.matrix(c.num_attention_heads * c.v_head_dim, c.hidden_size)
        self.read(f"{at}o_proj.weight", w_o.T)
        kv_norm = self.norm(f"{at}kv_a_layernorm.weight", c.kv_lora_rank, w_uk.permute(2, 0, 1), w_uv.transpose(0, 1))
        norm = self.norm(f"{prefix}input_layernorm.weight", c.hidden_size, w_in)
        return Attention(norm, self.ready(w_in), q_norm, w_q, kv_norm, w_uk, w_uv, self.ready(w_o))

    def expansion(self, name: str) -> tuple[Tensor, Tensor]:
        """The two halves of kv_b_proj: from the latent to keys `[H, N, C]`, to values `[H, C, V]`."""
        c = self.config
        both = self.new(c.num_attention_heads, c.qk_nope_head_dim + c.v_head_dim, c.kv_lora_rank)
        self.read(name, both.flatten(0, 1))
        w_uk, w_uv = torch.split(both, [c.qk_nope_head_dim, c.v_head_dim], dim=1)
        return w_uk.contiguous(), w_uv.transpose(1, 2).contiguous()

    def mlp(self, prefix: str, width: int) -> Mlp:
        """A SwiGLU block without its norm, not `ready` yet."""
        w_gate_up = self.matrix(self.config.hidden_size, 2 * width)
        w_down = self.matrix(width, self.config.hidden_size)
        self.read(f"{prefix}gate_proj.weight", w_gate_up[:, :width].T)
        self.read(f"{prefix}up_proj.weight", w_gate_up[:, width:].T)
        self.read(f"{prefix}down_proj.weight", w_down.T)
        return Mlp(None, w_gate_up, w_down)

    def experts(self, prefix: str) -> Experts:
        c, at = self.config, f"{prefix}mlp."
        w_router = self.router(f"{at}gate.weight")
        width, bias = c.moe_intermediate_size * c.n_shared_experts, f"{at}gate.e_score_correction_bias"
        return Experts(
            self.vector(f"{prefix}post_attention_layernorm.weight", c.hidden_size),
            w_router,
            self.vector(bias, c.n_routed_experts, torch.float32) if c.scoring_func == "sigmoid" else None,
            self.ready_mlp(self.mlp(f"{at}shared_experts.", width)) if width else None,
            self.routed(at, ("gate_proj", "up_proj")),
            self.routed(at, ("down_proj",)),
        )

    def router(self, name: str) -> Tensor:
        size = (self.config.n_routed_experts, self.config.hidden_size)
        if self.backend != "triton":
            w_router = self.new(size[1], size[0], dtype=torch.float32)
            self.read(name, w_router.T)
            return w_router
        with self.checkpoint.view(name) as stored:
            kind = torch.bfloat16 if stored.dtype == torch.bfloat16 else torch.float32
        w_router = self.new(*size, dtype=kind)
        self.read(name, w_router)
        return w_router.T

    def routed(self, prefix: str, names: tuple[str, ...]) -> Routed:
        """The routed experts' matrices over `names`, rows joined in that order."""
        hidden, width = self.config.hidden_size, self.config.moe_intermediate_size
        features, rows = (width, hidden) if names == ("down_proj",) else (hidden, width)
        if not self.config.int4_experts:
            whole = self.whole(prefix, names, features, rows)
            stacked = whole if isinstance(whole, Tensor) else None
            return Routed(lambda x, expert: project(x, whole[expert]), stacked=stacked)
        packed = self.packed(prefix, names)
        if self.backend == "triton":
            return self.for_kernels(packed, rows * len(names), features)
        if fits_torch_int4(rows * len(names), features, self.dtype, self.device):
            matrices = TorchInt4(*self.stacked((one.weight, one.scale) for one in starmap(to_torch_int4, packed)))
            return Routed(lambda x, expert: torch_int4_mm(x, matrices, expert))
        planes = Planes(*self.stacked((one.weight, one.scale) for one in starmap(to_planes, packed)))
        return Routed(lambda x, expert: x @ dequantise_planes(planes, expert, x.dtype), planes=planes)

    def for_kernels(self, packed: Iterator[tuple[Tensor, Tensor]], rows: int, features: int) -> Routed:
        from thinkloop.kernels.int4_layout import PackedExperts, pack_experts

        weight, scale = self.stacked(
            (one.weight, one.scale) for one in starmap(pack_experts, _published_scales(packed))
        )
        return Routed(packed=PackedExperts(weight, scale, rows, features))

    def whole(self, prefix: str, names: tuple[str, ...], features: int, rows: int) -> list[Tensor] | Tensor:
        """Each expert's matrix `[in, out]`, in one tensor `[E, in, out]`. Where they are packed for oneDNN they pass one by
        one through one place: places of their own leave holes in the heap that packed ones don't fit into, as much as the
        model again."""
        count, width = self.config.n_routed_experts, rows * len(names)
        every = None if self.packs else self.new(count, features, width)
        places = [self.matrix(features, width)] * count if every is None else list(every)
        whole = []
        for expert, place in enumerate(places):
            for name, part in zip(names, place.split(rows, dim=1), strict=True):
                self.read(f"{prefix}experts.{expert}.{name}.weight", part.T)
            whole.append(self.ready(place))
        return whole if every is None else every

    def packed(self, prefix: str, names: tuple[str, ...]) -> Iterator[tuple[Tensor, Tensor]]:
        """Each expert's packed rows `[1, N, K/8]` and scales `[1, N, K/32]`, on the device."""
        for expert in range(self.config.n_routed_experts):
            weights = [f"{prefix}experts.{expert}.{name}.weight" for name in names]
            yield self.joined(weights, "packed"), self.joined(weights, "scale")

    def joined(self, weights: list[str], part: str) -> Tensor:
        rows = []
        for name in (f"{weight}_{part}" for weight in weights):
            with self.checkpoint.view(name) as stored:
                rows.append(stored.to(self.device, copy=True))
            self.arrived(self.checkpoint.size(name))
        return torch.cat(rows)[None]

    def stacked(self, parts: Iterator[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Both tensors `[1, ...]` of every expert, each kind in one `[E, ...]` whose memory is taken once."""
        (first, second), count = next(parts), self.config.n_routed_experts
        one, other = first.new_empty(count, *first.shape[1:]), second.new_empty(count, *second.shape[1:])
        for expert, (weight, scale) in enumerate(chain([(first, second)], parts)):
            one[expert], other[expert] = weight[0], scale[0]
        return one, other
