"""Tokens are drawn with the probabilities asked for, and by seed and position alone."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from thinkloop.engine.params import MAX_SEED, Sampling, SamplingError
from thinkloop.engine.sampler import Sampler, TokenLogprobs, check_sampling, uniform
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

PROBABILITIES = [0.4, 0.3, 0.15, 0.1, 0.05]
LOGITS = torch.tensor(PROBABILITIES).log()
DRAWS = 3000

MIXES = [
    Sampling(),
    Sampling(temperature=0.6),
    Sampling(temperature=1.7),
    Sampling(top_k=7),
    Sampling(top_p=0.8),
    Sampling(min_p=0.1),
    Sampling(temperature=0.6, top_p=0.95),
    Sampling(temperature=1.3, top_k=20, top_p=0.7),
    Sampling(temperature=1.3, top_k=20, min_p=0.2),
    Sampling(temperature=0.8, top_k=15, top_p=0.9, min_p=0.05),
    Sampling(temperature=1.1, repetition_penalty=1.4),
    Sampling(temperature=0.9, repetition_penalty=0.7, top_p=0.9),
]
"""Ways to sample that transformers knows too."""


def random_logits(size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 2.5


def transformers_probabilities(sampling: Sampling, logits: Tensor, seen: list[int]) -> Tensor:
    """The filtered distribution by transformers' own processors, in the order of its `generate`."""
    s = sampling.resolved()
    chain = LogitsProcessorList()
    if s.repetition_penalty != 1:
        chain.append(RepetitionPenaltyLogitsProcessor(s.repetition_penalty))
    if s.temperature != 1:
        chain.append(TemperatureLogitsWarper(s.temperature))
    if s.top_k:
        chain.append(TopKLogitsWarper(s.top_k))
    if s.top_p < 1:
        chain.append(TopPLogitsWarper(s.top_p))
    if s.min_p:
        chain.append(MinPLogitsWarper(s.min_p))
    scores: Tensor = chain(torch.tensor([seen]), logits[None].clone())
    return scores[0].double().softmax(-1)


def draws(sampling: Sampling, logits: Tensor, count: int = DRAWS) -> Tensor:
    """How often each token was drawn, each draw at a position of its own."""
    sampler = Sampler(sampling)
    tokens = torch.tensor([sampler.choose(logits, position) for position in range(count)])
    return torch.bincount(tokens, minlength=len(logits))


def chance_of_fit(counts: Tensor, expected: Tensor) -> float:
    """Pearson's chi-square test: the probability of so bad a fit if `counts` were drawn from `expected`. Cells that expect
    fewer than 5 are taken together, as the test needs."""
    assert counts[expected == 0].sum() == 0
    total = counts.sum()
    large = expected * total >= 5
    observed = torch.cat([counts[large], counts[~large].sum()[None]]).double()
    wanted = torch.cat([expected[large], expected[~large].sum()[None]]) * total
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    statistic = ((observed - wanted) ** 2 / wanted).sum()
    degrees = torch.tensor(len(wanted) - 1, dtype=torch.float64)
    return float(torch.special.gammaincc(degrees / 2, statistic / 2)) if degrees else 1.0


# The distribution


