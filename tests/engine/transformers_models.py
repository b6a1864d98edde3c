"""What transformers' own DeepSeek classes compute, for comparison: nobody here wrote them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from checkpoints import Json, write_checkpoint
from torch import Tensor


def reference_logits(folder: Path, config: Json, weights: dict[str, Tensor], ids: list[int]) -> Tensor:
    """Float32 logits `[T, V]` of transformers' model on unquantised `weights`; a plain copy is written into `folder`.

    K2 is DeepSeek-V3 under another name. transformers would build layers for multi-token prediction, which this engine
    skips: they are left out of the copy.
    """
    family = "deepseek_v2" if config["model_type"] == "deepseek_v2" else "deepseek_v3"
    plain = {name: value for name, value in config.items() if name != "quantization_config"}
    plain |= {"model_type": family, "torch_dtype": "float32", "num_nextn_predict_layers": 0}
    write_checkpoint(folder, plain, {name: tensor.float() for name, tensor in weights.items()})
    model, report = _class(family).from_pretrained(
        folder, config=_config(family, folder), dtype=torch.float32, attn_implementation="eager",
        output_loading_info=True,
    )  # fmt: skip
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    return logits_of(model, ids)


def logits_of(model: Any, ids: list[int]) -> Tensor:
    """A transformers model's logits `[T, V]` for one sequence."""
    with torch.inference_mode():
        logits: Tensor = model.eval()(torch.tensor([ids])).logits[0]
    return logits


def _class(family: str) -> Any:
    from transformers import DeepseekV2ForCausalLM, DeepseekV3ForCausalLM

    return DeepseekV2ForCausalLM if family == "deepseek_v2" else DeepseekV3ForCausalLM


def _config(family: str, folder: Path) -> Any:
    config = _class(family).config_class.from_pretrained(folder)
    config._experts_implementation = "eager"
    return config
