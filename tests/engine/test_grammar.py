"""A turn under the grammar: whatever is sampled, every call parses, fits its tool's schema and is closed."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from thinkloop.engine.grammar import CallGrammar
from thinkloop.engine.parser import Parser
from thinkloop.engine.tokenizer import DEFAULT_SPECIALS, Tokenizer
from thinkloop.engine.vocabulary import GrammarError, Vocabulary
from thinkloop.tools.python import Python
from thinkloop.tools.search import Search
from thinkloop.tools.tool import declaration
from thinkloop.tools.validate import check_arguments
from thinkloop.traces.events import Json, ToolCall
from vocabulary import small_tokenizer

MINI = Path(__file__).parents[2] / "engine" / "mini"
THINK, END_THINK, IM_END = "<think>", "</think>", "<|im_end|>"
SECTION, END_SECTION = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
CALL, ARGUMENTS, END_CALL = "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"
TO_ARGUMENTS = f"{END_THINK}{SECTION}{CALL}functions.f:0{ARGUMENTS}"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(MINI)


@pytest.fixture(scope="module")
def real_tools() -> list[Json]:
    return [declaration(tool) for tool in [*Search(MINI / "world").tools(), *Python().tools()]]


def tool(schema: Any, name: str = "f") -> Json:
    return {"type": "function", "function": {"name": name, "parameters": schema}}


def an_object(*required: str, closed: bool = True, **properties: Any) -> Json:
    rest = {"additionalProperties": False} if closed else {}
    return {"type": "object", "properties": properties, "required": list(required), **rest}


def names(tokenizer: Tokenizer, grammar: CallGrammar) -> set[str]:
    """Special tokens that may come next, and "text" when ordinary ones may."""
    mask = grammar.mask()
    assert mask is not None
    assert mask.shape == (tokenizer.n_vocab,)
    specials = {name for name, token in tokenizer.specials.items() if mask[token]}
    return specials | ({"text"} if mask[: tokenizer.n_ranks].any() else set())


def write(tokenizer: Tokenizer, grammar: CallGrammar, text: str) -> str:
    """Writes `text`, markers in it as special tokens, as far as the mask allows; gives what couldn't be written."""
    ids = tokenizer.encode_with_specials(text)
    for at, token in enumerate(ids):
        mask = grammar.mask()
        assert mask is not None
        if not mask[token]:
            return tokenizer.decode(ids[at:])
        grammar.accept(token)
    return ""


def can_call(tokenizer: Tokenizer, schema: Any, text: str) -> bool:
    """Whether a call of a tool with this schema may have this argument text."""
    return write(tokenizer, CallGrammar(tokenizer, [tool(schema)]), f"{TO_ARGUMENTS}{text}{END_CALL}") == ""


def sample(tokenizer: Tokenizer, grammar: CallGrammar, rng: random.Random, calls: int = 3) -> list[int]:
    """Tokens drawn from the mask until the message ends: evenly, but markers and what closes a JSON text come often
    enough for turns to end, and the section ends after `calls`."""
    ids: list[int] = []
    closing = {tokenizer.encode(text)[0] for text in ('"', '"}', "}", "]", '",', '":')}
    while (mask := grammar.mask()) is not None:
        allowed = mask.nonzero().flatten().tolist()
        assert allowed, f"nothing may follow {tokenizer.decode(ids)!r}"
        markers = [token for token in allowed if token >= tokenizer.n_ranks]
        closers = [token for token in allowed if token in closing]
        if grammar.state == "between" and ids.count(tokenizer.special(END_CALL)) >= calls:
            markers = [tokenizer.special(END_SECTION)]
        choices = markers if markers and rng.random() < 0.3 else allowed
        if grammar.state in ("arguments", "answer") and closers and rng.random() < 0.15 + len(ids) / 1000:
            choices = closers
        ids.append(rng.choice(choices))
        grammar.accept(ids[-1])
        assert len(ids) < 5000, "the turn doesn't end"
    return ids


