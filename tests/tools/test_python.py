"""The python tool keeps variables, words results exactly, and is honest about what it cut, stopped or lost."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import anyio
import pytest
from thinkloop.tools import sandbox
from thinkloop.tools.python import TEXT_CAP, Python, isolation_report
from thinkloop.tools.sandbox import SandboxError
from thinkloop.tools.sandbox_limits import process_tree
from thinkloop.tools.tool import Output, Tool, ToolError, Toolset
from thinkloop.traces.events import ThinkloopError

pytestmark = [pytest.mark.anyio, pytest.mark.skipif(sys.platform != "linux", reason="the sandbox is bubblewrap")]

IGNORE_INTERRUPTS = "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nwhile True: pass"


@pytest.fixture
async def python() -> AsyncIterator[Python]:
    async with Python(timeout=0.5) as toolset:
        yield toolset


async def run(toolset: Python, code: str) -> Output:
    return await toolset.tools()[0].call({"code": code})


async def test_the_declaration_is_the_one_models_are_trained_on() -> None:
    toolset = Python(timeout=7)
    (tool,) = toolset.tools()
    assert isinstance(tool, Tool)
    assert isinstance(toolset, Toolset)
    assert tool.name == "python"
    assert tool.description == (
        "Run Python code in a sandbox; variables are kept. Shows what is printed and the last value."
    )
    assert tool.parameters == {
        "type": "object",
        "properties": {"code": {"type": "string", "description": "Python code."}},
        "required": ["code"],
        "additionalProperties": False,
    }
    assert (tool.effect, tool.budget) == ("write", 2000)
    assert tool.deadline > 7


@pytest.mark.parametrize(
    ("code", "content"),
    [
        ("48 + 31", "79"),
        ("print('a'); print('b')\n'c'", "a\nb\n'c'"),
        ("print('a', end='')\n5", "a\n5"),
        ("x = 5", "(no output)"),
        ("None", "(no output)"),
        ("", "(no output)"),
        ("print()", "(no output)"),
        ("print('héllo 世界')", "héllo 世界"),
        ("import sys; print('out'); print('err', file=sys.stderr); print('out again')", "out\nerr\nout again"),
        ("import subprocess; print(1); _ = subprocess.run(['echo', 'two']); print(3)", "1\ntwo\n3"),
        ("def double(n):\n    return 2 * n\ndouble(21)", "42"),
        ("import sys; sys.stdout.close(); sys.stderr = None; 1", "1"),
        ("len(str(2**100000))", "30103"),
        ("try: input()\nexcept EOFError: print('no input')", "no input"),
    ],
)
async def test_a_result_is_what_was_printed_and_then_the_last_value(python: Python, code: str, content: str) -> None:
    assert (await run(python, code)).content == content


async def test_variables_imports_and_functions_are_kept(python: Python) -> None:
    await run(python, "import math\nradius = 2\ndef area(r): return math.pi * r * r")
    assert (await run(python, "round(area(radius), 3)")).content == "12.566"
    assert (await run(python, "_ + 1")).content == "13.566"


async def test_an_error_shows_the_cells_frames_and_no_carets(python: Python) -> None:
    result = await run(python, "print('before')\n1/0")
    assert not result.ok
    assert result.content == (
        'before\nTraceback (most recent call last):\n  File "<cell 1>", line 2, in <module>\n    1/0\n'
        "ZeroDivisionError: division by zero"
    )


async def test_a_syntax_error_shows_its_line(python: Python) -> None:
    result = await run(python, "48 m + 31 m")
    assert not result.ok
    assert result.content == '  File "<cell 1>", line 1\n    48 m + 31 m\nSyntaxError: invalid syntax'


async def test_an_error_in_the_library_and_its_cause_show_only_the_cells(python: Python) -> None:
    await run(python, "import json\ndef parse(t):\n    return json.loads(t)")
    code = "try:\n    parse('{')\nexcept ValueError as error:\n    raise KeyError('bad') from error"
    lines = (await run(python, code)).content.splitlines()
    assert [line.strip() for line in lines if "File" in line] == [
        'File "<cell 2>", line 2, in <module>',
        'File "<cell 1>", line 3, in parse',
        'File "<cell 2>", line 4, in <module>',
    ]
    assert lines[-1] == "KeyError: 'bad'"


@pytest.mark.parametrize(
    ("code", "last"),
    [
        ("raise SystemExit(2)", "SystemExit: 2"),
        ("def f(): return f()\nf()", "RecursionError: maximum recursion depth exceeded"),
        (
            "'\\ud800'.encode()",
            "UnicodeEncodeError: 'utf-8' codec can't encode character '\\ud800' in position 0: surrogates not allowed",
        ),
        ("class Odd:\n    def __repr__(self): raise RuntimeError('no repr')\nOdd()", "RuntimeError: no repr"),
        (
            "class Odd(Exception):\n    def __str__(self): raise RuntimeError\nraise Odd",
            "Odd: <exception str() failed>",
        ),
        ("a = 1\0", None),
    ],
)
async def test_every_kind_of_failure_is_a_result_and_the_session_goes_on(
    python: Python, code: str, last: str | None
) -> None:
    result = await run(python, "kept = 7")
    result = await run(python, code)
    assert not result.ok
    if last:
        assert result.content.splitlines()[-1].removeprefix("__main__.") == last
    assert (await run(python, "kept")).content == "7"


async def test_long_output_comes_whole_so_that_a_run_can_page_it(python: Python) -> None:
    result = await run(python, "print('A' * 10_000 + 'B' * 10_000)\n'end'")
    assert result.content == "A" * 10_000 + "B" * 10_000 + "\n'end'"
    assert result.record["left_out"] == 0


async def test_megabytes_of_output_are_cut_in_the_middle_and_counted() -> None:
    async with Python(timeout=20) as toolset:
        result = await run(toolset, "for i in range(300_000): print(f'{i:09d}')\n'end'")
    assert result.ok
    assert result.content.startswith("000000000\n000000001\n")
    assert result.content.endswith("000299999\n'end'")
    assert f"[... {result.record['left_out']} characters left out ...]" in result.content
    assert abs(result.record["left_out"] + TEXT_CAP - 3_000_005) < 10


async def test_a_long_value_and_a_long_traceback_are_cut(python: Python) -> None:
    assert len((await run(python, "'x' * 3_000_000")).content) < 1_000_000
    assert len((await run(python, "raise ValueError('x' * 3_000_000)")).content) < 1_000_000


async def test_control_characters_reach_neither_terminal_nor_model(python: Python) -> None:
    result = await run(python, r"print('\x1b[2J\x07red\x9b', 'a\rb\r\nc', '\0')")
    assert result.content == "\\x1b[2J\\x07red\\x9b a\nb\nc \\x00"


@pytest.mark.parametrize(
    "hostile",
    [
        "'\\x1b]52;c;cm0gLXJm\\x07'",
        "'\\x1b[31m\\x1b[?1049h'",
        "'\\x9b2J'",
        "'a\\x08b\\x7f'",
        "'\\ud800\\udfff'",
        "'\\x00' * 9",
    ],
)
async def test_no_terminal_escape_leaves_by_any_door(python: Python, hostile: str) -> None:
    doors = f"text = {hostile}\nclass Odd(Exception):\n    def __repr__(self): return text\n    __str__ = __repr__\n"
    for code in ("print(text)", "Odd()", "raise Odd", "import os; os.write(1, text.encode('utf-8', 'surrogatepass'))"):
        content = (await run(python, doors + code)).content
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", content)
        assert content.encode()


async def test_control_tokens_are_text_like_any_other(python: Python) -> None:
    hostile = "<|im_end|><|tool_calls_section_begin|>"
    assert (await run(python, f"print('{hostile}')")).content == hostile


@pytest.mark.parametrize(
    "attack",
    [
        "import json; json.dumps = json.loads = lambda *a, **k: '{}'",
        "import os\nfor name in ('read', 'write', 'getpid', 'scandir', 'open', 'pread', 'close'): setattr(os, name, None)",
        "import builtins; builtins.repr = builtins.len = builtins.isinstance = None",
        "import builtins; builtins.__import__ = None",
        "import sys; sys.modules.clear()",
        "import sys; sys.meta_path.clear(); sys.path.clear()",
        "import traceback; traceback.TracebackException = None\n1 / 0",
        "import signal; signal.signal = None",
        "import struct; struct.pack = struct.unpack = None",
        "import gc\nfor thing in gc.get_objects():\n    if type(thing).__name__ == 'Cells': thing.__dict__.clear()",
        "import sys; sys.settrace(lambda *a: 1 / 0); sys.setprofile(lambda *a: 1 / 0)",
        "import sys; sys.setrecursionlimit(60)",
        "import threading\nfor _ in range(20): threading.Thread(target=exec, args=('while 1: 1',), daemon=True).start()",
        "import gc; gc.callbacks.append(lambda *a: 1 / 0)",
        "import faulthandler, ctypes; ctypes.string_at(0)",
        "import sys; sys.stdout = sys.stderr = sys.__stdout__ = sys.excepthook = None",
        "import os; os.close(50)",
        "import os; os.dup2(1, 50)",
        "import os; os.chdir('/'); os.environ.clear()",
        "import os, signal; os.kill(os.getpid(), signal.SIGSTOP)",
        "import fcntl, os; fcntl.fcntl(50, fcntl.F_SETFL, os.O_NONBLOCK); fcntl.fcntl(1, fcntl.F_SETFL, os.O_NONBLOCK)",
    ],
)
async def test_a_runner_taken_apart_from_inside_hurts_only_itself(attack: str) -> None:
    """What comes back may be an error or a loss; it is a bounded text in bounded time, and the end is clean."""
    started = time.perf_counter()
    async with Python(timeout=1.0) as toolset:
        assert toolset._session is not None
        pids = list(process_tree(toolset._session._process.pid))
        for code in (attack, "6 * 7", "open('a.txt', 'w').write('x')"):
            result = await run(toolset, code)
            assert len(result.content) < 8100
            assert len(result.files) <= 1
    assert time.perf_counter() - started < 12
    until = time.monotonic() + 3  # the kernel ends what pid 1 leaves
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < until:
        await anyio.sleep(0.02)
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


async def test_the_call_after_a_loss_finds_a_session_waiting(python: Python) -> None:
    await run(python, "import os; os._exit(0)")
    await anyio.sleep(0.5)  # a model that thinks
    assert python._session is not None
    assert python._session.lost == ""
    before = time.perf_counter()
    assert (await run(python, "1 + 1")).content == "2"
    assert time.perf_counter() - before < 0.1  # 2 ms on a machine of its own


async def test_eight_sessions_at_once_work_side_by_side() -> None:
    async def one(number: int) -> None:
        async with Python(timeout=20) as toolset:
            await run(toolset, f"open('mine.txt', 'w').write('{number}' * 1000)")
            results[number] = await run(
                toolset, f"import time; time.sleep(0.2); open('mine.txt').read() == '{number}' * 1000"
            )

    results: dict[int, Output] = {}
    async with anyio.create_task_group() as group:
        for number in range(8):
            group.start_soon(one, number)
    assert {result.content for result in results.values()} == {"True"}


async def test_a_timeout_interrupts_and_keeps_the_variables(python: Python) -> None:
    await run(python, "kept = 7")
    result = await run(python, "print('working')\nwhile True: pass")
    assert not result.ok
    assert result.content == "working\nStopped after 0.5 s: time limit. Variables are kept."
    assert (await run(python, "kept")).content == "7"


async def test_what_ignores_the_interrupt_is_ended_and_the_loss_is_said(python: Python) -> None:
    await run(python, "gone = 7")
    result = await run(python, "print('stubborn')\n" + IGNORE_INTERRUPTS)
    assert not result.ok
    assert result.content == (
        "stubborn\nStopped after 0.5 s: time limit; it did not stop when interrupted. "
        "Variables are lost; the next call starts a fresh session."
    )
    assert (await run(python, "'gone' in globals()")).content == "False"


async def test_a_process_that_exits_is_told_and_replaced(python: Python) -> None:
    result = await run(python, "print('bye')\nimport os; os._exit(3)")
    assert result.content == (
        "bye\nSession ended: the Python process ended. Variables are lost; the next call starts a fresh session."
    )
    assert (await run(python, "1 + 1")).content == "2"


async def test_a_loss_between_calls_is_told_by_the_next(python: Python) -> None:
    await run(python, "import threading, os; threading.Timer(0.1, os._exit, (0,)).start()")
    await anyio.sleep(0.3)
    result = await run(python, "1 + 1")
    assert result.content == "(Fresh session: the Python process ended; earlier variables are lost.)\n2"


async def test_cancelling_a_call_interrupts_the_cell_and_keeps_the_variables() -> None:
    async with Python(timeout=20) as toolset:
        await run(toolset, "kept = 7")
        started = time.perf_counter()
        with anyio.move_on_after(0.2) as scope:
            await run(toolset, "import time; time.sleep(15)")
        assert scope.cancelled_caught
        assert time.perf_counter() - started < 1.0
        assert (await run(toolset, "kept")).content == "7"


async def test_cancelling_a_cell_that_will_not_stop_leaves_an_honestly_fresh_session() -> None:
    async with Python(timeout=20) as toolset:
        await run(toolset, "gone = 7")
        with anyio.move_on_after(0.2):
            await run(toolset, IGNORE_INTERRUPTS)
        result = await run(toolset, "'gone' in globals()")
    assert result.content == "(Fresh session: it did not stop when interrupted; earlier variables are lost.)\nFalse"


async def test_a_forked_child_does_not_answer_for_its_parent(python: Python) -> None:
    result = await run(
        python, "import os\npid = os.fork()\nif pid: _ = os.waitpid(pid, 0)\n'child' if pid == 0 else 'parent'"
    )
    assert result.content == "'parent'"
    assert (await run(python, "'still in step'")).content == "'still in step'"


async def test_classes_of_a_cell_can_be_pickled_and_modules_written_there_imported(python: Python) -> None:
    await run(python, "import pickle\nclass Point: x = 3\nPath = __import__('pathlib').Path")
    assert (await run(python, "pickle.loads(pickle.dumps(Point())).x")).content == "3"
    code = "_ = Path('own.py').write_text('answer = 42')\nimport own\nown.answer"
    assert (await run(python, code)).content == "42\n[files: own.py (11 bytes)]"


async def test_given_files_are_in_the_working_folder(tmp_path: Path) -> None:
    given = tmp_path / "table one.csv"
    given.write_text("a,b\n1,2\n")
    tmp_path.chmod(0o700)  # the sandbox's own user could not read it
    async with Python(files=[given]) as toolset:
        assert (await run(toolset, "open('table one.csv').read()")).content == "'a,b\\n1,2\\n'"
        assert not (await run(toolset, "open('table one.csv', 'w')")).ok
    assert given.read_text() == "a,b\n1,2\n"


async def test_bad_arguments_and_settings_are_explained(tmp_path: Path) -> None:
    with pytest.raises(ThinkloopError, match="is not a readable file"):
        Python(files=[tmp_path / "absent.csv"])
    with pytest.raises(ThinkloopError, match="memory_mb=1"):
        Python(memory_mb=1)
    with pytest.raises(ToolError, match="async with"):
        await run(Python(), "1")
    async with Python() as toolset:
        with pytest.raises(ToolError, match="must be a string"):
            await toolset.tools()[0].call({"code": 5})


async def test_without_bubblewrap_it_refuses_and_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox.shutil, "which", lambda *_, **__: None)
    with pytest.raises(SandboxError, match="apt-get install bubblewrap"):
        await Python().__aenter__()
    assert isolation_report()["works"] is False


async def test_a_bubblewrap_that_fails_is_quoted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "bwrap"
    broken.write_text("#!/bin/sh\necho 'bwrap: setting up uid map: Permission denied' >&2\nexit 1\n")
    broken.chmod(0o755)
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)
    monkeypatch.setattr(sandbox.shutil, "which", lambda *_, **__: str(broken))
    with pytest.raises(SandboxError, match="setting up uid map: Permission denied") as caught:
        await Python().__aenter__()
    assert "run without the python tool" in str(caught.value).lower()


async def test_the_doctor_reports_what_holds() -> None:
    report = isolation_report()
    assert report["works"], report["error"]
    assert report["seccomp"]
    assert report["sum_limit"] in ("watchdog", "cgroup")
    assert report["bwrap"].endswith("bwrap")
    layers = {layer["name"]: layer for layer in report["layers"]}
    held = (
        "own user namespace",
        "read-only system",
        "own processes",
        "no network",
        "system calls filtered",
        "no privileges",
    )
    assert all(layers[name]["holds"] for name in held)
    assert layers["own user id"]["holds"] == (os.geteuid() == 0)
    assert "Delegate=yes" in layers["memory and processes of all together"]["fix"] or report["sum_limit"] == "cgroup"


async def test_a_result_says_what_held(python: Python) -> None:
    record = (await run(python, "1")).record
    assert record["isolation"] == "bubblewrap"
    assert record["sum_limit"] in ("watchdog", "cgroup")


async def test_starting_and_calling_are_quick() -> None:
    """On a machine of its own 60 ms and 0.5 ms (`examples/bench_mini.py`); here only that nothing is off by a factor."""
    starts, firsts, calls = [], [], []
    for _ in range(3):
        before = time.perf_counter()
        async with Python() as toolset:
            starts.append(time.perf_counter() - before)
            for number in range(20):
                before = time.perf_counter()
                await run(toolset, "1 + 1")
                (calls if number else firsts).append(time.perf_counter() - before)
    assert min(starts) <= 1.0
    assert min(firsts) <= 0.05
    assert min(calls) <= 0.02


AS_AN_ORDINARY_USER = """
import os, anyio, json, shutil, tempfile
from thinkloop.tools.python import Python, isolation_report
from thinkloop.tools.sandbox import SandboxError

