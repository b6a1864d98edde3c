"""No one exhausts the host: processes, memory, disk, kernel objects and time of the python sandbox are bounded."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import anyio
import pytest
from cell import NUMBERS, cell, gone, inside, refused, run
from thinkloop.tools import sandbox_session
from thinkloop.tools.python import Python
from thinkloop.tools.sandbox_limits import process_tree

pytestmark = [pytest.mark.anyio, pytest.mark.skipif(sys.platform != "linux", reason="the sandbox is bubblewrap")]

Held = Callable[[str], None]


async def counted(toolset: Python, code: str) -> str:
    """The words in which the memory limit for all processes ended the session, and what watched it."""
    result = await cell(toolset, code)
    told = re.search(r"it used more than \d+ MB of memory", result.content)
    assert told, result.content
    return f"{result.record['sum_limit']}: {told[0]}"


# Processes


async def test_a_fork_bomb(python: Python, held: Held) -> None:
    code = """
import os, signal, time
children = []
try:
    for _ in range(500):
        pid = os.fork()
        if pid == 0:
            time.sleep(30); os._exit(0)
        children.append(pid)
except BlockingIOError:
    print("stopped")
for pid in children: os.kill(pid, signal.SIGKILL); os.waitpid(pid, 0)
len(children)
"""
    said = await run(python, code)
    assert said.startswith("stopped\n")
    assert int(said.split()[1]) < 64
    held(f"rlimit NPROC: stopped after {said.split()[1]} forks")


async def test_a_runaway_fork_bomb(python: Python, held: Held) -> None:
    python.timeout = 0.5
    old = inside(python)
    said = await run(python, "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass")
    assert "Stopped after 0.5 s" in said
    await run(python, "import os; os._exit(0)")
    assert await gone(old)
    assert await run(python, "1 + 1") == "2"
    held(f"rlimit NPROC, then the time limit: {said.partition('.')[0]}.5 s; all of it gone with the session")


async def test_a_thread_bomb(python: Python, held: Held) -> None:
    code = """
import threading
done, threads = threading.Event(), []
try:
    for _ in range(500):
        threads.append(threading.Thread(target=done.wait)); threads[-1].start()
except (RuntimeError, MemoryError): print("stopped")
done.set()
len(threads)
"""
    said = await run(python, code)
    assert said.startswith("stopped\n")
    assert int(said.split()[1]) <= 64
    held(f"rlimit NPROC: stopped after {said.split()[1]} threads")


async def test_a_daemon_outlives_its_session(python: Python, held: Held) -> None:
    code = """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0: time.sleep(60)
    os._exit(0)
os.wait()
"""
    await run(python, code)
    pids = inside(python)
    assert len(pids) >= 4
    await run(python, "os._exit(0)")
    assert await gone(pids)
    held(f"process namespace: its end took all {len(pids)} along")


async def test_leaving_the_toolset_leaves_something_behind(held: Held) -> None:
    before = {path.name for path in Path("/proc/self/fd").iterdir()}
    async with Python() as toolset:
        await run(toolset, "import os, time\nif os.fork() == 0: time.sleep(60)")
        pids = inside(toolset)
    assert await gone(pids)
    assert {path.name for path in Path("/proc/self/fd").iterdir()} <= before
    held(f"process namespace: {len(pids)} processes and all descriptors gone")


async def test_a_session_ended_at_any_moment_of_its_start(held: Held) -> None:
    for delay in (0, 1, 2, 3, 4, 6, 8, 12, 16, 24):
        session = sandbox_session.Session(sandbox_session.Interpreter("/usr/bin/python3"), sandbox_session.Limits())
        time.sleep(delay / 1000)
        pids = list(process_tree(session._process.pid))
        session.end()
        assert await gone(pids)
    held("stop, then kill: nothing was left after any of 10 delays")


async def test_the_host_is_killed(held: Held) -> None:
    script = """
import anyio, os
from thinkloop.tools.python import Python
from thinkloop.tools.sandbox_limits import process_tree
async def main():
    async with Python(timeout=60) as python:
        async with anyio.create_task_group() as group:
            group.start_soon(python.run, "while True: pass")
            await anyio.sleep(0.3)
            print(*process_tree(python._session._process.pid), flush=True)
            await anyio.sleep(60)
anyio.run(main)
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    pids = [int(pid) for pid in process.stdout.readline().split()]
    assert len(pids) >= 3
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert await gone(pids)
    held(f"parent-death signal: all {len(pids)} processes gone")


