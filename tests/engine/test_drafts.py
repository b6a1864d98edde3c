"""Drafts come from where the last tokens stood before, and only as long as they pay."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from thinkloop.engine.drafts import MAX_DRAFT, Confidence, Drafter, StepCost, SuffixAutomaton


def longest_match(text: list[int]) -> int:
    """Length of the longest suffix that also ends earlier, by comparing everything."""
    ends = range(1, len(text))
    return max((common(text, end) for end in ends), default=0)


def common(text: list[int], end: int) -> int:
    length = 0
    while length < end and text[end - 1 - length] == text[-1 - length]:
        length += 1
    return length


@given(st.lists(st.integers(0, 2), max_size=60))
@settings(max_examples=300, deadline=None)
def test_the_match_is_the_longest_suffix_seen_before_and_its_place_holds(text: list[int]) -> None:
    automaton = SuffixAutomaton()
    for count, token in enumerate(text, 1):
        automaton.extend(token)
        assert automaton.match == longest_match(text[:count])
        if automaton.match:
            end = automaton.follows
            assert text[end - automaton.match : end] == text[count - automaton.match : count]
            assert end < count


def test_of_several_places_the_last_counts() -> None:
    automaton = SuffixAutomaton()
    for token in [1, 2, 3, 9, 1, 2, 4, 9, 1, 2]:
        automaton.extend(token)
    assert (automaton.match, automaton.text[automaton.follows]) == (3, 4)


def learned(seconds: dict[int, float]) -> StepCost:
    cost = StepCost()
    for rows, value in seconds.items():
        cost.learn(rows, value)
    return cost


def drafter_of(text: list[int]) -> Drafter:
    drafter = Drafter(Confidence())
    drafter.read(text)
    return drafter


REPEATED = [*range(10, 40), 10, 11, 12, 13]


def test_where_rows_cost_nothing_drafts_are_long_and_right() -> None:
    drafter = drafter_of(REPEATED)
    assert drafter.propose(learned({1: 1.0, 16: 1.0}), 100) == list(range(14, 14 + MAX_DRAFT))
    assert drafter.propose(learned({1: 1.0, 16: 1.0}), 3) == [14, 15, 16]


def test_where_each_row_costs_a_step_nothing_is_drafted() -> None:
    assert drafter_of(REPEATED).propose(learned({1: 1.0, 16: 16.0}), 100) == []


def test_guesses_that_keep_failing_are_no_longer_drafted() -> None:
    cost = learned({1: 1.0, 2: 1.5, 16: 4.0})
    drafter, random_ids = drafter_of([1, 2, 3]), random.Random(0)
    for _ in range(60):
        drafter.sampled([1, 2, random_ids.randrange(1000, 9000)])
    drafter.sampled([1])
    assert drafter.propose(cost, 10)[:1] == [2]
    drafter.sampled([2])
    assert drafter.propose(cost, 10) == []


def test_drafts_end_where_the_sequence_was_cut() -> None:
    drafter = drafter_of([1, 2, 3, 4])
    drafter.cut()
    drafter.read([1, 2, 3])
    assert drafter.propose(learned({1: 1.0, 16: 1.0}), 9) == [4]


def test_a_stall_hardly_moves_the_cost_of_a_step() -> None:
    cost = StepCost()
    for _ in range(50):
        cost.learn(1, 1.0)
    cost.learn(1, 11.0)
    assert cost.seconds(1) == pytest.approx(1.2)
