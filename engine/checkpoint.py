"""A published checkpoint folder, checked whole from its headers before any weight is read.

One safetensors file or shards with an index; BF16, F16 or F32 weights, routed experts also in compressed-tensors
`pack-quantized` INT4. Names and shapes: reference 2.7.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from thinkloop.engine.config import INT4_GROUP, ModelConfig
from thinkloop.traces.events import ThinkloopError
from torch import Tensor

_FLOAT = frozenset({"BF16", "F16", "F32"})
_INT = frozenset({"I32", "I64"})
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_NAMED = 5
_HEADER_LIMIT = 100_000_000
_SAMPLE = 1 << 16


class CheckpointError(ThinkloopError):
    """A checkpoint folder that is incomplete, damaged, or not what its config says."""


class Stored(NamedTuple):
    """Where a tensor lies and what it is, from a shard's header."""

    file: str
    dtype: str
    shape: tuple[int, ...]


class Expected(NamedTuple):
    """What a tensor must be."""

    shape: tuple[int, ...]
    dtypes: frozenset[str]


def expected_tensors(config: ModelConfig) -> dict[str, Expected]:
    """Every tensor the engine needs for `config`, by published name."""
    return dict(_all_tensors(config))


def _all_tensors(config: ModelConfig) -> Iterator[tuple[str, Expected]]:
    table = (config.vocab_size, config.hidden_size)
    yield "model.embed_tokens.weight", Expected(table, _FLOAT)
    yield "model.norm.weight", Expected(table[1:], _FLOAT)
    if not config.tie_word_embeddings:
        yield "lm_head.weight", Expected(table, _FLOAT)
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{prefix}{norm}.weight", Expected((config.hidden_size,), _FLOAT)
        yield from _attention(config, f"{prefix}self_attn.")
        yield from (_experts if config.is_moe(layer) else _dense)(config, f"{prefix}mlp.")


def _attention(config: ModelConfig, prefix: str) -> Iterator[tuple[str, Expected]]:
    hidden, heads, latent = config.hidden_size, config.num_attention_heads, config.kv_lora_rank
    shapes: dict[str, tuple[int, ...]] = {
        "kv_a_proj_with_mqa": (config.cache_width, hidden),
        "kv_a_layernorm": (latent,),
        "kv_b_proj": (heads * (config.qk_nope_head_dim + config.v_head_dim), latent),
        "o_proj": (hidden, heads * config.v_head_dim),
    }
    if config.q_lora_rank is None:
        shapes["q_proj"] = (heads * config.qk_head_dim, hidden)
    else:
        shapes["q_a_proj"] = (config.q_lora_rank, hidden)
        shapes["q_a_layernorm"] = (config.q_lora_rank,)
        shapes["q_b_proj"] = (heads * config.qk_head_dim, config.q_lora_rank)
    for name, shape in shapes.items():
        yield f"{prefix}{name}.weight", Expected(shape, _FLOAT)


