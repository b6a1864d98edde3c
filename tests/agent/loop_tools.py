"""Small real tools, and runs of them, for the tests of the loop."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import anyio
from thinkloop.agent.agent import Agent, Result
from thinkloop.agent.limits import Limits
from thinkloop.agent.testing import ScriptedModel
from thinkloop.tools.tool import Effect, Output
from thinkloop.traces.events import Event, Json, ToolResult

TEXT = {
    "type": "object",
    "properties": {"text": {"type": "string"}},
    "required": ["text"],
    "additionalProperties": False,
}


@dataclass
class SmallTool:
    """A tool around an async function of one text; it writes down when each call begins and ends."""

    name: str
    do: Callable[[str], Awaitable[Output | str]]
    effect: Effect = "read"
    deadline: float = 5.0
    budget: int = 1000
    description: str = "A small tool."
    parameters: Json = field(default_factory=lambda: TEXT)
    log: list[str] = field(default_factory=list)

    async def call(self, arguments: Json) -> Output:
        text = arguments["text"]
        self.log.append(f"{text} begins")
        output = await self.do(text)
        self.log.append(f"{text} ends")
        return Output(output) if isinstance(output, str) else output


async def _echo(text: str) -> str:
    return f"you said {text}"


async def _sleep(text: str) -> str:
    await anyio.sleep(float(text))
    return f"slept {text}"


def echo(**changes: Any) -> SmallTool:
    return SmallTool(**{"name": "echo", "do": _echo} | changes)


def sleep(**changes: Any) -> SmallTool:
    return SmallTool("sleep", _sleep, **changes)


def says(name: str, *texts: str) -> Json:
    """A turn that calls the tool `name` with each of the texts."""
    return {"thinking": f"I call {name}.", "calls": [(name, {"text": text}) for text in texts]}


ANSWER = {"thinking": "I know.", "content": "The answer."}


@dataclass
class Ran:
    events: list[Event]
    model: ScriptedModel

    def of(self, kind: type) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]

    @property
    def results(self) -> list[str]:
        return [event.content for event in self.of(ToolResult)]

    @property
    def end(self) -> Any:
        return self.events[-1]


async def ran(
    script: Any, tools: Sequence[Any] = (), *, task: str = "Find out.", limits: Limits | None = None, **model: Any
) -> Ran:
    """Every event of a run of the script, and the model that played it."""
    scripted = script if hasattr(script, "stream") else ScriptedModel(script, **model)
    agent = Agent(scripted, tools, limits=limits, trace=False)
    return Ran([event async for event in agent.stream(task)], scripted)


async def result_of(script: Any, tools: Sequence[Any] = (), **options: Any) -> Result:
    return await Agent(ScriptedModel(script), tools, trace=False, **options).run("Find out.")
