"""The remote model against a real server on loopback: what it sends, what it makes of what comes back."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from chat_server import ChatServer, Reply, call, delta, sse, status, stream, turn
from thinkloop.agent.markers import MarkerSplitter
from thinkloop.agent.model import Conversation, Model, Turn
from thinkloop.agent.remote_model import Prices, RemoteModel
from thinkloop.agent.turn import RESTARTED
from thinkloop.agent.wire import NO_RESULT, WireHistory, wire_name
from thinkloop.engine.http import Backoff
from thinkloop.engine.params import Sampling
from thinkloop.engine.reading import Timeouts
from thinkloop.engine.refusals import RemoteError, ServerUnreachable, StreamCut
from thinkloop.traces.events import (
    Content,
    Error,
    Event,
    Thinking,
    ThinkloopError,
    ToolCall,
    ToolCallDelta,
    TurnFinished,
    Usage,
)

TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": {"q": {}}}}}
    for name in ("search", "open_page")
]
QUICK = Backoff(first=0.001, most=0.01)


def model(server: ChatServer, **options: Any) -> RemoteModel:
    return RemoteModel(server.url, "kimi", **({"backoff": QUICK} | options))


async def take(remote: Model, conversation: Conversation, **turn_options: Any) -> list[Event]:
    return [event async for event in remote.stream(conversation, TOOLS, Turn(**turn_options))]


async def one(server: ChatServer, **options: Any) -> list[Event]:
    remote = model(server, **options)
    try:
        return await take(remote, Conversation([{"role": "user", "content": "hi"}]))
    finally:
        await remote.aclose()


def text(events: list[Any], kind: type[Thinking] | type[Content]) -> str:
    return "".join(event.text for event in events if isinstance(event, kind))


def calls(events: list[Any]) -> list[ToolCall]:
    return [event for event in events if isinstance(event, ToolCall)]


def wire(*messages: dict[str, Any]) -> list[dict[str, Any]]:
    return WireHistory().follow(Conversation(list(messages)))


def asked(call_id: str, name: str = "search", arguments: Any = "{}", **more: Any) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {"role": "assistant", "tool_calls": [{"id": call_id, "type": "function", "function": function}]} | more


def told(call_id: str, content: str = "found", name: str = "search") -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": call_id, "name": name, "content": content}


USER = {"role": "user", "content": "hi"}

# What is sent


@pytest.mark.parametrize("reasoning", ["", "I think"])
def test_thinking_is_sent_back_and_token_ids_are_not(reasoning: str) -> None:
    message = {"role": "assistant", "reasoning_content": reasoning, "content": "yes", "token_ids": [1, 2]}
    assert wire(USER, message) == [USER, {"role": "assistant", "reasoning_content": reasoning, "content": "yes"}]


def test_absent_thinking_stays_absent_but_is_never_missing_beside_a_call() -> None:
    assert wire({"role": "assistant", "content": "yes"}) == [{"role": "assistant", "content": "yes"}]
    assert wire(asked("functions.search:0"))[0]["reasoning_content"] == ""
    assert wire({"role": "assistant", "reasoning_content": None, "content": "x"})[0]["reasoning_content"] == ""


def test_ids_in_k2_form_are_kept_and_others_renamed_in_calls_and_results() -> None:
    sent = wire(USER, asked("functions.search:0"), told("functions.search:0"), asked("call_9f"), told("call_9f"))
    assert [m["tool_calls"][0]["id"] for m in sent if m["role"] == "assistant"] == [
        "functions.search:0",
        "functions.search:1",
    ]
    assert [m["tool_call_id"] for m in sent if m["role"] == "tool"] == ["functions.search:0", "functions.search:1"]


def test_an_id_used_twice_names_two_calls() -> None:
    again = [
        asked("functions.search:0"),
        told("functions.search:0", "one"),
        asked("functions.search:0"),
        told("functions.search:0", "two"),
    ]
    sent = wire(*again)
    assert [(m["tool_call_id"], m["content"]) for m in sent if m["role"] == "tool"] == [
        ("functions.search:0", "one"),
        ("functions.search:1", "two"),
    ]


def test_indices_go_on_after_old_steps_were_dropped() -> None:
    history = WireHistory()
    history.follow(Conversation([USER, asked("functions.search:57"), told("functions.search:57")]))
    assert history.next_index == 58


def test_empty_content_beside_calls_is_left_out() -> None:
    assert "content" not in wire(asked("a", content=""))[0]


@pytest.mark.parametrize("raw", ['{"q": "ato', "[1]", "null", "NaN", '{"a": 1}}', '{"a": "\n"}', "[" * 50_000])
def test_malformed_arguments_in_history_never_poison_a_request(raw: str) -> None:
    sent = wire(asked("a", arguments=raw))[0]["tool_calls"][0]["function"]["arguments"]
    assert json.loads(sent) == {"malformed_arguments": raw}


@pytest.mark.parametrize(
    ("given", "sent"), [('{ "q":1 }', '{ "q":1 }'), ("", "{}"), (None, "{}"), ({"q": 1}, '{"q":1}')]
)
def test_good_arguments_are_sent_as_they_were_written(given: Any, sent: str) -> None:
    assert wire(asked("a", arguments=given))[0]["tool_calls"][0]["function"]["arguments"] == sent


@pytest.mark.parametrize("name", ["", "a b\nc", "<|x|>", "über", "9lives", "x" * 100, "--"])
def test_an_impossible_tool_name_is_made_possible(name: str) -> None:
    import re

    assert re.fullmatch(r"[a-zA-Z_-][a-zA-Z0-9_-]{0,63}", wire_name(name))
    assert wire_name("search-web_2") == "search-web_2"


def test_a_call_without_a_result_gets_an_honest_one() -> None:
    sent = wire(USER, asked("a"), {"role": "user", "content": "and?"}, asked("b"))
    assert [m["role"] for m in sent] == ["user", "assistant", "tool", "user", "assistant", "tool"]
    assert sent[2]["content"] == sent[5]["content"] == NO_RESULT


def test_a_result_without_a_call_becomes_text() -> None:
    (sent,) = wire(told("gone", "42 islands"))
    assert sent["role"] == "user"
    assert "42 islands" in sent["content"]


def test_results_stay_beside_their_calls_whatever_stands_between() -> None:
    both = asked("a")
    both["tool_calls"].append(asked("b")["tool_calls"][0])
    sent = wire(both, told("gone"), told("b", "B"), told("a", "A"), USER)
    assert [m["role"] for m in sent] == ["assistant", "tool", "tool", "user", "user"]


def test_an_empty_assistant_message_is_not_sent() -> None:
    assert wire(USER, {"role": "assistant", "content": "", "reasoning_content": ""}) == [USER]


def test_following_a_conversation_gives_what_reading_it_anew_gives() -> None:
    messages = [USER, asked("a"), told("a"), asked("b"), USER, {"role": "assistant", "content": "done"}]
    history, conversation = WireHistory(), Conversation()
    for message in messages:
        conversation.messages.append(message)
        assert history.follow(conversation) == wire(*conversation.messages)


def test_a_new_epoch_or_another_conversation_is_read_anew() -> None:
    history, conversation = WireHistory(), Conversation([USER, asked("a"), told("a", "long")])
    history.follow(conversation)
    conversation.messages[2] = told("a", "hidden")
    conversation.epoch += 1
    assert history.follow(conversation)[2]["content"] == "hidden"
    assert history.follow(Conversation([USER])) == [USER]


def test_a_step_costs_the_same_at_any_length_of_history() -> None:
    def cost(length: int) -> float:
        history, conversation = WireHistory(), Conversation([USER])
        for n in range(length):
            conversation.messages += [asked(f"functions.search:{n}"), told(f"functions.search:{n}", "x" * 2000)]
        history.follow(conversation)
        best = 1.0
        for n in range(20):
            conversation.messages += [asked(f"functions.search:{length + n}"), told(f"functions.search:{length + n}")]
            started = time.perf_counter()
            history.follow(conversation)
            best = min(best, time.perf_counter() - started)
        return best

    assert cost(2000) < cost(50) + 0.0005  # 4,000 messages: copying the list of them takes 10 µs


@pytest.mark.anyio
async def test_limits_and_the_last_step_s_choice_are_sent() -> None:
    with ChatServer([turn(content="x")]) as server:
        remote = model(server, sampling=Sampling(temperature=0.5), seed=7)
        await take(remote, Conversation([USER]), max_tokens=99, tool_choice="none")
        await remote.aclose()
        body = server.posts[0].body
    assert (body["max_tokens"], body["tool_choice"], body["temperature"], body["seed"]) == (99, "none", 0.5, 7)
    assert body["tools"] == TOOLS


async def sampling_sent(**options: Any) -> dict[str, Any]:
    """The request's fields but for those that every request has."""
    with ChatServer([turn(content="x")]) as server:
        await one(server, **options)
        body = server.posts[0].body
    return {
        key: body[key]
        for key in body.keys() - {"model", "messages", "tools", "tool_choice", "stream", "stream_options"}
    }


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("options", "sent"),
    [
        ({}, {}),
        ({"seed": 0}, {"seed": 0}),
        ({"sampling": Sampling(), "seed": 7}, {"seed": 7}),
        ({"sampling": Sampling(temperature=1.0, top_p=1.0)}, {"temperature": 1.0, "top_p": 1.0}),
        ({"sampling": Sampling(presence_penalty=0.5, frequency_penalty=0.0)},
         {"presence_penalty": 0.5, "frequency_penalty": 0.0}),
        ({"sampling": Sampling(logit_bias={163606: -100, 5: 1.5})}, {"logit_bias": {"163606": -100, "5": 1.5}}),
        ({"sampling": Sampling(stop=("END", "\n\n"))}, {"stop": ["END", "\n\n"]}),
        ({"sampling": Sampling(top_k=20, min_p=0.05)}, {"top_k": 20, "min_p": 0.05}),
    ],
    ids=repr,
)  # fmt: skip
async def test_what_was_set_is_sent_and_the_rest_is_left_to_the_server(
    options: dict[str, Any], sent: dict[str, Any]
) -> None:
    assert await sampling_sent(**options) == sent


