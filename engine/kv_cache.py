"""The latent KV cache, in blocks that sessions share.

Per layer and token the cache holds one row: the normed latent and the rotated shared key (576 values for Kimi-K2, 70,272
bytes a token over its layers in bfloat16; reference 2.4), or the same packed into 8 bits (`kernels.kv_rows`; 40,016 bytes).
All sessions' rows lie in one pool, in blocks of 64 tokens with reference counts: a fork shares every full block and copies
at most one begun block when either side writes on; sessions with the same prefix find its blocks by hash. A sequence's next
block is taken right behind its last one where that is free, so that its rows are few contiguous spans (mostly one) and
attention on the CPU reads them in place.

Used by one thread only, the engine's; `LatentCache.__del__` alone may run elsewhere.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict, deque
from collections.abc import Sequence
from hashlib import blake2b

import numpy as np
import torch
from thinkloop.engine.config import ModelConfig
from thinkloop.kernels.kv_rows import KvDtype, row_bytes
from thinkloop.traces.events import ThinkloopError
from torch import Tensor

BLOCK = 64
"""Tokens a block: K2's are 4.5 MB over all layers, and a shared prefix is found in steps of this size."""


class CacheFull(ThinkloopError):
    """Every block of the KV cache is held by a live session."""


def row_format(config: ModelConfig, dtype: torch.dtype, kv_dtype: KvDtype) -> tuple[int, torch.dtype]:
    """How many elements a row has, and of what type: the values in `dtype`, or bytes of a packed row."""
    if kv_dtype == "fp8":
        return row_bytes(config.kv_lora_rank, config.qk_rope_head_dim), torch.uint8
    return config.cache_width, dtype


