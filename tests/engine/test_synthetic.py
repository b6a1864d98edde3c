"""A model of random weights stands in for a checkpoint, in memory and on disk."""

from __future__ import annotations

from pathlib import Path

import torch
from checkpoints import INT4, config_json
from thinkloop.engine.checkpoint import Checkpoint
from thinkloop.engine.config import ModelConfig
from thinkloop.engine.engine import Engine
from thinkloop.engine.footprint import parameters
from thinkloop.engine.layout import expected_tensors
from thinkloop.engine.synthetic import MOONLIGHT_SLICE, RandomTensors


def test_the_slice_has_the_published_shape_of_moonlight() -> None:
    config = ModelConfig.from_json(MOONLIGHT_SLICE)
    whole = ModelConfig.from_json(MOONLIGHT_SLICE | {"num_hidden_layers": 27})
    assert [config.is_moe(layer) for layer in range(4)] == [False, True, True, True]
    assert config.int4_experts
    assert abs(parameters(whole) - 15.96e9) < 0.01e9  # "16B"


def test_written_to_disk_it_is_a_checkpoint_that_loads(tmp_path: Path) -> None:
    data = config_json(quantization_config=INT4, torch_dtype="bfloat16")
    config = ModelConfig.from_json(data)
    tensors = RandomTensors(config)
    tensors.write(tmp_path, data)
    assert Checkpoint(tmp_path, config).nbytes == tensors.nbytes
    with Engine.load(tmp_path, dtype="bfloat16") as engine:
        logits = engine.logits(range(20))
    assert logits.isfinite().all()
    assert logits.std() > 0.1


def test_sizes_and_shapes_are_those_of_the_published_format() -> None:
    config = ModelConfig.from_json(config_json(quantization_config=INT4))
    tensors = RandomTensors(config)
    for name, want in expected_tensors(config).items():
        with tensors.view(name) as tensor:
            assert tensor.shape == want.shape
            assert tensor.nbytes == tensors.size(name)
            if not tensor.dtype.is_floating_point:
                continue
        out = torch.empty(want.shape)
        assert tensors.read(name, out) == tensors.size(name)
        assert out.isfinite().all()
