"""Python without a sandbox runs only when asked for by name, says so, and still ends with its run."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import anyio
import pytest
from thinkloop.tools import sandbox
from thinkloop.tools.python import Python
from thinkloop.tools.sandbox import SandboxError
from thinkloop.tools.sandbox_limits import process_tree
from thinkloop.tools.tool import Output, declaration
from thinkloop.tools.unsafe_python import WARNING

pytestmark = [pytest.mark.anyio, pytest.mark.skipif(sys.platform != "linux", reason="sessions need Linux")]

LEFT_BEHIND = """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0: time.sleep(60)
    os._exit(0)
_ = os.wait()
"""


@pytest.fixture
async def unsafe() -> AsyncIterator[Python]:
    async with Python(timeout=0.5, unsafe=True) as toolset:
        yield toolset


async def run(toolset: Python, code: str) -> Output:
    return await toolset.tools()[0].call({"code": code})


def inside(toolset: Python) -> list[int]:
    assert toolset._session is not None
    return list(process_tree(toolset._session._process.pid))


async def gone(pids: list[int]) -> bool:
    for _ in range(150):
        if not any(map(_alive, pids)):
            return True
        await anyio.sleep(0.02)
    return False


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


async def test_nothing_but_its_argument_chooses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox.shutil, "which", lambda *_, **__: None)
    with pytest.raises(SandboxError, match="bubblewrap"):
        await Python().__aenter__()
    async with Python(unsafe=True) as toolset:
        assert (await run(toolset, "6 * 7")).content == "42"


async def test_it_is_loud_in_the_record_and_on_the_screen(unsafe: Python) -> None:
    first, second = await run(unsafe, "1 + 1"), await run(unsafe, "1 + 1")
    assert (first.content, first.display) == ("2", f"{WARNING}\n2")
    assert "WITHOUT A SANDBOX" in WARNING
    assert (second.content, second.display) == ("2", "")
    assert {first.record["isolation"], second.record["isolation"]} == {"none"}
    async with Python() as sandboxed:
        result = await run(sandboxed, "1 + 1")
    assert (result.record["isolation"], result.display) == ("bubblewrap", "")


async def test_the_model_is_told_of_the_same_tool(unsafe: Python) -> None:
    assert declaration(unsafe.tools()[0]) == declaration(Python().tools()[0])


async def test_it_has_a_folder_of_its_own_and_none_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THINKLOOP_TEST_SECRET", "sesame")
    async with Python(unsafe=True) as toolset:
        result = await run(toolset, "import os; sorted(os.environ), os.getcwd() == os.environ['HOME']")
        assert result.content == "(['HOME', 'LANG', 'PATH', 'TMPDIR'], True)"
        folder = Path((await run(toolset, "print(os.getcwd())")).content)
        assert folder.is_relative_to(tempfile.gettempdir())
    assert not folder.parent.exists()


async def test_variables_files_and_errors_are_as_in_the_sandbox(unsafe: Python, tmp_path: Path) -> None:
    await run(unsafe, "kept = 7")
    result = await run(unsafe, "open('a.csv', 'w').write('x'); kept / 0")
    assert result.content == (
        'Traceback (most recent call last):\n  File "<cell 2>", line 1, in <module>\n'
        "    open('a.csv', 'w').write('x'); kept / 0\nZeroDivisionError: division by zero\n[files: a.csv (1 bytes)]"
    )
    (tmp_path / "in.txt").write_text("given")
    async with Python(unsafe=True, files=[tmp_path / "in.txt"], keep=tmp_path / "kept") as toolset:
        await run(toolset, "open('out.txt', 'w').write(open('in.txt').read())")
    assert (tmp_path / "kept/out.txt").read_text() == "given"


async def test_a_timeout_keeps_the_variables_and_stubbornness_loses_them(unsafe: Python) -> None:
    await run(unsafe, "kept = 7")
    assert (await run(unsafe, "while True: pass")).content == "Stopped after 0.5 s: time limit. Variables are kept."
    assert (await run(unsafe, "kept")).content == "7"
    code = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\nwhile True: pass"
    assert "Variables are lost" in (await run(unsafe, code)).content
    assert (await run(unsafe, "'kept' in globals()")).content == "False"


async def test_what_detaches_itself_ends_with_the_run() -> None:
    async with Python(unsafe=True) as toolset:
        await run(toolset, LEFT_BEHIND)
        pids = inside(toolset)
        assert len(pids) == 2
    assert await gone(pids)


async def test_what_is_left_by_a_process_that_exits_ends_too(unsafe: Python) -> None:
    code = "import os, time\npid = os.fork()\nif pid == 0: time.sleep(60)\nprint(pid)"
    child = int((await run(unsafe, code)).content)
    assert _alive(child)
    assert "the Python process ended" in (await run(unsafe, "os._exit(0)")).content
    assert await gone([child])
    assert (await run(unsafe, "1 + 1")).content == "2"


async def test_it_dies_with_the_host(tmp_path: Path) -> None:
    script = """
import anyio
from thinkloop.tools.python import Python
from thinkloop.tools.sandbox_limits import process_tree
async def main():
    async with Python(timeout=60, unsafe=True) as python, anyio.create_task_group() as group:
        group.start_soon(python.run, "while True: pass")
        await anyio.sleep(0.3)
        print(*process_tree(python._session._process.pid), flush=True)
        await anyio.sleep(60)
anyio.run(main)
"""
    environment = {**os.environ, "TMPDIR": str(tmp_path)}  # its folder is left, as any killed program's is
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    pids = [int(pid) for pid in process.stdout.readline().split()]
    assert len(pids) == 1
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert await gone(pids)


async def test_its_memory_is_bounded_and_limits_of_others_are_left_alone() -> None:
    others = [os.getpid(), *([1] if os.geteuid() == 0 else [])]
    before = [resource.prlimit(pid, resource.RLIMIT_DATA) for pid in others]
    async with Python(unsafe=True, memory_mb=128) as toolset:
        assert (await run(toolset, "bytearray(500 << 20)")).content.endswith("MemoryError")
        many = "import os, time\nfor _ in range(8):\n    if os.fork() == 0:\n        held = bytearray(60 << 20); time.sleep(9)\n"
        assert "used more than 192 MB of memory" in (await run(toolset, f"{many}time.sleep(9)")).content
    assert [resource.prlimit(pid, resource.RLIMIT_DATA) for pid in others] == before