@pytest.mark.parametrize("sampling", MIXES, ids=repr)
@pytest.mark.parametrize("size", [11, 431, 5003])
def test_the_filtered_probabilities_are_those_of_transformers(sampling: Sampling, size: int) -> None:
    for seed in range(5):
        logits, seen = random_logits(size, seed), [1, 4, 4, size - 1]
        ours = Sampler(sampling, seen).probabilities(logits)
        torch.testing.assert_close(ours, transformers_probabilities(sampling, logits, seen), atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("sampling", [mix for mix in MIXES if mix.repetition_penalty is None], ids=repr)
def test_draws_over_positions_fit_the_filtered_distribution(sampling: Sampling) -> None:
    logits = random_logits(60)
    assert chance_of_fit(draws(sampling, logits), transformers_probabilities(sampling, logits, [])) > 0.001


def test_the_fit_test_would_notice_a_wrong_distribution() -> None:
    logits = random_logits(60)
    counts = draws(Sampling(temperature=1.0), logits)
    assert chance_of_fit(counts, transformers_probabilities(Sampling(temperature=1.2), logits, [])) < 0.001


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        (Sampling(), PROBABILITIES),
        (Sampling(temperature=0.5), [p**2 for p in PROBABILITIES]),
        (Sampling(top_k=2), [0.4, 0.3, 0, 0, 0]),
        (Sampling(top_k=99), PROBABILITIES),
        (Sampling(top_p=0.6), [0.4, 0.3, 0, 0, 0]),
        (Sampling(top_p=0.01), [1, 0, 0, 0, 0]),
        (Sampling(min_p=0.3), [0.4, 0.3, 0.15, 0, 0]),
        (Sampling(top_k=4, top_p=0.8, min_p=0.5), [0.4, 0.3, 0, 0, 0]),
        (Sampling(temperature=0), [1, 0, 0, 0, 0]),
        (Sampling(temperature=1e-5), [1, 0, 0, 0, 0]),
        (Sampling(logit_bias={4: math.log(8), 0: -100.0}), [0, 0.3, 0.15, 0.1, 0.4]),
    ],
    ids=repr,
)
def test_a_small_distribution_worked_out_by_hand(sampling: Sampling, kept: list[float]) -> None:
    wanted = torch.tensor(kept, dtype=torch.float64) / sum(kept)
    torch.testing.assert_close(Sampler(sampling).probabilities(LOGITS), wanted, atol=1e-6, rtol=1e-6)
    assert chance_of_fit(draws(sampling, LOGITS, 2000), wanted) > 0.001


def test_a_large_vocabularys_tail_is_reachable() -> None:
    flat = torch.zeros(163840)
    tokens = [Sampler(Sampling(seed=1)).choose(flat, p) for p in range(300)]
    assert min(tokens) < 3000
    assert max(tokens) > 160000


def test_tokens_of_one_in_a_billion_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.tensor([0.0] + [math.log(1e-9)] * 1000)
    for token in (1, 500, 999, 1000):
        middle = 1 - (1000.5 - token) * 1e-9
        monkeypatch.setattr("thinkloop.engine.sampler.uniform", lambda *_, u=middle: u)
        assert Sampler(Sampling()).choose(logits, 0) == token


@pytest.mark.parametrize("top_p", [0.05, 0.3, 0.9, 0.999])
def test_the_nucleus_is_the_smallest_set_that_holds_top_p(top_p: float) -> None:
    logits = torch.randn(2000, generator=torch.Generator().manual_seed(1))
    order = logits.argsort(descending=True)
    kept = int((logits[order].double().softmax(-1).cumsum(-1) < top_p).sum()) + 1
    chances = Sampler(Sampling(top_p=top_p)).probabilities(logits)
    assert set(chances.nonzero()[:, 0].tolist()) == set(order[:kept].tolist())


# Randomness


def test_the_same_seed_and_position_draw_the_same_whatever_came_before() -> None:
    fresh, used = Sampler(Sampling(seed=3)), Sampler(Sampling(seed=3))
    for position in range(50):
        used.choose(LOGITS, 1000 + position)
    assert [fresh.choose(LOGITS, p) for p in range(200)] == [used.choose(LOGITS, p) for p in range(200)]


