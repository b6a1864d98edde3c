"""A stop string ends the text wherever the pieces are cut, and no more is held back than may become one."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from thinkloop.engine.params import SamplingError
from thinkloop.engine.stop_strings import StopStrings

TEXTS = st.text("ab\n", max_size=30)
STOPS = st.lists(st.text("ab\n", min_size=1, max_size=4), min_size=1, max_size=4)


def shown(stops: list[str], pieces: list[str]) -> tuple[str, str | None]:
    """All that is shown of a text that comes in pieces, and the stop that was hit."""
    reader = StopStrings(stops)
    text = "".join(reader.feed(piece) for piece in pieces)
    return text + reader.finish(), reader.hit


@pytest.mark.parametrize(
    ("stops", "text", "expected"),
    [
        (["END"], "The END is near", ("The ", "END")),
        (["END"], "The EN is near", ("The EN is near", None)),
        (["END"], "E", ("E", None)),
        (["\n\n", "###"], "one\ntwo###three\n\n", ("one\ntwo", "###")),
        (["ab", "aab"], "xaab", ("x", "aab")),
        (["abcd", "bc"], "xabcd", ("xa", "bc")),
        (["ababc"], "abababc", ("ab", "ababc")),
        ([], "anything", ("anything", None)),
    ],
)
def test_the_text_ends_before_the_first_stop_that_is_complete(
    stops: list[str], text: str, expected: tuple[str, str | None]
) -> None:
    assert shown(stops, [text]) == shown(stops, list(text)) == expected


@settings(deadline=None)
@given(STOPS, TEXTS, st.lists(st.integers(0, 30), max_size=6))
def test_how_the_text_is_cut_into_pieces_makes_no_difference(stops: list[str], text: str, cuts: list[int]) -> None:
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[start:end] for start, end in pairwise(edges)]
    assert shown(stops, pieces) == shown(stops, list(text))


@settings(deadline=None)
@given(STOPS, TEXTS)
def test_what_is_shown_is_the_text_up_to_a_stop_and_holds_none(stops: list[str], text: str) -> None:
    visible, hit = shown(stops, list(text))
    assert not any(stop in visible for stop in stops)
    assert visible == text if hit is None else text.startswith(visible + hit)


@settings(deadline=None)
@given(STOPS, TEXTS)
def test_only_what_may_become_a_stop_is_held_back(stops: list[str], text: str) -> None:
    reader, sent = StopStrings(stops), ""
    for at, character in enumerate(text):
        sent += reader.feed(character)
        if reader.hit is not None:
            break
        held = text[len(sent) : at + 1]
        assert text.startswith(sent)
        assert not held or any(stop.startswith(held) for stop in stops)


def test_after_a_stop_nothing_more_is_shown() -> None:
    reader = StopStrings(["."])
    assert [reader.feed("Yes. No."), reader.feed("Maybe"), reader.finish(), reader.hit] == ["Yes", "", "", "."]


@pytest.mark.parametrize("bad", ["END", ["a", ""], [3]])
def test_stops_that_are_no_texts_are_refused(bad: list[str]) -> None:
    with pytest.raises(SamplingError, match="Stop strings are texts"):
        StopStrings(bad)


def test_parameters_and_stop_strings_bring_no_torch() -> None:
    code = "import sys, thinkloop.engine.params, thinkloop.engine.stop_strings; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
