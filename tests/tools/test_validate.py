"""Checking arguments: what the model is told, and that no schema and no value can hang, crash or reach out."""

from __future__ import annotations

import re
import socket
import time
from typing import Any

import pytest
from thinkloop.tools.expression import PatternError
from thinkloop.tools.pattern import search
from thinkloop.tools.validate import _compiled, check_arguments, check_schema, is_quick, misfits

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "query": {"type": "string", "minLength": 2},
        "limit": {"type": "integer", "minimum": 1, "maximum": 50},
        "kind": {"enum": ["page", "list"]},
        "near": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        "parts": {
            "type": "array",
            "items": {"type": "object", "properties": {"id": {"type": "integer"}}, "required": ["id"]},
        },
        "code": {"type": "string", "pattern": "^[A-Z]{2}-\\d+$"},
    },
    "required": ["query"],
    "additionalProperties": False,
}


def told(arguments: Any, schema: Any = SCHEMA) -> str:
    text = check_arguments(schema, arguments)
    assert text is not None
    assert len(text) <= 1000
    assert "\n" not in text
    return text


def value_schema(**schema: Any) -> Any:
    return {"type": "object", "properties": {"v": schema}}


# What the model is told


@pytest.mark.parametrize("arguments", [{"query": "ab"}, {"query": "ab", "limit": 2.0, "near": None, "code": "AB-12"},
                                       {"query": "ab", "parts": [{"id": 1, "more": 2}], "kind": "list"}])  # fmt: skip
def test_arguments_that_fit_are_passed(arguments: Any) -> None:
    assert check_arguments(SCHEMA, arguments) is None


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({}, "`query` (a string) is missing"),
        ({"query": 7}, "`query` must be a string, not 7"),
        ({"query": "x"}, '`query` must be at least 2 characters long, not "x"'),
        ({"query": "ab", "limit": "10"}, '`limit` must be an integer, not "10"'),
        ({"query": "ab", "limit": True}, "`limit` must be an integer, not true"),
        ({"query": "ab", "limit": 51}, "`limit` must be at most 50, not 51"),
        ({"query": "ab", "kind": "pag"}, '`kind` must be one of "page", "list", not "pag"'),
        ({"query": "ab", "near": 3}, "`near` must be a string or null, not 3"),
        ({"query": "ab", "parts": [{"id": 1}, {"id": "x"}]}, '`parts[1].id` must be an integer, not "x"'),
        ({"query": "ab", "parts": [{}]}, "`id` (an integer) is missing in `parts[0]`"),
        ({"query": "ab", "querry": "x"}, "`querry` is not known: did you mean `query`?"),
        ({"query": "ab", "zz": 1}, "`zz` is not known: known are `query`, `limit`, `kind`, `near`, `parts`, `code`"),
        ({"query": "ab", "code": "ab"}, "`code` must be text that matches the regular expression"),
        ([], "the arguments as a whole must be an object, not []"),
        (None, "the arguments as a whole must be an object, not null"),
    ],
)
def test_each_mismatch_names_place_problem_and_expectation(arguments: Any, text: str) -> None:
    assert told(arguments).startswith(text)


def test_several_mismatches_are_told_at_once_but_not_all_of_many() -> None:
    text = told({"limit": 0, "kind": 1})
    assert text.startswith("`query` (a string) is missing")
    assert "`limit`" in text
    assert "`kind`" in text
    many = told({"query": "ab", "parts": [{"id": "x"}] * 5000})
    assert many.count(";") == 4
    assert many.endswith("and 46 more")


def test_long_values_and_names_are_cut() -> None:
    text = told({"query": "ab", "limit": "y" * 10**6, "n" * 10**5: 1})
    assert len(text) < 400


def test_the_nearest_alternative_is_explained() -> None:
    option = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    schema = value_schema(anyOf=[option, {"type": "string"}])
    assert told({"v": {"a": "x"}}, schema).endswith('in the nearest, `v.a` must be an integer, not "x"')


def test_unique_items_follow_json_not_python() -> None:
    schema = value_schema(type="array", uniqueItems=True)
    assert check_arguments(schema, {"v": [1, True, "1", [1], {"a": 1}]}) is None
    assert "without repeats" in told({"v": [{"a": 1, "b": 2}, {"b": 2, "a": 1.0}]}, schema)


def test_pattern_and_additional_properties_work_together() -> None:
    schema = {
        "type": "object",
        "patternProperties": {"^x_": {"type": "integer"}},
        "additionalProperties": {"type": "string"},
    }
    assert check_arguments(schema, {"x_a": 1, "b": "s"}) is None
    assert told({"x_a": "s"}, schema).startswith("`x_a` must be an integer")
    assert told({"b": 1}, schema).startswith("`b` must be a string")
    assert "not known" in told({"b": 1}, schema | {"additionalProperties": False})