def test_samplers_of_one_batch_dont_touch_each_other_in_whatever_order_they_are_asked() -> None:
    ways = [Sampling(seed=seed, top_p=0.9, presence_penalty=0.4, repetition_penalty=1.1) for seed in range(6)]
    logits = [[random_logits(50, 100 * row + position) for position in range(40)] for row in range(6)]

    def alone(row: int) -> list[int]:
        sampler = Sampler(ways[row])
        return [sampler.choose(logits[row][position], position) for position in range(40)]

    def together(order: random.Random) -> list[list[int]]:
        samplers = [Sampler(way) for way in ways]
        tokens: list[list[int]] = [[] for _ in ways]
        turns = [row for row in range(6) for _ in range(40)]
        order.shuffle(turns)
        for row in turns:
            tokens[row].append(samplers[row].choose(logits[row][len(tokens[row])], len(tokens[row])))
        return tokens

    expected = [alone(row) for row in range(6)]
    assert together(random.Random(1)) == together(random.Random(2)) == expected
    assert len({tuple(tokens) for tokens in expected}) == 6


@pytest.mark.parametrize("sampling", [Sampling(top_p=0.9), Sampling(top_k=8), Sampling(temperature=1.3)], ids=repr)
def test_rounding_that_swaps_two_near_equal_logits_leaves_the_draws_as_they_are(sampling: Sampling) -> None:
    logits = random_logits(40)
    best, second = logits.topk(2).indices.tolist()
    higher, lower = logits.clone(), logits.clone()
    higher[second], lower[second] = logits[best] + 1e-6, logits[best] - 1e-6
    one, other = Sampler(sampling), Sampler(sampling)
    assert all(one.choose(higher, position) == other.choose(lower, position) for position in range(2000))


def test_the_largest_seed_and_a_far_position_draw_like_any_other() -> None:
    counts = torch.bincount(
        torch.tensor([Sampler(Sampling(seed=MAX_SEED)).choose(LOGITS, 10**12 + p) for p in range(2000)]), minlength=5
    )
    assert chance_of_fit(counts, LOGITS.double().exp()) > 0.001


def test_seeds_and_positions_give_independent_uniform_draws() -> None:
    numbers = torch.tensor([[uniform(seed, position) for position in range(200)] for seed in range(200)])
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert numbers.mean() == pytest.approx(0.5, abs=0.01)
    assert numbers.var() == pytest.approx(1 / 12, abs=0.005)
    across = torch.corrcoef(torch.stack([numbers[:-1].flatten(), numbers[1:].flatten()]))[0, 1]
    along = torch.corrcoef(torch.stack([numbers[:, :-1].flatten(), numbers[:, 1:].flatten()]))[0, 1]
    assert abs(across) < 0.02
    assert abs(along) < 0.02


@pytest.mark.parametrize("count", [2, 3, 5, 100, 3001])
def test_masked_tokens_have_probability_zero_at_both_ends_of_the_draw(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = torch.tensor([-math.inf, *random_logits(count).tolist(), -math.inf])
    for draw, token in ((0.0, 1), (1 - 2**-53, count)):
        monkeypatch.setattr("thinkloop.engine.sampler.uniform", lambda *_, draw=draw: draw)
        assert Sampler(Sampling(temperature=3.0)).choose(logits, 0) == token


# Exact speculation: what it rests on


def plain(sampling: Sampling, model: Callable[[list[int]], Tensor], prompt: list[int], length: int) -> list[int]:
    """Token after token."""
    sampler, text = Sampler(sampling, prompt), list(prompt)
    for position in range(length):
        text.append(sampler.choose(model(text), position))
    return text[len(prompt) :]


def speculative(
    sampling: Sampling, model: Callable[[list[int]], Tensor], prompt: list[int], length: int
) -> tuple[list[int], int]:
    """With drafts of 4 tokens, those that followed the last time the newest token was seen; each is accepted as long as
    `choose` says the same. Also gives how many rounds it took."""
    sampler, text, rounds = Sampler(sampling, prompt), list(prompt), 0
    while len(text) - len(prompt) < length:
        rounds += 1
        earlier = [at for at in range(len(text) - 1) if text[at] == text[-1]]
        draft = text[earlier[-1] + 1 :][:4] if earlier else []
        logits = [model(text + draft[:n]) for n in range(len(draft) + 1)]  # one forward pass of a real model
        for n, row in enumerate(logits):
            token = sampler.choose(row, len(text) - len(prompt))
            text.append(token)
            if n < len(draft) and token != draft[n]:
                break
    return text[len(prompt) :][:length], rounds


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0),
        Sampling(temperature=0.7, top_p=0.95),
        Sampling(temperature=1.0, top_k=5, min_p=0.02),
        Sampling(temperature=0.8, presence_penalty=0.3, frequency_penalty=0.05, repetition_penalty=1.1),
    ],
    ids=repr,
)
def test_drafts_accepted_where_they_equal_the_choice_give_the_tokens_of_plain_decoding(sampling: Sampling) -> None:
    table = random_logits(12 * 12, seed=5).view(12, 12)  # a Markov chain: the next token depends on the last
    for seed in range(5):
        way = Sampling(seed=seed).over(sampling)
        tokens, rounds = speculative(way, lambda text: table[text[-1]], [3, 7], 300)
        assert tokens == plain(way, lambda text: table[text[-1]], [3, 7], 300)
        assert rounds < 290  # drafts were accepted, else this shows nothing


