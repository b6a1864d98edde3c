"""Whatever sessions do, in whatever order and all at once: at the end every block is counted right and every session says
what it would have said alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import anyio
import pytest
from checkpoints import INT4, config_json, write_checkpoint
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from thinkloop.engine.engine import Engine
from thinkloop.engine.kv_cache import BLOCK, CacheFull
from thinkloop.engine.params import Sampling
from thinkloop.engine.session import Session

GREEDY = Sampling(temperature=0)
MOST = 6
NEAR = 1e-3
"""Logits closer than this may change places when a batch sums in another order."""


@dataclass
class Crowd:
    """Sessions under test, and how many of the last tokens of each the model chose."""

    engine: Engine
    folder: Path
    sessions: list[Session] = field(default_factory=list)
    chosen: dict[int, set[int]] = field(default_factory=dict)
    """For each session the positions of its timeline that were sampled."""

    def pick(self, number: int) -> Session:
        if not self.sessions:
            self.add(self.engine.session(GREEDY), set())
        return self.sessions[number % len(self.sessions)]

    def add(self, session: Session, chosen: set[int]) -> None:
        self.sessions.append(session)
        self.chosen[id(session)] = chosen

    async def append(self, number: int, count: int) -> None:
        session = self.pick(number)
        start = len(session)
        await session.append([(start + 3 * index) % 7 + 5 for index in range(min(count, session.window - start - 40))])

    async def generate(self, number: int, count: int) -> None:
        await self.sample(self.pick(number), count % 9 + 1, stop_after=None)

    async def cancel(self, number: int, count: int) -> None:
        await self.sample(self.pick(number), 40, stop_after=count % 5)

    async def sample(self, session: Session, count: int, stop_after: int | None) -> None:
        if not 0 < len(session) < session.window - 40:
            return
        stream = session.generate(max_tokens=count)
        read = 0
        async for _ in stream:
            self.chosen[id(session)].add(len(session) - 1)
            read += 1
            if stop_after is not None and read > stop_after:
                break
        await stream.aclose()

    async def together(self, number: int, count: int) -> None:
        async with anyio.create_task_group() as group:
            for other in self.sessions:
                group.start_soon(self.sample, other, count % 9 + 1, None)

    async def fork(self, number: int, count: int) -> None:
        if len(self.sessions) < MOST:
            parent = self.pick(number)
            self.add(parent.fork(), set(self.chosen[id(parent)]))

    async def truncate(self, number: int, count: int) -> None:
        session = self.pick(number)
        session.truncate(len(session) * (count % 10) // 10)
        kept = self.chosen[id(session)]
        kept.difference_update([position for position in kept if position >= len(session)])

    async def save_and_load(self, number: int, count: int) -> None:
        session, other = self.pick(number), self.pick(number + 1)
        await session.save(self.folder / "saved.safetensors")
        await other.load(self.folder / "saved.safetensors")
        self.chosen[id(other)] = set(self.chosen[id(session)])

    async def close(self, number: int, count: int) -> None:
        session = self.pick(number)
        session.close()
        self.sessions.remove(session)

    async def fresh(self, number: int, count: int) -> None:
        if len(self.sessions) < MOST:
            self.add(self.engine.session(GREEDY), set())

    async def check(self) -> None:
        await self.together(0, 3)
        await self.engine.scheduler.run(lambda: None)  # what was closed is done now
        holders = Counter(block for session in self.sessions for block in session._sequence.cache.blocks)
        references = {block: count for block, count in enumerate(self.engine.pool.references) if count}
        assert references == dict(holders)
        for session in self.sessions:
            self.check_choices(session)
        for session in self.sessions:
            session.close()
        await self.engine.scheduler.run(lambda: None)
        assert self.engine.pool.available == self.engine.pool.tokens

    def check_choices(self, session: Session) -> None:
        if not session.tokens:
            return
        logits = self.engine.logits(session.tokens)
        for position in self.chosen[id(session)]:
            row = logits[position - 1]
            assert float(row.max() - row[session.tokens[position]]) < NEAR


ACTIONS: list[Callable[[Crowd, int, int], Awaitable[None]]] = [
    Crowd.append, Crowd.append, Crowd.generate, Crowd.cancel, Crowd.together, Crowd.fork, Crowd.truncate,
    Crowd.save_and_load, Crowd.close, Crowd.fresh,
]  # fmt: skip
steps = st.lists(
    st.tuples(st.sampled_from(ACTIONS), st.integers(0, MOST), st.integers(0, 3 * BLOCK)), min_size=4, max_size=25
)


@pytest.fixture(scope="module", params=["general", "small"])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    changes = {"quantization_config": INT4} if request.param == "small" else {}
    folder = write_checkpoint(tmp_path_factory.mktemp("crowd") / "model", config_json(**changes))
    with Engine.load(folder, prefill_chunk=48, cache_patience=0.05) as engine:
        yield engine


@given(steps)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_random_interleavings_keep_counts_and_tokens_right(
    engine: Engine, tmp_path: Path, steps: list[tuple[Callable[[Crowd, int, int], Awaitable[None]], int, int]]
) -> None:
    async def run() -> None:
        crowd = Crowd(engine, tmp_path)
        for action, number, count in steps:
            await action(crowd, number, count)
        await crowd.check()

    anyio.run(run)


@given(steps)
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_running_out_of_room_loses_nothing(
    tight: Engine, tmp_path: Path, steps: list[tuple[Callable[[Crowd, int, int], Awaitable[None]], int, int]]
) -> None:
    """The cache holds less than the sessions ask for: refusals are clear, and what was read stays true."""

    async def run() -> None:
        crowd = Crowd(tight, tmp_path)
        for action, number, count in steps:
            try:
                await action(crowd, number, count)
            except* CacheFull:
                pass
        for session in crowd.sessions:
            session.close()
        await tight.scheduler.run(lambda: None)
        assert tight.pool.available == tight.pool.tokens
        for session in crowd.sessions:
            crowd.check_choices(session)

    anyio.run(run)


@pytest.fixture(scope="module")
def tight(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    folder = write_checkpoint(tmp_path_factory.mktemp("tight") / "model", config_json())
    with Engine.load(folder, prefill_chunk=48, cache_tokens=10 * BLOCK, cache_patience=0.01) as engine:
        yield engine
