"""How the browser is locked in: which Chromium, and what bubblewrap gives it.

Inside are a read-only system, sized scratch folders, a process and a network namespace of their own, and one way out: the
unix socket of our proxy. Chromium's own sandbox stays on, so nested user namespaces stay allowed.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from thinkloop.tools import bwrap, seccomp
from thinkloop.tools.sandbox import Interpreter, SandboxError, explain_failure, find_bwrap, fresh_uid, interpreters
from thinkloop.traces.events import Json, ThinkloopError

if TYPE_CHECKING:
    from playwright.async_api import ProxySettings

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
SOCKETS = {"proxy.sock": 3128, "private.sock": 3129}
"""The proxies' sockets, by name here and under /run inside, and the relay's ports for them, on the loopback of the browser's
own network namespace. `private.sock` is the way to private hosts, where a person has allowed some."""
PROXY: ProxySettings = {"server": "http://127.0.0.1:3128", "bypass": "<-loopback>"}
PRIVATE_PROXY: ProxySettings = {"server": "http://127.0.0.1:3129", "bypass": "<-loopback>"}
HOME, PROFILE, RELAY = "/home/browser", "/home/browser/profile", "/run/relay.py"

_MB = 1024 * 1024
_INSTALL = "install one with `apt-get install chromium`, or name it: Browser(executable=...)"
_LAUNCHERS = {"chromium": "/usr/lib/chromium/chromium"}  # Debian's is a shell script; the program itself starts sooner
_SYSTEM_FILES = ("/etc/ld.so.cache", "/etc/fonts", "/etc/alternatives", "/etc/localtime", "/var/cache/fontconfig")
_POLICY = {  # a second wall behind the checks of `browser_open`; Chromium obeys it whatever a page or a model asks for
    "URLBlocklist": ["file://*", "chrome://*", "chrome-untrusted://*", "devtools://*", "view-source:*", "ftp://*"],
    "DnsOverHttpsMode": "off",
    "BuiltInDnsClientEnabled": False,
    "NetworkPredictionOptions": 2,
    "WebRtcIPHandling": "disable_non_proxied_udp",
    "BrowserSignin": 0,
}
NEEDED_CALLS = frozenset({  # by Chromium's own sandbox (namespaces too), its crash handler, V8 and the compositor
    "clone", "clone3", "mmap", "setsockopt", "chroot", "unshare", "seccomp", "memfd_create", "ptrace", "process_vm_readv",
    "personality", "kcmp", "mbind", "set_mempolicy", "move_pages", "remap_file_pages", "process_madvise",
})  # fmt: skip
FAMILIES = (seccomp.UNIX, seccomp.INET, seccomp.INET6)  # the relay listens on the loopback of its own network


class BrowserError(ThinkloopError):
    """The browser can't be started; the message names the fix."""


@dataclass(frozen=True, slots=True)
class BrowserLimits:
    """Bounds of one browser process tree."""

    memory_mb: int = 3072
    """Of all processes together, shared pages counted once; a watchdog ends the browser above it."""
    driver_mb: int = 600
    """Of the driver, which has 120 on its own; the same watchdog."""
    disk_mb: int = 256
    """Of the profile, of /tmp and of shared memory, each."""
    file_mb: int = 512
    """Of the largest file."""
    threads: int = 2048
    """Of all processes together; holds where thinkloop runs as root, which gives each browser a user id of its own."""

    def rlimits(self, own_uid: bool) -> dict[str, int]:
        """By name without `RLIMIT_`."""
        bounds = {"CORE": 0, "FSIZE": self.file_mb * _MB, "NOFILE": 8192, "MEMLOCK": 0, "MSGQUEUE": 0}
        return bounds | ({"NPROC": self.threads} if own_uid else {})


