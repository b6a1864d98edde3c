"""A session on disk: one safetensors file with the timeline, the cache rows and whose they are."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from thinkloop.traces.events import ThinkloopError
from torch import Tensor

_FORMAT = "thinkloop-session-1"


class SnapshotError(ThinkloopError):
    """A saved session that can't be written or read, or that belongs to another model."""


class Snapshot(NamedTuple):
    """`rows [layers, n, width]` are the first n tokens' cache; `fingerprint` names model, dtype and cache layout."""

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
    def read(cls, path: Path, fingerprint: str) -> Snapshot:
        """Reads the file and checks that it is whole and of the model with `fingerprint`. Raises `SnapshotError`."""
        try:
            with safe_open(str(path), framework="pt") as file:
                metadata = file.metadata() or {}
                tokens, rows = file.get_tensor("tokens"), file.get_tensor("rows")
            position = int(metadata["rng_position"])
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise SnapshotError(f"{path} is no saved session ({error!r}). Save one with session.save(…).") from error
        if metadata.get("format") != _FORMAT or rows.shape[1] > tokens.shape[0]:
            raise SnapshotError(f"{path} was saved in a form this version doesn't read. Save the session again.")
        if metadata.get("fingerprint") != fingerprint:
            raise SnapshotError(f"{path} belongs to another model or dtype. Load it with the engine that saved it.")
        return cls(tokens.tolist(), position, rows, fingerprint)

    @staticmethod
    def tokens_of(path: Path) -> list[int]:
        """The saved timeline alone, whichever model it belongs to: enough for any engine to build the state again by
        `session.append`. Raises `SnapshotError`."""
        try:
            with safe_open(str(path), framework="pt") as file:
                tokens: list[int] = file.get_tensor("tokens").tolist()
        except (OSError, SafetensorError) as error:
            raise SnapshotError(f"{path} is no saved session ({error!r}). Save one with session.save(…).") from error
        return tokens
