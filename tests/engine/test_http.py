"""The HTTP engine against a real server on loopback that behaves and misbehaves as told."""

from __future__ import annotations

import itertools
import json
import random
import time
from typing import Any

import anyio
import pytest
from chat_server import ChatServer, Reply, call, delta, sse, status, stream, turn
from thinkloop.engine.address import normal_url
from thinkloop.engine.call_form import parse_arguments
from thinkloop.engine.chunks import ReplyReader
from thinkloop.engine.http import Backoff, ChatClient, Timeouts, sampling_fields
from thinkloop.engine.params import Sampling
from thinkloop.engine.refusals import BadReply, ServerRefused, ServerUnreachable, StreamCut, seconds_of
from thinkloop.engine.sse import BadStream, SseDecoder
from thinkloop.traces.events import (
    Content,
    Event,
    Thinking,
    ThinkloopError,
    ToolCall,
    ToolCallDelta,
    TurnFinished,
    Usage,
)

MESSAGES = [{"role": "user", "content": "hi"}]
TOOLS = [{"type": "function", "function": {"name": "search", "parameters": {"type": "object"}}}]
QUICK = Backoff(first=0.001, most=0.01)


async def events_of(server: ChatServer, *, tools: Any = TOOLS, **options: Any) -> list[Event]:
    client = ChatClient(server.url, "kimi", **({"backoff": QUICK} | options))
    try:
        return [event async for event in client.stream(MESSAGES, tools)]
    finally:
        await client.aclose()


def text(events: list[Event], kind: type[Thinking] | type[Content]) -> str:
    return "".join(event.text for event in events if isinstance(event, kind))


def only(events: list[Event], kind: Any) -> Any:
    (event,) = [event for event in events if isinstance(event, kind)]
    return event


def read(*chunks: Any, tools: tuple[str, ...] = ()) -> tuple[list[Event], ReplyReader]:
    reader = ReplyReader(tools)
    return [event for chunk in chunks for event in reader.feed(chunk)], reader


# The event stream


STREAM = (
    ': hello\r\n\r\ndata: {"a": "Σé"}\r\n\r\ndata:{"b":\ndata: 2}\n\nid: 7\rdata: "🙂"\r\rdata: [DONE]\n\n'.encode()
)


def test_every_way_to_cut_a_stream_gives_the_same_payloads() -> None:
    for first, second in itertools.combinations(range(len(STREAM) + 1), 2):
        decoder = SseDecoder()
        got = [*decoder.feed(STREAM[:first]), *decoder.feed(STREAM[first:second]), *decoder.feed(STREAM[second:])]
        assert got + decoder.close() == [{"a": "Σé"}, {"b": 2}, "🙂"]
        assert decoder.done


def test_a_stream_comes_through_byte_by_byte() -> None:
    decoder = SseDecoder()
    assert [p for at in range(len(STREAM)) for p in decoder.feed(STREAM[at : at + 1])] == [{"a": "Σé"}, {"b": 2}, "🙂"]


def test_events_need_no_blank_line_between_them() -> None:
    assert SseDecoder().feed(b"data: 1\ndata: 2\n") == [1, 2]


def test_the_last_event_needs_no_end() -> None:
    decoder = SseDecoder()
    assert decoder.feed(b"data: 1") == []
    assert decoder.close() == [1]


def test_an_event_named_error_is_an_error() -> None:
    assert SseDecoder().feed(b'event: error\ndata: {"message": "no"}\n\n') == [{"error": {"message": "no"}}]


@pytest.mark.parametrize(
    "evil", [b"data: " + b"x" * 50, b"data: x\n" * 50, b":" * 50, b"data: x" + b"\ndata: " * 50 + b"y" * 30]
)
def test_a_line_or_event_past_the_limit_is_refused(evil: bytes) -> None:
    decoder = SseDecoder(max_line=40)
    with pytest.raises(BadStream, match="longer than 40 bytes"):
        decoder.feed(evil[:30]), decoder.feed(evil[30:])


def test_decoding_takes_linear_time_in_a_long_line_of_small_chunks() -> None:
    decoder, started = SseDecoder(), time.perf_counter()
    for _ in range(200_000):
        decoder.feed(b"aaaaaaaaaa")
    assert time.perf_counter() - started < 10  # 2 MB; joining at each chunk would copy 200 GB


