"""Limits warn the model before they bite, and the last step answers with what there is."""

import time

import pytest
from loop_tools import ANSWER, echo, ran, says, sleep
from thinkloop.agent.limits import Limits, Meter
from thinkloop.traces.events import LimitReached, StepStarted, ThinkloopError, ToolCall, ToolResult, Usage

pytestmark = pytest.mark.anyio


def calls(count: int, **usage: float) -> list[dict[str, object]]:
    return [says("echo", str(n)) | {"usage": usage} for n in range(count)]


@pytest.mark.parametrize("name", ["steps", "tokens", "thinking_per_step", "thinking", "seconds", "cost", "bad_turns"])
@pytest.mark.parametrize("value", [0, -1, float("nan"), "3", True])
def test_a_limit_that_makes_no_sense_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(ThinkloopError, match=name):
        Limits(**{name: value})  # type: ignore[arg-type]  # wrong on purpose


def test_steps_cant_be_unlimited() -> None:
    with pytest.raises(ThinkloopError, match="steps"):
        Limits(steps=None)  # type: ignore[arg-type]  # wrong on purpose


async def test_the_last_step_may_only_answer() -> None:
    run = await ran([*calls(4), ANSWER], [echo()], limits=Limits(steps=5))
    assert [turn.tool_choice for turn in run.model.turns] == ["auto"] * 4 + ["none"]
    assert (run.end.answer, run.end.reason, run.end.steps) == ("The answer.", "steps", 5)
    last = run.model.conversations[-1][-1]
    assert last["role"] == "user"
    assert "the limit of 5 steps is reached" in last["content"]


async def test_one_step_is_enough_for_an_answer() -> None:
    run = await ran([ANSWER], [echo()], limits=Limits(steps=1))
    assert (run.end.answer, run.end.reason, run.end.steps) == ("The answer.", "steps", 1)
    assert run.model.turns[0].tool_choice == "none"


async def test_the_model_is_warned_once_at_the_end_of_a_result() -> None:
    run = await ran([*calls(19), ANSWER], [echo()], limits=Limits(steps=20))
    warned = [n for n, result in enumerate(run.results, 1) if "[note: 16 of 20 steps used" in result]
    assert warned == [16]
    assert run.model.conversations[16][-1]["content"] == run.results[15]
    assert [event.final for event in run.of(LimitReached)] == [False, True]


async def test_a_short_run_is_warned_three_steps_before_its_end() -> None:
    run = await ran([*calls(5), ANSWER], [echo()], limits=Limits(steps=6))
    assert [n for n, result in enumerate(run.results, 1) if "[note: " in result] == [3]


async def test_a_warning_stands_once_behind_the_last_of_several_results() -> None:
    run = await ran([says("echo", "a", "b", "c"), ANSWER], [echo()], limits=Limits(steps=3))
    assert ["[note: " in result for result in run.results] == [False, False, True]


async def test_tokens_are_limited() -> None:
    run = await ran([*calls(3, completion_tokens=100), ANSWER], [echo()], limits=Limits(tokens=250))
    assert [turn.max_tokens for turn in run.model.turns][:3] == [250, 150, 50]
    assert (run.end.reason, run.end.answer) == ("tokens", "The answer.")
    assert "[note: 200 of 250 tokens used" in run.results[1]


async def test_cost_is_limited() -> None:
    run = await ran([*calls(4, cost=0.25), ANSWER], [echo()], limits=Limits(cost=1.0))
    assert (run.end.reason, run.end.answer) == ("cost", "The answer.")
    assert run.end.usage["cost"] == 1.0


async def test_thinking_per_step_is_passed_on_and_told() -> None:
    script = [says("echo", "a") | {"usage": {"thinking_tokens": 64}}, ANSWER]
    run = await ran(script, [echo()], limits=Limits(thinking_per_step=64))
    assert [turn.max_thinking for turn in run.model.turns] == [64, 64]
    assert [(event.limit, event.used) for event in run.of(LimitReached)] == [("thinking", 64)]
    assert run.end.reason == "answered"


