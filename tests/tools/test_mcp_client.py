"""MCP servers on our terms: real ones over stdio and loopback HTTP, and ones that misbehave on purpose."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest
from thinkloop.tools.mcp_client import MCP
from thinkloop.tools.tool import Output, Tool, ToolError, Toolset
from thinkloop.traces.events import ThinkloopError

pytestmark = [pytest.mark.anyio, pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")]

SERVERS = Path(__file__).parent.parent / "mcp_servers"
PLAIN = [sys.executable, "-I", "-S", str(SERVERS / "plain.py")]
SHOP = [sys.executable, str(SERVERS / "shop.py")]


def plain(mode: str = "good", *arguments: str, **options: Any) -> MCP:
    return MCP(**{"name": "x", "command": [*PLAIN, mode, *arguments], "deadline": 5.0} | options)


def tool(server: MCP, name: str = "echo") -> Tool:
    return next(tool for tool in server.tools() if tool.name == f"{server.name}_{name}")


async def say(server: MCP, text: str) -> Output:
    return await tool(server).call({"text": text})


async def refusal(server: MCP, text: str = "hello") -> str:
    with pytest.raises(ToolError) as refused:
        await say(server, text)
    return str(refused.value)


async def start_failure(server: MCP) -> str:
    with pytest.raises(ThinkloopError) as failed:
        async with server:
            pass
    return str(failed.value)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


async def gone(*pids: int) -> bool:
    with anyio.move_on_after(3):
        while any(map(alive, pids)):
            await anyio.sleep(0.02)
    return not any(map(alive, pids))


def running() -> set[str]:
    """Tasks of this loop other than the test runner's, descriptors and children of this process."""
    tasks = {str(task.get_coro()) for task in asyncio.all_tasks() if "TestRunner" not in str(task.get_coro())}
    children = Path("/proc/self/task", str(os.getpid()), "children").read_text().split()
    return tasks | {f"child {pid}" for pid in children} | {path.name for path in Path("/proc/self/fd").iterdir()}


@pytest.fixture(autouse=True)
async def nothing_is_left_behind() -> AsyncIterator[None]:
    before = running()
    yield
    with anyio.move_on_after(3):
        while not running() <= before:
            await anyio.sleep(0.02)
    assert running() <= before


# What a server offers


async def test_a_server_made_with_the_sdk_gives_its_tools_and_results() -> None:
    async with MCP(name="shop", command=SHOP) as shop:
        assert isinstance(shop, Toolset)
        assert all(isinstance(tool, Tool) for tool in shop.tools())
        price = tool(shop, "price")
        assert price.description == "What something costs."
        assert price.parameters["required"] == ["item"]
        assert (price.effect, tool(shop, "order").effect) == ("read", "write")
        result = await price.call({"item": "tea", "count": 2})
        assert (result.content, result.ok) == ("tea: 6", True)
        assert result.record == {"server": "shop", "tool": "price", "hash": shop.hash, "protocol": "2025-11-25"}
        picture = await tool(shop, "picture").call({})
        assert picture.content == "the shop\n[image/png, 8 bytes: kept as picture-1.png]"
        assert [(file.name, file.media_type, file.data[:4]) for file in picture.files] == [
            ("picture-1.png", "image/png", b"\x89PNG")
        ]
        failed = await tool(shop, "fail").call({})
        assert not failed.ok
        assert "fail" in failed.content


async def test_the_effect_may_be_set_instead_of_trusting_the_server() -> None:
    async with plain(effect="read") as server:
        assert tool(server).effect == "read"
    async with plain() as server:
        assert tool(server).effect == "write"


async def test_a_server_that_speaks_only_the_newest_protocol_is_understood() -> None:
    async with plain("modern") as server:
        result = await say(server, "hello")
    assert (result.content, result.record["protocol"]) == ("modern", "2026-07-28")


async def test_lines_that_are_no_messages_before_the_first_one_do_no_harm() -> None:
    async with plain("banner") as server:
        assert (await say(server, "hello")).content == "hello"


