"""Random checkpoints in the published format, for tests: small, but with every part of the family."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from thinkloop.engine.config import ModelConfig
from thinkloop.engine.layout import FP8 as FP8_DTYPE
from thinkloop.engine.layout import expected_tensors
from thinkloop.kernels.reference import FP8_BLOCK, dequantise_fp8, dequantise_int4, quantise_int4
from torch import Tensor

Json = dict[str, Any]

K2_YARN: Json = {
    "type": "yarn", "factor": 64.0, "beta_fast": 1.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 4096,
}  # fmt: skip

INT4: Json = {
    "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
    "kv_cache_scheme": None,
    "config_groups": {"group_0": {
        "targets": ["Linear"], "input_activations": None, "output_activations": None,
        "weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32,
                    "dynamic": False, "observer": "minmax", "observer_kwargs": {}, "actorder": None,
                    "block_structure": None}}},
    "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", "re:.*mlp\\.(gate|up|gate_up|down)_proj.*"],
}  # fmt: skip

FP8: Json = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}


def config_json(**changes: Any) -> Json:
    """A small Kimi-K2 `config.json`; `changes` replace fields."""
    return {
        "architectures": ["DeepseekV3ForCausalLM"], "model_type": "kimi_k2", "vocab_size": 160, "hidden_size": 64,
        "intermediate_size": 96, "moe_intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 4, "q_lora_rank": 48, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
        "v_head_dim": 16, "n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1,
        "first_k_dense_replace": 1, "moe_layer_freq": 1, "routed_scaling_factor": 2.827, "scoring_func": "sigmoid",
        "topk_method": "noaux_tc", "n_group": 1, "topk_group": 1, "norm_topk_prob": True, "hidden_act": "silu",
        "attention_bias": False, "rms_norm_eps": 1e-5, "rope_theta": 50000.0, "rope_scaling": None,
        "max_position_embeddings": 512, "tie_word_embeddings": False, "num_nextn_predict_layers": 0,
        "bos_token_id": 0, "eos_token_id": 1, "torch_dtype": "float32",
    } | changes  # fmt: skip


def mini_config_json(**changes: Any) -> Json:
    """The shape of the embedded mini model, INT4 experts."""
    return config_json(
        vocab_size=3000, hidden_size=192, intermediate_size=512, moe_intermediate_size=64, num_hidden_layers=5,
        num_attention_heads=6, num_key_value_heads=6, q_lora_rank=96, kv_lora_rank=128, qk_nope_head_dim=32,
        qk_rope_head_dim=32, v_head_dim=32, max_position_embeddings=4096, torch_dtype="bfloat16",
        quantization_config=INT4,
    ) | changes  # fmt: skip


def random_tensors(config: ModelConfig, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A random model whose logits spread: every tensor `config` needs, by published name."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for name, (shape, dtypes) in expected_tensors(config).items():
        if FP8_DTYPE in dtypes:
            tensors[name], tensors[f"{name}_scale_inv"] = quantise_fp8(_random(name, shape, generator))
        elif name.endswith("weight_packed"):
            weight = torch.randn(shape[0], shape[1] * 8, generator=generator) * (shape[1] * 8) ** -0.5
            tensors[name], tensors[name.replace("_packed", "_scale")] = quantise_int4(weight)
            tensors[name.replace("_packed", "_shape")] = torch.tensor(weight.shape)
        elif name not in tensors:
            tensors[name] = _random(name, shape, generator).to(torch.float32 if "e_score" in name else dtype)
    return tensors


def _random(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    values = torch.randn(shape, generator=generator)
    if "e_score" in name:
        return values * 0.1
    if len(shape) == 1:
        return 1 + values * 0.1
    return values if "embed" in name else values * shape[-1] ** -0.5


def quantise_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """FP8 as published, the largest value of each 128×128 block at e4m3's 448: float8_e4m3fn `[N, K]`, float32 scale
    `[⌈N/128⌉, ⌈K/128⌉]`."""
    rows, columns = weight.shape
    padded = F.pad(weight, (0, -columns % FP8_BLOCK, 0, -rows % FP8_BLOCK))
    blocks = padded.unflatten(1, (-1, FP8_BLOCK)).unflatten(0, (-1, FP8_BLOCK))  # [N/128, 128, K/128, 128]
    scale = blocks.abs().amax((1, 3)) / 448
    values = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
    return values.flatten(2, 3).flatten(0, 1)[:rows, :columns].contiguous(), scale


def dequantised(tensors: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The same model with its packed experts and FP8 projections written out."""
    whole = {name: tensor for name, tensor in tensors.items() if ".weight_" not in name}
    for name, packed in tensors.items():
        if packed.dtype == torch.float8_e4m3fn:
            whole[name] = dequantise_fp8(packed, tensors[f"{name}_scale_inv"], dtype)
        if name.endswith(".weight_packed"):
            scale = tensors[name.replace("_packed", "_scale")]
            whole[name.removesuffix("_packed")] = dequantise_int4(packed, scale, dtype)
    return whole


def write_checkpoint(folder: Path, config: Json, tensors: dict[str, Tensor] | None = None, *, shards: int = 1) -> Path:
    """Writes `config.json` and the tensors (random ones when none are given), in one file or in `shards`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    if tensors is None:
        dtype = torch.bfloat16 if config["torch_dtype"] == "bfloat16" else torch.float32
        tensors = random_tensors(ModelConfig.from_json(config), dtype=dtype)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    count = len(tensors)
    weight_map = {n: f"model-{i * shards // count + 1:05}-of-{shards:05}.safetensors" for i, n in enumerate(tensors)}
    for file in sorted(set(weight_map.values())):
        save_file({n: t for n, t in tensors.items() if weight_map[n] == file}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder
