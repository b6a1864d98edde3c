"""Model markup that a server let through as plain text: `<think>` in content, K2's call markers in content or thinking.

A server with the wrong parser (or none) sends the model's own format as text. It is read here as what the model meant;
what only looks like markup (an answer that quotes a marker, a section without a call) comes back as the text it was.
No character is lost but the markers of what was understood.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Literal

from thinkloop.engine.call_form import call_name, declared_tools, infer_name, parse_arguments
from thinkloop.traces.events import Content, Json, Thinking, ToolCall

Kind = Literal["thinking", "content"]

_BEGIN = ("<|tool_calls_section_begin|>", "<|tool_call_section_begin|>")
_END = ("<|tool_calls_section_end|>", "<|tool_call_section_end|>")
_CALL, _ARGUMENTS, _CALL_END = "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"
_THINK, _THINK_END, _STOP = "<think>", "</think>", "<|im_end|>"

_MARKERS: dict[str, tuple[str, ...]] = {
    "text": (*_BEGIN, _CALL, _THINK, _THINK_END),
    "section": (*_END, _CALL),
    "header": (_ARGUMENTS, _CALL, _CALL_END, *_END),
    "arguments": (_CALL, _CALL_END, *_END, _STOP),
}
_PATTERNS = {state: re.compile("|".join(map(re.escape, markers))) for state, markers in _MARKERS.items()}
_MAX_HEADER = 256
_FULL = re.compile(r"functions\.[A-Za-z_][\w.-]*:[0-9]+", re.ASCII)
_ESCAPED = re.compile(r"\\.", re.DOTALL)

Piece = Thinking | Content | ToolCall


class MarkerSplitter:
    """Splits one turn's text into `Thinking`, `Content` and (without ids) `ToolCall` events, in any chunking."""

    def __init__(self, tools: Sequence[Json] = ()) -> None:
        self._declared = declared_tools(tools)
        self._kind: Kind = "content"
        self._state: Literal["text", "section", "header", "arguments"] = "text"
        self._leaked_thinking = False
        self._held = ""
        self._opened = ""
        self._header = ""
        self._arguments: list[str] = []
        self._begun = False

    def feed(self, kind: Kind, text: str) -> list[Piece]:
        """The events that this text completes."""
        pieces: list[Piece] = []
        if kind != self._kind:
            pieces += self._text(self._take_held()) if self._state == "text" else []
            self._kind = kind
        self._held += text
        return pieces + list(self._read())

    def finish(self) -> list[Piece]:
        """What was held back: half a marker as text, a call without its end as a call, half a header as text."""
        held = self._take_held()
        if self._state == "arguments":
            return self._end_call(held, "the message ended")
        return list(self._text(self._give_back() + held.removesuffix(_STOP)))

    def _read(self) -> Iterator[Piece]:
        while (match := _PATTERNS[self._state].search(self._held)) is not None:
            before, marker, self._held = self._held[: match.start()], match[0], self._held[match.end() :]
            yield from self._act(before, marker)
        keep = self._open_suffix()
        ready, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        yield from self._plain(ready)

    def _open_suffix(self) -> int:
        """Characters at the end that may become a marker; a last `<|im_end|>` waits to see whether it was the end."""
        at = self._held.rfind("<")
        if at < 0:
            return 0
        markers = (*_MARKERS[self._state], _STOP)
        return len(self._held) - at if any(marker.startswith(self._held[at:]) for marker in markers) else 0

    def _plain(self, text: str) -> Iterator[Piece]:
        """Text without a marker."""
        if self._state == "text":
            yield from self._text(text)
        elif self._state == "arguments":
            yield from self._more_arguments(text)
        elif self._state == "section":
            yield from self._between(text)
        else:
            self._header += text
            if len(self._header) > _MAX_HEADER:
                yield from self._text(self._give_back())

    def _more_arguments(self, text: str) -> Iterator[Piece]:
        """Arguments begin with a brace; without one, only a header in full form makes a call."""
        if not text.strip() and not self._arguments:
            self._opened += text
        elif not self._arguments and not text.lstrip().startswith("{") and not _FULL.fullmatch(self._header.strip()):
            yield from self._text(self._give_back() + text)
        else:
            self._arguments.append(text)

    def _between(self, text: str) -> Iterator[Piece]:
        """Between calls white space belongs to the format; anything else ends the section."""
        self._opened += text
        if text.strip():
            yield from self._text(self._give_back())

    def _act(self, before: str, marker: str) -> Iterator[Piece]:
        if self._state == "text":
            yield from self._text(before)
            yield from self._open(marker)
        elif self._state == "section":
            yield from self._between(before)
            if before.strip():  # that text has ended the section: the marker stands alone
                yield from self._open(marker)
            elif marker == _CALL:
                self._begin_call(marker)
            else:
                yield from self._end_section(marker)
        elif self._state == "header":
            yield from self._end_header(before, marker)
        else:
            yield from self._end_arguments(before, marker)

    def _open(self, marker: str) -> Iterator[Piece]:
        """A marker in text."""
        if marker in _BEGIN:
            self._state, self._opened = "section", marker
        elif marker == _CALL:
            self._begin_call(marker)
        elif marker == _THINK and not self._begun:
            self._leaked_thinking = self._kind == "content"
        elif marker == _THINK_END and self._leaked_thinking:
            self._leaked_thinking = False
        else:
            yield from self._text(marker)

    def _begin_call(self, marker: str) -> None:
        self._state, self._header, self._arguments = "header", "", []
        self._opened += marker

    def _end_section(self, marker: str) -> Iterator[Piece]:
        self._state, opened, self._opened = "text", self._opened + marker, ""
        if opened.startswith(_BEGIN):
            yield from self._text(opened)  # no call came: it was a quotation

    def _end_header(self, before: str, marker: str) -> Iterator[Piece]:
        self._header += before
        if marker == _ARGUMENTS and len(self._header) <= _MAX_HEADER and self._plausible(self._header):
            self._state, self._opened = "arguments", self._opened + self._header + marker
            return
        brace = self._header.find("{")
        if brace >= 0 and self._plausible(self._header[:brace]):  # the argument marker was left out
            self._header, raw = self._header[:brace], self._header[brace:]
            self._state, self._opened = "arguments", self._opened + self._header
            yield from self._end_arguments(raw, marker)
            return
        yield from self._text(self._give_back())
        yield from self._open(marker)

    def _plausible(self, header: str) -> bool:
        """Whether a header names a tool, or is the bare index that models write in place of a name."""
        compact = "".join(header.split())
        return bool(call_name(header, self._declared)) or compact.removeprefix("functions").strip(".:").isdigit()

    def _end_arguments(self, before: str, marker: str) -> Iterator[Piece]:
        pieces = list(self._more_arguments(before))
        if pieces:  # it was no call
            yield from pieces
            yield from self._open(marker)
            return
        if self._in_string():
            self._arguments.append(marker)
            return
        yield from self._end_call("", "")
        if marker == _CALL:
            self._begin_call(marker)
        elif marker in _END:
            self._state = "text"

    def _in_string(self) -> bool:
        return _ESCAPED.sub("", "".join(self._arguments)).count('"') % 2 == 1

    def _end_call(self, rest: str, cut_by: str) -> list[Piece]:
        raw = ("".join(self._arguments) + rest).strip()
        arguments, problem = parse_arguments(raw)
        if cut_by and (problem or not raw):
            arguments = None
            problem = f"the call was cut off before its arguments were whole: {cut_by}"
        name = call_name(self._header, self._declared) or infer_name(self._header, arguments, self._declared)
        self._state, self._opened, self._header, self._arguments = "section", "", "", []
        return [ToolCall(id="", name=name, arguments=arguments, raw=raw, problem=problem if name else _NO_NAME)]

    def _give_back(self) -> str:
        """All that was taken for the format, as text again."""
        text = self._opened + (self._header if self._state == "header" else "".join(self._arguments))
        self._state, self._opened, self._header, self._arguments = "text", "", "", []
        return text

    def _take_held(self) -> str:
        held, self._held = self._held, ""
        return held

    def _text(self, text: str) -> Iterator[Piece]:
        if not text:
            return
        self._begun = self._begun or bool(text.strip())
        if self._kind == "thinking" or self._leaked_thinking:
            yield Thinking(text=text)
        else:
            yield Content(text=text)


_NO_NAME = "the call names no tool: it must be of the form functions.NAME:INDEX"
