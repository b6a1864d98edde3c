"""What a checkpoint's `config.json` says about the maths: one frozen description for the whole K2 / DeepSeek family.

Fields keep their published names. A field that would change the result in a way this engine doesn't compute is an error
that names it, and so is a field it doesn't know; fields that only matter in training are ignored.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

from thinkloop.engine.config_fields import LARGEST, ConfigError, Fields, read_object
from thinkloop.engine.quantisation import INT4_GROUP, Quantisation, read_quantisation

__all__ = ["ConfigError", "ModelConfig", "Yarn", "yarn_mscale"]

Scoring = Literal["sigmoid", "softmax"]
TopkMethod = Literal["noaux_tc", "greedy", "group_limited_greedy"]

_ROUTERS: dict[str, tuple[Scoring, tuple[TopkMethod, ...]]] = {
    "kimi_k2": ("sigmoid", ("noaux_tc",)),
    "deepseek_v3": ("sigmoid", ("noaux_tc",)),
    "deepseek_v2": ("softmax", ("greedy", "group_limited_greedy")),
}
"""The router in each model type's published code: how experts are scored, and the ways to choose, the default first."""

_POSITIVE = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "kv_lora_rank",
    "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "max_position_embeddings",
)  # fmt: skip
_READ = (
    *_POSITIVE, "model_type", "q_lora_rank", "rms_norm_eps", "rope_theta", "rope_scaling", "rope_parameters",
    "tie_word_embeddings", "num_nextn_predict_layers", "num_key_value_heads", "head_dim", "qk_head_dim",
    "quantization_config", "eos_token_id", "n_routed_experts", "first_k_dense_replace", "moe_layer_freq",
    "moe_intermediate_size", "num_experts_per_tok", "n_shared_experts", "routed_scaling_factor", "scoring_func",
    "topk_method", "n_group", "topk_group", "norm_topk_prob",
)  # fmt: skip
_ONE_VALUE: dict[str, Any] = {
    "attention_bias": False, "mlp_bias": False, "hidden_act": "silu", "rope_interleave": True, "pretraining_tp": 1,
    "use_qk_norm": False, "chunk_size_feed_forward": 0, "is_encoder_decoder": False,
}  # fmt: skip
_NO_PART_IN_THE_MATHS = (
    "architectures", "auto_map", "attention_dropout", "aux_loss_alpha", "bos_token_id", "dtype", "ep_size", "id2label",
    "initializer_range", "label2id", "output_attentions", "output_hidden_states", "output_router_logits",
    "pad_token_id", "problem_type", "return_dict", "router_aux_loss_coef", "seq_aux", "torch_dtype",
    "transformers_version", "unsloth_fixed", "use_cache",
)  # fmt: skip
_ROPE = (
    "type", "rope_type", "rope_theta", "factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim",
    "original_max_position_embeddings", "partial_rotary_factor", "truncate",
)  # fmt: skip