def parsed(tokenizer: Tokenizer, tools: Sequence[Json], ids: Sequence[int], next_index: int = 0) -> list[ToolCall]:
    parser = Parser(tokenizer, tools, next_index)
    events = [event for token in ids for event in parser.feed(token)] + parser.finish("stop")
    return [event for event in events if isinstance(event, ToolCall)]


# Whole turns


@pytest.mark.parametrize("seed", range(40))
def test_whatever_is_sampled_is_a_turn_of_good_calls(tokenizer: Tokenizer, real_tools: list[Json], seed: int) -> None:
    grammar = CallGrammar(tokenizer, real_tools, next_index=seed)
    ids = sample(tokenizer, grammar, random.Random(seed))
    calls = parsed(tokenizer, real_tools, ids, seed)
    schemas = {t["function"]["name"]: t["function"]["parameters"] for t in real_tools}
    text = tokenizer.decode(ids)
    assert ids[-1] in {tokenizer.special(name) for name in (IM_END, "[EOS]", "[EOT]")}
    assert text.count(CALL) == text.count(END_CALL) == len(calls)
    assert text.count(SECTION) == text.count(END_SECTION)
    assert SECTION not in text.partition(END_THINK)[0]
    for index, call in enumerate(calls, seed):
        assert (call.problem, call.id) == ("", f"functions.{call.name}:{index}")
        assert check_arguments(schemas[call.name], call.arguments) is None
    assert grammar.unsupported == {}


def test_what_a_model_writes_of_itself_is_let_through(tokenizer: Tokenizer, real_tools: list[Json]) -> None:
    text = (
        f"{THINK}The page of Domazil.{END_THINK}Let me look.{SECTION}"
        f'{CALL}functions.search:7{ARGUMENTS}{{"query": "owner of 上海 \\u4e0a\\n", "limit": 5}}{END_CALL}'
        f'{CALL}functions.open:8{ARGUMENTS}{{"find":"owner","line":1,"id":"a/b.md"}}{END_CALL}{END_SECTION}{IM_END}'
    )
    assert write(tokenizer, CallGrammar(tokenizer, real_tools, next_index=7), text) == ""


# States

PLACES = [
    ("", {THINK, END_THINK, "text"}),
    (THINK, {END_THINK, "text"}),
    ("Hm", {END_THINK, "text"}),
    (f"{THINK}Hm{END_THINK}", {SECTION, IM_END, "[EOS]", "[EOT]", "text"}),
    (f"{END_THINK}Well", {SECTION, IM_END, "[EOS]", "[EOT]", "text"}),
    (f"{END_THINK}{SECTION}", {CALL}),
    (f"{END_THINK}{SECTION}{CALL}", {"text"}),
    (f"{END_THINK}{SECTION}{CALL}functions.f:", {"text"}),
    (f"{END_THINK}{SECTION}{CALL}functions.f:0", {ARGUMENTS}),
    (TO_ARGUMENTS, {"text"}),
    (f'{TO_ARGUMENTS}{{"a":1', {"text"}),
    (f'{TO_ARGUMENTS}{{"a":1}}', {END_CALL}),
    (f'{TO_ARGUMENTS}{{"a":1}}{END_CALL}', {CALL, END_SECTION}),
    (f'{TO_ARGUMENTS}{{"a":1}}{END_CALL}{END_SECTION}', {IM_END}),
]


@pytest.mark.parametrize(("written", "wanted"), PLACES)
def test_each_state_lets_through_what_may_follow(tokenizer: Tokenizer, written: str, wanted: set[str]) -> None:
    grammar = CallGrammar(tokenizer, [tool(an_object("a", a={"type": "integer"}))])
    assert write(tokenizer, grammar, written) == ""
    assert names(tokenizer, grammar) == wanted


def test_after_the_message_nothing_is_masked_or_taken(tokenizer: Tokenizer) -> None:
    grammar = CallGrammar(tokenizer)
    assert write(tokenizer, grammar, f"{END_THINK}Done.{IM_END}") == ""
    assert (grammar.mask(), grammar.forced()) == (None, [])
    with pytest.raises(GrammarError, match="ended"):
        grammar.accept(tokenizer.encode("x")[0])


