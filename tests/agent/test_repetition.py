"""The same call over and over is noticed, told, then stopped."""

import pytest
from loop_tools import ANSWER, echo, ran, says
from thinkloop.agent.repetition import Repetition, call_key, verdict
from thinkloop.traces.events import LimitReached, ToolCall

pytestmark = pytest.mark.anyio


def call(name: str, number: int = 0, **arguments: object) -> ToolCall:
    return ToolCall(id=f"functions.{name}:{number}", name=name, arguments=arguments, raw="")


def repeats(names: str) -> list[int]:
    """The highest count after each step; a letter is a step with one call, a dot a step without."""
    watch, counts = Repetition(), []
    for n, name in enumerate(names):
        made = [] if name == "." else [call(name, n)]
        watch.step(made, [call_key(one) for one in made])
        counts.append(watch.most())
    return counts


def test_the_order_and_spacing_of_arguments_dont_matter() -> None:
    assert call_key(call("f", a=1, b=[2])) == call_key(call("f", b=[2], a=1))
    assert call_key(call("f", a=1)) != call_key(call("f", a="1"))
    assert call_key(call("f", a=1)) != call_key(call("g", a=1))


@pytest.mark.parametrize(
    ("steps", "counts"),
    [
        ("AAAA", [1, 2, 3, 4]),
        ("AABAA", [1, 2, 1, 1, 2]),
        ("ABABAB", [1, 1, 1, 2, 2, 3]),
        ("ABCABCABC", [1, 1, 1, 1, 1, 2, 2, 2, 3]),
        ("ABCDABCD", [1] * 8),
        ("ABCDEFGH", [1] * 8),
        ("A.A.A.", [1, 0, 1, 0, 2, 0]),
    ],
)
def test_single_calls_and_cycles_of_up_to_three_steps_are_counted(steps: str, counts: list[int]) -> None:
    assert repeats(steps) == counts


def test_a_call_repeated_beside_others_is_counted_by_itself() -> None:
    watch = Repetition()
    for n in range(3):
        made = [call("same", n), call("other", n, n=n)]
        watch.step(made, [call_key(one) for one in made])
    assert watch.repeats(call_key(made[0])) == 3
    assert watch.repeats(call_key(made[1])) == 1


def test_the_ladder_has_four_rungs() -> None:
    assert [verdict(n) for n in range(1, 9)] == ["run", "run", "remind", "remind", "refuse", "refuse", "refuse", "stop"]


def test_memory_doesnt_grow() -> None:
    watch = Repetition()
    for n in range(1000):
        made = [call("f", n, n=n)]
        watch.step(made, [call_key(one) for one in made])
    assert len(watch._streaks) == 1
    assert len(watch._recent) == len(watch._first_ids) == 3


async def test_a_repeated_call_is_reminded_refused_and_then_stopped() -> None:
    tool = echo()
    run = await ran([says("echo", "a")] * 8 + [ANSWER], [tool])
    assert len(tool.log) == 2 * 4
    assert run.results[:2] == ["you said a"] * 2
    assert all("[reminder: this call has been made" in result for result in run.results[2:4])
    assert all(result.startswith("error: not run again") for result in run.results[4:])
    assert all("functions.echo:0" in result for result in run.results[4:])
    assert (run.end.reason, run.end.answer, run.end.steps) == ("repetition", "The answer.", 9)
    assert [(event.used, event.final) for event in run.of(LimitReached)] == [(3, False), (5, False), (8, True)]


async def test_a_cycle_of_two_is_stopped_too() -> None:
    tool = echo()
    run = await ran([says("echo", "a"), says("echo", "b")] * 8 + [ANSWER], [tool])
    assert run.end.reason == "repetition"
    assert len(tool.log) == 2 * 9
    assert "functions.echo:1" in run.results[9]


async def test_another_call_starts_the_count_again() -> None:
    script = [*[says("echo", "a")] * 2, says("echo", "b"), *[says("echo", "a")] * 2, ANSWER]
    run = await ran(script, [echo()])
    assert run.results == ["you said a", "you said a", "you said b", "you said a", "you said a"]


async def test_an_empty_turn_in_between_breaks_the_row() -> None:
    run = await ran([says("echo", "a"), {"thinking": "Hm."}] * 2 + [says("echo", "a"), ANSWER], [echo()])
    assert run.results == ["you said a"] * 3


async def test_many_different_calls_of_one_tool_are_no_repetition() -> None:
    run = await ran([says("echo", str(n)) for n in range(50)] + [ANSWER], [echo()])
    assert run.end.reason == "answered"
    assert run.of(LimitReached) == []
