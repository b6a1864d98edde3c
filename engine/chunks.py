"""From the pieces of a chat completion to events: what an OpenAI-compatible server sends, in any of its dialects.

Servers disagree about almost everything but the outline (the dialects are listed in `ReplyReader`); this reads all of
it leniently, keeps every character of text, and never raises on a piece it doesn't understand.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from thinkloop.engine.call_form import parse_arguments
from thinkloop.traces.events import Content, Event, FinishReason, Json, Thinking, ToolCall, ToolCallDelta, Usage

MAX_CALLS = 512
"""Most calls of one turn; what a server sends beyond is dropped (the largest seen in the wild is 120)."""

_HALF = re.compile("[\ud800-\udfff]")

_REASONS: dict[str, FinishReason] = {"stop": "stop", "length": "length", "max_tokens": "length"}


@dataclass(slots=True)
class _Call:
    id: str = ""
    name: str = ""
    pieces: list[str] = field(default_factory=list)

    @property
    def raw(self) -> str:
        return whole_text("".join(self.pieces))


class ReplyReader:
    """Reads one turn's chunks (or one whole reply) and gives its events.

    Understood: `reasoning_content` and `reasoning`; content as text or as typed parts; usage at the top, in
    `choices[0]`, repeated or missing; `cached_tokens` at the top or in details; calls by index, with the index missing
    or always 0, ids missing, names whole, repeated or in pieces, arguments as text or as an object; the old
    `function_call`; a finish reason that is missing, null, or in the same chunk as the last text.
    """

    def __init__(self, declared: Collection[str] = ()) -> None:
        self.usage: Json | None = None
        self.finish: str | None = None
        self.thinking_chars = 0
        self.content_chars = 0
        self._declared = frozenset(declared)
        self._calls: list[_Call] = []
        self._by_index: dict[int, int] = {}
        self._half = {"thinking": "", "content": ""}

    @property
    def calls_begun(self) -> int:
        """How many calls have begun so far."""
        return len(self._calls)

    def feed(self, chunk: Any) -> list[Event]:
        """The events of one chunk."""
        if not isinstance(chunk, dict):
            return []
        choice = _first_choice(chunk)
        self.usage = _usage_of(chunk, choice) or self.usage
        if isinstance(reason := choice.get("finish_reason"), str) and reason:
            self.finish = reason
        return self._delta(self._delta_of(choice))

    def _delta_of(self, choice: Json) -> Json:
        if isinstance(delta := choice.get("delta"), dict):
            return delta
        message = choice.get("message")
        fresh = not (self.thinking_chars or self.content_chars or self._calls)
        return message if isinstance(message, dict) and fresh else {}

    def _delta(self, delta: Json) -> list[Event]:
        events: list[Event] = []
        reasoning = delta.get("reasoning_content") or delta.get("reasoning")
        if isinstance(reasoning, str):
            events.append(Thinking(text=reasoning))
        events += _content_events(delta.get("content"))
        for fragment in _fragments(delta):
            events += self._fragment(fragment)
        return [
            event
            for event in map(self._counted, events)
            if not (isinstance(event, Thinking | Content) and not event.text)
        ]

    def _counted(self, event: Event) -> Event:
        if isinstance(event, Thinking):
            event = Thinking(text=self._whole("thinking", event.text))
            self.thinking_chars += len(event.text)
        elif isinstance(event, Content):
            event = Content(text=self._whole("content", event.text))
            self.content_chars += len(event.text)
        return event

    def _whole(self, kind: str, text: str) -> str:
        """Joins a character that JSON escapes wrote as two halves in two chunks (some servers cut there)."""
        if not (self._half[kind] or _HALF.search(text)):
            return text
        text = self._half[kind] + text
        self._half[kind] = text[-1] if "\ud800" <= text[-1] <= "\udbff" else ""
        return whole_text(text.removesuffix(self._half[kind]))

    def _fragment(self, fragment: Json) -> list[Event]:
        function = fragment.get("function")
        function = function if isinstance(function, dict) else {}
        call_id, name = _text(fragment.get("id")), _text(function.get("name"))
        position = self._position(fragment.get("index"), call_id, name)
        if position is None:
            return []
        call = self._calls[position]
        call.id = call.id or call_id
        known = call.name
        call.name = _joined_name(call.name, name, self._declared)
        piece = _argument_piece(function.get("arguments"), begun=bool(call.pieces))
        call.pieces += [piece] if piece else []
        if not piece and call.name == known:
            return []
        return [
            ToolCallDelta(index=position, name=call.name if call.name != known else "", arguments=whole_text(piece))
        ]

    def _position(self, index: Any, call_id: str, name: str) -> int | None:
        """Which call a fragment belongs to; None when there are too many."""
        if not isinstance(index, int) or isinstance(index, bool):
            return self._position_without_index(call_id, name)
        position = self._by_index.get(index)
        if position is not None and not self._is_another(position, call_id, name):
            return position
        return self._begin(index)

    def _is_another(self, position: int, call_id: str, name: str) -> bool:
        """A new id with a name under an old index: servers that number every call 0."""
        old = self._calls[position].id
        return bool(old and call_id and name and call_id != old)

    def _position_without_index(self, call_id: str, name: str) -> int | None:
        for position, call in enumerate(self._calls):
            if call_id and call.id == call_id:
                return position
        if self._calls and not call_id and not (name and _is_object(self._calls[-1].raw)):
            return len(self._calls) - 1
        return self._begin(-1 - len(self._calls))

    def _begin(self, index: int) -> int | None:
        if len(self._calls) >= MAX_CALLS:
            return None
        self._by_index[index] = len(self._calls)
        self._calls.append(_Call())
        return len(self._calls) - 1

    def calls(self, reason: FinishReason) -> list[ToolCall]:
        """The turn's calls, whole, in the order they began; `reason` tells whether the last may be cut off."""
        return [whole_call(call.id, call.name, call.raw, cut=reason == "length") for call in self._calls]

    def reason(self) -> FinishReason:
        """Why the turn ended, whatever word the server used or forgot."""
        reason = _REASONS.get(self.finish or "", "stop")
        return "tool_calls" if self._calls and reason == "stop" else reason

    def usage_event(self, prefill_seconds: float, decode_seconds: float) -> Usage:
        """The usage as reported, with impossible numbers read as 0 (no report). Thinking tokens are split off by the
        share of characters when the server doesn't tell."""
        usage = self.usage or {}
        prompt, completion = _tokens(usage.get("prompt_tokens")), _tokens(usage.get("completion_tokens"))
        cached = _tokens(usage.get("cached_tokens")) or _detail(usage, "prompt_tokens_details", "cached_tokens")
        thinking = _tokens(usage.get("reasoning_tokens")) or _detail(
            usage, "completion_tokens_details", "reasoning_tokens"
        )
        return Usage(
            prompt_tokens=prompt,
            completion_tokens=completion,
            cached_tokens=min(cached, prompt),
            thinking_tokens=min(thinking or self._thinking_share(completion), completion),
            prefill_seconds=prefill_seconds,
            decode_seconds=decode_seconds,
        )

    def _thinking_share(self, completion: int) -> int:
        written = (
            self.thinking_chars + self.content_chars + sum(len(piece) for call in self._calls for piece in call.pieces)
        )
        return round(completion * self.thinking_chars / written) if written else 0


