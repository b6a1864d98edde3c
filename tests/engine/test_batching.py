"""Sessions decode together, share what they have in common, and never notice each other in their tokens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import anyio
import pytest
import torch
from checkpoints import mini_config_json, write_checkpoint
from thinkloop.engine import scheduler
from thinkloop.engine.device import EngineError
from thinkloop.engine.engine import Engine
from thinkloop.engine.kv_cache import BLOCK, CacheFull
from thinkloop.engine.params import Sampling
from thinkloop.engine.scheduler import EngineBusy
from thinkloop.engine.session import Session, SessionError
from torch import Tensor

pytestmark = pytest.mark.anyio

GREEDY = Sampling(temperature=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(
        tmp_path_factory.mktemp("batching") / "model", mini_config_json(max_position_embeddings=2048)
    )


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[Engine]:
    with Engine.load(folder, prefill_chunk=64) as engine:
        yield engine


def prompt(number: int, length: int) -> list[int]:
    return [(number * 131 + 7 * index) % 3000 for index in range(length)]


async def take(session: Session, count: int, **options: object) -> list[int]:
    return [token async for token in session.generate(max_tokens=count, **options)]  # type: ignore[arg-type]  # passed on


async def alone(engine: Engine, ids: list[int], count: int, sampling: Sampling) -> list[int]:
    session = engine.session(sampling)
    await session.append(ids)
    tokens = await take(session, count)
    session.close()
    return tokens


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=0.9, top_p=0.95, seed=4)], ids=["greedy", "sampled"])
async def test_eight_together_give_the_tokens_of_each_alone(engine: Engine, sampling: Sampling) -> None:
    prompts = [prompt(number, 20 + 37 * number) for number in range(8)]
    expected = [await alone(engine, ids, 24, sampling) for ids in prompts]
    got: dict[int, list[int]] = {}

    async def run(number: int) -> None:
        session = engine.session(sampling)
        await session.append(prompts[number])
        await anyio.sleep(0.003 * number)  # they join and leave at different times
        got[number] = await take(session, 24)
        session.close()

    async with anyio.create_task_group() as group:
        for number in range(8):
            group.start_soon(run, number)
    assert [got[number] for number in range(8)] == expected


async def test_a_long_append_lets_the_others_decode_in_between(engine: Engine) -> None:
    reader, writer = engine.session(GREEDY), engine.session(GREEDY)
    await writer.append(prompt(1, 8))
    order: list[str] = []

    async def read() -> None:
        await reader.append(prompt(2, 1500))  # 24 chunks of 64
        order.append("read")

    async def write() -> None:
        async for _ in writer.generate(max_tokens=12):
            pass
        order.append("written")

    async with anyio.create_task_group() as group:
        group.start_soon(read)
        await anyio.sleep(0.01)
        group.start_soon(write)
    assert order == ["written", "read"]


async def test_sessions_that_begin_alike_share_without_asking(engine: Engine) -> None:
    ids = prompt(3, 4 * BLOCK + 5)
    first = engine.session(GREEDY)
    await first.append(ids)
    before, second = engine.pool.available, engine.session(GREEDY)
    await second.append(ids)
    assert (second.prefilled_tokens, second.reused_tokens) == (5, 4 * BLOCK)
    assert before - engine.pool.available == BLOCK
    assert await take(second, 8) == await take(first, 8)
    first.close()
    second.close()
    third = engine.session(GREEDY)  # found again though nobody holds it
    await third.append(ids[: 3 * BLOCK])
    assert third.reused_tokens == 2 * BLOCK
    third.close()


async def test_sharing_can_be_switched_off(folder: Path) -> None:
    with Engine.load(folder, share_prefixes=False) as engine:
        for _ in range(2):
            session = engine.session(GREEDY)
            await session.append(prompt(3, 3 * BLOCK))
            assert (session.prefilled_tokens, session.reused_tokens) == (3 * BLOCK, 0)


async def test_a_fork_computes_nothing_again(engine: Engine) -> None:
    session = engine.session(GREEDY)
    await session.append(prompt(5, 200))
    twin = session.fork()
    assert await take(twin, 6) == await take(session, 6)
    assert (twin.prefilled_tokens, twin.decoded_tokens) == (0, 5)
    session.close()
    twin.close()


async def test_speculation_changes_no_token_and_saves_passes(folder: Path) -> None:
    ids = prompt(6, 30) * 3
    for sampling in (GREEDY, Sampling(temperature=0.7, seed=9)):
        runs = []
        for speculate in (False, True):
            with Engine.load(folder, speculate=speculate) as engine:
                session = engine.session(sampling)
                await session.append(ids)
                stream = session.generate(max_tokens=200, constraint=Cycle())
                runs.append(([token async for token in stream], stream.stats))
        (plain, plain_stats), (fast, fast_stats) = runs
        assert plain == fast
        assert plain_stats.passes == 199
        assert 0 < fast_stats.accepted <= fast_stats.drafted
        assert fast_stats.passes == 199 - fast_stats.accepted


class Cycle:
    """Lets the model choose between two tokens, other ones at each of seven places: a text that repeats itself."""

    def __init__(self) -> None:
        self._place = 0
        self._masks = torch.zeros(7, 3000, dtype=torch.bool)
        for place in range(7):
            self._masks[place, 10 * place : 10 * place + 2] = True

    def mask(self) -> Tensor:
        return self._masks[self._place % 7]

    def accept(self, token: int) -> None:
        self._place += 1

    def forced(self) -> list[int]:
        return []


async def test_more_sessions_than_a_batch_takes_take_turns(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "MAX_BATCH", 2)
    prompts = [prompt(number, 12) for number in range(5)]
    expected = [await alone(engine, ids, 20, GREEDY) for ids in prompts]
    got: dict[int, list[int]] = {}

    async def run(number: int) -> None:
        session = engine.session(GREEDY)
        await session.append(prompts[number])
        got[number] = await take(session, 20)
        session.close()

    async with anyio.create_task_group() as group:
        for number in range(5):
            group.start_soon(run, number)
    assert [got[number] for number in range(5)] == expected


async def test_a_queue_that_is_full_refuses_and_the_rest_go_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "MAX_JOBS", 2)
    with Engine.load(folder, prefill_chunk=16) as engine:
        readers, late = [engine.session(GREEDY) for _ in range(2)], engine.session(GREEDY)
        async with anyio.create_task_group() as group:
            for number, session in enumerate(readers):
                group.start_soon(session.append, prompt(30 + number, 1900))  # 240 chunks in all: some 700 ms
            await anyio.sleep(0.02)
            with pytest.raises(EngineBusy, match="2 sessions"):
                await late.append(prompt(32, 10))
        assert [len(session) for session in readers] == [1900, 1900]
        await anyio.sleep(0.1)  # what has just ended has left by then
        await late.append(prompt(32, 10))


async def test_no_room_means_waiting_for_those_at_work_or_a_clear_refusal(folder: Path) -> None:
    with Engine.load(folder, cache_tokens=6 * BLOCK, cache_patience=0.5, share_prefixes=False) as engine:
        holder, other = engine.session(GREEDY), engine.session(GREEDY)
        await holder.append(prompt(1, 4 * BLOCK))
        with pytest.raises(CacheFull, match="cache_tokens"):
            await other.append(prompt(2, 3 * BLOCK))
        assert len(other) == 0
        async with anyio.create_task_group() as group:
            stream = holder.generate(max_tokens=40)
            group.start_soon(other.append, prompt(2, 3 * BLOCK))
            tokens = [token async for token in stream]
            holder.close()
        assert len(tokens) == 40
        assert len(other) == 3 * BLOCK
        expected = await take(other, 6)
    with Engine.load(folder) as roomy:
        assert await alone(roomy, prompt(2, 3 * BLOCK), 6, GREEDY) == expected


async def test_what_a_live_session_holds_outlasts_any_number_of_others(folder: Path) -> None:
    with Engine.load(folder, cache_tokens=8 * BLOCK) as engine:
        pinned = engine.session(GREEDY)
        await pinned.append(prompt(1, 3 * BLOCK))
        for number in range(2, 14):  # each fills the rest of the cache and leaves known blocks behind
            assert len(await alone(engine, prompt(number, 4 * BLOCK + 30), 5, GREEDY)) == 5
        await pinned.append(prompt(20, 5))
        tokens = await take(pinned, 6)
        assert pinned.prefilled_tokens == 3 * BLOCK + 5
        gone = engine.session(GREEDY)
        await gone.append(prompt(2, 4 * BLOCK))
        assert gone.reused_tokens == 0
    with Engine.load(folder) as roomy:
        assert tokens == await alone(roomy, prompt(1, 3 * BLOCK) + prompt(20, 5), 6, GREEDY)


async def test_a_session_without_room_for_its_next_token_says_so_and_the_rest_go_on(folder: Path) -> None:
    with Engine.load(folder, cache_tokens=2 * BLOCK, cache_patience=0.1, share_prefixes=False) as engine:
        first, second = engine.session(GREEDY), engine.session(GREEDY)
        await first.append(prompt(1, BLOCK))
        await second.append(prompt(2, BLOCK - 4))
        with pytest.raises(CacheFull):
            await take(first, 40)
        assert len(await take(second, 5)) == 5


async def test_closing_a_session_at_work_frees_its_blocks_at_once(engine: Engine) -> None:
    before = engine.pool.available
    session = engine.session(GREEDY)
    await session.append(prompt(7, 300))
    stream = session.generate(max_tokens=500)
    await anext(stream)
    session.close()
    await engine.scheduler.run(lambda: None)
    assert engine.pool.available == before
    with pytest.raises(SessionError, match="closed"):
        async for _ in stream:
            pass


async def test_closing_a_session_that_reads_ends_the_append(engine: Engine) -> None:
    session = engine.session(GREEDY)

    async def read() -> None:
        with pytest.raises(SessionError, match="closed"):
            await session.append(prompt(8, 1900))

    async with anyio.create_task_group() as group:
        group.start_soon(read)
        await anyio.sleep(0.01)
        session.close()


class Broken(Cycle):
    """Fails at the third token."""

    def accept(self, token: int) -> None:
        super().accept(token)
        if self._place == 3:
            raise RuntimeError("broken constraint")


async def test_a_constraint_that_fails_ends_its_own_session_only(engine: Engine) -> None:
    good, bad = engine.session(GREEDY), engine.session(GREEDY)
    await good.append(prompt(1, 10))
    await bad.append(prompt(2, 10))
    expected = await take(good.fork(), 30)
    got: list[int] = []

    async def go_on() -> None:
        got.extend(await take(good, 30))

    async with anyio.create_task_group() as group:
        group.start_soon(go_on)
        with pytest.raises(RuntimeError, match="broken constraint"):
            await take(bad, 30, constraint=Broken())
    assert got == expected
    assert len(await take(bad, 4)) == 4  # the session is whole


async def test_a_generation_tells_what_it_took(engine: Engine) -> None:
    session = engine.session(GREEDY)
    await session.append(prompt(9, 20))
    stream = session.generate(max_tokens=30, logprobs=2)
    tokens = [token async for token in stream]
    stats = stream.stats
    assert stats.tokens == 30
    assert 0 <= stats.queue_seconds < 1
    assert 0 < stats.decode_seconds < 10
    assert stats.passes + stats.accepted == 29
    assert [entry.top[0][0] for entry in stream.logprobs] == tokens
    session.close()


@pytest.mark.parametrize("option", ["cache_tokens", "prefill_chunk"])
def test_sizes_that_make_no_sense_are_refused(folder: Path, option: str) -> None:
    with pytest.raises(EngineError, match=option):
        Engine.load(folder, **{option: 0})  # type: ignore[arg-type]  # one of the two


async def test_a_cancelled_append_and_another_in_its_place_leave_no_wrong_rows_behind(engine: Engine) -> None:
    first, second = prompt(21, 4 * BLOCK), prompt(22, 4 * BLOCK)
    session = engine.session(GREEDY)
    await session.append(first)
    for _ in range(3):
        with anyio.move_on_after(0.002):
            await session.append(prompt(23, 900))
        session.truncate(BLOCK + 3)
        await session.append(second)
        session.truncate(BLOCK + 3)
    session.close()
    for ids in (first, [*first[: BLOCK + 3], *second]):
        stranger = engine.session(GREEDY)
        await stranger.append(ids)
        got = await take(stranger, 6)
        stranger.close()
        with Engine.load(engine.folder, share_prefixes=False) as fresh:
            assert got == await alone(fresh, ids, 6, GREEDY)


async def test_a_refused_or_cancelled_append_gives_its_blocks_back_and_others_go_on(folder: Path) -> None:
    with Engine.load(folder, cache_tokens=8 * BLOCK, cache_patience=0.05, share_prefixes=False) as engine:
        neighbour, greedy = engine.session(GREEDY), engine.session(GREEDY)
        await neighbour.append(prompt(1, 10))
        with pytest.raises(CacheFull, match="whole KV cache"):
            await greedy.append(prompt(2, 9 * BLOCK))
        with pytest.raises(CacheFull, match="live sessions"):
            await greedy.append(prompt(2, 8 * BLOCK - 5))
        with anyio.move_on_after(0.001):
            await greedy.append(prompt(2, 6 * BLOCK))
        await engine.scheduler.run(lambda: None)
        assert engine.pool.available == 7 * BLOCK
        assert len(await take(neighbour, 100)) == 100


class Forcing(Cycle):
    """Says what must come next, wrongly."""

    def __init__(self, forced: list[int] | None) -> None:
        super().__init__()
        self._forced = forced

    def forced(self) -> list[int]:
        if self._forced is None:
            raise RuntimeError("broken forced")
        return self._forced


async def test_what_a_constraint_forces_is_only_a_draft_and_may_fail(engine: Engine) -> None:
    session = engine.session(GREEDY)
    await session.append(prompt(4, 20))
    expected = await take(session.fork(), 12, constraint=Cycle())
    assert await take(session.fork(), 12, constraint=Forcing([0, 10**6, 1])) == expected
    with pytest.raises(RuntimeError, match="broken forced"):
        await take(session.fork(), 12, constraint=Forcing(None))
    assert await take(session.fork(), 12, constraint=Cycle()) == expected
    with pytest.raises(SessionError, match="token id"):
        session.generate(think_end_id=10**6, max_thinking=1)


async def test_drafts_never_ask_for_room_that_plain_decoding_would_not(folder: Path) -> None:
    counts = []
    for speculate in (False, True):
        options = {"cache_tokens": 2 * BLOCK, "cache_patience": 0.01, "share_prefixes": False, "speculate": speculate}
        with Engine.load(folder, **options) as engine:  # type: ignore[arg-type]  # as above
            session = engine.session(GREEDY)
            await session.append(prompt(6, 30) * 2)
            with pytest.raises(CacheFull):
                await take(session, 500, constraint=Cycle())
            counts.append(len(session) - 60)
    assert counts[0] == counts[1] == 2 * BLOCK - 60 + 1


async def test_a_session_that_reads_does_nothing_else(engine: Engine) -> None:
    session = engine.session(GREEDY)
    async with anyio.create_task_group() as group:
        group.start_soon(session.append, prompt(9, 300))
        await anyio.sleep(0)
        for refused in (session.generate, lambda: session.truncate(0)):
            with pytest.raises(SessionError, match="reading what was appended"):
                refused()
        with pytest.raises(SessionError, match="reading what was appended"):
            await session.append([1])
    assert session.tokens == prompt(9, 300)


async def test_a_session_that_moves_to_or_from_disk_does_nothing_else(engine: Engine, tmp_path: Path) -> None:
    session, other = engine.session(GREEDY), engine.session(GREEDY)
    await session.append(prompt(9, 300))
    await session.save(tmp_path / "s")
    await other.append(prompt(8, 100))
    async with anyio.create_task_group() as group:
        group.start_soon(other.load, tmp_path / "s")
        await anyio.sleep(0)
        with pytest.raises(SessionError, match="saved or loaded"):
            other.generate()
    assert other.tokens == session.tokens
    assert await take(other, 5) == await take(session, 5)
