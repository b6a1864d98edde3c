"""What a trace is about, in one line: read from its first and last lines, so that listing many stays cheap."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from thinkloop.traces import format as fmt
from thinkloop.traces.events import Event, RunFinished, RunStarted, StepStarted, Usage
from thinkloop.traces.format import TraceError
from thinkloop.traces.reader import Record, TraceReader


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """One run. `started` is in seconds since 1970, `reason` is `unfinished` for a trace without an end.

    `tokens` counts what the model sampled over the run.
    """

    folder: Path
    started: float
    task: str
    model: str
    reason: str
    steps: int
    tokens: int
    seconds: float
    answer: str


def summarize(folder: str | os.PathLike[str]) -> Summary:
    """The summary of one trace. Raises `TraceError` when there is none, or nothing in it can be read."""
    reader = TraceReader.open(folder, strict=False)
    records = iter(reader)
    first = next(records, None)
    if first is None:
        raise TraceError(f"The trace {str(reader.folder)!r} is empty: it was cut before its first event. Run again.")
    start = first.event if isinstance(first.event, RunStarted) else None
    end = last_event(reader)
    if isinstance(end, RunFinished):
        return _finished(reader.folder, first, start, end)
    return _unfinished(reader.folder, first, start, records)


def list_traces(folder: str | os.PathLike[str]) -> Iterator[Summary]:
    """Summaries of the traces in `folder` (itself one, or holding some), oldest first; unreadable ones are left out."""
    path = Path(folder)
    if not path.is_dir():
        raise TraceError(f"There is no folder {str(path)!r} to list traces of. Name one: `thinkloop trace ls DIR`.")
    found = [summary for candidate in (path, *path.iterdir()) if (summary := _summary_or_none(candidate))]
    yield from sorted(found, key=lambda summary: summary.started)


def last_event(reader: TraceReader) -> Event | None:
    """The event of the last whole line, read from the end of the file; None when that line can't be understood."""
    return reader.decode(_last_line(reader.folder / fmt.EVENTS))


def _summary_or_none(folder: Path) -> Summary | None:
    try:
        return summarize(folder) if (folder / fmt.EVENTS).is_file() else None
    except TraceError:
        return None


def _finished(folder: Path, first: Record, start: RunStarted | None, end: RunFinished) -> Summary:
    return Summary(
        folder=folder, started=first.t, task=start.task if start else "", model=_model_name(start), reason=end.reason,
        steps=end.steps, tokens=int(end.usage.get("completion_tokens", 0)), seconds=end.seconds, answer=end.answer,
    )  # fmt: skip


def _unfinished(folder: Path, first: Record, start: RunStarted | None, records: Iterator[Record]) -> Summary:
    steps, tokens, mono = 0, 0, first.mono
    for record in records:
        mono = record.mono
        if isinstance(record.event, StepStarted):
            steps = record.event.step
        elif isinstance(record.event, Usage):
            tokens += record.event.completion_tokens
    return Summary(
        folder=folder, started=first.t, task=start.task if start else "", model=_model_name(start), reason="unfinished",
        steps=steps, tokens=tokens, seconds=(mono - first.mono) / 1e6, answer="",
    )  # fmt: skip


def _model_name(start: RunStarted | None) -> str:
    return str(start.model.get("name", "")) if start else ""


def _last_line(path: Path, block: int = 65536) -> bytes:
    """The last line that has an end, without it; empty when there is none."""
    with path.open("rb") as file:
        position = file.seek(0, os.SEEK_END)
        tail = b""
        while position > 0:
            step = min(block, position)
            position = file.seek(position - step)
            tail = file.read(step) + tail
            whole = tail[: tail.rfind(b"\n")] if b"\n" in tail else b""
            if b"\n" in whole or position == 0:
                return whole[whole.rfind(b"\n") + 1 :]
    return b""
