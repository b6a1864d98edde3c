"""The engine: one model on one device, the thread that runs it, and the sessions on it."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Collection
from concurrent.futures import Future
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar
from weakref import WeakSet

import torch
from thinkloop.engine.checkpoint import Checkpoint
from thinkloop.engine.config import ModelConfig
from thinkloop.engine.device import (
    ROW_NAMES,
    Device,
    Dtype,
    EngineError,
    MemoryPlan,
    cache_size,
    check_kernels,
    check_kv_dtype,
    choose_backend,
    choose_dtype,
    find_device,
    narrowed,
    plan_device,
)
from thinkloop.engine.drafts import Confidence, Drafter
from thinkloop.engine.footprint import cache_bytes, resident_bytes
from thinkloop.engine.kv_cache import BlockPool, LatentCache
from thinkloop.engine.model import Segment, Transformer
from thinkloop.engine.params import Sampling
from thinkloop.engine.scheduler import EngineClosed, Scheduler
from thinkloop.engine.sequence import Sequence
from thinkloop.engine.session import Session
from thinkloop.engine.weights import Progress, load_weights
from thinkloop.kernels.kv_rows import KvDtype
from torch import Tensor

T = TypeVar("T")

Announce = Callable[[str], None]
"""Called with a line about what is to be loaded."""
MINI = Path(__file__).parent / "mini"
_ONE_THREAD = 64 << 20
"""Below this, waking a second thread for each op of a step of a few rows costs more than it brings."""
PREFILL_CHUNK = 256
_CUDA_CHUNK = 2048

CACHE_PATIENCE = 10.0
_TEXT_FILES = ("tiktoken.model", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


class Engine:
    """A loaded model. Make one with `Engine.load`; close it, or use it in a `with` block."""

    def __init__(
        self, folder: Path, config: ModelConfig, model: Transformer, weights_hash: str, pool: BlockPool, *,
        prefill_chunk: int = PREFILL_CHUNK, cache_patience: float = CACHE_PATIENCE, speculate: bool = True,
        share_prefixes: bool = True, plan: MemoryPlan | None = None,
    ) -> None:  # fmt: skip
        self.folder, self.config, self.model, self.pool = folder, config, model, pool
        self.speculate, self.share_prefixes = speculate, share_prefixes
        self._weights_hash, self._confidence, self._plan = weights_hash, Confidence(), plan
        self.scheduler = Scheduler(model, _threads(config), chunk=prefill_chunk, patience=cache_patience)
        self._sessions: WeakSet[Session] = WeakSet()

    @classmethod
    def load(
        cls, model: str | Path, *, device: Device = "cpu", dtype: Dtype | None = None,
        kv_dtype: KvDtype = "bf16", lora_norm_eps: float | None = None, context: int | None = None,
        cache_tokens: int | None = None, cache_patience: float = CACHE_PATIENCE, prefill_chunk: int | None = None,
        speculate: bool = True, share_prefixes: bool = True, layers: range | None = None,
        progress: Progress | None = None, announce: Announce | None = None,
    ) -> Engine:  # fmt: skip
        """Loads a published checkpoint folder, or the embedded model by the name `mini`.

        `dtype` None means float32 for small models on the CPU and bfloat16 otherwise. `kv_dtype` is what the KV cache holds:
        "bf16" rows as they were computed (in float32 where `dtype` is), "fp8" rows packed into 8 bits, for the Triton
        kernels only: 656 bytes instead of 1,152 a token and layer of Kimi-K2, for values that move (`kernels.kv_fp8` says
        how far). `lora_norm_eps` replaces the eps of the two inner attention norms (1e-6). `context` is the most tokens of a
        session, where that is to be less than the model's window. `cache_tokens` is how many tokens the KV cache holds for
        all sessions together; where it is full, a session waits while others are at work and `cache_patience` seconds
        longer, and is refused then (`CacheFull`). `prefill_chunk` is how many tokens of a long text are read in one step,
        between which the other sessions decode (None: 256 on the CPU, 2,048 on CUDA). `speculate` drafts tokens from each
        session's own text where that is faster, `share_prefixes` lets sessions that begin with the same tokens share their
        rows; neither changes a token in float32 (in bfloat16 a batch of another size may round differently). `layers` loads
        embedding, head and only those decoder layers, to measure a piece of a model that is too large. `progress` is called
        with the bytes read so far and in all, `announce` on CUDA with one line, how the device's memory is shared out, before
        any is taken. Everything is checked before that. Raises `ThinkloopError`.
        """
        folder = _folder(model)
        config = ModelConfig.load(folder)
        if lora_norm_eps is not None:
            config = config.with_lora_norm_eps(lora_norm_eps)
        if layers is not None:
            config = config.sliced(layers)
        checkpoint_config, config = config, narrowed(config, context)
        where, kind = find_device(device), choose_dtype(dtype, device, config)
        check_kv_dtype(kv_dtype, config, kind, where)
        plan = plan_device(cache_tokens, config, kind, where, kv_dtype)
        tokens = cache_size(cache_tokens, config, kind) if plan is None else plan.cache_tokens
        chunk = prefill_chunk if prefill_chunk is not None else default_chunk(device)
        if chunk < 1:
            raise EngineError(f"`prefill_chunk` is {chunk}; it must be a number of tokens, at least 1.")
        checkpoint, backend = Checkpoint(folder, checkpoint_config), choose_backend(where, kind)
        if backend == "triton":
            check_kernels(config)
        if plan is not None and announce is not None:
            announce(f"{where.type}: {plan}")
        pool = _pool(config, tokens, kind, where, kv_dtype)
        network = _in_another_thread(
            lambda: Transformer(config, load_weights(checkpoint, kind, where, backend=backend, progress=progress))
        )
        return cls(
            folder, config, network, checkpoint.fingerprint, pool,
            prefill_chunk=chunk, cache_patience=cache_patience, speculate=speculate, share_prefixes=share_prefixes,
            plan=plan,
        )  # fmt: skip

    @property
    def fingerprint(self) -> str:
        """Names what a saved cache fits: weights, config and dtype, and how rows are packed where they are."""
        name = f"{self._weights_hash}:{_name(self.model.weights.dtype)}"
        return f"{name}:fp8" if self.pool.rows.dtype == torch.uint8 else name

    def describe(self) -> dict[str, Any]:
        """What a trace records about the model: hashes of weights, tokenizer and template, device, dtype, what the cache
        holds, and on CUDA how memory was shared out, in bytes."""
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
            "cache_tokens": self.pool.tokens,
            "kv_dtype": ROW_NAMES[self.pool.rows.dtype],
            **({} if self._plan is None else {"memory": asdict(self._plan)}),
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


def default_chunk(device: Device) -> int:
    """Tokens of a long text that are read in one step."""
    return PREFILL_CHUNK if device == "cpu" else _CUDA_CHUNK


def _pool(config: ModelConfig, tokens: int, dtype: torch.dtype, device: torch.device, kv_dtype: KvDtype) -> BlockPool:
    try:
        return BlockPool(config, tokens, dtype, device, kv_dtype)
    except RuntimeError as error:  # what torch's allocators raise
        size = tokens * cache_bytes(config, dtype, kv_dtype) / 1e9
        raise EngineError(
            f"There is no memory for a KV cache of {tokens:,} tokens, {size:,.1f} GB. Ask for less: a smaller `context`"
            " (--context) or `cache_tokens`."
        ) from error


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


def _threads(config: ModelConfig) -> tuple[int, int]:
    """Torch's threads for a step of a few rows, and of more."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return (1 if resident_bytes(config, torch.float32) <= _ONE_THREAD else cores), cores


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
