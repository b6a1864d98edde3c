"""Chat messages to the tokens of Kimi-K2-Thinking, whole or only what is new.

Messages are OpenAI-shaped. Nothing stands between two messages, and each begins and ends with a special token, so a
message's ids don't depend on its neighbours: rendering what was appended gives the very tokens that rendering
everything would. Content is encoded with specials disallowed. In a vocabulary without think tokens `<think>` is text.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from thinkloop.engine.tokenizer import Tokenizer
from thinkloop.traces.events import Json, ThinkloopError

DEFAULT_SYSTEM = "You are Kimi, an AI assistant created by Moonshot AI."

Keep = Literal["all", "turn"]
"""Which thinking stays: all of it (a live session, append-only), or only what follows the last answer (the published
rule: an assistant message without calls ends a turn, and the thinking up to it is emptied)."""


class TemplateError(ThinkloopError):
    """A message that the template has no form for."""


@dataclass(frozen=True, slots=True)
class Marker:
    """A special token, by name."""

    name: str


@dataclass(frozen=True, slots=True)
class Sampled:
    """Ids that the model wrote itself: used as they are."""

    ids: Sequence[int]


Piece = Marker | Sampled | str

_HEADS = {"user": "<|im_user|>", "assistant": "<|im_assistant|>"}
_GENERATION: list[Piece] = [Marker("<|im_assistant|>"), "assistant", Marker("<|im_middle|>")]


def render(messages: Sequence[Json], tools: Sequence[Json] = (), *, keep: Keep = "turn") -> str:
    """The text that the published template gives, generation prompt included. For reading and for tests: special tokens
    look like content here, so never tokenise it. As there, a `reasoning_content` of None comes out as `None`."""
    pieces = [*_prefix(tools, messages, keep, verbatim=False), *_GENERATION]
    return "".join(piece.name if isinstance(piece, Marker) else str(piece) for piece in pieces)


def template_hash() -> str:
    """SHA-256 of a fixed conversation's rendering: it changes when the template does."""
    call = {"id": "functions.f:0", "function": {"name": "f", "arguments": "{}"}}
    messages: list[Json] = [
        {"role": "user", "content": "u"},
        {"role": "assistant", "reasoning_content": "r", "content": "c", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "functions.f:0", "name": "f", "content": "t"},
        {"role": "assistant", "reasoning_content": "r", "content": "c"},
    ]
    texts = [render(messages, [{"b": 1, "a": 2}], keep="turn"), render(messages, keep="all")]
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()


class Template:
    """Renders messages to token ids of one vocabulary. Stateless; safe to share."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Raises `TokenizerError` when the vocabulary lacks the special tokens of a chat."""
        self._tokenizer = tokenizer
        self._im_end = tokenizer.special("<|im_end|>")
        self.generation_prompt: list[int] = self._ids(_GENERATION)
        """Ids that open the model's own message."""
        self.close: list[int] = [self._im_end]
        """Ids that close a message which the model left open."""

    def render_prefix(self, tools: Sequence[Json], messages: Sequence[Json], *, keep: Keep = "all") -> list[int]:
        """Ids of a whole conversation, without generation prompt: tools, system (K2's default when the first message
        isn't one), messages. Assistant messages with `token_ids` are not rendered again as long as their thinking is
        kept. Call ids must be in K2's form already (`CallIds.rename`).

        Raises `TemplateError` for content that is not text.
        """
        return self._ids(_prefix(tools, messages, keep, verbatim=True))

    def render_new(self, messages: Sequence[Json]) -> list[int]:
        """Ids of messages appended to a conversation that was rendered before. Raises `TemplateError` as above."""
        return self._ids(piece for message in messages for piece in _message(message, True, verbatim=True))

    def _ids(self, pieces: Iterable[Piece]) -> list[int]:
        ids: list[int] = []
        text = ""
        for piece in self._joined(pieces):
            if isinstance(piece, str):
                text += piece
                continue
            ids += self._tokenizer.encode(text)
            text = ""
            ids += [self._tokenizer.special(piece.name)] if isinstance(piece, Marker) else self._closed(piece.ids)
        return ids + self._tokenizer.encode(text)

    def _joined(self, pieces: Iterable[Piece]) -> Iterator[Piece]:
        """Think markers that the vocabulary lacks become text and merge with their neighbours, as published."""
        for piece in pieces:
            as_text = isinstance(piece, Marker) and piece.name in _THINK and piece.name not in self._tokenizer.specials
            yield piece.name if isinstance(piece, Marker) and as_text else piece

    def _closed(self, sampled: Sequence[int]) -> Sequence[int]:
        return sampled if sampled and sampled[-1] == self._im_end else [*sampled, self._im_end]


