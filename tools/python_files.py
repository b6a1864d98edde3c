"""Files of the python tool: what goes in, and what comes out: figures, and what cells write to the working folder.

Names, sizes and bytes that come out are claims of hostile code. They are bounded for each file, each cell and each run; an
archive is a file like any other and never unpacked.
"""

from __future__ import annotations

import os
import struct
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import anyio
from thinkloop.tools.python_keep import KeptFolder
from thinkloop.tools.python_text import one_line, size
from thinkloop.tools.sandbox import readable_inside
from thinkloop.tools.sandbox_launch import COPY_CAP
from thinkloop.tools.sandbox_session import PIECE, Reply, Session
from thinkloop.tools.tool import Attachment
from thinkloop.traces.events import Json, ThinkloopError

FILE_CAP, CELL_CAP, RUN_CAP = 8 << 20, 16 << 20, 256 << 20
"""Bytes of one file, of one cell's files and of one run's files that become attachments."""

TAKE_SECONDS = 10.0
"""For all files of one cell."""

_SIDE, _PIXELS = 20_000, 64_000_000  # of a picture that a viewer may be asked to draw
_NAMED = 10
_TYPES = {
    **{".csv": "text/csv", ".json": "application/json", ".md": "text/markdown", ".py": "text/x-python"},
    **{".txt": "text/plain", ".log": "text/plain", ".tsv": "text/tab-separated-values"},
}
_SIGNATURES = {b"\x89PNG\r\n\x1a\n": "image/png", b"\xff\xd8\xff": "image/jpeg", b"%PDF-": "application/pdf"}


@dataclass(slots=True)
class Taken:
    """What came out of one cell: attachments, facts for the record, and lines for the result."""

    files: list[Attachment] = field(default_factory=list)
    record: Json = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)


class Outbox:
    """Takes figures and files out of sessions for one run, within its bounds; `keep` is where copies go."""

    def __init__(self, keep: KeptFolder | None = None) -> None:
        self.keep = keep
        self._figures, self._run_left, self._cell_left = 0, RUN_CAP, CELL_CAP

    async def take(self, session: Session, reply: Reply) -> Taken:
        """What the last cell made. A file that is too large, or whose name is odd, is recorded and left."""
        taken, self._cell_left = Taken(), CELL_CAP
        if not (reply.pictures or reply.files):
            return taken
        with anyio.move_on_after(TAKE_SECONDS) as scope:
            for index, (extension, length) in enumerate(reply.pictures):
                await self._take_figure(session, index, extension, length, taken)
            await self._take_files(session, reply, taken)
        if scope.cancelled_caught:
            taken.record["files_problem"] = f"the rest was left: handing it over took more than {TAKE_SECONDS:g} s"
        return taken

    async def _take_figure(self, session: Session, index: int, extension: str, length: int, taken: Taken) -> None:
        self._figures += 1
        name = f"figure-{self._figures}.{'svg' if extension == 'svg' else 'png'}"
        facts: Json = {"name": name, "bytes": length}
        taken.record.setdefault("figures", []).append(facts)
        data = await _read(session, index, length) if self._fits(length) else None
        problem = self._why_not(session, length) if data is None else _picture_problem(data, extension)
        if data is None or problem:
            facts["problem"] = problem
            taken.lines.append(f"[figure {self._figures}: left out, {problem}]")
            return
        self._attach(taken, name, data, "image/svg+xml" if extension == "svg" else "image/png")
        dimensions = "" if extension == "svg" else ", {}x{}".format(*png_dimensions(data))
        taken.lines.append(f"[figure {self._figures}: {name}{dimensions}]")
        if self.keep:
            facts |= await self.keep.store(name, _Whole(data), again=False)

    async def _take_files(self, session: Session, reply: Reply, taken: Taken) -> None:
        named = []
        for name, length in reply.files:
            facts = await self._take_file(session, name, length, taken)
            taken.record.setdefault("files", []).append(facts)
            if facts["attached"] or facts.get("kept"):
                named.append(f"{facts['name']} ({size(facts['bytes'])})")
        if more := max(0, min(reply.more, 1_000_000)):
            taken.record["more_files"] = more
        if named:
            rest = f", and {len(named) - _NAMED} more" if len(named) > _NAMED else ""
            taken.lines.append(f"[files: {', '.join(named[:_NAMED])}{rest}]")

    async def _take_file(self, session: Session, name: str, length: int, taken: Taken) -> Json:
        facts: Json = {"name": one_line(name, 200), "bytes": length, "attached": False}
        if problem := name_problem(name):
            return facts | {"problem": problem}
        data = await _read(session, name, length) if self._fits(length) else None
        if data is not None:
            self._attach(taken, name, data, media_type(name, data))
            facts |= {"attached": True, "bytes": len(data)}
        if self.keep:
            facts |= await self.keep.store(name, _Inside(session, name, length) if data is None else _Whole(data))
        elif data is None:
            facts["problem"] = self._why_not(session, length)
        return facts

    def _fits(self, length: int) -> bool:
        return length <= min(FILE_CAP, self._cell_left, self._run_left)

    def _why_not(self, session: Session, length: int) -> str:
        return "the session was lost" if session.lost and self._fits(length) else "too large"

    def _attach(self, taken: Taken, name: str, data: bytes, kind: str) -> None:
        self._cell_left -= len(data)
        self._run_left -= len(data)
        taken.files.append(Attachment(name=name, media_type=kind, data=data))


