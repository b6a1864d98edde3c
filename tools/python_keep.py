"""The folder of the host that takes copies of what cells wrote.

A file that was there before is never replaced: the copy gets a number. A copy that changes is replaced whole.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import anyio.to_thread
from thinkloop.traces.events import Json, ThinkloopError

KEEP_CAP = 1 << 30
"""Bytes that one run may write there."""
KEEP_FILES = 5000
_NUMBERS = 1000
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


class Source(Protocol):
    """Bytes to copy; `length` is the most there can be. `pieces` raises `OSError` where they can't be had."""

    @property
    def length(self) -> int: ...
    def pieces(self) -> AsyncIterator[bytes]: ...


class KeptFolder:
    """Copies for one run. Raises `ThinkloopError` if `folder` can't be made or written to."""

    def __init__(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ThinkloopError(f"Python(keep=...): {folder} can't be made: {error.strerror}.") from error
        if not os.access(folder, os.W_OK | os.X_OK):
            raise ThinkloopError(f"Python(keep=...): {folder} can't be written to. Give a folder of yours.")
        self.folder = folder.resolve()
        self._ours: dict[str, Path] = {}
        self._left = KEEP_CAP

    async def store(self, name: str, source: Source, *, again: bool = True) -> Json:
        """Copy to `name` (a checked relative path). Gives `kept`, the path in the folder, and `bytes`; or `problem`.

        With `again`, a later copy of the same name takes the earlier one's place.
        """
        key = name if again else f"{name}\0{len(self._ours)}"
        fresh = key not in self._ours
        if source.length > self._left or (fresh and len(self._ours) >= KEEP_FILES):
            return {"problem": "not kept: this run has kept as much as it may"}
        try:
            written = await self._write(await anyio.to_thread.run_sync(self._place, key, name), source)
        except BaseException as error:
            if fresh:
                self._give_up(key)
            if not isinstance(error, OSError):
                raise
            return {"problem": f"not kept: {error.strerror or error}"}
        return {"kept": str(self._ours[key].relative_to(self.folder)), "bytes": written}

    def _place(self, key: str, name: str) -> Path:
        """The path that this run uses for `key`; an empty file holds it."""
        if key in self._ours:
            return self._ours[key]
        wanted = self.folder / name
        wanted.parent.mkdir(parents=True, exist_ok=True)
        if not wanted.parent.resolve().is_relative_to(self.folder):
            raise OSError(f"{wanted.parent} leads out of the folder")
        for number in range(1, _NUMBERS):
            path = wanted if number == 1 else wanted.with_stem(f"{wanted.stem}-{number}")
            with suppress(FileExistsError):
                os.close(os.open(path, _CREATE, 0o644))
                self._ours[key] = path
                return path
        raise OSError(f"{wanted.name} and its numbers are taken")

    def _give_up(self, key: str) -> None:
        if path := self._ours.pop(key, None):
            path.unlink(missing_ok=True)

    async def _write(self, path: Path, source: Source) -> int:
        """The bytes written. Whole or not at all: written beside its place, then moved there."""
        partial = path.with_name(f".{secrets.token_hex(8)}.part")
        fd, written = os.open(partial, _CREATE, 0o644), 0
        try:
            async for piece in source.pieces():
                await anyio.to_thread.run_sync(_write_all, fd, piece)
                written += len(piece)
            partial.replace(path)
            return written
        finally:
            os.close(fd)
            partial.unlink(missing_ok=True)
            self._left -= written


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
