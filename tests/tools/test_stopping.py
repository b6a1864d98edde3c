"""A cancelled call stops its function: in a thread where Python can, in a process always; and it is said which."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import anyio
import process_tools
import pytest
from process_tools import Holder
from thinkloop.tools import thread
from thinkloop.tools.call_record import recording, remember
from thinkloop.tools.function import FunctionTool, tool
from thinkloop.tools.signature import DefinitionError
from thinkloop.tools.thread import GRACE, Interrupted, left_running, run_in_thread
from thinkloop.tools.tool import Attachment, Output, ToolError

pytestmark = pytest.mark.anyio


@asynccontextmanager
async def cut_after(seconds: float) -> AsyncIterator[dict[str, Any]]:
    """Cancels what runs in it after a while; gives what was remembered of it, and how long it took."""
    started = time.monotonic()
    with recording() as facts:
        with anyio.move_on_after(seconds) as scope:
            yield facts
        assert scope.cancelled_caught
    facts["took"] = time.monotonic() - started


async def ends(thread: threading.Thread) -> bool:
    with anyio.move_on_after(5):
        while thread.is_alive():
            await anyio.sleep(0.01)
        return True
    return False


# Threads


async def test_a_busy_function_is_stopped_and_cleans_up() -> None:
    seen: list[Any] = []

    @tool
    def busy() -> None:
        seen.append(threading.current_thread())
        try:
            while True:
                pass
        finally:
            seen.append("cleaned up")

    async with cut_after(0.1) as facts:
        await busy.call({})
    assert seen[1:] == ["cleaned up"]
    assert await ends(seen[0])
    assert "still_running" not in facts
    assert facts["took"] < 0.1 + GRACE


async def test_a_function_that_swallows_it_once_is_told_again() -> None:
    swallowed: list[str] = []

    @tool
    def stubborn() -> None:
        with suppress(BaseException):
            while True:
                pass
        swallowed.append("once")
        while True:
            pass

    async with cut_after(0.05) as facts:
        await stubborn.call({})
    assert swallowed == ["once"]
    assert "still_running" not in facts


async def test_a_function_that_cannot_be_stopped_is_reported_and_counted() -> None:
    release = threading.Event()

    @tool
    def deaf() -> str:
        release.wait(30)  # in C code: no exception can get in
        return "late"

    before = left_running()
    async with cut_after(0.05) as facts:
        await deaf.call({})
    assert facts["still_running"] is True
    assert GRACE <= facts["took"] < GRACE + 3
    assert left_running() == before + 1
    release.set()
    with anyio.fail_after(5):
        while left_running() > before:
            await anyio.sleep(0.01)


async def test_functions_left_running_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thread, "MOST_LEFT_RUNNING", 2)
    monkeypatch.setattr(thread, "GRACE", 0.1)
    monkeypatch.setattr(thread, "AGAIN", 0.05)
    release = threading.Event()

    @tool
    def deaf() -> None:
        release.wait(30)

    try:
        for _ in range(2):
            async with cut_after(0.02):
                await deaf.call({})
        with pytest.raises(ToolError, match=r"2 earlier calls could not be stopped.*process=True"):
            await deaf.call({})
    finally:
        release.set()
    with anyio.fail_after(5):
        while left_running():
            await anyio.sleep(0.01)
    assert (await tool(name="f")(lambda: "x").call({})).content == "x"


async def test_the_exception_never_hits_another_call() -> None:
    """Calls are cancelled at every point of their short lives, beside others that must not notice."""
    wrong: list[BaseException] = []

    def count(n: int) -> int:
        total = 0
        for _ in range(n):
            total += 1
        return total

    async def steady() -> None:
        for _ in range(150):
            outcome = await run_in_thread(functools.partial(count, 2000))
            if outcome.value != 2000:
                wrong.append(outcome.error or ValueError(outcome.value))

    async def cancelled() -> None:
        for n in range(150):
            with anyio.move_on_after(n * 2e-6):
                await run_in_thread(functools.partial(count, 1000))

    async with anyio.create_task_group() as group:
        for work in (steady, cancelled, steady, cancelled):
            group.start_soon(work)
    assert wrong == []
    left = [one for one in threading.enumerate() if one.name == "tool"]
    assert all([await ends(one) for one in left])


AFTERWARDS = """
import sys, threading, anyio
from thinkloop.tools.thread import run_in_thread

release = threading.Event()

def busy():
    while True:
        pass

async def cut(function):
    with anyio.move_on_after(0.02):
        await run_in_thread(function)

async def main():
    for function in (busy, lambda: 1, lambda: release.wait(30)):
        await cut(function)
    sys.setprofile(lambda *event: None)
    print("went on", (lambda: 1)())
    await cut(lambda: release.wait(30))  # and nothing is raised in a thread while there is a profiler
    print("went on", (lambda: 2)())
    sys.setprofile(None)
    release.set()