async def test_unusable_definitions_are_left_out_and_named() -> None:
    async with plain("schemas") as server:
        names = [tool.name for tool in server.tools()]
        notes = "\n".join(server.notes)
        descriptions = {tool.name: tool.description for tool in server.tools()}
    assert names == ["x_fine", "x_a_b", "x_wordy"]
    for reason in ("'remote' is left out: its schema can't be used: it refers to", "'immense' is left out: its schema has",
                   "'odd' is left out: its schema has a name with control characters", "'slow' is left out",
                   "'a/b' is left out: as 'x_a_b' it can't be told from 'a.b'", "second tool 'fine'",
                   "longer than 128 characters"):  # fmt: skip
        assert reason in notes
    assert descriptions["x_fine"] == "Fine. Really."
    assert len(descriptions["x_wordy"]) < 4100


async def test_an_endless_list_is_cut() -> None:
    async with plain("pages") as server:
        assert len(server.tools()) == 50
        assert "cut there" in server.notes[0]


async def test_only_the_named_tools_are_offered() -> None:
    async with plain("schemas", only=["a/b", "missing"]) as server:
        assert [tool.name for tool in server.tools()] == ["x_a_b"]
        assert server.notes == ["there is no tool 'missing', which `only` names"]


# Starting


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["no-such-program-here"], "the program 'no-such-program-here' was not found"),
        ([*PLAIN, "exits"], "exit 1: no licence found"),
        ([*PLAIN, "refuses"], "it refused the MCP handshake: licence expired (-32000)"),
        ([*PLAIN, "garbage"], "no MCP messages"),
        ([*PLAIN, "dies-listing"], "it ended before it gave its tool list: exit 4"),
        ([*PLAIN, "array"], "its tool list can't be read"),
        (["cat"], "it refused the MCP handshake"),
        (["false"], "exit 1"),
    ],
)
async def test_a_server_that_does_not_start_says_why(command: list[str], said: str) -> None:
    message = await start_failure(MCP(name="x", command=command, deadline=5))
    assert message.startswith("The MCP server 'x' can't be used: ")
    assert said in message
    assert "\x1b" not in message


async def test_a_server_that_says_nothing_is_given_up_in_time_and_ended() -> None:
    started = time.monotonic()
    assert "did not answer the MCP handshake within 0.3 s" in await start_failure(plain("silent", deadline=0.3))
    assert time.monotonic() - started < 2.5


async def test_cancelling_the_start_leaves_nothing() -> None:
    with anyio.move_on_after(0.2) as scope:
        async with plain("silent"):
            pass
    assert scope.cancelled_caught


# Deadlines and ends


async def test_a_call_that_never_returns_is_cancelled_in_time_and_the_server_told() -> None:
    async with plain("never", deadline=0.3) as server:
        started = time.monotonic()
        message = await refusal(server)
        assert time.monotonic() - started < 1
        assert message.startswith("the MCP server 'x' did not answer within 0.3 s (echo)")
        assert json.loads((await say(server, "cancelled?")).content) != []


async def test_cancelling_a_call_tells_the_server_and_leaves_it_usable() -> None:
    async with plain("never") as server:
        with anyio.move_on_after(0.2) as scope:
            await say(server, "hello")
        assert scope.cancelled_caught
        assert json.loads((await say(server, "cancelled?")).content) != []


async def test_the_deadline_holds_when_the_server_no_longer_reads() -> None:
    """The SDK then waits up to 5 s, shielded, to send its note of the cancellation."""
    async with plain("deaf", deadline=0.3) as server:
        pid = int((await say(server, "pid")).content)
        with anyio.move_on_after(0.1):
            await say(server, "hello")
        started = time.monotonic()
        assert "did not answer within 0.3 s" in await refusal(server, "a" * 1_000_000)
        assert time.monotonic() - started < 3
        assert await gone(pid)


