"""What the kernel bench measures: shapes of Kimi-K2-Thinking and Moonlight, and the bytes and operations each takes."""

from __future__ import annotations

from dataclasses import dataclass

from thinkloop.engine.config import ModelConfig
from thinkloop.engine.synthetic import K2_SLICE, MOONLIGHT_SLICE

INT4_BYTES = 0.5 + 2 / 32
"""A packed weight and its share of a bfloat16 scale."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The sizes of one model that kernels see."""

    name: str
    hidden: int
    inner: int
    experts: int
    top_k: int
    heads: int
    latent: int
    rope: int
    nope: int
    value: int
    vocab: int
    q_rank: int
    """Of compressed queries, or 0."""
    shared: int
    """Inner width of the shared experts, which are one."""

    @classmethod
    def of(cls, name: str, config: ModelConfig) -> Shape:
        """The sizes in a model's configuration."""
        c = config
        return cls(
            name=name, hidden=c.hidden_size, inner=c.moe_intermediate_size, experts=c.n_routed_experts,
            top_k=c.num_experts_per_tok, heads=c.num_attention_heads, latent=c.kv_lora_rank, rope=c.qk_rope_head_dim,
            nope=c.qk_nope_head_dim, value=c.v_head_dim, vocab=c.vocab_size,
            q_rank=c.q_lora_rank or 0, shared=c.moe_intermediate_size * c.n_shared_experts,
        )  # fmt: skip

    @property
    def width(self) -> int:
        """Values of a cache row."""
        return self.latent + self.rope

    @property
    def expert_values(self) -> int:
        """Weights of one expert: gate, up and down."""
        return 3 * self.hidden * self.inner


K2 = Shape.of("k2", ModelConfig.from_json(K2_SLICE))
MOONLIGHT = Shape.of("moonlight", ModelConfig.from_json(MOONLIGHT_SLICE))
TOKENS = (1, 2, 4, 8, 16, 64, 512, 4096)
FEW_TOKENS = (1, 2, 4, 8, 16)
"""Of a decode step; of its products all but 8, which go the way of 16."""
SPLITS = ((1, 16), (1, 132), (8, 16))
"""Tokens, and into how many parts attention split each one's rows."""
CONTEXTS = (1 << 10, 1 << 14, 1 << 17, 1 << 18)
ROWS = (1, 8, 64)
"""Tokens that are drawn together."""


def experts_bytes(shape: Shape, distinct: int) -> int:
    """Bytes of `distinct` routed experts of one layer."""
    return int(distinct * shape.expert_values * INT4_BYTES)


def experts_operations(shape: Shape, tokens: int) -> int:
    """Floating-point operations of `tokens` tokens in their routed experts."""
    return 2 * tokens * shape.top_k * shape.expert_values


def dense_bytes(shape: Shape, distinct: int) -> int:
    """Bytes of `distinct` routed experts of one layer in bfloat16."""
    return 2 * distinct * shape.expert_values


def linear_bytes(tokens: int, rows: int, features: int, *, gated: bool, residual: bool, parts: int) -> int:
    """Bytes of bfloat16 weights `rows × features`, of input, result and residual stream, and of float32 partial results."""
    width = rows // 2 if gated else rows
    return 2 * (rows * features + tokens * (features + width)) + tokens * width * (2 * residual + 4 * parts)


def gate_bytes(shape: Shape, tokens: int) -> int:
    """Bytes of the router's and the norm's bfloat16 weights and the bias, of rows read and written, of ids and shares."""
    weights = 2 * (shape.experts + 1) * shape.hidden + 4 * shape.experts
    return weights + tokens * (4 * shape.hidden + 8 * shape.top_k)


def gate_operations(shape: Shape, tokens: int) -> int:
    """Floating-point operations of the router's product."""
    return 2 * tokens * shape.experts * shape.hidden


def absorb_bytes(shape: Shape, tokens: int) -> int:
    """Bytes of the keys' weights, of queries read and written, rows read and written, angles, and the norm's weight."""
    queries = shape.heads * (shape.nope + shape.rope + shape.width)
    per_token = 2 * queries + 4 * shape.width + 4 * shape.rope
    return 2 * shape.heads * shape.nope * shape.latent + tokens * per_token + 2 * shape.latent


def absorb_operations(shape: Shape, tokens: int) -> int:
    """Floating-point operations of the queries' absorption."""
    return 2 * tokens * shape.heads * shape.nope * shape.latent


def expand_bytes(shape: Shape, tokens: int, splits: int) -> int:
    """Bytes of the values' weights, of float32 partial results and their logarithms, and of the values."""
    parts = 4 * splits * (shape.latent + 1)
    return shape.heads * (2 * shape.latent * shape.value + tokens * (parts + 2 * shape.value))


def expand_operations(shape: Shape, tokens: int, splits: int) -> int:
    """Floating-point operations of the merge and the product."""
    return 2 * tokens * shape.heads * shape.latent * (splits + shape.value)


def decode_bytes(shape: Shape, batch: int, length: int) -> int:
    """Bytes of cache that attention over `batch` sequences of `length` rows reads once."""
    return batch * length * shape.width * 2


def decode_operations(shape: Shape, batch: int, tokens: int, length: int) -> int:
    """Floating-point operations of absorbed attention."""
    return 2 * batch * tokens * shape.heads * length * (shape.width + shape.latent)


def prefill_operations(shape: Shape, tokens: int, total: int) -> int:
    """Floating-point operations of attention with keys and values written out, that included; half a triangle counts as the
    pairs that are seen."""
    pairs = tokens * (total - tokens) + tokens * (tokens + 1) // 2
    written_out = 2 * total * shape.heads * shape.latent * (shape.nope + shape.value)
    return 2 * pairs * shape.heads * (shape.nope + shape.rope + shape.value) + written_out


def prefill_bytes(shape: Shape, tokens: int, total: int) -> int:
    """Bytes of queries, cache rows, weights and results of attention of `tokens` new tokens over `total` rows, each once."""
    per_token = shape.heads * (shape.nope + shape.rope + shape.value)
    return 2 * (total * shape.width + tokens * per_token + shape.heads * shape.latent * (shape.nope + shape.value))


def router_bytes(shape: Shape, tokens: int) -> int:
    """Bytes of float32 logits and the bias, int32 ids and float32 shares."""
    return 4 * (tokens + 1) * shape.experts + 8 * tokens * shape.top_k


def norm_bytes(shape: Shape, tokens: int) -> int:
    """Bytes of two bfloat16 rows read and two written a token, and of the weight."""
    return 2 * (4 * tokens + 1) * shape.hidden


def rotation_bytes(shape: Shape, tokens: int) -> int:
    """Bytes that a token's queries and cache row take read and written, its angles, and the norm's weight."""
    return tokens * (4 * shape.heads * shape.rope + 4 * shape.width + 4 * shape.rope) + 2 * shape.latent


def sampling_bytes(shape: Shape, rows: int) -> int:
    """Bytes of float32 logits, read once."""
    return 4 * rows * shape.vocab
