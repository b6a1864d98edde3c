"""The family's published `config.json` files, and small models that keep every one of their settings."""

from __future__ import annotations

from typing import Any

from checkpoints import FP8, INT4, K2_YARN

Json = dict[str, Any]

_BOOKKEEPING: Json = {
    "attention_bias": False, "attention_dropout": 0.0, "aux_loss_alpha": 0.001, "ep_size": 1, "hidden_act": "silu",
    "initializer_range": 0.02, "moe_layer_freq": 1, "pretraining_tp": 1, "seq_aux": True, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "transformers_version": "4.48.3", "use_cache": True,
}  # fmt: skip
_SIGMOID: Json = {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "norm_topk_prob": True}
_HEADS: Json = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
_DEEPSEEK_YARN: Json = {
    "type": "yarn", "factor": 40, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 4096,
}  # fmt: skip

_V3: Json = _BOOKKEEPING | _SIGMOID | _HEADS | {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "vocab_size": 129280, "hidden_size": 7168,
    "intermediate_size": 18432, "moe_intermediate_size": 2048, "num_hidden_layers": 61, "num_attention_heads": 128,
    "num_key_value_heads": 128, "q_lora_rank": 1536, "n_routed_experts": 256, "num_experts_per_tok": 8,
    "n_shared_experts": 1, "first_k_dense_replace": 3, "n_group": 8, "topk_group": 4, "routed_scaling_factor": 2.5,
    "num_nextn_predict_layers": 1, "rms_norm_eps": 1e-6, "rope_theta": 10000, "rope_scaling": _DEEPSEEK_YARN,
    "max_position_embeddings": 163840, "bos_token_id": 0, "eos_token_id": 1, "quantization_config": FP8,
}  # fmt: skip
_K2: Json = _V3 | {
    "model_type": "kimi_k2", "vocab_size": 163840, "num_attention_heads": 64, "num_key_value_heads": 64,
    "n_routed_experts": 384, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 2.827,
    "num_nextn_predict_layers": 0, "rope_theta": 50000.0, "bos_token_id": 163584, "eos_token_id": 163585,
}  # fmt: skip
_V2_LITE: Json = _BOOKKEEPING | _HEADS | {
    "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "vocab_size": 102400, "hidden_size": 2048,
    "intermediate_size": 10944, "moe_intermediate_size": 1408, "num_hidden_layers": 27, "num_attention_heads": 16,
    "num_key_value_heads": 16, "q_lora_rank": None, "n_routed_experts": 64, "num_experts_per_tok": 6,
    "n_shared_experts": 2, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0,
    "scoring_func": "softmax", "topk_method": "greedy", "norm_topk_prob": False, "rms_norm_eps": 1e-6,
    "rope_theta": 10000, "rope_scaling": _DEEPSEEK_YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
    "max_position_embeddings": 163840, "bos_token_id": 100000, "eos_token_id": 100001,
}  # fmt: skip

PUBLISHED: dict[str, Json] = {
    "k2_thinking": _K2 | {
        "rms_norm_eps": 1e-5, "rope_scaling": K2_YARN, "max_position_embeddings": 262144, "eos_token_id": 163586,
        "pad_token_id": 163839, "quantization_config": INT4,
    },
    "k2_instruct_0711": _K2 | {"rope_scaling": K2_YARN | {"factor": 32.0}, "max_position_embeddings": 131072},
    "k2_instruct_0905": _K2 | {"rope_scaling": K2_YARN, "max_position_embeddings": 262144},
    "moonlight": _BOOKKEEPING | _SIGMOID | _HEADS | {
        "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "vocab_size": 163840,
        "hidden_size": 2048, "intermediate_size": 11264, "moe_intermediate_size": 1408, "num_hidden_layers": 27,
        "num_attention_heads": 16, "num_key_value_heads": 16, "q_lora_rank": None, "n_routed_experts": 64,
        "num_experts_per_tok": 6, "n_shared_experts": 2, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
        "routed_scaling_factor": 2.446, "rms_norm_eps": 1e-5, "rope_theta": 50000.0, "max_position_embeddings": 8192,
        "bos_token_id": 163584, "eos_token_id": 163586, "pad_token_id": 163839,
    },
    "deepseek_v3": _V3,
    "deepseek_v3.1": _V3 | {"quantization_config": FP8 | {"scale_fmt": "ue8m0"}},
    "deepseek_v2_lite": _V2_LITE,
    "deepseek_v2": _V2_LITE | {
        "hidden_size": 5120, "intermediate_size": 12288, "moe_intermediate_size": 1536, "num_hidden_layers": 60,
        "num_attention_heads": 128, "num_key_value_heads": 128, "q_lora_rank": 1536, "n_routed_experts": 160,
        "n_group": 8, "topk_group": 3, "topk_method": "group_limited_greedy", "routed_scaling_factor": 16.0,
    },
}  # fmt: skip


def small(name: str, **changes: Any) -> Json:
    """The published config `name` at a size for tests: its routing, positions, norms and storage, with few and narrow
    layers, and YaRN stretching from 32 positions. Widths lie across the edges of FP8's blocks of 128."""
    config = PUBLISHED[name]
    yarn = config.get("rope_scaling")
    return config | {
        "vocab_size": 160, "hidden_size": 160, "intermediate_size": 224, "moe_intermediate_size": 96,
        "num_hidden_layers": config["first_k_dense_replace"] + 2, "num_attention_heads": 4, "num_key_value_heads": 4,
        "q_lora_rank": config["q_lora_rank"] and 72, "kv_lora_rank": 136, "qk_nope_head_dim": 24,
        "qk_rope_head_dim": 16, "v_head_dim": 40, "n_routed_experts": 16,
        "num_experts_per_tok": min(4, config["num_experts_per_tok"]), "max_position_embeddings": 1024,
        "rope_scaling": yarn and yarn | {"original_max_position_embeddings": 32},
        "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
    } | changes  # fmt: skip
