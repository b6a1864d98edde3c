"""What comes out of the python sandbox is data: replies, printed text, values, files and pictures of hostile code."""

from __future__ import annotations

import io
import json
import sys
import time
import zipfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import anyio
import pytest
from cell import CALL, cell, run
from control_tokens import HOSTILE, control_tokens_of
from thinkloop.agent.agent import Agent
from thinkloop.agent.testing import ScriptedModel
from thinkloop.tools.python import Python

pytestmark = [pytest.mark.anyio, pytest.mark.skipif(sys.platform != "linux", reason="the sandbox is bubblewrap")]

Held = Callable[[str], None]

FORGE = """
import json, os, struct, sys
def frame(data): return struct.pack(">I", len(data)) + data
def nonce():
    f = sys._getframe()
    while "request" not in f.f_locals: f = f.f_back
    return f.f_locals["request"]["nonce"]
"""
TURNED = """
import sys, os, struct, time
found = sys._getframe()
while "cells" not in found.f_locals: found = found.f_back
cells = found.f_locals["cells"]
def claim(files, piece):
    cells.workspace.changed = lambda: files
    cells.workspace.piece = piece
"""
"""Takes the runner over: `claim` says which files there are, and gives their bytes."""


@pytest.fixture
def keep(tmp_path: Path) -> Path:
    return tmp_path / "kept"


@pytest.fixture
async def keeping(keep: Path) -> AsyncIterator[Python]:
    async with Python(timeout=10, keep=keep) as toolset:
        await run(toolset, CALL + TURNED)
        yield toolset


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# The channel

FORGERIES = {
    "garbage": "os.write(50, b'\\xff' * 100)",
    "a huge length": "os.write(50, struct.pack('>I', 1 << 31))",
    "not JSON": "os.write(50, frame(b'{'))",
    "not an object": "os.write(50, frame(b'[1]'))",
    "deep nesting": "os.write(50, frame(b'[' * 100_000))",
    "another nonce": "os.write(50, frame(json.dumps({'nonce': '0', 'value': 'forged', 'error': None}).encode()))",
    "a number for a text": "os.write(50, frame(json.dumps({'nonce': nonce(), 'value': 7}).encode()))",
    "a second hello": 'os.write(50, frame(b\'{"python": "9"}\'))',
    "two replies": "os.write(50, frame(json.dumps({'nonce': nonce(), 'value': '7'}).encode()) * 2)",
    "a million parts": "os.write(50, frame(b'{\"a\":[' + b'{},' * 1_000_000 + b'1]}'))",
}


@pytest.mark.parametrize("forgery", FORGERIES.values(), ids=FORGERIES.keys())
async def test_a_forged_reply(python: Python, held: Held, forgery: str) -> None:
    await run(python, FORGE)
    first = await run(python, forgery)
    second = await run(python, "1 + 1")
    told = next(part for part in (first, second) if "it sent a reply" in part)
    assert second.endswith("2")
    held(f"frame checks: {told[told.index('it sent') :].partition('.')[0].partition(';')[0]}")


async def test_a_reply_forged_ahead_of_the_next_call(python: Python, held: Held) -> None:
    await run(python, FORGE)
    await run(python, "import threading\nthreading.Timer(0.1, os.write, (50, frame(b'{}'))).start()")
    await anyio.sleep(0.3)
    assert "it sent a reply that nobody had asked for" in await run(python, "1 + 1")
    assert await run(python, "1 + 1") == "2"
    held("nonce: a reply that nobody had asked for")


async def test_a_value_that_would_run_when_unpickled(python: Python, held: Held, tmp_path: Path) -> None:
    mark = tmp_path / "owned"
    code = f"class Evil:\n    def __reduce__(self): return os.system, ('touch {mark}',)\nimport pickle\n{{}}"
    said = await run(python, code.format("Evil()"))
    await run(python, code.format("open('a.pkl', 'wb').write(pickle.dumps(Evil()))"))
    assert not mark.exists()
    assert "Evil object" in said
    held("JSON frames: nothing is unpickled here, the value is its repr")


async def test_every_descriptor_is_closed(python: Python, held: Held) -> None:
    said = await run(python, "os.closerange(0, 64)")
    assert "the Python process ended" in said
    assert await run(python, "1 + 1") == "2"
    held(f"fresh session: {said.partition(';')[0].partition('.')[0]}")


async def test_a_module_left_for_the_runner_and_the_next_session(python: Python, held: Held) -> None:
    plant = "for name in ('json', 'sitecustomize', 'usercustomize', 'os', 'traceback'): open(name + '.py', 'w').write('1/0')"
    await run(python, plant)
    assert await run(python, "import json; json.dumps(1)") == "'1'"
    await run(python, "os._exit(0)")
    assert await run(python, "import os; os.listdir()") == "[]"
    held("isolated start (-I -S), folders made anew: nothing of it was run or found")


