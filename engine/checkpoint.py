"""A published checkpoint folder, checked whole from its headers before any weight is read.

One safetensors file or shards with an index; BF16, F16 or F32 weights, routed experts also in compressed-tensors
`pack-quantized` INT4, projections also in FP8 blocks. Of a sliced config only the slice's tensors, and only the shards
that hold them, must be there.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from thinkloop.engine.config import ModelConfig
from thinkloop.engine.layout import FP8, Expected, block_scale, expected_tensors
from thinkloop.engine.quantisation import FP8_BLOCK
from thinkloop.engine.shard import Shard, ShardError, Stored
from thinkloop.kernels.reference import dequantise_fp8
from thinkloop.traces.events import ThinkloopError
from torch import Tensor

SINGLE_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_NAMED = 5
_SAMPLE = 1 << 16
_STRIP_ROWS = 512
"""Rows transposed or written out at once: 38 MiB in float32 for K2's widest matrix. A multiple of the FP8 block."""


class CheckpointError(ThinkloopError):
    """A checkpoint folder that is incomplete, damaged, or not what its config says."""


class Checkpoint:
    """The tensors of one folder. Opening it reads only headers and raises `CheckpointError` on anything that doesn't
    fit. Not thread-safe."""

    def __init__(self, folder: str | Path, config: ModelConfig) -> None:
        self.folder, self.config = Path(folder), config
        self._shards: dict[str, Shard] = {}
        self._stored: dict[str, Stored] = {}
        self._hash = hashlib.sha256(repr(config).encode())
        for file in self._files():
            self._add(file)
        expected = self._expected()
        self._check(expected)
        self.nbytes = sum(self._stored[name].nbytes for name in expected if not name.endswith("weight_shape"))
        """Bytes that loading reads. Packed experts' `weight_shape` says what the config says and isn't read."""

    @property
    def fingerprint(self) -> str:
        """sha256 over the config and each file's name, size, header, first and last 64 KiB: cheap for 594 GB, and a
        retrained model changes it."""
        return self._hash.hexdigest()

    @contextmanager
    def view(self, name: str) -> Iterator[Tensor]:
        """A tensor as stored, mapped from its file; valid inside the block."""
        shard = self._shards[self._stored[name].file]
        try:
            shard.open()
        except OSError as error:
            raise self._error(f"{shard.path.name} can't be read ({error.strerror})", "Fetch it again.") from error
        with shard.view(name) as tensor:
            yield tensor

    def read(self, name: str, out: Tensor) -> int:
        """Copies a float tensor into `out`: its published shape, any float dtype, strides and device. FP8 blocks are
        written out. Returns the bytes read from the file."""
        stored = self._stored[name]
        with self.view(name) as source:
            if stored.dtype != FP8:
                _place(source, out)
                return stored.nbytes
            with self.view(f"{name}_scale_inv") as scale:
                _place_fp8(source, scale, out)
                return stored.nbytes + scale.nbytes

    def size(self, name: str) -> int:
        """Bytes of one tensor as stored."""
        return self._stored[name].nbytes

    def _files(self) -> list[str]:
        if not self.folder.is_dir():
            raise CheckpointError(f"{self.folder} is no folder. Point to one with config.json and safetensors files.")
        if not (self.folder / INDEX).is_file():
            if (self.folder / SINGLE_FILE).is_file():
                return [SINGLE_FILE]
            raise self._error(f"there is neither {SINGLE_FILE} nor {INDEX}", "Fetch the weights.")
        try:
            places = read_index(self.folder)
        except ValueError as error:
            raise self._error(f"{INDEX} is damaged ({error})", "Fetch it again.") from error
        files = sorted({file for name, file in places.items() if not self._ignored(name)})
        missing = [file for file in files if not (self.folder / file).is_file()]
        if missing:
            raise self._error(f"{len(missing)} of {len(files)} shards are missing: {_some(missing)}", "Fetch them.")
        return files

    def _add(self, file: str) -> None:
        try:
            shard = Shard(self.folder / file)
            sample = shard.sample(_SAMPLE)
        except ShardError as error:
            raise self._error(f"{file} {error}", "Fetch that file again.") from error
        except OSError as error:
            raise self._error(f"{file} can't be read ({error.strerror})", "Fetch that file again.") from error
        if twice := sorted(shard.tensors.keys() & self._stored.keys()):
            raise self._error(f"{_some(twice)} stands in two shards", "Fetch the folder anew.")
        self._shards[file] = shard
        self._stored |= shard.tensors
        self._hash.update(f"{file}:{shard.size}:".encode() + shard.header + sample)

    def _expected(self) -> dict[str, Expected]:
        expected = expected_tensors(self.config)
        stored_in_fp8 = [name for name in expected if name in self._stored and self._stored[name].dtype == FP8]
        return expected | dict(
            block_scale(name, expected[name]) for name in stored_in_fp8 if FP8 in expected[name].dtypes
        )

    def _check(self, expected: dict[str, Expected]) -> None:
        missing = [name for name in expected if name not in self._stored]
        unexpected = [name for name in self._stored if name not in expected and not self._ignored(name)]
        advice = "Use the config.json that belongs to these weights, and all of their shards."
        if missing:
            instead = f"; {_some(unexpected)} has no place in this model" if unexpected else ""
            raise self._error(f"{len(missing)} tensors are missing: {_some(missing)}{instead}", advice)
        if unexpected:
            raise self._error(f"{len(unexpected)} tensors have no place in this model: {_some(unexpected)}", advice)
        for name, want in expected.items():
            have = self._stored[name]
            if have.shape != want.shape:
                raise self._error(
                    f"{name} in {have.file} has shape {list(have.shape)} where config.json asks for {list(want.shape)}",
                    advice,
                )
            if have.dtype not in want.dtypes:
                raise self._error(
                    f"{name} in {have.file} is {have.dtype} where {' or '.join(sorted(want.dtypes))} is read",
                    "Use the checkpoint's BF16, FP8 or INT4 (pack-quantized) form, with its own config.json.",
                )

    def _ignored(self, name: str) -> bool:
        """Tensors that may be there and aren't needed: layers outside the slice, layers for multi-token prediction,
        rotary tables of old folders, a tied head."""
        layer, c = _LAYER.match(name), self.config
        if layer and int(layer[1]) not in range(c.first_layer, c.first_layer + c.num_hidden_layers):
            return int(layer[1]) < c.depth + c.num_nextn_predict_layers
        return name.endswith("rotary_emb.inv_freq") or (c.tie_word_embeddings and name == "lm_head.weight")

    def _error(self, what: str, advice: str) -> CheckpointError:
        return CheckpointError(f"Checkpoint {self.folder}: {what}. {advice}")


