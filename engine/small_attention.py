"""Attention of a few rows over each of several caches, on the CPU in float32: sequences of like length as one.

A product of one row's heads with one cache is too small for two threads (they take longer together than one alone: 106 µs
a sequence and layer behind 320 rows, against 60), and reading 200 KB of cache that way reaches 7 GB/s. Copied together
first, which two threads do at their full speed, eight sequences of 320 rows take 194 µs a layer instead of 478, of 3,000
rows 1.7 ms instead of 4.0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_LIKE = 0.6
"""Of the longest sequence's rows, how many another one must have at least: the rest is padding."""
_FEW = 16
"""New rows up to which a sequence goes together with others."""


class Rows(NamedTuple):
    """Where one sequence's rows of a step lie: `first` to `last - 1` of the step, at the end of `spans` of the cache."""

    first: int
    last: int
    spans: list[tuple[int, int]]

    @property
    def length(self) -> int:
        """Rows of the cache, new ones included."""
        return sum(stop - start for start, stop in self.spans)


class Together:
    """Several sequences of a step, padded to the longest and to the most new rows. Made once for all layers."""

    def __init__(self, members: Sequence[Rows], heads: int) -> None:
        self._heads, self._batch = heads, len(members)
        lengths = [rows.length for rows in members]
        most, longest = max(rows.last - rows.first for rows in members), max(lengths)
        slots = torch.tensor([[rows.spans[0][0]] for rows in members]).expand(-1, longest).clone()  # padding: any row
        own, seen = [], []
        for place, rows, length in zip(slots, members, lengths, strict=True):
            place[:length] = torch.cat([torch.arange(start, stop) for start, stop in rows.spans])
            count = rows.last - rows.first
            at = [min(index, count - 1) for index in range(most)]  # padding repeats the last row, and so its result
            own += [rows.first + index for index in at]
            seen.append([length - count + index + 1 for index in at])
        self._slots, self._own = slots.flatten(), torch.tensor(own)
        hidden = torch.arange(longest) >= torch.tensor(seen)[..., None]  # [B, t, S]
        self._mask = torch.zeros(hidden.shape).masked_fill_(hidden, float("-inf"))[:, :, None]

    def mix(self, held: Tensor, queries: Tensor, mixed: Tensor, scratch: Scratch) -> None:
        """Softmax over each sequence's rows of `held [slots, C+R]` and the mean of their latents by it, for each head of its
        rows: scaled `queries [n, H·(C+R)]` -> `mixed [n, H·C]`."""
        batch, width = self._batch, held.shape[1]
        latent = mixed.shape[1] // self._heads
        rows = torch.index_select(held, 0, self._slots, out=scratch.take(len(self._slots), width)).view(
            batch, -1, width
        )
        own = queries.index_select(0, self._own).view(batch, -1, width)  # [B, t·H, C+R]
        scores = torch.bmm(own, rows.transpose(1, 2))
        torch.unflatten(scores, 1, (-1, self._heads)).add_(self._mask)
        out = torch.bmm(scores.softmax(2), rows[:, :, :latent])  # [B, t·H, C]
        mixed.index_copy_(0, self._own, out.view(len(self._own), -1))


class Scratch:
    """Memory that is taken once and used again: fresh pages would cost as much as filling them."""

    def __init__(self) -> None:
        self._values = torch.empty(0)

    def take(self, rows: int, width: int) -> Tensor:
        """A tensor `[rows, width]` of any content, valid until the next call."""
        if rows * width > self._values.numel():
            self._values = torch.empty(rows * width)
        return self._values[: rows * width].view(rows, width)


def arrange(sequences: Sequence[Rows], heads: int) -> tuple[list[Together], list[Rows]]:
    """Which of a step's sequences go together, and which on their own."""
    groups: list[list[Rows]] = []
    alone = [rows for rows in sequences if rows.last - rows.first > _FEW]
    for rows in sorted(sequences, key=lambda rows: rows.length, reverse=True):
        if rows.last - rows.first > _FEW:
            continue
        if groups and rows.length >= _LIKE * groups[-1][0].length:
            groups[-1].append(rows)
        else:
            groups.append([rows])
    together = [Together(members, heads) for members in groups if len(members) > 1]
    return together, alone + [members[0] for members in groups if len(members) == 1]
