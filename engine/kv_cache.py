"""The latent KV cache: per layer and token, the normed latent and the rotated shared key, side by side."""

from __future__ import annotations

import torch
from thinkloop.engine.config import ModelConfig
from torch import Tensor

_FIRST_CAPACITY = 256


class LatentCache:
    """A growable block `[layers, capacity, kv_lora + rope]`. Rows below `length` are valid in every layer.

    70,272 bytes a token for Kimi-K2 in bfloat16 (reference 2.4).
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        self.limit = config.max_position_embeddings
        self.length = 0
        self.layers: list[Tensor] = []
        self._make(min(_FIRST_CAPACITY, self.limit), config.num_hidden_layers, config.cache_width, dtype, device)

    def _make(self, capacity: int, layers: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        self.block = torch.empty(layers, capacity, width, dtype=dtype, device=device)
        self.layers = list(self.block)

    @property
    def capacity(self) -> int:
        return self.block.shape[1]

    def reserve(self, length: int) -> None:
        """Makes room for `length` rows: doubles, so that growth costs amortised constant time per token."""
        if length <= self.capacity:
            return
        old = self.block
        layers, capacity, width = old.shape
        self._make(min(max(length, 2 * capacity), max(self.limit, length)), layers, width, old.dtype, old.device)
        self.block[:, : self.length] = old[:, : self.length]

    def truncate(self, length: int) -> None:
        """Forgets rows from `length` on; never lengthens."""
        self.length = min(self.length, length)

    def rows(self) -> Tensor:
        """The valid rows, `[layers, length, width]`."""
        return self.block[:, : self.length]

    def restore(self, rows: Tensor) -> None:
        """Takes over `rows [layers, n, width]` as its whole content."""
        self.length = 0
        self.reserve(rows.shape[1])
        self.block[:, : rows.shape[1]] = rows
        self.length = rows.shape[1]

    def release(self) -> None:
        """Gives the memory back; what was kept is lost."""
        self.length = 0
        self._make(0, self.block.shape[0], self.block.shape[2], self.block.dtype, self.block.device)
