"""Training: the network that is trained is the network that the engine runs, and a run can be resumed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from circuits import planted
from export import config_json, export, published_tensors, restored_state
from generate import sample_texts
from network import Shape, fake_quantise
from thinkloop.engine.engine import Engine
from thinkloop.engine.tokenizer import Tokenizer
from thinkloop.kernels.reference import dequantise_int4, quantise_int4
from vocab import build_ranks, write_vocabulary


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    write_vocabulary(folder, build_ranks(sample_texts()))
    torch.manual_seed(0)
    network = planted(Shape(Tokenizer.load(folder).n_vocab))
    torch.save({"network": network.state_dict()}, folder / "checkpoint.pt")
    return folder


@pytest.mark.parametrize("int4", [True, False])
def test_the_engine_computes_what_was_trained(run: Path, tmp_path: Path, int4: bool) -> None:
    export(run, tmp_path, int4=int4)
    network = planted(Shape(Tokenizer.load(run).n_vocab)).eval()
    network.load_state_dict(torch.load(run / "checkpoint.pt", weights_only=True)["network"])
    for parameter in network.parameters():
        parameter.data = parameter.data.bfloat16().float() if parameter.ndim < 3 or not int4 else parameter.data
    for moe in network.moes():
        moe.quantise = int4
    ids = torch.randint(0, 2500, (150,), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = network(ids[None])
    engine = Engine.load(tmp_path, dtype="float32")
    actual = torch.as_tensor(engine.logits(ids.tolist()))
    engine.close()
    assert (actual - expected).abs().max() <= 1e-3 * (expected.max() - expected.min())


def test_training_rounds_weights_as_int4_does() -> None:
    weight = torch.randn(64, 192, generator=torch.Generator().manual_seed(0))
    packed, scale = quantise_int4(weight)
    assert torch.allclose(fake_quantise(weight), dequantise_int4(packed, scale, torch.float32), atol=1e-6)


def test_the_exported_folder_is_in_the_published_format(run: Path) -> None:
    tokenizer = Tokenizer.load(run)
    state = torch.load(run / "checkpoint.pt", weights_only=True)["network"]
    names = set(published_tensors(state, int4=True))
    assert "model.layers.1.mlp.experts.7.down_proj.weight_packed" in names
    assert "model.layers.4.mlp.gate.e_score_correction_bias" in names
    assert "model.layers.0.self_attn.kv_a_proj_with_mqa.weight" in names
    config = config_json(Shape(tokenizer.n_vocab), tokenizer, int4=True)
    assert config["model_type"] == "kimi_k2"
    assert config["rope_scaling"]["beta_fast"] == 1.0


def test_training_can_go_on_from_a_published_folder(run: Path, tmp_path: Path) -> None:
    state = torch.load(run / "checkpoint.pt", weights_only=True)["network"]
    export(run, tmp_path, int4=True)
    restored = restored_state(tmp_path)
    assert restored.keys() == state.keys()
    for name, value in state.items():
        expected = fake_quantise(value) if value.ndim == 3 else value if "e_score" in name else value.bfloat16().float()
        assert torch.allclose(restored[name], expected, atol=1e-6), name