# A turn


@pytest.mark.anyio
async def test_a_turn_streams_thinking_content_calls_usage_and_end_in_order() -> None:
    with ChatServer(
        [turn(thinking="let me see", content="I search", calls=[("search", {"query": "atolls"})])]
    ) as server:
        events = await events_of(server)
    kinds = [kind for kind, _ in itertools.groupby(type(event) for event in events)]
    assert kinds == [Thinking, Content, ToolCallDelta, ToolCall, Usage, TurnFinished]
    assert text(events, Thinking) == "let me see"
    assert text(events, Content) == "I search"
    assert only(events, ToolCall) == ToolCall(
        id="call_search_0", name="search", arguments={"query": "atolls"}, raw='{"query": "atolls"}'
    )
    assert (only(events, Usage).prompt_tokens, only(events, Usage).completion_tokens) == (100, 20)
    assert only(events, TurnFinished).reason == "tool_calls"


@pytest.mark.anyio
async def test_a_turn_sent_byte_by_byte_is_the_same_turn() -> None:
    whole = turn(thinking="Σ🙂", content="naïve", calls=[("search", {"query": "é"})])
    pieces = [bytes([byte]) for piece in whole.pieces if isinstance(piece, bytes) for byte in piece]
    with ChatServer([whole]) as one, ChatServer([Reply(pieces=pieces)]) as other:
        first, second = await events_of(one), await events_of(other)
    assert [e for e in first if not isinstance(e, Usage)] == [e for e in second if not isinstance(e, Usage)]


@pytest.mark.anyio
async def test_events_arrive_while_the_server_still_writes() -> None:
    reply = Reply(
        pieces=[*sse([delta(content="first")], done=False), 0.4, *sse([delta(finish="stop", content="last")])]
    )
    with ChatServer([reply]) as server:
        client, started = ChatClient(server.url, "kimi"), time.monotonic()
        seen = {e.text: time.monotonic() - started async for e in client.stream(MESSAGES) if isinstance(e, Content)}
        await client.aclose()
    assert seen["last"] - seen["first"] > 0.2


@pytest.mark.anyio
async def test_the_connection_is_used_again_for_the_next_turn() -> None:
    with ChatServer([turn(content="hi")]) as server:
        client = ChatClient(server.url, "kimi")
        for _ in range(3):
            [event async for event in client.stream(MESSAGES)]
        await client.aclose()
        assert (len(server.posts), server.connections) == (3, 1)


@pytest.mark.anyio
async def test_the_request_carries_what_was_asked_and_the_key() -> None:
    with ChatServer([turn(content="hi")]) as server:
        client = ChatClient(server.url + "/v1/", "kimi", api_key="k1 ".strip(), sampling=Sampling(top_p=0.95, seed=3))
        [event async for event in client.stream(MESSAGES, TOOLS, max_tokens=7, tool_choice="none")]
        await client.aclose()
        (request,) = server.posts
    assert request.path == "/v1/chat/completions"
    assert request.headers["authorization"] == "Bearer k1"
    assert request.body == {
        "model": "kimi", "messages": MESSAGES, "tools": TOOLS, "tool_choice": "none", "max_tokens": 7, "stream": True,
        "stream_options": {"include_usage": True}, "top_p": 0.95, "seed": 3,
    }  # fmt: skip


def test_without_sampling_the_server_s_defaults_apply() -> None:
    assert sampling_fields(None) == {}
    assert sampling_fields(Sampling(temperature=0.0)) == {"temperature": 0.0}


@pytest.mark.anyio
async def test_half_a_character_in_a_message_does_not_break_the_request() -> None:
    with ChatServer([turn(content="hi")]) as server:
        client = ChatClient(server.url, "kimi")
        [event async for event in client.stream([{"role": "user", "content": "a\ud83db"}])]
        await client.aclose()
        assert server.posts[0].body["messages"][0]["content"] == "a?b"


# Dialects


@pytest.mark.anyio
async def test_a_server_that_does_not_stream_is_understood() -> None:
    message = {"role": "assistant", "reasoning": "hm", "content": "42", "tool_calls": [call(0, "search", {"q": 1})]}
    body = {"choices": [{"message": message, "finish_reason": "stop"}], "usage": {"prompt_tokens": 5}}
    with ChatServer([status(200, body)]) as server:
        events = await events_of(server)
    assert (text(events, Thinking), text(events, Content)) == ("hm", "42")
    assert only(events, ToolCall).arguments == {"q": 1}
    assert only(events, TurnFinished).reason == "tool_calls"


