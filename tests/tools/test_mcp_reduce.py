"""What is left of an MCP server's messages when they reach the SDK, and how they are measured."""

from __future__ import annotations

from typing import Any

import pytest
from mcp_types import ErrorData, JSONRPCError, JSONRPCNotification, JSONRPCRequest, JSONRPCResponse
from thinkloop.tools.mcp_messages import values_in
from thinkloop.tools.mcp_reduce import MAX_BLOCKS, reduce_message
from thinkloop.tools.mcp_text import clean


@pytest.mark.parametrize(
    ("text", "values"),
    [
        (b'{"a":[1,2]}', 3),
        (b'{"a":"' + b"," * 60_000 + b'"}', 1),
        (b'{"a":"' + b'\\",' * 60_000 + b'"}', 1),
        (b'{"a":"\\\\",' + b"0," * 60_000 + b"0}", 60_002),
        (b'"",' * 120_000, 120_000),
    ],
)
def test_values_are_counted_outside_texts(text: bytes, values: int) -> None:
    assert values_in(text) == values


def response(**result: Any) -> JSONRPCResponse:
    return JSONRPCResponse(jsonrpc="2.0", id=1, result=result)


def test_what_is_read_of_a_result_is_kept() -> None:
    blocks = [
        {"type": "text", "text": "a"},
        {"type": "image", "data": "QQ==", "mimeType": "image/png"},
        {"type": "audio", "data": "QQ==", "mimeType": "audio/wav"},
        {"type": "resource", "resource": {"uri": "a:b", "text": "c", "mimeType": "text/plain"}},
        {"type": "resource", "resource": {"uri": "a:b", "blob": "QQ=="}},
        {"type": "resource_link", "name": "n", "uri": "a:b"},
    ]
    extra = {"annotations": {"audience": ["user"]}, "_meta": {"a": 1}}
    message = response(
        content=[{**block, **extra} for block in blocks],
        structuredContent={"x": [0] * 5000},
        isError=True,
        _meta={"a": 1},
    )
    assert reduce_message(message)
    assert message.result == {
        "content": blocks, "structuredContent": {"x": [0] * 5000}, "isError": True, "_meta": {"a": 1},
    }  # fmt: skip


@pytest.mark.parametrize(
    "block",
    [
        1, {}, {"type": []}, {"type": "text"}, {"type": "text", "text": 1}, {"type": "resource", "resource": {"uri": "a:b"}},
        {"type": "image", "data": "QQ=="}, {"type": "resource", "resource": []}, {"type": "hologram"},
    ],
)  # fmt: skip
def test_a_block_that_is_none_is_left_out_and_the_others_kept(block: Any) -> None:
    message = response(content=[{"type": "text", "text": "a"}, block])
    reduce_message(message)
    assert [part["text"] for part in message.result["content"]] == ["a", "[1 parts left out: no valid content]"]


def test_everything_else_is_left_out_where_it_is_large() -> None:
    many = [0] * 2000
    answer = response(capabilities={"experimental": many}, serverInfo={"name": "x", "icons": many}, content={"a": many})
    request = JSONRPCRequest(jsonrpc="2.0", id=1, method="sampling/createMessage", params={"messages": many})
    note = JSONRPCNotification(jsonrpc="2.0", method="a", params={"b": many})
    error = JSONRPCError(jsonrpc="2.0", id=1, error=ErrorData(code=1, message="m", data=many))
    assert [reduce_message(message) for message in (answer, request, note, error)] == [True, True, False, True]
    assert (answer.result, request.params, error.error.data) == ({}, {}, None)


def test_a_result_of_endless_blocks_keeps_the_first() -> None:
    message = response(content=[{"type": "text", "text": "a"}] * 5000)
    reduce_message(message)
    assert len(message.result["content"]) == MAX_BLOCKS + 1
    assert message.result["content"][-1]["text"] == "[4,000 more parts left out]"


def test_invisible_characters_are_removed() -> None:
    hidden = "\U000e0100\U000e01ef\u00ad\u206a\u206f\u180e\ufff9\ufffb\u202e\U000e0041"
    assert clean(f"a{hidden}b\x1b[31m") == "ab"