def whole_call(call_id: str, name: str, raw: str, *, cut: bool = False) -> ToolCall:
    """A finished call from its argument text. Empty text is an empty object; what isn't an object is a `problem`."""
    arguments, problem = parse_arguments(raw)
    if problem and cut:
        problem = "the call was cut off before its end: the turn ran out of tokens"
    if not name:
        problem = "the call has no tool name"
    return ToolCall(id=call_id, name=name, arguments=arguments, raw=raw, problem=problem)


def whole_text(text: str) -> str:
    """The text with surrogate pairs joined and lone halves replaced, so that it can always be encoded as UTF-8."""
    if not _HALF.search(text):
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _is_object(raw: str) -> bool:
    return bool(raw.strip()) and parse_arguments(raw)[0] is not None


def _first_choice(chunk: Json) -> Json:
    choices = chunk.get("choices")
    if not isinstance(choices, list):
        return {}
    for choice in choices:
        if isinstance(choice, dict) and choice.get("index") in (None, 0):
            return choice
    return {}


def _usage_of(chunk: Json, choice: Json) -> Json | None:
    for usage in (chunk.get("usage"), choice.get("usage")):
        if isinstance(usage, dict) and usage:
            return usage
    return None


def _content_events(content: Any) -> list[Event]:
    if isinstance(content, str):
        return [Content(text=content)] if content else []
    if not isinstance(content, list):
        return []
    return [event for part in content if isinstance(part, dict) for event in _part_events(part)]


def _part_events(part: Json) -> list[Event]:
    if part.get("type") == "thinking":
        inner = part.get("thinking")
        pieces = inner if isinstance(inner, list) else [{"text": inner}]
        return [
            Thinking(text=text) for piece in pieces if isinstance(piece, dict) and (text := _text(piece.get("text")))
        ]
    text = _text(part.get("text"))
    return [Content(text=text)] if text else []


def _fragments(delta: Json) -> list[Json]:
    calls = delta.get("tool_calls")
    if isinstance(calls, list):
        return [call for call in calls if isinstance(call, dict)]
    old = delta.get("function_call")
    return [{"index": 0, "function": old}] if isinstance(old, dict) else []


def _joined_name(known: str, piece: str, declared: frozenset[str]) -> str:
    """The name after one more fragment: a repeated name stays, a grown one replaces, a piece is appended."""
    joined = known + piece
    if joined in declared or not known:
        return joined
    if known in declared or piece == known:
        return known
    return piece if piece.startswith(known) else joined


def _argument_piece(arguments: Any, *, begun: bool) -> str:
    if isinstance(arguments, str):
        return arguments
    if arguments is None or begun:
        return ""
    return json.dumps(arguments, ensure_ascii=False, separators=(",", ":"))


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _tokens(value: Any) -> int:
    """A token count, or 0 for what can't be one."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return 0
    return int(value) if 0 < value < 2**40 else 0


def _detail(usage: Json, group: str, key: str) -> int:
    details = usage.get(group)
    return _tokens(details.get(key)) if isinstance(details, dict) else 0


def error_of(chunk: Any) -> Json | None:
    """The error object that a chunk or reply carries in place of an answer, as a dict with at least `message`."""
    if not isinstance(chunk, dict):
        return None
    if chunk.get("object") == "error":
        return chunk
    error = chunk.get("error")
    if not error:
        return None
    return error if isinstance(error, dict) else {"message": str(error)}