_MOST = {"num_hidden_layers": 1024, "num_attention_heads": 4096}
_MOST_EXPERTS = 1 << 17
"""Of all layers together: every tensor is named before the folder is looked at. K2 has 23,424."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Yarn:
    """YaRN parameters under their published names, with the published code's defaults."""

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
    first_layer: int = 0
    """Where a slice of a model begins in its checkpoint (see `sliced`)."""
    depth: int
    """Decoder layers of the whole checkpoint; `num_hidden_layers` of them are in use."""
    num_nextn_predict_layers: int = 0
    """Layers for multi-token prediction, stored after the decoder's own and not used here (DeepSeek-V3/R1: one)."""
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
    scoring_func: Scoring = "sigmoid"
    topk_method: TopkMethod = "noaux_tc"
    n_group: int = 1
    topk_group: int = 1
    norm_topk_prob: bool = True
    quantisation: Quantisation = "none"
    """How the checkpoint stores its weights: `int4` packs the routed experts, `fp8` any projection."""
    eos_token_ids: tuple[int, ...] = ()

    @property
    def int4_experts(self) -> bool:
        """Whether routed experts are packed INT4, and stay so in memory."""
        return self.quantisation == "int4"

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
        """Factor on cos and sin: 1 for every published model of the family. The published code's formula, which takes
        a missing `mscale_all_dim` for 0; transformers ignores `mscale` then."""
        if self.yarn is None:
            return 1.0
        return yarn_mscale(self.yarn.factor, self.yarn.mscale) / yarn_mscale(self.yarn.factor, self.yarn.mscale_all_dim)

    def is_moe(self, layer: int) -> bool:
        """Whether `layer` (from 0, in the slice if it is one) has experts instead of one dense MLP."""
        index = self.first_layer + layer
        return self.n_routed_experts > 0 and index >= self.first_k_dense_replace and index % self.moe_layer_freq == 0

    def with_lora_norm_eps(self, eps: float) -> ModelConfig:
        """The same model with another eps in `q_a_layernorm` and `kv_a_layernorm`."""
        return replace(self, lora_norm_eps=eps)

    def sliced(self, layers: range) -> ModelConfig:
        """The model that embeds, runs only `layers` (in the checkpoint's numbering) and applies norm and head: for
        measuring a piece of a model that is too large. Raises `ConfigError`."""
        if layers.step != 1 or not 0 <= layers.start < layers.stop <= self.depth:
            raise ConfigError(f"{layers} is no slice of {self.depth} layers. Use range(first, last + 1).")
        return replace(self, first_layer=layers.start, num_hidden_layers=len(layers))

    @classmethod
    def load(cls, folder: str | Path) -> ModelConfig:
        """Reads `folder/config.json` (and the stop ids of `generation_config.json`). Raises `ConfigError`."""
        path = Path(folder) / "config.json"
        data = read_object(path)
        generation = Path(folder) / "generation_config.json"
        stop = _ids(data.get("eos_token_id"))
        if generation.is_file():
            stop += [i for i in _ids(read_object(generation).get("eos_token_id")) if i not in stop]
        return cls.from_json(data, where=str(path), eos_token_ids=tuple(stop))

    @classmethod
    def from_json(
        cls, data: Mapping[str, Any], *, where: str = "config.json", eos_token_ids: tuple[int, ...] = ()
    ) -> ModelConfig:
        """The description of a parsed `config.json`. Raises `ConfigError` naming the field that can't be honoured."""
        fields = Fields(data, where)
        _check(fields)
        theta, yarn = _rope(fields)
        sizes: dict[str, Any] = {name: fields.whole(name, most=_MOST.get(name, LARGEST)) for name in _POSITIVE}
        return cls(
            model_type=data["model_type"],
            **sizes,
            depth=fields.whole("num_hidden_layers"),
            num_nextn_predict_layers=fields.whole("num_nextn_predict_layers", 0, least=0, most=1024),
            q_lora_rank=fields.whole("q_lora_rank") if fields.get("q_lora_rank") is not None else None,
            rms_norm_eps=fields.number("rms_norm_eps"),
            rope_theta=theta,
            yarn=yarn,
            tie_word_embeddings=fields.flag("tie_word_embeddings", False),
            quantisation=read_quantisation(fields),
            eos_token_ids=eos_token_ids or tuple(_ids(data.get("eos_token_id"))),
            **_experts(fields),
        )


def _check(fields: Fields) -> None:
    if fields.get("model_type") not in _ROUTERS:
        raise fields.refuse("model_type", f"but this engine runs {', '.join(map(repr, _ROUTERS))}")
    fields.known((*_READ, *_ONE_VALUE, *_NO_PART_IN_THE_MATHS))
    fields.only(**_ONE_VALUE)
    heads, rope = fields.whole("num_attention_heads"), fields.whole("qk_rope_head_dim")
    if fields.get("num_key_value_heads", heads) != heads:
        raise fields.refuse("num_key_value_heads", f"but latent attention needs it equal to {heads} heads")
    if rope % 2:
        raise fields.refuse("qk_rope_head_dim", "but rotation needs pairs")
    whole = rope + fields.whole("qk_nope_head_dim")
    if fields.get("qk_head_dim", whole) != whole:
        raise fields.refuse("qk_head_dim", f"but qk_nope_head_dim and qk_rope_head_dim make {whole}")
    if fields.get("head_dim", rope) not in (rope, whole):
        raise fields.refuse("head_dim", f"but rotation takes qk_rope_head_dim = {rope} values a head")


def _rope(fields: Fields) -> tuple[float, Yarn | None]:
    """Theta and YaRN, from the published spelling (`rope_scaling`) or that of transformers 5 (`rope_parameters`)."""
    found = [(name, _rope_of(fields, name)) for name in ("rope_parameters", "rope_scaling") if fields.get(name)]
    if not found:
        return fields.number("rope_theta", 10000.0), None
    (_, first), *others = found
    if any(other != first for _, other in others):
        raise fields.refuse("rope_scaling", "but `rope_parameters` says something else")
    return first


