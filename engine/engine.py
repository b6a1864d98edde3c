"""The engine: one model on one device, the thread that runs it, and the sessions on it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal
from weakref import WeakSet

import torch
from thinkloop.engine.checkpoint import Checkpoint
from thinkloop.engine.config import ModelConfig
from thinkloop.engine.model import Transformer
from thinkloop.engine.params import Sampling
from thinkloop.engine.session import Session
from thinkloop.engine.weights import load_weights, resident_bytes
from thinkloop.engine.worker import EngineClosed, Worker
from thinkloop.traces.events import ThinkloopError
from torch import Tensor

Device = Literal["cpu", "cuda"]
Dtype = Literal["float32", "bfloat16"]

MINI = Path(__file__).parent / "mini"
_FLOAT32_LIMIT = 2 << 30
"""Models whose part outside the experts takes at most this in float32 run in it on the CPU: exact, and 3.5 times
faster than bfloat16 at the embedded model's size."""
_ONE_THREAD = 64 << 20
"""Below this, waking a second thread for each op costs more than it brings."""
_TEXT_FILES = ("tiktoken.model", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


class EngineError(ThinkloopError):
    """No such model, device or dtype, or bad token ids."""


class Engine:
    """A loaded model. Make one with `Engine.load`; close it, or use it in a `with` block."""

    def __init__(self, folder: Path, config: ModelConfig, model: Transformer, weights_hash: str) -> None:
        self.folder, self.config, self.model = folder, config, model
        self._weights_hash = weights_hash
        self.worker = Worker(_threads(config))
        self._sessions: WeakSet[Session] = WeakSet()

    @classmethod
    def load(
        cls,
        model: str | Path,
        *,
        device: Device = "cpu",
        dtype: Dtype | None = None,
        lora_norm_eps: float | None = None,
    ) -> Engine:
        """Loads a published checkpoint folder, or the embedded model by the name `mini`.

        `dtype` None means float32 for small models on the CPU and bfloat16 otherwise. `lora_norm_eps` replaces the
        eps of the two inner attention norms (1e-6). Everything is checked before memory is taken. Raises
        `ThinkloopError`.
        """
        folder = _folder(model)
        config = ModelConfig.load(folder)
        if lora_norm_eps is not None:
            config = config.with_lora_norm_eps(lora_norm_eps)
        where, kind = _device(device), _dtype(dtype, device, config)
        checkpoint = Checkpoint(folder, config)
        return cls(folder, config, Transformer(config, load_weights(checkpoint, kind, where)), checkpoint.fingerprint)

    @property
    def fingerprint(self) -> str:
        """Names what a saved cache fits: weights, config and dtype."""
        return f"{self._weights_hash}:{_name(self.model.weights.dtype)}"

    def describe(self) -> dict[str, Any]:
        """What a trace records about the model: hashes of weights, tokenizer and template, device, dtype."""
        files = [self.folder / name for name in _TEXT_FILES]
        return {
            "name": self.folder.name,
            "kind": "engine",
            "model_type": self.config.model_type,
            "weights": self._weights_hash,
            "files": {file.name: _sha256(file) for file in files if file.is_file()},
            "device": self.model.weights.device.type,
            "dtype": _name(self.model.weights.dtype),
            "window": self.config.max_position_embeddings,
        }

    def logits(self, token_ids: Sequence[int]) -> Tensor:
        """Float32 logits `[T, V]` on the CPU of `token_ids` read from an empty context. Blocks; for checks."""
        ids, vocabulary = list(token_ids), self.config.vocab_size
        if not ids or not all(0 <= token < vocabulary for token in ids):
            raise EngineError(f"logits needs at least one token id, each from 0 to {vocabulary - 1}.")
        if len(ids) > self.config.max_position_embeddings:
            raise EngineError(f"{len(ids)} tokens are more than the window of {self.config.max_position_embeddings}.")
        return self.worker.call(lambda: self._logits(ids))

    def _logits(self, ids: list[int]) -> Tensor:
        cache, parts = self.model.new_cache(), []
        while cache.length < len(ids):
            start = cache.length
            parts.append(self.model.forward(ids[start : start + self.model.chunk_size(start)], cache, every=True).cpu())
        return torch.cat(parts)

    def session(self, sampling: Sampling | None = None) -> Session:
        """A new, empty session. Sessions of one engine take turns, a token at a time."""
        session = Session(self, sampling or Sampling())
        self._sessions.add(session)
        return session

    def close(self) -> None:
        """Stops the engine's thread after what is under way. Closing twice is fine."""
        for session in list(self._sessions):
            session.fail(EngineClosed("The engine was closed while a session was generating."))
        self.worker.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def _folder(model: str | Path) -> Path:
    if model == "mini":
        if (MINI / "config.json").is_file():
            return MINI
        raise EngineError(
            f"The embedded model isn't in this installation ({MINI}). Install thinkloop anew, or name a folder."
        )
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    raise EngineError(
        f"{str(model)!r} is neither 'mini' nor a folder. Name a folder with config.json and safetensors files."
    )


def _device(name: str) -> torch.device:
    if name not in ("cpu", "cuda"):
        raise EngineError(f"Device {name!r} isn't known; use 'cpu' or 'cuda'.")
    if name == "cuda" and not torch.cuda.is_available():
        raise EngineError(
            "Device 'cuda' was asked for, but torch finds no CUDA device. Use 'cpu', or install the CUDA build."
        )
    return torch.device(name)


def _dtype(name: str | None, device: str, config: ModelConfig) -> torch.dtype:
    if name not in (None, "float32", "bfloat16"):
        raise EngineError(f"dtype {name!r} isn't known; use 'float32' or 'bfloat16'.")
    small = device == "cpu" and resident_bytes(config, torch.float32) <= _FLOAT32_LIMIT
    return torch.float32 if name == "float32" or (name is None and small) else torch.bfloat16


def _threads(config: ModelConfig) -> int:
    if resident_bytes(config, torch.float32) <= _ONE_THREAD:
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
