"""What an MCP server's messages may cost: time of the loop, memory, processor time."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
from test_mcp_client import nothing_is_left_behind, plain, refusal, resident, say, start_failure, ticking  # noqa: F401

pytestmark = [pytest.mark.anyio, pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")]


@pytest.mark.parametrize(
    ("mode", "said"),
    [("bare-blocks", "1,000 parts left out: no valid content"), ("empty-blocks", "15,600 more parts left out")],
)
async def test_a_result_of_very_many_blocks_costs_little(mode: str, said: str) -> None:
    async with plain(mode) as server:
        await say(server, "pid")
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        before = resident("VmHWM")
        ticks = await ticking(say(server, "hello"))
    assert said in ticks.result.content
    assert resident("VmHWM") - before < 50_000_000
    assert ticks.longest < 0.4


@pytest.mark.parametrize("mode", ["bare-tools", "bare-properties"])
async def test_a_list_of_very_many_wrong_tools_costs_little(mode: str) -> None:
    ticks = await ticking(start_failure(plain(mode)))
    assert "its tool list can't be read: it sent something that is no valid MCP result" in ticks.result
    assert ticks.longest < 0.4


async def test_a_tool_after_the_last_that_is_offered_can_be_named() -> None:
    async with plain("many-tools") as server:
        assert len(server.tools()) == 256
        assert "cut there" in server.notes[0]
    async with plain("many-tools", only=["t399"]) as server:
        assert [tool.name for tool in server.tools()] == ["x_t399"]


async def test_a_long_text_of_commas_is_one_value() -> None:
    async with plain("table") as server:
        assert len((await say(server, "hello")).content) > 900_000


async def test_a_steady_stream_of_messages_ends_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("thinkloop.tools.mcp_messages.MAX_MESSAGES", 10)
    async with plain() as server:
        for number in range(8):
            await say(server, str(number))
        assert "more than 10 messages in a minute" in (await say(server, "hello")).content


async def test_values_in_many_messages_end_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("thinkloop.tools.mcp_messages.MAX_VALUES", 40)
    async with plain() as server:
        said = [(await say(server, "," * 30)).content for _ in range(30)]
    assert any("more than 800 values in 10 s" in text for text in said)


@pytest.mark.parametrize("mode", ["stderr", "dribble"])
async def test_endless_bytes_cost_little_processor_time(mode: str) -> None:
    async with plain(mode, deadline=1.5) as server:
        await say(server, "pid")
        before = time.process_time()
        assert "did not answer" in await refusal(server)
        assert time.process_time() - before < 0.4