# Text


async def in_a_run(toolset: Python, code: str) -> str:
    """What the model of a run is shown, which is where long results are cut."""
    model = ScriptedModel([{"calls": [("python", {"code": code})]}, {"content": "Done."}])
    ended = await Agent(model, toolset.tools(), trace=False).run("Compute.")
    assert ended.reason == "answered"
    return str(model.conversations[-1][-1]["content"])


async def test_endless_output(python: Python, held: Held) -> None:
    said = await in_a_run(python, "kept = 7\nwhile True: print('x' * 5000)")
    assert "Stopped: it printed more than 64 MB. Variables are kept." in said
    assert len(said) < 8300
    assert await run(python, "kept") == "7"
    held(f"output limit and budget: more than 64 MB became {len(said):,} characters")


VALUES = {
    "huge": "'x' * 100_000_000",
    "endless": "type('E', (), {'__repr__': lambda self: [0 for _ in iter(int, 1)]})()",
    "raises": "type('R', (), {'__repr__': lambda self: 1 / 0})()",
    "no text": "type('N', (), {'__repr__': lambda self: 7})()",
    "exits": "type('X', (), {'__repr__': lambda self: os._exit(3)})()",
    "deep": "deep = []\nfor _ in range(100_000): deep = [deep]\ndeep",
    "lies": "type('L', (), {'__class__': property(lambda self: str), '__repr__': lambda self: 'l'})()",
}


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES.keys())
async def test_a_hostile_value(python: Python, held: Held, value: str) -> None:
    python.timeout = 1.0
    started = time.monotonic()
    said = await in_a_run(python, value)
    assert time.monotonic() - started < 6
    assert len(said) < 8300
    assert (await run(python, "1 + 1")).endswith("2")
    held(_what_bounded(said))


def _what_bounded(said: str) -> str:
    last = said.rpartition("\n")[2]
    if "Stopped after" in last:
        return f"time limit: {last}"
    if "Session ended" in last:
        return f"fresh session: {last.partition('.')[0]}"
    return f"budget: {len(said):,} characters" if "left out" in said else f"shown as text: {last}"


SHOWN = {"printed": "print({})", "a value": "{}", "a repr": "type('R', (), {{'__repr__': lambda self: {}}})()",
         "an error": "raise ValueError({})", "a name": "open({}.replace('/', ''), 'w').write('1')",
         "stderr": "import sys; sys.stderr.write({})"}  # fmt: skip


@pytest.mark.parametrize("form", SHOWN.values(), ids=SHOWN.keys())
async def test_terminal_escapes(python: Python, held: Held, form: str) -> None:
    text = "\x1b]0;owned\x07\x1b[2J\x1b[31m\x9b2J\x00\x08\u202e\r\ud800end"
    result = await cell(python, form.format(repr(text)))
    shown = result.content + result.display + json.dumps(result.record, ensure_ascii=False)
    assert not any(
        (char < " " and char != "\n") or "\x7f" <= char < "\xa0" or "\ud800" <= char < "\ue000" for char in shown
    )
    held("control characters are written out: no escape, no bell, no lone surrogate left")


@pytest.mark.parametrize("form", [form for name, form in SHOWN.items() if name != "a name"], ids=lambda form: form[:12])
async def test_control_tokens_in_a_result(held: Held, form: str) -> None:
    held(await control_tokens_of([Python()], "python", {"code": form.format(repr(HOSTILE))}))


# Files and pictures

SPECIAL = {
    "links": "os.symlink('/etc/passwd', 'a.txt'); os.symlink('/proc/self/environ', 'b'); os.link('/runner.py', 'c')",
    "a pipe": "os.mkfifo('a.txt')",
    "a socket": "s = socket.socket(socket.AF_UNIX); s.bind('a.txt')",
    "a loop of links": "os.symlink('b', 'a'); os.symlink('a', 'b'); os.symlink('.', 'here')",
    "deep folders": "p = 'd'\nfor _ in range(60): os.mkdir(p); p += '/d'\nopen(p, 'w').write('x')",
    "a folder that can't be listed": "os.mkdir('d'); open('d/x', 'w').write('x'); os.chmod('d', 0)",
    "hidden": "open('.bashrc', 'w').write('x')",
}


@pytest.mark.parametrize("code", SPECIAL.values(), ids=SPECIAL.keys())
async def test_files_that_are_none(keeping: Python, keep: Path, held: Held, code: str) -> None:
    result = await cell(keeping, f"attempt(lambda: exec({code!r}, globals()))")
    assert (result.files, result.record.get("files"), contents(keep)) == ((), None, {})
    held("only plain files within 8 folders are results: none was named or opened")


