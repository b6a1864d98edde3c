"""What `thinkloop doctor DIR` says of a checkpoint: what it is, whether it is whole, what it needs and where it fits.

Only config, index and headers are read: seconds for a model of 594 GB.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from thinkloop.agent.doctor import Finding, available_memory
from thinkloop.engine.checkpoint import Checkpoint, CheckpointError, read_index
from thinkloop.engine.config import ConfigError, ModelConfig
from thinkloop.engine.footprint import active_parameters, cache_bytes, default_dtype, parameters, weight_bytes
from thinkloop.kernels.kv_rows import GROUP

_FORMS = {
    "none": "floating point",
    "int4": "INT4 experts (groups of 32), which stay packed, and floating point",
    "fp8": "FP8 (blocks of 128×128), written out when loaded, and floating point",
}
_LAYER = re.compile(r"model\.layers\.(\d+)\.")


class _Place(NamedTuple):
    """A memory that could hold the model, with what is free there and what the model takes, in bytes."""

    name: str
    free: int
    dtype: torch.dtype
    weights: int
    cache_per_token: int
    packed: int | None = None
    """Bytes of cache a token where rows can be packed (`--kv-dtype fp8`)."""


def examine_checkpoint(folder: Path) -> Iterator[Finding]:
    """All findings about the checkpoint in `folder`, in order."""
    try:
        config = ModelConfig.load(folder)
    except ConfigError as error:
        yield Finding("model", "missing", str(error))
        return
    yield Finding("model", "ok", _architecture(config))
    counts = f"{_count(parameters(config))}, {_count(active_parameters(config))} of them active for a token"
    yield Finding("parameters", "ok", counts)
    yield Finding("stored as", "ok", _FORMS[config.quantisation])
    yield _files(folder, config)
    yield _tokenizer(folder)
    yield from _places(config)


def _architecture(c: ModelConfig) -> str:
    moe = sum(map(c.is_moe, range(c.num_hidden_layers)))
    experts = f"{c.n_routed_experts} experts, {c.num_experts_per_tok} chosen and {c.n_shared_experts} shared"
    layers = f"{c.num_hidden_layers - moe} dense, {moe} with {experts}" if moe else "all dense"
    return (f"{c.model_type}: {c.num_hidden_layers} layers ({layers}), hidden {c.hidden_size}, "
            f"{c.num_attention_heads} heads, window {c.max_position_embeddings:,}")  # fmt: skip


def _files(folder: Path, config: ModelConfig) -> Finding:
    """What a look into every header finds."""
    shards = [path.stat().st_size for path in folder.glob("*.safetensors")]
    here = f"{_bytes(sum(shards))} in {len(shards)} {'file' if len(shards) == 1 else 'files'}"
    try:
        checkpoint = Checkpoint(folder, config)
    except CheckpointError as error:
        layers = _whole_layers(folder, config)
        return Finding("files", "missing", f"{here}. {error}",
                       f"or load a slice that is here: layers={layers!r}" if layers else "")  # fmt: skip
    read = f"; {_bytes(checkpoint.nbytes)} of it are read" if checkpoint.nbytes < 0.99 * sum(shards) else ""
    return Finding("files", "ok", f"{here}, all tensors as config.json says{read}")


def _whole_layers(folder: Path, config: ModelConfig) -> range:
    """The longest run of layers whose shards are all here, if a slice could be loaded."""
    try:
        places = read_index(folder)
    except ValueError:
        return range(0)
    lacking = {_layer(name) for name, file in places.items() if not (folder / file).is_file()}
    if not lacking or None in lacking:  # None: embedding, last norm or head, which a slice needs too
        return range(0)
    best = run = range(0)
    for layer in range(config.depth):
        run = range(layer + 1, layer + 1) if layer in lacking else range(run.start, layer + 1)
        best = max(best, run, key=len)
    return best


def _layer(name: str) -> int | None:
    match = _LAYER.match(name)
    return int(match[1]) if match else None


def _tokenizer(folder: Path) -> Finding:
    if (folder / "tiktoken.model").is_file():
        return Finding("tokenizer", "ok", "tiktoken.model")
    return Finding("tokenizer", "missing", "there is no tiktoken.model: the engine takes token ids, but no text",
                   "fetch the checkpoint's tokenizer files (tokenizer.json isn't read)")  # fmt: skip


def _places(config: ModelConfig) -> Iterator[Finding]:
    places = list(_memories(config))
    somewhere = any(place.weights <= place.free for place in places)
    for place in places:
        yield _fit(place, config, somewhere)


def _memories(config: ModelConfig) -> Iterator[_Place]:
    free = available_memory()
    if free is not None:
        yield _place("cpu", free, config, default_dtype(config, "cpu"))
    if torch.cuda.is_available():
        for device in range(torch.cuda.device_count()):
            yield _place(f"cuda:{device}", torch.cuda.mem_get_info(device)[0], config, default_dtype(config, "cuda"))


def _place(name: str, free: int, config: ModelConfig, dtype: torch.dtype) -> _Place:
    packs = name != "cpu" and dtype == torch.bfloat16 and config.kv_lora_rank % GROUP == 0
    packed = cache_bytes(config, dtype, "fp8") if packs else None
    return _Place(name, free, dtype, weight_bytes(config, dtype), cache_bytes(config, dtype), packed)


def _fit(place: _Place, config: ModelConfig, somewhere: bool) -> Finding:
    window = config.max_position_embeddings
    cache = place.cache_per_token * window
    packed = "" if place.packed is None else f" ({_bytes(place.packed * window)} with --kv-dtype fp8)"
    need = (f"{_bytes(place.weights)} of weights in {str(place.dtype).removeprefix('torch.')}, {place.cache_per_token:,} "
            f"bytes of cache a token, {_bytes(cache)} for a whole window{packed}; {_bytes(place.free)} free")  # fmt: skip
    if place.weights + cache <= place.free:
        return Finding(place.name, "ok", f"fits: {need}")
    if place.weights <= place.free:
        tokens = (place.free - place.weights) // place.cache_per_token
        return Finding(place.name, "warn", f"fits, with cache for {tokens:,} tokens: {need}")
    layers = _layers_that_fit(place, config)
    advice = f"load a slice: layers={range(layers)!r} fits" if layers else "use a machine with more memory"
    return Finding(place.name, "warn" if somewhere else "missing", f"doesn't fit: {need}", advice)


def _layers_that_fit(place: _Place, config: ModelConfig) -> int:
    """How many layers, counted from the first, the memory holds with embedding and head."""
    counts = range(config.depth, 0, -1)
    fits = (n for n in counts if weight_bytes(config.sliced(range(n)), place.dtype) <= place.free)
    return next(fits, 0)


def _count(number: int) -> str:
    return f"{number / 1e9:,.2f} billion" if number >= 1e9 else f"{number / 1e6:,.2f} million"


def _bytes(size: int) -> str:
    return f"{size / 1e9:,.2f} GB" if size >= 1e9 else f"{size / 1e6:,.2f} MB"