@pytest.mark.anyio
async def test_where_servers_differ_they_are_told_in_words_that_all_of_them_take() -> None:
    assert await sampling_sent(sampling=Sampling(top_k=0)) == {"top_k": -1}  # SGLang refuses 0
    both = {"repetition_penalty": 1.1, "repeat_penalty": 1.1}  # vLLM's and SGLang's name, llama.cpp's name
    assert await sampling_sent(sampling=Sampling(repetition_penalty=1.1)) == both


def test_the_record_says_what_was_set_and_nothing_else() -> None:
    described = RemoteModel("http://h", "kimi", sampling=Sampling(logit_bias={5: 1}), seed=3).describe()
    assert described["sampling"] == {"logit_bias": {"5": 1}, "seed": 3}
    assert RemoteModel("http://h", "kimi").describe()["sampling"] == {}


def test_a_seed_out_of_range_is_refused_before_anything_is_sent() -> None:
    with pytest.raises(ThinkloopError, match="`seed` is -1"):
        RemoteModel("http://h", "kimi", seed=-1)


# What comes back


@pytest.mark.anyio
async def test_foreign_ids_are_renamed_and_the_history_agrees_with_the_events() -> None:
    replies = [
        turn(thinking="hm", calls=[("search", {"q": 1}), ("open_page", {})]),
        turn(calls=[("search", {})]),
        turn(content="x"),
    ]
    conversation = Conversation([dict(USER)])
    with ChatServer(replies) as server:
        remote = model(server)
        for _ in range(3):
            events = await take(remote, conversation)
            made = [asked(c.id, c.name, c.raw)["tool_calls"][0] for c in calls(events)]
            conversation.messages.append(
                {"role": "assistant", "reasoning_content": text(events, Thinking), "content": "", "tool_calls": made}
            )
            conversation.messages += [told(c.id, "ok", c.name) for c in calls(events)]
        await remote.aclose()
        last = server.posts[-1].body["messages"]
    ids = ["functions.search:0", "functions.open_page:1", "functions.search:2"]
    assert [c["id"] for m in last for c in m.get("tool_calls", ())] == ids
    assert [m["tool_call_id"] for m in last if m["role"] == "tool"] == ids
    assert last[1]["reasoning_content"] == "hm"


