"""No one gets in or out: each attack runs for real in the sandbox, and fails there."""

from __future__ import annotations

import os
import platform
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import anyio
import pytest
from thinkloop.tools import sandbox_limits, sandbox_session, seccomp
from thinkloop.tools.python import Python
from thinkloop.tools.sandbox import fresh_uid
from thinkloop.tools.sandbox_limits import delegated_cgroup, join_cgroup, process_tree

pytestmark = [pytest.mark.anyio, pytest.mark.skipif(sys.platform != "linux", reason="the sandbox is bubblewrap")]

CALL = """
import ctypes, errno, os, socket
libc = ctypes.CDLL(None, use_errno=True)
def call(number, *arguments):
    result = libc.syscall(ctypes.c_long(number), *[ctypes.c_long(a) for a in arguments])
    return "allowed" if result >= 0 else errno.errorcode[ctypes.get_errno()]
def attempt(action, *arguments):
    try:
        return action(*arguments)
    except OSError as error:
        return errno.errorcode.get(error.errno, str(error))
"""
NUMBERS = {name: row[platform.machine() == "aarch64"] for name, row in {**seccomp._DENIED, **seccomp._SPECIAL}.items()}


@pytest.fixture
async def python() -> AsyncIterator[Python]:
    async with Python(timeout=10, memory_mb=256) as toolset:
        await toolset.run(CALL)
        yield toolset


async def run(toolset: Python, code: str) -> str:
    return (await toolset.run(code)).content


def inside(toolset: Python) -> list[int]:
    """The host's numbers of all processes of the running session."""
    assert toolset._session is not None
    return list(process_tree(toolset._session._process.pid))


async def gone(pids: list[int], seconds: float = 3.0) -> bool:
    """Whether all of them have ended within the time (a zombie has)."""
    until = time.monotonic() + seconds
    while any(map(_alive, pids)):
        if time.monotonic() > until:
            return False
        await anyio.sleep(0.02)
    return True


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


# Processes and memory


async def test_a_fork_bomb_stops_at_the_limit(python: Python) -> None:
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
len(children) < 64
"""
    assert await run(python, code) == "stopped\nTrue"


async def test_a_runaway_fork_bomb_ends_with_the_call(python: Python) -> None:
    python.timeout = 0.5
    old = inside(python)
    result = await run(python, "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass")
    assert "Stopped after 0.5 s" in result
    await run(python, "import os; os._exit(0)")
    assert await gone(old)
    assert await run(python, "1 + 1") == "2"


async def test_a_thread_bomb_stops_at_the_limit(python: Python) -> None:
    code = """
import threading
done, threads = threading.Event(), []
try:
    for _ in range(500):
        threads.append(threading.Thread(target=done.wait)); threads[-1].start()
except (RuntimeError, MemoryError): print("stopped")
done.set()
len(threads) <= 64
"""
    assert await run(python, code) == "stopped\nTrue"


async def test_one_process_that_takes_too_much_meets_memory_error_and_lives(python: Python) -> None:
    await run(python, "kept, hoard = 7, []")
    assert (await run(python, "while True: hoard.append(bytearray(10 << 20))")).endswith("MemoryError")
    assert await run(python, "del hoard\nkept") == "7"


async def test_many_processes_that_together_take_too_much_are_ended(python: Python) -> None:
    code = """
import os, time
for _ in range(10):
    if os.fork() == 0:
        held = bytearray(100 << 20); time.sleep(30)
time.sleep(30)
"""
    started, old = time.perf_counter(), inside(python)
    assert "it used more than 320 MB of memory" in await run(python, code)
    assert time.perf_counter() - started < 5
    assert await gone(old)


async def test_memory_left_growing_between_calls_is_ended_too(python: Python) -> None:
    code = """
import os, time
for _ in range(10):
    if os.fork() == 0:
        time.sleep(0.3); held = bytearray(100 << 20); time.sleep(30)
