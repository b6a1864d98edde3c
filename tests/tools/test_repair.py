"""Malformed arguments are mended only where they can mean one thing."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from thinkloop.tools.repair import read_text, repaired
from thinkloop.tools.validate import check_arguments

ONE: list[tuple[str, Any]] = [
    ('```json\n{"a": 1}\n```', {"a": 1}),
    ('```\n{"a": "```"}```', {"a": "```"}),
    ('\ufeff{"a": 1}\u00a0', {"a": 1}),
    ('{"a": 1,}', {"a": 1}),
    ('{"a": [1, 2, ], "b": ",]",}', {"a": [1, 2], "b": ",]"}),
    ('{"a": 1}}', {"a": 1}),
    ('{"a": {"b": []}}]} ;', {"a": {"b": []}}),
    ('{"a": True, "b": [None, False], "c": "True, None"}', {"a": True, "b": [None, False], "c": "True, None"}),
    ('{"code": "if x:\n\tprint(1)"}', {"code": "if x:\n\tprint(1)"}),
    (json.dumps(json.dumps({"a": {"b": '"'}})), {"a": {"b": '"'}}),
    ('{"a": "x"', {"a": "x"}),
    ('{"a": "x", "b": {"c": null}', {"a": "x", "b": {"c": None}}),
    ('{"a": ["x", "y"', {"a": ["x", "y"]}),
    ('{"a": "}"', {"a": "}"}),
    ("{'a': 'say \"hi\"', 'b': 'it\\'s'}", {"a": 'say "hi"', "b": "it's"}),
    ('```json\n{"a": True,}}\n```', {"a": True}),
]

MANY = [
    '{"a": 1',  # 1, or the beginning of 12
    '{"a": "x',
    '{"a": "x",',
    '{"a":',
    '{"f": {"a": "x", "b": "y"',  # b may belong to f or stand beside it
    '{"f": {"a": "x", "b": "y"}',
    '{"l": [["a", "b"]',
    '{"l": [{"a": "x", "b": "y"',
    '{"a": 1}{"a": 2}',
    '{"a": 1} {"a": 1}',
    '{"a": 1} and so on',
    '{"a": 1}, "b": 2}',
    '{"a": "x" "b": 1}',
    '{"a": say "hi"}',
    '{"a": "say "hi""}',
    "{'a': 'it's'}",
    '{"a": 1,, "b": 2}',
    "{,}",
    '{"a": [1}',
    '{"a": 1, "a": 2,}',
    '{"a": NaN,}',
    '{"a": 1e999,}',
    '{"a": "\\ud800"}}',
    '{a: 1}',
    '{"a": undefined}',
    "[1]",
    "[1,]",
    '"text"',
    "",
    "```",
    "``````",
    '{"a": "one", // first\n "b": 1}',
    '[{"a": 1}]',
]  # fmt: skip


def is_object(raw: str) -> bool:
    try:
        return isinstance(json.loads(raw), dict)
    except ValueError:
        return False


@pytest.mark.parametrize(("raw", "value"), ONE)
def test_text_that_can_mean_one_thing_is_read_as_that(raw: str, value: Any) -> None:
    assert not is_object(raw)
    assert read_text(raw) == value


@pytest.mark.parametrize("raw", MANY)
def test_text_that_can_mean_several_things_is_left_alone(raw: str) -> None:
    assert read_text(raw) is None


def test_a_cut_off_object_is_never_completed_to_less_than_was_written() -> None:
    """Whatever prefix of a call is read, it is read as the whole of what stands there, or not at all."""
    whole = '{"query": "a, b", "tags": ["x", "y"], "near": {"lat": 1.5, "on": true}, "n": 12}'
    for cut in range(len(whole)):
        value = read_text(whole[:cut])
        if value is not None:
            assert whole[:cut].startswith(json.dumps(value).rstrip("}]"))


def field(**schema: Any) -> Any:
    return {"type": "object", "properties": {"v": schema}, "required": ["v"], "additionalProperties": False}


STRINGS, INTEGERS = {"type": "array", "items": {"type": "string"}}, {"type": "array", "items": {"type": "integer"}}
OBJECT = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}


@pytest.mark.parametrize(
    ("schema", "given", "value"),
    [
        (field(type="integer"), "3", 3),
        (field(type="integer"), "3.0", 3),
        (field(type="number"), " -1.5 ", -1.5),
        (field(type="boolean"), "true", True),
        (field(type="boolean"), "False", False),
        (field(anyOf=[{"type": "integer"}, {"type": "null"}]), "null", None),
        (field(anyOf=[{"type": "integer"}, {"type": "null"}]), "7", 7),
        (field(enum=[1, 2]), "2", 2),
        (field(**INTEGERS), "[1, 2]", [1, 2]),
        (field(**INTEGERS), 5, [5]),
        (field(**INTEGERS), "5", [5]),
        (field(**STRINGS), "one", ["one"]),
        (field(**STRINGS), '["a", "b"]', ["a", "b"]),
        (field(**OBJECT), '{"n": 1}', {"n": 1}),
        (field(type="array", items=OBJECT), {"n": 1}, [{"n": 1}]),
        (field(type="array", items={"type": "integer"}), ["1", 2, "3"], [1, 2, 3]),
        (field(**OBJECT), {"n": "1"}, {"n": 1}),
    ],
)
def test_a_value_of_the_wrong_type_is_read_as_the_only_thing_that_fits(schema: Any, given: Any, value: Any) -> None:
    arguments = {"v": given}
    assert check_arguments(schema, arguments) is not None
    assert repaired(schema, json.dumps(arguments), arguments) == {"v": value}
    assert arguments == {"v": given}


@pytest.mark.parametrize(
    ("schema", "given"),
    [
        (field(type="string"), 7),
        (field(type="string"), None),
        (field(type="integer"), "3 pages"),
        (field(type="integer"), "03"),
        (field(type="integer"), "1e3"),
        (field(type="integer"), 3.5),
        (field(type="integer", maximum=2), "3"),
        (field(type="boolean"), "yes"),
        (field(type="boolean"), 1),
        (field(**STRINGS), "a, b"),
        (field(**STRINGS), "[1, 2]"),
        (field(**STRINGS), "{'a': 1}"),
        (field(**INTEGERS), "1, 2"),
        (field(anyOf=[{"type": "integer"}, INTEGERS]), "3"),
        (field(anyOf=[{"type": "boolean"}, {"type": "array", "items": {"type": "boolean"}}]), 3),
        (field(**OBJECT), '{"n": 1, "n": 2}'),
        (field(type="integer"), ["3"]),
        (field(enum=["page", "list"]), "Page"),
    ],
)
def test_a_value_that_fits_nothing_or_several_things_is_left_alone(schema: Any, given: Any) -> None:
    arguments = {"v": given}
    assert repaired(schema, json.dumps(arguments), arguments) is None


def test_what_is_mended_fits_the_schema() -> None:
    assert repaired(field(type="integer"), '{"v": "3",}') == {"v": 3}
    assert repaired(field(type="integer"), '{"w": 3,}') is None
    assert repaired(field(type="integer"), '{"v": 3, "w": 1,}') is None
    assert repaired({"type": "strin"}, '{"v": 3,}') is None


HOSTILE = [
    "{" * 90_000, "[" * 90_000, '{"a":' * 15_000, "```" + " " * 90_000, "```" + "`" * 90_000, '{"a": "' + "\\" * 90_000,
    "{'a': '" + "\\'" * 40_000, '{"a": ' + "[1," * 30_000, '{"a": [' + '"x",' * 20_000 + '"x"', '"' * 90_001,
    '{"a": {"b": ' + '"x", "c": ' * 8000 + '"y"', "{" + '"k": "v",' * 9000, '{"a":' + "-" * 90_000 + "}", "{'" * 40_000,
    '{"a": ' + "9" * 90_000 + ",}", "{" + "}" * 90_000, '{"a": 1' + "," * 90_000 + "}", '{"v": "' + "1," * 45_000 + '"',
]  # fmt: skip


@pytest.mark.parametrize("raw", HOSTILE, ids=lambda raw: raw[:12])
def test_a_hostile_text_can_t_stall(raw: str) -> None:
    started = time.monotonic()
    repaired(field(**INTEGERS), raw)
    assert time.monotonic() - started < 5.0  # guarded 0.3 s at most on a quiet machine; unguarded hours


def test_a_schema_that_takes_long_is_not_tried_over_and_over() -> None:
    definitions: dict[str, Any] = {"d60": {"type": "integer"}}
    for n in range(60):
        definitions[f"d{n}"] = {"allOf": [{"$ref": f"#/$defs/d{n + 1}"}] * 2}
    schema = {"$defs": definitions, "properties": {name: {"$ref": "#/$defs/d40"} for name in "abcdefgh"}}
    started = time.monotonic()
    assert repaired(schema, "", dict.fromkeys("abcdefgh", "1")) is None
    assert time.monotonic() - started < 8.0


def test_longer_texts_are_left_alone() -> None:
    assert repaired(field(type="string"), '{"v": "' + "x" * 200_000 + '",}') is None
