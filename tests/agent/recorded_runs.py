"""Small recorded runs for tests: a scripted model with two tools of its own."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import anyio
from thinkloop.agent.agent import Agent
from thinkloop.agent.limits import Limits
from thinkloop.agent.testing import ScriptedModel
from thinkloop.tools.tool import Effect, Output, ToolError
from thinkloop.traces.events import Attachment, Event, RunFinished, RunStarted, StepFinished, ToolResult
from thinkloop.traces.reader import TraceReader

SCRIPT: list[dict[str, Any]] = [
    {"thinking": "First I look it up.", "calls": [("look", {"word": "mayor"}), ("look", {"word": "owner"})]},
    {"thinking": "That call was wrong.", "content": "One moment.", "calls": [("look", {}), ("nothing", {"x": 1})]},
    {"calls": [("look", '{"word": '), ("look", {"word": "bad"}), ("look", {"word": "mayor"})]},
    {"thinking": "Now I know.", "content": "The mayor is Ada."},
]


@dataclass(frozen=True, slots=True)
class Look:
    """A tool that makes a page of any word, and fails on `bad`."""

    name: str = "look"
    description: str = "Look a word up."
    effect: Effect = "read"
    deadline: float = 5.0
    budget: int = 2000
    files: tuple[Attachment, ...] = ()
    parameters: dict[str, Any] = field(
        default_factory=lambda: {"type": "object", "properties": {"word": {"type": "string"}}, "required": ["word"]}
    )

    async def call(self, arguments: dict[str, Any]) -> Output:
        if arguments["word"] == "bad":
            raise ToolError("no such word")
        return Output(
            f"page of {arguments['word']}\n" * 20, record={"document": f"{arguments['word']}.md"}, files=self.files
        )


def record(folder: Path, script: list[dict[str, Any]] | None = None, *, steps: int = 20) -> Path:
    """A trace in `folder` of a real run of the script."""
    return record_with(folder, ScriptedModel(script or SCRIPT), [Look()], steps=steps)


def record_with(folder: Path, model: Any, tools: list[Any], *, steps: int = 20) -> Path:
    agent = Agent(model, tools, limits=Limits(steps=steps), trace=folder)
    anyio.run(agent.run, "Who is the mayor?")
    return folder


def events_of(folder: Path) -> list[Event]:
    """A trace's events without what may differ between two equal runs: ids and times."""
    return [_timeless(event) for event in TraceReader.open(folder).events()]


def _timeless(event: Event) -> Event:
    match event:
        case RunStarted():
            return replace(event, run_id="")
        case StepFinished():
            return replace(event, seconds=0, overhead_seconds=0)
        case ToolResult() | RunFinished():
            return replace(event, seconds=0)
    return event
