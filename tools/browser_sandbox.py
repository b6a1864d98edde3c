"""How the browser is locked in: which Chromium, and what bubblewrap gives it.

Inside are a read-only system, sized scratch folders, a process and a network namespace of their own, and one way out: the
unix socket of our proxy. Chromium's own sandbox stays on, so nested user namespaces stay allowed.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from thinkloop.tools import seccomp
from thinkloop.tools.sandbox import Interpreter, SandboxError, find_bwrap, fresh_uid, interpreters
from thinkloop.traces.events import Json, ThinkloopError

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
PORT = 3128  # of the relay, on the loopback of the browser's own network namespace
HOME, PROFILE, SOCKET, RELAY = "/home/browser", "/home/browser/profile", "/run/proxy.sock", "/run/relay.py"

_MB = 1024 * 1024
_INSTALL = "install one with `apt-get install chromium`, or name it: Browser(executable=...)"
_LAUNCHERS = {"chromium": "/usr/lib/chromium/chromium"}  # Debian's is a shell script; the program itself starts sooner
_ETC = ("ld.so.cache", "fonts", "alternatives", "localtime")
_POLICY = {  # a second wall behind the checks of `browser_open`; Chromium obeys it whatever a page or a model asks for
    "URLBlocklist": ["file://*", "chrome://*", "chrome-untrusted://*", "devtools://*", "view-source:*", "ftp://*"],
    "DnsOverHttpsMode": "off",
    "BuiltInDnsClientEnabled": False,
    "NetworkPredictionOptions": 2,
    "WebRtcIPHandling": "disable_non_proxied_udp",
    "BrowserSignin": 0,
}
NEEDED_CALLS = frozenset(  # by Chromium's own sandbox (namespaces too), its crash handler, V8 and the compositor
    {
        "clone",
        "clone3",
        "mmap",
        "chroot",
        "unshare",
        "seccomp",
        "memfd_create",
        "ptrace",
        "process_vm_readv",
        "personality",
        "kcmp",
        "mbind",
    }
    | {"set_mempolicy", "move_pages", "remap_file_pages", "process_madvise"}
)


class BrowserError(ThinkloopError):
    """The browser can't be started; the message names the fix."""


@dataclass(frozen=True, slots=True)
class BrowserLimits:
    """Bounds of one browser process tree."""

    memory_mb: int = 3072
    """Of all processes together, shared pages counted once; a watchdog ends the browser above it."""
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
        return find_bwrap()
    except SandboxError as error:
        raise BrowserError(str(error).replace("python tool", "browser tool")) from error


def plan(bwrap: str, chromium: Path, folder: Path, limits: BrowserLimits, *, downloads: bool) -> Json:
    """What `browser_launch.py` executes, as JSON. `folder` holds the proxy's socket and, if allowed, the downloads."""
    uid, python, program = fresh_uid(), _interpreter(), _program(chromium)
    return {
        "bwrap": bwrap,
        "uid": uid,
        "pids": str(folder / "pids"),
        "profile": PROFILE,
        "rlimits": limits.rlimits(uid is not None),
        "arguments": [*_isolation(python), *_system(python, program), *_scratch(limits), *_ways_out(folder, downloads)],
        "files": {
            RELAY: Path(__file__).with_name("browser_relay.py").read_text(),
            "/etc/passwd": f"browser:x:1000:1000::{HOME}:/usr/sbin/nologin\n",
            "/etc/chromium/policies/managed/thinkloop.json": json.dumps(_POLICY),
            "/etc/opt/chrome/policies/managed/thinkloop.json": json.dumps(_POLICY),
        },
        "filter": seccomp.build_filter(needed=NEEDED_CALLS).hex(),
        "seal": ["--remount-ro", "/", "--chdir", HOME],
        "command": [python.path, "-I", "-S", "-B", RELAY, SOCKET, str(PORT), str(program)],
    }


def _interpreter() -> Interpreter:
    """For the relay: the system's Python where there is one."""
    system = Path("/usr/bin/python3")
    return Interpreter(str(system)) if system.exists() else interpreters()[0]


def _program(chromium: Path) -> Path:
    real = Path(_LAUNCHERS.get(chromium.name, chromium))
    return real if chromium.parent == Path("/usr/bin") and real.exists() else chromium.resolve()


def _isolation(python: Interpreter) -> list[str]:
    # fmt: off
    arguments = ["--unshare-all", "--unshare-user", "--die-with-parent", "--cap-drop", "ALL", "--uid", "1000",
                 "--gid", "1000", "--hostname", "browser", "--clearenv"]
    # fmt: on
    environment = {"PATH": "/usr/bin:/bin", "HOME": HOME, "LANG": "C.UTF-8", "TMPDIR": "/tmp"}
    if python.prefix:
        environment["LD_LIBRARY_PATH"] = "/opt/python/lib"
    for key, value in environment.items():
        arguments += ["--setenv", key, value]
    return arguments


def _system(python: Interpreter, program: Path) -> list[str]:
    arguments = ["--ro-bind", "/usr", "/usr", "--proc", "/proc", "--dev", "/dev"]
    for name in ("bin", "sbin", "lib", "lib32", "lib64", "libx32"):
        path = Path("/", name)
        if path.is_symlink():
            arguments += ["--symlink", str(path.readlink()), str(path)]
        elif path.is_dir():
            arguments += ["--ro-bind", str(path), str(path)]
    for name in _ETC:
        arguments += ["--ro-bind-try", f"/etc/{name}", f"/etc/{name}"]
    arguments += ["--ro-bind-try", "/var/cache/fontconfig", "/var/cache/fontconfig"]
    if python.prefix:
        arguments += ["--ro-bind", str(python.prefix), "/opt/python"]
    if not program.is_relative_to("/usr"):
        arguments += ["--ro-bind", str(program.parent), str(program.parent)]
    return arguments


def _scratch(limits: BrowserLimits) -> list[str]:
    arguments: list[str] = []
    for folder in ("/dev/shm", HOME, "/tmp"):
        arguments += ["--size", str(limits.disk_mb * _MB), "--tmpfs", folder]
    return arguments


def _ways_out(folder: Path, downloads: bool) -> list[str]:
    """The proxy's socket; with `downloads` the one folder of the host that the browser may write to."""
    arguments = ["--bind", str(folder / "proxy.sock"), SOCKET]
    if downloads:
        arguments += ["--bind", str(folder / "downloads"), str(folder / "downloads")]
    return arguments


def explain(message: str) -> str:
    """One paragraph for a person about a start that failed."""
    from thinkloop.tools.sandbox import explain_failure

    said = explain_failure(shutil.which("bwrap") or "bwrap", message)
    return said.replace("python tool", "browser tool").replace("/usr/bin/python3", "the browser")