def read_index(folder: Path) -> dict[str, str]:
    """The file that holds each tensor, from a sharded folder's index. Raises `ValueError` when it is damaged."""
    try:
        places = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
    except (OSError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(repr(error)) from error
    if not isinstance(places, dict) or not all(isinstance(f, str) and Path(f).name == f for f in places.values()):
        raise ValueError("weight_map must give the name of a file in this folder for each tensor")
    return places


def _place(source: Tensor, out: Tensor) -> None:
    """`out.copy_(source)`. Onto a transposed place in strips that torch's blocked transposition serves: 1.7 GB/s on one
    core where the plain call makes 0.3."""
    if out.dim() != 2 or out.stride(0) != 1 or out.device.type != "cpu":
        out.copy_(source.to(out.device))
        return
    for start in range(0, len(source), _STRIP_ROWS):
        strip = source[start : start + _STRIP_ROWS]
        out[start : start + _STRIP_ROWS].T.copy_(strip.T.contiguous())


def _place_fp8(weight: Tensor, scale: Tensor, out: Tensor) -> None:
    for start in range(0, len(weight), _STRIP_ROWS):
        end = start + _STRIP_ROWS
        part, factors = weight[start:end], scale[start // FP8_BLOCK : end // FP8_BLOCK]
        _place(dequantise_fp8(part.to(out.device), factors.to(out.device), out.dtype), out[start:end])


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
