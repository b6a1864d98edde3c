"""Figures and files come out of the python tool, given files go in read-only, and neither can be turned against the host."""

from __future__ import annotations

import io
import os
import struct
import sys
import time
import zipfile
import zlib
from collections.abc import AsyncIterator
from pathlib import Path

import anyio
import pytest
from thinkloop.tools import python_files, python_keep, sandbox_launch, sandbox_session
from thinkloop.tools.python import Python, isolation_report
from thinkloop.tools.tool import Output
from thinkloop.traces.events import ThinkloopError

pytestmark = [pytest.mark.anyio, pytest.mark.skipif(sys.platform != "linux", reason="the sandbox is bubblewrap")]

PNG = "b'\\x89PNG\\r\\n\\x1a\\n\\0\\0\\0\\rIHDR' + struct.pack('>IIBBBBB', {}, {}, 8, 0, 0, 0, 0) + bytes(20)"
TURNED = """
import sys, os, struct, time
frame = sys._getframe()
while "cells" not in frame.f_locals: frame = frame.f_back
cells = frame.f_locals["cells"]
def claim(files, piece):
    cells.workspace.changed = lambda: files
    cells.workspace.piece = piece
"""


@pytest.fixture
async def python() -> AsyncIterator[Python]:
    async with Python(timeout=20) as toolset:
        yield toolset


@pytest.fixture
def keep(tmp_path: Path) -> Path:
    return tmp_path / "kept"


async def run(toolset: Python, code: str) -> Output:
    return await toolset.tools()[0].call({"code": code})


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# What comes out


async def test_a_file_that_a_cell_writes_comes_with_its_result(python: Python) -> None:
    result = await run(python, "open('table.csv', 'w').write('a,b\\n' * 300)")
    assert result.content == "1200\n[files: table.csv (1.2 kB)]"
    (file,) = result.files
    assert (file.name, file.media_type, file.data) == ("table.csv", "text/csv", b"a,b\n" * 300)
    assert result.record["files"] == [{"name": "table.csv", "bytes": 1200, "attached": True}]


async def test_only_new_and_changed_files_come(python: Python) -> None:
    await run(python, "import os; os.mkdir('d'); open('d/one.txt', 'w').write('1'); open('two.txt', 'w').write('2')")
    again = await run(python, "open('d/one.txt').read()")
    assert (again.content, again.files, "files" in again.record) == ("'1'", (), False)
    changed = await run(python, "with open('d/one.txt', 'a') as file: _ = file.write('more')")
    assert changed.content == "[files: d/one.txt (5 bytes)]"
    assert [file.data for file in changed.files] == [b"1more"]


async def test_files_come_after_an_error_and_after_a_timeout_too(python: Python) -> None:
    failed = await run(python, "open('a', 'w').write('1'); 1/0")
    assert failed.content.endswith("ZeroDivisionError: division by zero\n[files: a (1 bytes)]")
    python.timeout = 0.3
    stopped = await run(python, "open('b', 'w').write('22')\nwhile True: pass")
    assert stopped.content == "[files: b (2 bytes)]\nStopped after 0.3 s: time limit. Variables are kept."


async def test_links_pipes_sockets_and_hidden_names_are_passed_over(python: Python) -> None:
    code = """
import os, socket
os.symlink('/runner.py', 'link.py'); os.symlink('/usr', 'usr'); os.symlink('/proc/self/fd/0', 'zero'); os.mkfifo('pipe')
socket.socket(socket.AF_UNIX).bind('socket'); open('.hidden', 'w').close(); os.mkdir('.cache'); open('.cache/x', 'w').close()
print('made')
"""
    result = await run(python, code)
    assert (result.content, result.files) == ("made", ())


async def test_many_names_are_cut_in_the_line_and_in_the_record(python: Python) -> None:
    result = await run(python, "for i in range(1500): open(f'{i:04}', 'w').write('x')")
    assert result.content.endswith("0009 (1 bytes), and 90 more]")
    assert len(result.record["files"]) == 100
    assert result.record["more_files"] == 1400


