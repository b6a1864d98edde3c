"""`serve`: our tools for other programs, over stdio and loopback HTTP, tried with our own client and with bare HTTP."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest
from thinkloop.tools.function import tool
from thinkloop.tools.mcp_client import MCP
from thinkloop.tools.mcp_server import serve
from thinkloop.tools.tool import Output, Tool
from thinkloop.traces.events import ThinkloopError

pytestmark = pytest.mark.anyio

OFFER = [sys.executable, str(Path(__file__).parent.parent / "mcp_servers" / "offer.py")]


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
async def tools() -> AsyncIterator[Mapping[str, Tool]]:
    async with MCP(name="t", command=OFFER, deadline=20) as server:
        yield {tool.name.removeprefix("t_"): tool for tool in server.tools()}


async def call(tools: Mapping[str, Tool], name: str, /, **arguments: Any) -> Output:
    return await tools[name].call(arguments)


async def test_tools_are_declared_as_they_are(tools: Mapping[str, Tool]) -> None:
    assert tools["add"].description == "Adds."
    assert tools["add"].parameters["required"] == ["a"]
    assert tools["add"].parameters["properties"]["b"]["default"] == 1
    assert (tools["add"].effect, tools["step"].effect) == ("read", "write")


async def test_a_call_gives_the_output(tools: Mapping[str, Tool]) -> None:
    assert (await call(tools, "add", a=40, b=2)).content == "42"


async def test_arguments_are_checked(tools: Mapping[str, Tool]) -> None:
    result = await call(tools, "add", a="x")
    assert not result.ok
    assert result.content.startswith("error: the arguments don't fit add: ")


@pytest.mark.parametrize(
    ("how", "said"),
    [("told", "error: not like that"), ("raise", "error: ValueError: oops"), ("exit", "SystemExit: bye")],
)
async def test_a_failing_tool_is_an_error_result_and_no_more(tools: Mapping[str, Tool], how: str, said: str) -> None:
    result = await call(tools, "wrong", how=how)
    assert not result.ok
    assert said in result.content


async def test_the_deadline_and_the_budget_hold(tools: Mapping[str, Tool]) -> None:
    late = await call(tools, "late")
    assert late.content == "error: late took longer than its deadline of 0.2 s and was stopped"
    long = await call(tools, "long")
    assert long.content == "x" * 40 + "\n[cut here: 960 of 1,000 characters left out]"


async def test_what_tools_print_never_reaches_the_wire(tools: Mapping[str, Tool]) -> None:
    assert (await call(tools, "loud")).content == "quiet"
    assert (await call(tools, "add", a=1)).content == "2"


async def test_files_come_along(tools: Mapping[str, Tool]) -> None:
    result = await call(tools, "files")
    assert [(file.name, file.media_type, file.data) for file in result.files] == [
        ("files-1.png", "image/png", b"\x89PNG"), ("files-2.wav", "audio/wav", b"RIFF"), ("c_d.pdf", "application/pdf", b"%PDF")
    ]  # fmt: skip


async def test_writes_run_one_after_the_other(tools: Mapping[str, Tool]) -> None:
    seen: list[str] = []

    async def step(name: str) -> None:
        seen.append((await call(tools, "step", name=name)).content)

    async with anyio.create_task_group() as group:
        for name in "abc":
            group.start_soon(step, name)
    assert sorted(seen) == ["a", "b", "c"]


async def test_a_cancelled_call_is_really_stopped(tools: Mapping[str, Tool], tmp_path: Path) -> None:
    with anyio.move_on_after(0.3):
        await call(tools, "patient", path=str(tmp_path / "note"))
    with anyio.fail_after(3):
        while not (tmp_path / "note").exists():
            await anyio.sleep(0.02)


async def test_two_tools_of_one_name_are_refused() -> None:
    @tool
    def same() -> None: ...

    with pytest.raises(ThinkloopError, match="Two tools are called `same`"):
        await serve([same, same])


@pytest.mark.parametrize("how", ["hang up", "interrupt"])
def test_it_ends_when_the_client_hangs_up_or_a_person_interrupts(how: str) -> None:
    with subprocess.Popen(OFFER, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stderr
        assert process.stdin
        assert process.stdout
        assert process.stderr.readline() == b"shelf entered\n"
        process.stdin.write(b'{"jsonrpc":"2.0","id":1,"method":"ping"}\n')
        process.stdin.flush()
        assert b'"id":1' in process.stdout.readline()
        started = time.monotonic()
        process.stdin.close() if how == "hang up" else process.send_signal(signal.SIGINT)
        process.wait(5)
        assert time.monotonic() - started < 2
        assert b"shelf left" in process.stderr.read()


# HTTP


@dataclass(frozen=True)
class Address:
    url: str
    authorization: str


@pytest.fixture(scope="module")
def address() -> Iterator[Address]:
    with subprocess.Popen([*OFFER, "http"], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stderr
        process.stderr.readline()  # the shelf
        url, authorization = (process.stderr.readline().partition(": ")[2].strip() for _ in range(2))
        try:
            yield Address(url, authorization)
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(5)


async def test_over_http_the_token_opens_and_its_absence_does_not(address: Address) -> None:
    server = MCP(name="t", url=address.url, headers={"Authorization": address.authorization}, allow_hosts=["127.0.0.1"])
    async with server:
        add = next(tool for tool in server.tools() if tool.name == "t_add")
        assert (await add.call({"a": 1})).content == "2"
    for headers in ({}, {"Authorization": address.authorization[:-1]}, {"Authorization": "Basic abc"}):
        with pytest.raises(ThinkloopError, match="HTTP 401: it wants credentials"):
            async with MCP(name="t", url=address.url, headers=headers, allow_hosts=["127.0.0.1"]):
                pass


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "attacker.example"}, 421),
        ({"Host": "127.0.0.1"}, 421),
        ({"Origin": "http://attacker.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Content-Type": "text/plain"}, 400),
        ({}, 406),  # well-formed but for what it accepts
    ],
)
async def test_pages_in_a_browser_are_kept_out(address: Address, headers: dict[str, str], status: int) -> None:
    given = {
        "Authorization": address.authorization,
        "Accept": "nothing/here",
        "Content-Type": "application/json",
        **headers,
    }
    message = {"jsonrpc": "2.0", "id": 1, "method": "ping"}
    async with httpx.AsyncClient(trust_env=False) as client:
        reply = await client.post(address.url, json=message, headers=given)
    assert reply.status_code == status


async def test_it_listens_on_this_machine_only(address: Address) -> None:
    port = int(address.url.split(":")[2].split("/")[0])
    lines = Path("/proc/net/tcp").read_text().splitlines() + Path("/proc/net/tcp6").read_text().splitlines()
    listening = [
        fields[1] for line in lines if (fields := line.split())[3] == "0A" and fields[1].endswith(f":{port:04X}")
    ]
    assert listening == [f"0100007F:{port:04X}"]


async def test_a_port_that_is_taken_is_said(address: Address) -> None:
    port = int(address.url.split(":")[2].split("/")[0])
    with pytest.raises(ThinkloopError, match=f"Port {port} on 127.0.0.1 can't be used"):
        await serve([], http=port)


async def test_serving_over_http_can_be_cancelled(capsys: pytest.CaptureFixture[str]) -> None:
    with anyio.move_on_after(1.0) as scope:
        await serve([], http=0)
    assert scope.cancelled_caught
    assert "Authorization: Bearer " in capsys.readouterr().err


def test_the_examples_talk_to_each_other() -> None:
    examples = Path(__file__).parents[2] / "examples"
    result = subprocess.run([sys.executable, examples / "mcp_client.py"], capture_output=True, text=True, timeout=60)
    lines = result.stdout.splitlines()
    assert lines[0] == "harbour_tides (read): Today's tides of an island."
    assert lines[1].startswith("pin = '")
    assert lines[2:] == ['["16:40 low","22:50 high"]']
    assert result.stderr == ""
