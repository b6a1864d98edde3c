"""From a call as the model wrote it to arguments that a tool may be given: checked against its schema, and mended where
they can mean one thing only and the tool merely reads."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import anyio.to_thread
from thinkloop.tools.tool import Tool
from thinkloop.traces.events import Json, ToolCall

Check = Callable[[Json, Json], str | None]
"""What is wrong with arguments under a schema, or None."""

NOTED_CHARS = 300
"""Of mended arguments, that the note to the model shows."""


@dataclass(frozen=True, slots=True)
class Reading:
    """What a call's arguments say, or what is wrong with them. `repaired`: they are not word for word the model's."""

    arguments: Json | None
    problem: str = ""
    repaired: bool = False


async def read_arguments(call: ToolCall, tool: Tool, check: Check, *, cut_off: bool) -> Reading:
    """The arguments of `call` for `tool`. `cut_off` says that the turn ended before the model was done, so that nothing
    may be added to what it wrote. A check that may take long runs in a thread."""
    problem = _unreadable(call)
    if not problem and call.arguments is not None:
        wrong = await _checked(tool.parameters, call.arguments, len(call.raw), check)
        if wrong is None:
            return Reading(call.arguments)
        problem = f"the arguments don't fit {call.name}: {wrong}"
    if tool.effect != "read" or cut_off or "cut off" in call.problem:
        return Reading(None, problem)
    mended = await _mended(tool.parameters, call)
    return Reading(None, problem) if mended is None else Reading(mended, repaired=True)


def repair_note(arguments: Json) -> str:
    """What the model is told of arguments that had to be mended."""
    text = json.dumps(arguments, ensure_ascii=False)
    text = text if len(text) <= NOTED_CHARS else text[:NOTED_CHARS] + "…"
    return f"[note: the arguments were not as they must be and were read as {text}]"


def copied(value: Any) -> Any:
    """JSON that its holder may change without harm to ours."""
    if isinstance(value, dict):
        return {key: copied(item) for key, item in value.items()}
    return [copied(item) for item in value] if isinstance(value, list) else value


def fits_schema(schema: Json, arguments: Json) -> str | None:
    from thinkloop.tools.validate import check_arguments  # brings jsonschema, 60 ms: a run without calls never needs it

    return check_arguments(schema, arguments)


def _unreadable(call: ToolCall) -> str:
    if not call.problem and call.arguments is not None:
        return ""
    problem = call.problem or "the arguments are not a JSON object"
    return f"this call of {call.name} could not be read: {problem}; write it again with whole JSON arguments"


async def _checked(schema: Json, arguments: Json, chars: int, check: Check) -> str | None:
    from thinkloop.tools.validate import is_quick

    if is_quick(schema, chars):
        return check(schema, arguments)
    return await anyio.to_thread.run_sync(partial(check, schema, arguments), abandon_on_cancel=True)


async def _mended(schema: Json, call: ToolCall) -> Json | None:
    from thinkloop.tools.repair import repaired

    work = partial(repaired, schema, call.raw, call.arguments)
    return await anyio.to_thread.run_sync(work, abandon_on_cancel=True)
