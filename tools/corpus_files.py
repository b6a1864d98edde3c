"""Which files a corpus takes: a walk that stays below its folders, and reads that never block or grow without bound."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from thinkloop.traces.events import ThinkloopError

PROSE = frozenset({".md", ".markdown", ".txt", ".text", ".rst", ".org", ".adoc", ".tex", ".log"})
DATA = frozenset({".csv", ".tsv", ".json", ".toml", ".yaml", ".yml", ".ini", ".cfg", ".conf", ".xml", ".proto"})
CODE = frozenset(
    f".{name}"
    for name in (
        "py", "pyi", "c", "h", "cc", "cpp", "cxx", "hpp", "cu", "cuh", "rs", "go", "js", "mjs", "jsx", "ts", "tsx", "java",
        "kt", "scala", "swift", "cs", "rb", "php", "pl", "lua", "r", "jl", "hs", "ml", "ex", "exs", "erl", "clj", "el",
        "vim", "sh", "bash", "zsh", "fish", "ps1", "sql", "css", "scss", "cmake", "nix", "tf",
    )
)  # fmt: skip
PAGES = {
    ".html": "text/html",
    ".htm": "text/html",
    ".xhtml": "application/xhtml+xml",
    ".pdf": "application/pdf",
}
LINES = frozenset({".jsonl", ".ndjson"})
SUFFIXES = PROSE | DATA | CODE | LINES | frozenset(PAGES)
NAMES = frozenset({"readme", "license", "changelog", "makefile", "dockerfile", "justfile"})
IGNORED = frozenset(
    {"node_modules", "__pycache__", "venv", "site-packages"}
)  # and every folder whose name has a dot first
MAX_FILE_BYTES = 8 << 20
MAX_PAGE_BYTES = 64 << 20  # html and pdf: far fewer bytes of text than of file
MAX_LINES_BYTES = 256 << 20  # JSON lines: many documents in one file


class SkipFile(ThinkloopError):
    """A file that can't be indexed: the message is the reason. `again` files are tried again at the next update."""

    def __init__(self, reason: str, *, again: bool = False) -> None:
        super().__init__(reason)
        self.again = again


@dataclass(frozen=True, slots=True)
class File:
    """One file to index: its id, where it is, and its size in bytes and time of change as they are now.

    `problem` says why it can't be read (a folder that can't be listed is a `File` with a problem too).
    """

    id: str
    path: Path
    size: int = 0
    mtime_ns: int = 0
    problem: str = ""


def max_bytes(path: Path) -> int:
    """The size in bytes above which a file of this kind is left out."""
    suffix = path.suffix.lower()
    return MAX_LINES_BYTES if suffix in LINES else MAX_PAGE_BYTES if suffix in PAGES else MAX_FILE_BYTES


def labels(sources: Sequence[Path]) -> list[tuple[str, Path]]:
    """What goes before the ids of each source: nothing for one folder, the folders' names for several."""
    taken: set[str] = set()
    found = []
    for source in sources:
        name = label = source.resolve().name or "root"
        number = 1
        while label in taken:
            number += 1
            label = f"{name}-{number}"
        taken.add(label)
        found.append(("" if len(sources) == 1 and source.is_dir() else label, source))
    return found


def walk(sources: Sequence[Path]) -> Iterator[File]:
    """Every file to index below `sources`, in a fixed order. Hidden files and folders are left out."""
    for label, source in labels(sources):
        if source.is_dir():
            yield from _below(source, label, source.resolve())
        else:
            yield _file(source, label)


def read(file: File) -> bytes:
    """The bytes of `file`. Raises `SkipFile` for what can't be read, isn't a plain file or is too large."""
    if file.problem:
        raise SkipFile(file.problem, again=True)
    most = max_bytes(file.path)
    if file.size > most:
        raise SkipFile(_too_large(most))
    try:
        body = _read(file.path, most)
    except OSError as error:
        raise SkipFile(f"can't be read ({error.strerror})", again=True) from error
    if len(body) > most:
        raise SkipFile(_too_large(most), again=True)
    return body


def _read(path: Path, most: int) -> bytes:
    # O_NONBLOCK: a named pipe put in the file's place must not hang the index
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0))
    with os.fdopen(descriptor, "rb") as stream:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(0, "not a plain file")
        return stream.read(most + 1)


def _too_large(most: int) -> str:
    return f"is larger than {most >> 20} MiB"


def _below(folder: Path, prefix: str, inside: Path) -> Iterator[File]:
    try:
        with os.scandir(folder) as found:
            entries = sorted(found, key=lambda entry: entry.name)
    except OSError as error:
        yield File(prefix or ".", folder, problem=f"can't be listed ({error.strerror})")
        return
    for entry in entries:
        if entry.name.startswith("."):
            continue
        path, name = Path(entry.path), f"{prefix}/{entry.name}" if prefix else entry.name
        if entry.is_dir(follow_symlinks=False):
            if entry.name not in IGNORED:
                yield from _below(path, name, inside)
        elif _wanted(entry.name) and _stays(entry, path, inside):
            yield _file(path, name)


def _wanted(name: str) -> bool:
    return Path(name).suffix.lower() in SUFFIXES or name.lower() in NAMES


def _stays(entry: os.DirEntry[str], path: Path, inside: Path) -> bool:
    """A link must not carry the rest of the disk into the context."""
    try:
        return entry.is_file() and (not entry.is_symlink() or path.resolve().is_relative_to(inside))
    except (OSError, RuntimeError):  # a loop of links
        return False


def _file(path: Path, name: str) -> File:
    clean = name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    clean = "".join(char if char.isprintable() else "\ufffd" for char in clean)
    if clean != name:
        return File(clean, path, problem="has a name that isn't plain text; rename it")
    try:
        status = path.stat()
    except OSError as error:
        return File(name, path, problem=f"can't be read ({error.strerror})")
    return File(name, path, status.st_size, status.st_mtime_ns)