async def test_a_hundred_thousand_files_do_not_hold_up_the_result() -> None:
    async with Python(timeout=60) as toolset:
        await run(toolset, "import os\nfor i in range(100_000): os.close(os.open(f'{i:06}', os.O_CREAT | os.O_WRONLY))")
        started = time.perf_counter()
        assert (await run(toolset, "1 + 1")).content.startswith("2")
        assert time.perf_counter() - started < 3


async def test_a_large_file_is_recorded_and_left(python: Python) -> None:
    result = await run(python, "open('sparse', 'wb').truncate(60 << 20)")
    assert (result.content, result.files) == (str(60 << 20), ())
    assert result.record["files"] == [{"name": "sparse", "bytes": 60 << 20, "attached": False, "problem": "too large"}]
    assert "OSError" in (await run(python, "open('terabyte', 'wb').truncate(1 << 40)")).content


async def test_a_cell_and_a_run_attach_so_much_and_no_more(python: Python, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(python_files, "CELL_CAP", 25)
    python._outbox._run_left = 45
    write = "for name in 'abc': _ = open(name, 'w').write('{}' * 10)"
    assert (await run(python, write.format("x"))).content == "[files: a (10 bytes), b (10 bytes)]"
    assert (await run(python, write.format("y"))).content == "[files: a (10 bytes), b (10 bytes)]"
    assert (await run(python, write.format("z"))).content == "(no output)"


# Figures


async def test_what_shows_itself_as_a_picture_is_a_figure(python: Python) -> None:
    data = _png(3, 2)
    code = f"class Dot:\n    def _repr_png_(self): return {data!r}\n    def __repr__(self): return 'dot'\nDot()"
    result = await run(python, code)
    assert result.content == "dot\n[figure 1: figure-1.png, 3x2]"
    assert [(file.name, file.media_type, file.data) for file in result.files] == [("figure-1.png", "image/png", data)]
    svg = "class Drawn:\n    def _repr_svg_(self): return '<svg xmlns=\"http://www.w3.org/2000/svg\"/>'\n_ = repr\nDrawn()"
    result = await run(python, svg)
    assert result.content.endswith("\n[figure 2: figure-2.svg]")
    assert [(file.name, file.media_type) for file in result.files] == [("figure-2.svg", "image/svg+xml")]


@pytest.fixture
async def drawing() -> AsyncIterator[Python]:
    pytest.importorskip("matplotlib")
    async with Python(timeout=60) as toolset:
        if not (await toolset.run("import matplotlib.pyplot as plt")).ok:
            pytest.skip("this virtual environment can't be read by the sandbox's user")
        yield toolset


async def test_open_figures_and_shown_figures_become_png(drawing: Python) -> None:
    code = "_ = plt.plot([1, 4, 9])\nplt.show()\nprint('between')\n_ = plt.figure(figsize=(2, 1))"
    result = await run(drawing, code)
    assert result.content == "between\n[figure 1: figure-1.png, 640x480]\n[figure 2: figure-2.png, 200x100]"
    assert [python_files.png_dimensions(file.data) for file in result.files] == [(640, 480), (200, 100)]
    assert [figure["name"] for figure in result.record["figures"]] == ["figure-1.png", "figure-2.png"]
    assert (await run(drawing, "plt.get_fignums()")).content == "[]"


async def test_a_figure_drawn_before_an_error_is_shown_too(drawing: Python) -> None:
    result = await run(drawing, "_ = plt.plot([1])\n1/0")
    assert not result.ok
    assert result.content.endswith("ZeroDivisionError: division by zero\n[figure 1: figure-1.png, 640x480]")


async def test_a_figure_that_cannot_be_drawn_is_an_error_once(drawing: Python) -> None:
    assert "Error" in (await run(drawing, r"_ = plt.title(r'$\frac{$')")).content
    assert (await run(drawing, "1")).content == "1"


async def test_another_backend_warns_of_nothing_and_shows_its_figures(drawing: Python) -> None:
    result = await run(drawing, "import matplotlib; matplotlib.use('Agg')\n_ = plt.plot([1]); plt.show()")
    assert result.content == "[figure 1: figure-1.png, 640x480]"


async def test_a_flood_of_figures_is_cut_and_said(drawing: Python) -> None:
    result = await run(
        drawing, "import warnings; warnings.simplefilter('ignore')\nfor _ in range(22): plt.figure(figsize=(1, 1))"
    )
    assert len(result.files) == 20
    assert "Figure 22 isn't shown: a cell shows 20 at most." in result.content


# Copies on the host


async def test_results_are_copied_to_the_folder_that_keeps_them(keep: Path) -> None:
    async with Python(keep=keep) as toolset:
        result = await run(toolset, "import os; os.makedirs('a/b'); open('a/b/c.txt', 'w').write('deep')")
        assert result.record["files"][0]["kept"] == "a/b/c.txt"
        await run(toolset, "open('large', 'wb').write(bytes(range(256)) * 40_000)")
        await run(toolset, "open('a/b/c.txt', 'w').write('changed')")
        await run(toolset, f"class Dot:\n    def _repr_png_(self): return {_png(1, 1)!r}, {{}}\nDot()")
        await run(toolset, "open('figure-1.png', 'w').write('of the same name')")
        copies = {"a/b/c.txt": b"changed", "large": bytes(range(256)) * 40_000}
        assert contents(keep) == {**copies, "figure-1.png": _png(1, 1), "figure-1-2.png": b"of the same name"}
        assert (keep / "large").stat().st_mode & 0o111 == 0


async def test_a_file_that_was_there_is_never_replaced(keep: Path) -> None:
    keep.mkdir()
    (keep / "thesis.tex").write_text("mine")
    async with Python(keep=keep) as toolset:
        result = await run(toolset, "open('thesis.tex', 'w').write('its')")
        await run(toolset, "open('thesis.tex', 'w').write('its own')")
    assert result.record["files"][0]["kept"] == "thesis-2.tex"
    assert contents(keep) == {"thesis.tex": b"mine", "thesis-2.tex": b"its own"}


async def test_a_link_in_the_folder_leads_nothing_out_of_it(keep: Path, tmp_path: Path) -> None:
    keep.mkdir()
    outside = tmp_path / "outside"
    outside.mkdir()
    (keep / "sub").symlink_to(outside)
    (keep / "name").symlink_to(outside / "absent")
    async with Python(keep=keep) as toolset:
        result = await run(
            toolset, "import os; os.mkdir('sub'); open('sub/x', 'w').write('1'); open('name', 'w').write('1')"
        )
    assert contents(outside) == {}
    assert [row.get("kept", "") for row in result.record["files"]] == ["name-2", ""]
    assert "leads out of the folder" in result.record["files"][1]["problem"]


async def test_an_archive_is_a_file_like_any_other(keep: Path) -> None:
    code = """
import io, tarfile, zipfile
with zipfile.ZipFile('slip.zip', 'w') as archive: archive.writestr('../../evil', 'x' * 100_000)
with tarfile.open('links.tar', 'w') as archive:
    link = tarfile.TarInfo('here'); link.type, link.linkname = tarfile.SYMTYPE, '/etc'; archive.addfile(link)
"""
    async with Python(keep=keep) as toolset:
        result = await run(toolset, code)
    assert sorted(contents(keep)) == ["links.tar", "slip.zip"]
    assert not (keep.parent.parent / "evil").exists()
    assert {file.media_type for file in result.files} == {"application/octet-stream"}
    assert zipfile.ZipFile(io.BytesIO(result.files[1].data)).namelist() == ["../../evil"]


async def test_a_folder_that_cannot_keep_is_told_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ThinkloopError, match=r"Python\(keep=\.\.\.\)"):
        await Python(keep=tmp_path / "file").__aenter__()


