"""Tools from functions: `@tool` reads signature and docstring, so that what models are told can't drift from the code.

@tool
async def weather(city: str, days: int = 1) -> str:
    \"\"\"The weather forecast for a city.

    Args:
        city: Name of the city, in English.
        days: How many days ahead.
    \"\"\"
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, overload

from thinkloop.tools.signature import DefinitionError, Parameters, read_signature
from thinkloop.tools.tool import Effect, Output, ToolError
from thinkloop.traces.events import Json

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,63}")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FunctionTool:
    """A function as a `Tool`. Calling it as a function still works."""

    name: str
    description: str
    parameters: Json
    effect: Effect
    deadline: float
    budget: int
    function: Callable[..., Any]
    arguments: Parameters

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    async def call(self, arguments: Json) -> Output:
        """Converts the arguments to what the annotations say and runs the function, in a worker thread unless it is
        async. On cancellation a thread is left to finish by itself: Python can't stop one.

        Raises `ToolError` for arguments that don't convert and for anything that the function raises.
        """
        args, kwargs = self.arguments.bind(arguments)
        try:
            return as_output(await self._run(args, kwargs))
        except ToolError:
            raise
        except (Exception, SystemExit) as error:  # a tool that calls `sys.exit` must not end the run
            raise ToolError(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__) from error

    async def _run(self, args: list[Any], kwargs: dict[str, Any]) -> Any:
        if inspect.iscoroutinefunction(self.function):
            return await self.function(*args, **kwargs)
        import anyio.to_thread

        value = await anyio.to_thread.run_sync(partial(self.function, *args, **kwargs), abandon_on_cancel=True)
        return await value if inspect.isawaitable(value) else value


@overload
def tool(function: Callable[..., Any], /) -> FunctionTool: ...
@overload
def tool(
    *, effect: Effect = "read", deadline: float = 60.0, budget: int = 2000, name: str | None = None
) -> Callable[[Callable[..., Any]], FunctionTool]: ...
def tool(
    function: Callable[..., Any] | None = None,
    /,
    *,
    effect: Effect = "read",
    deadline: float = 60.0,
    budget: int = 2000,
    name: str | None = None,
) -> FunctionTool | Callable[[Callable[..., Any]], FunctionTool]:
    """Makes a tool of a typed function, sync or async: `@tool` or `@tool(effect="write", deadline=5)`.

    The schema comes from the type hints (`Annotated[int, "what it is"]` describes a parameter, as does the docstring's
    `Args:`), the description from the docstring. `effect` is `write` for what changes something: such calls run one
    after the other. `deadline` is in seconds, `budget` in tokens, `name` replaces the function's own.

    Raises `DefinitionError`, which names function and parameter and says what to do, for `*args`, `**kwargs`,
    parameters without an annotation and types that JSON can't carry.
    """
    caller = inspect.currentframe()
    scope = dict(caller.f_back.f_locals) if caller and caller.f_back else {}
    make = partial(_tool_of, effect=effect, deadline=deadline, budget=budget, name=name, scope=scope)
    return make if function is None else make(function)


def _tool_of(
    function: Callable[..., Any], *, effect: Effect, deadline: float, budget: int, name: str | None, scope: Json
) -> FunctionTool:
    if not callable(function) or inspect.isclass(function):
        raise DefinitionError(f"`@tool` is for functions, not {function!r}: write a function that does it.")
    name = name or str(getattr(function, "__name__", type(function).__name__))
    _check_options(name, function, effect, deadline, budget)
    description, notes = read_docstring(inspect.getdoc(function) or "")
    arguments = read_signature(function, name, notes, scope)
    return FunctionTool(name=name, description=description, parameters=arguments.schema, effect=effect,
                        deadline=deadline, budget=budget, function=function, arguments=arguments)  # fmt: skip


def _check_options(name: str, function: Any, effect: str, deadline: float, budget: int) -> None:
    if not _NAME.fullmatch(name):
        raise DefinitionError(f"A tool can't be called {name!r}: models take letters, digits, `_` and `-`, at most 64. "
                              'Give another: `@tool(name="…")`.')  # fmt: skip
    if effect not in ("read", "write"):
        raise DefinitionError(f'`{name}`: `effect` is {effect!r}; it must be "read" or "write".')
    if not (deadline > 0 and budget > 0):
        raise DefinitionError(f"`{name}`: `deadline` (seconds) and `budget` (tokens) must be positive.")
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        raise DefinitionError(f"`{name}` is a generator; a tool gives one result: return it whole.")


def as_output(value: Any) -> Output:
    """A function's value as a tool's output: an `Output` and text as they are, anything else as compact JSON, and what
    has no JSON as its `repr`."""
    if isinstance(value, Output):
        return value
    if isinstance(value, str):
        return Output(value)
    try:
        return Output(_as_json(value))
    except (ValueError, TypeError, RecursionError):
        return Output(repr(value))


def _as_json(value: Any) -> str:
    dumps = partial(json.dumps, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    try:
        return dumps(value)
    except TypeError:  # dataclasses, models, dates, sets
        from pydantic_core import to_jsonable_python

        return dumps(to_jsonable_python(value, by_alias=False))


# Docstrings

_SECTION = re.compile(r"(Args|Arguments|Parameters|Params):\s*")
_ENTRY = re.compile(r"\*{0,2}(\w+)\s*(?:\([^)]*\))?\s*:\s*(.*)")


def read_docstring(text: str) -> tuple[str, Mapping[str, str]]:
    """The description and what Google's `Args:` section says of each parameter. Without one all is description."""
    lines = text.strip().splitlines()
    start = next((at for at, line in enumerate(lines) if _SECTION.fullmatch(line)), None)
    if start is None:
        return text.strip(), {}
    end = next((at for at in range(start + 1, len(lines)) if lines[at][:1].strip()), len(lines))
    rest = [*lines[:start], *lines[end:]]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(rest)).strip(), dict(_entries(lines[start + 1 : end]))


def _entries(lines: list[str]) -> Iterator[tuple[str, str]]:
    """Parameter entries; lines indented deeper than the first one go on with the entry above."""
    written = [line for line in lines if line.strip()]
    indent = min((len(line) - len(line.lstrip()) for line in written), default=0)
    name, words = "", [""]
    for line in written:
        entry = _ENTRY.fullmatch(line.strip()) if len(line) - len(line.lstrip()) == indent else None
        if entry is None:
            words.append(line.strip())
            continue
        if name:
            yield name, " ".join(words).strip()
        name, words = entry[1], [entry[2]]
    if name:
        yield name, " ".join(words).strip()
