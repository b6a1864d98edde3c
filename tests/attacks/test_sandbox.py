"""No one gets out: each attempt runs for real in the python sandbox, as a model would make it, and fails there."""

from __future__ import annotations

import os
import platform
import re
import socket
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import anyio
import pytest
from cell import CALL, NUMBERS, cell, inside, refused, run
from thinkloop.agent.agent import Agent
from thinkloop.agent.testing import ScriptedModel
from thinkloop.tools import seccomp
from thinkloop.tools.addresses import Policy
from thinkloop.tools.mcp_client import MCP
from thinkloop.tools.proxy import Exchange, Proxy
from thinkloop.tools.python import Python
from thinkloop.tools.sandbox import fresh_uid

pytestmark = [pytest.mark.anyio, pytest.mark.skipif(sys.platform != "linux", reason="the sandbox is bubblewrap")]

Held = Callable[[str], None]
PLAIN_SERVER = Path(__file__).parents[1] / "mcp_servers" / "plain.py"


@pytest.fixture(scope="module")
async def toolset() -> AsyncIterator[Python]:
    async with Python(timeout=10, memory_mb=256) as shared:
        yield shared


@pytest.fixture
async def python(toolset: Python) -> Python:
    """The module's session, or a fresh one where a row ended it: nothing here changes one and lets it live."""
    await run(toolset, CALL)
    return toolset


# The network


async def test_the_hosts_loopback(python: Python, held: Held) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        said = await refused(python, f"attempt(socket.create_connection, ('127.0.0.1', {port}), 1)", "EAFNOSUPPORT")
    interfaces = await run(python, "[line.split(':')[0].strip() for line in open('/proc/net/dev') if ':' in line]")
    assert interfaces == "['lo']"
    held(f"seccomp: {said}; network namespace: interfaces {interfaces}")


@pytest.mark.parametrize("address", ["192.0.2.1", "169.254.169.254", "10.0.0.1", "255.255.255.255"])
async def test_the_world(python: Python, held: Held, address: str) -> None:
    connect = f"attempt(socket.create_connection, ('{address}', 80), 1)"
    held(f"seccomp: {await refused(python, connect, 'EAFNOSUPPORT')}")


async def test_names(python: Python, held: Held) -> None:
    said = await run(python, "attempt(socket.getaddrinfo, 'example.org', 80)")
    assert "Errno -" in said
    held(f"network namespace: {said}")


async def test_the_hosts_abstract_unix_sockets(python: Python, held: Held) -> None:
    name = f"\0thinkloop-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(name)
        server.listen()
        said = await refused(python, f"attempt(socket.socket(socket.AF_UNIX).connect, {name!r})", "ECONNREFUSED")
    held(f"network namespace: {said}")


async def test_all_other_socket_families(python: Python, held: Held) -> None:
    others = set(range(64)) - {1}
    made = f"{{call({NUMBERS['socket']}, family, kind, 0) for family in {others} for kind in (1, 2, 3)}}"
    assert await run(python, made) == "{'EAFNOSUPPORT'}"
    assert await run(python, "a, b = socket.socketpair(); a.send(b'ok'); b.recv(2)") == "b'ok'"
    held(f"seccomp: EAFNOSUPPORT for {len(others)} families")


async def test_the_hypervisor_by_vsock(python: Python, held: Held) -> None:
    held(f"seccomp: {await refused(python, 'attempt(socket.socket, 40, 1)', 'EAFNOSUPPORT')}")


async def test_raw_sockets(python: Python, held: Held) -> None:
    said = await refused(python, "attempt(socket.socket, socket.AF_INET, socket.SOCK_RAW, 1)", "EAFNOSUPPORT")
    held(f"seccomp: {said}")


async def test_the_socket_and_the_port_of_the_browsers_proxy(python: Python, held: Held, tmp_path: Path) -> None:
    seen: list[Exchange] = []
    tmp_path.chmod(0o711)  # as for a browser that runs as another user
    async with Proxy(Policy(), unix_socket=tmp_path / "proxy.sock", on_exchange=seen.append) as proxy:
        path, port = str(tmp_path / "proxy.sock"), int(proxy.url.rpartition(":")[2])
        by_path = await refused(python, f"attempt(socket.socket(socket.AF_UNIX).connect, {path!r})", "ENOENT")
        by_port = await refused(python, f"attempt(socket.create_connection, ('127.0.0.1', {port}), 1)", "EAFNOSUPPORT")
    assert seen == []
    held(f"mount namespace: {by_path}; seccomp: {by_port}")


