"""The sandbox's layers one by one: the filter, the watchdog, the control group. Attacks on all of it are in `tests/attacks`."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from thinkloop.tools import sandbox_limits, sandbox_session, seccomp
from thinkloop.tools.python import Python
from thinkloop.tools.sandbox_limits import delegated_cgroup, join_cgroup, process_tree

pytestmark = [pytest.mark.anyio, pytest.mark.skipif(sys.platform != "linux", reason="the sandbox is bubblewrap")]


async def run(toolset: Python, code: str) -> str:
    return (await toolset.run(code)).content


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_filter_is_well_formed_for_both_architectures(machine: str) -> None:
    program = seccomp.build_filter(machine)
    assert len(program) % 8 == 0
    assert len(program) // 8 < 4096


@pytest.mark.parametrize(
    ("column", "header"),
    [(0, "x86_64-linux-gnu/asm/unistd_64.h"), (1, "asm-generic/unistd.h")],
    ids=["x86_64", "aarch64"],
)
def test_the_call_numbers_are_the_kernel_headers(column: int, header: str) -> None:
    path = Path("/usr/include", header)
    if not path.exists():
        pytest.skip("kernel headers are not installed")
    known = {name: int(number) for name, number in re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", path.read_text())}
    table = {name: row[column] for name, row in {**seccomp._DENIED, **seccomp._SPECIAL}.items()}
    assert {name: number for name, number in table.items() if name in known and known[name] != number} == {}
    assert len(set(table) & set(known)) > 60


async def test_a_private_mapping_and_a_file_mapping_still_work() -> None:
    private = "m = mmap.mmap(-1, 1 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS); m[:2] = b'ok'; m[:2]"
    shared = "f = open('/tmp/m', 'w+b'); f.truncate(4096)\nm = mmap.mmap(f.fileno(), 4096); m[:2] = b'ok'; bytes(m[:2])"
    async with Python() as python:
        assert await run(python, f"import mmap\n{private}") == "b'ok'"
        assert await run(python, shared) == "b'ok'"


async def test_a_worker_that_dies_while_starting_is_an_error_not_a_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        sandbox_session, "interpreters", lambda: [sandbox_session.Interpreter("/usr/bin/absent-python")]
    )
    with pytest.raises(sandbox_session.SandboxError, match="absent-python"):
        await Python().__aenter__()


def test_a_process_tree_that_vanishes_while_it_is_read_is_no_error() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    assert list(process_tree(process.pid)) == [process.pid]
    assert sandbox_limits.over_limit(process.pid, 1) is False


def test_a_watchdog_that_cannot_watch_ends_the_session(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(root: int, limit: int) -> bool:
        raise RuntimeError("no /proc")

    monkeypatch.setattr(sandbox_limits, "over_limit", fail)
    reasons: list[str] = []
    watchdog = sandbox_limits.Watchdog(1, 1, reasons.append)
    watchdog.start()
    watchdog.join(5)
    assert reasons == ["its memory could not be watched (RuntimeError('no /proc'))"]


def test_a_cgroup_is_used_only_where_it_was_delegated(tmp_path: Path) -> None:
    membership, own = tmp_path / "membership", tmp_path / "app"
    membership.write_text("0::/app\n")
    own.mkdir()
    assert delegated_cgroup(tmp_path, membership) is None
    (own / "cgroup.subtree_control").write_text("cpu memory\n")
    assert delegated_cgroup(tmp_path, membership) is None
    (own / "cgroup.subtree_control").write_text("cpu memory pids\n")
    assert delegated_cgroup(tmp_path, membership) == own
    child = join_cgroup(own, [1], 2**20, 64)
    assert child is not None
    assert ((child / "memory.max").read_text(), (child / "pids.max").read_text()) == ("1048576", "64")
    assert join_cgroup(tmp_path / "absent", [1], 2**20, 64) is None