def test_references_inside_the_schema_are_followed() -> None:
    schema = {"$defs": {"p": {"type": "integer"}}, "properties": {"a": {"$ref": "#/$defs/p"}, "c": {"$ref": "#"}}}
    assert check_arguments(schema, {"a": 1, "c": {"c": {"a": 2}}}) is None
    assert told({"c": {"c": {"a": "x"}}}, schema).startswith("`c.c.a` must be an integer")


# Schemas that are wrong


@pytest.mark.parametrize(
    ("schema", "why"),
    [
        ({"type": "strin"}, "type"),
        ({"properties": 3}, "properties"),
        ({"minimum": "1"}, "minimum"),
        ([], "not a JSON object"),
        ({"pattern": "("}, "the pattern '('"),
        ({"patternProperties": {"[": {}}}, "the pattern '['"),
        ({"pattern": "(a)\\1"}, "back-references"),
        ({"properties": {"a": {"$schema": "http://json-schema.org/draft-07/schema#"}}}, "at its root only"),
        ({"unevaluatedProperties": False, "patternProperties": {"a": {}}}, "not supported"),
        ({"default": {1, 2}}, "which is not JSON"),
    ],
)
def test_a_schema_that_can_t_be_used_is_named_as_the_culprit(schema: Any, why: str) -> None:
    assert why in str(check_schema(schema))
    assert "the tool's own schema" in told({}, schema)


def test_a_schema_from_an_older_draft_is_read() -> None:
    schema = {"$schema": "http://json-schema.org/draft-07/schema#", "definitions": {"a": {"type": "string"}},
              "properties": {"v": {"$ref": "#/definitions/a"}}}  # fmt: skip
    assert told({"v": 1}, schema).startswith("`v` must be a string")


def test_a_schema_is_compiled_once() -> None:
    schema = value_schema(type="integer")
    assert _compiled(schema) is _compiled(schema) is _compiled(value_schema(type="integer"))
    assert _compiled(schema) is not _compiled(value_schema(type="string"))


# Hostile schemas and values

LIMIT = 10.0
"""Seconds that nothing here may exceed, on a busy machine too: the guards stop at about one, unguarded it is hours."""


def timed(schema: Any, arguments: Any) -> str | None:
    started = time.monotonic()
    text = check_arguments(schema, arguments)
    assert time.monotonic() - started < LIMIT
    return text


def nest(depth: int, kind: type) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value] if kind is list else {"a": value}
    return value


@pytest.mark.parametrize("kind", [list, dict])
def test_deep_values_are_refused_without_recursion(kind: type) -> None:
    assert "64 levels" in str(timed({}, nest(20_000, kind)))


@pytest.mark.parametrize("key", ["properties", "anyOf"])
def test_deep_schemas_are_refused_without_recursion(key: str) -> None:
    schema: Any = {}
    for _ in range(20_000):
        schema = {key: {"a": schema} if key == "properties" else [schema]}
    assert "64 levels" in str(timed(schema, {}))


def test_a_value_that_contains_itself_is_refused() -> None:
    loop: dict[str, Any] = {}
    loop["a"] = loop
    assert "levels deep" in str(timed({}, loop))
    assert "levels deep" in str(timed(loop, {}))


def test_a_value_that_is_small_in_memory_but_huge_to_walk_is_refused() -> None:
    laughs: Any = "ha"
    for _ in range(30):
        laughs = [laughs] * 10
    assert "too large" in str(timed({}, {"v": laughs}))


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), 10**5000, {1: 2}, (1,), b"x", object(), {"a"}], ids=lambda v: type(v).__name__
)
def test_what_is_not_json_is_refused(value: Any) -> None:
    assert timed({}, {"v": value})


def test_numbers_at_the_edge_do_no_harm() -> None:
    for value in (1e308, -1e308, 10**300, 5e-324):
        timed(value_schema(multipleOf=1e-300), {"v": value})
        timed(value_schema(multipleOf=0.01), {"v": value})


HOSTILE = [
    "^(a+)+$", "^(a|a)*$", "^(a|aa)+$", "(a*)*b", "^(([a-z])+.)+[A-Z]([a-z])+$", "a*a*a*a*a*a*b", "(?=(a+)+$)b",
    "^(?:a?){30}a{30}$", "(.*)*x",
]  # fmt: skip