def _rope_of(fields: Fields, name: str) -> tuple[float, Yarn | None]:
    rope = fields.nested(name)
    assert rope is not None
    theta = rope.number("rope_theta", fields.number("rope_theta", 10000.0))
    if fields.get("rope_theta", theta) != theta:
        raise fields.refuse("rope_theta", f"but `{name}.rope_theta` says {theta}")
    rope.known(_ROPE)
    rope.only(partial_rotary_factor=1.0, truncate=True)
    kind_field = "rope_type" if "rope_type" in rope else "type"
    kind = rope.get(kind_field, "default")
    if rope.get("type", kind) != kind:
        raise rope.refuse("type", f"but `{name}.rope_type` says {kind!r}")
    if kind not in ("default", "yarn"):
        raise rope.refuse(kind_field, "but this engine knows 'yarn' and 'default'")
    return theta, _yarn(rope) if kind == "yarn" else None


def _yarn(rope: Fields) -> Yarn:
    bounds = {"beta_fast": 0.0, "beta_slow": 0.0, "mscale": -math.inf, "mscale_all_dim": -math.inf}
    chosen = {name: rope.number(name, above=bound) for name, bound in bounds.items() if rope.get(name) is not None}
    original = rope.whole("original_max_position_embeddings")
    return Yarn(factor=rope.number("factor"), original_max_position_embeddings=original, **chosen)


def _experts(fields: Fields) -> dict[str, Any]:
    routed = fields.whole("n_routed_experts", 0, least=0, most=_MOST_EXPERTS // fields.whole("num_hidden_layers"))
    if not routed:
        return {}
    scoring, method = _router(fields)
    # Greedy choice looks at no groups, in the published code and in transformers, whatever `n_group` says.
    grouped = method != "greedy"
    values = {
        "n_routed_experts": routed,
        "first_k_dense_replace": fields.whole("first_k_dense_replace", least=0),
        "moe_layer_freq": fields.whole("moe_layer_freq", 1),
        "moe_intermediate_size": fields.whole("moe_intermediate_size"),
        "num_experts_per_tok": fields.whole("num_experts_per_tok"),
        "n_shared_experts": fields.whole("n_shared_experts", 0, least=0),
        "routed_scaling_factor": fields.number("routed_scaling_factor"),
        "scoring_func": scoring,
        "topk_method": method,
        "n_group": fields.whole("n_group") if grouped else 1,
        "topk_group": fields.whole("topk_group") if grouped else 1,
        "norm_topk_prob": fields.flag("norm_topk_prob", scoring == "sigmoid"),
    }
    _check_choice(fields, values)
    if read_quantisation(fields) == "int4":
        for name in ("hidden_size", "moe_intermediate_size"):
            if fields.whole(name) % INT4_GROUP:
                raise fields.refuse(name, f"but INT4 experts need whole groups of {INT4_GROUP}")
    return values


def _router(fields: Fields) -> tuple[Scoring, TopkMethod]:
    family = fields.get("model_type")
    scoring, methods = _ROUTERS[family]
    if fields.get("scoring_func", scoring) != scoring:
        raise fields.refuse("scoring_func", f"but {family!r} goes with {scoring!r}")
    method = fields.get("topk_method", methods[0])
    if method not in methods:
        raise fields.refuse("topk_method", f"but {family!r} goes with {' or '.join(map(repr, methods))}")
    return scoring, cast(TopkMethod, method)


def _check_choice(fields: Fields, values: dict[str, Any]) -> None:
    if values["norm_topk_prob"] and values["scoring_func"] == "softmax":
        # Published code normalises and then leaves out the scaling factor, transformers does the opposite.
        raise fields.refuse("norm_topk_prob", "which published softmax routers never use")
    if values["norm_topk_prob"] and values["num_experts_per_tok"] == 1:
        raise fields.refuse("num_experts_per_tok", "of which published code makes no sum where transformers does")
    routed, groups, kept = values["n_routed_experts"], values["n_group"], values["topk_group"]
    if routed % groups or kept > groups:
        raise fields.refuse("n_group", f"which doesn't fit {routed} experts, {kept} groups kept")
    if groups > 1 and values["topk_method"] == "noaux_tc" and routed // groups < 2:
        raise fields.refuse("n_group", "but a group needs two experts to be scored")
    if values["num_experts_per_tok"] > routed // groups * kept:
        raise fields.refuse("num_experts_per_tok", "more than the experts left to choose from")


def _ids(value: Any) -> list[int]:
    if value is None:
        return []
    return list(value) if isinstance(value, list) else [value]
