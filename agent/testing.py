"""Models for tests: one that plays a script, and one that spoils another's calls on purpose."""

from __future__ import annotations

import json
import random
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import anyio
from thinkloop.agent.model import Conversation, Message, Model, Turn
from thinkloop.traces.events import (
    Content,
    Event,
    FinishReason,
    Json,
    Thinking,
    ThinkloopError,
    ToolCall,
    ToolCallDelta,
    TurnFinished,
    Usage,
)

_KEYS = {"thinking", "content", "calls", "usage", "error", "delay", "reason", "token_ids"}

Script = Iterable[Mapping[str, Any]]


class ScriptedModel:
    """A `Model` that plays a script: each entry is one turn, a mapping with any of these keys.

    - `thinking`, `content`: text, streamed in pieces of `piece` characters.
    - `calls`: a list of `(name, arguments)`; arguments are a dict, or a string that is taken as the raw text (to play a
      malformed call). A `ToolCall` event stands for itself.
    - `usage`: a dict that overrides fields of `Usage`; without it tokens are estimated.
    - `error`: a message or an exception, raised after what the turn gave.
    - `delay`: seconds before the turn's first event.
    - `reason`: how the turn ends (`stop`, `tool_calls`, `length`); found from the rest when absent.
    - `token_ids`: the ids that the turn "sampled".

    The script may be any iterable, so a test can make turns as they are asked for. Raises `ThinkloopError` for a turn
    with unknown keys, and when a turn is asked for that the script doesn't have.
    """

    def __init__(
        self,
        script: Script,
        *,
        window: int = 262_144,
        context_policy: Literal["hide_results", "drop_steps"] = "hide_results",
        name: str = "scripted",
        piece: int = 40,
    ) -> None:
        self._script = iter(script)
        self._window, self._policy, self._name, self._piece = window, context_policy, name, piece
        self._seen: list[tuple[list[Message], int]] = []
        self._calls_made = 0
        self._tokens, self._read, self._epoch = 0, 0, 0
        self.turns: list[Turn] = []
        """What each turn was asked for."""
        self.tools: list[Json] = []
        """The tools of the last turn, as the model was told of them."""
        self.closed = False

    @property
    def name(self) -> str:
        return self._name

    @property
    def window(self) -> int:
        return self._window

    @property
    def context_policy(self) -> Literal["hide_results", "drop_steps"]:
        return self._policy

    @property
    def conversations(self) -> list[list[Message]]:
        """The messages that each turn was given."""
        return [messages[:length] for messages, length in self._seen]

    def describe(self) -> Json:
        return {"name": self._name, "kind": "scripted"}

    def count_tokens(self, text: str) -> int:
        """Four characters a token, rounded up."""
        return -(-len(text) // 4)

    def assert_complete(self) -> None:
        """Raises `AssertionError` when turns of the script were not asked for."""
        rest = list(self._script)
        assert not rest, f"{len(rest)} turns of the script were never asked for, the first is {dict(rest[0])!r}"

    async def stream(self, conversation: Conversation, tools: Sequence[Json], turn: Turn) -> AsyncIterator[Event]:
        entry = self._next(conversation, tools, turn)
        prompt, cached = self._prompt(conversation)
        await anyio.sleep(entry.get("delay", 0))
        text = ""
        for event in self._written(entry):
            text += _text(event)
            yield event
        if "error" in entry:
            raise _exception(entry["error"])
        usage = {
            "prompt_tokens": prompt,
            "completion_tokens": max(self.count_tokens(text), 1),
            "cached_tokens": cached,
            "thinking_tokens": self.count_tokens(entry.get("thinking", "")),
        } | entry.get("usage", {})
        self._tokens = usage["prompt_tokens"] + usage["completion_tokens"]
        yield Usage(**usage)
        reason: FinishReason = entry.get("reason") or ("tool_calls" if entry.get("calls") else "stop")
        yield TurnFinished(reason=reason, token_ids=list(entry.get("token_ids", ())))

    async def aclose(self) -> None:
        self.closed = True

    def _next(self, conversation: Conversation, tools: Sequence[Json], turn: Turn) -> Mapping[str, Any]:
        entry = next(self._script, None)
        if entry is None:
            played = len(self.turns)
            raise ThinkloopError(f"The script has {played} turns, and one more was asked for: add a turn that answers.")
        if unknown := entry.keys() - _KEYS:
            raise ThinkloopError(
                f"Turn {len(self.turns) + 1} of the script has unknown keys {sorted(unknown)}; "
                f"known are {', '.join(sorted(_KEYS))}."
            )
        self.turns.append(turn)
        self.tools = list(tools)
        # Messages are only ever appended to a list, so list and length are a snapshot that costs nothing.
        self._seen.append((conversation.messages, len(conversation.messages)))
        return entry

    def _prompt(self, conversation: Conversation) -> tuple[int, int]:
        """Tokens of the conversation and how many of them were there before; only new messages are counted."""
        messages = conversation.messages
        if conversation.epoch != self._epoch or len(messages) < self._read:
            self._tokens, self._read, self._epoch = 0, 0, conversation.epoch
        cached = self._tokens
        first = self._read + (1 if self._read else 0)  # its own last turn is counted by its usage
        new = [messages[at] for at in range(first, len(messages))]
        self._read = len(messages)
        return cached + sum(self.count_tokens(_message_text(message)) for message in new), cached

    def _written(self, entry: Mapping[str, Any]) -> Iterable[Event]:
        yield from (Thinking(text=text) for text in _pieces(entry.get("thinking", ""), self._piece))
        yield from (Content(text=text) for text in _pieces(entry.get("content", ""), self._piece))
        for index, given in enumerate(entry.get("calls", ())):
            call = given if isinstance(given, ToolCall) else self._call(*given)
            yield ToolCallDelta(index=index, name=call.name, arguments=call.raw)
            yield call

    def _call(self, name: str, arguments: Json | str) -> ToolCall:
        call_id = f"functions.{name}:{self._calls_made}"
        self._calls_made += 1
        raw = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        parsed, problem = parse_arguments(raw)
        return ToolCall(id=call_id, name=name, arguments=parsed, raw=raw, problem=problem)


class ChaosModel:
    """Another model whose calls are spoiled by seed: cut off, unquoted, renamed, emptied, wrapped in a list, of
    another type.

    `rate` is the share of calls that are spoiled; `spoiled` counts them. All else is the inner model's.
    """

    def __init__(self, inner: Model, seed: int = 0, *, rate: float = 0.5) -> None:
        self._inner, self._rate = inner, rate
        self._random = random.Random(seed)
        self.spoiled = 0

    @property
    def name(self) -> str:
        return f"chaos({self._inner.name})"

    @property
    def window(self) -> int:
        return self._inner.window

    @property
    def context_policy(self) -> Literal["hide_results", "drop_steps"]:
        return self._inner.context_policy

    def describe(self) -> Json:
        return self._inner.describe() | {"chaos": self._rate}

    def count_tokens(self, text: str) -> int:
        return self._inner.count_tokens(text)

    async def stream(self, conversation: Conversation, tools: Sequence[Json], turn: Turn) -> AsyncIterator[Event]:
        async for event in self._inner.stream(conversation, tools, turn):
            if isinstance(event, ToolCall) and self._random.random() < self._rate:
                self.spoiled += 1
                yield self._spoil(event)
            elif not isinstance(event, ToolCallDelta):
                yield event

    async def aclose(self) -> None:
        await self._inner.aclose()

    def _spoil(self, call: ToolCall) -> ToolCall:
        spoil = self._random.choice(_SPOILERS)
        name, raw = spoil(call.name, call.raw)
        arguments, problem = parse_arguments(raw)
        return replace(call, name=name, raw=raw, arguments=arguments, problem=problem)


_SPOILERS: tuple[Callable[[str, str], tuple[str, str]], ...] = (
    lambda name, raw: (name, raw[: len(raw) // 2]),
    lambda name, raw: (name, raw.replace('"', "", 1)),
    lambda name, raw: (name + "_x", raw),
    lambda name, raw: ("", raw),
    lambda name, raw: (name, ""),
    lambda name, raw: (name, f"[{raw}]"),
    lambda name, raw: (name, f"{raw} and so on"),
    lambda name, raw: (name, json.dumps({"unheard_of": raw})),
)


def parse_arguments(raw: str) -> tuple[Json | None, str]:
    """The arguments that a call's raw text holds, or None, and what is wrong with it (empty when nothing is)."""
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError) as problem:
        return None, f"the arguments are not JSON ({problem})"
    if not isinstance(value, dict):
        return None, "the arguments are not a JSON object"
    return value, ""


def _pieces(text: str, size: int) -> Iterable[str]:
    return (text[at : at + size] for at in range(0, len(text), size))


def _text(event: Event) -> str:
    match event:
        case Thinking() | Content():
            return event.text
        case ToolCall():
            return event.name + event.raw
        case _:
            return ""


def _message_text(message: Message) -> str:
    calls = "".join(call["function"]["name"] + call["function"]["arguments"] for call in message.get("tool_calls", ()))
    return str(message.get("reasoning_content", "")) + str(message["content"]) + calls


def _exception(error: str | Exception) -> Exception:
    return error if isinstance(error, Exception) else ThinkloopError(error)