# A runner turned against the host


NAMES = ["../out", "a/../../out", "/tmp/out", "", ".", ".bashrc", "a//b", "x" * 300, "a/" * 50 + "b"]
ODD = ["line\\nfeed", "\\x1b[2J", "\\udcff", "a\\\\b", "\\0", "\\u202etxt.exe"]


@pytest.mark.parametrize("name", NAMES + ODD)
async def test_a_name_that_leads_elsewhere_is_refused(keep: Path, name: str) -> None:
    async with Python(keep=keep) as toolset:
        await run(toolset, TURNED)
        result = await run(toolset, f"claim([('{name}', 5)], lambda *asked: b'owned')")
        assert (result.content, result.files) == ("(no output)", ())
        assert result.record["files"][0]["problem"]
        assert result.record["files"][0]["name"].isprintable()
    assert contents(keep) == {}
    assert sorted(path.name for path in keep.parent.iterdir()) == ["kept"]


async def test_an_announced_size_is_a_bound_and_no_promise(keep: Path) -> None:
    async with Python(keep=keep) as toolset:
        await run(toolset, TURNED)
        short = "claim([('short', 1 << 22), ('long', 3)], lambda path, offset, size: b'x' * min(size, 100))"
        result = await run(toolset, short)
        assert result.content == "[files: short (100 bytes), long (3 bytes)]"
        result = await run(toolset, "claim([('huge', 1 << 60)], lambda *asked: b'')")
        assert "kept as much as it may" in result.record["files"][0]["problem"]
    assert contents(keep) == {"short": b"x" * 100, "long": b"xxx"}