@pytest.mark.anyio
@pytest.mark.parametrize("ending", [[], [{"choices": [], "usage": {"prompt_tokens": 9}}]])
async def test_a_missing_done_is_forgiven_when_the_turn_said_it_was_over(ending: list[Any]) -> None:
    with ChatServer([stream([delta(content="hi", finish="stop"), *ending], done=False)]) as server:
        assert text(await events_of(server), Content) == "hi"


@pytest.mark.anyio
async def test_a_finish_reason_that_stays_null_is_inferred() -> None:
    with ChatServer([stream([delta(content="hi")])]) as server:
        assert only(await events_of(server), TurnFinished).reason == "stop"


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
def test_both_names_of_reasoning_are_read(field: str) -> None:
    assert read(delta(**{field: "hm"}))[0] == [Thinking(text="hm")]


def test_reasoning_under_both_names_is_read_once() -> None:
    assert read(delta(reasoning_content="hm", reasoning="hm"))[0] == [Thinking(text="hm")]


@pytest.mark.parametrize(
    "chunk",
    [
        {"choices": [], "usage": {"prompt_tokens": 10, "completion_tokens": 4, "cached_tokens": 6}},
        {"choices": [{"usage": {"prompt_tokens": 10, "completion_tokens": 4, "cached_tokens": 6}}]},
        {"usage": {"prompt_tokens": 10, "completion_tokens": 4, "prompt_tokens_details": {"cached_tokens": 6}}},
    ],
)
def test_usage_is_found_wherever_it_is(chunk: Any) -> None:
    usage = read(chunk)[1].usage_event(0, 0)
    assert (usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens) == (10, 4, 6)


def test_lying_usage_is_no_report() -> None:
    lies = {"prompt_tokens": -5, "completion_tokens": float("inf"), "cached_tokens": "many", "reasoning_tokens": 1e99}
    usage = read({"usage": lies})[1].usage_event(0, 0)
    assert (usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens, usage.thinking_tokens) == (0, 0, 0, 0)
    assert read({"usage": {"prompt_tokens": 3, "cached_tokens": 999}})[1].usage_event(0, 0).cached_tokens == 3


def test_thinking_tokens_are_split_off_by_share_when_not_reported() -> None:
    usage = {"prompt_tokens": 1, "completion_tokens": 40}
    _, reader = read(delta(reasoning="t" * 30), delta(content="c" * 10), {"usage": usage})
    assert reader.usage_event(0, 0).thinking_tokens == 30


def test_a_character_cut_in_two_escapes_is_put_together() -> None:
    events, _ = read(delta(content="a\ud83d"), delta(content="\ude42b"))
    assert text(events, Content) == "a🙂b"


def fragment(index: int | None = None, call_id: str = "", name: str | None = None, arguments: Any = None) -> Any:
    made = {"index": index, "id": call_id, "function": {"name": name, "arguments": arguments}}
    return delta(tool_calls=[{key: value for key, value in made.items() if value not in (None, "")}])


CALL = [fragment(0, "a", "search", ""), fragment(0, arguments='{"q":'), fragment(0, arguments="1}")]


@pytest.mark.parametrize(
    "chunks",
    [
        pytest.param(CALL, id="as documented"),
        pytest.param([fragment(0, "a", "search", '{"q":'), fragment(0, "a", "search", "1}")], id="name repeated"),
        pytest.param([fragment(0, "a", "sea"), fragment(0, name="rch"), fragment(0, arguments='{"q":1}')], id="pieces"),
        pytest.param([fragment(0, "a", "sea"), fragment(0, name="search", arguments='{"q":1}')], id="name grown"),
        pytest.param([fragment(None, "a", "search", '{"q":'), fragment(None, arguments="1}")], id="no index"),
        pytest.param([fragment(0, "a", "search", {"q": 1})], id="arguments as an object"),
        pytest.param([fragment(0, "a", "search", {"q": 1}), fragment(0, "a", "search", {"q": 1})], id="object twice"),
    ],
)
def test_a_call_is_whole_however_it_was_sent(chunks: list[Any]) -> None:
    (got,) = read(*chunks, tools=("search",))[1].calls("tool_calls")
    assert got == ToolCall(id="a", name="search", arguments={"q": 1}, raw='{"q":1}')