@pytest.mark.parametrize("pattern", HOSTILE)
@pytest.mark.parametrize("length", [40, 5000, 1_000_000])
def test_a_hostile_pattern_can_t_stall(pattern: str, length: int) -> None:
    assert timed(value_schema(pattern=pattern), {"v": "a" * length + "!"})


EXPLOSIVE = [
    "(" * 3000, "(a{1000}){1000}", "((){9999}){9999}", "((?=a{99}){99}){99}", "a{99999999}", "[" * 1000, "a" * 5000,
    "(?:" * 60 + ")" * 60, "\\p{Klingon}",
]  # fmt: skip


@pytest.mark.parametrize("pattern", EXPLOSIVE, ids=lambda pattern: pattern[:20])
def test_a_pattern_that_explodes_when_compiled_is_refused(pattern: str) -> None:
    assert "can't be used" in str(timed({"pattern": pattern}, {}))


def test_hostile_patterns_on_many_keys_can_t_stall() -> None:
    schema = {"patternProperties": {f"^(a+)+{n}$": {} for n in range(50)}, "additionalProperties": False}
    assert timed(schema, {"a" * 200 + str(n): 1 for n in range(500)})


def test_references_that_double_at_each_level_can_t_stall() -> None:
    definitions: dict[str, Any] = {"d60": {"type": "object"}}
    for n in range(60):
        definitions[f"d{n}"] = {"allOf": [{"$ref": f"#/$defs/d{n + 1}"}] * 2}
    assert "too long to check" in str(timed({"$defs": definitions, "$ref": "#/$defs/d0"}, {}))


