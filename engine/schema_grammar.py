"""JSON that fits a schema while it is written: llguidance over our own vocabulary.

A schema is compiled once and remembered. What llguidance can't express is said: it then enforces what it can, or any
JSON object, and the caller checks afterwards.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from thinkloop.engine.json_limits import JsonLimits
from thinkloop.engine.vocabulary import Allowed, GrammarError, Vocabulary
from thinkloop.traces.events import Json

if TYPE_CHECKING:
    from llguidance import LLMatcher

Style = Literal["arguments", "answer"]
"""`arguments` is one line with at most a space behind a comma or a colon, as K2 writes calls: a model can't loop on blank
space, and most punctuation is forced. `answer` has free, bounded white space."""

_STYLES: Mapping[Style, Mapping[str, object]] = {
    "arguments": {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"},
    "answer": {"whitespace_pattern": r"[ \n\r\t]{1,40}"},
}
_MOST_KEPT = 256
_MOST_MEMBERS = 64
"""Bits in the parameter of an llguidance rule."""

_ANNOTATIONS = {"title", "description", "default", "examples", "$schema", "$comment"}
_MEMBERS = {"type", "properties", "required", "additionalProperties", "$defs", "definitions"}
_known: dict[tuple[str, str, Style], SchemaGrammar] = {}
_lock = Lock()

_REFERENCE = re.compile(r'"\$(?:ref|dynamicRef)": "(?!#/(?:\$defs|definitions)/)|"\$(?:id|anchor|dynamicAnchor)": "')


@dataclass(frozen=True, slots=True)
class SchemaGrammar:
    """A compiled schema. `lapse` says what of it isn't enforced, "" when all of it is."""

    matcher: LLMatcher
    lapse: str
    opening: tuple[int, ...]
    """Tokens that every document begins with."""


class Document:
    """One JSON document while it is written, token by token."""

    def __init__(self, vocabulary: Vocabulary, grammar: SchemaGrammar) -> None:
        self._vocabulary, self._matcher = vocabulary, grammar.matcher.deep_copy()  # 6 µs; shares what was computed
        self._limits = JsonLimits(vocabulary)
        self._opening: tuple[int, ...] | None = grammar.opening
        self.failure = ""
        """Why the grammar gave up on the way (too complex), "" when it didn't. All text is allowed from then on."""

    @property
    def complete(self) -> bool:
        """Whether the text so far is a whole document."""
        return bool(self.failure) or self._matcher.is_accepting()

    def allowed(self) -> Allowed:
        """Ordinary tokens that may come next, a new array: 30 to 120 µs for 163,840 tokens."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if self._matcher.is_error():
            return self._anything()
        allowed = np.unpackbits(bits, count=self._vocabulary.size, bitorder="little").view(np.bool_)
        allowed[self._vocabulary.end] = False  # llguidance's way to say that the document is whole
        return self._limits.apply(allowed)

    def accept(self, token: int) -> None:
        """Raises `GrammarError` for a token that doesn't fit; the text is as before then."""
        if not self.failure and not self._matcher.try_consume_tokens([token]):
            if not self._matcher.is_error():
                raise GrammarError(f"Token {token} doesn't fit the grammar here: choose from what `mask()` allows.")
            self._anything()
        self._opening = None
        self._limits.accept(self._vocabulary.tokenizer.token_bytes(token))

    def forced(self) -> list[int]:
        """Tokens of the text that must come next, up to where there is a choice."""
        if self.failure:
            return []
        return list(self._matcher.compute_ff_tokens() if self._opening is None else self._opening)

    def ends_after(self, tokens: list[int]) -> bool:
        """Whether the document is whole after these, and nothing can follow it."""
        if self.failure:
            return False
        taken = self._matcher.try_consume_tokens(tokens)
        ends = taken == len(tokens) and self._matcher.is_stopped()
        self._matcher.rollback(taken)
        return ends

    def forced_text(self, token: int) -> bytes:
        """The text that would have to follow `token`, an allowed one."""
        self._matcher.consume_token(token)
        text = bytes(self._matcher.compute_ff_bytes())
        self._matcher.rollback(1)
        return text

    def _anything(self) -> Allowed:
        self.failure = self.failure or _first_line(self._matcher.get_error())
        allowed = np.zeros(self._vocabulary.size, np.bool_)
        allowed[: self._vocabulary.tokenizer.n_ranks] = True
        return allowed


def compiled(vocabulary: Vocabulary, schema: Any, style: Style, owner: str) -> SchemaGrammar:
    """`schema` compiled, an object in any case: 1 ms the first time. `owner` is whose schema it is, for errors.

    Raises `GrammarError` when `schema` is no JSON Schema, no object can fit it, or llguidance isn't installed.
    """
    key = (vocabulary.tokenizer.hash, _dumped(schema, owner), style)
    with _lock:
        known = _known.get(key)
        if known is None:
            known = _known[key] = _compiled(vocabulary, _of_object(schema, owner), style)
            if len(_known) > _MOST_KEPT:
                del _known[next(iter(_known))]
    return known