@pytest.mark.parametrize("index", [0, None])
def test_calls_that_share_an_index_are_told_apart_by_id(index: int | None) -> None:
    chunks = [fragment(index, call_id, "search", json.dumps({"q": call_id})) for call_id in "abc"]
    assert [c.arguments for c in read(*chunks)[1].calls("stop")] == [{"q": "a"}, {"q": "b"}, {"q": "c"}]


def test_calls_written_side_by_side_keep_their_own_arguments() -> None:
    chunks = [
        fragment(0, "a", "x", '{"p":'),
        fragment(1, "b", "y", '{"q":'),
        fragment(0, arguments="1}"),
        fragment(1, arguments="2}"),
    ]
    assert [(c.name, c.arguments) for c in read(*chunks)[1].calls("stop")] == [("x", {"p": 1}), ("y", {"q": 2})]


def test_a_call_without_an_id_or_arguments_is_a_call() -> None:
    assert read(fragment(0, name="now"))[1].calls("stop") == [ToolCall(id="", name="now", arguments={}, raw="")]


def test_the_old_function_call_is_a_call() -> None:
    chunk = delta(function_call={"name": "search", "arguments": "{}"})
    assert [c.name for c in read(chunk)[1].calls("stop")] == ["search"]


def test_a_call_cut_by_the_token_limit_says_so() -> None:
    (got,) = read(fragment(0, "a", "search", '{"q": "ato'))[1].calls("length")
    assert got.arguments is None
    assert got.raw == '{"q": "ato'
    assert "cut off" in got.problem


@pytest.mark.parametrize(
    "raw", ["{", "[1]", '"x"', "NaN", '{"a": NaN}', "{'a': 1}", "[" * 100_000, "1" * 5000, '{"a":1}}']
)
def test_arguments_that_are_no_json_object_are_a_problem_not_an_error(raw: str) -> None:
    arguments, problem = parse_arguments(raw)
    assert arguments is None
    assert problem


JUNK: list[Any] = [
    None, 1, "x", [], {}, {"choices": None}, {"choices": [None, 3]}, {"usage": [1]},
    {"choices": [{"delta": {"content": 5, "tool_calls": [None, {}, {"index": "q", "function": 3}]}}]},
    {"choices": [{"delta": {"reasoning": ["x"], "content": [None, {"text": 3}]}, "finish_reason": 9}]},
]  # fmt: skip


def test_junk_chunks_are_passed_over() -> None:
    events, reader = read(*JUNK, delta(content="ok"))
    assert text(events, Content) == "ok"
    assert reader.usage_event(0, 0).prompt_tokens == 0


def test_a_server_that_begins_endless_calls_is_bounded() -> None:
    _, reader = read(*(fragment(n, str(n), "x", "{}") for n in range(2000)))
    assert len(reader.calls("stop")) == 512


# Failures, retries


@pytest.mark.anyio
@pytest.mark.parametrize("code", [408, 409, 429, 500, 502, 503, 529])
async def test_trouble_that_passes_is_tried_again(code: int) -> None:
    with ChatServer([status(code), status(code), turn(content="hi")]) as server:
        assert text(await events_of(server), Content) == "hi"
        assert len(server.posts) == 3


@pytest.mark.anyio
async def test_retries_end_and_say_how_often() -> None:
    with ChatServer([status(503, {"error": {"message": "no room"}})]) as server:
        with pytest.raises(ServerRefused, match=r"HTTP 503\): no room.*tried 3 times"):
            await events_of(server, max_retries=2)
        assert len(server.posts) == 3


