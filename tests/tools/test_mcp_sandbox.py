"""MCP servers in the sandbox: what they reach, what they hold, what of the machine they are shown."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest
from test_mcp_client import SERVERS, nothing_is_left_behind, say, start_failure  # noqa: F401
from thinkloop.tools import mcp_sandbox
from thinkloop.tools.mcp_client import MCP

pytestmark = [pytest.mark.anyio, pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")]

needs_bwrap = pytest.mark.skipif(shutil.which("bwrap") is None, reason="needs bubblewrap")


@pytest.fixture
def shared_folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that everybody may read, with the server in it, as the current folder."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as name:
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "plain.py").write_bytes((SERVERS / "plain.py").read_bytes())
        (folder / "plain.py").chmod(0o644)
        monkeypatch.chdir(folder)
        yield folder


def caged(folder: Path, **options: Any) -> MCP:
    command = ["/usr/bin/python3", "-I", "-S", str(folder / "plain.py")]
    return MCP(**{"name": "x", "command": command, "sandbox": True, "deadline": 5.0} | options)


@needs_bwrap
async def test_a_sandboxed_server_works_and_reaches_nothing(
    shared_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET_KEY", "hush")
    secret = shared_folder.with_name(f"{shared_folder.name}-secret")
    secret.write_text("hush")
    with socket.create_server(("127.0.0.1", 0)):
        async with caged(shared_folder, env={"WANTED": "yes"}) as server:

            async def run(code: str) -> str:
                return (await say(server, f"run:{code}")).content

            seen = json.loads((await say(server, "where")).content)
            assert seen["env"].keys() - {"LC_CTYPE", "PWD"} <= {"PATH", "HOME", "LANG", "WANTED"}
            assert (seen["uid"], seen["cwd"]) == (1000, str(shared_folder))
            assert await run("__import__('ctypes').CDLL(None).socket(2, 1, 0)") == "-1"  # no AF_INET at all
            for path in (secret, Path.home(), "/etc/passwd", "/proc/1/root/etc/shadow"):
                assert await run(f"os.path.exists({str(path)!r})") == "False"
            assert await run("open('/proc/1/environ').read().count('SECRET')") == "0"
            for path in (shared_folder / "new", "/usr/new", "/new"):
                assert await run(f"os.system('touch {path} 2>/dev/null')") != "0"
            assert await run("os.system('touch /tmp/new $HOME/new')") == "0"
            assert await run("__import__('resource').getrlimit(__import__('resource').RLIMIT_NPROC)[1]") == "256"
            assert await run("os.system('unshare -U true 2>/dev/null')") != "0"
    secret.unlink()


@needs_bwrap
async def test_a_sandboxed_server_and_what_it_started_end_with_the_run(shared_folder: Path) -> None:
    def sleepers() -> list[str]:
        return subprocess.run(["pgrep", "-f", "sleep 4711"], capture_output=True, text=True).stdout.split()

    async with caged(shared_folder) as server:
        await say(server, "run:os.system('setsid sleep 4711 >/dev/null 2>&1 </dev/null &')")
        assert sleepers()
    with anyio.fail_after(3):
        while sleepers():
            await anyio.sleep(0.02)


@needs_bwrap
async def test_a_sandboxed_server_that_takes_too_much_memory_is_ended(
    shared_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("thinkloop.tools.mcp_sandbox.MEMORY", 100 << 20)
    async with caged(shared_folder) as server:
        taken = await say(server, "run:[bytearray(200 << 20), time.sleep(10)]")
        assert "ended (it used more than 100 MB of memory)" in taken.content


@needs_bwrap
async def test_a_program_that_the_sandbox_cannot_reach_is_named(shared_folder: Path) -> None:
    program = shared_folder / "hidden" / "server"
    program.parent.mkdir(mode=0o755)
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    assert "exit 0" in await start_failure(caged(shared_folder, command=[str(program)]))
    if os.geteuid() == 0:
        program.parent.chmod(0o700)
        message = await start_failure(caged(shared_folder, command=[str(program)]))
        assert f"can't read {program}" in message
        assert "without `sandbox`" in message


@needs_bwrap
async def test_memory_that_no_figure_shows_cannot_be_had(shared_folder: Path) -> None:
    """Pages of a shared mapping of /dev/zero stay when they are given up."""
    async with caged(shared_folder) as server:
        assert (await say(server, "run:os.path.exists('/dev/zero')")).content == "False"
        assert (await say(server, "run:sorted(os.listdir('/dev'))")).content == str(
            ["fd", "full", "null", "random", "shm", "stderr", "stdin", "stdout", "urandom"]
        )


@needs_bwrap
@pytest.mark.parametrize("folder", ["/home/server", "/tmp"])
async def test_empty_files_count_as_memory(folder: str, shared_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("thinkloop.tools.mcp_sandbox.MEMORY", 60 << 20)
    async with caged(shared_folder) as server:
        make = f"run:[open(f'{folder}/{{n}}', 'w').close() for n in range(60_000)] and time.sleep(10)"
        assert "ended (it used more than 60 MB of memory)" in (await say(server, make)).content


def shown(program: Path) -> list[Path]:
    return list(mcp_sandbox._shown(str(program), []))


async def test_of_a_folder_above_bin_only_an_installation_is_shown(
    shared_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir("/var")
    program = shared_folder / "alice" / "bin" / "srv"
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/sh\n")
    assert shown(program) == [program]
    for mark in ("lib/python3.11", "lib/node_modules", "pyvenv.cfg"):
        path = program.parents[1] / mark
        path.mkdir(parents=True) if "/" in mark else path.touch()
        assert shown(program) == [program.parents[1]]
        shutil.rmtree(program.parents[1] / "lib", ignore_errors=True)
    monkeypatch.setenv("HOME", str(program.parents[1]))
    assert shown(program) == [program]


async def test_a_current_folder_that_is_a_home_or_the_systems_is_not_shown(
    shared_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert shown(Path("/bin/true")) == [Path("/bin/true"), shared_folder]
    for folder in ("/", "/var", "/var/tmp", "/var/lib", "/etc", "/opt", "/proc/self", "/usr", "/tmp", "/home"):
        if Path(folder).is_dir():
            monkeypatch.chdir(folder)
            assert Path.cwd() not in shown(Path("/bin/true"))
    monkeypatch.chdir(shared_folder)
    for home in (shared_folder, shared_folder / "alice"):
        monkeypatch.setenv("HOME", str(home))
        assert shared_folder not in shown(Path("/bin/true"))
