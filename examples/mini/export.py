"""Write a training checkpoint as a published folder: `python export.py RUN FOLDER [--bf16]`.

The folder is what Kimi-K2-Thinking's looks like: config.json, one safetensors file with INT4 experts (or BF16 ones, to
compare), tiktoken.model, tokenizer and generation configuration, and thinkloop.json with how to run it.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from episodes import SYSTEM
from network import Shape
from safetensors.torch import load_file, save_file
from thinkloop.engine.tokenizer import Tokenizer
from thinkloop.kernels.reference import dequantise_int4, quantise_int4
from torch import Tensor

EXPERT = re.compile(r"(.+)\.experts\.(\d+)\.(\w+)\.weight(?:_(\w+))?")
WINDOW = 1280
"""Tokens: the longest training episodes have about 1,150."""
INT4 = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "quantization_status": "compressed",
    "kv_cache_scheme": None,
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "input_activations": None,
            "output_activations": None,
            "weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32,
                        "dynamic": False, "observer": "minmax", "observer_kwargs": {}, "actorder": None,
                        "block_structure": None},
        }
    },
    "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", "re:.*mlp\\.(gate|up|gate_up|down)_proj.*"],
}  # fmt: skip


def config_json(shape: Shape, tokenizer: Tokenizer, *, int4: bool) -> dict[str, Any]:
    """The folder's `config.json`, with the field names and the fixed values of Kimi-K2-Thinking's."""
    sizes = {key: value for key, value in shape.as_dict().items() if key not in ("rope_factor", "rope_original")}
    config = {
        "architectures": ["DeepseekV3ForCausalLM"], "model_type": "kimi_k2", **sizes,
        "num_key_value_heads": shape.num_attention_heads, "moe_layer_freq": 1, "scoring_func": "sigmoid",
        "topk_method": "noaux_tc", "n_group": 1, "topk_group": 1, "norm_topk_prob": True, "hidden_act": "silu",
        "attention_bias": False, "tie_word_embeddings": False, "num_nextn_predict_layers": 0,
        "rope_scaling": {
            "type": "yarn", "factor": shape.rope_factor, "beta_fast": 1.0, "beta_slow": 1.0, "mscale": 1.0,
            "mscale_all_dim": 1.0, "original_max_position_embeddings": shape.rope_original,
        },
        "max_position_embeddings": int(shape.rope_factor * shape.rope_original),
        "bos_token_id": tokenizer.special("[BOS]"), "eos_token_id": tokenizer.special("<|im_end|>"),
        "pad_token_id": tokenizer.special("[PAD]"), "torch_dtype": "bfloat16",
    }  # fmt: skip
    return config | ({"quantization_config": INT4} if int4 else {})


def published_tensors(network: dict[str, Tensor], *, int4: bool) -> dict[str, Tensor]:
    """The network's state under published names: experts one by one, packed when `int4`."""
    tensors: dict[str, Tensor] = {}
    for name, value in network.items():
        full = name if name.startswith("lm_head") else f"model.{name}"
        if full.endswith("mlp.gate"):
            tensors[f"{full}.weight"] = value.bfloat16()
        elif full.endswith("e_score_correction_bias"):
            tensors[full.replace("e_score", "gate.e_score")] = value.float()
        elif value.ndim == 3:
            layer, matrix = full.rsplit(".", 1)
            for expert, weight in enumerate(value):
                tensors |= _expert(f"{layer}.experts.{expert}.{matrix}", weight, int4)
        else:
            tensors[full] = value.bfloat16()
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def _expert(name: str, weight: Tensor, int4: bool) -> dict[str, Tensor]:
    if not int4:
        return {f"{name}.weight": weight.bfloat16()}
    packed, scale = quantise_int4(weight)
    return {
        f"{name}.weight_packed": packed,
        f"{name}.weight_scale": scale,
        f"{name}.weight_shape": torch.tensor(weight.shape),
    }


def export(run: Path, folder: Path, *, int4: bool = True) -> None:
    """Write the checkpoint of a training run to `folder`."""
    tokenizer = Tokenizer.load(run)
    shape = Shape(tokenizer.n_vocab)
    folder.mkdir(parents=True, exist_ok=True)
    network = torch.load(run / "checkpoint.pt", weights_only=True)["network"]
    save_file(published_tensors(network, int4=int4), folder / "model.safetensors", metadata={"format": "pt"})
    for file in ("tiktoken.model", "tokenizer_config.json"):
        shutil.copyfile(run / file, folder / file)
    _write(folder / "config.json", config_json(shape, tokenizer, int4=int4))
    _write(folder / "generation_config.json", {"max_length": WINDOW, "eos_token_id": tokenizer.special("<|im_end|>")})
    running = {"window": WINDOW, "context_policy": "drop_steps", "system": SYSTEM, "sampling": {"temperature": 0}}
    _write(folder / "thinkloop.json", running)


def restored_state(folder: Path) -> dict[str, Tensor]:
    """The network's state from a published folder, to train on from there: the inverse of `published_tensors`."""
    tensors = load_file(folder / "model.safetensors")
    state: dict[str, Tensor] = {}
    experts: dict[str, dict[int, Tensor]] = {}
    for name, value in tensors.items():
        short = name.removeprefix("model.")
        if match := EXPERT.fullmatch(short):
            layer, expert, matrix, kind = match.groups()
            if kind == "packed":
                value = dequantise_int4(value, tensors[name.replace("_packed", "_scale")], torch.float32)
            if kind in (None, "packed"):
                experts.setdefault(f"{layer}.{matrix}", {})[int(expert)] = value.float()
        else:
            own = short.replace("gate.e_score", "e_score").replace("mlp.gate.weight", "mlp.gate")
            state[own] = value.float()
    return state | {name: torch.stack([rows[i] for i in sorted(rows)]) for name, rows in experts.items()}


def _write(file: Path, value: dict[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--bf16", action="store_true", help="leave the experts in bfloat16")
    arguments = parser.parse_args()
    export(arguments.run, arguments.folder, int4=not arguments.bf16)
