"""A session computes each token once, samples what its seed says, keeps its timeline true whatever cuts it short."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import anyio
import pytest
import torch
from checkpoints import config_json, mini_config_json, write_checkpoint
from safetensors import safe_open
from safetensors.torch import save_file
from thinkloop.engine.engine import Engine
from thinkloop.engine.generation import TokenStream
from thinkloop.engine.params import Sampling
from thinkloop.engine.sampler import SamplingError
from thinkloop.engine.scheduler import EngineClosed
from thinkloop.engine.session import Session, SessionError
from thinkloop.engine.snapshot import Snapshot, SnapshotError
from torch import Tensor

pytestmark = pytest.mark.anyio

GREEDY = Sampling(temperature=0)
PROMPT = [5, 9, 2, 7, 11, 3]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("engine") / "model", mini_config_json(max_position_embeddings=600))


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[Engine]:
    with Engine.load(folder) as engine:
        yield engine


async def take(session: Session, count: int, **options: object) -> list[int]:
    return [token async for token in session.generate(max_tokens=count, **options)]  # type: ignore[arg-type]  # passed on


async def exhaust(stream: TokenStream) -> None:
    async for _ in stream:
        pass


async def begun(engine: Engine, sampling: Sampling = GREEDY, ids: list[int] = PROMPT) -> Session:
    session = engine.session(sampling)
    await session.append(ids)
    return session


def greedy_by_logits(engine: Engine, ids: list[int], count: int) -> list[int]:
    ids = list(ids)
    for _ in range(count):
        ids.append(int(engine.logits(ids)[-1].argmax()))
    return ids[-count:]


async def test_greedy_generation_follows_the_logits(engine: Engine) -> None:
    session = await begun(engine)
    sampled = await take(session, 12)
    assert sampled == greedy_by_logits(engine, PROMPT, 12)
    assert session.tokens == PROMPT + sampled
    assert session.finish_reason == "length"


async def test_every_token_is_computed_exactly_once_over_many_steps(engine: Engine) -> None:
    session, appended, sampled = engine.session(GREEDY), 0, 0
    for step in range(12):
        await session.append([step, step + 1, step + 2])
        appended += 3
        sampled += len(await take(session, 4))
    assert session.prefilled_tokens == appended
    assert session.decoded_tokens == sampled - 1  # the last one waits for what comes next
    assert len(session) == appended + sampled


async def test_append_in_pieces_equals_append_at_once(engine: Engine) -> None:
    ids = [(7 * i) % 3000 for i in range(400)]
    whole, pieces = await begun(engine, ids=ids), engine.session(GREEDY)
    for start in range(0, 400, 37):
        await pieces.append(ids[start : start + 37])
    assert await take(whole, 8) == await take(pieces, 8)


async def test_generation_goes_on_after_more_is_appended(engine: Engine) -> None:
    session = await begun(engine)
    first = await take(session, 5)
    await session.append([100, 101])
    assert await take(session, 5) == greedy_by_logits(engine, [*PROMPT, *first, 100, 101], 5)


async def test_a_stop_id_ends_it_and_is_recorded(engine: Engine) -> None:
    expected = greedy_by_logits(engine, PROMPT, 8)
    stop = next(t for i, t in enumerate(expected) if i >= 2 and t not in expected[:i])
    session = await begun(engine)
    sampled = await take(session, 8, stop_ids={stop})
    assert sampled == expected[: expected.index(stop) + 1]
    assert session.finish_reason == "stop"
    assert session.tokens[-1] == stop


async def test_the_full_window_ends_it_with_length_and_refuses_more(engine: Engine) -> None:
    session = await begun(engine, ids=[1] * 595)
    assert len([t async for t in session.generate()]) == 5
    assert session.finish_reason == "length"
    assert len(session) == session.window == 600
    assert [t async for t in session.generate()] == []
    assert session.finish_reason == "length"
    with pytest.raises(SessionError, match="window"):
        await session.append([1])


async def test_no_tokens_asked_for_is_none(engine: Engine) -> None:
    session = await begun(engine)
    assert await take(session, 0) == []
    assert session.tokens == PROMPT


async def test_thinking_ends_at_its_budget_with_the_real_token(engine: Engine) -> None:
    natural = greedy_by_logits(engine, PROMPT, 10)
    end = next(i for i in range(3000) if i not in natural)
    session = await begun(engine)
    sampled = await take(session, 10, think_end_id=end, max_thinking=4)
    assert sampled[:5] == [*natural[:4], end]
    assert sampled[5:] == greedy_by_logits(engine, [*PROMPT, *natural[:4], end], 5)
    assert session.tokens[len(PROMPT) + 4] == end
    assert (await take(await begun(engine), 3, think_end_id=end, max_thinking=0))[0] == end


async def test_thinking_that_ends_by_itself_is_left_alone(engine: Engine) -> None:
    natural = greedy_by_logits(engine, PROMPT, 10)
    session = await begun(engine)
    assert await take(session, 10, think_end_id=natural[1], max_thinking=4) == natural
    end = next(i for i in range(3000) if i not in natural)
    session.truncate(len(session) - 10)
    assert await take(session, 10, think_end_id=end, max_thinking=4, call_ids=[natural[1]]) == natural


async def test_banned_ids_are_never_sampled(engine: Engine) -> None:
    natural = greedy_by_logits(engine, PROMPT, 6)
    sampled = await take(await begun(engine), 6, banned_ids={natural[0]})
    assert natural[0] not in sampled


async def test_the_same_seed_gives_the_same_tokens_and_another_seed_others(engine: Engine) -> None:
    runs = [await take(await begun(engine, Sampling(seed=seed)), 20) for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


async def test_draws_depend_on_position_alone(engine: Engine) -> None:
    whole = await begun(engine, Sampling(seed=4))
    expected = await take(whole, 12)
    broken = await begun(engine, Sampling(seed=4))
    noise = await begun(engine, Sampling(seed=4), [1, 2])
    parts = await take(broken, 5)
    await take(noise, 3)
    parts += await take(broken, 7)
    assert parts == expected
    assert broken.rng_position == 12


async def test_a_recorded_rng_position_replays_a_step(engine: Engine) -> None:
    session = await begun(engine, Sampling(seed=5))
    first = await take(session, 6)
    at = session.rng_position
    second = await take(session, 6)
    again = await begun(engine, Sampling(seed=5), PROMPT + first)
    again.rng_position = at
    assert await take(again, 6) == second


async def test_a_fork_goes_on_like_a_fresh_session_and_leaves_its_parent_alone(engine: Engine) -> None:
    session = await begun(engine)
    first = await take(session, 3)
    fork, fresh = session.fork(), await begun(engine, ids=PROMPT + first)
    await fork.append([50, 51])
    await fresh.append([50, 51])
    assert await take(fork, 6) == await take(fresh, 6)
    assert session.tokens == PROMPT + first
    assert await take(session, 4) == greedy_by_logits(engine, PROMPT + first, 4)
    assert fork.prefilled_tokens == 2


async def test_a_fork_outlives_its_parent_and_can_be_taken_while_it_generates(engine: Engine) -> None:
    session = await begun(engine)
    stream = session.generate(max_tokens=40)
    read = [await anext(stream) for _ in range(4)]
    fork = session.fork()
    session.close()
    assert fork.tokens == PROMPT + read
    assert await take(fork, 4) == greedy_by_logits(engine, PROMPT + read, 4)


async def test_truncating_forgets(engine: Engine) -> None:
    session = await begun(engine)
    await take(session, 6)
    session.truncate(4)
    assert session.tokens == PROMPT[:4]
    assert await take(session, 5) == greedy_by_logits(engine, PROMPT[:4], 5)
    session.truncate(2)
    await session.append([80])
    assert await take(session, 5) == greedy_by_logits(engine, [*PROMPT[:2], 80], 5)
    for bad in (-1, 99):
        with pytest.raises(SessionError, match="truncate"):
            session.truncate(bad)


async def test_breaking_off_leaves_exactly_what_was_read(engine: Engine) -> None:
    session, read = await begun(engine), []
    async for token in session.generate(max_tokens=100):
        read.append(token)
        if len(read) == 7:
            break
    assert session.tokens == PROMPT + read
    assert session.finish_reason is None
    assert read + await take(session, 5) == greedy_by_logits(engine, PROMPT, 12)


async def test_closing_the_stream_leaves_exactly_what_was_read(engine: Engine) -> None:
    session = await begun(engine)
    stream = session.generate(max_tokens=100)
    read = [await anext(stream), await anext(stream)]
    await anyio.sleep(0.02)  # the worker runs ahead meanwhile
    await stream.aclose()
    session.truncate(len(session) - 1)
    await session.append([read[1], 60])
    assert await take(session, 4) == greedy_by_logits(engine, [*PROMPT, *read, 60], 4)


async def test_a_cancelled_scope_stops_it_at_any_token(engine: Engine) -> None:
    expected = greedy_by_logits(engine, PROMPT, 30)
    for at in (0, 1, 2, 13):
        session, read = await begun(engine), []
        with anyio.CancelScope() as scope:
            async for token in session.generate(max_tokens=500):
                read.append(token)
                if len(read) > at:
                    scope.cancel()
        assert read == expected[: len(read)]
        assert session.tokens == PROMPT + read
        rest = 30 - len(read)
        if rest > 0:
            assert await take(session, rest) == expected[len(read) :]


async def test_a_cancelled_append_leaves_the_timeline_as_it_was(engine: Engine) -> None:
    session = await begun(engine)
    with anyio.move_on_after(0.01) as scope:
        await session.append([1] * 590)
    assert scope.cancelled_caught
    assert session.tokens == PROMPT
    assert await take(session, 5) == greedy_by_logits(engine, PROMPT, 5)


async def test_saved_and_loaded_it_goes_on_as_if_nothing_happened(engine: Engine, tmp_path: Path) -> None:
    session = await begun(engine, Sampling(seed=8))
    await take(session, 5)
    await session.save(tmp_path / "s.safetensors")
    back = engine.session(Sampling(seed=8))
    await back.load(tmp_path / "s.safetensors")
    assert back.tokens == session.tokens
    assert back.rng_position == 5
    assert await take(back, 8) == await take(session, 8)
    assert back.prefilled_tokens == 0


async def test_a_save_of_another_model_or_no_save_at_all_is_refused(engine: Engine, tmp_path: Path) -> None:
    other = write_checkpoint(tmp_path / "other", mini_config_json(max_position_embeddings=601))
    path = tmp_path / "s.safetensors"
    with Engine.load(other) as stranger:
        await (await begun(stranger)).save(path)
    session = await begun(engine)
    with pytest.raises(SnapshotError, match="another model"):
        await session.load(path)
    path.write_bytes(path.read_bytes()[:100])
    for bad in (path, tmp_path / "none"):
        with pytest.raises(SnapshotError, match="no saved session"):
            await session.load(bad)
    with pytest.raises(SnapshotError, match="can't be saved"):
        await session.save(tmp_path / "no" / "folder")
    assert session.tokens == PROMPT


SAVED_WRONG: dict[str, tuple[dict[str, Tensor], str, str]] = {
    "no such token": ({"tokens": torch.full((5,), 1 << 40)}, "5", "outside the vocabulary"),
    "a negative token": ({"tokens": torch.full((5,), -1)}, "5", "outside the vocabulary"),
    "tokens that are no ids": ({"tokens": torch.zeros(5)}, "5", "tokens are torch.float32"),
    "tokens in two rows": ({"tokens": torch.zeros(5, 1, dtype=torch.int64)}, "5", r"\[5, 1\]"),
    "no tokens at all": ({"tokens": torch.zeros(0, dtype=torch.int64)}, "5", "rows are"),
    "rows of one layer": ({"rows": torch.zeros(1, 3, 160)}, "5", "rows are"),
    "narrow rows": ({"rows": torch.zeros(5, 3, 1)}, "5", "rows are"),
    "flat rows": ({"rows": torch.zeros(5)}, "5", "rows are"),
    "no rows' shape": ({"rows": torch.tensor(0.0)}, "5", "rows are"),
    "whole rows": ({"rows": torch.zeros(5, 3, 160, dtype=torch.int64)}, "5", "rows are torch.int64"),
    "rows that are no numbers": ({"rows": torch.full((5, 3, 160), float("nan"))}, "5", "no number"),
    "more rows than tokens": ({"rows": torch.zeros(5, 900, 160)}, "5", "rows are"),
    "a negative position": ({}, "-5", "rng_position"),
    "an endless position": ({}, "9" * 5000, "rng_position"),
}


@pytest.mark.parametrize("case", SAVED_WRONG)
async def test_a_saved_session_that_no_session_can_be_is_refused(engine: Engine, tmp_path: Path, case: str) -> None:
    path, (changes, position, words) = tmp_path / "s.safetensors", SAVED_WRONG[case]
    session = await begun(engine)
    await session.save(path)
    with safe_open(str(path), framework="pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no dict
    save_file(tensors | changes, path, metadata=metadata | {"rng_position": position})
    with pytest.raises(SnapshotError, match=words):
        await session.load(path)
    assert session.tokens == PROMPT
    assert await take(session, 3) == await take(await begun(engine), 3)


async def test_rows_from_a_file_are_never_shared_with_other_sessions(folder: Path, tmp_path: Path) -> None:
    prompt, path = [(7 * index) % 3000 for index in range(150)], tmp_path / "s.safetensors"
    with Engine.load(folder) as engine:
        session = await begun(engine, ids=prompt)
        await session.save(path)
        expected = await take(session, 6)
    with safe_open(str(path), framework="pt") as file:
        metadata, tokens, rows = file.metadata(), file.get_tensor("tokens"), file.get_tensor("rows")
    save_file({"tokens": tokens, "rows": torch.randn_like(rows)}, path, metadata=metadata)
    with Engine.load(folder) as engine:
        loaded = engine.session(GREEDY)
        await loaded.load(path)
        twin = loaded.fork()
        await loaded.append([5])
        await twin.append([6] * 70)
        loaded.close()
        twin.close()
        other = await begun(engine, ids=prompt)
        assert other.reused_tokens == 0
        assert await take(other, 6) == expected
        loaded = engine.session(GREEDY)
        await loaded.load(path)
        loaded.truncate(0)
        await loaded.append(prompt)  # computed here, so as good as anyone's
        assert await take(loaded, 6) == expected


async def test_the_tokens_of_any_models_session_can_be_had(engine: Engine, tmp_path: Path) -> None:
    other = write_checkpoint(tmp_path / "other", mini_config_json(max_position_embeddings=601))
    with Engine.load(other) as stranger:
        await (await begun(stranger)).save(tmp_path / "s.safetensors")
    assert Snapshot.tokens_of(tmp_path / "s.safetensors") == PROMPT
    with pytest.raises(SnapshotError, match="no saved session"):
        Snapshot.tokens_of(tmp_path / "none")


async def test_sessions_take_turns_and_dont_mix(engine: Engine) -> None:
    prompts = [[i, i + 1, i + 2] for i in range(4)]
    sessions = [await begun(engine, ids=prompt) for prompt in prompts]
    results: dict[int, list[int]] = {}

    async def read(index: int) -> None:
        results[index] = await take(sessions[index], 25)

    async with anyio.create_task_group() as tasks:
        for index in range(4):
            tasks.start_soon(read, index)
    for index, prompt in enumerate(prompts):
        assert results[index] == greedy_by_logits(engine, prompt, 25)


async def test_the_event_loop_is_not_blocked_by_the_model(engine: Engine) -> None:
    session, longest = engine.session(GREEDY), 0.0

    async def watch() -> None:
        nonlocal longest
        while True:
            start = time.perf_counter()
            await anyio.sleep(0.001)
            longest = max(longest, time.perf_counter() - start)

    start = time.perf_counter()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(watch)
        await session.append([1] * 500)
        tasks.cancel_scope.cancel()
    assert longest < max(0.1, (time.perf_counter() - start) / 2)


async def test_what_makes_no_sense_is_refused(engine: Engine) -> None:
    session = engine.session()
    with pytest.raises(SessionError, match="append"):
        session.generate()
    for bad in ([-1], [3000], ["a"], [True], [1.0]):
        with pytest.raises(SessionError, match="token id"):
            await session.append(bad)  # type: ignore[arg-type]  # the point is the bad value
    await session.append([])
    await session.append([1])
    with pytest.raises(SamplingError, match="top_p"):
        session.generate(sampling=Sampling(top_p=7))
    stream = session.generate(max_tokens=3)
    with pytest.raises(SessionError, match="generating"):
        await session.append([1])
    await stream.aclose()
    await session.append([1])
    session.close()
    session.close()
    with pytest.raises(SessionError, match="closed"):
        await session.append([1])


async def test_closing_the_engine_ends_its_generations_and_refuses_more(tmp_path: Path) -> None:
    engine = Engine.load(write_checkpoint(tmp_path / "m", config_json()))
    session = await begun(engine)
    stream = session.generate(max_tokens=400)
    await anext(stream)
    engine.close()
    engine.close()
    with pytest.raises(EngineClosed), anyio.fail_after(5):
        await exhaust(stream)
    with pytest.raises(EngineClosed):
        engine.logits([1])


async def test_a_failing_forward_pass_reaches_the_reader(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    session = await begun(engine)
    await take(session, 2)
    monkeypatch.setattr(engine.model, "forward", lambda *_, **__: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError):
        await take(session, 5)
    monkeypatch.undo()
    assert len(await take(session, 5)) == 5