ENDLESS: list[Any] = [
    {"$ref": "#"},
    {"allOf": [{"$ref": "#"}]},
    {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
    {"not": {"$ref": "#"}},
    {"anyOf": [{"$ref": "#"}, {"$ref": "#"}]},
    {"unevaluatedProperties": False, "allOf": [{"$ref": "#"}]},
]


@pytest.mark.parametrize("schema", ENDLESS)
def test_a_schema_that_refers_to_itself_without_end_is_stopped(schema: Any) -> None:
    assert timed(schema, {"a": 1})


def test_many_items_against_many_alternatives_can_t_stall() -> None:
    schema = value_schema(
        items={"anyOf": [{"properties": {f"p{n}": {"type": "string"} for n in range(200)}, "required": ["z"]}] * 50}
    )
    assert timed(schema, {"v": [{"a": 1}] * 20_000})


def test_unique_items_take_linear_time() -> None:
    assert timed(value_schema(uniqueItems=True), {"v": [{"a": n} for n in range(20_000)]}) is None


def test_a_large_enum_against_many_items_can_t_stall() -> None:
    timed(value_schema(items={"enum": [f"e{n}" for n in range(15_000)]}), {"v": ["e14999"] * 50_000})


@pytest.mark.parametrize("key", ["text", "texts", "objects"])
def test_four_million_characters_are_checked_or_refused_in_time(key: str) -> None:
    values: dict[str, Any] = {"text": "x" * 3_999_000, "texts": ["y" * 100] * 39_000, "objects": [{"id": 1}] * 60_000}
    schema = {
        "type": "object",
        "properties": {
            "text": {"type": "string", "maxLength": 4_000_000},
            "texts": {"items": {"type": "string", "pattern": "^y*$"}},
            "objects": {"items": {"type": "object", "properties": {"id": {"type": "integer"}}, "required": ["id"]}},
        },
    }
    timed(schema, {key: values[key]})


def test_the_places_that_do_not_fit_are_named() -> None:
    assert misfits(SCHEMA, {"query": "ab"}) == []
    assert misfits(SCHEMA, {"query": 1, "parts": [{"id": "x"}, {}]}) == [("query",), ("parts", 0, "id"), ("parts", 1)]
    assert misfits({"type": "strin"}, {}) is None
    assert misfits({"$ref": "#"}, {}) is None
    assert misfits({}, {"a": nest(100, list)}) is None


def test_what_may_take_long_is_known_beforehand() -> None:
    assert is_quick({"properties": {"code": {"type": "string"}}}, 50_000)
    assert not is_quick({"properties": {"code": {"type": "string", "pattern": "^a"}}}, 2)
    assert not is_quick({"$defs": {"a": {}}, "$ref": "#/$defs/a"}, 2)
    assert not is_quick({"items": {"anyOf": [{"required": [str(n)]} for n in range(500)]}}, 5000)
    assert is_quick({"type": "strin"}, 10**9)


@pytest.mark.parametrize(
    "reference",
    [
        "http://127.0.0.1:{port}/s.json",
        "http://127.0.0.1:{port}/s.json#/a",
        "file:///etc/passwd",
        "other.json",
        "//127.0.0.1:{port}/x",
    ],
)
@pytest.mark.parametrize("keyword", ["$ref", "$dynamicRef"])
def test_nothing_is_ever_fetched(reference: str, keyword: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.05)
        reference = reference.format(port=listener.getsockname()[1])
        assert "nothing is fetched" in str(timed({"properties": {"a": {keyword: reference}}}, {"a": 1}))
        based = {"$id": reference, "properties": {"a": {keyword: "#/nowhere"}, "b": {keyword: reference + "#x"}}}
        assert timed(based, {"a": 1, "b": 2})
        with pytest.raises(TimeoutError):
            listener.accept()


def test_a_reference_to_nowhere_is_the_schema_s_fault() -> None:
    assert "can't be checked" in str(timed({"$ref": "#/$defs/none"}, {}))


def test_data_inside_the_schema_can_t_bring_in_another_dialect() -> None:
    evil = {"$schema": "http://json-schema.org/draft-07/schema#", "pattern": "^(a+)+$"}
    assert "at its root only" in str(timed({"$ref": "#/const", "const": evil}, "a" * 40 + "!"))
    hidden = {"const": {"pattern": "^(a+)+$"}, "properties": {"v": {"$ref": "#/const"}}}
    timed(hidden, {"v": "a" * 40 + "!"})


# Patterns

ALPHABET = [
    "",
    "a",
    "b",
    "ab",
    "aab",
    "abc",
    "A1",
    "12",
    "x_y",
    "a\nb",
    "é",
    " ",
    "a-b",
    "]",
    "{2}",
    "foo.bar",
    "aaaa",
    "ba",
]
AGREED = [
    "", "a", "^a", "a$", "^a$", "a|b", "^(a|b)+$", "a*", "a+b", "a?b", "a{2}", "^a{1,2}$", "a{2,}", "[ab]", "[^a]",
    "[a-c]+$", "^[A-Z][0-9]$", "\\d", "^\\d+$", "\\D", "\\w", "^\\w+$", "\\W", "\\bb", "a\\b", "\\Bb", "^.*$",
    "^(?:a|ab)(?:c|b)?$", "a(?=b)", "a(?!b)", "^(?!\\d)", "(?=.*\\d)(?=.*[A-Z])", "\\.", "[.]", "[\\]a]", "[-a]",
    "[a-]", "{", "a{", "\\x61", "\\u0061", "(?P<n>a)b", "^$", "a*?b", "(a*)*", "(|a)b", "[\\w-]+$", "[^\\d\\s]",
    "\\t|\\n", "()",
]  # fmt: skip


@pytest.mark.parametrize("pattern", AGREED)
def test_patterns_mean_what_python_s_own_mean_where_the_dialects_agree(pattern: str) -> None:
    python = re.compile(re.sub(r"(?<!\\)\$", r"\\Z", pattern), re.ASCII)
    for text in ALPHABET:
        assert search(pattern, text) == bool(python.search(text)), (pattern, text)


def test_random_patterns_mean_what_python_s_own_mean() -> None:
    import random

    rng, atoms = (
        random.Random(0),
        ["a", "b", "[ab]", "[^a]", "(a|b)", "(?:ab|b)", "(a*b)", ".", "(?=a)", "(?!b)", "^", "$"],
    )
    for _ in range(2000):
        pattern = "".join(
            rng.choice(atoms) + rng.choice(["", "", "*", "+", "?", "{1,2}"]) for _ in range(rng.randrange(1, 5))
        )
        try:
            python = re.compile(pattern.replace("$", r"\Z"))
        except re.error:
            continue
        for text in ("", "a", "b", "ab", "ba", "aab", "abab", "bbaa"):
            assert search(pattern, text) == bool(python.search(text)), (pattern, text)


def test_unicode_categories_are_known() -> None:
    assert search("^\\p{L}+$", "Ωé")
    assert search("^\\p{Lu}", "É")
    assert not search("^\\p{Letter}+$", "a1")
    assert search("[\\p{Nd}]", "٣")
    assert not search("\\P{L}", "abc")


@pytest.mark.parametrize(
    "pattern", ["*", "a**", "(", ")", "[", "a{3,2}", "[b-a]", "\\", "(?<=a)b", "(?i)a", "(a)\\1", "\\k<n>", "a++"]
)
def test_what_can_t_be_matched_is_an_error(pattern: str) -> None:
    with pytest.raises(PatternError):
        search(pattern, "a")