"""
    await run(python, code)
    await anyio.sleep(1.5)
    assert "it used more than 320 MB of memory" in await run(python, "1")


async def test_shared_memory_that_no_process_counts_is_refused(python: Python) -> None:
    assert await run(python, "import mmap; attempt(mmap.mmap, -1, 1 << 20)") == "'EPERM'"
    assert await run(python, "attempt(os.open, '/dev/zero', os.O_RDWR)") == "'ENOENT'"
    assert await run(python, "attempt(os.memfd_create, 'x')") == "'EPERM'"
    huge = f"call({NUMBERS['mmap']}, 0, 2 << 20, 3, 0x40022, -1, 0)"
    assert await run(python, huge) == "'EPERM'"


async def test_a_private_mapping_and_a_file_mapping_still_work(python: Python) -> None:
    private = (
        "import mmap\nm = mmap.mmap(-1, 1 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS); m[:2] = b'ok'; m[:2]"
    )
    assert await run(python, private) == "b'ok'"
    code = "f = open('/tmp/m', 'w+b'); f.truncate(4096)\nm = mmap.mmap(f.fileno(), 4096); m[:2] = b'ok'; bytes(m[:2])"
    assert await run(python, code) == "b'ok'"


@pytest.mark.parametrize(("folder", "most"), [("/tmp", 64), ("/workspace", 66), ("/dev/shm", 16)])
async def test_the_disk_is_small(python: Python, folder: str, most: int) -> None:
    code = f"""
written, files = 0, []
try:
    for i in range(5):
        files.append(open(f"{folder}/{{i}}", "wb", buffering=0))
        for _ in range(40): written += files[-1].write(bytes(1 << 20))
