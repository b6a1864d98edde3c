"""Shows a run while it happens (or is replayed): events in, a readable screen out.

On a terminal finished things scroll by above a live region: the line of thinking being written, calls under way, and a
status line. Elsewhere the same things come as plain text, line by line.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.rule import Rule
from rich.text import Text
from thinkloop.agent import panels
from thinkloop.agent.plain import Cleaner, clean, clock
from thinkloop.traces.events import (
    Content,
    ContextEdited,
    Error,
    Event,
    LimitReached,
    RunFinished,
    RunStarted,
    StepStarted,
    Thinking,
    ToolCall,
    ToolCallDelta,
    ToolResult,
    Usage,
)

LIVE_LINES = 6
"""Most lines of visible text, and most calls, in the live region."""
SPINNER = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"
LEAST_DELTAS = 8
"""Pieces after which a rate is worth showing before the turn reports its own."""
LEAST_SECONDS = 0.02
"""Seconds below which a rate is chance: a small turn can come in one read."""


def plain_console(file: Any = None, **options: Any) -> Console:
    """A console that takes nothing in a text for markup, emoji or something to highlight."""
    return Console(file=file, markup=False, emoji=False, highlight=False, force_jupyter=False, **options)


class Screen:
    """Consumes a run's events in order. A context manager: leaving it shows what was still open.

    `trace` is named at the end. `now` gives seconds, for the elapsed time; a replay brings its own.
    """

    def __init__(
        self, console: Console | None = None, *, trace: str = "", now: Callable[[], float] = time.monotonic
    ) -> None:
        self._console = console or plain_console()
        self._trace, self._status = trace, Status(now)
        self._thinking, self._content = "", ""
        self._cleaner = Cleaner()
        self._streaming: type[Thinking] | type[Content] | None = None
        self._calls: dict[str, ToolCall] = {}
        live = self._console.is_terminal and not self._console.is_dumb_terminal
        self._live = (
            Live(console=self._console, get_renderable=self._region, refresh_per_second=8, transient=True)
            if live
            else None
        )

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._settle()
        if self._live:
            self._live.stop()

    def show(self, event: Event) -> None:
        """Take in one event."""
        self._status.note(event)
        match event:
            case Thinking() | Content():
                self._stream(event)
            case ToolCall():
                self._end_text()
                self._calls[event.id] = event
            case ToolResult():
                self._end_text()
                self._print(panels.call_panel(self._calls.pop(event.call_id, None), event, self._width))
            case RunStarted():
                self._print(panels.start_lines(event, self._width))
            case StepStarted():
                self._settle()
                self._print(Rule(Text(f"step {event.step}", style="dim"), style="dim", align="left"))
            case LimitReached() | Error() | ContextEdited():
                self._end_text()
                self._print(panels.notice(event))
            case RunFinished():
                self._finish(event)
            case _:
                pass

    @property
    def _width(self) -> int:
        return max(self._console.width, 12)

    def _print(self, what: RenderableType) -> None:
        self._console.print(what)

    def _stream(self, event: Thinking | Content) -> None:
        if self._streaming is not type(event):
            self._end_line()
            self._cleaner, self._streaming = Cleaner(), type(event)
        text = self._cleaner.feed(event.text)
        if isinstance(event, Content):
            # Visible text may turn out to be the answer, which has its own panel: it's printed when the turn goes on.
            self._content += text
        else:
            self._thinking += text
            self._print_whole_lines()

    def _print_whole_lines(self) -> None:
        *whole, self._thinking = self._thinking.split("\n")
        for line in whole:
            self._print_thinking(line)
        if self._live and len(self._thinking) > self._width:
            *rows, rest = Text(self._thinking).wrap(self._console, self._width)
            for row in rows:
                self._print_thinking(row.plain)
            self._thinking = rest.plain

    def _print_thinking(self, line: str) -> None:
        self._console.print(Text(line, style="dim italic"), soft_wrap=self._live is None)

    def _end_line(self) -> None:
        if self._thinking:
            self._print_thinking(self._thinking)
        self._thinking = ""

    def _end_text(self) -> None:
        """Thinking and visible text of the turn are whole: what isn't printed yet is."""
        self._end_line()
        if self._content.strip():
            self._console.print(Text(self._content.strip("\n")), soft_wrap=self._live is None)
        self._content, self._streaming = "", None

    def _settle(self) -> None:
        self._end_text()
        for call in self._calls.values():
            self._print(panels.call_panel(call, None, self._width))
        self._calls = {}

    def _finish(self, end: RunFinished) -> None:
        if self._content.strip() == clean(end.answer).strip():
            self._content = ""
        self._settle()
        self._print(panels.answer_panel(end, self._width))
        self._print(panels.ending_lines(end, self._trace))

    def _region(self) -> RenderableType:
        rows: list[RenderableType] = []
        if self._thinking:
            rows.append(Text(self._thinking, style="dim italic"))
        if self._content:
            rows += Text(self._content[-LIVE_LINES * self._width :]).wrap(self._console, self._width)[-LIVE_LINES:]
        rows += [panels.call_line(call, self._width) for call in list(self._calls.values())[-LIVE_LINES:]]
        return Group(*rows, self._status.line())


class Status:
    """The figures of the status line, kept from the events."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now, self._started = now, now()
        self._step, self._steps, self._window = 0, 0, 0
        self._context, self._rate, self._reused = 0, 0.0, 0.0
        self._deltas, self._first_delta = 0, 0.0

    def note(self, event: Event) -> None:
        match event:
            case RunStarted():
                self._started = self._now()
                self._steps = int(event.limits.get("steps") or 0)
                self._window = int(event.model.get("window") or 0)
            case StepStarted():
                self._step, self._context, self._deltas = event.step, event.context_tokens, 0
            case Thinking() | Content() | ToolCallDelta():
                self._deltas += 1
                self._first_delta = self._now() if self._deltas == 1 else self._first_delta
            case Usage():
                self._take(event)
            case _:
                pass

    def _take(self, usage: Usage) -> None:
        self._context = usage.prompt_tokens + usage.completion_tokens
        self._reused = usage.cached_tokens / usage.prompt_tokens if usage.prompt_tokens else 0.0
        seconds = usage.decode_seconds or (self._now() - self._first_delta if self._deltas else 0.0)
        self._rate = usage.completion_tokens / seconds if seconds >= LEAST_SECONDS else 0.0
        self._deltas = 0

    @property
    def rate(self) -> float:
        """Tokens a second: of this turn's pieces so far (an engine sends one a token), else of the last turn."""
        seconds = self._now() - self._first_delta
        return self._deltas / seconds if self._deltas >= LEAST_DELTAS and seconds >= LEAST_SECONDS else self._rate

    def line(self) -> Text:
        """`step 3/300 · context 1,204/4,096 (29 %) · 182 tokens/s · 0:12`."""
        elapsed = self._now() - self._started
        context = self._context + self._deltas
        parts = [f"step {self._step}{f'/{self._steps}' if self._steps else ''}"]
        share = f"/{self._window:,} ({100 * context / self._window:.0f} %)" if self._window else " tokens"
        parts.append(f"context {context:,}{share}")
        parts += [f"{self.rate:,.0f} tokens/s"] if self.rate else []
        parts += [f"{self._reused:.0%} reused"] if self._reused else []
        parts.append(clock(elapsed))
        frame = SPINNER[int(elapsed * 8) % len(SPINNER)]
        return Text(f"{frame} {' · '.join(parts)}", style="bold magenta", no_wrap=True, overflow="ellipsis")