async def test_a_run_keeps_so_much_and_no_more(keep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(python_keep, "KEEP_CAP", 100)
    async with Python(keep=keep) as toolset:
        for number in range(5):
            await run(toolset, f"open('{number}', 'wb').write(bytes(40))")
    assert sorted(contents(keep)) == ["0", "1"]


FORGED = [
    "cells.piece = lambda request: {'data': 'no base64?'}",
    "cells.piece = lambda request: {'data': 7}",
    "cells.piece = lambda request: {'data': 'AAAA' * 400_000}",
    "cells.piece = lambda request: os._exit(0)",
    "cells._made = lambda: {'files': 7}",
    "cells._made = lambda: {'files': [['a', -1]]}",
    "cells._made = lambda: {'files': [['a', True]]}",
    "cells._made = lambda: {'files': [['a', 1]] * 300}",
    "cells._made = lambda: {'more': 'x'}",
    "cells._made = lambda: {'pictures': [[1, 2]]}",
]


@pytest.mark.parametrize("forged", FORGED)
async def test_a_forged_answer_about_files_ends_the_session_and_is_told(keep: Path, forged: str) -> None:
    async with Python(keep=keep) as toolset:
        await run(toolset, TURNED)
        result = await run(toolset, f"claim([('a', 5)], lambda *asked: b'owned')\n{forged}")
        assert "Variables are lost; the next call starts a fresh session." in result.content
        assert not result.ok
        assert (await run(toolset, "1 + 1")).content == "2"
    assert contents(keep) == {}


async def test_an_answer_that_never_comes_ends_the_session(python: Python, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox_session, "PIECE_SECONDS", 0.2)
    monkeypatch.setattr(sandbox_session, "GRACE", 0.2)
    await run(python, TURNED)
    result = await run(python, "claim([('a', 5)], lambda *asked: time.sleep(60))")
    assert "it did not stop when interrupted. Variables are lost" in result.content


async def test_handing_over_slowly_is_cut_and_keeps_the_session(
    python: Python, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(python_files, "TAKE_SECONDS", 0.5)
    await run(python, TURNED + "kept = 7")
    result = await run(python, "claim([(f'{i}', 5) for i in range(90)], lambda *asked: time.sleep(0.1) or b'12345')")
    assert "handing it over took more than" in result.record["files_problem"]
    assert 1 <= len(result.files) < 10
    assert (await run(python, "claim([], None); kept")).content == "7"


async def test_cancelling_while_files_are_taken_keeps_the_session(python: Python) -> None:
    await run(python, TURNED + "kept = 7")
    with anyio.move_on_after(0.3) as scope:
        await run(python, "claim([(f'{i}', 5) for i in range(90)], lambda *asked: time.sleep(0.1) or b'12345')")
    assert scope.cancelled_caught
    assert (await run(python, "claim([], None); kept")).content == "7"


@pytest.mark.parametrize(
    ("pictures", "problem"),
    [
        ("('png', b'GIF89a')", "not a PNG"),
        ("('exe', b'MZ')", "not a PNG"),
        (f"('png', {PNG.format(60_000, 60_000)})", "too many pixels"),
        (f"('png', {PNG.format(0, 5)})", "not a PNG"),
        ("('svg', b'<html><svg>')", "not an SVG"),
        ("('png', bytes(9 << 20))", "too large"),
    ],
)
async def test_a_picture_that_is_none_is_left_out(python: Python, pictures: str, problem: str) -> None:
    await run(python, TURNED)
    result = await run(python, f"cells.pictures.append({pictures})")
    assert (result.content, result.files) == (f"[figure 1: left out, {problem}]", ())


async def test_a_reply_of_small_parts_in_the_million_is_not_unfolded(python: Python) -> None:
    await run(python, TURNED)
    started = time.perf_counter()
    result = await run(python, "cells._made = lambda: {'files': [[]] * 2_000_000}")
    assert "it sent a reply that the runner doesn't send" in result.content
    assert time.perf_counter() - started < 3


# What goes in


async def test_a_given_file_can_be_read_and_in_no_way_changed(tmp_path: Path) -> None:
    given = tmp_path / "data.csv"
    given.write_text("a,b\n")
    tmp_path.chmod(0o700)
    tries = """
import os, shutil
def attempt(action, *arguments):
    try: return action(*arguments)
    except OSError as error: return 'refused'
open('other', 'w').close()
print(open('data.csv').read(), [attempt(*call) for call in [
    (open, 'data.csv', 'w'), (open, 'data.csv', 'a'), (os.truncate, 'data.csv', 0), (os.chmod, 'data.csv', 0o777),
    (os.unlink, 'data.csv'), (os.rename, 'data.csv', 'x'), (os.replace, 'other', 'data.csv'), (shutil.rmtree, '/workspace'),
]])
"""
    async with Python(files=[given]) as toolset:
        result = await run(toolset, tries)
        assert result.content.startswith(f"a,b\n {['refused'] * 8}")
        assert "data.csv" not in str(result.record)
        await run(toolset, "os._exit(0)")
        assert (await run(toolset, "open('data.csv').read()")).content == "'a,b\\n'"
    assert given.read_text() == "a,b\n"


async def test_a_large_given_file_is_read_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox_launch, "COPY_CAP", 10)
    monkeypatch.setattr(python_files, "COPY_CAP", 10)
    given = tmp_path / "large.csv"
    given.write_text("x" * 100)
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)
    code = "try: open('large.csv', 'a')\nexcept OSError: print('refused')\nlen(open('large.csv').read())"
    async with Python(files=[given]) as toolset:
        assert (await run(toolset, code)).content == "refused\n100"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root's sandbox has another user")
