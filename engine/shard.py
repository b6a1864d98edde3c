"""One safetensors file: its header checked against its bytes, its tensors as views of a memory map.

The format: 8 bytes with the header's length (little-endian), a JSON object from names to dtype, shape and byte range,
then the bytes. Mapped here rather than through the safetensors package so that pages can be handed back after each
tensor: a process that reads a 10 GB shard then never has more of it resident than one tensor.
"""

from __future__ import annotations

import json
import math
import mmap
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

_HEADER_LIMIT = 100_000_000
_DTYPES = {
    "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn,
    "I32": torch.int32, "I64": torch.int64,
}  # fmt: skip


class ShardError(ValueError):
    """A file that isn't the safetensors file its header promises; the message says how."""


class Stored(NamedTuple):
    """What a tensor is and where it lies: bytes `start` to `end` of `file`."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start


class Shard:
    """A safetensors file. Opening it reads its header only and raises `ShardError` or `OSError`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = path.stat().st_size
        self.header, self.tensors = self._read()
        self._map: mmap.mmap | None = None

    def _read(self) -> tuple[bytes, dict[str, Stored]]:
        with self.path.open("rb") as stream:
            first = stream.read(8)
            length = struct.unpack("<Q", first)[0] if len(first) == 8 else _HEADER_LIMIT + 1
            header = stream.read(length) if length <= _HEADER_LIMIT else b""
        try:
            entries = {name: entry for name, entry in json.loads(header).items() if name != "__metadata__"}
            tensors = {name: self._stored(entry, 8 + length) for name, entry in entries.items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ShardError(f"has no readable safetensors header ({error})") from error
        end = 8 + length
        for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
            if tensor.start < end:
                raise ShardError(f"gives {name} bytes that belong to another tensor")
            end = tensor.end
        if self.size != end:
            raise ShardError(f"has {self.size} bytes where its header promises {end}")
        for name, tensor in tensors.items():
            kind = _DTYPES.get(tensor.dtype)
            if kind is not None and tensor.nbytes != math.prod(tensor.shape) * kind.itemsize:
                raise ShardError(f"gives {name} {tensor.nbytes} bytes, which {tensor.dtype} {list(tensor.shape)} isn't")
        return header, tensors

    def _stored(self, entry: dict[str, object], base: int) -> Stored:
        shape, offsets = entry["shape"], entry["data_offsets"]
        if not isinstance(shape, list) or not isinstance(offsets, list):
            raise TypeError("shape and data_offsets must be lists")
        start, end = (base + int(offset) for offset in offsets)
        if not base <= start <= end:
            raise ValueError(f"data_offsets {offsets} are out of order")
        return Stored(self.path.name, str(entry["dtype"]), tuple(map(int, shape)), start, end)

    def open(self) -> None:
        """Maps the file, once. Raises `OSError`."""
        if self._map is None:
            with self.path.open("rb") as stream:
                self._map = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)

    @contextmanager
    def view(self, name: str) -> Iterator[Tensor]:
        """The tensor as stored, on the CPU, without a copy. Valid inside the block; its pages are handed back after."""
        self.open()
        assert self._map is not None
        tensor = self.tensors[name]
        try:
            yield _as_tensor(self._map, tensor)
        finally:
            if hasattr(mmap, "MADV_DONTNEED"):
                start = tensor.start - tensor.start % mmap.PAGESIZE
                self._map.madvise(mmap.MADV_DONTNEED, start, tensor.end - start)

    def sample(self, count: int) -> bytes:
        """The first and the last `count` bytes after the header."""
        start = 8 + len(self.header)
        with self.path.open("rb") as stream:
            stream.seek(start)
            first = stream.read(count)
            stream.seek(max(start, self.size - count))
            return first + stream.read(count)


def _as_tensor(source: mmap.mmap, tensor: Stored) -> Tensor:
    kind = _DTYPES[tensor.dtype]
    if tensor.start % kind.itemsize:  # the format doesn't promise alignment, though its own writer aligns
        flat = torch.frombuffer(bytearray(source[tensor.start : tensor.end]), dtype=kind)
    else:
        flat = torch.frombuffer(source, dtype=kind, count=math.prod(tensor.shape), offset=tensor.start)
    return flat.view(tensor.shape)