async def test_the_end_of_a_server_is_told_at_once_and_it_is_started_again_once() -> None:
    async with plain() as server:
        await say(server, "hello")
        started = time.monotonic()
        cut = await say(server, "die")
        assert time.monotonic() - started < 1
        assert not cut.ok
        assert cut.content == (
            "error: the MCP server 'x' ended (exit 3: out of luck); it is being started again. "
            "The call was cut off; whether it took effect is not known."
        )
        assert cut.record["stderr"] == "out of luck\n"
        again = await say(server, "hello")
        assert again.content.startswith(
            "[the MCP server 'x' ended (exit 3: out of luck) and was started again; what it"
        )
        assert again.content.endswith("]\nhello")
        assert (await say(server, "hello")).content == "hello"
        assert "it is not used any more in this run" in (await say(server, "die")).content
        assert "ended again (exit 3: out of luck)" in await refusal(server)


async def test_an_end_between_calls_is_noticed_without_one() -> None:
    async with plain() as server:
        pid = int((await say(server, "pid")).content)
        os.kill(pid, 9)
        with anyio.fail_after(3):
            while not server.notes:
                await anyio.sleep(0.02)
        again = await say(server, "hello")
        assert again.content.startswith("[the MCP server 'x' ended (killed by SIGKILL) and was started again")


async def test_a_server_that_cannot_be_started_again_is_given_up(tmp_path: Path) -> None:
    async with plain("dies-again", str(tmp_path / "state")) as server:
        await say(server, "die")
        assert "exit 4" in await refusal(server)
        assert "not used any more" in await refusal(server)


async def test_a_server_that_closes_its_output_but_lives_on_is_ended() -> None:
    async with plain("closed") as server:
        pid = int((await say(server, "pid")).content)
        assert "ended (it closed the connection)" in (await say(server, "hello")).content
        assert await gone(pid)


async def test_nothing_that_a_server_started_outlives_it(tmp_path: Path) -> None:
    async with plain("children", str(tmp_path / "state")):
        pids = [int(pid) for pid in (tmp_path / "state.pids").read_text().split()]
        assert all(map(alive, pids))
    assert await gone(*pids)


async def test_a_daemon_of_a_server_ends_with_it(tmp_path: Path) -> None:
    async with plain("daemon", str(tmp_path / "state")):
        with anyio.fail_after(3):
            while not (tmp_path / "state.pid").exists() or not (tmp_path / "state.pid").read_text():
                await anyio.sleep(0.02)
        pid = int((tmp_path / "state.pid").read_text())
        assert alive(pid)
    assert await gone(pid)


async def test_calls_side_by_side_get_their_own_answers() -> None:
    async with plain("slow") as server:
        results: dict[str, str] = {}

        async def ask(text: str) -> None:
            results[text] = (await say(server, text)).content

        async with anyio.create_task_group() as group:
            for number in range(5):
                group.start_soon(ask, str(number))
    assert results == {str(number): str(number) for number in range(5)}


async def test_it_can_be_entered_again() -> None:
    server = plain()
    for _ in range(2):
        async with server:
            assert (await say(server, "hello")).content == "hello"
    assert "not running" in await refusal(server)


# What a server sends


@pytest.mark.parametrize(
    ("mode", "said"),
    [
        ("gigantic", "a line of more than 16 MB"),
        ("values", "a message with more than 50,000 values"),
        ("flood", "more than 2,000 messages in a second"),
        ("answers", "more than 2,000 messages in a second"),
        ("requests", "requests without reading the answers"),
    ],
)
async def test_what_would_take_the_memory_or_the_loop_ends_the_server(mode: str, said: str) -> None:
    async with plain(mode) as server:
        await say(server, "pid")
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        before = resident("VmHWM")
        ticks = await ticking(say(server, "hello"))
        assert said in ticks.result.content
        assert resident("VmHWM") - before < 200_000_000
        assert ticks.longest < 1.0


class Ticks:
    result: Any = None
    longest = 0.0


async def ticking(work: Any) -> Ticks:
    """The result, and the longest time that the loop did nothing else."""
    ticks = Ticks()

    async def tick() -> None:
        while True:
            started = time.monotonic()
            await anyio.sleep(0.01)
            ticks.longest = max(ticks.longest, time.monotonic() - started)

    async with anyio.create_task_group() as group:
        group.start_soon(tick)
        ticks.result = await work
        group.cancel_scope.cancel()
    return ticks