class BlockPool:
    """`rows [layers, blocks · BLOCK, width]`, who holds which block, and what unheld blocks still contain. Rows are of
    `dtype`, or with `kv_dtype` "fp8" packed ones, as uint8.

    On the CPU the memory is only taken from the system as rows are written.
    """

    def __init__(
        self, config: ModelConfig, tokens: int, dtype: torch.dtype, device: torch.device, kv_dtype: KvDtype = "bf16"
    ) -> None:
        count = max(1, -(-tokens // BLOCK))
        make = torch.empty if device.type == "cpu" else torch.zeros  # see `kernel_steps` for the zeros
        width, dtype = row_format(config, dtype, kv_dtype)
        self.rows = make(config.num_hidden_layers, count * BLOCK, width, dtype=dtype, device=device)
        self.layers = list(self.rows)
        self.references = [0] * count
        self.abandoned: deque[list[int]] = deque()
        """Blocks of caches that went out of use without a release: given back at the next `take`."""
        self._free = np.ones(count, dtype=bool)
        self._digest: list[bytes | None] = [None] * count
        self._known: dict[bytes, int] = {}
        self._unheld: OrderedDict[int, None] = OrderedDict()  # known content, nobody's; least recently used first

    @property
    def tokens(self) -> int:
        """How many tokens the pool holds at most."""
        return self.rows.shape[1]

    @property
    def available(self) -> int:
        """Tokens that no live session holds."""
        self._collect()
        return (int(self._free.sum()) + len(self._unheld)) * BLOCK

    def take(self, after: int | None) -> int:
        """A block nobody holds, right behind block `after` where that is free. Raises `CacheFull`."""
        self._collect()
        following = None if after is None else after + 1
        if following is not None and following < len(self._free) and self._free[following]:
            block = following
        else:
            block = self._elsewhere()
        self._free[block] = False
        self.references[block] = 1
        return block

    def _elsewhere(self) -> int:
        """The middle of the longest free stretch, so that two sequences can both grow; failing that, the block whose
        content has gone unused for longest."""
        edges = np.diff(self._free.astype(np.int8), prepend=0, append=0)
        starts, ends = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
        if len(starts):
            longest = int((ends - starts).argmax())
            start, end = int(starts[longest]), int(ends[longest])
            return start if start == 0 else (start + end) // 2
        if not self._unheld:
            raise CacheFull(
                f"All {self.tokens:,} tokens of the KV cache are held by live sessions. Close some, or load the model"
                " with a larger `cache_tokens`."
            )
        block, _ = self._unheld.popitem(last=False)
        self.forget(block)
        return block

    def hold(self, block: int) -> None:
        """One more holder."""
        self._unheld.pop(block, None)
        self.references[block] += 1

    def drop(self, block: int) -> None:
        """One holder less; without any, known content stays until the room is needed."""
        self.references[block] -= 1
        if self.references[block] == 0:
            if self._digest[block] is None:
                self._free[block] = True
            else:
                self._unheld[block] = None

    def know(self, block: int, digest: bytes) -> None:
        """Makes a full block findable. Of two with the same content the first stays the known one."""
        if digest not in self._known and self._digest[block] is None:
            self._known[digest], self._digest[block] = block, digest

    def forget(self, block: int) -> None:
        """Its content is about to change."""
        digest, self._digest[block] = self._digest[block], None
        if digest is not None:
            del self._known[digest]

    def find(self, digest: bytes) -> int | None:
        """The block with this content, if any."""
        return self._known.get(digest)

    def _collect(self) -> None:
        while self.abandoned:
            for block in reversed(self.abandoned.popleft()):  # as `_cut` does: the last ones are worth least
                self.drop(block)


class LatentCache:
    """One sequence's blocks. Rows below `length` are valid in every layer."""

    def __init__(self, pool: BlockPool) -> None:
        self.pool = pool
        self.length = 0
        self.blocks: list[int] = []
        self._runs: list[list[int]] = []  # [first block, how many follow each other]
        self._digests: list[bytes] = []
        self._private = False
        """Rows came from outside: nobody can tell whether they belong to the tokens, so no other sequence finds them."""

    def __del__(self) -> None:
        if self.blocks:
            self.pool.abandoned.append(self.blocks)

    def reserve(self, length: int) -> None:
        """Makes rows `self.length` to `length - 1` writable: own blocks, nobody else's. Raises `CacheFull` and changes
        nothing when there is no room."""
        self._own_last()
        before = len(self.blocks)
        try:
            while len(self.blocks) * BLOCK < length:
                self._push(self.pool.take(self.blocks[-1] if self.blocks else None))
        except CacheFull:
            self._cut(before)
            raise

    def _own_last(self) -> None:
        """Copies the begun block if another sequence holds it too."""
        index, used = divmod(self.length, BLOCK)
        if not used:
            return
        old, pool = self.blocks[index], self.pool
        if pool.references[old] == 1:
            pool.forget(old)
            return
        new = pool.take(self.blocks[index - 1] if index else None)
        pool.rows[:, new * BLOCK : new * BLOCK + used] = pool.rows[:, old * BLOCK : old * BLOCK + used]
        self._cut(index)
        self._push(new)

    def _push(self, block: int) -> None:
        self.blocks.append(block)
        if self._runs and sum(self._runs[-1]) == block:
            self._runs[-1][1] += 1
        else:
            self._runs.append([block, 1])

    def _cut(self, count: int) -> None:
        """Keeps the first `count` blocks."""
        while len(self.blocks) > count:
            self.pool.drop(self.blocks.pop())
            self._runs[-1][1] -= 1
            if not self._runs[-1][1]:
                self._runs.pop()

    def spans(self, length: int) -> list[tuple[int, int]]:
        """Where the first `length` rows lie in the pool: `(start, stop)` slots, in order."""
        spans, left = [], length
        for first, count in self._runs:
            rows = min(left, count * BLOCK)
            if rows <= 0:
                break
            spans.append((first * BLOCK, first * BLOCK + rows))
            left -= rows
        return spans

    def slots(self, start: int, end: int) -> list[int]:
        """The pool's slots of rows `start` to `end - 1`."""
        blocks = self.blocks
        return [blocks[row // BLOCK] * BLOCK + row % BLOCK for row in range(start, end)]

    def truncate(self, length: int) -> None:
        """Forgets rows from `length` on; never lengthens."""
        self.length = min(self.length, length)
        self._cut(-(-self.length // BLOCK))
        del self._digests[self.length // BLOCK :]
        self._private = self._private and self.length > 0

    def fork(self) -> LatentCache:
        """Another sequence with the same rows: shares every block, copies none."""
        twin = LatentCache(self.pool)
        twin.length, twin._digests, twin._private = self.length, list(self._digests), self._private
        for block in self.blocks[: -(-self.length // BLOCK)]:
            self.pool.hold(block)
            twin._push(block)
        return twin

    @property
    def published(self) -> int:
        """How many of the first rows other sequences can find: a whole number of blocks."""
        return len(self._digests) * BLOCK

    def publish(self, tokens: Sequence[int]) -> None:
        """Lets other sequences find the full blocks among the valid rows from `published` on; `tokens` are theirs. Not after
        `restore`."""
        if self._private:
            return
        first = self.published
        for at in range(0, min(self.length - first, len(tokens)) // BLOCK * BLOCK, BLOCK):
            digest = self._chained(tokens[at : at + BLOCK])
            self.pool.know(self.blocks[len(self._digests)], digest)
            self._digests.append(digest)

    def adopt(self, tokens: Sequence[int]) -> int:
        """Publishes, then takes over known blocks that hold the next rows of `tokens` (those from `published` on),
        leaving at least one token to compute. Returns how many rows came."""
        before, first = self.length, self.published
        self.publish(tokens)
        while self.length == self.published and self.length - first + BLOCK < len(tokens):
            at = self.length - first
            digest = self._chained(tokens[at : at + BLOCK])
            block = self.pool.find(digest)
            if block is None:
                break
            self.pool.hold(block)
            self._cut(len(self._digests))
            self._push(block)
            self._digests.append(digest)
            self.length += BLOCK
        return self.length - before

    def _chained(self, tokens: Sequence[int]) -> bytes:
        """Names the next block by its tokens and all before them."""
        before = self._digests[-1] if self._digests else b""
        return blake2b(before + array("q", tokens).tobytes(), digest_size=16).digest()

    def rows(self) -> Tensor:
        """The valid rows, copied: `[layers, length, width]`."""
        spans = self.spans(self.length)
        parts = [self.pool.rows[:, start:stop] for start, stop in spans]
        return torch.cat(parts, dim=1) if parts else self.pool.rows[:, :0]

    def restore(self, rows: Tensor) -> None:
        """Takes over `rows [layers, n, width]` as its whole content, which other sequences won't find. Raises `CacheFull`."""
        self.release()
        self.reserve(rows.shape[1])
        at = 0
        for start, stop in self.spans(rows.shape[1]):
            self.pool.rows[:, start:stop] = rows[:, at : at + stop - start]
            at += stop - start
        self.length, self._private = rows.shape[1], rows.shape[1] > 0

    def take_over(self, other: LatentCache) -> None:
        """Becomes the holder of `other`'s blocks instead of its own; `other` is empty then."""
        self.release()
        self.length, self.blocks, self._runs, self._digests = other.length, other.blocks, other._runs, other._digests
        self._private = other._private
        other.length, other.blocks, other._runs, other._digests, other._private = 0, [], [], [], False

    def release(self) -> None:
        """Gives its blocks back."""
        self.length, self._private = 0, False
        self._cut(0)
        self._digests.clear()
