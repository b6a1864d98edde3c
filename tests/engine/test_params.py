"""Sampling parameters: what may be asked for, what is left to the model, and how they are written down."""

from __future__ import annotations

import json
import math

import pytest
from thinkloop.engine.params import MAX_SEED, ResolvedSampling, Sampling, SamplingError


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -1}, {"temperature": 1e-9}, {"temperature": math.nan}, {"temperature": "0.7"},
        {"temperature": True}, {"top_k": -1}, {"top_k": 1.5}, {"top_p": 0}, {"top_p": 1.5}, {"min_p": 1.0},
        {"presence_penalty": 2.1}, {"frequency_penalty": -3}, {"repetition_penalty": 0},
        {"repetition_penalty": math.inf}, {"logit_bias": {5: 101}}, {"logit_bias": {-1: 1}}, {"logit_bias": {"5": 1}},
        {"logit_bias": [5]}, {"stop": "END"}, {"stop": ("a", "")}, {"seed": -1}, {"seed": MAX_SEED + 1}, {"seed": 1.0},
    ],
    ids=repr,
)  # fmt: skip
def test_a_parameter_out_of_range_is_refused_by_name(bad: dict[str, object]) -> None:
    with pytest.raises(SamplingError, match=f"`{next(iter(bad))}` is .*must be"):
        Sampling(**bad)  # type: ignore[arg-type]  # the point is the bad value


def test_the_ends_of_the_ranges_are_allowed() -> None:
    Sampling(seed=0, temperature=0, top_p=1, min_p=0, logit_bias={0: -100, 1: 100}, presence_penalty=-2)
    Sampling(seed=MAX_SEED, top_p=1e-9, min_p=0.999, presence_penalty=2, temperature=1e-5)


def test_what_is_not_set_is_left_to_the_defaults() -> None:
    asked, own = Sampling(temperature=0.0, seed=0), Sampling(temperature=0.6, top_p=0.95)
    assert asked.over(own) == Sampling(temperature=0.0, top_p=0.95, seed=0)
    assert asked.over(own).resolved() == ResolvedSampling(temperature=0.0, top_p=0.95)
    assert Sampling().resolved() == ResolvedSampling()


def test_parameters_survive_being_written_as_json() -> None:
    full = Sampling(temperature=0.5, logit_bias={5: -1.5, 163839: 2}, stop=("a", "b"), seed=MAX_SEED)
    assert full.to_json() == {
        "temperature": 0.5, "logit_bias": {"5": -1.5, "163839": 2}, "stop": ["a", "b"], "seed": MAX_SEED,
    }  # fmt: skip
    assert Sampling.from_json(json.loads(json.dumps(full.to_json()))) == full
    assert Sampling.from_json({}) == Sampling()
    with pytest.raises(SamplingError, match="no sampling parameter `top-k`"):
        Sampling.from_json({"top-k": 1})
    with pytest.raises(SamplingError, match="`logit_bias`"):
        Sampling.from_json({"logit_bias": {"x": 1}})