@pytest.mark.anyio
async def test_retry_after_is_waited_for_up_to_the_cap() -> None:
    with ChatServer([status(429, headers={"Retry-After": "0.3"}), turn(content="hi")]) as server:
        started = time.monotonic()
        await events_of(server, backoff=Backoff(first=0.001, most=5))
        assert 0.3 <= time.monotonic() - started < 5
    with ChatServer([status(429, headers={"Retry-After": "86400"}), turn(content="hi")]) as server:
        started = time.monotonic()
        await events_of(server, backoff=Backoff(first=0.001, most=0.2))
        assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    ("header", "seconds"),
    [("7", 7), ("-1", 0), ("", None), ("soon", None), ("nan", None), ("Thu, 01 Jan 1970 00:00:00 GMT", 0)],
)
def test_retry_after_is_read_as_number_or_date(header: str, seconds: float | None) -> None:
    assert seconds_of(header) == seconds


def test_backoff_grows_is_random_and_capped() -> None:
    waits = [Backoff(first=1, most=8).seconds(attempt, None) for attempt in range(8)]
    assert all(2.0**n / 2 <= wait <= 2.0**n for n, wait in enumerate(waits[:4]))
    assert max(waits) <= 8
    assert len(set(waits)) == 8


@pytest.mark.anyio
@pytest.mark.parametrize("code", [400, 401, 403, 404, 413, 422])
async def test_a_wrong_request_is_not_repeated(code: int) -> None:
    with ChatServer([status(code, {"error": {"message": "it is wrong"}})]) as server:
        with pytest.raises(ServerRefused, match=rf"HTTP {code}\): it is wrong"):
            await events_of(server)
        assert len(server.posts) == 1


@pytest.mark.anyio
async def test_a_spent_quota_is_not_waited_for() -> None:
    with ChatServer([status(429, {"error": {"message": "no more", "type": "exceeded_current_quota_error"}})]) as server:
        with pytest.raises(ServerRefused, match="quota is spent"):
            await events_of(server)
        assert len(server.posts) == 1


@pytest.mark.anyio
async def test_a_missing_key_names_the_variable_to_set() -> None:
    with ChatServer([status(401)]) as server, pytest.raises(ServerRefused, match="environment variable MY_KEY"):
        await events_of(server, key_name="MY_KEY")


@pytest.mark.anyio
async def test_an_unknown_model_name_is_answered_with_the_server_s_names() -> None:
    wrong = status(404, {"error": {"message": "The model `kimi` does not exist"}})
    with (
        ChatServer([wrong], models=["other", "kimi-k2-thinking"]) as server,
        pytest.raises(ServerRefused, match="'kimi' is not among the server's models: kimi-k2-thinking, other"),
    ):
        await events_of(server)


@pytest.mark.anyio
async def test_a_server_that_echoes_the_key_does_not_leak_it() -> None:
    with (
        ChatServer([status(401, {"error": {"message": "bad key sk-secret"}})]) as server,
        pytest.raises(ServerRefused) as caught,
    ):
        await events_of(server, api_key="sk-secret")
    assert "sk-secret" not in str(caught.value)
    assert "***" in str(caught.value)


@pytest.mark.anyio
async def test_a_long_error_page_is_shortened() -> None:
    with ChatServer([status(400, b"<html>" + b"x" * 10**6)]) as server, pytest.raises(ServerRefused) as caught:
        await events_of(server)
    assert len(str(caught.value)) < 1000


@pytest.mark.anyio
async def test_a_server_that_does_not_know_stream_options_is_asked_without() -> None:
    with ChatServer([status(400, {"error": "unknown field stream_options"}), turn(content="hi")]) as server:
        assert text(await events_of(server), Content) == "hi"
        assert "stream_options" not in server.posts[1].body


@pytest.mark.anyio
async def test_an_error_object_in_place_of_an_answer_is_an_error() -> None:
    with (
        ChatServer([stream([{"error": {"message": "bad request", "code": 400}}])]) as server,
        pytest.raises(ServerRefused, match=r"error 400\): bad request"),
    ):
        await events_of(server)
    with ChatServer([stream([{"error": {"message": "busy", "code": 429}}]), turn(content="hi")]) as server:
        assert text(await events_of(server), Content) == "hi"


@pytest.mark.anyio
async def test_an_error_object_in_the_middle_cuts_the_stream() -> None:
    with (
        ChatServer([stream([delta(content="half"), {"error": {"message": "died"}}])]) as server,
        pytest.raises(StreamCut, match="died") as caught,
    ):
        await events_of(server)
    assert caught.value.content_chars == 4


