"""Where a model runs: which device and dtype, whether the Triton kernels can serve it, and how its memory is shared out.

On CUDA everything is planned before anything is taken: weights by the config, room for a step's intermediates, and what is
left (or was asked for) as cache. What doesn't fit is refused with what would.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import torch
from thinkloop.engine.config import ModelConfig
from thinkloop.engine.footprint import cache_bytes, default_dtype, weight_bytes
from thinkloop.engine.kv_cache import row_format
from thinkloop.kernels.kv_rows import GROUP, KvDtype
from thinkloop.traces.events import ThinkloopError

Device = Literal["cpu", "cuda"]
Dtype = Literal["float32", "bfloat16"]
Backend = Literal["torch", "triton"]
"""What computes: torch's own operations in any dtype, or the Triton kernels, in bfloat16."""

OLDEST = (8, 0)
"""Compute capability from which there are bfloat16 tensor cores: A100 and later."""
_PACKED = (9, 0)
"""From which the kernels read packed cache rows: H100 and later convert e4m3."""
ROW_NAMES = {torch.uint8: "fp8", torch.bfloat16: "bf16", torch.float32: "float32"}
"""What cache rows are called, by the type of their elements."""
_TRITON = (3, 4)
_RESERVE = 1 << 30
"""Bytes of a device left alone: the driver's context, libraries' workspaces, compiled kernels."""
_WIDEST = 512
"""Channels of a latent or a head that a kernel's tile holds."""
_STEP_ROWS = 256
"""Rows of the largest captured step, whose logits are kept in bfloat16 and float32."""
_WINDOWS = 16
_MEMORY_SHARE = 4
"""On the CPU, without `cache_tokens`, the KV cache holds 16 windows, or what a quarter of the free memory holds, whichever
is less, but one window at least. Memory is only taken there as rows are written."""


class EngineError(ThinkloopError):
    """No such model, device or dtype, too little memory, or bad token ids."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """Bytes of a device, and what they are for. `cache_tokens` is what the cache holds, all sessions together, in rows that
    `ROW_NAMES` calls `kv_dtype`."""

    free: int
    weights: int
    workspace: int
    cache: int
    cache_tokens: int
    kv_dtype: str

    def __str__(self) -> str:
        return (
            f"{_gb(self.weights)} of weights, {_gb(self.workspace)} for steps, {_gb(self.cache)} of cache for"
            f" {self.cache_tokens:,} tokens ({self.kv_dtype}); {_gb(self.free)} were free"
        )


def find_device(name: str) -> torch.device:
    """The device called "cpu" or "cuda". Raises `EngineError` when it isn't there or can't run the kernels."""
    if name not in ("cpu", "cuda"):
        raise EngineError(f"Device {name!r} isn't known; use 'cpu' or 'cuda'.")
    if name == "cpu":
        return torch.device(name)
    if not torch.cuda.is_available():
        raise EngineError(
            "Device 'cuda' was asked for, but torch finds no CUDA device. Use 'cpu', or install the CUDA build."
        )
    check_cuda(torch.cuda.get_device_capability(), _triton_version())
    return torch.device(name)


def check_cuda(capability: tuple[int, int], triton: tuple[int, ...] | None) -> None:
    """Raises `EngineError` for a card that is too old, and for a Triton that is missing (None) or too old."""
    if capability < OLDEST:
        raise EngineError(
            f"This CUDA device has compute capability {capability[0]}.{capability[1]}; the kernels need"
            f" {OLDEST[0]}.{OLDEST[1]} (A100) or later. Use 'cpu'."
        )
    needed = ".".join(map(str, _TRITON))
    if triton is None:
        raise EngineError(f"Device 'cuda' needs Triton, which isn't installed: pip install 'triton>={needed}'.")
    if triton < _TRITON:
        have = ".".join(map(str, triton))
        raise EngineError(f"The kernels need Triton {needed} or later, and this is {have}: update torch, or use 'cpu'.")


def _triton_version() -> tuple[int, ...] | None:
    try:
        import triton
    except ImportError:
        return None
    return tuple(int(part) for part in triton.__version__.split(".")[:2])


def choose_dtype(name: str | None, device: Device, config: ModelConfig) -> torch.dtype:
    """The dtype called "float32" or "bfloat16"; None means what suits model and device. Raises `EngineError`."""
    if name not in (None, "float32", "bfloat16"):
        raise EngineError(f"dtype {name!r} isn't known; use 'float32' or 'bfloat16'.")
    if name is None:
        return default_dtype(config, device)
    return torch.float32 if name == "float32" else torch.bfloat16


def choose_backend(device: torch.device, dtype: torch.dtype) -> Backend:
    """The Triton kernels for bfloat16 on CUDA, torch for everything else."""
    return "triton" if device.type == "cuda" and dtype == torch.bfloat16 else "torch"


def check_kernels(config: ModelConfig) -> None:
    """Raises `EngineError` for sizes that the kernels don't take: those of every published model they do."""
    names = ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
    for name in names:
        size = getattr(config, name)
        if not 16 <= size <= _WIDEST or size & (size - 1):
            raise EngineError(f"`{name}` is {size}; on 'cuda' it must be a power of two, 16 to {_WIDEST}. Use 'cpu'.")
    for name in ("hidden_size", "intermediate_size", "moe_intermediate_size", "q_lora_rank"):
        size = getattr(config, name) or 0
        if size % 8:
            raise EngineError(f"`{name}` is {size}; on 'cuda' it must be a multiple of 8. Use 'cpu'.")
    if config.qk_rope_head_dim > config.kv_lora_rank:
        raise EngineError(f"`qk_rope_head_dim` is above `kv_lora_rank` ({config.kv_lora_rank}). Use 'cpu'.")


