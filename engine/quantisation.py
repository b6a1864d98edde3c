"""`quantization_config`: which weights are stored in fewer bits, and how. What isn't read is refused by name.

- compressed-tensors `pack-quantized`: symmetric INT4 with a scale per 32 input features, routed experts only
  (K2-Thinking; reference 1.1 and 3);
- `fp8`: e4m3 with a float scale per 128×128 block, any projection (DeepSeek-V3/R1, K2-Instruct; reference 1.5).
"""

from __future__ import annotations

from typing import Literal

from thinkloop.engine.config_fields import Fields

Quantisation = Literal["none", "int4", "fp8"]

INT4_GROUP = 32
FP8_BLOCK = 128

_COMPRESSED = (
    "quant_method", "format", "config_groups", "ignore", "kv_cache_scheme", "quantization_status", "sparsity_config",
    "transform_config", "global_compression_ratio", "version",
)  # fmt: skip
_GROUP = ("targets", "weights", "input_activations", "output_activations", "format")
_WEIGHTS = (
    "num_bits", "type", "symmetric", "strategy", "group_size", "dynamic", "actorder", "block_structure", "observer",
    "observer_kwargs", "scale_dtype", "zp_dtype",
)  # fmt: skip
_FP8 = ("quant_method", "fmt", "weight_block_size", "activation_scheme", "scale_fmt", "modules_to_not_convert")


def read_quantisation(config: Fields) -> Quantisation:
    """How the checkpoint described by `config` stores its quantised weights. Raises `ConfigError`."""
    fields = config.nested("quantization_config")
    if fields is None:
        return "none"
    method = fields.get("quant_method")
    if method == "compressed-tensors":
        _check_int4(fields)
        return "int4"
    if method == "fp8":
        _check_fp8(fields)
        return "fp8"
    raise fields.refuse(
        "quant_method", "but 'compressed-tensors' (INT4 experts) and 'fp8' (128×128 blocks) are read",
        "Use the checkpoint's BF16, FP8 or INT4 (pack-quantized) form.",
    )  # fmt: skip


def _check_int4(fields: Fields) -> None:
    fields.known(_COMPRESSED)
    if fields.get("format") != "pack-quantized":
        raise fields.refuse("format", "but only 'pack-quantized' is read")
    for scheme in ("kv_cache_scheme", "sparsity_config", "transform_config"):
        if fields.get(scheme):
            raise fields.refuse(scheme, "which this engine doesn't compute")
    groups = fields.objects("config_groups")
    if len(groups) != 1:
        raise fields.refuse("config_groups", "but exactly one group of weights is read")
    _check_group(groups[0])


def _check_group(group: Fields) -> None:
    group.known(_GROUP)
    for activations in ("input_activations", "output_activations"):
        if group.get(activations) is not None:
            raise group.refuse(activations, "but activations stay whole here")
    group.only(format="pack-quantized")
    weights = group.nested("weights")
    if weights is None:
        raise group.refuse("weights", "but a quantised group has weights")
    weights.known(_WEIGHTS)
    wanted = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": INT4_GROUP}
    for name, value in wanted.items():
        if weights.get(name) != value:
            raise weights.refuse(name, f"but only {value!r} is read")
    weights.only(dynamic=False, block_structure=None)
    if weights.get("actorder") is not None:
        raise weights.refuse("actorder", "but columns must be in order")


def _check_fp8(fields: Fields) -> None:
    """`modules_to_not_convert` needs no reading: each tensor's own dtype says whether it is FP8. `scale_fmt` "ue8m0"
    (DeepSeek-V3.1) rounds the scales to powers of two, which stay float32 in the file. Activations are quantised by
    the published kernels; here they stay whole."""
    fields.known(_FP8)
    fields.only(fmt="e4m3", activation_scheme="dynamic", scale_fmt="ue8m0")
    if fields.get("weight_block_size") != [FP8_BLOCK, FP8_BLOCK]:
        raise fields.refuse("weight_block_size", f"but only [{FP8_BLOCK}, {FP8_BLOCK}] is read")
