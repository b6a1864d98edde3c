"""`@tool`: what the model is told comes from the code, and what the function gets is what it asked for."""

from __future__ import annotations

import dataclasses
import datetime
import enum
import functools
import json
import threading
import time
from collections.abc import Callable
from typing import Annotated, Any, Literal, NamedTuple, NewType, NotRequired, Optional, TypedDict

import anyio
import pytest
from pydantic import BaseModel, Field
from thinkloop.tools.function import FunctionTool, read_docstring, tool
from thinkloop.tools.signature import DefinitionError
from thinkloop.tools.tool import Output, Tool, ToolError, declaration
from thinkloop.tools.validate import check_arguments, check_schema


class Color(enum.Enum):
    RED = "red"
    BLUE = "blue"


@dataclasses.dataclass
class Point:
    x: int
    y: float = 0.5


class Page(TypedDict):
    title: str
    parts: NotRequired[list[Point]]


class Query(BaseModel):
    text: str = Field(description="What to look for.", max_length=10)
    near: Point | None = None


def schema_of(annotation: Any, default: Any = ...) -> Any:
    """The schema of a tool's one parameter."""

    def f(value: Any) -> None: ...

    f.__annotations__["value"] = annotation
    if default is not ...:
        f.__defaults__ = (default,)
    return tool(f).parameters["properties"]["value"]


def got(function: Any, **arguments: Any) -> Any:
    """What a tool's call gives, as an Output."""
    made = function if isinstance(function, FunctionTool) else tool(function)
    return anyio.run(made.call, arguments)


# What the model is told


def test_the_declaration_comes_from_name_docstring_hints_and_defaults() -> None:
    @tool
    def weather(city: str, days: int = 1) -> str:
        """The forecast for a city.

        Args:
            city: Name of the city,
                in English.
            days (int, optional): How many days ahead.
        """
        return f"{city} {days}"

    assert declaration(weather) == {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The forecast for a city.",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "Name of the city, in English."},
                    "days": {"type": "integer", "default": 1, "description": "How many days ahead."},
                },
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    }


def test_a_tool_satisfies_the_contract_and_is_still_a_function() -> None:
    @tool(effect="write", deadline=5, budget=100, name="save-it")
    def save(text: str) -> str:
        return text.upper()

    assert isinstance(save, Tool)
    assert (save.name, save.effect, save.deadline, save.budget) == ("save-it", "write", 5, 100)
    assert save("x") == "X"
    plain = tool(name="f")(lambda: "x")
    assert (plain.effect, plain.deadline, plain.budget) == ("read", 60.0, 2000)


@pytest.mark.parametrize(
    ("annotation", "schema"),
    [
        (str, {"type": "string"}),
        (int, {"type": "integer"}),
        (float, {"type": "number"}),
        (bool, {"type": "boolean"}),
        (list[int], {"type": "array", "items": {"type": "integer"}}),
        (dict[str, int], {"type": "object", "additionalProperties": {"type": "integer"}}),
        (Literal["a", "b"], {"type": "string", "enum": ["a", "b"]}),
        (Optional[int], {"anyOf": [{"type": "integer"}, {"type": "null"}]}),  # noqa: UP045  # the older form is the test
        (int | None, {"anyOf": [{"type": "integer"}, {"type": "null"}]}),
        (Annotated[int, "how many"], {"type": "integer", "description": "how many"}),
        (Annotated[int, Field(ge=1)], {"type": "integer", "minimum": 1}),
        (datetime.date, {"type": "string", "format": "date"}),
        (Literal["a", 1, None], {"enum": ["a", 1, None]}),
        (set[str], {"type": "array", "items": {"type": "string"}, "uniqueItems": True}),
        (tuple[int, ...], {"type": "array", "items": {"type": "integer"}}),
        (tuple[int, str], {"type": "array", "prefixItems": [{"type": "integer"}, {"type": "string"}],
                           "minItems": 2, "maxItems": 2}),
        (NewType("UserId", int), {"type": "integer"}),
        (Any, {}),
    ],
)  # fmt: skip
def test_types_become_schemas(annotation: Any, schema: Any) -> None:
    assert schema_of(annotation) == schema


