"""A session on disk: one safetensors file with the timeline, the cache rows and whose they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from thinkloop.engine.config import ModelConfig
from thinkloop.engine.kv_cache import row_format
from thinkloop.kernels.kv_rows import unpack_rows
from thinkloop.traces.events import ThinkloopError
from torch import Tensor

_FORMAT = "thinkloop-session-1"
_PACKED = ":fp8"  # at the end of a fingerprint
_DIGITS = 18  # of a generator's position, which is a 64-bit number


class SnapshotError(ThinkloopError):
    """A saved session that can't be written or read, or that belongs to another model."""


class Snapshot(NamedTuple):
    """`rows [layers, n, width]` are the first n tokens' cache, uint8 where they are packed; `fingerprint` names model, dtype
    and how rows are packed."""

    tokens: list[int]
    rng_position: int
    rows: Tensor
    fingerprint: str

    def write(self, path: Path) -> None:
        """Writes the file whole or not at all. Raises `SnapshotError`."""
        tensors = {"tokens": torch.tensor(self.tokens, dtype=torch.int64), "rows": self.rows.contiguous().cpu()}
        metadata = {"format": _FORMAT, "fingerprint": self.fingerprint, "rng_position": str(self.rng_position)}
        part = path.with_name(path.name + ".part")
        try:
            save_file(tensors, part, metadata=metadata)
            part.replace(path)
        except (OSError, SafetensorError) as error:
            raise SnapshotError(
                f"The session can't be saved to {path} ({error}). Choose a folder that exists and has room."
            ) from error

    @classmethod
    def read(cls, path: Path, fingerprint: str, config: ModelConfig, dtype: torch.dtype) -> Snapshot:
        """Reads the file and checks that it is whole, of the model with `fingerprint`, and that every value is one a
        session of this model can hold: a file may come from anywhere. `dtype` is that of the cache's elements. Raises
        `SnapshotError`."""
        with _opened(path) as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise SnapshotError(f"{path} was saved in a form this version doesn't read. Save the session again.")
            _check_owner(path, metadata.get("fingerprint", ""), fingerprint)
            position, tokens, rows = metadata.get("rng_position", ""), _tokens(file), file.get_tensor("rows")
        most = min(len(tokens), config.max_position_embeddings)
        fits = _fits(rows, config, dtype, most)
        wrong = [
            f"rng_position is {position[:40]!r}" if not position.isdecimal() or len(position) > _DIGITS else "",
            f"{len(tokens):,} tokens don't fit the window of {most:,}" if most < len(tokens) else "",
            "a token is outside the vocabulary" if any(not 0 <= token < config.vocab_size for token in tokens) else "",
            "" if fits else f"rows are {rows.dtype} {list(rows.shape)}",
            "" if not fits or _finite(rows, config) else "rows hold what is no number",
        ]
        if found := next(filter(None, wrong), None):
            raise SnapshotError(f"{path} is damaged: {found}. Save the session again.")
        return cls(tokens, int(position), rows, fingerprint)

    @staticmethod
    def tokens_of(path: Path) -> list[int]:
        """The saved timeline alone, whichever model it belongs to: enough for any engine to build the state again by
        `session.append`. Raises `SnapshotError`."""
        with _opened(path) as file:
            return _tokens(file)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The file, for as long as reading from it goes well."""
    try:
        with safe_open(str(path), framework="pt") as file:
            yield file
    except (OSError, SafetensorError, ValueError) as error:
        raise SnapshotError(f"{path} is no saved session ({error!r}). Save one with session.save(…).") from error


def _tokens(file: Any) -> list[int]:
    tokens = file.get_tensor("tokens")
    if tokens.dim() != 1 or tokens.dtype != torch.int64:
        raise ValueError(f"tokens are {tokens.dtype} {list(tokens.shape)}")
    ids: list[int] = tokens.tolist()
    return ids


def _check_owner(path: Path, saved: str, own: str) -> None:
    """Raises `SnapshotError` unless the file's fingerprint is the engine's own."""
    if saved == own:
        return
    if saved.removesuffix(_PACKED) == own.removesuffix(_PACKED):
        have, want = ("fp8" if name.endswith(_PACKED) else "bf16" for name in (saved, own))
        raise SnapshotError(
            f"{path} holds cache rows in {have}, and this engine keeps them in {want}. Load the model with"
            f" kv_dtype={have!r} (--kv-dtype {have}), or build the state again from `Snapshot.tokens_of(path)`."
        )
    raise SnapshotError(f"{path} belongs to another model or dtype. Load it with the engine that saved it.")


def _fits(rows: Tensor, config: ModelConfig, dtype: torch.dtype, most: int) -> bool:
    """Whether `rows` is a cache of this model for at most `most` tokens."""
    width, _ = row_format(config, dtype, "fp8" if dtype == torch.uint8 else "bf16")
    shape = (config.num_hidden_layers, min(most, rows.shape[1] if rows.dim() > 1 else 0), width)
    return rows.dtype == dtype and rows.shape == shape


def _finite(rows: Tensor, config: ModelConfig) -> bool:
    """Whether all values of rows that fit are numbers; of packed ones a layer at a time."""
    if rows.dtype != torch.uint8:
        return bool(rows.isfinite().all())
    return all(bool(unpack_rows(layer, config.kv_lora_rank).isfinite().all()) for layer in rows)
