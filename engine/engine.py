"""The engine: one model on one device, the thread that runs it, and the sessions on it."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Collection
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TypeVar
from weakref import WeakSet

import torch
from thinkloop.engine.checkpoint import Checkpoint
from thinkloop.engine.config import ModelConfig
from thinkloop.engine.drafts import Confidence, Drafter
from thinkloop.engine.footprint import default_dtype, resident_bytes
from thinkloop.engine.kv_cache import BlockPool, LatentCache
from thinkloop.engine.model import Segment, Transformer
from thinkloop.engine.params import Sampling
from thinkloop.engine.scheduler import EngineClosed, Scheduler
from thinkloop.engine.sequence import Sequence
from thinkloop.engine.session import Session
from thinkloop.engine.weights import Progress, load_weights
from thinkloop.traces.events import ThinkloopError
from torch import Tensor

T = TypeVar("T")
Device = Literal["cpu", "cuda"]
Dtype = Literal["float32", "bfloat16"]

MINI = Path(__file__).parent / "mini"
_ONE_THREAD = 64 << 20
"""Below this, waking a second thread for each op of a step of a few rows costs more than it brings."""
_WINDOWS = 16
_MEMORY_SHARE = 4
"""Without `cache_tokens` the KV cache holds 16 windows, or what a quarter of the free memory holds, whichever is less,
but one window at least. On the CPU memory is only taken as rows are written."""
PREFILL_CHUNK = 256
CACHE_PATIENCE = 10.0
_TEXT_FILES = ("tiktoken.model", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


class EngineError(ThinkloopError):
    """No such model, device or dtype, or bad token ids."""


class Engine:
    """A loaded model. Make one with `Engine.load`; close it, or use it in a `with` block."""

    def __init__(
        self, folder: Path, config: ModelConfig, model: Transformer, weights_hash: str, pool: BlockPool, *,
        prefill_chunk: int = PREFILL_CHUNK, cache_patience: float = CACHE_PATIENCE, speculate: bool = True,
        share_prefixes: bool = True,
    ) -> None:  # fmt: skip
        self.folder, self.config, self.model, self.pool = folder, config, model, pool
        self.speculate, self.share_prefixes = speculate, share_prefixes
        self._weights_hash, self._confidence = weights_hash, Confidence()
        self.scheduler = Scheduler(model, _threads(config), chunk=prefill_chunk, patience=cache_patience)
        self._sessions: WeakSet[Session] = WeakSet()

    @classmethod
    def load(
        cls, model: str | Path, *, device: Device = "cpu", dtype: Dtype | None = None,
        lora_norm_eps: float | None = None, cache_tokens: int | None = None,
        cache_patience: float = CACHE_PATIENCE, prefill_chunk: int = PREFILL_CHUNK,
        speculate: bool = True, share_prefixes: bool = True, layers: range | None = None,
        progress: Progress | None = None,
    ) -> Engine:  # fmt: skip
        """Loads a published checkpoint folder, or the embedded model by the name `mini`.

        `dtype` None means float32 for small models on the CPU and bfloat16 otherwise. `lora_norm_eps` replaces the
        eps of the two inner attention norms (1e-6). `cache_tokens` is how many tokens the KV cache holds for all sessions
        together; where it is full, a session waits while others are at work and `cache_patience` seconds longer, and is
        refused then (`CacheFull`). `prefill_chunk` is how many tokens of a long text are read in one step, between which
        the other sessions decode. `speculate` drafts tokens from each session's own text where that is faster,
        `share_prefixes` lets sessions that begin with the same tokens share their rows; neither changes a token in
        float32 (in bfloat16 a batch of another size may round differently). `layers` loads embedding, head and only those
        decoder layers, to measure a piece of a model that is too large. `progress` is called with the bytes read so far
        and in all. Everything is checked before memory is taken. Raises `ThinkloopError`.
        """
        folder = _folder(model)
        config = ModelConfig.load(folder)
        if lora_norm_eps is not None:
            config = config.with_lora_norm_eps(lora_norm_eps)
        if layers is not None:
            config = config.sliced(layers)
        where, kind = _device(device), _dtype(dtype, device, config)
        tokens = _cache_tokens(cache_tokens, config, kind)
        if prefill_chunk < 1:
            raise EngineError(f"`prefill_chunk` is {prefill_chunk}; it must be a number of tokens, at least 1.")
        checkpoint = Checkpoint(folder, config)
        pool = BlockPool(config, tokens, kind, where)
        network = _in_another_thread(
            lambda: Transformer(config, load_weights(checkpoint, kind, where, progress=progress))
        )
        return cls(
            folder, config, network, checkpoint.fingerprint, pool,
            prefill_chunk=prefill_chunk, cache_patience=cache_patience, speculate=speculate,
            share_prefixes=share_prefixes,
        )  # fmt: skip

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

    def logits(self, token_ids: Collection[int]) -> Tensor:
        """Float32 logits `[T, V]` on the CPU of `token_ids` read from an empty context. Blocks; for checks."""
        ids, vocabulary = list(token_ids), self.config.vocab_size
        if not ids or not all(0 <= token < vocabulary for token in ids):
            raise EngineError(f"logits needs at least one token id, each from 0 to {vocabulary - 1}.")
        if len(ids) > self.config.max_position_embeddings:
            raise EngineError(f"{len(ids)} tokens are more than the window of {self.config.max_position_embeddings}.")
        return self.scheduler.call(lambda: self._logits(ids))

    def _logits(self, ids: list[int]) -> Tensor:
        cache, parts = LatentCache(self.pool), []
        cache.reserve(len(ids))
        try:
            while cache.length < len(ids):
                start = cache.length
                chunk = ids[start : start + self.model.chunk_size(start, PREFILL_CHUNK)]
                parts.append(self.model.forward([Segment(cache, chunk, every=True)])[0].cpu())
        finally:
            cache.release()
        return torch.cat(parts)

    def session(self, sampling: Sampling | None = None) -> Session:
        """A new, empty session. Sessions of one engine decode together, as one batch."""
        session = Session(self, sampling or Sampling(), Sequence(LatentCache(self.pool), Drafter(self._confidence)))
        self._sessions.add(session)
        return session

    def close(self) -> None:
        """Stops the engine's thread after what is under way. Closing twice is fine."""
        for session in list(self._sessions):
            session.fail(EngineClosed("The engine was closed while a session was working."))
        self.scheduler.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def _in_another_thread(work: Callable[[], T]) -> T:
    """Runs `work` in a thread that ends with it. torch's own threads serve one thread at full speed: libgomp stops
    spinning as soon as a second one has a team, and the engine's wide steps take twice as long from then on."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="thinkloop-load", daemon=True).start()
    return future.result()


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
    if name is None:
        return default_dtype(config, device)
    return torch.float32 if name == "float32" else torch.bfloat16


def _threads(config: ModelConfig) -> tuple[int, int]:
    """Torch's threads for a step of a few rows, and of more."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return (1 if resident_bytes(config, torch.float32) <= _ONE_THREAD else cores), cores


def _cache_tokens(asked: int | None, config: ModelConfig, dtype: torch.dtype) -> int:
    if asked is not None and asked < 1:
        raise EngineError(f"`cache_tokens` is {asked}; it must be a number of tokens, at least 1.")
    window = config.max_position_embeddings
    if asked is not None:
        return asked
    row = config.num_hidden_layers * config.cache_width * dtype.itemsize
    return max(window, min(_WINDOWS * window, _free_memory() // _MEMORY_SHARE // row))


def _free_memory() -> int:
    """Bytes of memory that can be had without swapping; 4 GiB where the system doesn't say."""
    try:
        with Path("/proc/meminfo").open(encoding="ascii") as file:
            fields = dict(line.split(":", 1) for line in file)
        return int(fields["MemAvailable"].split()[0]) << 10
    except (OSError, KeyError, ValueError):
        return 4 << 30


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