def resident(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


@pytest.mark.parametrize(("mode", "content"), [("twice", "first"), ("pattern", "matched")])
async def test_odd_messages_are_survived(mode: str, content: str) -> None:
    async with plain(mode) as server:
        assert (await say(server, "hello")).content == content
        assert (await say(server, "pid")).ok


async def test_an_answer_that_cannot_be_read_ends_the_call_at_once() -> None:
    async with plain("deep") as server:
        started = time.monotonic()
        assert "sent an answer that can't be read: nested too deeply" in await refusal(server)
        assert time.monotonic() - started < 1
        assert (await say(server, "pid")).ok


async def test_a_result_that_is_none_is_told() -> None:
    async with plain("malformed") as server:
        assert "no valid MCP result" in await refusal(server)
        assert (await say(server, "pid")).ok


async def test_text_is_cleaned_and_cut() -> None:
    async with plain("escapes") as server:
        assert (await say(server, "hello")).content == "plaintxt"
    async with plain("huge-text") as server:
        content = (await say(server, "hello")).content
    assert len(content) < 1_000_100
    assert content.endswith("[2,000,000 more characters left out]")


async def test_files_are_bounded_and_bad_ones_left_out() -> None:
    async with plain("image") as server:
        result = await say(server, "hello")
    assert [len(file.data) for file in result.files] == [8]
    assert "10,500,000 bytes: left out, too large or too many" in result.content
    assert "[application/octet-stream: left out, its data is no base64]" in result.content


async def test_what_a_server_asks_of_us_is_declined() -> None:
    async with plain("asks") as server:
        answers = json.loads((await say(server, "hello")).content)
    assert all("error" in answer and "result" not in answer for answer in answers)
    assert len(answers) == 4


async def test_stderr_stays_off_the_terminal_and_only_its_end_is_kept(capfd: pytest.CaptureFixture[str]) -> None:
    async with plain() as server:
        assert (await say(server, "stderr")).content == "noisy"
        stderr = (await say(server, "die")).record["stderr"]
    assert stderr.endswith("the endout of luck\n")
    assert len(stderr) <= 65536
    assert capfd.readouterr() == ("", "")


async def test_a_server_gets_a_minimal_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_KEY", "hush")
    async with plain(env={"WANTED": "yes"}) as server:
        seen = json.loads((await say(server, "where")).content)["env"]
    assert seen.keys() - {"LC_CTYPE"} <= {"PATH", "HOME", "LANG", "WANTED"}
    assert seen["WANTED"] == "yes"


# Pins and changed lists


async def test_a_pin_lets_the_same_list_through_and_refuses_another() -> None:
    async with plain() as server:
        pin = server.hash
    async with plain(pin=pin) as server:
        assert (await say(server, "hello")).record["hash"] == pin
    message = await start_failure(plain(pin="0" * 32))
    assert "0" * 32 in message
    assert pin in message


async def test_a_list_that_changes_while_running_is_announced_and_its_changed_tools_refused() -> None:
    async with plain("rug") as server:
        assert (await say(server, "hello")).content == "hello"
        message = await refusal(server)
        assert message.startswith("'echo' of the MCP server 'x' is refused from now on: its description changed")
        assert "'x' now has another tool list: echo: its description changed; more: it is new" in server.notes[0]
        assert [tool.name for tool in server.tools()] == ["x_echo"]


async def test_an_announcement_without_a_change_changes_nothing() -> None:
    async with plain("list-changes") as server:
        for text in ("a", "b", "c"):
            assert (await say(server, text)).content == text
        assert server.notes == []


async def test_a_server_started_again_with_other_tools_is_refused_them(tmp_path: Path) -> None:
    async with plain("rug-restart", str(tmp_path / "state")) as server:
        await say(server, "die")
        assert "its parameters changed since the start" in await refusal(server)


# HTTP


@pytest.fixture(scope="module")
def shop_port() -> Iterator[int]:
    process = subprocess.Popen([*SHOP, "http"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout
    try:
        yield int(process.stdout.readline())
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


async def test_a_server_at_a_private_url_needs_permission(shop_port: int) -> None:
    url = f"http://127.0.0.1:{shop_port}/mcp"
    message = await start_failure(MCP(name="shop", url=url))
    assert "127.0.0.1 is refused" in message
    assert "`allow_hosts`" in message
    async with MCP(name="shop", url=url, allow_hosts=[f"127.0.0.1:{shop_port}"]) as shop:
        assert (await tool(shop, "price").call({"item": "tea"})).content == "tea: 3"
        assert tool(shop, "price").effect == "read"


async def test_the_deadline_holds_over_http(shop_port: int) -> None:
    allowed = ["127.0.0.1"]
    async with MCP(name="shop", url=f"http://127.0.0.1:{shop_port}/mcp", allow_hosts=allowed, deadline=3) as shop:
        shop.deadline = 0.3
        started = time.monotonic()
        with pytest.raises(ToolError, match=r"did not answer within 0\.3 s"):
            await tool(shop, "wait").call({"seconds": 30})
        assert time.monotonic() - started < 1.5
        shop.deadline = 3
        assert (await tool(shop, "price").call({"item": "tea"})).content == "tea: 3"


async def answering(reply: bytes) -> AsyncIterator[int]:
    """A port where each request gets `reply`, whatever it asks."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.read(100_000)
            writer.write(reply)
            await writer.drain()
            if reply.endswith(b"..."):
                while True:
                    writer.write(b"x" * 65536)
                    await writer.drain()
        except OSError:
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    yield server.sockets[0].getsockname()[1]
    server.close()
    await server.wait_closed()


async def test_a_server_that_ends_its_event_streams_without_end_is_ended() -> None:
    """It names an id and no pause each time, so the SDK would ask again for as long as the call lasts."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(100_000)
        writer.write(OK + b"Content-Type: text/event-stream\r\nConnection: close\r\n\r\nretry: 0\nid: 1\ndata:\n\n")
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/mcp"
        message = await start_failure(MCP(name="x", url=url, allow_hosts=["127.0.0.1"], deadline=10))
    assert "it ended more than 20 event streams in a second" in message


OK = b"HTTP/1.1 200 OK\r\n"


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        (b"HTTP/1.1 401 No\r\nContent-Length: 0\r\n\r\n", "HTTP 401: it wants credentials; give them in `headers`"),
        (b"HTTP/1.1 500 No\r\nContent-Length: 0\r\n\r\n", "HTTP 500"),
        (b"HTTP/1.1 302 No\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n", "not followed"),
        (OK + b"Content-Type: text/html\r\nContent-Length: 4\r\n\r\n<p/>", "content type"),
        (
            OK + b"Content-Type: application/json\r\nContent-Encoding: gzip\r\nContent-Length: 4\r\n\r\nabcd",
            "compressed",
        ),
        (OK + b"Content-Type: application/json\r\n\r\n...", "a message of more than 16 MB"),
        (OK + b"Content-Type: text/event-stream\r\n\r\ndata: ...", "a message of more than 16 MB"),
        (b"nonsense\r\n\r\n", "The MCP server 'x' can't be used"),
    ],
)
async def test_what_is_no_mcp_server_at_a_url_is_told(reply: bytes, said: str) -> None:
    async for port in answering(reply):
        server = MCP(name="x", url=f"http://127.0.0.1:{port}/mcp", allow_hosts=["127.0.0.1"], deadline=5)
        assert said in await start_failure(server)


async def test_the_end_of_a_server_at_a_url_is_told() -> None:
    process = subprocess.Popen([*SHOP, "http"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    with process:
        assert process.stdout
        port = int(process.stdout.readline())
        async with MCP(name="shop", url=f"http://127.0.0.1:{port}/mcp", allow_hosts=["127.0.0.1"], deadline=5) as shop:
            cut = await tool(shop, "leave").call({})
            assert not cut.ok
            assert "the MCP server 'shop' ended" in cut.content
            with pytest.raises(ToolError, match="can't be started again"):
                await tool(shop, "price").call({"item": "tea"})
