"""The Tool contract: what a model may call, what comes back, and how several tools share one resource."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

from thinkloop.traces.events import Attachment, Json, ThinkloopError

__all__ = [
    "CHARACTERS_PER_TOKEN", "Attachment", "Effect", "Output", "Tool", "ToolError", "Toolset", "declaration", "entered",
    "object_schema",
]  # fmt: skip

Effect = Literal["read", "write"]

CHARACTERS_PER_TOKEN = 4
"""What a budget is held against where there is no tokenizer."""


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


def object_schema(required: Sequence[str], **properties: Json) -> Json:
    """The `parameters` of a tool that takes these properties and no others."""
    listed = list(required)
    return {"type": "object", "properties": properties, "required": listed, "additionalProperties": False}


def declaration(tool: Tool) -> Json:
    """The tool in OpenAI's form, as models are told of it."""
    function = {"name": tool.name, "description": tool.description, "parameters": tool.parameters}
    return {"type": "function", "function": function}


async def entered(given: Sequence[Tool | Toolset], stack: AsyncExitStack) -> dict[str, Tool]:
    """All the tools by name, toolsets entered until `stack` closes. Raises `ThinkloopError` for two tools of one name and
    for a schema that can't be used."""
    found: dict[str, Tool] = {}
    for entry in given:
        if isinstance(entry, Toolset):
            await stack.enter_async_context(entry)
        for tool in entry.tools() if isinstance(entry, Toolset) else [entry]:
            _check_usable(tool, found)
            found[tool.name] = tool
    return found


def _check_usable(tool: Tool, others: Mapping[str, Tool]) -> None:
    from thinkloop.tools.validate import check_schema  # brings jsonschema, 60 ms: here, and not in the first call

    if tool.name in others:
        raise ThinkloopError(
            f"Two tools are called `{tool.name}`: rename one or leave it out, the model must tell them apart."
        )
    if problem := check_schema(tool.parameters):
        raise ThinkloopError(f"The `parameters` of tool `{tool.name}` can't be used: {problem}")