@pytest.mark.anyio
async def test_every_turn_ends_with_usage_then_turn_finished() -> None:
    with ChatServer([turn(thinking="a", content="b", calls=[("search", {})])]) as server:
        events = await one(server)
    assert [type(event) for event in events[-2:]] == [Usage, TurnFinished]


@pytest.mark.anyio
async def test_a_malformed_call_comes_with_its_problem_and_raw_text() -> None:
    with ChatServer([turn(calls=[("search", '{"q": ')]), turn(content="x")]) as server:
        (got,) = calls(await one(server))
    assert (got.arguments, got.raw, got.id) == (None, '{"q": ', "functions.search:0")
    assert got.problem


@pytest.mark.anyio
async def test_a_turn_cut_in_the_middle_is_announced_and_asked_for_once_more() -> None:
    half = Reply(pieces=sse([delta(reasoning_content="lost thou")], done=False), cut=True)
    with ChatServer([half, turn(thinking="whole", content="answer")]) as server:
        events = await one(server)
    (error,) = [event for event in events if isinstance(event, Error)]
    assert (error.where, error.recovered) == (RESTARTED, True)
    assert "9 characters of thinking" in error.message
    after = events[events.index(error) :]
    assert (text(after, Thinking), text(after, Content)) == ("whole", "answer")


