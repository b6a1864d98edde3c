"""The conversation stays inside the window, by explicit and priced edits, and room is kept for the answer."""

import random
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
from loop_tools import ANSWER, Ran, SmallTool, echo, ran, says
from thinkloop.agent.context import Context, answer_reserve
from thinkloop.agent.cut import cut_text
from thinkloop.agent.testing import ScriptedModel
from thinkloop.traces.events import ContextEdited, LimitReached, StepStarted, ThinkloopError, ToolResult, Usage

pytestmark = pytest.mark.anyio

WINDOW = 4096


async def _page(text: str) -> str:
    return f"page {text} " + "word " * 400  # about 500 tokens


def page(**changes: Any) -> SmallTool:
    return SmallTool("page", _page, **changes)


async def long_run(policy: str, steps: int = 40) -> Ran:
    script = [says("page", str(n)) for n in range(steps)] + [ANSWER]
    return await ran(script, [page()], window=WINDOW, context_policy=policy)


def test_the_reserve_is_an_eighth_of_small_windows() -> None:
    assert answer_reserve(2048) == 256
    assert answer_reserve(262_144) == 4096


@pytest.mark.parametrize("policy", ["hide_results", "drop_steps"])
async def test_a_long_run_stays_inside_the_window(policy: str) -> None:
    run = await long_run(policy)
    assert run.end.reason == "answered"
    usages = [event for event in run.events if isinstance(event, Usage)]
    assert max(usage.prompt_tokens for usage in usages) <= WINDOW - answer_reserve(WINDOW)
    for usage, turn in zip(usages, run.model.turns, strict=True):
        assert turn.max_tokens is not None
        assert usage.prompt_tokens + turn.max_tokens <= WINDOW


@pytest.mark.parametrize("policy", ["hide_results", "drop_steps"])
async def test_edits_are_rare_and_priced(policy: str) -> None:
    run = await long_run(policy)
    edits = run.of(ContextEdited)
    assert 3 <= len(edits) <= 20
    for edit in edits:
        assert edit.policy == policy
        assert edit.tokens_after < edit.tokens_before
        assert 0 < edit.recomputed_tokens <= edit.tokens_after
        assert edit.first_step <= edit.last_step


@pytest.mark.parametrize("policy", ["hide_results", "drop_steps"])
async def test_between_edits_the_conversation_only_grows(policy: str) -> None:
    run = await long_run(policy)
    seen = run.model.conversations
    broken = sum(later[: len(earlier)] != earlier for earlier, later in pairwise(seen))
    assert broken == len(run.of(ContextEdited))


async def test_hidden_results_say_what_was_there_and_thinking_stays() -> None:
    run = await long_run("hide_results")
    last = run.model.conversations[-1]
    results = [message for message in last if message["role"] == "tool"]
    assert len(results) == 40
    assert results[0]["content"].startswith("[hidden: result of functions.page:0, ")
    assert results[0]["content"].endswith(" tokens; call it again if it is needed]")
    assert results[0]["tool_call_id"] == "functions.page:0"
    assert results[-1]["content"].startswith("page 39")
    assert [message["reasoning_content"] for message in last if message["role"] == "assistant"] == ["I call page."] * 40


