"""Which of the two forms of latent attention takes fewer operations (arXiv 2405.04434, section 2.1)."""

from __future__ import annotations

from thinkloop.engine.config import ModelConfig


def expanded_is_cheaper(config: ModelConfig, new: int, total: int) -> bool:
    """Whether expanding keys and values per head takes fewer products than absorbing them, for `new` tokens looking at
    `total`. For K2 the switch lies at about 170 new tokens, whatever the prefix."""
    c, heads = config, config.num_attention_heads
    absorbed = new * heads * (total * (2 * c.kv_lora_rank + c.qk_rope_head_dim)
                              + c.kv_lora_rank * (c.qk_nope_head_dim + c.v_head_dim))  # fmt: skip
    expanded = new * heads * total * (c.qk_head_dim + c.v_head_dim)
    expanded += total * heads * c.kv_lora_rank * (c.qk_nope_head_dim + c.v_head_dim)
    return expanded < absorbed