def check_kv_dtype(
    name: str, config: ModelConfig, dtype: torch.dtype, device: torch.device, capability: tuple[int, int] | None = None
) -> None:
    """Raises `EngineError` when there are no cache rows called `name`, or not for this model, dtype and device.
    `capability` None: that of the device."""
    if name not in get_args(KvDtype):
        raise EngineError(f"kv_dtype {name!r} isn't known; use 'bf16' or 'fp8'.")
    if name == "bf16":
        return
    if choose_backend(device, dtype) != "triton":
        raise EngineError(
            "kv_dtype 'fp8' is for the Triton kernels, with device 'cuda' (--device cuda) and dtype 'bfloat16'; this is"
            f" {device.type!r} in {str(dtype).removeprefix('torch.')}. Leave it at 'bf16'."
        )
    if config.kv_lora_rank % GROUP:
        raise EngineError(
            f"kv_dtype 'fp8' packs {GROUP} latents at a time, and this model's `kv_lora_rank` is {config.kv_lora_rank}."
            " Use 'bf16'."
        )
    have = torch.cuda.get_device_capability(device) if capability is None else capability
    if have < _PACKED:
        raise EngineError(
            f"kv_dtype 'fp8' needs compute capability {_PACKED[0]}.{_PACKED[1]} (H100) or later; this CUDA device has"
            f" {have[0]}.{have[1]}. Use 'bf16'."
        )


def narrowed(config: ModelConfig, context: int | None) -> ModelConfig:
    """The model with a window of `context` tokens. Raises `EngineError` when it has no such window."""
    if context is None:
        return config
    if not 1 <= context <= config.max_position_embeddings:
        raise EngineError(
            f"`context` is {context:,}; this model's is from 1 to {config.max_position_embeddings:,} tokens."
        )
    return replace(config, max_position_embeddings=context)