async def test_dropped_steps_go_whole_and_the_task_stays() -> None:
    run = await long_run("drop_steps")
    last = run.model.conversations[-1]
    assert [message["role"] for message in last[:2]] == ["system", "user"]
    assert last[1]["content"] == "Find out."
    assert [message["role"] for message in last[2:]] == ["assistant", "tool"] * (len(last[2:]) // 2)
    assert last[-1]["content"].startswith("page 39")
    assert len(last) < 2 + 2 * 9


async def test_the_results_that_the_model_hasnt_read_are_never_touched() -> None:
    for policy in ("hide_results", "drop_steps"):
        run = await long_run(policy)
        newest = [messages[-1]["content"] for messages in run.model.conversations[1:]]
        assert newest == run.results


async def test_a_result_larger_than_the_room_is_cut_to_it() -> None:
    async def huge(text: str) -> str:
        return "first " + "word " * 20_000 + "last"

    run = await ran([says("huge", "a"), ANSWER], [SmallTool("huge", huge, budget=100_000)], window=WINDOW)
    assert run.end.reason == "answered"
    assert "there was no more room in the context" in run.results[0]
    assert run.results[0].startswith("first ")
    assert run.results[0].endswith("last")
    assert run.model.count_tokens(run.results[0]) < WINDOW


async def test_many_large_results_of_one_turn_leave_a_word_for_each() -> None:
    run = await ran([says("page", *map(str, range(16))), ANSWER], [page()], window=WINDOW)
    assert len(run.of(ToolResult)) == 16
    assert run.results[0].endswith("word ")
    assert all("no more room in the context" in result or "the context is full" in result for result in run.results[8:])
    assert run.end.reason in ("answered", "context")
    usages = [event for event in run.events if isinstance(event, Usage)]
    assert usages[-1].prompt_tokens <= WINDOW


async def test_a_context_that_can_hold_no_more_ends_in_an_answer() -> None:
    script = [{"thinking": "x" * 3000, "calls": [("echo", {"text": str(n)})]} for n in range(20)]
    run = await ran([*script[:5], ANSWER, *script], [echo()], window=WINDOW)
    assert (run.end.reason, run.end.answer) == ("context", "The answer.")
    assert run.model.turns[-1].tool_choice == "none"
    final = run.of(LimitReached)[-1]
    assert (final.limit, final.final, final.allowed) == ("context", True, WINDOW)


def test_a_task_longer_than_the_window_is_refused_before_the_model_runs() -> None:
    with pytest.raises(ThinkloopError, match=r"task is too long.*window of 4,096.*corpus"):
        Context(ScriptedModel([], window=WINDOW), "system", "word " * 4000, [])


async def test_steps_report_the_size_of_the_context() -> None:
    run = await ran([says("echo", "a") | {"usage": {"prompt_tokens": 500, "completion_tokens": 50}}, ANSWER], [echo()])
    second = run.of(StepStarted)[1]
    assert 550 < second.context_tokens < 570


def counted(policy: str, prompt_tokens: Sequence[int]) -> Context:
    """A context after one step per prompt: 100 tokens written by the model, a result of 308."""
    context = Context(ScriptedModel([], window=WINDOW, context_policy=policy), "system", "task", [])
    for number, prompt in enumerate(prompt_tokens, 1):
        context.begin_step(number)
        usage = Usage(prompt_tokens=prompt, completion_tokens=100)
        context.append_turn({"role": "assistant", "reasoning_content": "t", "content": ""}, usage)
        assert context.tokens == prompt + 100
        context.append_result(f"functions.page:{number}", "page", "word" * 300)
        assert context.tokens == prompt + 408
    return context


PROMPTS = [50 + 410 * n for n in range(7)]
"""What the model reports: two tokens a step more than was estimated, and 50 at first."""


def test_what_the_model_reports_corrects_the_price_of_a_hidden_result() -> None:
    context = counted("hide_results", PROMPTS)
    (edit,) = context.make_room(500)
    hidden = edit.last_step - edit.first_step + 1
    stub = 8 + -(-len("[hidden: result of functions.page:1, 308 tokens; call it again if it is needed]") // 4)
    assert edit.tokens_before == PROMPTS[-1] + 408
    assert edit.tokens_after == edit.tokens_before - hidden * (308 - stub)
    # The two tokens that the estimate of a result lacked count with the words before it.
    assert edit.recomputed_tokens == edit.tokens_after - (50 + 100 + 2)


def test_what_the_model_reports_corrects_the_price_of_a_dropped_step() -> None:
    context = counted("drop_steps", PROMPTS)
    (edit,) = context.make_room(900)
    dropped = edit.last_step - edit.first_step + 1
    assert edit.first_step == 1
    assert edit.tokens_after == edit.tokens_before - dropped * 410
    assert edit.recomputed_tokens == edit.tokens_after - 50
    assert context.tokens <= int(0.6 * WINDOW) - 900 + 410


def test_an_edit_raises_the_epoch_and_keeps_the_old_list_as_it_was() -> None:
    context = Context(ScriptedModel([], window=WINDOW), "system", "task", [])
    for number in range(1, 8):
        context.begin_step(number)
        context.append_turn({"role": "assistant", "reasoning_content": "t", "content": ""}, None)
        context.append_result(f"functions.page:{number}", "page", "word " * 400)
    before, copy = context.conversation.messages, list(context.conversation.messages)
    assert context.make_room() != []
    assert context.conversation.epoch == 1
    assert before == copy
    assert context.conversation.messages is not before
    assert context.make_room() == []


@pytest.mark.parametrize("seed", range(100))
def test_a_cut_text_fits_its_budget_and_keeps_both_ends(seed: int) -> None:
    chance = random.Random(seed)
    text = "".join(chance.choices("ab \n\u00e9\u6f22\U0001f600", k=chance.randrange(3000)))
    budget = chance.randrange(60, 400)

    def count(part: str) -> int:
        return -(-len(part.encode()) // 3)

    cut = cut_text(text, budget, count)
    assert count(cut) <= budget
    if count(text) <= budget:
        assert cut == text
    else:
        assert text.startswith(cut.partition("\n[… ")[0])
        assert text.endswith(cut.rpartition(" …]\n")[2])


def test_a_text_of_many_megabytes_is_not_counted_whole() -> None:
    counted = 0

    def count(part: str) -> int:
        nonlocal counted
        counted += len(part)
        return -(-len(part) // 4)

    cut = cut_text("x" * 50_000_000, 1000, count)
    assert counted < 200_000
    assert "about 12,49" in cut