def test_an_annotation_s_text_wins_over_the_docstring() -> None:
    @tool
    def f(x: Annotated[int, "from the hint"], y: int) -> None:
        """F.

        Args:
            x: from the docstring
            y: from the docstring
        """

    properties = f.parameters["properties"]
    assert [properties[name]["description"] for name in "xy"] == ["from the hint", "from the docstring"]


def test_nested_types_are_defined_and_titles_dropped_unless_they_are_properties() -> None:
    @tool
    def f(color: Color, page: Page, query: list[Query], at: Point | None = None) -> None: ...

    definitions = f.parameters["$defs"]
    assert definitions["Color"] == {"type": "string", "enum": ["red", "blue"]}
    assert definitions["Point"]["properties"] == {"x": {"type": "integer"}, "y": {"type": "number", "default": 0.5}}
    assert definitions["Page"]["required"] == ["title"]
    assert definitions["Page"]["properties"]["title"] == {"type": "string"}
    assert definitions["Query"]["properties"]["text"]["description"] == "What to look for."
    assert '"title": "' not in json.dumps(f.parameters)
    assert check_schema(f.parameters) is None


def test_types_made_inside_a_function_are_found() -> None:
    @dataclasses.dataclass
    class Local:
        n: int

    @tool
    def f(value: Local) -> str:
        return type(value).__name__

    assert got(f, value={"n": 1}).content == "Local"


def test_no_parameters_is_an_empty_object() -> None:
    @tool
    def now() -> str:
        return "now"

    assert now.parameters == {"type": "object", "properties": {}, "additionalProperties": False}


@pytest.mark.parametrize("name", ["copy", "json", "schema", "model_config", "_x", "self_", "class_"])
def test_any_parameter_name_will_do(name: str) -> None:
    space: dict[str, Any] = {}
    exec(f"def f({name}: int) -> int:\n    return {name}", space)
    made = tool(space["f"])
    assert list(made.parameters["properties"]) == [name]
    assert got(made, **{name: 3}).content == "3"


def test_a_default_without_json_is_the_function_s_own_business() -> None:
    marker = object()

    @tool
    def f(x: Any = marker, y: float = float("nan"), z: float = float("inf")) -> bool:
        return x is marker and y != y and z > 1e308

    assert f.parameters["properties"] == {"x": {}, "y": {"type": "number"}, "z": {"type": "number"}}
    assert "required" not in f.parameters
    assert check_schema(f.parameters) is None
    assert got(f).content == "true"


def test_defaults_that_are_no_json_are_written_as_json() -> None:
    @tool
    def f(
        day: datetime.date = datetime.date(2024, 1, 2), color: Color = Color.RED, many: tuple[int, ...] = (1,)
    ) -> str:
        return f"{day} {color} {many}"

    properties = f.parameters["properties"]
    assert [properties[name]["default"] for name in ("day", "color", "many")] == ["2024-01-02", "red", [1]]
    assert got(f).content == "2024-01-02 Color.RED (1,)"


def test_a_field_as_default_gives_bounds_description_and_default() -> None:
    @tool
    def f(
        n: int = Field(3, ge=1, description="how many"),
        words: list[str] = Field(default_factory=list),  # noqa: B008  # pydantic's way is the test
        x: str = Field(),
    ) -> str:
        return f"{n} {words} {x}"

    assert f.parameters["properties"]["n"] == {"type": "integer", "minimum": 1, "default": 3, "description": "how many"}
    assert f.parameters["required"] == ["x"]
    assert got(f, x="a").content == "3 [] a"
    assert got(f, x="a", n=5, words=["b"]).content == "5 ['b'] a"
    with pytest.raises(ToolError, match="`n`"):
        got(f, x="a", n=0)


class Tree(BaseModel):
    n: int
    kids: list[Tree] = []


class Pair(NamedTuple):
    a: int
    b: str = "x"


def test_types_that_refer_to_themselves_and_to_later_ones_are_read() -> None:
    def f(tree: Tree, pair: Pair, later: list[Later]) -> str:
        return f"{tree.kids[0].n} {pair} {later[0].v}"

    arguments = {"tree": {"n": 1, "kids": [{"n": 2}]}, "pair": [1], "later": [{"v": 3}]}
    assert check_arguments(tool(f).parameters, arguments) is None
    assert got(f, **arguments).content == "2 Pair(a=1, b='x') 3"


class Later(BaseModel):
    v: int