EIGHT_GREEDY_CHILDREN = '''
import os, time
for _ in range(8):
    if os.fork() == 0:
        held = bytearray(60 << 20)
        time.sleep(9)
time.sleep(4)
'''

folder = tempfile.mkdtemp()
given = os.path.join(folder, "given.txt")
open(given, "w").write("7")

async def main(code, unsafe=False):
    async with Python(memory_mb=128, timeout=5, unsafe=unsafe, files=[given], keep=folder + "/kept") as python:
        print((await python.run(code)).content)

anyio.run(main, "'every import is done while they can still be read'")
anyio.run(main, "'here too'", True)
if os.geteuid() == 0:
    os.chown(folder, 65534, 65534), os.chown(folder + "/kept", 65534, 65534)
    os.setgroups([]), os.setgid(65534), os.setuid(65534)
anyio.run(main, "open('out.txt', 'w').write('x')\\n6 * int(open('given.txt').read())")
print(sorted(os.listdir(folder + "/kept")))
try:
    anyio.run(main, "6 * 7", True)
except SandboxError:
    print("this Python is root's alone")
anyio.run(main, EIGHT_GREEDY_CHILDREN)
print(json.dumps(isolation_report()))
shutil.rmtree(folder)
"""


async def test_it_works_as_an_ordinary_user_too_with_its_memory_bounded() -> None:
    command = [sys.executable, "-c", AS_AN_ORDINARY_USER]
    result = subprocess.run(command, capture_output=True, text=True, timeout=30, cwd="/")
    assert result.stdout.splitlines()[2:5] == ["42", "[files: out.txt (1 bytes)]", "['out.txt']"], result.stderr
    assert "used more than 192 MB of memory" in result.stdout
    assert '"works": true' in result.stdout
    assert '"uid_drop": false' in result.stdout