@pytest.mark.anyio
async def test_a_server_that_is_down_is_named_with_what_to_do() -> None:
    with ChatServer([]) as server:
        pass
    with pytest.raises(ServerUnreachable, match=rf"{server.url}.*Check that the server runs.*tried 2 times"):
        await events_of(server, max_retries=1)


@pytest.mark.anyio
@pytest.mark.parametrize("whole", [False, True])
async def test_a_stream_cut_in_the_middle_says_how_far_it_got(whole: bool) -> None:
    pieces = [*sse([delta(reasoning_content="abc"), delta(content="de"), fragment(0, "a", "search", "{")], done=False)]
    with ChatServer([Reply(pieces=pieces, cut=not whole)]) as server:
        with pytest.raises(StreamCut, match="3 characters of thinking, 2 of text and 1 calls") as caught:
            await events_of(server)
        assert len(server.posts) == 1
    assert (caught.value.thinking_chars, caught.value.content_chars, caught.value.calls) == (3, 2, 1)


@pytest.mark.anyio
async def test_a_stream_cut_before_anything_came_is_tried_again() -> None:
    with ChatServer([Reply(cut=True), Reply(pieces=[b": ping\n\n"]), Reply(), turn(content="hi")]) as server:
        assert text(await events_of(server), Content) == "hi"
        assert len(server.posts) == 4


@pytest.mark.anyio
async def test_a_web_page_is_no_chat_server() -> None:
    page = Reply(headers={"Content-Type": "text/html"}, pieces=[b"<!DOCTYPE html><p>Welcome"])
    with ChatServer([page]) as server:
        with pytest.raises(BadReply, match=r"text/html.*Check that the URL"):
            await events_of(server)
        assert len(server.posts) == 1


@pytest.mark.anyio
async def test_a_wrong_content_type_on_a_good_stream_is_forgiven() -> None:
    good = turn(content="hi")
    with ChatServer([Reply(headers={"Content-Type": "text/html"}, pieces=good.pieces)]) as server:
        assert text(await events_of(server), Content) == "hi"


@pytest.mark.anyio
async def test_a_huge_line_is_refused() -> None:
    with (
        ChatServer([Reply(pieces=[b"data: ", *([b"x" * 2**16] * 80)])]) as server,
        pytest.raises(BadReply, match="longer than 4,194,304 bytes"),
    ):
        await events_of(server)


@pytest.mark.anyio
async def test_an_endless_reply_is_refused() -> None:
    with (
        ChatServer([Reply(pieces=sse([delta(content="x" * 1000)] * 200))]) as server,
        pytest.raises(BadReply, match="more than 100,000 bytes"),
    ):
        await events_of(server, max_reply=100_000)


@pytest.mark.anyio
async def test_a_compressed_reply_is_not_unpacked() -> None:
    with (
        ChatServer([Reply(headers={"Content-Encoding": "gzip"}, pieces=[b"\x1f\x8b"])]) as server,
        pytest.raises(BadReply, match="compressed"),
    ):
        await events_of(server)


@pytest.mark.anyio
async def test_a_silent_server_is_given_up_on() -> None:
    with (
        ChatServer([Reply(silent=True)]) as server,
        pytest.raises(ServerUnreachable, match=r"did not begin to answer within 0\.1 s.*tried 2 times"),
    ):
        await events_of(server, timeouts=Timeouts(idle=0.1))


@pytest.mark.anyio
@pytest.mark.parametrize("drip", [b": ping\n\n", b"x", b'data: {"choices": []}\n\n'])
async def test_keep_alives_do_not_keep_a_dead_turn_alive(drip: bytes) -> None:
    with ChatServer([Reply(pieces=[*sse([delta(content="hi")], done=False), *[0.02, drip] * 500])]) as server:
        started = time.monotonic()
        with pytest.raises(StreamCut, match=r"nothing came for 0\.3 s"):
            await events_of(server, timeouts=Timeouts(idle=0.3))
        assert time.monotonic() - started < 5


@pytest.mark.anyio
async def test_a_turn_that_never_ends_is_ended() -> None:
    words = [piece for word in sse([delta(content="hi")] * 100, done=False) for piece in (0.02, word)]
    with ChatServer([Reply(pieces=words)]) as server, pytest.raises(StreamCut, match=r"longer than 0\.3 s"):
        await events_of(server, timeouts=Timeouts(turn=0.3))


