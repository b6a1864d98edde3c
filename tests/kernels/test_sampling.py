"""The device chooses the token that the CPU's sampler chooses for the same seed, position, mask and parameters."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from thinkloop.engine.device_sampler import DeviceDraw
from thinkloop.engine.params import Sampling, SamplingError
from thinkloop.engine.sampler import LARGEST_ON_DEVICE, Sampler, uniform
from thinkloop.kernels.sampling import argmax, sample
from thinkloop.kernels.sampling_threshold import MAX_VOCAB, sampling_tiles, search_steps
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16]
INF, NAN = float("inf"), float("nan")


def draw(logits: Tensor, sampling: Sampling, seed: int, allowed: Tensor | None = None) -> list[int]:
    """One token a row at positions 0, 1, 2…, all rows with the same parameters."""
    rows = logits.shape[0]

    def column(value: float | None, dtype: torch.dtype) -> Tensor | None:
        return None if value is None else torch.full((rows,), value, dtype=dtype, device=DEVICE)

    draws = torch.tensor([uniform(seed, row) for row in range(rows)], dtype=torch.float64, device=DEVICE)
    temperature = column(sampling.temperature, torch.float32)
    assert temperature is not None
    return sample(
        logits, temperature=temperature, uniform=draws, top_k=column(sampling.top_k, torch.int32),
        top_p=column(sampling.top_p, torch.float32), min_p=column(sampling.min_p, torch.float32), allowed=allowed,
    ).tolist()  # fmt: skip


def on_the_cpu(logits: Tensor, sampling: Sampling, seed: int, allowed: Tensor | None = None) -> list[int]:
    """As `draw`, -1 where the sampler raises."""
    sampler, tokens = Sampler(sampling.over(Sampling(seed=seed))), []
    for row, values in enumerate(logits.cpu()):
        try:
            tokens.append(sampler.choose(values, row, None if allowed is None else allowed[row].cpu()))
        except SamplingError:
            tokens.append(-1)
    return tokens


def some_logits(rows: int, vocab: int, dtype: torch.dtype = torch.float32, spread: float = 3.0) -> Tensor:
    torch.manual_seed(vocab)
    return (spread * torch.randn(rows, vocab, device=DEVICE)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [1, 7, 1024, 1025, 5000])
def test_greedy_is_torchs_argmax(dtype: torch.dtype, vocab: int) -> None:
    logits = some_logits(3, vocab, dtype)
    assert argmax(logits).tolist() == [int(row.argmax()) for row in logits.cpu()]


def test_of_equal_logits_the_first_is_greedy_and_zero_has_no_sign() -> None:
    logits = torch.full((2, 3000), -1.0, device=DEVICE)
    logits[0, [1500, 1700, 2900]] = 2.0
    logits[1, 1030], logits[1, 2060] = -0.0, 0.0
    assert argmax(logits).tolist() == [1500, 1030]


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.0),
        Sampling(temperature=0.6),
        Sampling(temperature=3.0, min_p=0.05),
        Sampling(temperature=1.0, min_p=0.0),
        Sampling(temperature=0.0),
        Sampling(temperature=1.0, top_k=20),
        Sampling(temperature=0.0, top_k=20),
        Sampling(temperature=0.8, top_p=0.95),
        Sampling(temperature=1.5, top_k=50, top_p=0.8, min_p=0.1),
        Sampling(temperature=1.0, top_k=1),
        Sampling(temperature=1.0, top_k=10**6, top_p=0.01),
    ],
    ids=repr,
)
def test_a_draw_is_the_cpus(sampling: Sampling) -> None:
    logits = some_logits(3, 2100)
    assert draw(logits, sampling, 11) == on_the_cpu(logits, sampling, 11)


def test_a_vocabulary_of_kimi_k2s_size_is_160_tiles() -> None:
    logits = some_logits(1, 163840, torch.bfloat16)
    sampling = Sampling(temperature=1.0, min_p=0.001)
    assert argmax(logits).tolist() == [int(logits[0].cpu().argmax())]
    assert draw(logits, sampling, 5) == on_the_cpu(logits, sampling, 5)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=20.0, min_p=0.01),
        Sampling(temperature=30.0, top_p=0.9),
        Sampling(temperature=9.0, top_k=77),
    ],
    ids=repr,
)
def test_a_draw_from_bfloat16_is_the_cpus_too(sampling: Sampling) -> None:
    torch.manual_seed(0)
    values = torch.arange(0x3F80, 0x3F80 + 600, dtype=torch.int16).view(torch.bfloat16)  # 1 to 25, none of them twice
    logits = torch.stack([torch.cat([values, -values])[torch.randperm(1200)] for _ in range(4)]).to(DEVICE)
    assert draw(logits, sampling, 3) == on_the_cpu(logits, sampling, 3)


@pytest.mark.parametrize(
    "sampling", [Sampling(temperature=0.0), Sampling(temperature=1.0), Sampling(temperature=1.0, top_k=9)]
)
def test_a_mask_is_looked_at_first(sampling: Sampling) -> None:
    logits = some_logits(5, 2500)
    allowed = torch.rand(5, 2500, device=DEVICE) < 0.02
    logits[0, ~allowed[0]] = NAN  # what is out can't do harm
    tokens = draw(logits, sampling, 5, allowed)
    assert tokens == on_the_cpu(logits, sampling, 5, allowed)
    assert all(allowed[row, token] for row, token in enumerate(tokens))


@pytest.mark.parametrize(
    "sampling", [Sampling(temperature=0.0), Sampling(temperature=1.0), Sampling(temperature=1.0, top_p=0.5)]
)
def test_where_the_cpu_raises_the_token_is_minus_one(sampling: Sampling) -> None:
    logits = torch.zeros(6, 1500, device=DEVICE)
    logits[0, 1400], logits[1, 3], logits[2], logits[3] = NAN, INF, -INF, NAN
    allowed = torch.ones(6, 1500, dtype=torch.bool, device=DEVICE)
    allowed[4] = False
    tokens = draw(logits, sampling, 5, allowed)
    assert tokens[:5] == [-1] * 5
    assert 0 <= tokens[5] < 1500


def test_rows_have_their_own_parameters() -> None:
    logits = some_logits(4, 1100)
    draws = torch.tensor([uniform(2, 0)] * 4, dtype=torch.float64, device=DEVICE)
    tokens = sample(
        logits,
        temperature=torch.tensor([0.0, 1.0, 2.0, 0.5], device=DEVICE),
        uniform=draws,
        top_k=torch.tensor([0, 0, 40, 0], device=DEVICE),
        top_p=torch.tensor([1.0, 1.0, 1.0, 0.7], device=DEVICE),
        min_p=torch.tensor([0.0, 0.2, 0.0, 0.0], device=DEVICE),
    ).tolist()
    each = [Sampling(temperature=0.0), Sampling(temperature=1.0, min_p=0.2), Sampling(temperature=2.0, top_k=40),
            Sampling(temperature=0.5, top_p=0.7)]  # fmt: skip
    assert tokens == [on_the_cpu(logits[row : row + 1], each[row], 2)[0] for row in range(4)]


def test_draws_at_both_ends_give_the_first_and_last_token_that_can_be() -> None:
    logits = torch.full((2, 2500), -INF, device=DEVICE)
    logits[:, 900:2300] = 0.0
    draws = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64, device=DEVICE)
    tokens = sample(logits, temperature=torch.ones(2, device=DEVICE), uniform=draws)
    assert tokens.tolist() == [900, 2299]


def test_tokens_tied_at_the_cut_stay() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0, 1.0, 1.0, 0.0]], device=DEVICE).expand(8, 6).contiguous()
    assert set(draw(logits, Sampling(temperature=9.0, top_k=2), 1)) == {1, 2, 3, 4}


def test_evenly_spaced_draws_give_every_token_its_probability() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0]], device=DEVICE).expand(50, 3).contiguous()
    draws = (torch.arange(50, dtype=torch.float64, device=DEVICE) + 0.5) / 50
    tokens = sample(logits, temperature=torch.full((50,), 2.0, device=DEVICE), uniform=draws)
    assert tokens.tolist() == sorted(tokens.tolist())  # they stand in the order of their ids
    share = torch.bincount(tokens.cpu(), minlength=3) / 50
    torch.testing.assert_close(share, (logits[0] / 2).softmax(-1).cpu(), atol=0.02, rtol=0)


def test_nan_behind_and_between_the_rows_reaches_nothing() -> None:
    wide = torch.full((3, 4096), NAN, device=DEVICE)
    wide[:, :1500] = some_logits(3, 1500)
    logits = wide[:, :1500]
    assert draw(logits, Sampling(temperature=1.0, top_p=0.9), 5) == draw(
        logits.contiguous(), Sampling(temperature=1.0, top_p=0.9), 5
    )
    assert argmax(logits).tolist() == logits.argmax(-1).tolist()


def test_no_rows_give_no_tokens() -> None:
    assert argmax(torch.empty(0, 5, device=DEVICE)).tolist() == []
    assert draw(torch.empty(0, 5, device=DEVICE), Sampling(temperature=1.0), 0) == []


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("logits", {"logits": torch.zeros(2, 5, dtype=torch.float16)}),
        ("logits", {"logits": torch.zeros(1, 1).expand(2, MAX_VOCAB + 1)}),
        ("allowed", {"allowed": torch.ones(2, 5)}),
        ("temperature", {"temperature": torch.ones(3)}),
        ("uniform", {"uniform": torch.zeros(2)}),
        ("top_k", {"top_k": torch.zeros(2)}),
        ("top_p", {"top_p": torch.zeros(2, dtype=torch.float64)}),
        ("min_p", {"min_p": torch.zeros(1)}),
    ],
)
def test_what_does_not_fit_is_named(name: str, change: dict[str, Any]) -> None:
    arguments = {
        "logits": torch.zeros(2, 5), "temperature": torch.ones(2), "uniform": torch.zeros(2, dtype=torch.float64),
    } | change  # fmt: skip
    with pytest.raises(ValueError, match=f"`{name}`"):
        sample(**arguments)  # type: ignore[arg-type]  # the point


@pytest.mark.parametrize("vocab", [1, 1024, 1025, 163840, MAX_VOCAB])
def test_tiles_cover_the_vocabulary(vocab: int) -> None:
    tiles = sampling_tiles(vocab)
    assert math.ceil(vocab / tiles.width) == tiles.count <= tiles.block


def test_a_search_fixes_all_bits_that_differ() -> None:
    assert search_steps(torch.bfloat16) * 4 == 16
    assert search_steps(torch.float32) * 4 == 32


@pytest.mark.parametrize(
    "sampling",
    [Sampling(temperature=0), Sampling(temperature=0.8), Sampling(top_k=5), Sampling(top_p=0.6), Sampling(min_p=0.2)],
)
def test_the_samplers_own_draw_on_a_device_is_the_hosts(sampling: Sampling) -> None:
    host = Sampler(sampling.over(Sampling(seed=7)))
    device = DeviceDraw(host.sampling, torch.device(DEVICE))
    for position, logits in enumerate(some_logits(6, 1500)):
        assert device(logits, uniform(7, position)) == host.choose(logits.cpu(), position)
    assert device(torch.full((1500,), -INF, device=DEVICE), 0.5) == -1


def test_the_sampler_knows_what_the_kernels_take() -> None:
    assert LARGEST_ON_DEVICE == MAX_VOCAB