@dataclass(frozen=True, slots=True)
class _Whole:
    """Bytes that are here already."""

    data: bytes

    @property
    def length(self) -> int:
        return len(self.data)

    async def pieces(self) -> AsyncIterator[bytes]:
        yield self.data


@dataclass(frozen=True, slots=True)
class _Inside:
    """A picture (by index) or a file (by path) in the session; never more than was announced."""

    session: Session
    what: int | str
    length: int

    async def pieces(self) -> AsyncIterator[bytes]:
        offset = 0
        while offset < self.length:
            wanted = min(PIECE, self.length - offset)
            piece = await self.session.piece(self.what, offset)
            if self.session.lost:
                raise OSError("the session was lost")
            yield piece[:wanted]
            offset += wanted
            if len(piece) < wanted:  # it has become shorter; asking on for single bytes would never end
                return


async def _read(session: Session, what: int | str, length: int) -> bytes | None:
    try:
        return b"".join([piece async for piece in _Inside(session, what, length).pieces()])
    except OSError:
        return None


def name_problem(name: str) -> str:
    """Why a path from inside may not be used as a name here; empty if it may."""
    parts = name.split("/")
    if len(name) > 2000 or len(parts) > 10 or any(part.startswith(".") or not part for part in parts):
        return "not a plain path"
    if not name.isprintable() or "\\" in name:
        return "its name has unusual characters"
    try:
        long = any(len(part.encode()) > 200 for part in parts)
    except UnicodeEncodeError:
        return "its name has unusual characters"
    return "its name is too long" if long else ""


def media_type(name: str, data: bytes) -> str:
    """By content for pictures and PDF, by name for plain texts; never a type that a viewer would run."""
    for signature, kind in _SIGNATURES.items():
        if data.startswith(signature):
            return kind
    return _TYPES.get(PurePosixPath(name).suffix.lower(), "application/octet-stream")


def png_dimensions(data: bytes) -> tuple[int, int]:
    """Width and height that a PNG's header states; (0, 0) if it isn't one."""
    if len(data) < 33 or not data.startswith(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"):
        return 0, 0
    width, height = struct.unpack_from(">II", data, 16)
    return width, height


def _picture_problem(data: bytes, extension: str) -> str:
    if extension == "svg":
        start = data[:4096].lstrip(b"\xef\xbb\xbf \t\r\n")
        return "" if start.startswith((b"<svg", b"<?xml")) and b"<svg" in start else "not an SVG"
    width, height = png_dimensions(data)
    if not (width and height) or extension != "png":
        return "not a PNG"
    return "too many pixels" if max(width, height) > _SIDE or width * height > _PIXELS else ""


def checked_files(files: Sequence[Path], *, unsafe: bool = False) -> list[Path]:
    """The files to give, as absolute paths. Raises `ThinkloopError` for what isn't there, or can't be given."""
    paths = [Path(file).resolve() for file in files]
    for path in paths:
        if not path.is_file() or not os.access(path, os.R_OK):
            raise ThinkloopError(f"Python(files=...): {path} is not a readable file. Give paths of regular files.")
        if path.stat().st_size > COPY_CAP and not unsafe and not readable_inside(path):
            raise ThinkloopError(
                f"Python(files=...): {path} is too large to be copied ({size(path.stat().st_size)}; the most is "
                f"{size(COPY_CAP)}), and the sandbox's own user can't read it where it is. Make it and its folders "
                "readable for others, or give a part of it."
            )
    if len({path.name for path in paths}) < len(paths):
        raise ThinkloopError("Python(files=...): two files have the same name; they share one folder, so rename one.")
    return paths
