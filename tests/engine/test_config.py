"""config.json is read in every published shape, gives the reference's numbers, and refuses what isn't computed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from checkpoints import FP8, INT4, K2_YARN, config_json
from published import PUBLISHED
from thinkloop.engine.config import ConfigError, ModelConfig
from thinkloop.engine.model import frequencies

PAIRS = [0, 1, 8, 18, 19, 20, 21, 31]

# reference 2.3
_K2_FREQUENCIES = [1, 0.7131110849, 6.687403050e-2, 2.274203757e-3, 1.621759908e-3, 1.807023387e-5, 1.288608408e-5,
                   4.382206456e-7]  # fmt: skip
_DEEPSEEK_FREQUENCIES = [1, 0.7498942093, 0.1, 2.249365301e-3, 1.370513636e-3, 7.905694150e-4, 4.149903985e-4,
                         3.333803580e-6]  # fmt: skip
NUMBERS: dict[str, tuple[float, list[float]]] = {
    "k2_thinking": (0.1446796258, _K2_FREQUENCIES),
    "k2_instruct_0711": (0.1308608000, [*_K2_FREQUENCIES[:5], 3.614046774e-5, 2.577216816e-5, 8.764412912e-7]),
    "k2_instruct_0905": (0.1446796258, _K2_FREQUENCIES),
    "deepseek_v3": (0.1352337789, _DEEPSEEK_FREQUENCIES),
    "deepseek_v2_lite": (0.1147213868, _DEEPSEEK_FREQUENCIES),
    "moonlight": (0.0721687836, [50000 ** (-i / 32) for i in PAIRS]),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_softmax_scale_and_frequencies_are_the_references(name: str) -> None:
    scale, expected = NUMBERS[name]
    config = ModelConfig.from_json(PUBLISHED[name])
    assert config.softmax_scale == pytest.approx(scale, rel=1e-9)
    assert config.rope_multiplier == 1.0
    assert frequencies(config)[PAIRS].tolist() == pytest.approx(expected, rel=2e-6)


def test_a_wide_ramp_as_in_k25_is_computed_too() -> None:
    config = ModelConfig.from_json(PUBLISHED["k2_thinking"] | {"rope_scaling": K2_YARN | {"beta_fast": 32.0}})
    expected = [*_K2_FREQUENCIES[:3], 4.086459875e-4, 1.583749910e-4, *_K2_FREQUENCIES[5:]]
    assert frequencies(config)[PAIRS].tolist() == pytest.approx(expected, rel=2e-6)


ROUTING: dict[str, tuple[str, str, int, int, bool]] = {
    "k2_thinking": ("sigmoid", "noaux_tc", 1, 1, True),
    "moonlight": ("sigmoid", "noaux_tc", 1, 1, True),
    "deepseek_v3": ("sigmoid", "noaux_tc", 8, 4, True),
    "deepseek_v2_lite": ("softmax", "greedy", 1, 1, False),
    "deepseek_v2": ("softmax", "group_limited_greedy", 8, 3, False),
}


@pytest.mark.parametrize("name", ROUTING)
def test_each_models_router_is_read(name: str) -> None:
    c = ModelConfig.from_json(PUBLISHED[name])
    assert (c.scoring_func, c.topk_method, c.n_group, c.topk_group, c.norm_topk_prob) == ROUTING[name]


def test_greedy_choice_looks_at_no_groups() -> None:
    config = ModelConfig.from_json(PUBLISHED["deepseek_v2_lite"] | {"n_group": 8, "topk_group": 3})
    assert (config.n_group, config.topk_group) == (1, 1)


@pytest.mark.parametrize(
    ("name", "form"),
    [("k2_thinking", "int4"), ("k2_instruct_0905", "fp8"), ("deepseek_v3.1", "fp8"), ("moonlight", "none")],
)
def test_the_form_of_the_weights_is_read(name: str, form: str) -> None:
    assert ModelConfig.from_json(PUBLISHED[name]).quantisation == form


def test_a_slice_keeps_each_layers_kind() -> None:
    whole = ModelConfig.from_json(PUBLISHED["deepseek_v3"])
    piece = whole.sliced(range(2, 6))
    assert piece.num_hidden_layers == 4
    assert [piece.is_moe(i) for i in range(4)] == [False, True, True, True] == [whole.is_moe(i) for i in range(2, 6)]
    assert whole.sliced(range(61)) == whole
    assert piece.sliced(range(0, 2)).is_moe(1) is False


@pytest.mark.parametrize(
    "layers", [range(0), range(3, 3), range(60, 62), range(-1, 2), range(0, 9, 2), range(5, 2, -1)]
)
def test_a_slice_that_the_model_does_not_have_is_refused(layers: range) -> None:
    with pytest.raises(ConfigError, match="no slice of 61 layers"):
        ModelConfig.from_json(PUBLISHED["deepseek_v3"]).sliced(layers)


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


V2 = {"model_type": "deepseek_v2", "scoring_func": "softmax", "topk_method": "greedy", "norm_topk_prob": False}

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "llama"}, "model_type"),
    ({"model_type": "deepseek"}, "model_type"),  # the first generation, without latent attention
    ({"attention_bias": True}, "attention_bias"),
    ({"hidden_act": "gelu"}, "hidden_act"),
    ({"num_key_value_heads": 2}, "num_key_value_heads"),
    ({"qk_head_dim": 20}, "qk_head_dim"),
    ({"head_dim": 64}, "head_dim"),
    ({"kv_lora_rank": None}, "kv_lora_rank"),
    ({"hidden_size": "64"}, "hidden_size"),
    ({"hidden_size": 64.5}, "hidden_size"),
    ({"num_hidden_layers": True}, "num_hidden_layers"),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
    ({"n_routed_experts": 10**9}, "n_routed_experts"),
    ({"hidden_size": 10**30}, "hidden_size"),
    ({"rms_norm_eps": 0}, "rms_norm_eps"),
    ({"q_lora_rank": 0}, "q_lora_rank"),
    ({"rope_interleave": False}, "rope_interleave"),
    ({"index_topk": 2048}, "index_topk"),
    ({"sliding_window": 4096}, "sliding_window"),
    ({"qk_clip": 100.0}, "qk_clip"),
    ({"norm_topk_probs": True}, r"norm_topk_probs.*is `norm_topk_prob` meant"),
    ({"tie_word_embeddings": "no"}, "tie_word_embeddings"),
    ({"rope_theta": -1}, "rope_theta"),
    ({"rope_scaling": {"type": "llama3", "factor": 8.0}}, "rope_scaling.type"),
    ({"rope_scaling": {"type": "yarn", "factor": 8.0}}, "original_max_position_embeddings"),
    ({"rope_scaling": K2_YARN | {"factor": None}}, "rope_scaling.factor"),
    ({"rope_scaling": K2_YARN | {"factor": 0}}, "rope_scaling.factor"),
    ({"rope_scaling": K2_YARN | {"beta_fast": "32"}}, "rope_scaling.beta_fast"),
    ({"rope_scaling": K2_YARN | {"short_factor": [1]}}, "rope_scaling.short_factor"),
    ({"rope_scaling": K2_YARN | {"attention_factor": 1.2}}, "rope_scaling.attention_factor"),
    ({"rope_scaling": K2_YARN | {"truncate": False}}, "rope_scaling.truncate"),
    ({"rope_scaling": K2_YARN | {"rope_type": "default"}}, "rope_scaling.type"),
    ({"rope_scaling": [1]}, "rope_scaling"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 1.0}}, "rope_theta"),
    ({"rope_scaling": K2_YARN, "rope_parameters": {"rope_type": "default"}}, "rope_scaling"),
    ({"scoring_func": "relu"}, "scoring_func"),
    ({"scoring_func": "softmax"}, "scoring_func"),
    ({"topk_method": "group_limited_greedy"}, "topk_method"),
    (V2 | {"scoring_func": "sigmoid"}, "scoring_func"),
    (V2 | {"topk_method": "noaux_tc"}, "topk_method"),
    (V2 | {"norm_topk_prob": True}, "norm_topk_prob"),
    (V2 | {"topk_method": "group_limited_greedy", "n_group": None}, "n_group"),
    ({"norm_topk_prob": 1}, "norm_topk_prob"),
    ({"num_experts_per_tok": 1}, "num_experts_per_tok"),
    ({"num_experts_per_tok": None}, "num_experts_per_tok"),
    ({"routed_scaling_factor": None}, "routed_scaling_factor"),
    ({"first_k_dense_replace": None}, "first_k_dense_replace"),
    ({"moe_layer_freq": [1, 2]}, "moe_layer_freq"),
    ({"n_group": None}, "n_group"),
    ({"n_group": 3}, "n_group"),
    ({"n_group": 8, "topk_group": 2}, "n_group"),
    ({"n_group": 2, "topk_group": 3}, "n_group"),
    ({"n_group": 4, "topk_group": 1, "num_experts_per_tok": 3}, "num_experts_per_tok"),
    ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config.quant_method"),
    ({"quantization_config": "fp8"}, "quantization_config"),
    ({"quantization_config": FP8 | {"weight_block_size": None}}, "quantization_config.weight_block_size"),
    ({"quantization_config": FP8 | {"weight_block_size": [64, 64]}}, "quantization_config.weight_block_size"),
    ({"quantization_config": FP8 | {"activation_scheme": "static"}}, "quantization_config.activation_scheme"),
    ({"quantization_config": FP8 | {"fmt": "e5m2"}}, "quantization_config.fmt"),
    ({"quantization_config": FP8 | {"expert_dtype": "fp4"}}, "quantization_config.expert_dtype"),
    ({"quantization_config": INT4 | {"format": "int-quantized"}}, "quantization_config.format"),
    ({"quantization_config": INT4 | {"kv_cache_scheme": {"num_bits": 8}}}, "quantization_config.kv_cache_scheme"),
    ({"quantization_config": INT4 | {"transform_config": {"r1": "hadamard"}}}, "quantization_config.transform_config"),
    ({"quantization_config": INT4 | {"rotation": True}}, "quantization_config.rotation"),
    ({"quantization_config": INT4 | {"config_groups": {}}}, "quantization_config.config_groups"),
    ({"quantization_config": _int4(num_bits=8)}, "weights.num_bits"),
    ({"quantization_config": _int4(symmetric=False)}, "weights.symmetric"),
    ({"quantization_config": _int4(group_size=128)}, "weights.group_size"),
    ({"quantization_config": _int4(actorder="group")}, "weights.actorder"),
    ({"quantization_config": _int4(dynamic=True)}, "weights.dynamic"),
    ({"quantization_config": INT4, "hidden_size": 48}, "hidden_size"),
]


@pytest.mark.parametrize(("changes", "field"), REFUSED, ids=range(len(REFUSED)))
def test_a_field_that_changes_the_maths_is_refused_by_name(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError, match=f"config.json: `.*{field}"):
        ModelConfig.from_json(config_json(**changes))


def test_fields_that_have_no_part_in_the_maths_are_let_be() -> None:
    harmless = {"use_cache": False, "aux_loss_alpha": 0.1, "auto_map": {"AutoConfig": "x"}, "_name_or_path": "/somewhere",
                "future_switch": False, "another_one": None, "a_list": []}  # fmt: skip
    assert ModelConfig.from_json(config_json(**harmless)) == ModelConfig.from_json(config_json())


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000, None], ids=range(5))
def test_a_damaged_or_missing_config_is_an_error_with_its_path(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"config\.json"):
        ModelConfig.load(tmp_path)
