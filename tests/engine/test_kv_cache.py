"""Blocks are shared, copied when written and given back; rows are what was written, whoever else is about."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from thinkloop.engine.kv_cache import BLOCK, BlockPool, CacheFull, LatentCache
from torch import Tensor


@dataclass
class Shape:
    """What a pool reads of a configuration."""

    num_hidden_layers: int = 2
    cache_width: int = 3


def make_pool(blocks: int) -> BlockPool:
    return BlockPool(Shape(), blocks * BLOCK, torch.float32, torch.device("cpu"))  # type: ignore[arg-type]


def write(cache: LatentCache, values: list[int]) -> None:
    """Puts one row for each value behind the cache's rows, as the forward pass does."""
    end = cache.length + len(values)
    cache.reserve(end)
    slots = torch.tensor(cache.slots(cache.length, end))
    rows = torch.tensor(values, dtype=torch.float32)[:, None].expand(-1, 3)
    for layer in cache.pool.layers:
        layer.index_copy_(0, slots, rows)
    cache.length = end


def written(cache: LatentCache) -> list[int]:
    rows: Tensor = cache.rows()
    assert torch.equal(rows, rows[:1, :, :1].expand_as(rows))
    return [int(value) for value in rows[0, :, 0]]


def test_a_fork_shares_full_blocks_and_copies_only_the_begun_one() -> None:
    pool = make_pool(8)
    parent = LatentCache(pool)
    write(parent, list(range(2 * BLOCK + 10)))
    twin = parent.fork()
    assert pool.available == 5 * BLOCK
    write(twin, [7])
    write(parent, [8])
    assert pool.available == 4 * BLOCK
    assert twin.blocks[:2] == parent.blocks[:2]
    assert twin.blocks[2] != parent.blocks[2]
    assert written(twin) == [*range(2 * BLOCK + 10), 7]
    assert written(parent) == [*range(2 * BLOCK + 10), 8]


def test_a_fork_outlives_its_parent() -> None:
    pool = make_pool(4)
    parent = LatentCache(pool)
    write(parent, list(range(BLOCK + 1)))
    twin = parent.fork()
    parent.release()
    assert written(twin) == list(range(BLOCK + 1))
    twin.release()
    assert pool.available == pool.tokens
    assert not any(pool.references)


def test_sequences_that_grow_in_turn_stay_in_one_piece_each() -> None:
    pool = make_pool(64)
    caches = [LatentCache(pool) for _ in range(4)]
    for turn in range(8):
        for cache in caches:
            write(cache, [turn] * BLOCK)
    assert [len(cache.spans(cache.length)) for cache in caches] == [1, 1, 1, 1]


def test_a_full_pool_refuses_and_changes_nothing() -> None:
    pool = make_pool(3)
    first, second = LatentCache(pool), LatentCache(pool)
    write(first, [1] * (2 * BLOCK))
    write(second, [2] * 10)
    with pytest.raises(CacheFull, match=r"192 tokens.*cache_tokens"):
        write(second, [3] * BLOCK)
    assert written(second) == [2] * 10
    first.release()
    write(second, [3] * BLOCK)
    assert written(second) == [2] * 10 + [3] * BLOCK


def test_a_known_prefix_is_found_while_held_and_after_until_the_room_is_needed() -> None:
    pool = make_pool(4)
    tokens = list(range(3 * BLOCK))
    first = LatentCache(pool)
    write(first, tokens)
    first.publish(tokens)
    second = LatentCache(pool)
    assert second.adopt([*tokens[: 2 * BLOCK], 9, 9, 9]) == 2 * BLOCK
    assert written(second) == tokens[: 2 * BLOCK]
    first.release()
    second.release()
    assert pool.available == pool.tokens
    third = LatentCache(pool)
    assert third.adopt([*tokens, 5]) == 3 * BLOCK
    third.release()
    other = LatentCache(pool)
    write(other, [4] * (2 * BLOCK))  # one free block, then the last of the prefix: its beginning is worth more
    assert LatentCache(pool).adopt([*tokens, 5]) == 2 * BLOCK
    write(other, [4] * BLOCK)
    assert LatentCache(pool).adopt([*tokens, 5]) == BLOCK
    assert written(other) == [4] * (3 * BLOCK)


def test_the_same_block_behind_another_prefix_is_another_block() -> None:
    pool = make_pool(6)
    first = LatentCache(pool)
    tokens = [1] * BLOCK + [2] * BLOCK
    write(first, tokens)
    first.publish(tokens)
    second = LatentCache(pool)
    assert second.adopt([3] * BLOCK + [2] * BLOCK + [1]) == 0


def test_at_least_one_token_is_left_to_compute() -> None:
    pool = make_pool(4)
    first = LatentCache(pool)
    write(first, [1] * (2 * BLOCK))
    first.publish([1] * (2 * BLOCK))
    assert LatentCache(pool).adopt([1] * (2 * BLOCK)) == BLOCK


def test_what_is_written_after_a_truncation_is_not_found_under_the_old_name() -> None:
    pool = make_pool(4)
    first = LatentCache(pool)
    write(first, [1] * BLOCK)
    first.publish([1] * BLOCK)
    first.truncate(BLOCK - 1)
    write(first, [2])
    assert LatentCache(pool).adopt([1] * BLOCK + [1]) == 0


def test_a_cache_nobody_refers_to_gives_its_blocks_back() -> None:
    pool = make_pool(2)
    cache = LatentCache(pool)
    write(cache, [1] * (2 * BLOCK))
    del cache
    write(LatentCache(pool), [1] * (2 * BLOCK))


def test_rows_come_back_from_a_copy() -> None:
    pool = make_pool(8)
    cache, other = LatentCache(pool), LatentCache(pool)
    write(cache, list(range(BLOCK)))
    write(other, [0] * BLOCK)  # so that the next blocks lie apart
    write(cache, list(range(BLOCK)))
    again = LatentCache(pool)
    again.restore(cache.rows().clone())
    assert written(again) == written(cache) == [*range(BLOCK)] * 2
