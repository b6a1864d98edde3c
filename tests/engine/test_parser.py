"""Promises of the parser: all forms are taken, nothing is lost, no marker leaks, chunking doesn't matter."""

import json
from collections.abc import Iterable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from thinkloop.engine.parser import Parser
from thinkloop.engine.tokenizer import Tokenizer
from thinkloop.traces.events import Content, Event, FinishReason, Thinking, ToolCall, ToolCallDelta
from vocabulary import small_tokenizer

SECTION, END_SECTION = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
CALL, ARGS, END_CALL = "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"
MARKERS = (SECTION, END_SECTION, CALL, ARGS, END_CALL, "<think>", "</think>", "<|im_end|>", "[EOS]", "[EOT]")
STRAY = ("<|im_user|>", "<|im_system|>", "<|im_middle|>", "[BOS]", "[PAD]", "<|reserved_token_300|>")
SPELT = ("<|tool_call_section_begin|>", "<|tool_call_section_end|>")


def tool(name: str, *required: str, optional: Sequence[str] = ()) -> dict[str, object]:
    properties = {key: {"type": "string"} for key in (*required, *optional)}
    schema = {"type": "object", "properties": properties, "required": list(required)}
    return {"type": "function", "function": {"name": name, "parameters": schema}}


TOOLS = [tool("search", "query", optional=["limit"]), tool("file_read", "path"), tool("run-code", "code"), tool("list")]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return small_tokenizer(tmp_path_factory.mktemp("vocabulary"))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A vocabulary in which think tags are text."""
    return small_tokenizer(tmp_path_factory.mktemp("plain"), think=False)


def parse(
    tokenizer: Tokenizer, ids: Iterable[int] | str, reason: FinishReason = "stop", next_index: int = 0
) -> list[Event]:
    ids = tokenizer.encode_with_specials(ids) if isinstance(ids, str) else ids
    parser = Parser(tokenizer, TOOLS, next_index)
    events = [event for token_id in ids for event in parser.feed(token_id)]
    return [*events, *parser.finish(reason)]


def joined(events: Sequence[Event], kind: type[Thinking] | type[Content]) -> str:
    return "".join(event.text for event in events if isinstance(event, kind))


def calls(events: Sequence[Event]) -> list[ToolCall]:
    return [event for event in events if isinstance(event, ToolCall)]


def only(events: Sequence[Event]) -> ToolCall:
    (call,) = calls(events)
    return call


def merged(events: Sequence[Event]) -> list[Event]:
    """Neighbours joined, as a trace does."""
    out: list[Event] = []
    for event in events:
        last = out[-1] if out else None
        if isinstance(event, Thinking) and isinstance(last, Thinking):
            out[-1] = Thinking(text=last.text + event.text)
        elif isinstance(event, Content) and isinstance(last, Content):
            out[-1] = Content(text=last.text + event.text)
        elif isinstance(event, ToolCallDelta) and isinstance(last, ToolCallDelta) and event.index == last.index:
            out[-1] = ToolCallDelta(
                index=last.index, name=last.name or event.name, arguments=last.arguments + event.arguments
            )
        else:
            out.append(event)
    return out


GOOD = f'{SECTION}{CALL}functions.search:0{ARGS}{{"query": "x"}}{END_CALL}{END_SECTION}<|im_end|>'
SEARCH_X = ToolCall(id="functions.search:0", name="search", arguments={"query": "x"}, raw='{"query": "x"}')


def test_a_well_formed_turn(tokenizer: Tokenizer) -> None:
    assert merged(parse(tokenizer, "<think>hm 上</think>I look." + GOOD)) == [
        Thinking(text="hm 上"),
        Content(text="I look."),
        ToolCallDelta(index=0, name="search", arguments='{"query": "x"}'),
        SEARCH_X,
    ]


def test_several_calls_count_on(tokenizer: Tokenizer) -> None:
    text = (
        f'{SECTION}{CALL}functions.search:4{ARGS}{{"query": "a"}}{END_CALL}{CALL}functions.list:5{ARGS}{{}}{END_CALL}'
        f"{END_SECTION}<|im_end|>"
    )
    events = parse(tokenizer, "<think></think>" + text, next_index=4)
    assert [call.id for call in calls(events)] == ["functions.search:4", "functions.list:5"]
    assert {event.index for event in events if isinstance(event, ToolCallDelta)} == {0, 1}


def test_arguments_stream_while_they_are_written(tokenizer: Tokenizer) -> None:
    parser = Parser(tokenizer, TOOLS)
    ids = tokenizer.encode_with_specials(f'{SECTION}{CALL}functions.search:0{ARGS}{{"query"')
    events = [event for token_id in ids for event in parser.feed(token_id)]
    assert "".join(e.arguments for e in events if isinstance(e, ToolCallDelta)) == '{"query"'
    assert not calls(events)


SO = "<think>so</think>"
ONE = f'{CALL}functions.search:0{ARGS}{{"query": "x"}}{END_CALL}'
ENDS = END_CALL + END_SECTION
FORMS = {
    "a section inside thinking ends it": f"<think>so{GOOD}",
    "a bare call inside thinking ends it": f"<think>so{ONE}<|im_end|>",
    "no opening think tag": f"so</think>{GOOD}",
    "repeated think tags": f"<think><think>so</think></think>{GOOD}",
    "no section": f"{SO}{ONE}<|im_end|>",
    "no end of section": f"{SO}{SECTION}{ONE}<|im_end|>",
    "no end of call": SO + GOOD.replace(END_CALL, ""),
    "no end at all": SO + GOOD.replace(ENDS + "<|im_end|>", ""),
    "no argument marker": SO + GOOD.replace(ARGS, ""),
    "section begun twice": SO + SECTION + GOOD,
    "call begun twice": SO + GOOD.replace(CALL, CALL + CALL),
    "argument marker twice": SO + GOOD.replace(ARGS, ARGS + ARGS),
    "call ended twice": SO + GOOD.replace(END_CALL, END_CALL + END_CALL),
    "singular section markers": f"{SO}{SPELT[0]}{ONE}{SPELT[1]}",
    "singular end of section in place of the end of the call": SO + GOOD.replace(ENDS, SPELT[1]),
    "a think tag inside the arguments": SO + GOOD.replace(ARGS, ARGS + "</think>"),
    "a stray role token": f"<think>so<|im_user|></think>{GOOD}",
    "a newline in the id": SO + GOOD.replace("functions.search:0", "\nfunctions.search\n:0 "),
    "another end of message": SO + GOOD.replace("<|im_end|>", "[EOS]"),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_malformed_turn_means_what_it_was_meant_to(tokenizer: Tokenizer, form: str) -> None:
    events = parse(tokenizer, FORMS[form])
    assert calls(events) == [SEARCH_X]
    assert joined(events, Thinking) == "so"
    assert joined(events, Content) == ""


@pytest.mark.parametrize(
    ("header", "name"),
    [
        ("search:2", "search"),
        ("search", "search"),
        ("functions_search_0", "search"),
        ("search_0", "search"),
        ("functions(file_read):2.0", "file_read"),
        ("functions.search30", "search"),
        ("functions.read_file:1", "file_read"),
        ("functions.run_code:1", "run-code"),
        ("functions.file-read:1", "file_read"),
        ("functions.missing:3", "missing"),
        ("missing:3", "missing"),
        ("functions.a.b:3", "a.b"),
    ],
)
def test_names_are_found_in_the_forms_models_write(tokenizer: Tokenizer, header: str, name: str) -> None:
    call = only(parse(tokenizer, f"{CALL}{header}{ARGS}{{}}{END_CALL}"))
    assert (call.name, call.problem) == (name, "")
    assert call.id.startswith(f"functions.{name}:")


def test_recovery_leads_to_declared_tools_only(tokenizer: Tokenizer) -> None:
    for header in ("functions(secret):2.0", "functions secret!", "上海:1"):
        call = only(parse(tokenizer, f"{CALL}{header}{ARGS}{{}}{END_CALL}"))
        assert "names no tool" in call.problem
        assert call.name == header


@pytest.mark.parametrize("header", ["", "3", "functions", "functions:3"])
def test_a_missing_name_is_inferred_when_one_tool_fits(tokenizer: Tokenizer, header: str) -> None:
    assert only(parse(tokenizer, f'{CALL}{header}{ARGS}{{"path": "a"}}{END_CALL}')).name == "file_read"
    unclear = only(parse(tokenizer, f'{CALL}{header}{ARGS}{{"nothing": "a"}}{END_CALL}'))
    assert "names no tool" in unclear.problem


def test_used_or_absurd_indices_are_replaced(tokenizer: Tokenizer) -> None:
    text = "".join(f"{CALL}functions.list:{index}{ARGS}{{}}{END_CALL}" for index in ("0", "3", "3", "9" * 8, "6"))
    ids = [call.id for call in calls(parse(tokenizer, text, next_index=2))]
    assert ids == [f"functions.list:{index}" for index in (2, 3, 4, 5, 6)]


def test_text_between_and_after_calls_is_content(tokenizer: Tokenizer) -> None:
    call = f"{CALL}functions.list:0{ARGS}{{}}{END_CALL}"
    events = parse(tokenizer, f"<think>t</think>a{SECTION}b{call}c{call}d{END_SECTION}e<|im_end|>")
    assert joined(events, Content) == "abcde"
    assert len(calls(events)) == 2


@pytest.mark.parametrize(("reason", "why"), [("length", "ran out of tokens"), ("cancelled", "was cancelled")])
@pytest.mark.parametrize(
    "cut", ["", "functions.se", f"functions.search:0{ARGS}", f'functions.search:0{ARGS}{{"query": "']
)
def test_a_call_cut_short_says_so(tokenizer: Tokenizer, reason: FinishReason, why: str, cut: str) -> None:
    call = only(parse(tokenizer, f"<think>t{CALL}{cut}", reason))
    assert call.arguments is None
    assert why in call.problem


def test_a_call_cut_by_the_next_one_says_so(tokenizer: Tokenizer) -> None:
    first, second = calls(parse(tokenizer, f'{CALL}functions.search:0{ARGS}{{"q{GOOD}'))
    assert "the next" in first.problem
    assert second.arguments == {"query": "x"}


@pytest.mark.parametrize(
    ("raw", "complaint"),
    [
        ("{", "not valid JSON"),
        ('{"a": NaN}', "NaN"),
        ('{"a": -Infinity}', "Infinity"),
        ('{"a": 1e999}', "out of range"),
        ("[1]", "object, not list"),
        ("null", "object, not NoneType"),
        ("{'a': 1}", "not valid JSON"),
        ('{"a": 1} {"b": 2}', "not valid JSON"),
        ('{"a": ' + "[" * 100_000, "nested"),
        ('{"a": ' + "[" * 70 + "]" * 70 + "}", "nested"),
        ('{"a": ' + "9" * 5000 + "}", "not valid JSON"),
        (r'{"a": "\ud800"}', "surrogate"),
    ],
)
def test_arguments_that_are_no_json_object_say_why(tokenizer: Tokenizer, raw: str, complaint: str) -> None:
    call = only(parse(tokenizer, f"{CALL}functions.search:0{ARGS}{raw}{END_CALL}"))
    assert call.arguments is None
    assert complaint in call.problem
    assert call.raw == raw


def test_empty_arguments_are_an_empty_object(tokenizer: Tokenizer) -> None:
    for text in (f"{CALL}functions.list:0{ARGS} \n{END_CALL}", f"{CALL}functions.list:0{END_CALL}"):
        assert only(parse(tokenizer, text)).arguments == {}
        assert only(parse(tokenizer, text)).problem == ""


def test_marker_text_inside_a_json_string_stays(tokenizer: Tokenizer) -> None:
    raw = json.dumps({"query": f'say \\" {SPELT[0]} and {SPELT[1]}'})
    assert only(parse(tokenizer, f"{CALL}functions.search:0{ARGS}{raw}{END_CALL}")).raw == raw


def test_think_tags_as_text(plain: Tokenizer) -> None:
    events = parse(plain, "<think>a < b</think>c <thin" + GOOD)
    assert joined(events, Thinking) == "a < b"
    assert joined(events, Content) == "c <thin"
    assert calls(events) == [SEARCH_X]


def test_without_think_tokens_untagged_text_is_content(plain: Tokenizer) -> None:
    assert merged(parse(plain, "yes<|im_end|>")) == [Content(text="yes")]


def test_with_think_tokens_untagged_text_is_thinking(tokenizer: Tokenizer) -> None:
    assert merged(parse(tokenizer, "hm<|im_end|>")) == [Thinking(text="hm")]
    parser = Parser(tokenizer, thinking=False)
    assert [event for i in tokenizer.encode("hm") for event in parser.feed(i)] == [Content(text="h"), Content(text="m")]


def test_ids_outside_the_vocabulary_are_passed_over(tokenizer: Tokenizer) -> None:
    assert parse(tokenizer, [-1, 10**9]) == []


# The fuzz. A turn is a list of runs of text and of special tokens. Each run's text carries a tag that is unique in the
# turn; whitespace in a call's header is the only text that may vanish, and tags have none.

TAGS = "ⒶⒷⒸⒹⒺⒻⒼⒽⒾⒿⓀⓁⓂⓃⓄⓅⓆⓇⓈⓉ"
_words = st.one_of(
    st.sampled_from(
        ["{", "}", '"', "\\", '{"query": "', '"}', "functions.", "search", ":0", "<", "<|", "</", "\n", "  "]
    ),
    st.text(alphabet="ab上é🙂{}\"':,<|>/ \n", max_size=6),
)
_runs = st.lists(
    st.one_of(st.sampled_from([*MARKERS, *MARKERS, *STRAY, *SPELT]), st.lists(_words, max_size=4).map("".join)),
    max_size=len(TAGS),
)
_reasons = st.sampled_from(["stop", "tool_calls", "length", "cancelled"])


def to_ids(tokenizer: Tokenizer, runs: Sequence[str], *, bytewise: bool) -> list[int]:
    ids: list[int] = []
    for run in runs:
        if run in tokenizer.specials:
            ids.append(tokenizer.special(run))
        else:
            ids += run.encode() if bytewise else tokenizer.encode(run)
    return ids


def tagged(runs: Sequence[str]) -> list[str]:
    keep = {*MARKERS, *STRAY, *SPELT}
    return [run if run in keep else run + tag for run, tag in zip(runs, TAGS, strict=False)]


@pytest.fixture(scope="module", params=[True, False], ids=["think tokens", "think text"])
def either(request: pytest.FixtureRequest, tokenizer: Tokenizer, plain: Tokenizer) -> Tokenizer:
    return tokenizer if request.param else plain


@given(runs=_runs, reason=_reasons)
def test_every_text_comes_out_in_exactly_one_place(either: Tokenizer, runs: list[str], reason: FinishReason) -> None:
    runs = tagged(runs)
    events = parse(either, to_ids(either, runs, bytewise=False), reason)
    out = joined(events, Thinking) + joined(events, Content) + "".join(c.raw + c.name for c in calls(events))
    for run in runs:
        if run[-1:] in TAGS and run:
            assert out.count(run[-1]) == 1


@given(runs=_runs, reason=_reasons)
def test_text_outside_headers_comes_out_unchanged_and_in_order(
    either: Tokenizer, runs: list[str], reason: FinishReason
) -> None:
    """Where no call has a header (each begins with an argument marker) all text is thinking, content or arguments."""
    runs = [part for run in tagged(runs) for part in ((CALL, ARGS) if run == CALL else (run,))]
    events = parse(either, to_ids(either, runs, bytewise=False), reason)
    out = [e.text if isinstance(e, Thinking | Content) else e.raw for e in events if not isinstance(e, ToolCallDelta)]
    markers = {*MARKERS, *STRAY, *SPELT}
    expected = "".join(run for run in runs if run not in markers)
    if not any(marker in expected or marker in "".join(out) for marker in markers):
        assert "".join(out) == expected


@given(runs=_runs, reason=_reasons)
def test_no_marker_comes_out_as_text(either: Tokenizer, runs: list[str], reason: FinishReason) -> None:
    events = parse(either, to_ids(either, tagged(runs), bytewise=False), reason)
    texts = [joined(events, Thinking), joined(events, Content), *(c.name for c in calls(events))]
    if either.think_start is not None:  # think tags that are text stay inside a JSON string
        texts += [call.raw for call in calls(events)]
    assert not any(marker in text for text in texts for marker in (*MARKERS, *STRAY))


@given(runs=_runs, reason=_reasons)
def test_how_text_is_cut_into_tokens_does_not_matter(either: Tokenizer, runs: list[str], reason: FinishReason) -> None:
    whole, bytewise = (parse(either, to_ids(either, runs, bytewise=b), reason) for b in (False, True))
    assert merged(whole) == merged(bytewise)


@given(ids=st.lists(st.integers(0, 600), max_size=60), reason=_reasons)
def test_any_tokens_at_all(either: Tokenizer, ids: list[int], reason: FinishReason) -> None:
    events = parse(either, ids, reason)
    for call, index in zip(calls(events), range(100), strict=False):
        deltas = [e for e in events if isinstance(e, ToolCallDelta) and e.index == index]
        assert "".join(delta.arguments for delta in deltas) == call.raw
        assert (call.arguments is None) <= bool(call.problem)
    assert len({call.id for call in calls(events)}) == len(calls(events))