anyio.run(main)
"""


def test_an_interrupted_thread_leaves_nothing_that_would_stop_a_debugger() -> None:
    run = subprocess.run([sys.executable, "-c", AFTERWARDS], capture_output=True, text=True, timeout=30, check=True)
    assert run.stdout == "went on 1\nwent on 2\n"


@pytest.mark.parametrize(
    "raised", [SystemExit(3), KeyboardInterrupt(), GeneratorExit(), Interrupted(), StopIteration()]
)
async def test_whatever_a_thread_raises_comes_back_as_an_outcome(raised: BaseException) -> None:
    def f() -> None:
        raise raised

    assert (await run_in_thread(f)).error is raised


async def test_what_is_remembered_in_the_thread_is_in_the_record() -> None:
    with recording() as facts:
        await run_in_thread(functools.partial(remember, pages=3))
    assert facts == {"pages": 3}
    remember(pages=4)  # outside of a call: nowhere to put it


# Processes


async def test_a_function_runs_in_another_process_with_its_types_and_prints_harmlessly() -> None:
    output = await process_tools.where.call({"at": {"x": 3}, "tags": ["a"]})
    name, x, y, tags, pid = output.content.split()
    assert (name, x, y, tags) == ("Point", "3", "0", "['a']")
    assert int(pid) != os.getpid()
    assert process_tools.where(at=process_tools.Point(x=1)).startswith("Point 1")


async def test_a_whole_output_comes_back() -> None:
    file = Attachment("f.bin", "x/y", b"\0\xff")
    expected = Output("é\u2028", display="shown", record={"a": [1]}, ok=False, files=(file,))
    assert await process_tools.later.call({"text": "é\u2028"}) == expected


@pytest.mark.parametrize("cancel", ["deadline", "group"])
async def test_a_stuck_process_is_killed_with_all_that_it_started(tmp_path: Path, cancel: str) -> None:
    marker = tmp_path / "pids"

    async def stop_when_begun(stop: Callable[[], None]) -> None:
        while not (marker.exists() and marker.read_text()):
            await anyio.sleep(0.01)
        stop()

    with anyio.fail_after(20):
        async with anyio.create_task_group() as group:
            with anyio.CancelScope() as scope:
                group.start_soon(stop_when_begun, scope.cancel if cancel == "deadline" else group.cancel_scope.cancel)
                await process_tools.stuck.call({"marker": str(marker)})
    pids = [int(pid) for pid in marker.read_text().split()]
    assert len(pids) == 2
    assert await all_gone(pids)


async def test_nothing_stays_behind_after_a_call_that_succeeded() -> None:
    output = await process_tools.leaves_one_behind.call({})
    assert await all_gone([int(output.content)])


async def test_a_worker_dies_with_the_program_that_asked_for_it(tmp_path: Path) -> None:
    marker = tmp_path / "pids"
    code = f"import anyio, process_tools; anyio.run(process_tools.stuck.call, {{'marker': {str(marker)!r}}})"
    program = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parent)
    with anyio.fail_after(20):
        while not (marker.exists() and marker.read_text()):
            await anyio.sleep(0.01)
    program.kill()
    program.wait()
    assert await all_gone([int(pid) for pid in marker.read_text().split()])


@pytest.mark.parametrize(
    ("how", "text"),
    [
        ("error", "ZeroDivisionError: integer division or modulo by zero"),
        ("told", "no such city"),
        ("exit", "SystemExit: 3"),
        ("os exit", "the process of the tool ended with exit code 7 without a result"),
        ("kill", "the process of the tool was killed by SIGSEGV without a result"),
        ("interrupt", "KeyboardInterrupt"),
        ("forged", "the process of the tool sent a reply that can't be read"),
    ],
)
async def test_what_goes_wrong_in_a_process_is_told(how: str, text: str) -> None:
    with pytest.raises(ToolError) as caught:
        await process_tools.fails.call({"how": how})
    assert str(caught.value).startswith(text)


async def test_a_huge_result_is_bounded_before_it_leaves_the_process() -> None:
    output = await process_tools.fails.call({"how": "huge"})
    assert len(output.content) < 1_000_100
    assert "characters dropped here" in output.content


async def test_arguments_that_do_not_convert_are_told() -> None:
    with pytest.raises(ToolError, match=r"The arguments don't fit: `at.x`"):
        await process_tools.where.call({"at": {"x": "no"}})


async def test_errors_from_a_process_are_retried_by_their_class(tmp_path: Path) -> None:
    with recording() as facts:
        output = await process_tools.flaky.call({"marker": str(tmp_path / "tries")})
    assert output.content == "after 1"
    assert [attempt["error"] for attempt in facts["attempts"]] == ["ConnectionResetError: gone", ""]


async def test_plain_functions_and_static_methods_of_a_module_will_do() -> None:
    assert (await tool(process=True)(process_tools.plain).call({"text": "a"})).content == "a"
    assert (await tool(process=True)(Holder.inside).call({"n": 1})).content == "2"


async def test_a_program_s_own_functions_run_in_a_process(tmp_path: Path) -> None:
    """The main file is imported again, but what it does as a program isn't done again."""
    script = tmp_path / "own program.py"
    script.write_text(
        "import anyio, os\n"
        "from thinkloop.tools.function import tool\n"
        "@tool(process=True)\n"
        "def double(n: int) -> int:\n"
        "    return 2 * n\n"
        "if __name__ == '__main__':\n"
        "    print(anyio.run(double.call, {'n': 21}).content)\n"
    )
    run = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True)
    assert (run.stdout, run.stderr) == ("42\n", "")


def nested() -> FunctionTool:
    def inner(n: int) -> int:
        return n

    return tool(process=True)(inner)


@pytest.mark.parametrize(
    "define",
    [
        nested,
        lambda: tool(process=True, name="f")(lambda: 1),
        lambda: tool(process=True)(Holder().method),
        lambda: tool(process=True)(functools.partial(process_tools.plain, text="a")),
    ],
)
def test_functions_that_no_other_process_can_find_are_refused(define: Callable[[], FunctionTool]) -> None:
    with pytest.raises(DefinitionError, match="at the top of a module"):
        define()


async def all_gone(pids: list[int]) -> bool:
    with anyio.move_on_after(5):
        while any(map(is_running, pids)):
            await anyio.sleep(0.01)
        return True
    return False


def is_running(pid: int) -> bool:
    """Whether the process does anything: one that nobody has waited for is dead."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False
