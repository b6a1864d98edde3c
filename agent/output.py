"""What commands print: events as JSON lines, the screen, transcripts and tables of traces."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

from rich.table import Table
from rich.text import Text
from thinkloop.agent.plain import clean, file_name, one_line, size
from thinkloop.agent.replay import unfinished
from thinkloop.agent.screen import Screen, plain_console
from thinkloop.agent.transcript import by_step, print_step
from thinkloop.traces import summary
from thinkloop.traces.events import Event, RunFinished, ThinkloopError, ToolResult, to_json
from thinkloop.traces.format import TraceError
from thinkloop.traces.reader import TraceReader

JSON_TYPES = frozenset({
    "run_started", "step_started", "thinking", "content", "tool_call", "tool_result", "usage", "limit", "error",
    "context_edited", "run_finished",
})  # fmt: skip
"""Event types that `--json` prints; the rest are the runtime's own bookkeeping."""

COLUMNS = (("when", 0), ("trace", 0), ("reason", 0), ("steps", 0), ("tokens", 0), ("task", 3), ("answer", 2))
"""Columns of `trace ls`; those with a share divide the room that the others leave."""
PIPED_WIDTH = 200


def print_json(event: Event) -> None:
    """One event as an ASCII line, flushed, so that a program can follow the run."""
    if event.type in JSON_TYPES:
        sys.stdout.write(json.dumps(to_json(event), default=_in_json) + "\n")
        sys.stdout.flush()


def _in_json(value: object) -> object:
    """Bytes by their digest: the trace has them under it."""
    if isinstance(value, bytes):
        return {"sha256": hashlib.sha256(value).hexdigest(), "bytes": len(value)}
    return repr(value)


def screen_for(trace: str, *, now: Callable[[], float] = time.monotonic) -> Screen:
    """A screen on standard output."""
    return Screen(plain_console(), trace=trace, now=now)


def show_trace(folder: Path, step: int | None) -> None:
    """Print the transcript, or one step whole. Raises `TraceError`, after what can be read, for a damaged trace."""
    reader = TraceReader.open(folder, strict=False)
    console, shown, last = plain_console(), 0, None
    for number, records in by_step(reader):
        if step is None or number == step:
            print_step(console, number, records, whole=step is not None)
            shown += 1
        last = records[-1].event
    if step is not None and not shown:
        raise ThinkloopError(
            f"The trace {str(folder)!r} has no step {step}. `thinkloop trace show {folder}` shows all."
        )
    if problems := reader.problems():
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise TraceError(f"The trace {str(folder)!r} is damaged at {problems[0]}{more}. What could be read was shown.")
    if not isinstance(last, RunFinished):
        raise TraceError(unfinished(reader))


def save_files(folder: Path, to: Path) -> None:
    """Write the files that came with a trace's results to a folder, each under its step and name."""
    count = 0
    for number, records in by_step(TraceReader.open(folder)):
        results = [record.event for record in records if isinstance(record.event, ToolResult)]
        for file in (file for result in results for file in result.files):
            count += 1
            path = to / f"step-{number:04d}-{count}-{file_name(file.name)}"
            try:
                to.mkdir(parents=True, exist_ok=True)
                path.write_bytes(file.data)
            except OSError as error:
                raise ThinkloopError(f"Can't write {str(path)!r}: {error.strerror}. Name another folder.") from error
            print(f"{clean(str(path))}  {clean(file.media_type)}  {size(len(file.data))}")
    if not count:
        print(f"No result of {clean(str(folder))} came with a file.")


def list_traces(folder: Path) -> None:
    """Print a table of the traces in `folder`."""
    found = list(summary.list_traces(folder))
    if not found:
        print(f"No traces in {clean(str(folder))}. `thinkloop run` makes one under runs/ for each run.")
        return
    console = plain_console()
    # A program or a file gets whole columns, a terminal what fits.
    console.width = console.width if console.is_terminal else PIPED_WIDTH
    console.print(_table(found))


def _table(found: list[summary.Summary]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    rows = [_row(entry) for entry in found]
    for index, (name, ratio) in enumerate(COLUMNS):
        widest = max(len(name), *(len(row[index]) for row in rows))
        table.add_column(
            name, justify="right" if name in ("steps", "tokens") else "left", ratio=ratio or None, no_wrap=True,
            min_width=None if ratio else widest, overflow="ellipsis",
        )  # fmt: skip
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def _row(entry: summary.Summary) -> tuple[str, ...]:
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.started))
    cells = (when, entry.folder.name, entry.reason, f"{entry.steps:,}", f"{entry.tokens:,}", entry.task, entry.answer)
    return tuple(one_line(cell, 200) for cell in cells)
