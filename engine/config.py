"""What a checkpoint's `config.json` says about the maths: one frozen description for the whole K2 / DeepSeek family.

Fields keep their published names. A field that would change the result in a way this engine doesn't compute is an error
that names it; fields that only matter in training are ignored.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from thinkloop.traces.events import ThinkloopError

Json = Mapping[str, Any]

INT4_GROUP = 32

_FAMILY = {"kimi_k2": "v3", "deepseek_v3": "v3", "deepseek_v2": "v2", "deepseek": "v2"}
_MUST_BE: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "hidden_act": ("silu",),
    "rope_interleave": (True, None),
    "pretraining_tp": (1, None),
    "index_topk": (None,),
    "sliding_window": (None,),
    "use_qk_norm": (False, None),
}
_ROPE_FIELDS = {
    "type", "rope_type", "rope_theta", "factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim",
    "original_max_position_embeddings", "partial_rotary_factor", "truncate", "attention_factor",
}  # fmt: skip
_REQUIRED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "kv_lora_rank",
    "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "rms_norm_eps", "max_position_embeddings",
)  # fmt: skip


class ConfigError(ThinkloopError):
    """A `config.json` that can't be read, or that asks for maths this engine doesn't have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Yarn:
    """YaRN parameters under their published names."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0


def yarn_mscale(factor: float, mscale: float) -> float:
    """YaRN's temperature `0.1·mscale·ln(factor) + 1`, 1 when the context isn't stretched."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Everything the forward pass needs to know, from `config.json`."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    rms_norm_eps: float
    lora_norm_eps: float = 1e-6
    """eps of q_a_layernorm and kv_a_layernorm: 1e-6 in Hugging Face code whatever the config says; vLLM uses
    `rms_norm_eps`."""
    rope_theta: float
    yarn: Yarn | None
    max_position_embeddings: int
    tie_word_embeddings: bool = False
    first_k_dense_replace: int = 0
    moe_layer_freq: int = 1
    moe_intermediate_size: int = 0
    n_routed_experts: int = 0
    num_experts_per_tok: int = 0
    n_shared_experts: int = 0
    routed_scaling_factor: float = 1.0
    scoring_func: Literal["sigmoid", "softmax"] = "sigmoid"
    topk_method: Literal["noaux_tc", "greedy"] = "noaux_tc"
    n_group: int = 1
    topk_group: int = 1
    norm_topk_prob: bool = True
    int4_experts: bool = False
    """Routed experts are stored as compressed-tensors `pack-quantized` INT4, group 32, symmetric."""
    torch_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    eos_token_ids: tuple[int, ...] = ()

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def cache_width(self) -> int:
        """Values the latent cache keeps per token and layer: the compressed latent, then the rotated shared key."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def softmax_scale(self) -> float:
        """Attention scale, YaRN's squared temperature included (reference 2.3); it holds at every length."""
        scale: float = self.qk_head_dim**-0.5
        if self.yarn is None or not self.yarn.mscale_all_dim:
            return scale
        return scale * yarn_mscale(self.yarn.factor, self.yarn.mscale_all_dim) ** 2

    @property
    def rope_multiplier(self) -> float:
        """Factor on cos and sin: 1 for every published model of the family."""
        if self.yarn is None:
            return 1.0
        return yarn_mscale(self.yarn.factor, self.yarn.mscale) / yarn_mscale(self.yarn.factor, self.yarn.mscale_all_dim)

    def is_moe(self, layer: int) -> bool:
        """Whether `layer` (from 0) has experts instead of one dense MLP."""
        return self.n_routed_experts > 0 and layer >= self.first_k_dense_replace and layer % self.moe_layer_freq == 0

    def with_lora_norm_eps(self, eps: float) -> ModelConfig:
        """The same model with another eps in `q_a_layernorm` and `kv_a_layernorm`."""
        return replace(self, lora_norm_eps=eps)

    @classmethod
    def load(cls, folder: str | Path) -> ModelConfig:
        """Reads `folder/config.json` (and the stop ids of `generation_config.json`). Raises `ConfigError`."""
        path = Path(folder) / "config.json"
        data = _read_json(path)
        generation = Path(folder) / "generation_config.json"
        stop = _ids(data.get("eos_token_id"))
        if generation.is_file():
            stop += [i for i in _ids(_read_json(generation).get("eos_token_id")) if i not in stop]
        return cls.from_json(data, where=str(path), eos_token_ids=tuple(stop))

    @classmethod
    def from_json(cls, data: Json, *, where: str = "config.json", eos_token_ids: tuple[int, ...] = ()) -> ModelConfig:
        """The description of a parsed `config.json`. Raises `ConfigError` naming the field that can't be honoured."""
        reader = _Reader(data, where)
        reader.check()
        theta, yarn = reader.rope()
        return cls(
            model_type=data["model_type"],
            **{name: data[name] for name in _REQUIRED},
            q_lora_rank=data.get("q_lora_rank"),
            rope_theta=theta,
            yarn=yarn,
            tie_word_embeddings=bool(data.get("tie_word_embeddings", False)),
            int4_experts=reader.int4(),
            torch_dtype=reader.dtype(),
            eos_token_ids=eos_token_ids or tuple(_ids(data.get("eos_token_id"))),
            **reader.experts(),
        )


