"""config.json is read in every published shape, gives the reference's numbers, and refuses what isn't computed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from checkpoints import INT4, K2_YARN, config_json
from thinkloop.engine.config import ConfigError, ModelConfig
from thinkloop.engine.model import frequencies

K2 = {
    "hidden_size": 7168, "num_hidden_layers": 61, "n_routed_experts": 384, "num_experts_per_tok": 8,
    "moe_intermediate_size": 2048, "intermediate_size": 18432, "num_attention_heads": 64, "num_key_value_heads": 64,
    "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "max_position_embeddings": 262144, "vocab_size": 163840, "rope_scaling": K2_YARN, "torch_dtype": "bfloat16",
    "quantization_config": INT4,
}  # fmt: skip
DSV3_YARN = {"type": "yarn", "factor": 40, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0,
             "original_max_position_embeddings": 4096}  # fmt: skip
PAIRS = [0, 1, 8, 18, 19, 20, 21, 31]

# reference 2.3
NUMBERS: dict[str, tuple[dict[str, Any], float, list[float]]] = {
    "k2_thinking": ({}, 0.1446796258, [1, 0.7131110849, 6.687403050e-2, 2.274203757e-3, 1.621759908e-3, 1.807023387e-5,
                                       1.288608408e-5, 4.382206456e-7]),
    "k2_instruct": ({"rope_scaling": K2_YARN | {"factor": 32.0}}, 0.1308608000,
                    [1, 0.7131110849, 6.687403050e-2, 2.274203757e-3, 1.621759908e-3, 3.614046774e-5, 2.577216816e-5,
                     8.764412912e-7]),
    "k2.5": ({"rope_scaling": K2_YARN | {"beta_fast": 32.0}}, 0.1446796258,
             [1, 0.7131110849, 6.687403050e-2, 4.086459875e-4, 1.583749910e-4, 1.807023387e-5, 1.288608408e-5,
              4.382206456e-7]),
    "deepseek_v3": ({"rope_scaling": DSV3_YARN, "rope_theta": 10000.0}, 0.1352337789,
                    [1, 0.7498942093, 0.1, 2.249365301e-3, 1.370513636e-3, 7.905694150e-4, 4.149903985e-4,
                     3.333803580e-6]),
    "moonlight": ({"rope_scaling": None}, 0.0721687836, [50000 ** (-i / 32) for i in PAIRS]),
}  # fmt: skip


@pytest.mark.parametrize("name", NUMBERS)
def test_softmax_scale_and_frequencies_are_the_references(name: str) -> None:
    changes, scale, expected = NUMBERS[name]
    config = ModelConfig.from_json(config_json(**(K2 | changes)))
    assert config.softmax_scale == pytest.approx(scale, rel=1e-9)
    assert config.rope_multiplier == 1.0
    values = frequencies(config)[PAIRS].tolist()
    assert values == pytest.approx(expected, rel=2e-6)


def test_deepseek_v2_lite_is_read_with_its_softmax_router() -> None:
    changes = {"model_type": "deepseek_v2", "scoring_func": "softmax", "topk_method": "greedy", "norm_topk_prob": False,
               "q_lora_rank": None, "rope_theta": 10000, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
               "rope_scaling": DSV3_YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}}  # fmt: skip
    config = ModelConfig.from_json(config_json(**changes))
    assert config.softmax_scale == pytest.approx(0.1147213868, rel=1e-9)
    assert (config.scoring_func, config.topk_method, config.q_lora_rank) == ("softmax", "greedy", None)


def test_both_spellings_of_rope_give_the_same_model() -> None:
    old = config_json(rope_scaling=K2_YARN)
    new = {k: v for k, v in old.items() if k not in ("rope_scaling", "rope_theta")}
    new["rope_parameters"] = {k: v for k, v in K2_YARN.items() if k != "type"} | {
        "rope_type": "yarn",
        "rope_theta": 50000.0,
    }
    assert ModelConfig.from_json(old) == ModelConfig.from_json(new)
    plain = {k: v for k, v in new.items() if k != "rope_parameters"}
    plain["rope_parameters"] = {"rope_type": "default", "rope_theta": 50000.0}
    assert ModelConfig.from_json(plain) == ModelConfig.from_json(config_json())


def test_int4_is_recognised_and_stop_ids_of_both_files_are_joined(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config_json(quantization_config=INT4, eos_token_id=1)))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 1]}))
    config = ModelConfig.load(tmp_path)
    assert config.int4_experts
    assert config.eos_token_ids == (1, 2)


def _int4(**weights: Any) -> dict[str, Any]:
    group = INT4["config_groups"]["group_0"]
    return INT4 | {"config_groups": {"group_0": group | {"weights": group["weights"] | weights}}}


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "llama"}, "model_type"),
    ({"attention_bias": True}, "attention_bias"),
    ({"hidden_act": "gelu"}, "hidden_act"),
    ({"num_key_value_heads": 2}, "num_key_value_heads"),
    ({"kv_lora_rank": None}, "kv_lora_rank"),
    ({"hidden_size": "64"}, "hidden_size"),
    ({"rope_interleave": False}, "rope_interleave"),
    ({"index_topk": 2048}, "index_topk"),
    ({"rope_scaling": {"type": "llama3", "factor": 8.0}}, "rope_scaling.type"),
    ({"rope_scaling": {"type": "yarn", "factor": 8.0}}, "original_max_position_embeddings"),
    ({"rope_scaling": K2_YARN | {"short_factor": [1]}}, "rope_scaling.short_factor"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 1.0}}, "rope_theta"),
    ({"scoring_func": "relu"}, "scoring_func"),
    ({"topk_method": "group_limited_greedy"}, "topk_method"),
    ({"scoring_func": "softmax", "topk_method": "greedy"}, "norm_topk_prob"),
    ({"n_group": 3}, "n_group"),
    ({"n_group": 4, "topk_group": 1, "num_experts_per_tok": 3}, "num_experts_per_tok"),
    ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config.quant_method"),
    ({"quantization_config": INT4 | {"format": "int-quantized"}}, "quantization_config.format"),
    ({"quantization_config": _int4(num_bits=8)}, "weights.num_bits"),
    ({"quantization_config": _int4(symmetric=False)}, "weights.symmetric"),
    ({"quantization_config": _int4(group_size=128)}, "weights.group_size"),
    ({"quantization_config": _int4(actorder="group")}, "weights.actorder"),
]


@pytest.mark.parametrize(("changes", "field"), REFUSED, ids=[field for _, field in REFUSED])
def test_a_field_that_changes_the_maths_is_refused_by_name(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        ModelConfig.from_json(config_json(**changes))


@pytest.mark.parametrize("text", ["", "{", "[]", None])
def test_a_damaged_or_missing_config_is_an_error_with_its_path(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"config\.json"):
        ModelConfig.load(tmp_path)