def part(a: int, b: str, c: float = 1.0) -> str:
    """Puts together.

    Args:
        b: The second.
    """
    return f"{a} {b} {c}"


@pytest.mark.parametrize("made", [functools.partial(part, 1), functools.partial(part, a=1)])
def test_what_a_partial_has_set_is_not_the_model_s_to_set(made: Any) -> None:
    wrapped = tool(made)
    assert (wrapped.name, wrapped.description) == ("part", "Puts together.")
    assert wrapped.parameters["required"] == ["b"]
    assert list(wrapped.parameters["properties"]) == ["b", "c"]
    assert wrapped.parameters["properties"]["b"]["description"] == "The second."
    assert got(made, b="x").content == "1 x 1.0"


@pytest.mark.parametrize(
    ("text", "description", "notes"),
    [
        ("Just text.", "Just text.", {}),
        ("", "", {}),
        ("A.\n\nArgs:\n    x: one: two\n\nReturns:\n    y", "A.\n\nReturns:\n    y", {"x": "one: two"}),
        ("A.\n\nArguments:\n  x:\n    below\n  y (str): b", "A.", {"x": "below", "y": "b"}),
        ("A.\n\nArgs:\n    nothing readable", "A.", {}),
        ("Args: in a sentence is not a section.", "Args: in a sentence is not a section.", {}),
    ],
)
def test_docstrings_are_read(text: str, description: str, notes: Any) -> None:
    assert read_docstring(text) == (description, notes)


# What is refused, at definition


def starred(*words: str) -> None: ...
def double_starred(**words: str) -> None: ...
def bare(word) -> None: ...  # type: ignore[no-untyped-def]  # what is being refused
def unknown(word: Nowhere) -> None: ...  # type: ignore[name-defined]  # noqa: F821  # what is being refused
def opaque(word: threading.Lock) -> None: ...
def function(word: Callable[[int], int]) -> None: ...
def nested(word: list[dict[str, threading.Thread]]) -> None: ...
def generator(word: str) -> Any:
    yield word


def unannotated_method(self, word: str) -> None: ...  # type: ignore[no-untyped-def]  # what is being refused
def bad_pattern(word: Annotated[str, Field(pattern="(")]) -> None: ...


@pytest.mark.parametrize(
    ("refused", "words"),
    [
        (starred, ["`starred`", "`*words`", "`list`"]),
        (double_starred, ["`double_starred`", "`**words`", "`dict`"]),
        (bare, ["`bare`", "`word`", "Annotate it"]),
        (unknown, ["`unknown`", "Nowhere", "import"]),
        (opaque, ["`opaque`", "`word`", "Use str"]),
        (function, ["`function`", "`word`", "Use str"]),
        (nested, ["`nested`", "`word`", "Use str"]),
        (generator, ["`generator`", "return it whole"]),
        (unannotated_method, ["`unannotated_method`", "is a method", "tool(thing.unannotated_method)"]),
        (bad_pattern, ["`bad_pattern`", "`word`"]),
        (tool(name="t")(lambda: 1), ["`t` is a tool already"]),
        (max, ["signature"]),
        (Point, ["functions"]),
        (lambda: 1, ["<lambda>", "name="]),
    ],
)
def test_what_can_t_be_described_is_refused_with_what_to_do(refused: Any, words: list[str]) -> None:
    with pytest.raises(DefinitionError) as caught:
        tool(refused)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize("options", [{"effect": "maybe"}, {"deadline": 0}, {"budget": -1}, {"name": "a b"}])
def test_impossible_options_are_refused(options: Any) -> None:
    with pytest.raises(DefinitionError):
        tool(**({"name": "f"} | options))(lambda: "x")


# Calls


def test_arguments_arrive_as_the_types_that_were_asked_for() -> None:
    def f(at: Point, color: Color, page: Page, query: Query, many: list[Point], day: datetime.date) -> str:
        return f"{at} {color} {page['parts'][0]} {query.near} {many} {day.year}"

    point = {"x": 1, "y": 2}
    arguments = {"at": point, "color": "blue", "page": {"title": "t", "parts": [point]},
                 "query": {"text": "q", "near": point}, "many": [point], "day": "2024-02-29"}  # fmt: skip
    assert check_arguments(tool(f).parameters, arguments) is None
    p = "Point(x=1, y=2.0)"
    assert got(f, **arguments).content == f"{p} Color.BLUE {p} {p} [{p}] 2024"


