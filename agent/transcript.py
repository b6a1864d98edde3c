"""A trace as a readable transcript: step by step, with token counts and times."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from rich.console import Console, Group, RenderableType
from rich.rule import Rule
from rich.text import Text
from thinkloop.agent import panels
from thinkloop.agent.plain import clean
from thinkloop.traces.events import (
    Content,
    ContextEdited,
    Error,
    Event,
    LimitReached,
    RunFinished,
    RunStarted,
    StepFinished,
    StepStarted,
    Thinking,
    ToolCall,
    ToolResult,
    Usage,
)
from thinkloop.traces.reader import Record


def by_step(records: Iterable[Record]) -> Iterator[tuple[int, list[Record]]]:
    """The records of each step with its number, 0 for what comes before the first. Memory holds one step."""
    number, group = 0, list[Record]()
    for record in records:
        if isinstance(record.event, StepStarted):
            if group:
                yield number, group
            number, group = record.event.step, []
        group.append(record)
    if group:
        yield number, group


def print_step(console: Console, number: int, records: list[Record], *, whole: bool = False) -> None:
    """Print one step's heading and events. Results are clipped unless `whole`."""
    if number:
        console.print(Rule(Text(f"step {number}", style="bold"), style="dim", align="left"))
        console.print(Text(_figures(records), style="dim"))
    lines = panels.WHOLE if whole else panels.RESULT_LINES
    calls = {record.event.id: record.event for record in records if isinstance(record.event, ToolCall)}
    answered = {record.event.call_id for record in records if isinstance(record.event, ToolResult)}
    for record in records:
        shown = _shown(record.event, calls, answered, max(console.width, 12), lines)
        if shown is not None:
            console.print(shown)


def _shown(
    event: Event, calls: dict[str, ToolCall], answered: set[str], width: int, lines: int
) -> RenderableType | None:
    match event:
        case RunStarted():
            return panels.start_lines(event, width)
        case Thinking():
            return Text(clean(event.text).rstrip("\n"), style="dim italic")
        case Content():
            return Text(clean(event.text).rstrip("\n"))
        case ToolCall() if event.id not in answered:
            return panels.call_panel(event, None, width, lines)
        case ToolResult():
            return panels.call_panel(calls.get(event.call_id), event, width, lines)
        case LimitReached() | Error() | ContextEdited():
            return panels.notice(event)
        case RunFinished():
            return Group(panels.answer_panel(event, width), panels.ending_lines(event, ""))
    return None


def _figures(records: list[Record]) -> str:
    parts: list[str] = []
    for record in records:
        match record.event:
            case Usage() as usage:
                parts.append(f"context {usage.prompt_tokens:,} tokens ({usage.cached_tokens:,} cached)")
                parts.append(f"wrote {usage.completion_tokens:,} ({usage.thinking_tokens:,} thinking)")
            case StepFinished() as end:
                parts.append(f"{end.seconds:.2f} s (loop {end.overhead_seconds * 1000:.1f} ms)")
    return " · ".join(parts) or "not finished"
