"""MCP servers that mean harm, over stdio, over HTTP and in the sandbox: what they send is bounded, and stays data."""

from __future__ import annotations

import json
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest
from cell import gone
from control_tokens import HOSTILE, control_tokens_of, rendered
from evidence import peak_of
from hostile_site import answering
from secret_server import secret
from thinkloop.agent.agent import Agent
from thinkloop.agent.testing import ScriptedModel
from thinkloop.tools.mcp_client import MCP
from thinkloop.tools.python import Python
from thinkloop.tools.tool import ToolError
from thinkloop.traces.events import ThinkloopError

pytestmark = [pytest.mark.anyio, pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")]

Held = Callable[[str], None]
SERVERS = Path(__file__).parents[1] / "mcp_servers"
ROGUE = [sys.executable, "-I", "-S", str(Path(__file__).with_name("rogue_mcp.py")), HOSTILE]


def plain(mode: str, *arguments: str, **options: Any) -> MCP:
    command = [sys.executable, "-I", "-S", str(SERVERS / "plain.py"), mode, *arguments]
    return MCP(**{"name": "x", "command": command, "deadline": 5.0} | options)


def rogue(*arguments: str) -> MCP:
    return MCP(name="x", command=[*ROGUE, *arguments], deadline=10)


async def say(server: MCP, text: str, name: str = "x_echo") -> str:
    """What the model is told."""
    tool = next(tool for tool in server.tools() if tool.name == name)
    try:
        return (await tool.call({"text": text})).content
    except ToolError as error:
        return f"error: {error}"


async def start_failure(server: MCP) -> str:
    with pytest.raises(ThinkloopError) as failed:
        async with server:
            pass
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", str(failed.value))
    return " ".join(str(failed.value).split())


# MCP: starting


@pytest.mark.parametrize("mode", ["exits", "refuses", "garbage", "dies-listing", "array", "silent"])
async def test_an_mcp_server_that_does_not_start(held: Held, mode: str) -> None:
    said = await start_failure(plain(mode, deadline=0.5 if mode == "silent" else 5))
    held(f"refused at the start: {said.removeprefix('The MCP server ')[:110]}")


async def test_an_mcp_server_lists_tools_without_end(held: Held) -> None:
    async with plain("pages") as server:
        held(f"50 pages: {len(server.tools())} tools; {server.notes[0][:80]}")


async def test_an_mcp_server_offers_unusable_tools(held: Held) -> None:
    """Schemas that are immense, remote, stall a pattern; names with escapes, twice, too long; a description of a book."""
    async with plain("schemas") as server:
        assert [tool.name for tool in server.tools()] == ["x_fine", "x_a_b", "x_wordy"]
        assert all(len(tool.description) < 4100 for tool in server.tools())
        left_out = [note for note in server.notes if "left out" in note]
    held(f"schema and name checks: {len(left_out)} tools left out, 3 offered")


async def test_an_mcp_server_takes_over_other_tools_names(held: Held) -> None:
    model = ScriptedModel([{"calls": [("python", {"code": "6 * 7"})]}, {"content": "Done."}])
    ended = await Agent(model, [rogue(), Python()], trace=False).run("Compute.")
    assert ended.reason == "answered"
    assert model.conversations[-1][-1]["content"] == "42"
    names = [entry["function"]["name"] for entry in model.tools]
    assert all(re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name) for name in names)
    assert len(set(names)) == len(names)
    held(f"its name stands before each of its tools: {', '.join(names)}")


async def test_control_tokens_in_an_mcp_servers_tools(held: Held) -> None:
    model = ScriptedModel([{"content": "Done."}])
    await Agent(model, [rogue()], trace=False).run("Look.")
    names, text = rendered(model)
    assert text.count("<|im_end|>") > names.count("<|im_end|>")
    assert names.count("<|im_user|>") == 1
    assert "<|tool_calls_section_begin|>" not in names
    held(f"tokenised with specials disallowed: {len(names)} control tokens, none of them from its list")


async def test_control_tokens_in_an_mcp_servers_result(held: Held) -> None:
    held(await control_tokens_of([rogue()], "x_echo", {"text": "hello"}))


# MCP: calls


@pytest.mark.parametrize("mode", ["gigantic", "values", "flood", pytest.param("requests", marks=pytest.mark.slow)])
async def test_an_mcp_server_sends_without_end(held: Held, mode: str) -> None:
    async with plain(mode) as server:
        said, megabytes = await peak_of(say(server, "hello"))
        assert "ended" in said
        assert megabytes < 200
    held(f"message bounds: {said.removeprefix('error: ')[:110]}; {megabytes} MB here")


@pytest.mark.parametrize(
    "mode",
    ["never", pytest.param("deaf", marks=pytest.mark.slow), "closed", pytest.param("wrong-id", marks=pytest.mark.slow)],
)
async def test_an_mcp_server_never_answers(held: Held, mode: str) -> None:
    started = time.monotonic()
    async with plain(mode, deadline=0.5) as server:
        pid = int(await say(server, "pid"))
        said = await say(server, "hello")
        assert time.monotonic() - started < 5
    assert await gone([pid])
    held(f"deadline: {said.removeprefix('error: ')[:110]}")


