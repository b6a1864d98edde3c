"""A model's steps by the Triton kernels: of a few tokens a sequence in fixed sizes, on CUDA as captured graphs (one launch
instead of some hundreds), and of long pieces as they come.

A step of B sequences with up to T tokens each runs as the next larger size that there is. Padding tokens have no slot, so
that they write nothing; they stand behind a sequence's own tokens, which can't see them (though they multiply what lies
there by zero: the pool's memory is set to zero at first, lest it be no number); padding sequences have no rows.
A graph also fixes into how many parts a sequence's rows are split. There is one for each of some lengths: the 132 parts of a
long one cost a short one 4 µs a layer. Captured at first use, all graphs share one pool of memory and one set of inputs. A
graph begins by fetching its inputs from pinned memory, so that a step costs the host some writes there and one launch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from thinkloop.engine.config import ModelConfig
from thinkloop.engine.kernel_model import Few, KernelModel, Piece, Places, decode_attention, reading_attention
from thinkloop.engine.kv_cache import BLOCK, LatentCache
from thinkloop.engine.weights import Weights
from thinkloop.kernels.mla_absorb import MAX_ROWS
from thinkloop.kernels.mla_decode import kv_splits
from thinkloop.kernels.target import chip
from torch import Tensor

BATCHES = (1, 2, 4, 8, 16, 32)
"""Sequences in a step. As many as the scheduler's largest batch."""
COUNTS = (1, 2, 4, 8)
"""Tokens of each: with drafts, as many as the attention kernel takes."""
MAX_COUNT = COUNTS[-1]
LENGTHS = (1 << 10, 1 << 12, 1 << 14, 1 << 16, 1 << 18)
"""Rows of the longest sequence of a step."""


@dataclass(frozen=True, slots=True)
class Size:
    """The shape of a step: sequences, tokens of each, and rows of the longest."""

    batch: int
    count: int
    length: int

    @property
    def tokens(self) -> int:
        return self.batch * self.count

    @property
    def inputs(self) -> int:
        """Numbers that a step is told: id, position and slot of each token, length of each sequence."""
        return 3 * self.tokens + self.batch

    @classmethod
    def of(cls, batch: int, count: int, length: int) -> Size:
        """The smallest size that takes `batch` sequences of up to `count` tokens and `length` rows with them. Raises
        `ValueError` when none does."""
        fitting = [(b, t) for b in BATCHES if b >= batch for t in COUNTS if t >= count]
        if not fitting:
            raise ValueError(
                f"{batch} sequences of {count} tokens are more than a step takes: {BATCHES[-1]} of {MAX_COUNT}."
            )
        return cls(*fitting[0], next((most for most in LENGTHS if most >= length), 1 << (length - 1).bit_length()))


Part = tuple[LatentCache, Sequence[int]]
"""A sequence's cache and the next tokens of it."""


class KernelSteps:
    """Runs steps over the sequences of one pool: the first one's. `turn` is the rotary table `[window, R/2]`. Room is
    reserved and lengths are moved by the caller."""

    def __init__(self, config: ModelConfig, weights: Weights, turn: Tensor) -> None:
        self._config, self._weights, self._turn = config, weights, turn
        self._model, self._device = KernelModel(config, weights), weights.device
        self._captures = self._device.type == "cuda"
        most = Size(BATCHES[-1], COUNTS[-1], LENGTHS[-1])
        width = -(-(config.max_position_embeddings + MAX_COUNT) // BLOCK)
        self._inputs = torch.zeros(most.inputs, dtype=torch.int32, device=self._device)
        self._written = torch.zeros(most.inputs, dtype=torch.int32, pin_memory=self._captures)
        self._table = torch.zeros(most.batch, width, dtype=torch.int32, device=self._device)
        self._tabled: list[list[int]] = [[] for _ in range(most.batch)]
        """The blocks that each row of the table begins with."""
        self._logits = torch.empty(most.tokens, config.vocab_size, device=self._device)
        """Where every step leaves them: outputs of their own would be memory that graphs can't share."""
        self._graphs: dict[Size, torch.cuda.CUDAGraph] = {}
        self._memory = torch.cuda.graph_pool_handle() if self._captures else None
        self._replayed = torch.cuda.Event() if self._captures else None  # type: ignore[no-untyped-call]

    @staticmethod
    def few(counts: Sequence[int]) -> set[int]:
        """Which of sequences with so many tokens each `decode` takes."""
        return set([index for index, count in enumerate(counts) if count <= MAX_COUNT][: BATCHES[-1]])

    def decode(self, parts: Sequence[Part]) -> list[Tensor]:
        """Computes up to `MAX_COUNT` tokens of each sequence: float32 logits `[count, V]` after each."""
        count = max(len(ids) for _, ids in parts)
        size = Size.of(len(parts), count, max(cache.length for cache, _ in parts) + MAX_COUNT)
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
        """Writes the step's inputs to where the graphs fetch them, and sends what is new of the table."""
        if self._replayed is not None:
            self._replayed.synchronize()  # the last step has fetched its own
        tokens, inputs = size.tokens, self._written.numpy()
        inputs[: 2 * tokens] = inputs[3 * tokens : size.inputs] = 0
        inputs[2 * tokens : 3 * tokens] = -1
        for index, (cache, ids) in enumerate(parts):
            first, start, count = index * size.count, cache.length, len(ids)
            inputs[first : first + count] = ids
            inputs[tokens + first : tokens + first + count] = range(start, start + count)
            inputs[2 * tokens + first : 2 * tokens + first + count] = cache.slots(start, start + count)
            inputs[3 * tokens + index] = start + size.count  # as if the padding had rows: no token sees past its own
            if self._tabled[index] != cache.blocks:
                self._tabled[index] = list(cache.blocks)
                blocks = torch.tensor(cache.blocks, dtype=torch.int32)
                self._table[index, : len(blocks)].copy_(
                    blocks.pin_memory() if self._captures else blocks, non_blocking=True
                )

    def _compute(self, size: Size, layers: Sequence[Tensor]) -> Tensor:
        """The whole step, from fetching its inputs: float32 logits `[B·T, V]`."""
        inputs = self._inputs[: size.inputs]
        inputs.copy_(self._written[: size.inputs], non_blocking=True)
        places = Places(*inputs[: 3 * size.tokens].view(3, -1))
        table, lengths = self._table[: size.batch], inputs[3 * size.tokens :]
        sms = chip(self._device).sms
        splits = kv_splits(size.batch, self._config.num_attention_heads, size.count, size.length, sms)
        if size.tokens <= MAX_ROWS:
            logits = self._model.decode(Few(places, self._turn, table, lengths, splits), layers)
        else:
            attend = decode_attention(self._config, table, lengths, splits)
            logits = self._model.forward(places, layers, self._turn, attend) @ self._weights.head
        return self._logits[: size.tokens].copy_(logits)

    def _replay(self, size: Size, layers: Sequence[Tensor]) -> Tensor:
        if size not in self._graphs:
            self._graphs[size] = self._capture(size, layers)
        self._graphs[size].replay()
        assert self._replayed is not None
        self._replayed.record()
        return self._logits[: size.tokens]

    def _capture(self, size: Size, layers: Sequence[Tensor]) -> torch.cuda.CUDAGraph:
        """Two runs beforehand compile the kernels and let the libraries take their workspaces."""
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._compute(size, layers)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._memory):
            self._compute(size, layers)
        return graph