@pytest.mark.anyio
async def test_the_key_does_not_follow_a_redirect_to_another_place() -> None:
    with ChatServer([turn(content="stolen")]) as thief:
        moved = status(307, headers={"Location": thief.url + "/v1/chat/completions"})
        with ChatServer([moved]) as server, pytest.raises(BadReply, match="another origin: the key is not sent there"):
            await events_of(server, api_key="sk-secret")
        assert thief.requests == []


@pytest.mark.anyio
async def test_a_redirect_on_the_same_server_is_followed_and_circles_end() -> None:
    moved = status(308, headers={"Location": "/v2/chat/completions"})
    with ChatServer([moved, turn(content="hi")]) as server:
        assert text(await events_of(server), Content) == "hi"
        assert server.posts[1].path == "/v2/chat/completions"
    with ChatServer([moved]) as server, pytest.raises(BadReply, match="in circles"):
        await events_of(server)


@pytest.mark.anyio
async def test_cancelling_stops_at_once() -> None:
    with ChatServer([Reply(pieces=[*sse([delta(content="hi")], done=False), 5.0])]) as server:
        started = time.monotonic()
        with anyio.move_on_after(0.2) as scope:
            await events_of(server)
        assert scope.cancelled_caught
        assert time.monotonic() - started < 3


def test_one_client_serves_one_event_loop_after_another() -> None:
    with ChatServer([turn(content="hi")]) as server:
        client = ChatClient(server.url, "kimi")

        async def ask() -> str:
            return text([event async for event in client.stream(MESSAGES)], Content)

        assert [anyio.run(ask), anyio.run(ask)] == ["hi", "hi"]


def garbage(rng: random.Random) -> bytes:
    """A stream that was good until someone changed it."""
    whole = turn(thinking="hm", content="yes", calls=[("search", {"q": 1})])
    good = b"".join(piece for piece in whole.pieces if isinstance(piece, bytes))
    values = [b"null", b"[]", b"-1", b'"x"', b"{}", b"1e999", b"\xff", b"\n\n", b"\r", b"data:", b"[DONE]", b"\\ud83d"]
    for _ in range(rng.randrange(1, 6)):
        at = rng.randrange(len(good))
        good = good[:at] + rng.choice(values) + good[at + rng.randrange(8) :]
    return good


@pytest.mark.anyio
async def test_garbage_gives_events_or_a_helpful_error_and_nothing_else() -> None:
    rng = random.Random(0)
    ends = 0
    with ChatServer([Reply(pieces=[garbage(rng)]) for _ in range(60)]) as server:
        client = ChatClient(server.url, "kimi", max_retries=0)
        for _ in range(60):
            try:
                events = [event async for event in client.stream(MESSAGES, TOOLS)]
            except ThinkloopError:
                continue
            assert [type(event) for event in events[-2:]] == [Usage, TurnFinished]
            "".join(e.text for e in events if isinstance(e, Thinking | Content)).encode()
            ends += 1
        await client.aclose()
    assert 0 < ends < 60


# Addresses and keys


@pytest.mark.parametrize(
    "url", ["http://h:1", "http://h:1/", "http://h:1/v1", " http://h:1/v1// ", "http://h:1/v1/chat/completions"]
)
def test_the_url_may_be_given_in_any_form(url: str) -> None:
    assert normal_url(url) == "http://h:1/v1"


@pytest.mark.parametrize("url", ["https://h/api/paas/v4", "https://h/v1beta/openai"])
def test_a_versioned_path_is_kept(url: str) -> None:
    assert normal_url(url) == url


@pytest.mark.parametrize(
    "url", ["", "h/v1", "ftp://h", "http://", "http://h:99999", "http://[", "http://u:p@h", "http://h?key=1"]
)
def test_what_is_no_address_is_refused_with_an_example(url: str) -> None:
    with pytest.raises(ThinkloopError, match=r"https://api\.example\.com/v1"):
        normal_url(url)


@pytest.mark.parametrize("key", ["sk-a\nsk-b", "sk-ä", "sk a"])
def test_a_broken_key_is_refused_without_showing_it(key: str) -> None:
    with pytest.raises(ThinkloopError, match="The API key in THINKLOOP_API_KEY") as caught:
        ChatClient("http://h", "m", api_key=key)
    assert key not in str(caught.value)
