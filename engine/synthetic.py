"""Models of random weights in the shape of published ones, for measuring speed without their checkpoints."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from thinkloop.engine.checkpoint import INDEX
from thinkloop.engine.config import ModelConfig
from thinkloop.engine.layout import expected_tensors
from thinkloop.kernels.reference import GROUP
from torch import Tensor

_ROWS = 509
"""Rows of a matrix that differ; the next ones repeat them. Drawing every value would take longer than loading."""
_INT4_DEVIATION = 4.6
"""The standard deviation of whole numbers from -8 to 7, each as likely."""

MOONLIGHT_SLICE: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "vocab_size": 163840,
    "hidden_size": 2048, "intermediate_size": 11264, "moe_intermediate_size": 1408, "num_hidden_layers": 4,
    "num_attention_heads": 16, "num_key_value_heads": 16, "q_lora_rank": None, "kv_lora_rank": 512,
    "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "n_routed_experts": 64,
    "num_experts_per_tok": 6, "n_shared_experts": 2, "first_k_dense_replace": 1, "moe_layer_freq": 1,
    "routed_scaling_factor": 2.446, "scoring_func": "sigmoid", "topk_method": "noaux_tc", "n_group": 1,
    "topk_group": 1, "norm_topk_prob": True, "rms_norm_eps": 1e-5, "rope_theta": 50000.0,
    "max_position_embeddings": 8192, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "quantization_config": {
        "quant_method": "compressed-tensors", "format": "pack-quantized",
        "config_groups": {"group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32},
        }},
    },
}  # fmt: skip
"""The `config.json` of Moonlight-16B-A3B's first four layers, one dense and three of experts, these in INT4: 1.1 GB of
weights a token, head included."""
_MOONLIGHT = MOONLIGHT_SLICE | {"num_hidden_layers": 27}
K2_SLICE: dict[str, Any] = MOONLIGHT_SLICE | {
    "model_type": "kimi_k2", "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048,
    "num_attention_heads": 64, "num_key_value_heads": 64, "q_lora_rank": 1536, "n_routed_experts": 384,
    "num_experts_per_tok": 8, "n_shared_experts": 1, "routed_scaling_factor": 2.827, "max_position_embeddings": 262144,
    "rope_scaling": {
        "type": "yarn", "factor": 64.0, "beta_fast": 1.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
    },
}  # fmt: skip
"""The same of Kimi-K2-Thinking: 30 GB of experts."""
_WHOLE = {"quantization_config": None}
MADE_UP: dict[str, dict[str, Any]] = {
    "moonlight-slice": MOONLIGHT_SLICE, "moonlight-slice-bf16": MOONLIGHT_SLICE | _WHOLE,
    "moonlight": _MOONLIGHT, "moonlight-bf16": _MOONLIGHT | _WHOLE,
    "k2-slice": K2_SLICE, "k2-slice-bf16": K2_SLICE | {"num_hidden_layers": 2} | _WHOLE,
}  # fmt: skip
"""Models by the names that benches know. With BF16 experts one layer of K2's takes 34 GB: there is one of them."""


class RandomTensors:
    """The tensors of a model without a checkpoint, made as they are read: experts in INT4 where `config` has them so,
    the rest bfloat16. Serves `load_weights` in place of a `Checkpoint`."""

    def __init__(self, config: ModelConfig, seed: int = 0, device: torch.device | None = None) -> None:
        """`device` is where values are drawn, and where `read` is asked to put them (None: the CPU)."""
        self.config = config
        self._expected = expected_tensors(config)
        self._device = device or torch.device("cpu")
        self._generator = torch.Generator(self._device).manual_seed(seed)
        self.nbytes = sum(self.size(name) for name in self._expected if not name.endswith("weight_shape"))

    def size(self, name: str) -> int:
        """Bytes of one tensor, as a checkpoint would store it."""
        return prod(self._expected[name].shape) * self._dtype(name).itemsize

    @contextmanager
    def view(self, name: str) -> Iterator[Tensor]:
        """One tensor, as a checkpoint would store it."""
        yield self._made(name)

    def read(self, name: str, out: Tensor) -> int:
        """Fills `out`, which has the published shape. Returns the tensor's size."""
        self._fill(name, out)
        return self.size(name)

    def write(self, folder: Path, config: dict[str, Any]) -> None:
        """Writes a checkpoint: `config` as its `config.json`, and a shard for each layer, so that memory holds one."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        places: dict[str, str] = {}
        for layer, names in groupby(self._expected, lambda name: name.split(".")[2] if ".layers." in name else ""):
            file = f"model-{layer or 'rest'}.safetensors"
            tensors = {name: self._made(name) for name in names}
            save_file(tensors, folder / file, metadata={"format": "pt"})
            places |= dict.fromkeys(tensors, file)
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}), encoding="utf-8")

    def _dtype(self, name: str) -> torch.dtype:
        if name.endswith(("weight_packed", "weight_shape")):
            return torch.int32
        return torch.float32 if name.endswith("e_score_correction_bias") else torch.bfloat16

    def _made(self, name: str) -> Tensor:
        out = torch.empty(self._expected[name].shape, dtype=self._dtype(name), device=self._device)
        self._fill(name, out)
        return out

    def _fill(self, name: str, out: Tensor) -> None:
        if name.endswith("weight_shape"):
            rows, words = self._expected[name.replace("_shape", "_packed")].shape
            out.copy_(torch.tensor([rows, 8 * words]))
        elif name.endswith("weight_packed"):
            out.random_(-(2**31), 2**31 - 1, generator=self._generator)
        elif out.dim() == 1:
            out.normal_(1.0 if "norm" in name else 0.0, 0.1, generator=self._generator)
        elif name.endswith("weight_scale"):
            out.fill_((GROUP * out.shape[1]) ** -0.5 / _INT4_DEVIATION)
        else:
            deviation = 1.0 if "embed" in name else out.shape[1] ** -0.5
            block = torch.empty(min(_ROWS, out.shape[0]), out.shape[1], device=self._device)
            block.normal_(0, deviation, generator=self._generator)
            for part in torch.split(out, _ROWS):
                part.copy_(block[: len(part)])
