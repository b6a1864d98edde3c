"""What a model of the Kimi-K2 family writes, token by token, as events.

The model diverges from its own format in many ways (calls opened inside thinking, missing wrappers and ends, foreign
ids). Every form is taken: the parser never raises, every character goes to exactly one of thinking, content, a call's
name or its arguments, and no marker comes out as text. Events, with neighbours joined, don't depend on how the text was
cut into tokens.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal

from thinkloop.engine.call_form import (
    Declared,
    call_id,
    call_name,
    declared_tools,
    id_index,
    infer_name,
    parse_arguments,
)
from thinkloop.engine.tokenizer import Tokenizer
from thinkloop.traces.events import Content, Event, FinishReason, Json, Thinking, ToolCall, ToolCallDelta

State = Literal["thinking", "content", "section", "header", "arguments"]
"""Where the text goes that comes next; `section` is between calls, its text is content."""

_TEXT_MARKERS = ("<|tool_call_section_begin|>", "<|tool_call_section_end|>")
"""Misspelt section markers that models write out in ordinary tokens."""

_ESCAPED = re.compile(r"\\.", re.DOTALL)

_CUT: Mapping[FinishReason, str] = {
    "length": "the turn ran out of tokens",
    "cancelled": "the turn was cancelled",
    "stop": "the message ended",
    "tool_calls": "the message ended",
}


class Parser:
    """One turn's tokens to `Thinking`, `Content`, `ToolCallDelta` and `ToolCall` events."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        tools: Sequence[Json] = (),
        next_index: int = 0,
        *,
        thinking: bool | None = None,
    ) -> None:
        """`tools` are the declarations the model was given: names are recovered only to one of them. `next_index` is
        the first call index of the conversation that is free. `thinking` says whether the turn starts inside thinking
        before any marker (None: where the vocabulary has think tokens)."""
        has_tokens = tokenizer.think_start is not None and tokenizer.think_end is not None
        self._tokenizer = tokenizer
        self._declared: Declared = declared_tools(tools)
        self._next_index = next_index
        self._state: State = "thinking" if (has_tokens if thinking is None else thinking) else "content"
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._markers = _TEXT_MARKERS if has_tokens else (*_TEXT_MARKERS, "<think>", "</think>")
        self._marker = re.compile("|".join(map(re.escape, self._markers)))
        self._held = ""
        self._header = ""
        self._arguments: list[str] = []
        self._calls = 0
        self._on: Mapping[str, Callable[[], Iterator[Event]]] = {
            "<think>": self._think_start,
            "</think>": self._think_end,
            "<|tool_calls_section_begin|>": self._section_begin,
            "<|tool_calls_section_end|>": self._section_end,
            "<|tool_call_section_begin|>": self._section_begin,
            "<|tool_call_section_end|>": self._section_end,
            "<|tool_call_begin|>": self._call_begin,
            "<|tool_call_argument_begin|>": self._arguments_begin,
            "<|tool_call_end|>": self._call_end,
            "<|im_end|>": self._message_end,
            "[EOS]": self._message_end,
            "[EOT]": self._message_end,
        }

    @property
    def state(self) -> State:
        """Where the next text will go."""
        return self._state

    @property
    def calls(self) -> int:
        """Calls that this turn has made so far, whole or not."""
        return self._calls

    @property
    def next_index(self) -> int:
        """The first call index of the conversation that is still free."""
        return self._next_index

    def feed(self, token_id: int) -> list[Event]:
        """The events that one more token completes. Tokens the vocabulary doesn't have are passed over."""
        name = self._tokenizer.special_name(token_id)
        if name is None:
            known = 0 <= token_id < self._tokenizer.n_ranks
            return list(self._text(self._utf8.decode(self._tokenizer.token_bytes(token_id)))) if known else []
        return [*self._flush(), *self._act(name)]

    def finish(self, reason: FinishReason) -> list[Event]:
        """The events that the end of the turn completes: what was held back, and a call that was cut short, which comes
        with a `problem` unless its arguments are whole."""
        return [*self._flush(), *self._close_call(_CUT[reason])]

    def _text(self, text: str) -> Iterator[Event]:
        """Routes text, taking out markers that are spelt as text and holding back what may become one."""
        self._held += text
        while (found := self._find_marker()) is not None:
            at, marker = found
            before, self._held = self._held[:at], self._held[at + len(marker) :]
            yield from self._route(before)
            yield from self._act(marker)
        keep = self._open_suffix()
        ready, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        yield from self._route(ready)

    def _find_marker(self) -> tuple[int, str] | None:
        found = ((match.start(), match[0]) for match in self._marker.finditer(self._held))
        return next((one for one in found if not self._quoted(one[0])), None)

    def _quoted(self, at: int) -> bool:
        """Whether this place in the held text is inside a string of a call's arguments, where a marker is just text."""
        if self._state != "arguments":
            return False
        before = "".join(self._arguments) + self._held[:at]
        return _ESCAPED.sub("", before).count('"') % 2 == 1

    def _open_suffix(self) -> int:
        """Characters at the end of the held text that may be the start of a marker."""
        at = self._held.rfind("<")
        if at < 0:
            return 0
        return len(self._held) - at if any(m.startswith(self._held[at:]) for m in self._markers) else 0

    def _flush(self) -> Iterator[Event]:
        """Routes what is held back: half a character, half a marker."""
        rest, self._held = self._held + self._utf8.decode(b"", final=True), ""
        yield from self._route(rest)

    def _route(self, text: str) -> Iterator[Event]:
        if not text:
            return
        if self._state == "header":
            self._header += text
        elif self._state == "arguments":
            self._arguments.append(text)
            yield ToolCallDelta(index=self._calls, arguments=text)
        else:
            yield Thinking(text=text) if self._state == "thinking" else Content(text=text)

    def _act(self, name: str) -> Iterator[Event]:
        """Acts on a marker; special tokens without a meaning here are passed over."""
        action = self._on.get(name)
        if action is not None:
            yield from action()

    def _think_start(self) -> Iterator[Event]:
        if self._state == "content":
            self._state = "thinking"
        yield from ()

    def _think_end(self) -> Iterator[Event]:
        if self._state == "thinking":
            self._state = "content"
        yield from ()

    def _section_begin(self) -> Iterator[Event]:
        yield from self._close_call("the next section of calls began")
        self._state = "section"

    def _section_end(self) -> Iterator[Event]:
        yield from self._close_call("")
        if self._state == "section":
            self._state = "content"

    def _call_begin(self) -> Iterator[Event]:
        if self._state == "header" and not self._header.strip():
            return
        yield from self._close_call("the next call began")
        self._state, self._header, self._arguments = "header", "", []

    def _arguments_begin(self) -> Iterator[Event]:
        if self._state == "header":
            self._state = "arguments"
            yield ToolCallDelta(index=self._calls, name=call_name(self._header, self._declared))

    def _call_end(self) -> Iterator[Event]:
        yield from self._close_call("")

    def _message_end(self) -> Iterator[Event]:
        yield from self._close_call(_CUT["stop"])
        if self._state == "section":
            self._state = "content"

    def _close_call(self, cut_by: str) -> Iterator[Event]:
        """Ends the call that is open, if one is. `cut_by` says what ended it, empty when the model itself did."""
        if self._state not in ("header", "arguments"):
            return
        if self._state == "header":
            yield from self._split_header()
        raw = "".join(self._arguments)
        yield self._call(raw, cut_by)
        self._calls += 1
        self._state, self._header, self._arguments = "section", "", []

    def _split_header(self) -> Iterator[Event]:
        """Without an argument marker the arguments begin at the first brace."""
        brace = self._header.find("{")
        if brace >= 0:
            self._header, raw = self._header[:brace], self._header[brace:]
            self._arguments = [raw]
            name = call_name(self._header, self._declared)
            yield ToolCallDelta(index=self._calls, name=name, arguments=raw)

    def _call(self, raw: str, cut_by: str) -> ToolCall:
        arguments, problem = parse_arguments(raw)
        if cut_by and (arguments is None or not raw.strip()):
            arguments, problem = None, f"the call was cut off before its arguments were whole: {cut_by}"
        name = call_name(self._header, self._declared) or infer_name(self._header, arguments, self._declared)
        if not name:
            name = self._header.strip()
            problem = problem or f"the call names no tool: {name!r} is not of the form functions.NAME:INDEX"
        return ToolCall(id=self._call_id(name), name=name, arguments=arguments, raw=raw, problem=problem)

    def _call_id(self, name: str) -> str:
        """The model's own id when it has the form and is new, else one with the next free index."""
        index = id_index(self._header, name, self._next_index)
        self._next_index = index + 1
        return call_id(name, index)