def test_speculative_draws_fit_the_models_distribution() -> None:
    table = random_logits(8 * 8, seed=6).view(8, 8)
    tokens, _ = speculative(Sampling(seed=1), lambda text: table[text[-1]], [0], 3000)
    for last in range(8):
        following = [after for before, after in pairwise(tokens) if before == last]
        counts = torch.bincount(torch.tensor(following, dtype=torch.int64), minlength=8)
        assert chance_of_fit(counts, table[last].double().softmax(-1)) > 0.001


# Penalties, bias, bans and masks


def test_presence_and_frequency_penalties_subtract_by_generated_counts() -> None:
    sampler = Sampler(Sampling(temperature=0, presence_penalty=0.5, frequency_penalty=0.25), seen=[1])
    logits = torch.tensor([2.0, 1.6, 0.0])
    # 2.0 wins, then stands at 1.25; 1.6 wins, then at .85; 1.25 wins, then at 1.0, still ahead of .85, then at .75
    assert [sampler.choose(logits, i) for i in range(5)] == [0, 1, 0, 0, 1]


def test_repetition_penalty_weakens_what_was_seen_on_either_side_of_zero() -> None:
    assert Sampler(Sampling(temperature=0, repetition_penalty=2.0), seen=[0]).choose(torch.tensor([3.0, 2.0]), 0) == 1
    assert Sampler(Sampling(temperature=0, repetition_penalty=2.0), seen=[0]).choose(torch.tensor([-1.0, -1.5]), 0) == 1
    assert Sampler(Sampling(temperature=0)).choose(torch.tensor([3.0, 2.0]), 0) == 0


def test_forced_tokens_count_for_the_penalties_even_before_the_first_choice() -> None:
    for way in (Sampling(temperature=0, presence_penalty=1.5), Sampling(temperature=0, repetition_penalty=3.0)):
        sampler = Sampler(way)
        sampler.record(0)
        assert sampler.choose(torch.tensor([2.0, 1.0]), 1) == 1


def test_penalties_brought_up_to_date_token_by_token_are_those_worked_out_at_once() -> None:
    sampler = Sampler(Sampling(repetition_penalty=1.2, frequency_penalty=0.1, presence_penalty=0.5), seen=range(500))
    recorded = [sampler.choose(random_logits(600, position % 7), position) for position in range(200)]
    again = Sampler(sampler.sampling, seen=range(500))
    for token in recorded:
        again.record(token)
    logits = random_logits(600, 1)
    assert len(set(recorded)) > 5
    torch.testing.assert_close(again.probabilities(logits), sampler.probabilities(logits))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_banned_tokens_are_never_chosen_and_logits_stay_as_they_are(temperature: float) -> None:
    logits = LOGITS.clone()
    sampler = Sampler(Sampling(temperature=temperature, logit_bias={0: 100}, presence_penalty=1), banned={0, 1})
    assert {sampler.choose(logits, p) for p in range(300)} <= {2, 3, 4}
    assert torch.equal(logits, LOGITS)