@pytest.mark.anyio
async def test_a_turn_cut_twice_is_an_error() -> None:
    half = Reply(pieces=sse([delta(content="half")], done=False), cut=True)
    with ChatServer([half]) as server:
        with pytest.raises(StreamCut):
            await one(server)
        assert len(server.posts) == 2


@pytest.mark.anyio
@pytest.mark.parametrize(
    "reply", [status(500), status(400), Reply(silent=True), Reply(pieces=[b"<html>"]), Reply(cut=True)]
)
async def test_what_can_t_be_had_is_a_thinkloop_error(reply: Reply) -> None:
    with ChatServer([reply]) as server, pytest.raises(ThinkloopError) as caught:
        await one(server, timeouts=Timeouts(idle=0.1))
    assert isinstance(caught.value, RemoteError)


@pytest.mark.anyio
async def test_a_server_that_is_down_is_a_thinkloop_error() -> None:
    with ChatServer([]) as server:
        pass
    with pytest.raises(ServerUnreachable):
        await one(server)


# Leaked markup

S, E, C, A, Z = (
    "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>", "<|tool_call_begin|>",
    "<|tool_call_argument_begin|>", "<|tool_call_end|>",
)  # fmt: skip
CALL = f'{C}functions.search:3{A}{{"q": "a<b"}}{Z}'


def split(*parts: tuple[str, str], step: int = 10_000) -> tuple[str, str, list[tuple[str, str]]]:
    splitter, out = MarkerSplitter(TOOLS), []
    for kind, whole in parts:
        for at in range(0, len(whole), step):
            out += splitter.feed(kind, whole[at : at + step])  # type: ignore[arg-type]  # a literal, from a table
    out += splitter.finish()
    return text(out, Thinking), text(out, Content), [(c.name, c.raw) for c in calls(out)]