async def test_thinking_over_the_run_is_what_is_left_of_it() -> None:
    script = [says("echo", name) | {"usage": {"thinking_tokens": 40}} for name in "abc"]
    run = await ran([*script, ANSWER], [echo()], limits=Limits(thinking=100, thinking_per_step=64))
    assert [turn.max_thinking for turn in run.model.turns] == [64, 60, 20, 1]
    assert [(event.limit, event.allowed) for event in run.of(LimitReached)] == [("thinking", 20), ("thinking", 1)]
    assert run.end.reason == "answered"


async def test_thinking_cant_eat_all_of_the_last_step() -> None:
    run = await ran([ANSWER], limits=Limits(steps=1))
    turn = run.model.turns[0]
    assert turn.max_tokens is not None
    assert turn.max_thinking == turn.max_tokens // 2


async def test_a_model_that_is_too_slow_is_stopped_and_asked() -> None:
    began = time.monotonic()
    run = await ran(
        [{"content": "So far."} | says("echo", "a"), {"delay": 60}, ANSWER], [echo()], limits=Limits(seconds=0.2)
    )
    assert time.monotonic() - began < 2
    assert (run.end.answer, run.end.reason) == ("The answer.", "time")


async def test_a_last_step_that_is_too_slow_leaves_the_best_text() -> None:
    script = [{"content": "So far."} | says("echo", "a"), {"delay": 60}, {"delay": 60}]
    began = time.monotonic()
    run = await ran(script, [echo()], limits=Limits(seconds=0.1))
    assert time.monotonic() - began < 4
    assert (run.end.answer, run.end.reason) == ("So far.", "time")


async def test_a_tool_that_outlasts_the_run_is_stopped_and_told() -> None:
    run = await ran([says("sleep", "60"), ANSWER], [sleep(deadline=90.0)], limits=Limits(seconds=0.2))
    assert run.results == ["error: cancelled before it finished"]
    assert (run.end.answer, run.end.reason) == ("The answer.", "time")


async def test_calls_at_the_last_step_are_recorded_and_not_run() -> None:
    tool = echo()
    run = await ran([says("echo", "a"), says("echo", "b")], [tool], limits=Limits(steps=2))
    assert len(run.of(ToolCall)) == len(run.of(ToolResult)) == 2
    assert run.results[1].startswith("error: not run")
    assert tool.log == ["a begins", "a ends"]


@pytest.mark.parametrize(
    ("turns", "answer"),
    [
        ([says("echo", "a"), {}], "No answer was reached."),
        ([says("echo", "a") | {"content": "Maybe a."}, {"thinking": "Hm."}], "Maybe a."),
        ([says("echo", "a") | {"content": "Maybe a."}, {"content": "Surely b."}], "Surely b."),
    ],
)
async def test_every_run_ends_with_the_best_text_there_is(turns: list[dict[str, object]], answer: str) -> None:
    run = await ran(turns, [echo()], limits=Limits(steps=2))
    assert (run.end.answer, run.end.reason) == (answer, "steps")


async def test_a_nudge_carries_the_warning_when_there_is_no_result() -> None:
    run = await ran(
        [says("echo", "a"), {"thinking": "Hm."}, {"thinking": "Hm."}, ANSWER], [echo()], limits=Limits(steps=5)
    )
    assert "[note: 2 of 5 steps used" in run.model.conversations[2][-1]["content"]
    assert [event.step for event in run.of(StepStarted)] == [1, 2, 3, 4]


def test_the_meter_warns_of_each_limit_once() -> None:
    now = 0.0
    meter = Meter(Limits(steps=100, tokens=10, seconds=10.0, cost=1.0), clock=lambda: now)
    assert list(meter.warnings()) == []
    now = 8.0
    meter.add(Usage(prompt_tokens=1, completion_tokens=8, cost=0.8))
    assert [event.limit for event in meter.warnings()] == ["tokens", "time", "cost"]
    assert list(meter.warnings()) == []
    now = 10.0
    reached = meter.reached()
    assert reached is not None
    assert reached.limit == "time"