@pytest.mark.parametrize("sampling", [Sampling(temperature=0), *MIXES, Sampling(logit_bias={0: 100.0})], ids=repr)
def test_only_allowed_tokens_are_chosen_and_as_if_there_were_no_others(sampling: Sampling) -> None:
    logits, allowed = random_logits(60), torch.arange(60) % 3 == 1
    masked, kept = Sampler(sampling, [1, 2]), logits[allowed]
    alone = Sampler(sampling if sampling.logit_bias is None else Sampling(), [0])  # token 1 of all is the first allowed
    chances = masked.probabilities(logits, allowed)
    assert chances[~allowed].sum() == 0
    torch.testing.assert_close(chances[allowed], alone.probabilities(kept), atol=1e-7, rtol=1e-5)
    assert all(masked.choose(logits, position, allowed) % 3 == 1 for position in range(100))


@pytest.mark.parametrize("sampling", [Sampling(temperature=0), *MIXES], ids=repr)
def test_when_nothing_is_left_to_choose_it_says_so(sampling: Sampling) -> None:
    nothing = torch.zeros(5, dtype=torch.bool)
    for sampler, mask in ((Sampler(sampling), nothing), (Sampler(sampling, banned=[3]), torch.arange(5) == 3)):
        for ask in (lambda s, m: s.choose(LOGITS, 0, m), lambda s, m: s.probabilities(LOGITS, m)):
            with pytest.raises(SamplingError, match="No token is left"):
                ask(sampler, mask)


@pytest.mark.parametrize("sampling", [Sampling(temperature=0), *MIXES], ids=repr)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_no_numbers_are_an_error_and_not_a_token(sampling: Sampling, bad: float) -> None:
    logits = random_logits(60)
    logits[7] = bad
    with pytest.raises(SamplingError, match="not numbers"):
        Sampler(sampling).choose(logits, 0)


def test_a_mask_of_another_vocabulary_is_refused() -> None:
    with pytest.raises(SamplingError, match=r"mask of shape \[4\] for logits of \[5\]"):
        Sampler(Sampling()).choose(LOGITS, 0, torch.ones(4, dtype=torch.bool))


# Log probabilities


def test_logprobs_are_the_models_own_whatever_the_sampling() -> None:
    logits = random_logits(500)
    sampler = Sampler(Sampling(temperature=0.3, top_k=2, logit_bias={7: 50}), banned=[1])
    given = sampler.logprobs(logits, 7, top=3)
    reference = logits.double().log_softmax(-1)
    best = reference.argsort(descending=True)[:3].tolist()
    assert given.chosen == pytest.approx(float(reference[7]), abs=1e-5)
    assert [token for token, _ in given.top] == best
    assert [value for _, value in given.top] == pytest.approx(reference[best].tolist(), abs=1e-5)


def test_as_many_logprobs_as_asked_for_and_no_more_than_there_are() -> None:
    assert Sampler.logprobs(LOGITS, 4) == TokenLogprobs(pytest.approx(math.log(0.05)), [])
    assert [token for token, _ in Sampler.logprobs(LOGITS, 4, top=99).top] == [0, 1, 2, 3, 4]
    with pytest.raises(SamplingError, match="-1"):
        Sampler.logprobs(LOGITS, 4, top=-1)


# What tokens alone can't do


def test_a_bias_outside_the_vocabulary_is_refused_where_the_vocabulary_is_known() -> None:
    way = Sampling(logit_bias={4: 1, 5: 1})
    check_sampling(way)
    with pytest.raises(SamplingError, match="token 5, but the model's tokens are 0 to 4"):
        check_sampling(way, vocab_size=5)
    with pytest.raises(SamplingError, match="token 5"):
        Sampler(way).choose(LOGITS, 0)


def test_stop_strings_are_refused_where_there_is_no_text() -> None:
    with pytest.raises(SamplingError, match="stop_ids"):
        Sampler(Sampling(stop=("END",)))
