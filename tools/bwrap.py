"""Parts of bubblewrap's command line that the sandboxes share: the python tool's, the browser's, MCP servers'."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path


def in_memory(data: bytes, stack: ExitStack) -> int:
    """A descriptor to hand over, from which `data` is read. `stack` closes it here."""
    fd = os.memfd_create("thinkloop")
    stack.callback(os.close, fd)
    os.write(fd, data)
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def isolation(environment: Mapping[str, str], *, hostname: str = "sandbox", has_own: bool = False) -> list[str]:
    """Namespaces of its own, no rights, and no environment but this. A program that `has_own` sandbox may make further
    user namespaces for it, and stays in its session."""
    # fmt: off
    options = ["--unshare-all", "--unshare-user", "--die-with-parent", "--cap-drop", "ALL", "--uid", "1000",
               "--gid", "1000", "--hostname", hostname, "--clearenv"]
    # fmt: on
    options += [] if has_own else ["--disable-userns", "--new-session"]
    for name, value in environment.items():
        options += ["--setenv", name, value]
    return options


def system() -> list[str]:
    """/usr read-only, with the links or folders at the root that belong to it, and /proc."""
    options = ["--ro-bind", "/usr", "/usr", "--proc", "/proc"]
    for name in ("bin", "sbin", "lib", "lib32", "lib64", "libx32"):
        path = Path("/", name)
        if path.is_symlink():
            options += ["--symlink", str(path.readlink()), str(path)]
        elif path.is_dir():
            options += ["--ro-bind", str(path), str(path)]
    return options


def where_present(*paths: str) -> list[str]:
    """Files and folders of the host to read, as far as there are such."""
    return [part for path in paths for part in ("--ro-bind-try", path, path)]


def devices(*names: str) -> list[str]:
    """A /dev of these alone, and the links to a process's own descriptors."""
    options = ["--dir", "/dev"]
    for name in names:
        options += ["--dev-bind", f"/dev/{name}", f"/dev/{name}"]
    for name, target in (("fd", "fd"), ("stdin", "fd/0"), ("stdout", "fd/1"), ("stderr", "fd/2")):
        options += ["--symlink", f"/proc/self/{target}", f"/dev/{name}"]
    return options


def scratch(folder: str, size: int) -> list[str]:
    """An empty folder to write to, of `size` bytes."""
    return ["--size", str(size), "--tmpfs", folder]
