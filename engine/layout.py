"""The tensors of a published checkpoint: names, shapes and dtypes, from the config alone (reference 2.7)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from thinkloop.engine.config import ModelConfig
from thinkloop.engine.quantisation import FP8_BLOCK, INT4_GROUP

FLOAT = frozenset({"BF16", "F16", "F32"})
FP8 = "F8_E4M3"
_INT = frozenset({"I32", "I64"})


class Expected(NamedTuple):
    """What a tensor must be."""

    shape: tuple[int, ...]
    dtypes: frozenset[str]


def expected_tensors(config: ModelConfig) -> dict[str, Expected]:
    """Every tensor the engine needs for `config`, by published name. A projection that an FP8 checkpoint may store in
    FP8 has its scale beside it then: see `block_scale`."""
    return dict(_all_tensors(config))


def block_scale(name: str, weight: Expected) -> tuple[str, Expected]:
    """The scale that belongs to a projection stored in FP8: one factor per 128×128 block, which multiplies."""
    rows, columns = weight.shape
    return f"{name}_scale_inv", Expected((-(-rows // FP8_BLOCK), -(-columns // FP8_BLOCK)), FLOAT)


def _all_tensors(config: ModelConfig) -> Iterator[tuple[str, Expected]]:
    table = (config.vocab_size, config.hidden_size)
    yield "model.embed_tokens.weight", Expected(table, FLOAT)
    yield "model.norm.weight", Expected(table[1:], FLOAT)
    if not config.tie_word_embeddings:
        yield "lm_head.weight", Expected(table, FLOAT)
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{config.first_layer + layer}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{prefix}{norm}.weight", Expected((config.hidden_size,), FLOAT)
        yield from _attention(config, f"{prefix}self_attn.")
        yield from (_experts if config.is_moe(layer) else _dense)(config, f"{prefix}mlp.")


def _projection(config: ModelConfig, prefix: str, rows: int, columns: int) -> tuple[str, Expected]:
    kinds = FLOAT | {FP8} if config.quantisation == "fp8" else FLOAT
    return f"{prefix}.weight", Expected((rows, columns), kinds)


def _attention(config: ModelConfig, prefix: str) -> Iterator[tuple[str, Expected]]:
    hidden, heads, latent = config.hidden_size, config.num_attention_heads, config.kv_lora_rank
    yield _projection(config, f"{prefix}kv_a_proj_with_mqa", config.cache_width, hidden)
    yield f"{prefix}kv_a_layernorm.weight", Expected((latent,), FLOAT)
    yield _projection(config, f"{prefix}kv_b_proj", heads * (config.qk_nope_head_dim + config.v_head_dim), latent)
    yield _projection(config, f"{prefix}o_proj", hidden, heads * config.v_head_dim)
    if config.q_lora_rank is None:
        yield _projection(config, f"{prefix}q_proj", heads * config.qk_head_dim, hidden)
    else:
        yield _projection(config, f"{prefix}q_a_proj", config.q_lora_rank, hidden)
        yield f"{prefix}q_a_layernorm.weight", Expected((config.q_lora_rank,), FLOAT)
        yield _projection(config, f"{prefix}q_b_proj", heads * config.qk_head_dim, config.q_lora_rank)


def _mlp(config: ModelConfig, prefix: str, width: int) -> Iterator[tuple[str, Expected]]:
    for name, rows, columns in _mlp_shapes(config.hidden_size, width):
        yield _projection(config, f"{prefix}{name}", rows, columns)


def _mlp_shapes(hidden: int, width: int) -> tuple[tuple[str, int, int], ...]:
    return ("gate_proj", width, hidden), ("up_proj", width, hidden), ("down_proj", hidden, width)


def _packed(config: ModelConfig, prefix: str, width: int) -> Iterator[tuple[str, Expected]]:
    for name, rows, columns in _mlp_shapes(config.hidden_size, width):
        yield f"{prefix}{name}.weight_packed", Expected((rows, columns // 8), frozenset({"I32"}))
        yield f"{prefix}{name}.weight_scale", Expected((rows, columns // INT4_GROUP), FLOAT)
        yield f"{prefix}{name}.weight_shape", Expected((2,), _INT)


def _dense(config: ModelConfig, prefix: str) -> Iterator[tuple[str, Expected]]:
    return _mlp(config, prefix, config.intermediate_size)


def _experts(config: ModelConfig, prefix: str) -> Iterator[tuple[str, Expected]]:
    width = config.moe_intermediate_size
    yield f"{prefix}gate.weight", Expected((config.n_routed_experts, config.hidden_size), FLOAT)
    if config.scoring_func == "sigmoid":
        yield f"{prefix}gate.e_score_correction_bias", Expected((config.n_routed_experts,), FLOAT)
    if config.n_shared_experts:
        yield from _mlp(config, f"{prefix}shared_experts.", width * config.n_shared_experts)
    for expert in range(config.n_routed_experts):
        yield from (_packed if config.int4_experts else _mlp)(config, f"{prefix}experts.{expert}.", width)
