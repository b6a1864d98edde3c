"""Every model of the family, with its published settings and storage, computes what transformers' own class computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import dequantised, random_tensors, write_checkpoint
from published import PUBLISHED, small
from thinkloop.engine.config import ModelConfig
from thinkloop.engine.engine import Engine
from thinkloop.engine.params import Sampling
from torch import Tensor
from transformers_models import logits_of, reference_logits

pytestmark = pytest.mark.anyio

PROMPT, WRITTEN = 48, 64
"""YaRN's original length is 32 in these models: most positions lie beyond it."""


def some_ids(count: int) -> list[int]:
    return torch.randint(0, 160, (count,), generator=torch.Generator().manual_seed(7)).tolist()


def relative_error(ours: Tensor, reference: Tensor) -> float:
    return float((ours - reference).abs().max() / (reference.max() - reference.min()))


def with_prediction_layer(config: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, and the extra layer for multi-token prediction where the config says that the folder has one."""
    depth, extra = config["num_hidden_layers"], dict(tensors)
    if config.get("num_nextn_predict_layers"):
        last = f"model.layers.{depth - 1}."
        extra |= {
            n.replace(last, f"model.layers.{depth}."): t.clone() for n, t in tensors.items() if n.startswith(last)
        }
        extra[f"model.layers.{depth}.eh_proj.weight"] = torch.zeros(160, 320)
        extra[f"model.layers.{depth}.shared_head.head.weight"] = torch.zeros(160, 160)
    return extra


async def greedy(engine: Engine, ids: list[int], count: int) -> list[int]:
    session = engine.session(Sampling(temperature=0))
    await session.append(ids)
    return [token async for token in session.generate(max_tokens=count)]


@pytest.mark.parametrize("shards", [1, 4], ids=["one_file", "sharded"])
@pytest.mark.parametrize("name", PUBLISHED)
async def test_logits_and_greedy_text_are_transformers(tmp_path: Path, name: str, shards: int) -> None:
    config = small(name)
    tensors = random_tensors(ModelConfig.from_json(config), dtype=torch.bfloat16)
    folder = write_checkpoint(tmp_path / "model", config, with_prediction_layer(config, tensors), shards=shards)
    with Engine.load(folder, dtype="float32") as engine:
        ids = some_ids(PROMPT)
        ids += await greedy(engine, ids, WRITTEN)
        reference = reference_logits(tmp_path / "plain", config, dequantised(tensors), ids)
        assert relative_error(engine.logits(ids), reference) < 1e-4
    # The greedy continuation, one token after the other, without a second implementation of the loop.
    assert reference.argmax(-1)[PROMPT - 1 : -1].tolist() == ids[PROMPT:]


@pytest.mark.parametrize("name", ["moonlight", "deepseek_v2_lite", "deepseek_v2"])
def test_a_folder_that_transformers_saved_is_read(tmp_path: Path, name: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    write_checkpoint(tmp_path / "config", small(name), {})
    config = AutoConfig.from_pretrained(tmp_path / "config")
    config._experts_implementation = "eager"
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=1 if parameter.dim() == 1 else parameter.shape[-1] ** -0.5)
    model.save_pretrained(tmp_path / "saved", max_shard_size="200KB")
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 1
    ids = some_ids(PROMPT)
    with Engine.load(tmp_path / "saved", dtype="float32") as engine:
        assert relative_error(engine.logits(ids), logits_of(model, ids)) < 1e-4