class CallIds:
    """Gives every call of a conversation an id of K2's form, `functions.{name}:{index}`, the index counting through the
    whole conversation. Ids that have the form and are new are kept; others are renamed, in calls and their results."""

    def __init__(self) -> None:
        self.next_index = 0
        """The index of the next call."""
        self._renamed: dict[str, str] = {}
        self._used: set[str] = set()

    def rename(self, messages: Sequence[Json]) -> list[Json]:
        """The messages with ids in K2's form, and absent reasoning as "". Call it with messages in order, each once."""
        return [self._rename(message) for message in messages]

    def _rename(self, message: Json) -> Json:
        if message.get("role") == "tool":
            call_id = str(message.get("tool_call_id") or "")
            return message | {"tool_call_id": self._renamed.get(call_id, call_id)}
        if message.get("role") != "assistant":
            return message
        calls = [call | {"id": self._fresh(call)} for call in message.get("tool_calls") or ()]
        return message | {"reasoning_content": message.get("reasoning_content") or "", "tool_calls": calls}

    def _fresh(self, call: Json) -> str:
        old = str(call.get("id") or "")
        new = old
        form = _CALL_ID.fullmatch(old)
        if form is None or old in self._used:
            new = f"functions.{call['function'].get('name') or 'unnamed'}:{self.next_index}"
        index = int(form[1]) if form is not None and new == old else self.next_index
        self.next_index = max(self.next_index, index + 1)
        self._used.add(new)
        self._renamed[old] = new
        return new


_THINK = ("<think>", "</think>")
_CALL_ID = re.compile(r"functions\.[^\s:]+:(\d{1,9})")


def _prefix(tools: Sequence[Json], messages: Sequence[Json], keep: Keep, *, verbatim: bool) -> Iterator[Piece]:
    if tools:
        yield from _framed("<|im_system|>", "tool_declare", [_declaration(tools)])
    if not messages or messages[0].get("role") != "system":
        yield from _framed("<|im_system|>", "system", [DEFAULT_SYSTEM])
    first_kept = 0 if keep == "all" else _after_last_answer(messages)
    for index, message in enumerate(messages):
        yield from _message(message, index >= first_kept, verbatim=verbatim)


def _after_last_answer(messages: Sequence[Json]) -> int:
    answers = (i for i, m in enumerate(messages) if m.get("role") == "assistant" and not m.get("tool_calls"))
    return 1 + max(answers, default=-1)


def _declaration(tools: Sequence[Json]) -> str:
    return json.dumps(list(tools), separators=(",", ":"), sort_keys=True, ensure_ascii=False)


def _framed(head: str, word: str, body: Iterable[Piece]) -> Iterator[Piece]:
    yield Marker(head)
    yield word
    yield Marker("<|im_middle|>")
    yield from body
    yield Marker("<|im_end|>")


def _message(message: Json, keep_thinking: bool, *, verbatim: bool) -> Iterator[Piece]:
    role = str(message.get("role"))
    head, word = _HEADS.get(role, "<|im_system|>"), str(message.get("name") or role)
    if role == "assistant" and keep_thinking and verbatim and message.get("token_ids"):
        yield from (Marker(head), word, Marker("<|im_middle|>"), Sampled(message["token_ids"]))
        return
    yield from _framed(head, word, _body(role, message, keep_thinking))


def _body(role: str, message: Json, keep_thinking: bool) -> Iterator[Piece]:
    if role == "assistant":
        yield Marker("<think>")
        yield str(message.get("reasoning_content", "")) if keep_thinking else ""
        yield Marker("</think>")
        yield _text(message.get("content"))
        yield from _calls(message.get("tool_calls") or ())
        return
    if role == "tool":
        yield f"## Return of {message.get('tool_call_id') or ''}\n"
    yield _text(message.get("content"))


def _calls(calls: Sequence[Json]) -> Iterator[Piece]:
    if not calls:
        return
    yield Marker("<|tool_calls_section_begin|>")
    for call in calls:
        yield Marker("<|tool_call_begin|>")
        yield str(call["id"])
        yield Marker("<|tool_call_argument_begin|>")
        yield _arguments(call["function"].get("arguments"))
        yield Marker("<|tool_call_end|>")
    yield Marker("<|tool_calls_section_end|>")


def _arguments(arguments: Any) -> str:
    """A string stays as the model wrote it."""
    return arguments if isinstance(arguments, str) else json.dumps(arguments or {}, ensure_ascii=False)


def _text(content: Any) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    return "".join(map(_part, content))


def _part(part: Any) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, dict) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    raise TemplateError(f"a message has a content part of type {kind!r}; this model reads text only, send text parts")
