"""A model's steps by the Triton kernels: of a few tokens a sequence in fixed sizes, on CUDA as captured graphs (one launch
instead of some hundreds), and of long pieces as they come.

A step of B sequences with up to T tokens each runs as the next larger size that there is. Padding tokens have no slot, so
that they write nothing; they stand behind a sequence's own tokens, which can't see them (though they multiply what lies
there by zero: the pool's memory is set to zero at first, lest it be no number); padding sequences have no rows.
Captured at first use, all graphs share one pool of memory and one set of inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from thinkloop.engine.config import ModelConfig
from thinkloop.engine.kernel_model import KernelModel, Piece, Places, decode_attention, reading_attention
from thinkloop.engine.kv_cache import BLOCK, LatentCache
from thinkloop.engine.weights import Weights
from torch import Tensor

BATCHES = (1, 2, 4, 8, 16, 32)
"""Sequences in a step. As many as the scheduler's largest batch."""
COUNTS = (1, 2, 4, 8)
"""Tokens of each: with drafts, as many as the attention kernel takes."""
MAX_COUNT = COUNTS[-1]


@dataclass(frozen=True, slots=True)
class Size:
    """The shape of a step."""

    batch: int
    count: int

    @property
    def tokens(self) -> int:
        return self.batch * self.count

    @classmethod
    def of(cls, batch: int, count: int) -> Size:
        """The smallest size that takes `batch` sequences of up to `count` tokens. Raises `ValueError` when none does."""
        fitting = [(b, t) for b in BATCHES if b >= batch for t in COUNTS if t >= count]
        if not fitting:
            raise ValueError(
                f"{batch} sequences of {count} tokens are more than a step takes: {BATCHES[-1]} of {MAX_COUNT}."
            )
        return cls(*fitting[0])


Part = tuple[LatentCache, Sequence[int]]
"""A sequence's cache and the next tokens of it."""


class KernelSteps:
    """Runs steps over the sequences of one pool: the first one's. `turn` is the rotary table `[window, R/2]`. Room is
    reserved and lengths are moved by the caller."""

    def __init__(self, config: ModelConfig, weights: Weights, turn: Tensor) -> None:
        self._config, self._weights, self._turn = config, weights, turn
        self._model, self._device = KernelModel(config, weights), weights.device
        self._captures = self._device.type == "cuda"
        most = Size(BATCHES[-1], COUNTS[-1])
        width = -(-(config.max_position_embeddings + MAX_COUNT) // BLOCK)
        self._places = torch.zeros(3, most.tokens, dtype=torch.int64, device=self._device)
        self._lengths = torch.zeros(most.batch, dtype=torch.int32, device=self._device)
        self._table = torch.zeros(most.batch, width, dtype=torch.int32, device=self._device)
        self._graphs: dict[Size, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._memory = torch.cuda.graph_pool_handle() if self._captures else None

    @staticmethod
    def few(counts: Sequence[int]) -> set[int]:
        """Which of sequences with so many tokens each `decode` takes."""
        return set([index for index, count in enumerate(counts) if count <= MAX_COUNT][: BATCHES[-1]])

    def decode(self, parts: Sequence[Part]) -> list[Tensor]:
        """Computes up to `MAX_COUNT` tokens of each sequence: float32 logits `[count, V]` after each."""
        size = Size.of(len(parts), max(len(ids) for _, ids in parts))
        layers = parts[0][0].pool.layers
        self._fill(size, parts)
        logits = self._replay(size, layers) if self._captures else self._compute(size, layers)
        rows = torch.unflatten(logits, 0, (size.batch, size.count))
        return [rows[index, : len(ids)] for index, (_, ids) in enumerate(parts)]

    def read(self, parts: Sequence[Part]) -> Tensor:
        """Computes any number of tokens of each sequence: the last layer's normed output `[n, D]` for all of them."""
        ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        pieces = []
        for cache, own in parts:
            start, end, first = cache.length, cache.length + len(own), len(ids)
            ids += own
            positions += range(start, end)
            slots += cache.slots(start, end)
            table = torch.tensor(cache.blocks, dtype=torch.int32, device=self._device)
            pieces.append(Piece(first, len(ids), end, cache.spans(end), table))
        places = Places(*torch.tensor([ids, positions, slots], device=self._device))
        attend = reading_attention(self._config, pieces)
        return self._model.forward(places, parts[0][0].pool.layers, self._turn, attend)

    def _fill(self, size: Size, parts: Sequence[Part]) -> None:
        """Sends the step's inputs to where the graphs read them."""
        places = torch.zeros(3, size.tokens, dtype=torch.int64)
        places[2] = -1
        lengths = torch.zeros(size.batch, dtype=torch.int32)
        table = torch.zeros(len(parts), max(len(cache.blocks) for cache, _ in parts), dtype=torch.int32)
        for index, (cache, ids) in enumerate(parts):
            start, count = cache.length, len(ids)
            own = [list(ids), list(range(start, start + count)), cache.slots(start, start + count)]
            places[:, index * size.count : index * size.count + count] = torch.tensor(own)
            lengths[index] = start + size.count  # as if the padding had rows: no token sees past its own
            table[index, : len(cache.blocks)] = torch.tensor(cache.blocks, dtype=torch.int32)
        self._send(places, self._places[:, : size.tokens])
        self._send(lengths, self._lengths[: size.batch])
        self._send(table, self._table[: table.shape[0], : table.shape[1]])

    def _send(self, source: Tensor, place: Tensor) -> None:
        place.copy_(source.pin_memory() if self._captures else source, non_blocking=True)

    def _compute(self, size: Size, layers: Sequence[Tensor]) -> Tensor:
        places = Places(*self._places[:, : size.tokens])
        attend = decode_attention(self._config, self._table[: size.batch], self._lengths[: size.batch])
        return (self._model.forward(places, layers, self._turn, attend) @ self._weights.head).float()

    def _replay(self, size: Size, layers: Sequence[Tensor]) -> Tensor:
        if size not in self._graphs:
            self._graphs[size] = self._capture(size, layers)
        graph, logits = self._graphs[size]
        graph.replay()
        return logits.clone()  # the next step writes over the graph's own

    def _capture(self, size: Size, layers: Sequence[Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """Two runs beforehand compile the kernels and let the libraries take their workspaces."""
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._compute(size, layers)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._memory):
            logits = self._compute(size, layers)
        return graph, logits