@pytest.mark.parametrize("mode", ["deep", "twice", "malformed", "escapes", "huge-text", "image", "asks", "pattern"])
async def test_an_mcp_server_sends_an_odd_answer(held: Held, mode: str) -> None:
    async with plain(mode) as server:
        said, megabytes = await peak_of(say(server, "hello"))
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", said)
        assert len(said) < 1_000_100
        assert megabytes < 200
        assert (await say(server, "pid")).isdigit()
    held(f"checked and cleaned, {len(said):,} characters: {said[:70]}")


@pytest.mark.parametrize("text", ["links", "many blocks", "paths", "stderr"])
async def test_an_mcp_servers_bait(held: Held, text: str, capfd: pytest.CaptureFixture[str]) -> None:
    with secret() as hidden:
        async with rogue(hidden.url) as server:
            said = await say(server, text)
            assert "root:" not in said
            assert "\x1b" not in said
            held(f"links are words, stderr is kept off the terminal: {said[:70]}; {hidden.unseen()}")
    assert capfd.readouterr() == ("", "")


async def test_an_mcp_server_reads_the_environment(held: Held, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_KEY", "hush")
    async with rogue() as server:
        seen = json.loads(await say(server, "environment"))
    assert "SECRET_KEY" not in seen
    held(f"minimal environment: {sorted(seen)}")


async def test_an_mcp_server_changes_its_tools_after_the_first_call(held: Held) -> None:
    async with plain("rug") as server:
        assert await say(server, "hello") == "hello"
        with anyio.fail_after(5):  # its announcement comes behind its answer
            while (said := await say(server, "hello")) == "hello":
                await anyio.sleep(0.02)
        assert "refused from now on" in said
        assert [tool.name for tool in server.tools()] == ["x_echo"]
    held(f"fingerprint of the list: {said.removeprefix('error: ')[:100]}")


async def test_an_mcp_server_changes_its_tools_by_a_restart(held: Held, tmp_path: Path) -> None:
    async with plain("rug-restart", str(tmp_path / "state")) as server:
        await say(server, "die")
        said = await say(server, "hello")
        assert "parameters changed since the start" in said
    held(f"fingerprint of the list: {said.removeprefix('error: ')[:100]}")


async def test_an_mcp_server_that_is_not_the_pinned_one(held: Held) -> None:
    said = await start_failure(plain("good", pin="0" * 32))
    assert "its tool list is not the pinned one" in said
    held("pin: its tool list is not the pinned one")


async def test_an_mcp_server_dies_again_and_again(held: Held) -> None:
    async with plain("good") as server:
        told = [await say(server, "die") for _ in range(4)]
    assert "not used any more" in told[-1] or "ended again" in told[-1]
    held(f"one restart: {told[-1].removeprefix('error: ')[:100]}")


async def test_an_mcp_server_leaves_processes_behind(held: Held, tmp_path: Path) -> None:
    async with plain("children", str(tmp_path / "state")):
        pids = [int(pid) for pid in (tmp_path / "state.pids").read_text().split()]
    assert await gone(pids)
    held(f"all that it started ends with it: {len(pids)} processes, one in a session of its own")


async def test_an_mcp_server_dies_in_the_middle_of_a_run(held: Held) -> None:
    calls = [{"calls": [("x_echo", {"text": "die"})]}, {"calls": [("x_echo", {"text": "again"})]}, {"content": "Done."}]
    model = ScriptedModel(calls)
    ended = await Agent(model, [plain("good")], trace=False).run("Try.")
    assert ended.reason == "answered"
    told = [str(message["content"]) for message in model.conversations[-1] if message["role"] == "tool"]
    assert told[1].endswith("again")
    held(f"the model is told: {told[0].removeprefix('error: ')[:90]}")


# MCP: over HTTP

OK = b"HTTP/1.1 200 OK\r\n"
REPLIES = {
    "a body without end": (OK + b"Content-Type: application/json\r\n\r\n", b"x" * 65536),
    "an event without end": (OK + b"Content-Type: text/event-stream\r\n\r\ndata: ", b"x" * 65536),
    "a compressed body": (OK + b"Content-Type: application/json\r\nContent-Encoding: gzip\r\nContent-Length: 4\r\n\r\nabcd", b""),
    "a web page": (OK + b"Content-Type: text/html\r\nContent-Length: 4\r\n\r\n<p/>", b""),
    "a value of a million parts": (OK + b"Content-Type: application/json\r\n\r\n{\"a\":[" + b"0," * 600_000, b""),
    "no HTTP": (b"nonsense\r\n\r\n", b""),
    "event streams without end": (OK + b"Content-Type: text/event-stream\r\nConnection: close\r\n\r\nretry: 0\nid: 1\ndata:\n\n", b""),
}  # fmt: skip


@pytest.mark.parametrize("reply", REPLIES.values(), ids=REPLIES.keys())
async def test_an_mcp_server_over_http_sends(held: Held, reply: tuple[bytes, bytes]) -> None:
    async with answering(*reply) as port:
        server = MCP(name="x", url=f"http://127.0.0.1:{port}/mcp", allow_hosts=["127.0.0.1"], deadline=5)
        said, megabytes = await peak_of(start_failure(server))
    assert megabytes < 200
    held(f"{said.removeprefix('The MCP server ')[:110]}; {megabytes} MB here")


# MCP: in the sandbox

needs_bwrap = pytest.mark.skipif(shutil.which("bwrap") is None, reason="needs bubblewrap")


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that everybody may read, with the server in it, as the current one."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as name:
        found = Path(name)
        found.chmod(0o755)
        (found / "plain.py").write_bytes((SERVERS / "plain.py").read_bytes())
        (found / "plain.py").chmod(0o644)
        monkeypatch.chdir(found)
        yield found


def caged(folder: Path, deadline: float = 10.0) -> MCP:
    command = ["/usr/bin/python3", "-I", "-S", str(folder / "plain.py")]
    return MCP(name="x", command=command, sandbox=True, deadline=deadline)


INSIDE = {
    "the network": ("[s := __import__('ctypes').CDLL(None, use_errno=True), s.socket(2, 1, 0), __import__('ctypes').get_errno()][2]",
                    "seccomp: errno {}"),
    "the network by IPv6": ("[s := __import__('ctypes').CDLL(None, use_errno=True), s.socket(10, 1, 0), __import__('ctypes').get_errno()][2]",
                            "seccomp: errno {}"),
    "vsock": ("[s := __import__('ctypes').CDLL(None, use_errno=True), s.socket(40, 1, 0), __import__('ctypes').get_errno()][2]",
              "seccomp: errno {}"),
    "other networks": ("1 - any(name[:-1] not in ('lo',) for name in [row.split()[0] for row in open('/proc/net/dev') if ':' in row])",
                       "network namespace: only `lo`"),
    "the password file": ("1 - os.path.exists('/etc/shadow') - os.path.exists('/etc/passwd')", "mount namespace: not there"),
    "the home folder": ("1 - os.path.exists(HOME)", "mount namespace: not there"),
    "a file of its own": ("os.system('touch FOLDER/new 2>/dev/null')", "read-only mounts: status {}"),
    "a namespace": ("os.system('unshare -U true 2>/dev/null')", "seccomp: status {}"),
    "other processes": ("1 - any(int(p) > 20 for p in os.listdir('/proc') if p.isdigit())", "process namespace: only its own"),
    "the host's environment": ("1 - open('/proc/1/environ').read().count('SECRET')", "empty environment"),
}  # fmt: skip


@needs_bwrap
@pytest.mark.parametrize("name", INSIDE)
async def test_a_sandboxed_mcp_server_reaches_for(
    folder: Path, held: Held, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("SECRET_KEY", "hush")
    code, form = INSIDE[name]
    home = str(Path.home()) if Path.home() != Path("/") else "/root"
    code = code.replace("FOLDER", str(folder)).replace("HOME", repr(home))
    async with caged(folder) as server:
        said = await say(server, f"run:{code}")
    assert said.lstrip("-").isdigit(), said
    assert int(said) > 0
    held(form.format(said))


EXHAUSTING = {
    "memory": "[bytearray(200 << 20), time.sleep(10)]",
    "empty files": "[os.close(os.open('/tmp/%d' % i, os.O_CREAT)) for i in range(250_000)] and time.sleep(10)",
    "empty files at home": "[os.close(os.open('/home/server/%d' % i, os.O_CREAT)) for i in range(250_000)] and time.sleep(10)",
    "many processes": "[__import__('subprocess').Popen(['/usr/bin/python3', '-c', 'x = bytearray(b\\'x\\') * (60 << 20); input()'], stdin=-1) for _ in range(6)] and time.sleep(10)",
}  # fmt: skip


@needs_bwrap
@pytest.mark.parametrize("code", EXHAUSTING.values(), ids=EXHAUSTING.keys())
async def test_a_sandboxed_mcp_server_takes_too_much(
    folder: Path, held: Held, monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    monkeypatch.setattr("thinkloop.tools.mcp_sandbox.MEMORY", 100 << 20)
    async with caged(folder) as server:
        said = await say(server, f"run:{code}")
    assert "it used more than 100 MB of memory" in said, said
    held("watchdog: it used more than 100 MB of memory")


@needs_bwrap
async def test_a_sandboxed_mcp_server_leaves_a_daemon(folder: Path, held: Held) -> None:
    mark = f"{30 + time.time() % 9:.6f}"
    async with caged(folder) as server:
        await say(server, f"run:os.system('setsid sleep {mark} >/dev/null 2>&1 </dev/null &')")
        pids = [int(path.parent.name) for path in Path("/proc").glob("[0-9]*/cmdline") if mark in _read(path)]
        assert pids
    assert await gone(pids)
    held("process namespace: its end took the daemon along")


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