except OSError: print("stopped")
written >> 20 <= {most}
"""
    assert await run(python, code) == "stopped\nTrue"


@pytest.mark.parametrize("path", ["/x", "/dev/x", "/usr/x", "/etc/x", "/proc/sys/kernel/core_pattern", "/runner.py"])
async def test_everything_else_is_read_only(python: Python, path: str) -> None:
    assert await run(python, f"attempt(open, {path!r}, 'w')") in ("'EROFS'", "'EACCES'", "'EPERM'", "'ENOENT'")
    assert await run(python, f"attempt(os.chmod, {path!r}, 0o777)") in ("'EROFS'", "'EACCES'", "'EPERM'", "'ENOENT'")


async def test_a_bomb_of_empty_files_is_ended() -> None:
    async with Python(timeout=20, memory_mb=64) as toolset:
        code = "import os\nfor i in range(400_000): os.close(os.open(f'/tmp/{i}', os.O_CREAT))"
        assert "it used more than 128 MB of memory" in await run(toolset, code)


async def test_no_core_is_dumped_and_limits_cannot_be_raised(python: Python) -> None:
    assert await run(python, "import resource; resource.getrlimit(resource.RLIMIT_CORE)") == "(0, 0)"
    raise_it = "try: resource.setrlimit(resource.RLIMIT_NPROC, (500, 500))\nexcept ValueError: print('refused')"
    assert await run(python, raise_it) == "refused"
    assert await run(python, "resource.prlimit(1, resource.RLIMIT_DATA)[1] >> 20") == "256"


# The network


async def test_the_hosts_loopback_and_the_world_are_out_of_reach(python: Python) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert await run(python, f"attempt(socket.create_connection, ('127.0.0.1', {port}), 1)") == "'ECONNREFUSED'"
    assert await run(python, "attempt(socket.create_connection, ('192.0.2.1', 80), 1)") == "'ENETUNREACH'"
    assert "Errno" in await run(python, "attempt(socket.getaddrinfo, 'example.org', 80)")
    interfaces = await run(python, "[line.split(':')[0].strip() for line in open('/proc/net/dev') if ':' in line]")
    assert interfaces == "['lo']"


async def test_the_hosts_abstract_unix_sockets_are_out_of_reach(python: Python) -> None:
    name = f"\0thinkloop-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(name)
        server.listen()
        code = f"attempt(socket.socket(socket.AF_UNIX).connect, {name!r})"
        assert await run(python, code) == "'ECONNREFUSED'"


async def test_only_plain_socket_families_exist(python: Python) -> None:
    others = set(range(64)) - {1, 2, 10}
    refused = f"{{call({NUMBERS['socket']}, family, kind, 0) for family in {others} for kind in (1, 2, 3)}}"
    assert await run(python, refused) == "{'EAFNOSUPPORT'}"
    assert await run(python, "attempt(socket.socket, 40, 1)") == "'EAFNOSUPPORT'"  # AF_VSOCK: the hypervisor
    assert await run(python, "attempt(socket.socket, socket.AF_INET, socket.SOCK_RAW, 1)") == "'EPERM'"
    assert await run(python, "a, b = socket.socketpair(); a.send(b'ok'); b.recv(2)") == "b'ok'"


# Files, environment, other processes


@pytest.mark.parametrize(
    "path",
    [
        "/etc/shadow",
        "/etc/passwd",
        "/root",
        "/home",
        "/sys",
        "/run",
        "/var",
        "/mnt",
        "/dev/kvm",
        "/dev/vda",
        "/dev/tty",
    ],
)
async def test_the_hosts_files_are_absent(python: Python, path: str) -> None:
    assert await run(python, f"os.path.exists({path!r})") == "False"


async def test_nothing_of_the_host_shows_in_the_environment_or_the_command_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("THINKLOOP_TEST_SECRET", "sesame")
    read = "''.join(open(f'/proc/{p}/' + '{}').read() for p in os.listdir('/proc') if p.isdigit())"
    async with Python() as toolset:
        await run(toolset, "import os")
        environment = await run(toolset, read.replace("{}", "environ", 1).replace("{}", "environ"))
        assert "sesame" not in environment
        assert str(Path.cwd()) not in environment
        assert str(Path.cwd()) not in await run(toolset, read.replace("+ '{}'", "+ 'cmdline'"))
        assert await run(toolset, "sorted(os.environ)") == "['HOME', 'LANG', 'PATH', 'PWD', 'TMPDIR']"
        assert await run(toolset, "open('/proc/1/environ').read()") == "''"


async def test_only_its_own_processes_and_descriptors_are_seen(python: Python) -> None:
    assert await run(python, "sorted(int(p) for p in os.listdir('/proc') if p.isdigit())") == "[1, 2]"
    opened = "[fd for fd in range(64) if attempt(os.fstat, fd) != 'EBADF']"
    assert await run(python, opened) == "[0, 1, 2, 50]"
    links = "sorted(os.readlink(f'/proc/1/fd/{fd}').split(':')[0] for fd in os.listdir('/proc/1/fd'))"
    assert await run(python, links) == "['/dev/null', 'anon_inode', 'pipe', 'pipe']"


async def test_a_signal_to_everyone_stays_inside(python: Python) -> None:
    assert await run(python, "attempt(os.kill, -1, 9), attempt(os.kill, 1, 9), os.getppid()") == "('ESRCH', None, 1)"


async def test_it_has_no_privilege_and_gets_none(python: Python) -> None:
    status = await run(python, "print(open('/proc/self/status').read())")
    assert re.findall(r"^(Cap\w+):\s0*(\w)$", status, re.M) == [
        (f"Cap{k}", "0") for k in ("Inh", "Prm", "Eff", "Bnd", "Amb")
    ]
    assert "NoNewPrivs:\t1" in status
    assert "Seccomp:\t2" in status
    assert await run(python, "attempt(os.setuid, 0)") in ("'EINVAL'", "'EPERM'")
    assert await run(python, "attempt(os.nice, -10)") in ("'EPERM'", "'EACCES'")
    assert await run(python, "attempt(os.sched_setscheduler, 0, os.SCHED_FIFO, os.sched_param(1))") == "'EPERM'"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root drops to another user")
async def test_as_root_every_session_has_its_own_user() -> None:
    async with Python() as one, Python() as two:
        owners = [{Path(f"/proc/{pid}").stat().st_uid for pid in inside(toolset)} for toolset in (one, two)]
    assert [len(uids) for uids in owners] == [1, 1]
    assert owners[0] != owners[1]
    assert min(owners[0] | owners[1]) >= 1000
    assert len({fresh_uid() for _ in range(50)}) > 45


# System calls


async def test_every_denied_call_is_denied(python: Python) -> None:
    numbers = {name: NUMBERS[name] for name in seccomp._DENIED if NUMBERS[name]}
    assert (
        await run(python, f"{{n: r for n, k in {numbers!r}.items() if (r := call(k, 0, 0, 0, 0, 0)) != 'EPERM'}}")
        == "{}"
    )


async def test_namespaces_cannot_be_made_by_any_door(python: Python) -> None:
    clone = f"{{call({NUMBERS['clone']}, 17 | 1 << bit, 0, 0, 0, 0) for bit in (17, 25, 26, 27, 28, 29, 30)}}"
    assert await run(python, clone) == "{'EPERM'}"
    assert await run(python, f"call({NUMBERS['clone3']}, 0, 0)") == "'ENOSYS'"
    assert await run(python, "{call(n, 0, 0, 0) for n in range(463, 600)}") == "{'ENOSYS'}"


async def test_keystrokes_cannot_be_put_into_a_terminal(python: Python) -> None:
    for request in (0x5412, 0x541C, 0x1_0000_5412):
        assert await run(python, f"call({NUMBERS['ioctl']}, 0, {request}, 0)") == "'EPERM'"


@pytest.mark.skipif(platform.machine() != "x86_64", reason="32-bit entry points of x86")
@pytest.mark.parametrize("door", ["libc.syscall(ctypes.c_long(0x40000000 + 39))", "int80()"])
async def test_a_foreign_call_table_is_deadly(python: Python, door: str) -> None:
    code = """