async def test_the_pipes_of_an_mcp_server(python: Python, held: Held) -> None:
    async with MCP(name="x", command=[sys.executable, "-I", "-S", str(PLAIN_SERVER)], deadline=10) as server:
        pid = (await server.tools()[0].call({"text": "pid"})).content
        said = await refused(python, f"attempt(os.open, '/proc/{pid}/fd/0', os.O_WRONLY)", "ENOENT")
        assert (await server.tools()[0].call({"text": "still mine"})).content == "still mine"
    held(f"process namespace: {said}")


# Files


@pytest.mark.parametrize(
    "path",
    ["/etc/shadow", "/etc/passwd", "/root", "/home", "/sys", "/run", "/var", "/mnt", "/dev/kvm", "/dev/vda", "/dev/tty",
     "/dev/zero", "/dev/mem", "/dev/fuse", "/dev/net/tun", "/boot", "/srv", "/lost+found"],
)  # fmt: skip
async def test_the_hosts_files(python: Python, held: Held, path: str) -> None:
    held(f"mount namespace: {await refused(python, f'attempt(os.stat, {path!r})', 'ENOENT')}")


@pytest.mark.parametrize(
    "path",
    ["/proc/1/root/etc/shadow", "/proc/1/cwd/../etc/shadow", "/proc/self/root/../../etc/shadow", "/workspace/../../etc/shadow",
     "//etc//shadow", "/usr/../etc/shadow", "/proc/self/fd/../../../etc/shadow", "/proc/thread-self/root/etc/shadow"],
)  # fmt: skip
async def test_the_hosts_files_by_a_detour(python: Python, held: Held, path: str) -> None:
    said = await refused(python, f"attempt(open, {path!r})", "ENOENT", "EACCES")
    held(f"mount namespace: {said}")


async def test_the_hosts_files_by_a_link_that_is_left_as_a_result(python: Python, held: Held) -> None:
    code = """
for name, target in {'a.txt': '/etc/shadow', 'b.txt': '/proc/1/environ', 'c.txt': '/proc/self/root/etc/passwd'}.items():
    os.symlink(target, name)
os.symlink('/etc', 'folder')
"""
    result = await cell(python, code)
    assert (result.files, result.record.get("files")) == ((), None)
    held("links are no results: none of 4 was named or opened")


@pytest.mark.parametrize(
    "path", ["/x", "/dev/x", "/usr/x", "/etc/x", "/proc/sys/kernel/core_pattern", "/proc/sysrq-trigger", "/runner.py"]
)
async def test_everything_outside_of_the_scratch_folders_is_read_only(python: Python, held: Held, path: str) -> None:
    names = ("EROFS", "EACCES", "EPERM", "ENOENT")
    said = await refused(python, f"attempt(open, {path!r}, 'w')", *names)
    await refused(python, f"attempt(os.chmod, {path!r}, 0o777)", *names)
    held(f"{'read-only mounts' if said == 'EROFS' else 'own user id and /proc'}: {said}")


@pytest.mark.parametrize("path", ["/proc/kcore", "/proc/kmsg", "/proc/keys", "/proc/timer_list", "/proc/vmallocinfo"])
async def test_the_kernels_memory_and_secrets(python: Python, held: Held, path: str) -> None:
    said = (await run(python, f"attempt(lambda: len(open({path!r}, 'rb').read(1 << 16)))")).strip("'")
    assert said in ("0", "EACCES", "EPERM", "ENOENT"), said
    held(f"own user id and /proc: {'nothing in it' if said == '0' else said}")


async def test_a_device_is_made(python: Python, held: Held) -> None:
    held(f"no capabilities: {await refused(python, 'attempt(os.mknod, chr(120), 0o60666, 0xFE00)', 'EPERM')}")


