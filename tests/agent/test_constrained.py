"""With the grammar, what a model writes is what the loop can use: calls that fit, answers in the form that was asked for."""

from __future__ import annotations

import json
from pathlib import Path
from time import perf_counter

import anyio
import pytest
from thinkloop.agent.engine_model import EngineModel
from thinkloop.agent.model import Conversation, Turn
from thinkloop.engine.params import Sampling
from thinkloop.tools.tool import declaration
from thinkloop.traces.events import Content, Error, Event, Json, ThinkloopError, ToolCall, TurnFinished

import thinkloop as tl

pytestmark = pytest.mark.anyio

MINI = Path(__file__).parents[2] / "engine" / "mini"
WORLD = MINI / "world"
QUESTION = (MINI / "demo.txt").read_text(encoding="utf-8").strip()
WILD = Sampling(temperature=1.7, seed=11)
SEARCH: Json = {
    "type": "function",
    "function": {
        "name": "search",
        "parameters": {
            "type": "object",
            "properties": {"query": {"type": "string", "maxLength": 12}, "limit": {"type": "integer", "minimum": 1}},
            "required": ["query"],
            "additionalProperties": False,
        },
    },
}


async def turn(model: EngineModel, question: str, tools: list[Json], **options: object) -> list[Event]:
    conversation = Conversation([{"role": "system", "content": model.system}, {"role": "user", "content": question}])
    ask = Turn(max_tokens=60, max_thinking=12, **options)  # type: ignore[arg-type]  # passed on
    return [event async for event in model.stream(conversation, tools, ask)]


async def test_even_a_model_that_writes_at_random_writes_calls_that_fit() -> None:
    model = EngineModel.load("mini", sampling=WILD)
    calls = []
    for number in range(40):
        events = await turn(model, f"What is Palken's owner's island {number}?", [SEARCH])
        if isinstance(events[-1], TurnFinished) and events[-1].reason != "length":
            calls += [event for event in events if isinstance(event, ToolCall)]
    await model.aclose()
    assert len(calls) >= 5
    assert {call.name for call in calls} == {"search"}
    for call in calls:
        assert not call.problem
        assert call.arguments is not None
        assert set(call.arguments) <= {"query", "limit"}
        assert len(call.arguments["query"]) <= 12


async def test_an_answer_takes_the_form_that_was_asked_for() -> None:
    model = EngineModel.load("mini", sampling=WILD)
    schema = {"type": "object", "properties": {"found": {"enum": ["yes", "no"]}}, "required": ["found"]}
    form = {
        "type": "json_schema",
        "json_schema": {"name": "answer", "schema": schema | {"additionalProperties": False}},
    }
    events = await turn(model, "is it?", [], tool_choice="none", response_format=form)
    await model.aclose()
    answer = json.loads("".join(event.text for event in events if isinstance(event, Content)))
    assert answer in ({"found": "yes"}, {"found": "no"})


async def test_a_repeat_can_be_forbidden() -> None:
    model = EngineModel.load("mini", sampling=Sampling(temperature=0))
    async with tl.Search(WORLD) as search:
        tools = [declaration(tool) for tool in search.tools()]
    first = [event for event in await turn(model, QUESTION, tools) if isinstance(event, ToolCall)]
    again = await turn(model, QUESTION, tools, forbidden=tuple((call.name, call.raw) for call in first))
    await model.aclose()
    assert first
    second = [event.raw for event in again if isinstance(event, ToolCall)]
    assert second != [call.raw for call in first]


async def test_without_the_grammar_a_form_is_refused_rather_than_ignored() -> None:
    model = EngineModel.load("mini", grammar=False)
    with pytest.raises(ThinkloopError, match="grammar"):
        await turn(model, "is it?", [], response_format={"type": "json_object"})
    await model.aclose()


async def test_the_trace_says_what_a_schema_asks_that_the_grammar_cant_give() -> None:
    model = EngineModel.load("mini", sampling=Sampling(temperature=0))
    hard: Json = {"type": "object", "properties": {"query": {"type": "string"}}, "not": {"required": ["limit"]}}
    tool: Json = {"type": "function", "function": {"name": "search", "parameters": hard}}
    conversation = Conversation([{"role": "user", "content": "hello"}])
    told = [
        event
        for _ in range(2)
        async for event in model.stream(conversation, [tool], Turn(max_tokens=20))
        if isinstance(event, Error)
    ]
    await model.aclose()
    assert [(event.where, event.recovered) for event in told] == [("grammar: search", True)]


async def test_a_schema_that_takes_long_to_compile_holds_up_nobody_else() -> None:
    members = [
        {"type": "object", "properties": {f"p{i}_{j}": {"type": "string"} for j in range(40)}} for i in range(20)
    ]
    slow: Json = {"type": "function", "function": {"name": "slow", "parameters": {"anyOf": members}}}
    model, longest = EngineModel.load("mini"), 0.0

    async def watch() -> None:
        nonlocal longest
        while True:
            before = perf_counter()
            await anyio.sleep(0.01)
            longest = max(longest, perf_counter() - before)

    started = perf_counter()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(watch)
        await turn(model, "What is Palken's owner's island?", [slow])
        took = perf_counter() - started
        tasks.cancel_scope.cancel()
    await model.aclose()
    assert longest < took / 2


async def test_the_grammar_changes_nothing_for_a_model_that_writes_well() -> None:
    runs = []
    for grammar in (True, False):
        agent = tl.Agent("mini", [tl.Search(WORLD), tl.Python()], grammar=grammar, trace=False)
        async with agent, agent.stream(QUESTION) as events:
            runs.append([event.token_ids async for event in events if isinstance(event, TurnFinished)])
    assert runs[0] == runs[1]
