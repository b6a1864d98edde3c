"""The Tool contract: what a model may call, what comes back, and how several tools share one resource."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

from thinkloop.traces.events import Attachment, Json, ThinkloopError

__all__ = ["Attachment", "Effect", "Output", "Tool", "ToolError", "Toolset", "declaration"]

Effect = Literal["read", "write"]


class ToolError(ThinkloopError):
    """Raised by a tool to say what went wrong. Its message goes to the model as a failed result; the run goes on."""


@dataclass(frozen=True, slots=True)
class Output:
    """What a tool gives back: `content` for the model, `display` for the person (empty: the content), `record` and
    `files` for the trace."""

    content: str
    display: str = ""
    record: Json = field(default_factory=dict)
    ok: bool = True
    files: tuple[Attachment, ...] = ()


@runtime_checkable
class Tool(Protocol):
    """Something a model may call.

    `parameters` is a JSON Schema of type object; `effect` says whether calls may run side by side (`read`) or one after
    the other (`write`); `deadline` is in seconds; `budget` is the most tokens that one result may put into the context.
    A tool with a true attribute `paged` has its own way to read on in a long result; for the others there is `read_result`.
    """

    @property
    def name(self) -> str: ...
    @property
    def description(self) -> str: ...
    @property
    def parameters(self) -> Json: ...
    @property
    def effect(self) -> Effect: ...
    @property
    def deadline(self) -> float: ...
    @property
    def budget(self) -> int: ...

    async def call(self, arguments: Json) -> Output:
        """Run with arguments that fit `parameters`. Raises `ToolError` for what the model should be told."""
        ...


@runtime_checkable
class Toolset(Protocol):
    """Tools that share a resource (an index, a sandbox) which lives as long as the run: an async context manager.

    An attribute `notes`, a list of texts, tells the person what is to be known before the run.
    """

    def tools(self) -> Sequence[Tool]: ...
    async def __aenter__(self) -> Any: ...
    async def __aexit__(self, *exc: Any) -> None: ...


def declaration(tool: Tool) -> Json:
    """The tool in OpenAI's form, as models are told of it."""
    function = {"name": tool.name, "description": tool.description, "parameters": tool.parameters}
    return {"type": "function", "function": function}