async def test_a_large_file_that_the_inside_could_not_read_is_refused(tmp_path: Path) -> None:
    given = tmp_path / "large.csv"
    with given.open("wb") as file:
        file.truncate(1 << 40)
    given.chmod(0o600)
    with pytest.raises(ThinkloopError, match="too large to be copied"):
        Python(files=[given])


async def test_a_given_file_that_goes_away_is_told_by_the_next_session(tmp_path: Path) -> None:
    given = tmp_path / "data.csv"
    given.write_text("a")
    async with Python(files=[given]) as toolset:
        given.unlink()
        assert "Variables are lost" in (await run(toolset, "import os; os._exit(0)")).content
        with pytest.raises(ThinkloopError, match=r"data\.csv can't be given"):
            await run(toolset, "1")
        given.write_text("b")
        assert (await run(toolset, "open('data.csv').read()")).content.endswith("\n'b'")


async def test_installed_packages_can_be_imported_and_not_changed(python: Python) -> None:
    if not isolation_report()["packages"]:
        pytest.skip("this virtual environment can't be read by the sandbox's user")
    result = await run(python, "import numpy; numpy.arange(4).sum().item()")
    if "ModuleNotFoundError" in result.content:
        pytest.skip("the system's Python is of another version than this one")
    assert result.content == "6"
    write = "import os\ntry: open(numpy.__file__, 'a')\nexcept OSError: print('refused')\n"
    write += "os.statvfs(numpy.__file__).f_flag & os.ST_RDONLY"
    assert (await run(python, write)).content == "refused\n1"


def _png(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    rows = zlib.compress(b"".join(b"\0" + bytes(width) for _ in range(height)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
