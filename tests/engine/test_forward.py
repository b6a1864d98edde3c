"""The forward pass equals transformers' DeepseekV3ForCausalLM, however the tokens are fed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import INT4, K2_YARN, config_json, dequantised, mini_config_json, random_tensors, write_checkpoint
from published import PUBLISHED
from thinkloop.engine.config import ModelConfig
from thinkloop.engine.engine import Engine
from thinkloop.engine.kv_cache import LatentCache
from thinkloop.engine.mla_choice import expanded_is_cheaper
from thinkloop.engine.model import Segment
from thinkloop.engine.weights import Experts
from torch import Tensor
from transformers_models import reference_logits

SHAPES: dict[str, dict[str, Any]] = {
    "k2": {},
    "q_lora_absent": {"q_lora_rank": None, "model_type": "deepseek_v3", "n_shared_experts": 2},
    "groups": {"n_group": 4, "topk_group": 2, "num_experts_per_tok": 3},
    "yarn": {"rope_scaling": K2_YARN | {"original_max_position_embeddings": 32}, "max_position_embeddings": 2048},
    "yarn_k25": {"rope_scaling": K2_YARN | {"beta_fast": 32.0}, "qk_rope_head_dim": 16},
    "two_shared": {"n_shared_experts": 2},
    "two_dense": {"first_k_dense_replace": 2, "v_head_dim": 24},
    "unnormalised": {"norm_topk_prob": False},
    "tied": {"tie_word_embeddings": True},
}


def some_ids(count: int, vocabulary: int = 160) -> list[int]:
    return torch.randint(0, vocabulary, (count,), generator=torch.Generator().manual_seed(7)).tolist()


def relative_error(ours: Tensor, reference: Tensor) -> float:
    return float((ours - reference).abs().max() / (reference.max() - reference.min()))


def fed(engine: Engine, ids: list[int], sizes: list[int]) -> Tensor:
    """Logits of every token, fed in pieces of the given sizes (the last size repeats)."""
    cache, parts, at = LatentCache(engine.pool), [], 0
    cache.reserve(len(ids))
    while at < len(ids):
        size = sizes.pop(0) if len(sizes) > 1 else sizes[0]
        piece = ids[at : at + size]
        parts += engine.model.forward([Segment(cache, piece, every=True)])
        at += size
    return torch.cat(parts)


@pytest.mark.parametrize("int4", [False, True], ids=["whole", "int4"])
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_equal_transformers_fed_whole_in_chunks_and_token_by_token(
    tmp_path: Path, shape: str, int4: bool
) -> None:
    changes = SHAPES[shape] | ({"quantization_config": INT4} if int4 else {})
    config = config_json(**changes)
    tensors = random_tensors(ModelConfig.from_json(config))
    folder = write_checkpoint(tmp_path / "model", config, tensors)
    ids = some_ids(90)
    reference = reference_logits(tmp_path / "plain", config, dequantised(tensors), ids)
    with Engine.load(folder, dtype="float32") as engine:
        assert relative_error(engine.logits(ids), reference) < 1e-4
        assert relative_error(fed(engine, ids, [40, 7, 1, 20, 3]), reference) < 1e-4
        assert relative_error(fed(engine, ids, [5, 1]), reference) < 1e-4


def test_positions_beyond_yarns_original_length_equal_transformers(tmp_path: Path) -> None:
    config = config_json(rope_scaling=K2_YARN, max_position_embeddings=262144, num_hidden_layers=2, hidden_size=32)
    tensors = random_tensors(ModelConfig.from_json(config))
    folder = write_checkpoint(tmp_path / "model", config, tensors)
    ids = some_ids(4200)
    reference = reference_logits(tmp_path / "plain", config, tensors, ids)
    with Engine.load(folder) as engine:
        assert relative_error(engine.logits(ids)[4090:], reference[4090:]) < 1e-4


def test_the_norm_eps_of_the_inner_norms_is_a_knob(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", config_json())
    with Engine.load(folder) as one, Engine.load(folder, lora_norm_eps=0.1) as other:
        assert relative_error(one.logits([1, 2, 3]), other.logits([1, 2, 3])) > 1e-3


def typical_error(ours: Tensor, reference: Tensor) -> float:
    """The median token's error: in bfloat16 a few tokens go to another expert where two are nearly equal."""
    return float((ours - reference).abs().amax(-1).median() / (reference.max() - reference.min()))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_packed_experts_compute_what_their_written_out_form_does(tmp_path: Path, dtype: Any) -> None:
    config = mini_config_json()
    tensors = random_tensors(ModelConfig.from_json(config), dtype=torch.bfloat16)
    packed = write_checkpoint(tmp_path / "packed", config, tensors)
    config.pop("quantization_config")
    whole = write_checkpoint(tmp_path / "whole", config, dequantised(tensors))
    ids = some_ids(48, 3000)
    with Engine.load(packed, dtype=dtype) as one, Engine.load(whole, dtype=dtype) as other:
        reference = other.logits(ids)
        for ours in (one.logits(ids), fed(one, ids, [20, 1])):
            if dtype == "float32":
                assert relative_error(ours, reference) < 1e-5
            else:
                assert typical_error(ours, reference) < 0.02


def test_bfloat16_stays_close_to_float32(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", mini_config_json())
    ids = some_ids(64, 3000)
    with Engine.load(folder, dtype="bfloat16") as narrow, Engine.load(folder, dtype="float32") as wide:
        assert typical_error(narrow.logits(ids), wide.logits(ids)) < 0.02


def test_prefill_chunks_of_a_long_text_equal_one_pass(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", config_json(max_position_embeddings=1024))
    ids = some_ids(700)
    with Engine.load(folder) as engine:
        assert relative_error(engine.logits(ids), fed(engine, ids, [700])) < 1e-5


def test_the_form_of_attention_with_fewer_operations_is_known() -> None:
    k2 = ModelConfig.from_json(PUBLISHED["k2_thinking"])
    assert not expanded_is_cheaper(k2, 170, 1 << 18)
    assert expanded_is_cheaper(k2, 171, 1 << 18)


def test_experts_stay_packed_in_memory(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", mini_config_json())
    with Engine.load(folder, dtype="float32") as engine:
        for layer in engine.model.weights.layers[1:]:
            experts = layer.mlp
            assert isinstance(experts, Experts)
            for matrix in (experts.gate_up.planes, experts.down.planes):
                assert matrix is not None
                bits = 8 * (matrix.weight.nbytes + matrix.scale.nbytes) / (2 * matrix.weight.numel())
                assert bits == 5.0