@pytest.mark.parametrize("arguments", [{}, {"n": "x"}, {"n": 1, "m": 2}, {"n": None}])
def test_arguments_that_do_not_convert_are_told_to_the_model(arguments: Any) -> None:
    def f(n: int) -> int:
        return n

    with pytest.raises(ToolError, match=r"The arguments don't fit: `[nm]`"):
        got(f, **arguments)


def test_what_was_not_given_is_left_to_the_function() -> None:
    shared: list[int] = []

    def f(x: list[int] = shared) -> bool:
        return x is shared

    assert got(f).content == "true"


def test_positional_only_parameters_are_passed_by_position() -> None:
    def f(a: int, b: int = 2, /, c: int = 3) -> list[int]:
        return [a, b, c]

    assert got(f, a=1, b=5, c=4).content == "[1,5,4]"


@pytest.mark.parametrize(
    ("value", "content"),
    [
        ("plain", "plain"),
        ({"a": [1, "é"]}, '{"a":[1,"é"]}'),
        (None, "null"),
        (1.5, "1.5"),
        (Point(1), '{"x":1,"y":0.5}'),
        ([Query(text="q")], '[{"text":"q","near":null}]'),
        (datetime.date(2024, 1, 2), '"2024-01-02"'),
        (float("nan"), "nan"),
        ({1, 2}, "[1,2]"),
        (range, "<class 'range'>"),
    ],
)
def test_values_become_text(value: Any, content: str) -> None:
    def f() -> Any:
        return value

    assert got(f) == Output(content)


def test_a_value_that_holds_itself_becomes_text() -> None:
    def f() -> Any:
        loop: list[Any] = []
        loop.append(loop)
        return loop

    assert got(f).content == "[[...]]"


def test_an_output_passes_through() -> None:
    output = Output("for the model", display="for the person", record={"a": 1}, ok=False)
    assert got(tool(name="f")(lambda: output)) is output


def test_async_functions_run_on_the_loop_and_sync_ones_in_a_thread() -> None:
    async def on_loop() -> bool:
        return threading.current_thread() is threading.main_thread()

    def in_thread() -> bool:
        return threading.current_thread() is threading.main_thread()

    assert (got(on_loop).content, got(in_thread).content) == ("true", "false")


@pytest.mark.anyio
async def test_a_slow_sync_function_blocks_nobody_and_can_be_left() -> None:
    done = threading.Event()

    @tool
    def slow() -> str:
        done.wait(5)
        return "late"

    started = time.monotonic()
    with anyio.move_on_after(0.1) as scope:
        await slow.call({})
    assert scope.cancelled_caught
    assert time.monotonic() - started < 3
    done.set()


RAISED = [
    (KeyError("k"), "KeyError: 'k'"),
    (ValueError(), "ValueError"),
    (SystemExit(3), "SystemExit: 3"),
    (StopIteration("x"), "StopIteration"),
]


@pytest.mark.parametrize(("raised", "text"), RAISED)
@pytest.mark.parametrize("is_async", [False, True])
def test_what_a_function_raises_becomes_a_tool_error(raised: BaseException, text: str, is_async: bool) -> None:
    def sync() -> None:
        raise raised

    async def asynchronous() -> None:
        raise raised

    with pytest.raises(ToolError) as caught:
        got(asynchronous if is_async else sync)
    assert text in str(caught.value)


def test_a_tool_error_passes_as_it_is() -> None:
    error = ToolError("no such city")

    def f() -> None:
        raise error

    with pytest.raises(ToolError) as caught:
        got(f)
    assert caught.value is error


def test_methods_and_callable_objects_can_be_tools() -> None:
    class Counter:
        n = 0

        def add(self, k: int) -> int:
            """Adds."""
            self.n += k
            return self.n

        async def __call__(self, k: int) -> int:
            return self.n * k

    counter = Counter()
    assert list(tool(counter.add).parameters["properties"]) == ["k"]
    assert got(counter.add, k=2).content == "2"
    assert got(counter, k=5).content == "10"


def test_defining_tools_is_what_imports_pydantic() -> None:
    import subprocess
    import sys

    heavy = "{'pydantic', 'jsonschema', 'httpx', 'torch'}"
    code = f"import sys, thinkloop.tools.function, thinkloop.tools.validate; print({heavy} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
