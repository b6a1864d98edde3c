"""How large a model is, from its config alone: parameters, bytes of weights as the engine keeps them, bytes of cache."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from thinkloop.engine.config import ModelConfig
from thinkloop.engine.kv_cache import row_format
from thinkloop.engine.layout import expected_tensors
from thinkloop.engine.quantisation import INT4_GROUP
from thinkloop.kernels.kv_rows import KvDtype

FLOAT32_LIMIT = 2 << 30
"""Models whose part outside the experts takes at most this in float32 run in it on the CPU: exact, and 3.5 times
faster than bfloat16 at the embedded model's size."""
_INT4_BYTES = 0.5 + 4 / INT4_GROUP
"""A packed weight in memory: a nibble and its share of the scale, float32, or bfloat16 with a zero point."""


def parameters(config: ModelConfig) -> int:
    """Weights of the model, quantised ones counted as the values they stand for. The router's selection bias isn't one."""
    whole = expected_tensors(replace(config, quantisation="none"))
    return sum(math.prod(want.shape) for name, want in whole.items() if not name.endswith("e_score_correction_bias"))


def active_parameters(config: ModelConfig) -> int:
    """Weights that one token meets: all but the experts that aren't chosen."""
    idle = max(0, config.n_routed_experts - config.num_experts_per_tok)
    return parameters(config) - _moe_layers(config) * idle * _expert_values(config)


def weight_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes of all weights in memory: INT4 experts packed, anything else written out in `dtype`, the router in float32.
    Norms are left out: under a thousandth."""
    experts = _moe_layers(config) * config.n_routed_experts
    expert = _expert_values(config) * (_INT4_BYTES if config.int4_experts else dtype.itemsize)
    return resident_bytes(config, dtype) + int(experts * (expert + 4 * config.hidden_size))


def resident_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes of everything but routers and routed experts in `dtype`: what float32 would double."""
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


def cache_bytes(config: ModelConfig, dtype: torch.dtype, kv_dtype: KvDtype = "bf16") -> int:
    """Bytes of latent cache that one token takes, all layers together: values in `dtype`, or packed into 8 bits."""
    width, kind = row_format(config, dtype, kv_dtype)
    return width * config.num_hidden_layers * kind.itemsize


def default_dtype(config: ModelConfig, device: str) -> torch.dtype:
    """What weights are computed in when nobody says: float32 for small models on the CPU, bfloat16 otherwise."""
    small = device == "cpu" and resident_bytes(config, torch.float32) <= FLOAT32_LIMIT
    return torch.float32 if small else torch.bfloat16


def _moe_layers(config: ModelConfig) -> int:
    return sum(map(config.is_moe, range(config.num_hidden_layers)))


def _expert_values(config: ModelConfig) -> int:
    return 3 * config.hidden_size * config.moe_intermediate_size