class _Reader:
    """Reads one config, with the file's name at hand for errors."""

    def __init__(self, data: Json, where: str) -> None:
        self.data, self.where = data, where

    def refuse(self, field: str, value: Any, why: str) -> ConfigError:
        return ConfigError(
            f"{self.where}: `{field}` is {value!r}, {why}. Use a checkpoint of the Kimi-K2 / DeepSeek-V3 family in its"
            " published form."
        )

    def check(self) -> None:
        family = self.data.get("model_type")
        if family not in _FAMILY:
            raise self.refuse("model_type", family, f"but this engine runs {', '.join(map(repr, _FAMILY))}")
        for field in _REQUIRED:
            value = self.data.get(field)
            if not isinstance(value, (int, float)) or isinstance(value, bool) or value <= 0:
                raise self.refuse(field, value, "but a positive number is needed")
        for field, allowed in _MUST_BE.items():
            if self.data.get(field, allowed[-1]) not in allowed:
                raise self.refuse(field, self.data[field], "which this engine doesn't compute")
        heads, kv_heads = self.data["num_attention_heads"], self.data.get("num_key_value_heads")
        if kv_heads not in (None, heads):
            raise self.refuse("num_key_value_heads", kv_heads, f"but latent attention needs it equal to {heads} heads")
        if self.data["qk_rope_head_dim"] % 2:
            raise self.refuse("qk_rope_head_dim", self.data["qk_rope_head_dim"], "but rotation needs pairs")

    def rope(self) -> tuple[float, Yarn | None]:
        old, new = self.data.get("rope_scaling"), self.data.get("rope_parameters")
        name = "rope_parameters" if new else "rope_scaling"
        rope: Json = new or old or {}
        theta = rope.get("rope_theta", self.data.get("rope_theta", 10000.0))
        if "rope_theta" in self.data and self.data["rope_theta"] != theta:
            raise self.refuse("rope_theta", self.data["rope_theta"], f"but `{name}.rope_theta` says {theta}")
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind == "default":
            return float(theta), None
        self._check_yarn(name, kind, rope)
        factors = {
            field: float(rope[field])
            for field in ("factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
            if rope.get(field) is not None
        }
        return float(theta), Yarn(original_max_position_embeddings=rope["original_max_position_embeddings"], **factors)

    def _check_yarn(self, name: str, kind: Any, rope: Json) -> None:
        if kind != "yarn":
            raise self.refuse(f"{name}.type", kind, "but this engine knows 'yarn' and 'default'")
        for field in ("factor", "original_max_position_embeddings"):
            if field not in rope:
                raise self.refuse(f"{name}.{field}", None, "but YaRN needs it")
        for field in sorted(set(rope) - _ROPE_FIELDS):
            raise self.refuse(f"{name}.{field}", rope[field], "a field this engine doesn't know")
        for field, only in (("partial_rotary_factor", 1.0), ("truncate", True), ("attention_factor", None)):
            if rope.get(field, only) not in (only, None):
                raise self.refuse(f"{name}.{field}", rope[field], f"but only {only!r} is computed")

    def experts(self) -> dict[str, Any]:
        routed = self.data.get("n_routed_experts") or 0
        if not routed:
            return {}
        v3 = _FAMILY[self.data["model_type"]] == "v3"
        values = {
            "n_routed_experts": routed,
            "first_k_dense_replace": self.data.get("first_k_dense_replace") or 0,
            "moe_layer_freq": self.data.get("moe_layer_freq") or 1,
            "moe_intermediate_size": self.data.get("moe_intermediate_size"),
            "num_experts_per_tok": self.data.get("num_experts_per_tok"),
            "n_shared_experts": self.data.get("n_shared_experts") or 0,
            "routed_scaling_factor": float(self.data.get("routed_scaling_factor", 1.0)),
            "scoring_func": self.data.get("scoring_func", "sigmoid" if v3 else "softmax"),
            "topk_method": self.data.get("topk_method", "noaux_tc" if v3 else "greedy"),
            "n_group": self.data.get("n_group") or 1,
            "topk_group": self.data.get("topk_group") or 1,
            "norm_topk_prob": bool(self.data.get("norm_topk_prob", v3)),
        }
        self._check_experts(values)
        return values

    def _check_experts(self, values: dict[str, Any]) -> None:
        for field in ("moe_intermediate_size", "num_experts_per_tok"):
            if not values[field]:
                raise self.refuse(field, values[field], "but a model with experts needs it")
        pair: tuple[str, str] = (values["scoring_func"], values["topk_method"])
        if pair not in (("sigmoid", "noaux_tc"), ("softmax", "greedy")):
            field = "topk_method" if pair[0] in {"sigmoid", "softmax"} else "scoring_func"
            raise self.refuse(
                field, values[field], "but routers are 'sigmoid' with 'noaux_tc' or 'softmax' with 'greedy'"
            )
        if pair[0] == "softmax" and values["norm_topk_prob"]:
            raise self.refuse("norm_topk_prob", True, "which published softmax routers never use")
        routed, groups = values["n_routed_experts"], values["n_group"]
        if routed % groups or values["topk_group"] > groups:
            raise self.refuse(
                "n_group", groups, f"which doesn't fit {routed} experts, {values['topk_group']} groups kept"
            )
        if groups > 1 and routed // groups < 2:
            raise self.refuse("n_group", groups, "but a group needs two experts to be scored")
        if values["num_experts_per_tok"] > routed // groups * values["topk_group"]:
            raise self.refuse(
                "num_experts_per_tok", values["num_experts_per_tok"], "more than the experts left to choose"
            )

    def int4(self) -> bool:
        quant = self.data.get("quantization_config")
        if not quant:
            return False
        for field, only in (("quant_method", "compressed-tensors"), ("format", "pack-quantized")):
            if quant.get(field) != only:
                raise self.refuse(f"quantization_config.{field}", quant.get(field), f"but only {only!r} is read")
        groups = quant.get("config_groups") or {}
        if len(groups) != 1:
            raise self.refuse("quantization_config.config_groups", sorted(groups), "but one group of weights is read")
        (name, group), = groups.items()  # fmt: skip
        self._check_group(f"quantization_config.config_groups.{name}", group)
        return True

    def _check_group(self, where: str, group: Json) -> None:
        if group.get("input_activations") is not None:
            raise self.refuse(
                f"{where}.input_activations", group["input_activations"], "but activations stay whole here"
            )
        weights = group.get("weights") or {}
        wanted = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": INT4_GROUP}
        for field, only in wanted.items():
            if weights.get(field) != only:
                raise self.refuse(f"{where}.weights.{field}", weights.get(field), f"but only {only!r} is read")
        if weights.get("actorder") is not None:
            raise self.refuse(f"{where}.weights.actorder", weights["actorder"], "but columns must be in order")

    def dtype(self) -> Literal["bfloat16", "float32"]:
        name = self.data.get("torch_dtype", self.data.get("dtype", "bfloat16"))
        return "float32" if name == "float32" else "bfloat16"


def _ids(value: Any) -> list[int]:
    if value is None:
        return []
    return list(value) if isinstance(value, list) else [value]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"{path} can't be read ({error.strerror}). Point to a folder with a published checkpoint."
        ) from error
    except ValueError as error:
        raise ConfigError(f"{path} isn't JSON ({error}). Fetch the file again.") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path} holds a {type(data).__name__}, not an object. Fetch the file again.")
    return data