def test_free_text_gets_the_same_tensor_each_time(tokenizer: Tokenizer) -> None:
    grammar = CallGrammar(tokenizer)
    grammar.accept(tokenizer.special(THINK))
    mask = grammar.mask()
    grammar.accept(tokenizer.encode("x")[0])
    assert grammar.mask() is mask


def test_without_tools_or_choice_there_is_no_call(tokenizer: Tokenizer, real_tools: list[Json]) -> None:
    for grammar in (CallGrammar(tokenizer), CallGrammar(tokenizer, real_tools, tool_choice="none")):
        assert write(tokenizer, grammar, END_THINK) == ""
        assert names(tokenizer, grammar) == {IM_END, "[EOS]", "[EOT]", "text"}


def test_a_turn_without_thinking_begins_with_content(tokenizer: Tokenizer, tmp_path: Path) -> None:
    wanted = {SECTION, IM_END, "[EOS]", "[EOT]", "text"}
    assert names(tokenizer, CallGrammar(tokenizer, [tool({})], thinking=False)) == wanted
    without = small_tokenizer(tmp_path, think=False)
    assert names(without, CallGrammar(without, [tool({})])) == wanted


def test_a_token_that_does_not_fit_is_refused_and_changes_nothing(tokenizer: Tokenizer) -> None:
    grammar = CallGrammar(tokenizer, [tool(an_object("a", a={"type": "integer"}))])
    steps = [
        ("", [SECTION, IM_END, CALL]),
        (f"{END_THINK}{SECTION}", [END_SECTION, IM_END, "x"]),
        (CALL, ["x", ARGUMENTS, CALL]),
        (f"functions.f:0{ARGUMENTS}", ["x", END_CALL, IM_END, SECTION]),
        ('{"a":1', ['"', END_CALL]),
        (f"}}{END_CALL}", ["x", SECTION, IM_END]),
        (END_SECTION, ["x", CALL, "[EOS]"]),
    ]
    for written, refused in steps:
        assert write(tokenizer, grammar, written) == ""
        for text in refused:
            with pytest.raises(GrammarError, match="mask"):
                grammar.accept(tokenizer.encode_with_specials(text)[0])


# Headers


@pytest.mark.parametrize(
    ("header", "fits"),
    [
        ("functions.search:17", True),
        ("functions.search_all:17", True),
        ("functions.search:1", False),
        ("functions.search:18", False),
        ("functions.search:177", False),
        ("functions.searc:17", False),
        ("functions.delete:17", False),
        ("search:17", False),
        (" functions.search:17", False),
    ],
)
def test_a_header_names_a_declared_tool_and_the_next_index(tokenizer: Tokenizer, header: str, fits: bool) -> None:
    grammar = CallGrammar(tokenizer, [tool({}, "search"), tool({}, "search_all")], next_index=17)
    assert (write(tokenizer, grammar, f"{END_THINK}{SECTION}{CALL}{header}{ARGUMENTS}") == "") is fits


def test_the_index_goes_on_from_call_to_call(tokenizer: Tokenizer) -> None:
    grammar = CallGrammar(tokenizer, [tool({})], next_index=9)
    calls = "".join(f"{CALL}functions.f:{index}{ARGUMENTS}{{}}{END_CALL}" for index in (9, 10, 11))
    assert write(tokenizer, grammar, f"{END_THINK}{SECTION}{calls}") == ""
    assert write(tokenizer, grammar, f"{CALL}functions.f:9") != ""


# Schemas