# Time


@pytest.mark.parametrize(
    ("code", "state"),
    [
        ("while True: pass", "kept"),
        ("import time; time.sleep(60)", "kept"),
        ("while True:\n    try: [0] * 9\n    except BaseException: pass", "lost|kept"),
        ("import signal; signal.signal(2, signal.SIG_IGN)\nwhile True: pass", "lost"),
        ("9 ** 9 ** 9", "lost|kept"),
        ("import re; re.match('(a+)+$', 'a' * 50 + '!')", "lost|kept"),
        ("import threading; threading.Event().wait()", "kept"),
        ("input()", "at once"),
    ],
    ids=["loop", "sleep", "loop that catches", "interrupts ignored", "power", "pattern", "lock", "input"],
)
async def test_a_cell_that_never_returns(python: Python, held: Held, code: str, state: str) -> None:
    python.timeout = 0.4
    started = time.monotonic()
    said = (await run(python, code)).rpartition("\n")[2]
    assert time.monotonic() - started < 5
    assert re.search(f"Variables are ({state})|EOFError", said), said
    python.timeout = 10
    assert (await run(python, "1 + 1")).endswith("2")
    held(f"time limit: {said}" if "EOF" not in said else f"no input to wait for: {said}")


# Memory


async def test_one_process_takes_too_much(python: Python, held: Held) -> None:
    await run(python, "kept, hoard = 7, []")
    said = await run(python, "while True: hoard.append(bytearray(10 << 20))")
    assert said.endswith("MemoryError")
    assert await run(python, "del hoard\nkept") == "7"
    held("rlimit DATA: MemoryError, variables kept")


async def test_many_processes_together_take_too_much(python: Python, held: Held) -> None:
    code = """
import os, time
for _ in range(10):
    if os.fork() == 0:
        held = bytearray(100 << 20); time.sleep(30)
time.sleep(30)
"""
    started, old = time.perf_counter(), inside(python)
    said = await counted(python, code)
    assert time.perf_counter() - started < 5
    assert await gone(old)
    held(said)


async def test_memory_grows_between_calls(python: Python, held: Held) -> None:
    code = """
import os, time
for _ in range(10):
    if os.fork() == 0:
        time.sleep(0.3); held = bytearray(100 << 20); time.sleep(30)
"""
    await run(python, code)
    await anyio.sleep(1.5)
    held(await counted(python, "1"))


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("import mmap; attempt(mmap.mmap, -1, 1 << 20)", "EPERM"),
        ("attempt(os.open, '/dev/zero', os.O_RDWR)", "ENOENT"),
        ("attempt(os.memfd_create, 'x')", "EPERM"),
        (f"call({NUMBERS['mmap']}, 0, 2 << 20, 3, 0x40022, -1, 0)", "EPERM"),
        (f"call({NUMBERS['shmget']}, 0, 1 << 30, 0o1600)", "EPERM"),
    ],
    ids=["shared mapping", "/dev/zero", "memfd", "huge pages", "System V"],
)
async def test_shared_memory_that_no_process_counts(python: Python, held: Held, code: str, error: str) -> None:
    said = await refused(python, code, error)
    held(f"{'no such device' if said == 'ENOENT' else 'seccomp'}: {said}")


async def test_a_bomb_of_empty_files(held: Held) -> None:
    async with Python(timeout=20, memory_mb=64) as toolset:
        code = "import os\nfor i in range(400_000): os.close(os.open(f'/tmp/{i}', os.O_CREAT))"
        held(await counted(toolset, code))


async def test_a_bomb_of_extended_attributes(held: Held) -> None:
    async with Python(timeout=20, memory_mb=64) as toolset:
        code = """
import os
stopped = "unstopped"
try:
    for i in range(20_000): open(f'/tmp/{i}', 'w').close(); os.setxattr(f'/tmp/{i}', 'user.a', bytes(60_000))
except OSError as error: stopped = error.strerror
"""
        result = await cell(toolset, code + "stopped")
    told = re.search(r"it used more than \d+ MB of memory|Operation not supported", result.content)
    assert told, result.content
    held(f"{result.record['sum_limit']}: {told[0]}")


async def test_sockets_that_would_hold_more(python: Python, held: Held) -> None:
    options = "[attempt(end.setsockopt, socket.SOL_SOCKET, option, 1 << 30) for option in (7, 8, 32, 33)]"
    assert await run(python, f"end, other = socket.socketpair(); {options}") == "['EPERM', 'EPERM', 'EPERM', 'EPERM']"
    held("seccomp: EPERM for the size of every socket's buffers")


