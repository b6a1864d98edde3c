"""The screen shows what happened, on any terminal, and obeys nothing that a model or a page says."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from pathlib import Path

import pytest
from recorded_runs import record
from rich.console import Console
from thinkloop.agent.plain import Cleaner, clean, clip, clock, one_line
from thinkloop.agent.screen import Screen, plain_console
from thinkloop.traces.events import (
    Content,
    Error,
    Event,
    LimitReached,
    RunFinished,
    RunStarted,
    StepStarted,
    Thinking,
    ToolCall,
    ToolCallDelta,
    ToolResult,
    Usage,
)
from thinkloop.traces.reader import TraceReader

START = RunStarted(
    run_id="r", task="Who?", system="", model={"name": "mini", "window": 1000}, tools=[], limits={"steps": 9},
    sampling={}, version="0",
)  # fmt: skip
END = RunFinished(
    answer="Ada", reason="answered", steps=1, usage={"completion_tokens": 7}, sources=["a.md"], seconds=75
)
CALL = ToolCall(id="c", name="search", arguments={"query": "mayor"}, raw='{"query": "mayor"}')
RESULT = ToolResult(call_id="c", name="search", content="found it", ok=True, seconds=0.25)
MARKUP = "[bold]b[/bold] [link=http://x]l[/link] :smile:"
HOSTILE = f"\x1b[31mred\x1b[0m \x1b]0;title\x07{MARKUP} \x9b2J\x00\x08\u202e\r\nend [/"


def shown(*events: Event, terminal: bool = False, width: int = 80, trace: str = "") -> str:
    out = io.StringIO()
    console = plain_console(
        out, width=width, height=30, force_terminal=terminal, color_system="standard" if terminal else None
    )
    with Screen(console, trace=trace) as screen:
        for event in events:
            screen.show(event)
    return out.getvalue()


def test_a_run_shows_task_steps_calls_results_answer_sources_and_trace() -> None:
    text = shown(START, StepStarted(step=1), Thinking(text="I look."), CALL, RESULT, END, trace="runs/x")
    for part in (
        "Who?",
        "model mini",
        "step 1",
        "I look.",
        "search",
        "query: mayor",
        "found it",
        "0.25 s",
        "Ada",
        "a.md",
        "1:15",
        "runs/x",
    ):
        assert part in text


def test_plain_output_has_no_control_codes() -> None:
    text = shown(START, StepStarted(step=1), Thinking(text=HOSTILE), CALL, replace(RESULT, content=HOSTILE), END)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", text)


def hostile_run() -> list[Event]:
    return [
        replace(START, task=HOSTILE, model={"name": HOSTILE}), StepStarted(step=1), Thinking(text=HOSTILE),
        Content(text=HOSTILE), ToolCallDelta(index=0, name=HOSTILE),
        replace(CALL, name=HOSTILE, arguments={HOSTILE: HOSTILE, "n": [HOSTILE]}, problem=HOSTILE),
        replace(RESULT, content=HOSTILE),
        ToolCall(id="d", name="", arguments=None, raw=HOSTILE, problem=HOSTILE),
        LimitReached(limit="steps", used=1, allowed=2, final=True, message=HOSTILE),
        Error(where=HOSTILE, message=HOSTILE, recovered=False),
        replace(END, answer=HOSTILE, sources=[HOSTILE]),
    ]  # fmt: skip


def test_markup_is_shown_as_it_stands() -> None:
    text = shown(*hostile_run(), width=200)
    assert text.count(MARKUP) >= 9


def test_escapes_of_others_never_reach_a_terminal() -> None:
    text = shown(*hostile_run(), terminal=True, trace=HOSTILE)
    assert not re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1a\x1c-\x1f\x7f-\x9f\u202e]", text)
    ours = re.sub(r"\x1b\[(?:[\d;]*m|\?25[lh]|[012]?[AGKJ]|\d+A)", "", text)
    assert "\x1b" not in ours


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("width", [8, 20, 40, 300])
def test_any_width_works(width: int, terminal: bool) -> None:
    text = shown(
        START,
        StepStarted(step=1),
        Thinking(text="w" * 700 + "日本語" * 50),
        CALL,
        RESULT,
        *hostile_run(),
        END,
        width=width,
        terminal=terminal,
    )
    assert "Ada" in text


def test_panels_keep_inside_the_terminal() -> None:
    text = shown(CALL, replace(RESULT, content="x" * 500 + "\n日本語" * 20), END, width=40)
    assert all(Console().measure(line).maximum <= 40 for line in text.splitlines())


def test_long_results_are_clipped_and_say_by_how_much() -> None:
    text = shown(CALL, replace(RESULT, content="\n".join(f"row {n}" for n in range(100))))
    assert "row 11" in text
    assert "row 12" not in text
    assert "88 more lines" in text


def test_a_huge_result_is_shown_at_once() -> None:
    text = shown(CALL, replace(RESULT, content="\x1b[" + "1;" * 500_000 + "x" * 1_000_000))
    assert len(text) < 5000


def test_the_display_form_of_a_result_is_preferred() -> None:
    text = shown(CALL, replace(RESULT, display="for people"))
    assert "for people" in text
    assert "found it" not in text


def test_failed_results_and_malformed_calls_say_so() -> None:
    broken = ToolCall(id="b", name="search", arguments=None, raw='{"query', problem="the arguments are not JSON")
    text = shown(broken, ToolResult(call_id="b", name="search", content="error: write it again", ok=False))
    for part in ('{"query', "the arguments are not JSON", "error: write it again", "failed"):
        assert part in text


def test_a_call_without_a_result_is_shown_in_the_end() -> None:
    assert "no result" in shown(START, StepStarted(step=1), CALL)


def test_parallel_calls_meet_their_results() -> None:
    other = replace(CALL, id="d", arguments={"query": "owner"})
    text = shown(CALL, other, RESULT, replace(RESULT, call_id="d", content="the owner"))
    assert text.index("query: mayor") < text.index("found it") < text.index("query: owner") < text.index("the owner")


def test_the_answer_is_shown_once() -> None:
    text = shown(
        START,
        StepStarted(step=1),
        Content(text="The mayor "),
        Content(text="is Ada."),
        replace(END, answer="The mayor is Ada."),
    )
    assert text.count("The mayor is Ada.") == 1


def test_visible_text_before_a_call_is_shown() -> None:
    assert "Let me see." in shown(StepStarted(step=1), Content(text="Let me see."), CALL, RESULT)


def test_a_run_that_was_cut_short_says_by_what() -> None:
    assert "run ended by: steps" in shown(replace(END, reason="steps"))


@pytest.mark.parametrize("terminal", [False, True])
def test_streamed_thinking_is_whole_whatever_the_pieces(terminal: bool) -> None:
    words = " ".join(f"word{n}" for n in range(200))
    for size in (1, 7, 5000):
        text = shown(
            *[Thinking(text=words[at : at + size]) for at in range(0, len(words), size)], terminal=terminal, width=50
        )
        plain = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", text)
        assert all(f"word{n}" in plain for n in range(200))


def test_an_escape_cut_in_two_is_still_taken_out() -> None:
    for text in (HOSTILE, "a\x1b]8;;http://x\x1b\\b", "a\x1bPq#0\x1b\\b", "\x1b", "a\r", "\x1b[" + "1" * 1000 + "mx"):
        for cut in range(len(text)):
            cleaner = Cleaner()
            pieces = cleaner.feed(text[:cut]) + cleaner.feed(text[cut:]) + cleaner.feed("z")
            assert "\x1b" not in pieces
            if len(text) < 200:
                assert pieces == clean(text + "z")


def test_the_status_line_has_step_context_rate_and_time() -> None:
    times = iter([0.0, 10.0])
    last = 72.0
    screen = Screen(plain_console(io.StringIO()), now=lambda: next(times, last))
    for event in (START, StepStarted(step=3), Usage(prompt_tokens=200, completion_tokens=50, decode_seconds=0.5)):
        screen.show(event)
    line = screen._status.line().plain
    assert line[2:] == "step 3/9 · context 250/1,000 (25 %) · 100 tokens/s · 1:02"


def test_a_terminal_gets_a_live_status_line() -> None:
    assert "step 3/9 · context" in shown(START, StepStarted(step=3), CALL, terminal=True)
    assert "step 3/9 · context" not in shown(START, StepStarted(step=3), CALL, terminal=False)


def test_a_dumb_terminal_gets_plain_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    out = io.StringIO()
    with Screen(plain_console(out, force_terminal=True)) as screen:
        screen.show(CALL)
    assert "\x1b[?25" not in out.getvalue()


def test_a_real_run_can_be_shown_from_its_record(tmp_path: Path) -> None:
    text = shown(*TraceReader.open(record(tmp_path / "t")).events())
    for part in ("First I look it up.", "page of mayor", "no such word", "The mayor is Ada."):
        assert part in text


def test_clip_counts_wrapped_rows() -> None:
    assert clip("a\nb\nc", 2, 10) == ("a\nb", 1)
    assert clip("x" * 25, 2, 10) == ("x" * 19 + "…", 0)
    assert clip("a\nb", 2, 10) == ("a\nb", 0)


def test_short_forms() -> None:
    assert one_line("a\n\x1b[1mb\tc", 4) == "a b…"
    assert [clock(s) for s in (7.9, 750, 3723)] == ["0:07", "12:30", "1:02:03"]