NODE = {"node": an_object("name", name={"type": "string"}, kids={"type": "array", "items": {"$ref": "#/$defs/node"}})}
SCHEMAS: dict[str, tuple[Json, list[str], list[str]]] = {
    "enum": (an_object("a", a={"enum": ["red", 3, None]}), ['{"a": "red"}', '{"a":null}'], ['{"a":"green"}', '{"a":4}']),
    "const": (an_object("a", a={"const": "x"}), ['{"a":"x"}'], ['{"a":"y"}']),
    "required": (an_object("a", a={"type": "boolean"}, b={"type": "boolean"}), ['{"a":true}'], ["{}", '{"b":true}']),
    "any order": (
        an_object("a", "b", a={"type": "integer"}, b={"type": "integer"}, c={"type": "integer"}),
        ['{"a":1,"b":2,"c":3}', '{"c":3,"b":2,"a":1}', '{"b":2, "a":1}'],
        ['{"c":3,"a":1}', '{"a":1,"b":2,"a":3}'],
    ),
    "unlisted": (an_object(closed=False, a={"type": "integer"}), ['{"a":1}', "{}"], ['{"z":1}']),
    "open": (
        {"properties": {"a": {"type": "integer"}}, "additionalProperties": {"type": "string"}},
        ['{"a":1,"z":"y"}', '{"z":"y"}'],
        ['{"z":1}'],
    ),
    "anything": ({}, ['{"a":{"b":[1,"x",null]}}', "{}"], ["[]", "1", '"x"']),
    "nested": (
        an_object("p", p=an_object("x", x={"type": "number"}, y={"type": "number"})),
        ['{"p":{"x":1.5e3,"y":-0.2}}', '{"p":{"x":0}}'],
        ['{"p":{}}', '{"p":{"x":"1"}}', '{"p":{"x":01}}'],
    ),
    "array": (
        an_object("n", n={"type": "array", "items": {"type": "integer"}, "minItems": 1, "maxItems": 3}),
        ['{"n":[1]}', '{"n":[1, 2,3]}'],
        ['{"n":[]}', '{"n":[1,2,3,4]}', '{"n":["1"]}'],
    ),
    "length": (
        an_object("s", s={"type": "string", "minLength": 2, "maxLength": 3}),
        ['{"s":"上海"}'],
        ['{"s":"a"}', '{"s":"abcd"}'],
    ),
    "pattern": (
        an_object("s", s={"type": "string", "pattern": "^[0-9]{5}$"}),
        ['{"s":"12345"}'],
        ['{"s":"1234"}', '{"s":"x2345"}'],
    ),
    "range": (
        an_object(x={"type": "number", "minimum": 0.5, "exclusiveMaximum": 10}, y={"type": "integer", "multipleOf": 5}),
        ['{"x":0.5,"y":15}', '{"x":9.99}', "{}"],
        ['{"x":0.4}', '{"x":10}', '{"y":7}', '{"y":1.5}'],
    ),
    "anyOf": (
        an_object("v", v={"anyOf": [{"type": "string"}, {"type": "null"}, an_object("k", k={"type": "boolean"})]}),
        ['{"v":"x"}', '{"v":null}', '{"v":{"k":true}}'],
        ['{"v":1}', '{"v":{}}'],
    ),
    "types": (an_object("v", v={"type": ["string", "null"]}), ['{"v":"x"}', '{"v":null}'], ['{"v":false}']),
    "references": (
        {**an_object("tree", tree={"$ref": "#/$defs/node"}), "$defs": NODE},
        ['{"tree":{"name":"a","kids":[{"name":"b"}]}}'],
        ['{"tree":{"name":"a","kids":[{}]}}', '{"tree":{}}'],
    ),
    "itself": (an_object("n", n={"type": "integer"}, sub={"$ref": "#"}), ['{"n":1,"sub":{"n":2}}'], ['{"n":1,"sub":{}}']),
    "allOf": (
        {"allOf": [an_object("a", closed=False, a={"type": "integer"}), {"required": ["b"]}]},
        ['{"a":1,"b":"x"}'],
        ['{"a":1}'],
    ),
    "strange names": (
        an_object('na"me', "é\n", "a\\b", **{'na"me': {"const": 1}, "é\n": {"const": 2}, "a\\b": {"const": 3}}),
        ['{"na\\"me":1,"é\\n":2,"a\\\\b":3}'],
        ['{"name":1}'],
    ),
    "escapes": (
        an_object("s", s={"type": "string"}),
        ['{"s":"\\u4e0a\\ud83d\\ude00 \\" \\\\ \\n 😀"}'],
        ['{"s":"\\ud83d"}', '{"s":"\\x"}', '{"s":"\n"}'],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", SCHEMAS)
def test_arguments_are_held_to_the_schema(tokenizer: Tokenizer, case: str) -> None:
    schema, fitting, others = SCHEMAS[case]
    for text in fitting:
        assert check_arguments(schema, json.loads(text)) is None
        assert can_call(tokenizer, schema, text), text
    assert [text for text in others if can_call(tokenizer, schema, text)] == []


@pytest.mark.parametrize("case", SCHEMAS)
def test_whatever_is_sampled_fits_the_schema(tokenizer: Tokenizer, case: str) -> None:
    schema, rng = SCHEMAS[case][0], random.Random(case)
    for _ in range(6):
        grammar = CallGrammar(tokenizer, [tool(schema)])
        assert write(tokenizer, grammar, TO_ARGUMENTS) == ""
        ids = tokenizer.encode_with_specials(TO_ARGUMENTS) + sample(tokenizer, grammar, rng, calls=1)
        for call in parsed(tokenizer, [tool(schema)], ids):
            assert (call.problem, check_arguments(schema, call.arguments)) == ("", None), call.raw


def test_blank_space_is_at_most_one_behind_a_comma_or_a_colon(tokenizer: Tokenizer) -> None:
    schema = an_object("a", a={"type": "array", "items": {"type": "integer"}})
    assert can_call(tokenizer, schema, '{"a": [1, 2]}')
    for text in ('{ "a":[]}', '{"a" :[]}', '{"a":  []}', '{"a":[ 1]}', '{"a":[1 ,2]}', '{"a":[1]} ', '\n{"a":[1]}'):
        assert not can_call(tokenizer, schema, text)


def test_numbers_and_nesting_end_before_the_reader_of_calls_gives_up(tokenizer: Tokenizer) -> None:
    assert can_call(tokenizer, {}, '{"a":1e99,"b":-12.5E-07,"e":"1e9999"}')
    assert can_call(tokenizer, {}, f'{{"a":{"9" * 200}}}')
    assert can_call(tokenizer, {}, f'{{"a":{"[" * 62}1{"]" * 62}}}')
    for text in ('{"a":1e400}', f'{{"a":0.{"3" * 300}}}', f'{{"a":{"[" * 63}1{"]" * 63}}}'):
        assert not can_call(tokenizer, {}, text)


# What can't be enforced

LAPSES = [
    ("not", an_object("a", a={"type": "string", "not": {"const": "x"}}), ['{"a":"x"}'], ['{"a":1}', "{}"]),
    ("uniqueItems", an_object(a={"type": "array", "items": {"enum": [1]}, "uniqueItems": True}), ['{"a":[1,1]}'], ['{"a":[2]}']),
    ("oneOf", an_object("a", a={"oneOf": [{"type": "string"}, {"minLength": 3}]}), ['{"a":"xyz"}'], ["{}"]),
    ("format", an_object("a", a={"type": "string", "format": "iri"}), ['{"a":"?"}'], ['{"a":1}']),
    ("any JSON object", an_object("a", a={"$ref": "http://example.com/x"}), ['{"a":1}', '{"b":2}', "{}"], ["[]"]),
    ("any JSON object", an_object("a", a=False), ['{"a":1}'], ["1"]),
]  # fmt: skip


@pytest.mark.parametrize(("reason", "schema", "fitting", "others"), LAPSES)
def test_what_is_not_enforced_is_said(
    tokenizer: Tokenizer, reason: str, schema: Json, fitting: list[str], others: list[str]
) -> None:
    grammar = CallGrammar(tokenizer, [tool(schema), tool({}, "other")])
    assert list(grammar.unsupported) == ["f"]
    assert reason in grammar.unsupported["f"]
    assert [text for text in fitting if not can_call(tokenizer, schema, text)] == []
    assert [text for text in others if can_call(tokenizer, schema, text)] == []


def test_a_grammar_that_gives_up_says_so_and_the_call_can_still_be_closed(tokenizer: Tokenizer) -> None:
    schema = an_object(**{f"member_{k}": {"type": "null"} for k in range(600)})  # over llguidance's 2,000 items a row
    grammar = CallGrammar(tokenizer, [tool(schema)])
    assert grammar.unsupported == {}
    assert write(tokenizer, grammar, f'{TO_ARGUMENTS}{{"member_9": null}}{END_CALL}{END_SECTION}{IM_END}') == ""
    assert "given up" in grammar.unsupported["f"]


@pytest.mark.parametrize(
    ("schema", "problem"),
    [
        ({"type": "strin"}, "strin"),
        ({"type": "object", "properties": {"a": {"minimum": "x"}}}, "properties.a.minimum"),
        ({"type": "array"}, "no object"),
        ([1], "not a JSON object"),
        ({"enum": {1, 2}}, "not JSON"),
    ],
)
def test_a_schema_that_is_none_is_an_error_that_names_the_tool(tokenizer: Tokenizer, schema: Any, problem: str) -> None:
    with pytest.raises(GrammarError, match="'lookup'") as caught:
        CallGrammar(tokenizer, [tool(schema, "lookup")])
    assert problem in str(caught.value)


def test_a_tool_that_no_call_can_name_is_an_error(tokenizer: Tokenizer) -> None:
    with pytest.raises(GrammarError, match="'my tool'"):
        CallGrammar(tokenizer, [tool({}, "my tool")])


def test_a_missing_llguidance_is_an_error_that_says_what_to_install(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(GrammarError, match=r"pip install 'thinkloop\[grammar\]'"):
        _ = Vocabulary(tokenizer).llguidance
    assert CallGrammar(tokenizer).mask() is not None  # nothing to hold to JSON, nothing needed


# Repeats

WORDS = an_object("q", q={"type": "string"}, n={"type": "integer"})


def test_a_forbidden_call_cannot_be_completed(tokenizer: Tokenizer) -> None:
    def rest(text: str, name: str = "f") -> str:
        grammar = CallGrammar(tokenizer, [tool(WORDS)], forbidden=[(name, '{"q": "abc", "n": 12}')])
        return write(tokenizer, grammar, f"{TO_ARGUMENTS}{text}{END_CALL}")

    for text in ('{"q": "abc", "n": 12}', '{"q":"abc","n":12}'):
        assert rest(text) == f"}}{END_CALL}"
        assert rest(text, "g") == ""
    for text in ('{"q": "abc", "n": 13}', '{"q": "abc"}', '{"q": "ab", "n": 12}', '{"q": "abc", "n": 125}'):
        assert rest(text) == ""


def test_a_value_that_leads_to_nothing_but_the_repeat_cannot_be_begun(tokenizer: Tokenizer) -> None:
    schema = an_object("where", where={"enum": ["north", "south"]})
    grammar = CallGrammar(tokenizer, [tool(schema)], forbidden=[("f", '{"where":"north"}')])
    assert write(tokenizer, grammar, f'{TO_ARGUMENTS}{{"where":"') == ""
    assert write(tokenizer, grammar, "north") == "north"
    assert write(tokenizer, grammar, f'south"}}{END_CALL}') == ""


def test_a_repeat_passes_where_the_schema_leaves_nothing_else(tokenizer: Tokenizer) -> None:
    grammar = CallGrammar(tokenizer, [tool(an_object())], forbidden=[("f", "{}"), ("f", "not JSON {")])
    assert write(tokenizer, grammar, f"{TO_ARGUMENTS}{{}}{END_CALL}") == ""


@pytest.mark.parametrize("seed", range(10))
def test_sampling_never_repeats_what_is_forbidden(tokenizer: Tokenizer, seed: int) -> None:
    schema, rng = an_object("a", "b", a={"enum": ["x", "y"]}, b={"type": "boolean"}), random.Random(seed)
    text = rng.choice(['{"a":"x","b":true}', '{"a": "y", "b": false}'])
    for _ in range(20):
        grammar = CallGrammar(tokenizer, [tool(schema)], forbidden=[("f", text)])
        assert write(tokenizer, grammar, f"{TO_ARGUMENTS}{text[:5]}") == ""
        rest = tokenizer.decode(sample(tokenizer, grammar, rng, calls=1)).partition(END_CALL)[0]
        assert text[:5] + rest != text


# Forced tokens


def drafts(tokenizer: Tokenizer, grammar: CallGrammar) -> Iterator[tuple[str, str]]:
    """Follows what is forced for as long as something is: the state, and the text."""
    while (forced := grammar.forced()) and grammar.state != "ended":
        yield grammar.state, tokenizer.decode(forced)
        for token in forced:
            mask = grammar.mask()
            assert mask is not None
            assert mask[token]
            grammar.accept(token)


def test_one_tool_with_one_argument_leaves_only_its_value_open(tokenizer: Tokenizer) -> None:
    grammar = CallGrammar(tokenizer, [tool(an_object("q", q={"type": "string"}))], next_index=3)
    assert write(tokenizer, grammar, f"{END_THINK}{SECTION}") == ""
    assert tokenizer.decode(grammar.forced()).startswith(f'{CALL}functions.f:3{ARGUMENTS}{{"')
    assert [state for state, _ in drafts(tokenizer, grammar)] == ["opened"]
    assert write(tokenizer, grammar, '": "x"') == ""


def test_the_rest_of_a_name_the_index_and_the_first_key_are_forced(
    tokenizer: Tokenizer, real_tools: list[Json]
) -> None:
    grammar = CallGrammar(tokenizer, real_tools, next_index=41)
    assert write(tokenizer, grammar, f"{END_THINK}{SECTION}") == ""
    assert tokenizer.decode(grammar.forced()).startswith(f"{CALL}functions")
    assert write(tokenizer, grammar, f"{CALL}functions.python") == ""
    assert tokenizer.decode(grammar.forced()).startswith(f':41{ARGUMENTS}{{"')


def test_the_end_of_a_call_is_forced_when_nothing_can_be_added(tokenizer: Tokenizer) -> None:
    grammar = CallGrammar(tokenizer, [tool(an_object("a", a={"enum": ["north", "south"]}))])
    assert write(tokenizer, grammar, f'{TO_ARGUMENTS}{{"a":"n') == ""
    assert "".join(text for _, text in drafts(tokenizer, grammar)) == f'orth"}}{END_CALL}'
    assert write(tokenizer, grammar, END_SECTION) == ""
    assert [*drafts(tokenizer, grammar)] == [("closing", IM_END)]


@pytest.mark.parametrize("seed", range(10))
def test_forced_text_is_what_comes(tokenizer: Tokenizer, real_tools: list[Json], seed: int) -> None:
    class Watched(CallGrammar):
        """Notes what was forced before each token."""

        def accept(self, token: int) -> None:
            foreseen.append(tokenizer.decode_bytes(self.forced()))
            super().accept(token)

    foreseen: list[bytes] = []
    ids = sample(tokenizer, Watched(tokenizer, real_tools), random.Random(seed))
    texts = [tokenizer.token_bytes(token) for token in ids]
    for at, text in enumerate(foreseen):
        assert b"".join(texts[at:]).startswith(text)
    assert any(foreseen) == (tokenizer.special(SECTION) in ids)


# Answers

CITY = {"type": "json_schema", "json_schema": {"name": "city", "schema": an_object("name", name={"type": "string"})}}


@pytest.mark.parametrize(
    ("response_format", "text", "fits"),
    [
        ({"type": "json_object"}, '{"a": [1, {"b": null}]}', True),
        ({"type": "json_object"}, '{\n  "a": [\n    1\n  ]\n}', True),
        ({"type": "json_object"}, "[1]", False),
        ({"type": "json_object"}, "The answer", False),
        ({"type": "json_object"}, "", False),
        ({"type": "json_object"}, '{"a": 1', False),
        ({"type": "json_object"}, f'{{"a":{" " * 41}1}}', False),
        (CITY, '{"name": "Resnir"}', True),
        (CITY, '{"nam": "Resnir"}', False),
        (CITY, '{"name": 4}', False),
        ({"type": "text"}, "The answer", True),
        (None, "The answer", True),
    ],
)
def test_an_answer_is_held_to_the_response_format(
    tokenizer: Tokenizer, response_format: Json | None, text: str, fits: bool
) -> None:
    grammar = CallGrammar(tokenizer, response_format=response_format)
    assert (write(tokenizer, grammar, f"{THINK}Hm{END_THINK}{text}{IM_END}") == "") is fits


def test_after_a_whole_answer_only_the_end_is_left(tokenizer: Tokenizer) -> None:
    grammar = CallGrammar(tokenizer, [tool({})], response_format=CITY)
    assert write(tokenizer, grammar, f'{END_THINK}{{"name": "Resnir"}}') == ""
    assert names(tokenizer, grammar) == {IM_END}


def test_calls_may_come_instead_of_a_json_answer(tokenizer: Tokenizer) -> None:
    grammar = CallGrammar(tokenizer, [tool({})], response_format=CITY)
    assert write(tokenizer, grammar, f"{TO_ARGUMENTS}{{}}{END_CALL}{END_SECTION}{IM_END}") == ""
    none = CallGrammar(tokenizer, [tool({})], response_format=CITY, tool_choice="none")
    assert write(tokenizer, none, f"{END_THINK}") == ""
    assert names(tokenizer, none) == {"text"}


@pytest.mark.parametrize("seed", range(10))
def test_a_sampled_answer_fits(tokenizer: Tokenizer, seed: int) -> None:
    schema = SCHEMAS["references"][0]
    wanted = {"type": "json_schema", "json_schema": {"name": "tree", "schema": schema}}
    grammar = CallGrammar(tokenizer, response_format=wanted, thinking=False)
    *answer, end = sample(tokenizer, grammar, random.Random(seed))
    assert end == tokenizer.special(IM_END)
    assert check_arguments(schema, json.loads(tokenizer.decode(answer))) is None


def test_an_answer_that_is_not_enforced_in_full_is_said(tokenizer: Tokenizer) -> None:
    schema = an_object("a", a={"not": {"const": 1}})
    grammar = CallGrammar(tokenizer, response_format={"type": "json_schema", "json_schema": {"schema": schema}})
    assert "not" in grammar.unsupported["response_format"]


@pytest.mark.parametrize(
    "wrong", [{"type": "xml"}, {"type": "json_schema"}, {"type": "json_schema", "json_schema": {}}, {}]
)
def test_an_unknown_response_format_is_an_error(tokenizer: Tokenizer, wrong: Json) -> None:
    with pytest.raises(GrammarError, match="response_format"):
        CallGrammar(tokenizer, response_format=wrong)


# K2's vocabulary size


@pytest.mark.slow
def test_it_works_with_163_840_tokens(real_tools: list[Json]) -> None:
    rng = random.Random(0)
    ranks = {bytes([byte]): byte for byte in range(256)}
    while len(ranks) < 163_584:
        ranks.setdefault(bytes(rng.choices(range(32, 127), k=rng.randint(2, 12))), len(ranks))
    specials = {DEFAULT_SPECIALS.get(k, f"<|reserved_{k}|>"): 163_584 + k for k in range(256)}
    tokenizer = Tokenizer(ranks, specials)
    grammar = CallGrammar(tokenizer, real_tools, next_index=5)
    call = f'{CALL}functions.open:5{ARGUMENTS}{{"line": 12, "id": "towns/resnir.md"}}{END_CALL}'
    assert write(tokenizer, grammar, f"{THINK}Hm{END_THINK}{SECTION}{call}{END_SECTION}{IM_END}") == ""