async def test_the_trace_of_its_own_run(held: Held, tmp_path: Path) -> None:
    code = f"import os; [os.path.exists(p) for p in ('{tmp_path}', '{tmp_path}/t/events.jsonl')]"
    script = [{"calls": [("python", {"code": code})]}, {"content": "Done."}]
    model = ScriptedModel(script)
    result = await Agent(model, [Python()], trace=tmp_path / "t").run("Find your trace.")
    assert result.reason == "answered"
    assert (tmp_path / "t" / "events.jsonl").exists()
    said = model.conversations[-1][-1]["content"]
    assert said == "[False, False]"
    held(f"mount namespace: exists -> {said}")


# Environment and other processes


async def test_the_hosts_environment_and_command_line(held: Held, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THINKLOOP_TEST_SECRET", "sesame")
    read = "''.join(open(f'/proc/{p}/' + '{}').read() for p in os.listdir('/proc') if p.isdigit())"
    async with Python() as toolset:
        await run(toolset, "import os")
        environment = await run(toolset, read.replace("{}", "environ", 1).replace("{}", "environ"))
        assert "sesame" not in environment
        assert str(Path.cwd()) not in environment
        assert str(Path.cwd()) not in await run(toolset, read.replace("+ '{}'", "+ 'cmdline'"))
        names = await run(toolset, "sorted(os.environ)")
        assert names == "['HOME', 'LANG', 'PATH', 'PWD', 'TMPDIR']"
        assert await run(toolset, "open('/proc/1/environ').read()") == "''"
    held(f"empty environment: {names}, of pid 1 nothing")


async def test_other_processes_and_inherited_descriptors(held: Held) -> None:
    links = "sorted(os.readlink(f'/proc/1/fd/{fd}').split(':')[0] for fd in os.listdir('/proc/1/fd'))"
    async with Python() as fresh:
        await run(fresh, CALL)
        pids = await run(fresh, "sorted(int(p) for p in os.listdir('/proc') if p.isdigit())")
        opened = await run(fresh, "[fd for fd in range(64) if attempt(os.fstat, fd) != 'EBADF']")
        assert (pids, opened) == ("[1, 2]", "[0, 1, 2, 50]")
        assert await run(fresh, links) == "['/dev/null', 'anon_inode', 'pipe', 'pipe']"
    held(f"process namespace: pids {pids}, descriptors {opened}")


async def test_a_signal_to_everyone(python: Python, held: Held) -> None:
    said = await run(python, "attempt(os.kill, -1, 9), attempt(os.kill, 1, 9), os.getppid()")
    assert said == "('ESRCH', None, 1)"
    assert await run(python, "1 + 1") == "2"
    held("process namespace: nobody else was there (ESRCH)")


async def test_pid_1_is_taken_over_by_its_memory(python: Python, held: Held) -> None:
    """bubblewrap is pid 1 inside and has the same user, so its memory can be written; there is nothing to be won by it."""
    status = await run(python, "print(open('/proc/1/status').read())")
    assert re.search(r"CapEff:\s0+\n", status)
    assert re.search(r"CapBnd:\s0+\n", status)
    assert "NoNewPrivs:\t1" in status
    assert "Seccomp:\t2" in status
    assert await run(python, "import resource; resource.prlimit(1, resource.RLIMIT_DATA)[1] >> 20") == "256"
    held("pid 1 has the same filter and limits, and no capabilities: Seccomp 2, NoNewPrivs 1, CapBnd 0")


async def test_privileges(python: Python, held: Held) -> None:
    status = await run(python, "print(open('/proc/self/status').read())")
    assert re.findall(r"^(Cap\w+):\s0*(\w)$", status, re.M) == [
        (f"Cap{k}", "0") for k in ("Inh", "Prm", "Eff", "Bnd", "Amb")
    ]
    assert "NoNewPrivs:\t1" in status
    assert "Seccomp:\t2" in status
    await refused(python, "attempt(os.setuid, 0)", "EINVAL", "EPERM")
    await refused(python, "attempt(os.nice, -10)", "EPERM", "EACCES")
    said = await refused(python, "attempt(os.sched_setscheduler, 0, os.SCHED_FIFO, os.sched_param(1))", "EPERM")
    held(f"no capabilities, no new privileges: {said}")


@pytest.mark.parametrize(
    "command",
    ["su -c id", "mount -t tmpfs none /tmp", "unshare -Ur id", "nsenter -t 1 -a id", "bwrap --ro-bind / / id"],
)
async def test_a_privileged_program(python: Python, held: Held, command: str) -> None:
    code = f"import subprocess as s; r = s.run({command.split(' ')!r}, capture_output=True, text=True); r.returncode, r.stderr"
    result = await run(python, code)
    status = re.match(r"\((\d+), (.*)\)$|.*FileNotFoundError", result.rpartition("\n")[2])
    assert status, result
    assert status[1] != "0"
    said = (status[2] or "not there").strip("'\"").replace("\\n", " ")
    held(f"no new privileges, seccomp: {said[:100]}")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root drops to another user")
async def test_the_files_of_another_session_by_the_same_user(held: Held) -> None:
    async with Python() as one, Python() as two:
        owners = [{Path(f"/proc/{pid}").stat().st_uid for pid in inside(toolset)} for toolset in (one, two)]
    assert [len(uids) for uids in owners] == [1, 1]
    assert owners[0] != owners[1]
    assert min(owners[0] | owners[1]) >= 1000
    assert len({fresh_uid() for _ in range(50)}) > 45
    held("a user id for each session, none of them root's")


async def test_sessions_meet(held: Held) -> None:
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
    held("mount namespace: each of 12 sessions read its own /tmp/mine")


# System calls


async def test_every_call_that_widens_the_kernels_surface(python: Python, held: Held) -> None:
    numbers = {name: NUMBERS[name] for name in seccomp._DENIED if NUMBERS[name]}
    code = f"{{n: r for n, k in {numbers!r}.items() if (r := call(k, 0, 0, 0, 0, 0)) != 'EPERM'}}"
    assert await run(python, code) == "{}"
    held(f"seccomp: EPERM for all {len(numbers)}")


async def test_namespaces_by_any_door(python: Python, held: Held) -> None:
    clone = f"{{call({NUMBERS['clone']}, 17 | 1 << bit, 0, 0, 0, 0) for bit in (17, 25, 26, 27, 28, 29, 30)}}"
    assert await run(python, clone) == "{'EPERM'}"
    said = await refused(python, f"call({NUMBERS['clone3']}, 0, 0)", "ENOSYS")
    held(f"seccomp: clone EPERM, clone3 {said}")


async def test_calls_newer_than_the_filter(python: Python, held: Held) -> None:
    assert await run(python, "{call(n, 0, 0, 0) for n in range(463, 600)}") == "{'ENOSYS'}"
    held("seccomp: ENOSYS for 463 to 599")


@pytest.mark.parametrize("request_number", [0x5412, 0x541C, 0x1_0000_5412])
async def test_keystrokes_put_into_a_terminal(python: Python, held: Held, request_number: int) -> None:
    code = f"call({NUMBERS['ioctl']}, 0, {request_number}, 0)"
    held(f"seccomp: {await refused(python, code, 'EPERM')}")


@pytest.mark.skipif(platform.machine() != "x86_64", reason="32-bit entry points of x86")
@pytest.mark.parametrize("door", ["libc.syscall(ctypes.c_long(0x40000000 + 39))", "int80()"])
async def test_a_foreign_call_table(python: Python, held: Held, door: str) -> None:
    code = """
import mmap
def int80():
    page = mmap.mmap(-1, 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=7)
    page.write(bytes([0xB8, 20, 0, 0, 0, 0xCD, 0x80, 0xC3]))
    ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))()
"""
    assert await run(python, code) == "(no output)"
    said = await run(python, door)
    assert "the Python process ended" in said
    assert await run(python, "1 + 1") == "2"
    held(f"seccomp: killed ({said.partition(';')[0].partition('.')[0]})")


async def test_a_process_is_traced(python: Python, held: Held) -> None:
    code = "import time\npid = os.fork()\nif pid == 0: time.sleep(30); os._exit(0)\n"
    said = await refused(python, f"{code}\nr = call({NUMBERS['ptrace']}, 16, pid, 0, 0); os.kill(pid, 9); r", "EPERM")
    held(f"seccomp: {said}")