def _compiled(vocabulary: Vocabulary, schema: Json, style: Style) -> SchemaGrammar:
    """All of the schema, else what llguidance knows of it, else any object."""
    matcher, problems = _try(vocabulary, schema, style, lenient=False)
    if matcher is None:
        matcher, problems = _try(vocabulary, schema, style, lenient=True)
    lapse = f"not enforced while it is written: {'; '.join(problems)}" if problems else ""
    if matcher is None:
        matcher, _ = _try(vocabulary, {"type": "object"}, style, lenient=False)
        lapse = f"any JSON object is let through while it is written: {'; '.join(problems)}"
    assert matcher is not None, "any object must compile"
    return SchemaGrammar(matcher, lapse, tuple(matcher.compute_ff_tokens()))


def _try(vocabulary: Vocabulary, schema: Json, style: Style, *, lenient: bool) -> tuple[LLMatcher | None, list[str]]:
    """The matcher, if there is one, and what llguidance complained of. `lenient` passes over keywords that it doesn't
    know: looser than the schema, never tighter."""
    tokens = vocabulary.llguidance
    from llguidance import LLMatcher

    options = {**_STYLES[style], "json_allow_general_unicode_escapes": True, "lenient": lenient}
    any_order = style == "arguments" and _lists_its_members(schema)
    text = _any_order(schema, options) if any_order else json.dumps({**schema, "x-guidance": options})
    grammar = LLMatcher.grammar_from_lark(text) if any_order else LLMatcher.grammar_from_json_schema(text)
    matcher = LLMatcher(tokens, grammar, log_level=0)
    if matcher.is_error():
        return None, [_first_line(matcher.get_error())]
    return matcher, [_first_line(warning) for warning in matcher.get_grammar_warnings()]


def _dumped(schema: Any, owner: str) -> str:
    try:
        return json.dumps(schema)
    except (TypeError, ValueError, RecursionError) as error:
        raise GrammarError(f"The schema of {owner} is not JSON ({error}); mend it where it is declared.") from error


def _of_object(schema: Any, owner: str) -> Json:
    """The schema, held to objects, after a check that it is one. Raises `GrammarError`."""
    problem = _problem(schema)
    if problem:
        raise GrammarError(f"The schema of {owner} can't be used: {problem}; mend it where it is declared.")
    kept = {key: value for key, value in schema.items() if key not in ("$schema", "x-guidance")}
    return kept | {"type": "object"}


def _problem(schema: Any) -> str:
    """Why this is no JSON Schema for an object, "" when it is one. As `tools.validate` sees it: Draft 2020-12, whatever
    `$schema` says."""
    from jsonschema import Draft202012Validator, FormatChecker, SchemaError

    if not isinstance(schema, dict):
        return "it is not a JSON object"
    own = {key: value for key, value in schema.items() if key != "$schema"}
    try:
        Draft202012Validator.check_schema(own, format_checker=FormatChecker(formats=()))
    except SchemaError as error:
        return f"{'.'.join(map(str, error.path)) or 'it'} is not valid JSON Schema: {error.message[:200]}"
    except RecursionError:
        return "it is nested too deeply"
    types = schema.get("type", "object")
    return "" if "object" in ([types] if isinstance(types, str) else types) else f"no object is of type {types!r}"


def _lists_its_members(schema: Json) -> bool:
    """Whether the root is a plain list of members. It is closed then, unless it says that it's open."""
    members, required = schema.get("properties") or {}, schema.get("required") or []
    return (
        0 < len(members) <= _MOST_MEMBERS
        and schema.keys() <= _MEMBERS | _ANNOTATIONS
        and schema.get("additionalProperties", False) is False
        and members.keys() >= set(required)
        and all(isinstance(member, dict) for member in members.values())
        and not _REFERENCE.search(json.dumps(schema))
    )


def _any_order(schema: Json, options: Mapping[str, object]) -> str:
    """A grammar for an object whose members come in any order, each at most once. llguidance's own for JSON Schema holds
    them to the order of the schema, where a model that left one out can't come back to it. A rule's parameter is the
    set of members written so far, the required ones in its low bits."""
    required = set(schema.get("required") or ())
    members = sorted(schema["properties"].items(), key=lambda member: member[0] not in required)
    shared = {key: schema[key] for key in ("$defs", "definitions") if key in schema} | {"x-guidance": dict(options)}
    done = f" %if is_ones([0:{len(required)}])" if required else ""
    lines = ["%llguidance {}", 'start: "{" first::0x0 "}"', f'first::_: ""{done}']
    lines += [f"  | m{k} rest::set_bit({k})" for k in range(len(members))]
    lines += [f'rest::_: ""{done}']
    lines += [
        f"  | /{options['item_separator']}/ m{k} rest::set_bit({k}) %if bit_clear({k})" for k in range(len(members))
    ]
    for k, (name, member) in enumerate(members):
        key = json.dumps(json.dumps(name, ensure_ascii=False), ensure_ascii=False)
        lines.append(f"m{k}: {key} /{options['key_separator']}/ %json {json.dumps(member | shared)}")
    return "\n".join(lines)


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0][:200]