import mmap
def int80():
    page = mmap.mmap(-1, 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=7)
    page.write(bytes([0xB8, 20, 0, 0, 0, 0xCD, 0x80, 0xC3]))
    ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))()
"""
    assert await run(python, code) == "(no output)"
    assert "the Python process ended" in await run(python, door)


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


# The channel


FORGE = """
import json, os, struct, sys
def frame(data): return struct.pack(">I", len(data)) + data
def nonce():
    f = sys._getframe()
    while "request" not in f.f_locals: f = f.f_back
    return f.f_locals["request"]["nonce"]
"""
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
}


@pytest.mark.parametrize("forgery", FORGERIES.values(), ids=FORGERIES.keys())
async def test_a_forged_reply_ends_the_session_and_is_told(python: Python, forgery: str) -> None:
    await run(python, FORGE)
    first = await run(python, forgery)
    second = await run(python, "1 + 1")
    assert "it sent a reply" in first + second
    assert second.endswith("2")


async def test_a_reply_forged_ahead_of_the_next_call_is_noticed(python: Python) -> None:
    await run(python, FORGE)
    await run(python, "import threading\nthreading.Timer(0.1, os.write, (50, frame(b'{}'))).start()")
    await anyio.sleep(0.3)
    assert "it sent a reply that nobody had asked for" in await run(python, "1 + 1")
    assert await run(python, "1 + 1") == "2"


async def test_a_runner_turned_against_us_can_only_send_text(python: Python) -> None:
    await run(python, FORGE)
    text = "'\\x1b]0;owned\\x07\\ud800' + 'x' * 1000"
    await run(python, f"os.write(50, frame(json.dumps({{'nonce': nonce(), 'value': {text}}}).encode()))")
    assert "\x1b" not in await run(python, "1")


async def test_endless_output_is_stopped_and_bounded(python: Python) -> None:
    result = await python.run("kept = 7\nwhile True: print('x' * 5000)")
    assert "Stopped: it printed more than 64 MB. Variables are kept." in result.content
    assert len(result.content) < 8100
    assert await run(python, "kept") == "7"


async def test_closing_every_descriptor_hurts_only_itself(python: Python) -> None:
    assert "the Python process ended" in await run(python, "os.closerange(0, 64)")
    assert await run(python, "1 + 1") == "2"


# Lives and deaths


async def test_a_daemon_dies_with_its_session(python: Python) -> None:
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


async def test_leaving_the_toolset_leaves_nothing_behind() -> None:
    before = {path.name for path in Path("/proc/self/fd").iterdir()}
    async with Python() as toolset:
        pids = inside(toolset)
    assert await gone(pids)
    assert {path.name for path in Path("/proc/self/fd").iterdir()} <= before


async def test_a_session_ended_at_any_moment_of_its_start_leaves_nothing_behind() -> None:
    for delay in (0, 1, 2, 3, 4, 6, 8, 12, 16, 24):
        session = sandbox_session.Session(sandbox_session.Interpreter("/usr/bin/python3"), sandbox_session.Limits())
        time.sleep(delay / 1000)
        pids = list(process_tree(session._process.pid))
        session.end()
        assert await gone(pids)


async def test_many_sessions_at_once_do_not_meet() -> None:
    async def one(number: int) -> None:
        async with Python(timeout=20) as toolset:
            await run(toolset, f"open('/tmp/mine', 'w').write('{number}'); n = {number}")
            await anyio.sleep(0.1)
            seen[number] = await run(toolset, "open('/tmp/mine').read(), n")

    seen: dict[int, str] = {}
    async with anyio.create_task_group() as group:
        for number in range(12):
            group.start_soon(one, number)
    assert seen == {number: f"('{number}', {number})" for number in range(12)}


async def test_when_the_host_is_killed_the_sandbox_dies() -> None:
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