def cache_size(asked: int | None, config: ModelConfig, dtype: torch.dtype) -> int:
    """Tokens that the KV cache holds on the CPU: `asked`, or as many as suit. Raises `EngineError` for less than one."""
    _check_asked(asked)
    if asked is not None:
        return asked
    window = config.max_position_embeddings
    return max(window, min(_WINDOWS * window, _free_memory() // _MEMORY_SHARE // cache_bytes(config, dtype)))


def plan_device(
    asked: int | None, config: ModelConfig, dtype: torch.dtype, device: torch.device, kv_dtype: KvDtype = "bf16"
) -> MemoryPlan | None:
    """How what is free of a CUDA device is used (`plan_memory`); None on the CPU."""
    _check_asked(asked)
    if device.type == "cpu":
        return None
    return plan_memory(config, dtype, torch.cuda.mem_get_info(device)[0], asked, kv_dtype)


def _check_asked(tokens: int | None) -> None:
    if tokens is not None and tokens < 1:
        raise EngineError(f"`cache_tokens` is {tokens}; it must be a number of tokens, at least 1.")


def plan_memory(
    config: ModelConfig, dtype: torch.dtype, free: int, cache_tokens: int | None = None, kv_dtype: KvDtype = "bf16"
) -> MemoryPlan:
    """How `free` bytes of a CUDA device are used: the cache takes what is left, up to 16 windows, or `cache_tokens`.

    Raises `EngineError` with what would fit: fewer tokens, or fewer layers.
    """
    weights, token = weight_bytes(config, dtype), cache_bytes(config, dtype, kv_dtype)
    workspace = _workspace(config, dtype)
    room = (free - weights - workspace) // token
    if room < 1:
        counts = range(config.num_hidden_layers - 1, 0, -1)
        layers = next((n for n in counts if _fits(config, n, dtype, free, kv_dtype)), 0)
        fitting = f"its first {layers} layers would fit (`layers=range({layers})`)" if layers else "nor would one layer"
        raise EngineError(
            f"The model takes {_gb(weights)} and its steps {_gb(workspace)}, and {_gb(free)} of the device are free:"
            f" {fitting}. Use a larger device, or the CPU."
        )
    wanted = min(room, _WINDOWS * config.max_position_embeddings) if cache_tokens is None else cache_tokens
    if wanted > room:
        raise EngineError(
            f"A cache of {wanted:,} tokens takes {_gb(wanted * token)}; beside the model {room:,} tokens fit."
            f" Ask for no more (`cache_tokens`, `--context`)."
        )
    rows = ROW_NAMES[row_format(config, dtype, kv_dtype)[1]]
    return MemoryPlan(
        free=free, weights=weights, workspace=workspace, cache=wanted * token, cache_tokens=wanted, kv_dtype=rows
    )


def _fits(config: ModelConfig, layers: int, dtype: torch.dtype, free: int, kv_dtype: KvDtype) -> bool:
    first = config.first_layer
    part = config.sliced(range(first, first + layers))
    needed = weight_bytes(part, dtype) + _workspace(part, dtype) + cache_bytes(part, dtype, kv_dtype)
    return needed <= free


def _workspace(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes for the largest step's logits, for reading a chunk of 2,048 tokens (keys and values of 4,096 written out, what
    goes into and out of the experts; one layer's rows of a whole window, side by side), and for what isn't ours."""
    c, chunk = config, 2048
    logits = _STEP_ROWS * c.vocab_size * (4 + dtype.itemsize)
    expanded = 2 * chunk * c.num_attention_heads * (c.qk_head_dim + c.v_head_dim)
    experts = chunk * max(1, c.num_experts_per_tok) * (3 * c.moe_intermediate_size + 2 * c.hidden_size)
    rotary = c.max_position_embeddings * c.qk_rope_head_dim * 4
    rows = (c.max_position_embeddings + chunk) * c.cache_width
    return _RESERVE + logits + (expanded + experts + rows) * dtype.itemsize + rotary


def _free_memory() -> int:
    """Bytes of memory that can be had without swapping; 4 GiB where the system doesn't say."""
    try:
        with Path("/proc/meminfo").open(encoding="ascii") as file:
            fields = dict(line.split(":", 1) for line in file)
        return int(fields["MemAvailable"].split()[0]) << 10
    except (OSError, KeyError, ValueError):
        return 4 << 30


def _gb(size: int) -> str:
    return f"{math.ceil(size / 1e7) / 100:,.2f} GB"
