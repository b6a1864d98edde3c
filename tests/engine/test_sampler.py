"""Tokens are drawn with the probabilities asked for, and by seed and position alone."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from thinkloop.engine.params import Sampling
from thinkloop.engine.sampler import Sampler, SamplingError, uniform

PROBABILITIES = [0.4, 0.3, 0.15, 0.1, 0.05]
LOGITS = torch.tensor(PROBABILITIES).log()


def frequencies(sampling: Sampling, draws: int = 8000) -> list[float]:
    sampler = Sampler(sampling)
    counts = Counter(sampler.choose(LOGITS, position) for position in range(draws))
    return [counts[token] / draws for token in range(len(PROBABILITIES))]


def expect(kept: list[float]) -> list[object]:
    return [pytest.approx(p / sum(kept), abs=0.025 if p else 0) for p in kept]


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        (Sampling(), PROBABILITIES),
        (Sampling(temperature=0.5), [p**2 for p in PROBABILITIES]),
        (Sampling(temperature=2.0), [p**0.5 for p in PROBABILITIES]),
        (Sampling(top_k=2), [0.4, 0.3, 0, 0, 0]),
        (Sampling(top_k=99), PROBABILITIES),
        (Sampling(top_p=0.6), [0.4, 0.3, 0, 0, 0]),
        (Sampling(top_p=0.01), [1, 0, 0, 0, 0]),
        (Sampling(min_p=0.3), [0.4, 0.3, 0.15, 0, 0]),
        (Sampling(top_k=4, top_p=0.8, min_p=0.5), [0.4, 0.3, 0, 0, 0]),
        (Sampling(temperature=0), [1, 0, 0, 0, 0]),
    ],
)
def test_frequencies_follow_the_filtered_distribution(sampling: Sampling, kept: list[float]) -> None:
    assert frequencies(sampling) == expect(kept)


def test_the_same_seed_and_position_draw_the_same_whatever_came_before() -> None:
    fresh, used = Sampler(Sampling(seed=3)), Sampler(Sampling(seed=3))
    for position in range(50):
        used.choose(LOGITS, 1000 + position)
    assert [fresh.choose(LOGITS, p) for p in range(200)] == [used.choose(LOGITS, p) for p in range(200)]


def test_seeds_and_positions_give_independent_uniform_draws() -> None:
    draws = torch.tensor([[uniform(seed, position) for position in range(200)] for seed in range(200)])
    assert draws.min() >= 0
    assert draws.max() < 1
    assert draws.mean() == pytest.approx(0.5, abs=0.01)
    assert draws.var() == pytest.approx(1 / 12, abs=0.005)
    across = torch.corrcoef(torch.stack([draws[:-1].flatten(), draws[1:].flatten()]))[0, 1]
    along = torch.corrcoef(torch.stack([draws[:, :-1].flatten(), draws[:, 1:].flatten()]))[0, 1]
    assert abs(across) < 0.02
    assert abs(along) < 0.02


def test_a_large_vocabularys_tail_is_reachable() -> None:
    flat = torch.zeros(163840)
    tokens = [Sampler(Sampling(seed=1)).choose(flat, p) for p in range(300)]
    assert min(tokens) < 3000
    assert max(tokens) > 160000


@pytest.mark.parametrize("top_p", [0.05, 0.3, 0.9, 0.999])
def test_the_nucleus_is_the_smallest_set_that_holds_top_p(top_p: float) -> None:
    logits = torch.randn(2000, generator=torch.Generator().manual_seed(1))
    order = logits.argsort(descending=True)
    kept = int((logits[order].softmax(-1).cumsum(-1) < top_p).sum()) + 1
    sampler = Sampler(Sampling(top_p=top_p))
    drawn = {sampler.choose(logits, position) for position in range(2000)}
    assert drawn <= set(order[:kept].tolist())
    if kept <= 20:
        assert len(drawn) == kept


def test_presence_and_frequency_penalties_subtract_by_generated_counts() -> None:
    sampler = Sampler(Sampling(temperature=0, presence_penalty=0.5, frequency_penalty=0.25), seen=[1])
    logits = torch.tensor([2.0, 1.6, 0.0])
    # 2.0 wins, then stands at 1.25; 1.6 wins, then at .85; 1.25 wins, then at 1.0, still ahead of .85, then at .75
    assert [sampler.choose(logits, i) for i in range(5)] == [0, 1, 0, 0, 1]


def test_repetition_penalty_weakens_what_was_seen_on_either_side_of_zero() -> None:
    assert Sampler(Sampling(temperature=0, repetition_penalty=2.0), seen=[0]).choose(torch.tensor([3.0, 2.0]), 0) == 1
    assert Sampler(Sampling(temperature=0, repetition_penalty=2.0), seen=[0]).choose(torch.tensor([-1.0, -1.5]), 0) == 1
    assert Sampler(Sampling(temperature=0)).choose(torch.tensor([3.0, 2.0]), 0) == 0


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_banned_tokens_are_never_chosen_and_logits_stay_as_they_are(temperature: float) -> None:
    logits = LOGITS.clone()
    sampler = Sampler(Sampling(temperature=temperature), banned={0, 1})
    assert {sampler.choose(logits, p) for p in range(300)} <= {2, 3, 4}
    assert torch.equal(logits, LOGITS)


def test_masked_tokens_have_probability_zero_at_both_ends_of_the_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.tensor([-math.inf, 0.0, 0.0, -math.inf])
    for draw, token in ((0.0, 1), (1 - 2**-53, 2)):
        monkeypatch.setattr("thinkloop.engine.sampler.uniform", lambda *_, draw=draw: draw)
        assert Sampler(Sampling()).choose(logits, 0) == token


@pytest.mark.parametrize(
    "bad",
    [{"temperature": -1}, {"top_k": -1}, {"top_p": 0}, {"top_p": 1.5}, {"min_p": 1.0}, {"repetition_penalty": 0}],
)
def test_a_parameter_out_of_range_is_refused_by_name(bad: dict[str, float]) -> None:
    with pytest.raises(SamplingError, match=next(iter(bad))):
        Sampler(Sampling(**bad))  # type: ignore[arg-type]  # the point is the bad value