def find_chromium(named: str | Path | None = None) -> Path:
    """The Chromium to use: the named one, else the first on the PATH. Raises `BrowserError` where there is none."""
    if named is not None:
        path = shutil.which(str(named)) or ""
        if not path:
            raise BrowserError(f"Browser(executable={str(named)!r}): there is no such program; {_INSTALL}")
        return Path(path)
    found = next(filter(None, (shutil.which(name) for name in NAMES)), None)
    if found is None:
        raise BrowserError(
            f"The browser tool needs Chromium, and none of {', '.join(NAMES)} is on the PATH; {_INSTALL}"
        )
    return Path(found)


def check_machine() -> str:
    """The path of bubblewrap. Raises `BrowserError` where the browser can't be locked in."""
    try:
        return find_bwrap("browser tool")
    except SandboxError as error:
        raise BrowserError(str(error)) from error


def plan(program: str, chromium: Path, folder: Path, limits: BrowserLimits, *, downloads: bool) -> Json:
    """What `browser_launch.py` executes, as JSON. `folder` holds the proxy's socket and, if allowed, the downloads."""
    uid, python, browser = fresh_uid(), _interpreter(), _program(chromium)
    return {
        "bwrap": program,
        "uid": uid,
        "pids": str(folder / "pids"),
        "profile": PROFILE,
        "rlimits": limits.rlimits(uid is not None),
        "arguments": [*_isolation(python), *_system(python, browser), *_scratch(limits), *_ways_out(folder, downloads)],
        "files": {
            RELAY: Path(__file__).with_name("browser_relay.py").read_text(),
            "/etc/passwd": f"browser:x:1000:1000::{HOME}:/usr/sbin/nologin\n",
            "/etc/chromium/policies/managed/thinkloop.json": json.dumps(_POLICY),
            "/etc/opt/chrome/policies/managed/thinkloop.json": json.dumps(_POLICY),
        },
        "filter": seccomp.build_filter(needed=NEEDED_CALLS, families=FAMILIES).hex(),
        "seal": ["--remount-ro", "/", "--chdir", HOME],
        "command": [python.path, "-I", "-S", "-B", RELAY, _relayed(folder), str(browser)],
    }


def _interpreter() -> Interpreter:
    """For the relay: the system's Python where there is one."""
    system = Path("/usr/bin/python3")
    return Interpreter(str(system)) if system.exists() else interpreters()[0]


def _program(chromium: Path) -> Path:
    real = Path(_LAUNCHERS.get(chromium.name, chromium))
    return real if chromium.parent == Path("/usr/bin") and real.exists() else chromium.resolve()


def _isolation(python: Interpreter) -> list[str]:
    environment = {"PATH": "/usr/bin:/bin", "HOME": HOME, "LANG": "C.UTF-8", "TMPDIR": "/tmp"}
    return bwrap.isolation(environment | python.environment(), hostname="browser", has_own=True)


def _system(python: Interpreter, program: Path) -> list[str]:
    arguments = [*bwrap.system(), "--dev", "/dev", *bwrap.where_present(*_SYSTEM_FILES), *python.binds()]
    if not program.is_relative_to("/usr"):
        arguments += ["--ro-bind", str(program.parent), str(program.parent)]
    return arguments


def _scratch(limits: BrowserLimits) -> list[str]:
    return [part for folder in ("/dev/shm", HOME, "/tmp") for part in bwrap.scratch(folder, limits.disk_mb * _MB)]


def _sockets(folder: Path) -> list[str]:
    return [name for name in SOCKETS if (folder / name).exists()]


def _relayed(folder: Path) -> str:
    return ",".join(f"{SOCKETS[name]}=/run/{name}" for name in _sockets(folder))


def _ways_out(folder: Path, downloads: bool) -> list[str]:
    """The proxies' sockets; with `downloads` the one folder of the host that the browser may write to."""
    arguments = [part for name in _sockets(folder) for part in ("--bind", str(folder / name), f"/run/{name}")]
    if downloads:
        arguments += ["--bind", str(folder / "downloads"), str(folder / "downloads")]
    return arguments


def explain(message: str) -> str:
    """One paragraph for a person about a start that failed."""
    return explain_failure(shutil.which("bwrap") or "bwrap", message, tool="browser tool", needs="the browser")