async def test_a_file_swapped_for_a_link_or_a_pipe_while_it_is_read(keeping: Python, keep: Path, held: Held) -> None:
    code = """
def swap(path, offset, size):
    os.unlink('a'); os.symlink('/etc/passwd', 'a')
    return real(path, offset, size)
real = cells.workspace.piece
cells.workspace.piece = swap
open('a', 'w').write('x' * 100)
"""
    result = await cell(keeping, code)
    assert [file.data for file in result.files] == [b""]
    assert contents(keep) == {"a": b""}
    held("O_NOFOLLOW, and read inside the sandbox: 0 bytes")


async def test_a_hundred_thousand_files(keeping: Python, held: Held) -> None:
    started = time.monotonic()
    result = await cell(keeping, "for i in range(100_000): os.close(os.open(f'{i}.txt', os.O_CREAT))")
    named = len(result.record.get("files", []))
    assert named <= 100
    assert len(result.content) < 1000
    assert time.monotonic() - started < 20
    told = result.content.rpartition("\n")[2]
    held(f"2,000 entries looked at, {named} named: {told[:60]}")


async def test_a_file_announced_as_a_terabyte(keeping: Python, keep: Path, held: Held) -> None:
    result = await cell(keeping, "claim([('huge', 1 << 40), ('endless', 1 << 22)], lambda p, o, size: bytes(size))")
    huge, endless = result.record["files"]
    assert huge["problem"].startswith("not kept")
    assert (endless["bytes"], len(result.files)) == (1 << 22, 1)
    assert contents(keep) == {"endless": bytes(1 << 22)}
    held(f"size caps: {huge['problem']}")


NAMES = ["../out", "a/../../out", "/tmp/out", "..", ".ssh/authorized_keys", "a//b", "x" * 300, "a/" * 50 + "b",
         "line\\nfeed", "\\x1b[2J", "\\udcff", "a\\\\..\\\\b", "nul\\0.txt", "\\u202etxt.exe"]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
async def test_a_name_that_leads_elsewhere(keeping: Python, keep: Path, held: Held, name: str) -> None:
    result = await cell(keeping, f"claim([('{name}', 5)], lambda *asked: b'owned')")
    assert (result.content, result.files) == ("(no output)", ())
    facts = result.record["files"][0]
    assert facts["name"].isprintable()
    assert contents(keep) == {}
    assert sorted(path.name for path in keep.parent.iterdir()) == ["kept"]
    held(f"name check: {facts['problem']}")


ARCHIVES = {
    "a bomb": "archive.writestr('zeros', bytes(60_000_000))",
    "a nested bomb": "archive.writestr('inner.zip', open('b.zip', 'rb').read())",
    "paths out of it": "archive.writestr('../../evil', 'x')",
}


@pytest.mark.parametrize("member", ARCHIVES.values(), ids=ARCHIVES.keys())
async def test_an_archive(keeping: Python, keep: Path, held: Held, member: str) -> None:
    code = f"""
import zipfile
with zipfile.ZipFile('b.zip', 'w', zipfile.ZIP_DEFLATED) as archive: archive.writestr('zeros', bytes(10_000_000))
with zipfile.ZipFile('a.zip', 'w', zipfile.ZIP_DEFLATED) as archive: {member}
os.unlink('b.zip')
"""
    result = await cell(keeping, code)
    assert list(contents(keep)) == ["a.zip"]
    assert not (keep.parent.parent / "evil").exists()
    (file,) = result.files
    assert file.media_type == "application/octet-stream"
    assert len(zipfile.ZipFile(io.BytesIO(file.data)).namelist()) == 1
    held(f"archives are never unpacked here: kept as {len(file.data):,} bytes")


PICTURES = {
    "a page for a browser": ("_repr_svg_", "'<html><script>alert(1)</script></html>'"),
    "a billion pixels": (
        "_repr_png_",
        "b'\\x89PNG\\r\\n\\x1a\\n\\0\\0\\0\\rIHDR' + struct.pack('>II', 60000, 60000) + bytes(30)",
    ),
    "no picture": ("_repr_png_", "b'MZ' * 100"),
    "half a gigabyte": ("_repr_png_", "bytes(1 << 28)"),
}


@pytest.mark.parametrize(("method", "data"), PICTURES.values(), ids=PICTURES.keys())
async def test_a_picture(python: Python, held: Held, method: str, data: str) -> None:
    result = await cell(python, f"import struct\ntype('P', (), {{{method!r}: lambda self: {data}}})()")
    assert result.files == ()
    told = next((line for line in result.content.split("\n") if "left out" in line), result.content.rpartition("\n")[2])
    assert "left out" in told or "MemoryError" in told
    held(f"picture check: {told.strip('[]')}")
