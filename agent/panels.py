"""How single events look: a call with its result, a limit, an answer. All text is shown literally."""

from __future__ import annotations

import json

from rich.box import ROUNDED
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.rule import Rule
from rich.text import Text
from thinkloop.agent.plain import clean, clip, clock, one_line, size
from thinkloop.traces.events import (
    ContextEdited,
    Error,
    Json,
    LimitReached,
    RunFinished,
    RunStarted,
    ToolCall,
    ToolResult,
)

RESULT_LINES = 12
WHOLE = 1_000_000_000


def start_lines(start: RunStarted, width: int) -> Text:
    """The task, and what works on it."""
    task, hidden = clip(clean(start.task), RESULT_LINES, width)
    text = Text(task, style="bold")
    if hidden:
        text.append(f"\n… {hidden:,} more lines", style="dim not bold")
    names = ", ".join(str(tool.get("function", {}).get("name", "?")) for tool in start.tools) or "none"
    about = one_line(f"model {start.model.get('name', '?')} · tools {names}", 200)
    return text.append(f"\n{about}", style="dim not bold")


def call_text(call: ToolCall, width: int, lines: int = RESULT_LINES) -> Text:
    """A call's arguments: one a line, code as it is."""
    if call.arguments is None:
        shown, _ = clip(clean(call.raw), lines, width)
        return Text.assemble((shown, "yellow"), (f"\n{clean(call.problem)}" if call.problem else "", "red"))
    rows = [_argument(key, value, width, lines) for key, value in call.arguments.items()]
    text = Text("\n").join(rows)
    return text.append(f"\n{clean(call.problem)}", style="red") if call.problem else text


def call_panel(call: ToolCall | None, result: ToolResult | None, width: int, lines: int = RESULT_LINES) -> Panel:
    """A call and its result; either may be missing."""
    inner = max(width - 4, 8)
    parts: list[RenderableType] = [call_text(call, inner, lines)] if call and (call.raw or call.problem) else []
    if result:
        parts += [Rule(style="dim")] if parts else []
        parts.append(_result_text(result, inner, lines))
    ok = result is None or result.ok
    name = call.name if call else result.name if result else ""
    return Panel(
        Group(*parts), title=Text(one_line(name, 40) or "(no name)", style="bold cyan"), title_align="left",
        subtitle=Text(_outcome(result), style="dim" if ok else "red"), subtitle_align="right",
        border_style="dim" if ok else "red", box=ROUNDED, width=width, padding=(0, 1),
    )  # fmt: skip


def call_line(call: ToolCall, width: int) -> Text:
    """A call under way, on one line."""
    arguments = call.raw if call.arguments is None else _inline(call.arguments)
    return Text(one_line(f"{call.name}({arguments})", max(width - 4, 8)), style="cyan")


def notice(event: LimitReached | Error | ContextEdited) -> Text:
    """Something the loop has to say, on a line or a few."""
    match event:
        case LimitReached():
            head = (
                f"limit: {event.limit} {event.used:,.6g} of {event.allowed:,.6g}{' (last step)' if event.final else ''}"
            )
            return Text.assemble((head, "bold yellow"), (f"  {clean(event.message)}", "yellow"))
        case Error():
            style = "yellow" if event.recovered else "red"
            return Text.assemble((f"error in {clean(event.where)}: ", f"bold {style}"), (clean(event.message), style))
        case ContextEdited():
            return Text(
                f"context edited: {clean(event.policy)}, steps {event.first_step}–{event.last_step}, "
                f"{event.tokens_before:,} → {event.tokens_after:,} tokens, {event.recomputed_tokens:,} read again",
                style="blue",
            )


def answer_panel(end: RunFinished, width: int) -> Panel:
    """The answer, with what cut the run short when something did."""
    answered = end.reason == "answered"
    text = Text(clean(end.answer).strip() or "(no answer)")
    title = "answer" if answered else f"answer · run ended by: {clean(end.reason)}"
    color = "green" if answered else "yellow"
    return Panel(
        text, title=Text(title, style=f"bold {color}"), title_align="left", border_style=color, box=ROUNDED,
        width=width, padding=(0, 1),
    )  # fmt: skip


def ending_lines(end: RunFinished, trace: str) -> Text:
    """Sources, figures and where the trace is."""
    rows = [f"sources: {', '.join(one_line(source, 200) for source in end.sources)}"] if end.sources else []
    rows += _citation_lines(end)
    tokens = int(end.usage.get("completion_tokens", 0))
    rows.append(f"{end.steps:,} steps · {tokens:,} tokens written · {clock(end.seconds)}")
    if trace:
        rows.append(f"trace: {clean(trace)} (see it again: thinkloop replay {clean(trace)})")
    return Text("\n".join(rows), style="dim")


def _citation_lines(end: RunFinished) -> list[str]:
    wrong = [citation for citation in end.citations if not citation.get("holds")]
    if not end.citations:
        return []
    held = f"citations: {len(end.citations) - len(wrong)} of {len(end.citations)} hold"
    return [held, *(one_line(f"  {entry.get('text')}: {entry.get('problem')}", 200) for entry in wrong)]


def _argument(key: str, value: object, width: int, lines: int) -> Text:
    plain = clean(value) if isinstance(value, str) else _compact(value)
    shown, hidden = clip(plain, lines, width)
    separator = "\n" if "\n" in shown else " "
    text = Text.assemble((f"{one_line(key, 40)}:", "dim"), separator, shown)
    return text.append(f"\n… {hidden:,} more lines", style="dim") if hidden else text


def _result_text(result: ToolResult, width: int, lines: int) -> Text:
    shown, hidden = clip(clean(result.display or result.content).rstrip("\n"), lines, width)
    text = Text(shown, style="" if result.ok else "red")
    if hidden:
        text.append(f"\n… {hidden:,} more lines", style="dim")
    for file in result.files:
        about = one_line(f"{file.name} ({file.media_type}, {size(len(file.data))})", max(width, 8))
        text.append(f"\nfile: {about}", style="magenta")
    return text


def _outcome(result: ToolResult | None) -> str:
    if result is None:
        return "no result"
    seconds = f"{result.seconds:.2f} s" if result.seconds >= 0.01 else f"{result.seconds * 1000:.1f} ms"
    return seconds if result.ok else f"failed · {seconds}"


def _inline(arguments: Json) -> str:
    return ", ".join(f"{key}={_compact(value)}" for key, value in arguments.items())


def _compact(value: object) -> str:
    return clean(json.dumps(value, ensure_ascii=False, default=repr))