FOUND = [("search", '{"q": "a<b"}')]
LEAKS = [
    pytest.param([("content", "<think>hm</think>yes")], ("hm", "yes", []), id="think tags in content"),
    pytest.param([("content", "\n<think>hm</think>yes")], ("hm", "\nyes", []), id="think tags after a newline"),
    pytest.param([("thinking", "hm"), ("content", "</think>")], ("hm", "</think>", []), id="a stray end stays"),
    pytest.param([("content", "The tag <think> opens")], ("", "The tag <think> opens", []), id="a tag that is quoted"),
    pytest.param([("content", f"I look{S}{CALL}{E}")], ("", "I look", FOUND), id="a section in content"),
    pytest.param([("thinking", f"I look{S}{CALL}{E}")], ("I look", "", FOUND), id="a section in thinking"),
    pytest.param([("content", f"<think>hm{S}{CALL}{E}")], ("hm", "", FOUND), id="a section in leaked thinking"),
    pytest.param([("content", CALL)], ("", "", FOUND), id="no section"),
    pytest.param([("content", f"{S}{CALL}{CALL}{E}bye")], ("", "bye", FOUND * 2), id="two calls, then text"),
    pytest.param([("content", f"{S}\n{CALL}\n{E}")], ("", "", FOUND), id="white space in between"),
    pytest.param([("content", CALL.replace(Z, ""))], ("", "", FOUND), id="no end"),
    pytest.param([("content", CALL.replace(Z, E))], ("", "", FOUND), id="ended by the section"),
    pytest.param([("content", CALL.replace(A, ""))], ("", "", FOUND), id="no argument marker"),
    pytest.param([("content", CALL.replace("functions.search:3", "search"))], ("", "", FOUND), id="a bare name"),
    pytest.param([("content", CALL.replace("a<b", Z))], ("", "", [("search", f'{{"q": "{Z}"}}')]), id="in a string"),
    pytest.param([("content", "hi<|im_end|>")], ("", "hi", []), id="end of message"),
    pytest.param([("content", f"The marker {S} opens.")], ("", f"The marker {S} opens.", []), id="a quoted marker"),
    pytest.param([("content", f"Use {C} and {A} so.")], ("", f"Use {C} and {A} so.", []), id="quoted call markers"),
    pytest.param([("content", f"{S}{E}")], ("", f"{S}{E}", []), id="an empty section"),
    pytest.param([("content", f"x{C}functions.sea")], ("", f"x{C}functions.sea", []), id="cut in the header"),
    pytest.param([("content", f"{C}{'y' * 400}{A}")], ("", f"{C}{'y' * 400}{A}", []), id="an endless header"),
    pytest.param([("content", "1 < 2 <| 3 <thin")], ("", "1 < 2 <| 3 <thin", []), id="half markers"),
    pytest.param([("thinking", "a <"), ("content", "think> b")], ("a <", "think> b", []), id="not across kinds"),
]  # fmt: skip


@pytest.mark.parametrize("step", [1, 2, 3, 7, 10_000])
@pytest.mark.parametrize(("parts", "expected"), LEAKS)
def test_leaked_markup_is_read_and_quoted_markup_kept(parts: Any, expected: Any, step: int) -> None:
    assert split(*parts, step=step) == expected


def test_a_leaked_call_that_was_cut_says_so() -> None:
    splitter = MarkerSplitter(TOOLS)
    splitter.feed("content", f'{S}{C}functions.search:0{A}{{"q": "ato')
    (got,) = calls(splitter.finish())
    assert (got.arguments, got.raw) == (None, '{"q": "ato')
    assert "cut off" in got.problem


def test_random_markup_loses_no_word() -> None:
    import random

    rng, parts = (
        random.Random(0),
        [S, E, C, A, Z, "<think>", "</think>", "functions.search:0", '{"q":1}', "w<", " ", "\n"],
    )
    for _ in range(1000):
        soup = "".join(rng.choice([*parts, f"word{n}"]) for n in range(rng.randrange(1, 12)))
        thought, said, made = split(("content", soup), step=rng.choice([1, 5, 1000]))
        given = thought + said + "".join(name + raw for name, raw in made)
        words = [word for word in (f"word{n}" for n in range(12)) if word in soup]
        # A word may have become the name of a call that isn't declared; it is there all the same.
        assert all(word in given for word in words), soup