def _mlp(prefix: str, hidden: int, width: int, int4: bool = False) -> Iterator[tuple[str, Expected]]:
    for name, shape in (("gate_proj", (width, hidden)), ("up_proj", (width, hidden)), ("down_proj", (hidden, width))):
        if not int4:
            yield f"{prefix}{name}.weight", Expected(shape, _FLOAT)
            continue
        yield f"{prefix}{name}.weight_packed", Expected((shape[0], shape[1] // 8), frozenset({"I32"}))
        yield f"{prefix}{name}.weight_scale", Expected((shape[0], shape[1] // INT4_GROUP), _FLOAT)
        yield f"{prefix}{name}.weight_shape", Expected((2,), _INT)


def _dense(config: ModelConfig, prefix: str) -> Iterator[tuple[str, Expected]]:
    return _mlp(prefix, config.hidden_size, config.intermediate_size)


def _experts(config: ModelConfig, prefix: str) -> Iterator[tuple[str, Expected]]:
    hidden, width = config.hidden_size, config.moe_intermediate_size
    yield f"{prefix}gate.weight", Expected((config.n_routed_experts, hidden), _FLOAT)
    if config.scoring_func == "sigmoid":
        yield f"{prefix}gate.e_score_correction_bias", Expected((config.n_routed_experts,), _FLOAT)
    if config.n_shared_experts:
        yield from _mlp(f"{prefix}shared_experts.", hidden, width * config.n_shared_experts)
    for expert in range(config.n_routed_experts):
        yield from _mlp(f"{prefix}experts.{expert}.", hidden, width, config.int4_experts)


class Checkpoint:
    """The tensors of one folder. Opening it reads only headers and raises `CheckpointError` on anything that doesn't
    fit."""

    def __init__(self, folder: str | Path, config: ModelConfig) -> None:
        self.folder = Path(folder)
        self.config = config
        self._stored: dict[str, Stored] = {}
        self._open: dict[str, Any] = {}
        self._hash = hashlib.sha256(repr(config).encode())
        for name in self._files():
            self._add(name)
        self._check(expected_tensors(config))

    @property
    def fingerprint(self) -> str:
        """sha256 over the config and each file's name, size, header, first and last 64 KiB: cheap for 594 GB, and a
        retrained model changes it."""
        return self._hash.hexdigest()

    def tensor(self, name: str) -> Tensor:
        """Reads one tensor as stored. Raises `CheckpointError` when the shard is damaged."""
        file = self._stored[name].file
        try:
            if file not in self._open:
                self._open[file] = safe_open(str(self.folder / file), framework="pt")
            tensor: Tensor = self._open[file].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise self._error(f"{file} is damaged at {name} ({error})", "Fetch that file again.") from error
        return tensor

    def _files(self) -> list[str]:
        if not self.folder.is_dir():
            raise CheckpointError(f"{self.folder} is no folder. Point to one with config.json and safetensors files.")
        index = self.folder / "model.safetensors.index.json"
        if not index.is_file():
            if (self.folder / "model.safetensors").is_file():
                return ["model.safetensors"]
            raise self._error(
                "there is neither model.safetensors nor model.safetensors.index.json", "Fetch the weights."
            )
        try:
            files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise self._error(f"{index.name} is damaged ({error!r})", "Fetch it again.") from error
        missing = [file for file in files if not (self.folder / str(file)).is_file()]
        if missing:
            raise self._error(f"{len(missing)} of {len(files)} shards are missing: {_some(missing)}", "Fetch them.")
        return files

    def _add(self, file: str) -> None:
        path = self.folder / file
        try:
            with path.open("rb") as stream:
                (length,) = struct.unpack("<Q", stream.read(8))
                raw = stream.read(length) if length <= _HEADER_LIMIT else b""
            header = json.loads(raw)
            entries = {n: Stored(file, e["dtype"], tuple(e["shape"])) for n, e in header.items() if n != "__metadata__"}
            end = 8 + length + max((e["data_offsets"][1] for n, e in header.items() if n != "__metadata__"), default=0)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
            raise self._error(
                f"{file} has no readable safetensors header ({error})", "Fetch that file again."
            ) from error
        size = path.stat().st_size
        if size != end:
            raise self._error(f"{file} has {size} bytes where its header promises {end}", "Fetch that file again.")
        twice = sorted(entries.keys() & self._stored.keys())
        if twice:
            raise self._error(f"{_some(twice)} stands in two shards", "Fetch the folder anew.")
        self._stored |= entries
        self._hash.update(f"{file}:{size}:".encode() + raw)
        with path.open("rb") as stream:
            for start in (8 + length, max(8 + length, size - _SAMPLE)):
                stream.seek(start)
                self._hash.update(stream.read(_SAMPLE))

    def _check(self, expected: dict[str, Expected]) -> None:
        missing = [name for name in expected if name not in self._stored]
        if missing:
            raise self._error(
                f"{len(missing)} tensors are missing: {_some(missing)}", "Is a shard or the config another model's?"
            )
        for name, want in expected.items():
            have = self._stored[name]
            if have.shape != want.shape:
                raise self._error(
                    f"{name} in {have.file} has shape {list(have.shape)} where config.json asks for {list(want.shape)}",
                    "Use the config.json that belongs to these weights.",
                )
            if have.dtype not in want.dtypes:
                raise self._error(
                    f"{name} in {have.file} is {have.dtype} where {' or '.join(sorted(want.dtypes))} is read",
                    "Use the BF16 or the INT4 (pack-quantized) form of this checkpoint.",
                )
        unexpected = [name for name in self._stored if name not in expected and not self._ignored(name)]
        if unexpected:
            raise self._error(
                f"{len(unexpected)} tensors have no place in this model: {_some(unexpected)}",
                "Use the config.json that belongs to these weights.",
            )

    def _ignored(self, name: str) -> bool:
        layer = _LAYER.match(name)
        if layer and int(layer[1]) >= self.config.num_hidden_layers:
            return True  # multi-token prediction of DeepSeek-V3/R1
        return name.endswith("rotary_emb.inv_freq") or (self.config.tie_word_embeddings and name == "lm_head.weight")

    def _error(self, what: str, advice: str) -> CheckpointError:
        return CheckpointError(f"Checkpoint {self.folder}: {what}. {advice}")


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def as_float(tensor: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`tensor` in the engine's dtype and place."""
    return tensor.to(device=device, dtype=dtype)
