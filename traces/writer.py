"""Writes a trace while the run goes on. An event costs what its own size costs, however many came before."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from thinkloop.traces import format as fmt
from thinkloop.traces.events import Content, Event, Json, Thinking, ToolCallDelta, to_json
from thinkloop.traces.format import TraceError


class TraceWriter:
    """Appends events to a new trace folder. Make one with `create`; use it as a context manager or call `close`.

    Neighbouring `Thinking` (or `Content`) deltas are held and stored as one event, with the time of the first.
    `ToolCallDelta` isn't stored: the whole `ToolCall` follows. After a failed write the trace takes no more events.
    """

    def __init__(self, folder: Path, descriptor: int, clock: Callable[[], float], ticks: Callable[[], int]) -> None:
        self.folder = folder
        self._descriptor = descriptor
        self._clock, self._ticks, self._start = clock, ticks, ticks()
        self._seq = 0
        self._sum = fmt.FIRST_SUM
        self._held: list[str] = []
        self._held_class: type[Thinking] | type[Content] = Thinking
        self._held_at = (0.0, 0)
        self._unsynced: list[Path] = []
        self._open = True

    @classmethod
    def create(
        cls,
        folder: str | os.PathLike[str],
        *,
        clock: Callable[[], float] = time.time,
        ticks: Callable[[], int] = time.monotonic_ns,
    ) -> TraceWriter:
        """Start a trace in `folder`, made when absent.

        Raises `TraceError` when the folder holds a trace already or can't be written.
        """
        path = Path(folder)
        try:
            (path / fmt.BLOBS).mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path / fmt.EVENTS, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o644)
        except FileExistsError:
            raise TraceError(_taken(path)) from None
        except OSError as error:
            raise TraceError(
                f"Can't write a trace in {str(path)!r}: {error.strerror}. "
                "Name a folder that can be written (`--trace DIR`)."
            ) from error
        return cls(path, descriptor, clock, ticks)

    def write(self, event: Event) -> None:
        """Store one event; it has reached the operating system on return, but for text that is still being joined.

        Raises `TraceError` when the trace is closed or the disk refuses.
        """
        if isinstance(event, ToolCallDelta):
            return
        if isinstance(event, Thinking | Content):
            self._hold(event)
        else:
            self._release()
            self._append(to_json(event), *self._now())

    def flush(self, *, durable: bool = True) -> None:
        """Write held text and, when `durable`, wait until the disk has everything (`fdatasync`, 0.1 to 4 ms)."""
        self._release()
        if durable and self._open:
            self._sync_blobs()
            os.fdatasync(self._descriptor)

    def close(self) -> None:
        """Flush and end. Closing twice is fine."""
        if not self._open:
            return
        try:
            self.flush()
        finally:
            self._stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _now(self) -> tuple[float, int]:
        return self._clock(), (self._ticks() - self._start) // 1000

    def _hold(self, event: Thinking | Content) -> None:
        if self._held and self._held_class is not type(event):
            self._release()
        if not self._held:
            self._held_class, self._held_at = type(event), self._now()
        self._held.append(event.text)

    def _release(self) -> None:
        if self._held:
            event = self._held_class(text="".join(self._held))
            self._held = []
            self._append(to_json(event), *self._held_at)

    def _append(self, event: Json, t: float, mono: int) -> None:
        if not self._open:
            raise TraceError(f"The trace {str(self.folder)!r} is closed: no event can be added. Start a new trace.")
        try:
            line, checksum = fmt.line_bytes(self._seq, t, mono, self._stored(event), self._sum)
            self._write(line)
        except OSError as error:
            self._stop()
            raise TraceError(
                f"Writing to the trace {str(self.folder)!r} failed at event {self._seq}: {error.strerror}. "
                "What was written before is whole. Make room or choose another disk with `--trace DIR`, and run again."
            ) from error
        self._seq, self._sum = self._seq + 1, checksum

    def _write(self, line: bytes) -> None:
        # One call takes the whole line except on a full disk or a signal, when the rest follows.
        rest = line[os.write(self._descriptor, line) :]
        while rest:
            rest = rest[os.write(self._descriptor, rest) :]

    def _stop(self) -> None:
        self._open = False
        os.close(self._descriptor)

    def _stored(self, value: Any) -> Any:
        """`value` with long strings and bytes moved to blobs. What JSON can't hold is kept as its `repr`."""
        if isinstance(value, str):
            # A character takes at most 4 bytes: most strings need no encoding to know that they are short.
            return value if len(value) * 4 <= fmt.BLOB_LIMIT else self._string(value)
        if isinstance(value, dict):
            return fmt.escaped({str(key): self._stored(item) for key, item in value.items()})
        if isinstance(value, list | tuple):
            return [item if type(item) is int else self._stored(item) for item in value]
        if value is None or isinstance(value, bool | int | float):
            return value
        if isinstance(value, bytes):
            return self._blob(value, text=False)
        return self._stored(repr(value))

    def _string(self, text: str) -> str | Json:
        data = fmt.text_bytes(text)
        return text if len(data) <= fmt.BLOB_LIMIT else self._blob(data, text=True)

    def _blob(self, data: bytes, *, text: bool) -> Json:
        digest = hashlib.sha256(data).hexdigest()
        path = fmt.blob_path(self.folder, digest)
        if not path.exists():
            _write_atomically(path, data)
            self._unsynced.append(path)
        return fmt.Reference(digest, len(data), text).to_json()

    def _sync_blobs(self) -> None:
        for path in self._unsynced:
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fdatasync(descriptor)
            finally:
                os.close(descriptor)
        self._unsynced = []


def check_free(folder: str | os.PathLike[str]) -> None:
    """Raises the `TraceError` that `TraceWriter.create` would when the folder is taken."""
    path = Path(folder)
    if (path / fmt.EVENTS).exists() or (path.exists() and not path.is_dir()):
        raise TraceError(_taken(path))


def _write_atomically(path: Path, data: bytes) -> None:
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(data)
    temporary.replace(path)


def _taken(path: Path) -> str:
    if path.exists() and not path.is_dir():
        return f"{str(path)!r} is a file: a trace needs a folder. Name another with `--trace DIR`."
    return (
        f"The folder {str(path)!r} already holds a trace, and traces are never overwritten. Name a new folder with "
        f"`--trace DIR`, or look at this one with `thinkloop trace show {path}`."
    )