@pytest.mark.anyio
async def test_leaked_calls_become_calls_with_ids_and_a_reason() -> None:
    with ChatServer([stream([delta(content=f"ok{S}{CALL}{CALL}{E}"), delta(finish="stop")])]) as server:
        events = await one(server)
    assert [c.id for c in calls(events)] == ["functions.search:0", "functions.search:1"]
    assert [e.index for e in events if isinstance(e, ToolCallDelta)] == [0, 1]
    assert events[-1] == TurnFinished(reason="tool_calls")


@pytest.mark.anyio
async def test_a_call_that_came_both_ways_is_one_call() -> None:
    chunks = [
        delta(content=f"{S}{CALL}{E}"),
        delta(tool_calls=[call(0, "search", '{"q": "a<b"}')], finish="tool_calls"),
    ]
    with ChatServer([stream(chunks)]) as server:
        assert len(calls(await one(server))) == 1


# Counting


@pytest.mark.anyio
async def test_counting_tokens_learns_from_usage_reports() -> None:
    with ChatServer([turn(content="x", usage={"prompt_tokens": 1000, "completion_tokens": 1})]) as server:
        remote = model(server)
        assert remote.count_tokens("x" * 400) == 100
        [e async for e in remote.stream(Conversation([{"role": "user", "content": "y" * 1980}]), [], Turn())]
        await remote.aclose()
        assert remote.count_tokens("x" * 400) == 200


@pytest.mark.anyio
@pytest.mark.parametrize(
    "lie", [{}, {"prompt_tokens": 1, "completion_tokens": 10**9}, {"prompt_tokens": 10**9}, {"prompt_tokens": -3}]
)
async def test_lying_usage_is_replaced_by_an_estimate(lie: Any) -> None:
    with ChatServer([turn(content="z" * 400, usage=lie)]) as server:
        remote = model(server)
        conversation = Conversation([{"role": "user", "content": "y" * 3980}])
        (usage,) = [e async for e in remote.stream(conversation, [], Turn()) if isinstance(e, Usage)]
        await remote.aclose()
    assert (usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens) == (1000, 100, 0)
    assert remote.count_tokens("x" * 400) == 100


@pytest.mark.anyio
async def test_prices_give_the_cost_of_a_turn() -> None:
    usage = {"prompt_tokens": 1000, "completion_tokens": 100, "cached_tokens": 600}
    with ChatServer([turn(content="x" * 400, usage=usage)]) as server:
        remote = model(server, prices=Prices(prompt=1.0, completion=10.0, cached=0.5))
        conversation = Conversation([{"role": "user", "content": "y" * 3980}])
        (got,) = [e async for e in remote.stream(conversation, [], Turn()) if isinstance(e, Usage)]
        await remote.aclose()
    assert got.cost == pytest.approx((400 * 1.0 + 600 * 0.5 + 100 * 10.0) / 1e6)


# Keys


@pytest.mark.anyio
async def test_the_key_comes_from_the_environment_and_is_never_described(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("THINKLOOP_API_KEY", raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-other")
    with ChatServer([turn(content="x")]) as server:
        await one(server)
        monkeypatch.setenv("THINKLOOP_API_KEY", "sk-ours")
        await one(server)
        monkeypatch.setenv("MINE", "sk-mine")
        await one(server, api_key_env="MINE")
        await one(server, api_key_env="UNSET")
        sent = [request.headers.get("authorization") for request in server.posts]
        assert sent == ["Bearer sk-other", "Bearer sk-ours", "Bearer sk-mine", None]
        described = model(server, sampling=Sampling()).describe()
    assert "sk-" not in json.dumps(described) + repr(model(server)) + repr(vars(model(server)))
    assert described["url"] == server.url + "/v1"


def test_a_server_without_a_model_name_says_how_to_give_one() -> None:
    with pytest.raises(ThinkloopError, match="--model-name"):
        RemoteModel("http://h", None)


def test_the_remote_model_loads_httpx_at_first_use_only() -> None:
    import subprocess
    import sys

    code = "import sys, thinkloop.agent.remote_model; print({'httpx', 'torch', 'pydantic'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