async def test_memory_hidden_in_unix_sockets(held: Held) -> None:
    """Each holds 208 kB; a process may have 60 of them, and there may be 64 processes."""
    code = """
import os, socket, time
for _ in range(40):
    if os.fork() == 0: break
pairs = []
try:
    while True: pairs.append(socket.socketpair())
except OSError: pass
for end in (end for pair in pairs for end in pair):
    end.setblocking(False)
    try:
        while True: end.send(bytes(1 << 14))
    except OSError: pass
time.sleep(30)
"""
    async with Python(timeout=20, memory_mb=64) as toolset:
        held(await counted(toolset, code))


async def test_memory_hidden_in_tcp_connections_to_itself(python: Python, held: Held) -> None:
    made = await refused(python, "attempt(socket.create_server, ('127.0.0.1', 0))", "EAFNOSUPPORT")
    held(f"seccomp: {made}")


async def test_memory_hidden_in_pipes(python: Python, held: Held) -> None:
    code = """
import fcntl
total = pipes = 0
try:
    while True:
        read, write = os.pipe(); pipes += 1
        attempt(fcntl.fcntl, write, 1031, 1 << 20)
        os.set_blocking(write, False)
        try:
            while True: total += os.write(write, bytes(1 << 16))
        except BlockingIOError: pass
except OSError as error: stopped = errno.errorcode[error.errno]
os.closerange(3, 50)
pipes, total >> 20, stopped
"""
    pipes, megabytes, stopped = eval(await run(python, code))
    assert (pipes <= 32, megabytes <= 32, stopped) == (True, True, "EMFILE")
    held(f"rlimit NOFILE: {stopped} after {pipes} pipes with {megabytes} MB")


async def test_mappings_without_end(python: Python, held: Held) -> None:
    code = """
libc.mmap.restype = ctypes.c_void_p
none = ctypes.c_long(0)
next((i, errno.errorcode[ctypes.get_errno()]) for i in range(200_000)
     if libc.mmap(none, ctypes.c_size_t(4096), i % 2, 0x22, -1, none) == 2**64 - 1)
"""
    said, stopped = eval(await run(python, code))
    assert said < 66_000
    held(f"vm.max_map_count: {stopped} after {said:,} mappings")


async def test_timers_without_end(python: Python, held: Held) -> None:
    code = """
stopped = 0
for stopped in range(5000):
    if call(222 if os.uname().machine == 'x86_64' else 107, 1, 0, ctypes.addressof(ctypes.c_int())) != 'allowed': break
stopped
"""
    said = int(await run(python, code))
    assert said <= 256
    held(f"rlimit SIGPENDING: stopped after {said} timers")


async def test_limits_are_raised(python: Python, held: Held) -> None:
    raise_it = "try: resource.setrlimit(resource.RLIMIT_NPROC, (500, 500))\nexcept ValueError: print('refused')"
    assert await run(python, f"import resource\n{raise_it}") == "refused"
    assert await run(python, "resource.prlimit(1, resource.RLIMIT_DATA)[1] >> 20") == "256"
    held("hard limits: not allowed to raise maximum limit")


# Disk


@pytest.mark.parametrize(("folder", "most"), [("/tmp", 64), ("/workspace", 66), ("/dev/shm", 16)])
async def test_a_full_disk(python: Python, held: Held, folder: str, most: int) -> None:
    code = f"""
written, files = 0, []
try:
    for i in range(5):
        files.append(open(f"{folder}/{{i}}", "wb", buffering=0))
        for _ in range(40): written += files[-1].write(bytes(1 << 20))
except OSError as error: print(errno.errorcode[error.errno])
written >> 20
"""
    stopped, written = (await run(python, code)).split("\n")[:2]
    assert int(written) <= most
    held(f"tmpfs size: {stopped} after {written} MB")


async def test_one_file_of_a_terabyte(python: Python, held: Held) -> None:
    said = (await run(python, "file = open('/tmp/big', 'wb'); attempt(file.truncate, 1 << 40)")).strip("'")
    assert said == "EFBIG"
    held(f"rlimit FSIZE: {said}")


async def test_a_core_dump(python: Python, held: Held) -> None:
    assert await run(python, "import resource; resource.getrlimit(resource.RLIMIT_CORE)") == "(0, 0)"
    said = await run(python, "os.abort()")
    assert "the Python process ended" in said
    held("rlimit CORE: (0, 0)")
