"""A turn in K2's form, held to it token by token: thinking, then an answer or calls, then the end of the message.

One state machine has all of it, so that a call can't be opened inside thinking nor left open, and every header and
argument fits as it is written. The format is that of Kimi-K2's tool call guidance:

    <think>…</think>content<|tool_calls_section_begin|>
        <|tool_call_begin|>functions.{tool}:{index}<|tool_call_argument_begin|>{JSON}<|tool_call_end|>…
    <|tool_calls_section_end|><|im_end|>

Special tokens lead from state to state; text in between is free, or held by a writer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from thinkloop.engine.call_form import declared_tools
from thinkloop.engine.call_text import Arguments, Header, Writer, spellings
from thinkloop.engine.schema_grammar import Document, SchemaGrammar, compiled
from thinkloop.engine.tokenizer import Tokenizer
from thinkloop.engine.vocabulary import GrammarError, vocabulary
from thinkloop.traces.events import Json
from torch import Tensor

State = Literal[
    "start", "thinking", "content", "reply", "answer", "opened", "header", "arguments", "between", "closing", "ended"
]
"""`start` is thinking before its first token; `content` is free text; `reply` is an answer in JSON of which nothing is
written yet, `answer` one that was begun; `opened` and `between` are in a section, before and after a call."""


class _Place(NamedTuple):
    """What a state lets through: free text or none, and which special tokens, with the state each leads to."""

    text: bool
    exits: Mapping[str, State]


_SECTION: Mapping[str, State] = {"<|tool_calls_section_begin|>": "opened"}
_CALL: Mapping[str, State] = {"<|tool_call_begin|>": "header"}
_END: Mapping[str, State] = {"<|im_end|>": "ended"}

_PLACES: Mapping[State, _Place] = {
    "start": _Place(True, {"<think>": "thinking", "</think>": "content"}),
    "thinking": _Place(True, {"</think>": "content"}),
    "content": _Place(True, {**_SECTION, **_END, "[EOS]": "ended", "[EOT]": "ended"}),
    "reply": _Place(False, _SECTION),
    "answer": _Place(False, _END),
    "opened": _Place(False, _CALL),
    "header": _Place(False, {"<|tool_call_argument_begin|>": "arguments"}),
    "arguments": _Place(False, {"<|tool_call_end|>": "between"}),
    "between": _Place(False, {**_CALL, "<|tool_calls_section_end|>": "closing"}),
    "closing": _Place(False, _END),
    "ended": _Place(False, {}),
}

_NAME = re.compile(r"[A-Za-z_][\w.-]{0,63}", re.ASCII)
_ANSWER = "response_format"


class CallGrammar:
    """A `Constraint` for one turn: only declared tools are called, with the next index of the conversation and arguments
    that fit the tool's schema; thinking is closed before anything else begins, and what was opened before the message
    ends. In a vocabulary without think tokens a turn begins with its content.

    Arguments are one line of JSON, their members in any order at the root and in the schema's order below it; members
    that the schema doesn't list are let through where it has `additionalProperties`. With a `response_format` what
    follows thinking is one JSON document, or calls without text before them.

    Making one takes 20 µs when the tools were seen before, 1 ms for each that wasn't.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        tools: Sequence[Json] = (),
        *,
        next_index: int = 0,
        tool_choice: Literal["auto", "none"] = "auto",
        response_format: Json | None = None,
        forbidden: Iterable[tuple[str, str]] = (),
        thinking: bool | None = None,
    ) -> None:
        """`tools` are declarations in OpenAI form, `next_index` is the first call index that is free. `tool_choice`
        "none" masks all call syntax. `response_format` is OpenAI's, of type `text`, `json_object` or `json_schema`.

        `forbidden` are calls that must not come again: tool and argument text. A text is known as it was written, and
        with or without spaces behind commas and colons; mixed spacing and another order of members make another call.
        Where the schema leaves nothing else to write, the repeat is let through.

        `thinking` says whether the turn starts inside thinking before any marker (None: where the vocabulary has think
        tokens), as in `Parser`.

        Raises `GrammarError` for a schema that is no schema, a tool whose name can't stand in a call, an unknown
        `response_format`, and when llguidance isn't installed.
        """
        self.unsupported: dict[str, str] = {}
        """Tools whose schema isn't enforced in full while a call is written, with the reason: check those arguments
        afterwards. "response_format" stands for the answer. Grows when a grammar gives up on the way."""
        self._vocabulary = vocabulary(tokenizer)
        self._specials = tokenizer.specials
        self._next_index = next_index
        self._tools = self._compiled(tools) if tool_choice == "auto" else {}
        self._answer = self._compiled_answer(response_format)
        self._forbidden: dict[str, set[bytes]] = {}
        for name, text in forbidden:
            self._forbidden.setdefault(name, set()).update(spellings(text))
        self._tool = ""
        thinks = tokenizer.think_start is not None and tokenizer.think_end is not None and thinking is not False
        self._enter("start" if thinks else "content")

    @property
    def state(self) -> State:
        """What is being written."""
        return self._state

    def mask(self) -> Tensor | None:
        """As in `Constraint`; None once the message has ended. Free text gets the very same tensor each time (1 µs), so that
        a copy on another device can be kept; a call or a JSON answer a new one: 10 to 130 µs for 163,840 tokens."""
        if self._state == "ended":
            return None
        if self._writer is None:
            return self._fixed
        allowed = self._writer.allowed()
        if self._may_leave():
            allowed[list(self._exits)] = True
        self._note_failure()
        return torch.from_numpy(allowed)

    def accept(self, token: int) -> None:
        """As in `Constraint`. Raises `GrammarError` for a token that doesn't fit; the state is as before then."""
        to = self._exits.get(token)
        if to is not None and self._may_leave():
            self._leave(to)
        elif token >= self._vocabulary.tokenizer.n_ranks or (self._writer is None and not _PLACES[self._state].text):
            name = self._vocabulary.tokenizer.special_name(token) or "ordinary text"
            raise GrammarError(
                f"Token {token} ({name}) can't come in state {self._state!r}: choose from what `mask()` allows."
            )
        elif self._writer is not None:
            self._writer.accept(token)
            self._note_failure()
            if self._state == "reply":
                self._stand("answer")
        elif self._state == "start":
            self._stand("thinking")

    def forced(self) -> list[int]:
        """As in `Constraint`: names and punctuation that the tools leave no choice about, with the markers around."""
        if self._state in ("opened", "closing"):
            return [*self._exits, *(self._forced_header(self._header()) if self._state == "opened" else ())]
        if self._writer is None or (self._state == "reply" and self._exits):
            return []
        if isinstance(self._writer, Header):
            return self._forced_header(self._writer)
        tokens = self._writer.forced()
        return tokens + (list(self._exits) if self._writer.ends_after(tokens) else [])

    def _forced_header(self, header: Header) -> list[int]:
        tokens = header.forced()
        if not header.ends_after(tokens):
            return tokens
        return [*tokens, self._specials["<|tool_call_argument_begin|>"], *self._tools[header.name].opening]

    def _may_leave(self) -> bool:
        return self._writer is None or self._state == "reply" or self._writer.complete

    def _leave(self, to: State) -> None:
        if isinstance(self._writer, Header):
            self._tool = self._writer.name
        if to == "between":
            self._next_index += 1
        self._enter(to)

    def _enter(self, state: State) -> None:
        """In `state`, with a new text; `reply` takes the place of `content` when the answer must be JSON."""
        self._stand("reply" if state == "content" and self._answer is not None else state)
        self._writer = self._new_writer()

    def _stand(self, state: State) -> None:
        """In `state`, with the text as it is."""
        self._state: State = state
        self._exits: dict[int, State] = {
            self._specials[name]: to
            for name, to in _PLACES[state].exits.items()
            if name in self._specials and (to != "opened" or self._tools)
        }
        self._fixed = torch.from_numpy(self._vocabulary.fixed(_PLACES[state].text, self._exits))

    def _new_writer(self) -> Writer | None:
        if self._state == "header":
            return self._header()
        if self._state == "arguments":
            forbidden = self._forbidden.get(self._tool, ())
            return Arguments(self._vocabulary, self._tools[self._tool], forbidden)
        return Document(self._vocabulary, self._answer) if self._state == "reply" and self._answer else None

    def _header(self) -> Header:
        return Header(self._vocabulary, self._tools.keys(), self._next_index)

    def _note_failure(self) -> None:
        if isinstance(self._writer, Document) and self._writer.failure:
            owner = self._tool if isinstance(self._writer, Arguments) else _ANSWER
            self.unsupported[owner] = f"given up while it was written: {self._writer.failure}"

    def _compiled(self, tools: Sequence[Json]) -> dict[str, SchemaGrammar]:
        return {name: self._tool_grammar(name, schema) for name, schema in declared_tools(tools).items()}

    def _tool_grammar(self, name: str, schema: Json) -> SchemaGrammar:
        if not _NAME.fullmatch(name):
            raise GrammarError(
                f"No call can name the tool {name!r}: use a letter or _, then letters, digits, _, - and ., at most 64."
            )
        return self._noted(name, compiled(self._vocabulary, schema, "arguments", f"the tool {name!r}"))

    def _compiled_answer(self, response_format: Json | None) -> SchemaGrammar | None:
        schema = _answer_schema(response_format)
        return None if schema is None else self._noted(_ANSWER, compiled(self._vocabulary, schema, "answer", _ANSWER))

    def _noted(self, owner: str, grammar: SchemaGrammar) -> SchemaGrammar:
        if grammar.lapse:
            self.unsupported[owner] = grammar.lapse
        return grammar


def _answer_schema(response_format: Json | None) -> Json | None:
    """The schema that an answer must fit, None when it may be any text. Raises `GrammarError`."""
    match response_format:
        case None | {"type": "text"}:
            return None
        case {"type": "json_object"}:
            return {"type": "object"}
        case {"type": "json_schema", "json_schema": {"schema": dict(schema)}}:
            return schema
    raise GrammarError(
        f"`response_format` is {str(response_format)[:200]}; give {{'type': 'text'}}, {{'type': 'json_object'}} or "
        "{'type': 'json_schema', 'json_schema': {'name': …, 'schema': {…}}}."
    )
