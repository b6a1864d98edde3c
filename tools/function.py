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
import re
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, overload

from thinkloop.tools.outcome import passes_on
from thinkloop.tools.process import Target, reason, run_in_process, target_of
from thinkloop.tools.retry import NO_RETRY, Retry, retried
from thinkloop.tools.signature import DefinitionError, Parameters, read_signature
from thinkloop.tools.thread import Outcome, run_in_thread
from thinkloop.tools.tool import Effect, Output, ToolError
from thinkloop.tools.values import as_output
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
    paged: bool
    function: Callable[..., Any]
    arguments: Parameters
    retry: Retry = NO_RETRY
    process: Target | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    async def call(self, arguments: Json) -> Output:
        """Converts the arguments to what the annotations say and runs the function: async ones on the event loop,
        others in a thread, or in a process where that was asked for; and again, where its `Retry` says so.

        Cancellation stops the function. A thread that sits in C code can't be stopped: after a second it is left to
        itself, and the call's record says `still_running`. Raises `ToolError` for arguments that don't convert and for
        anything that the function raises.
        """
        outcome = await retried(self.retry, partial(self._attempt, arguments))
        if isinstance(outcome.error, ToolError):
            raise outcome.error
        if outcome.error is not None:  # also a tool that calls `sys.exit` must not end the run
            raise ToolError(reason(outcome.error)) from outcome.error
        output: Output = outcome.value
        return output

    async def _attempt(self, arguments: Json) -> Outcome:
        if self.process is not None:
            return await run_in_process(self.process, arguments)
        args, kwargs = self.arguments.bind(arguments)
        if inspect.iscoroutinefunction(self.function):
            return await _awaited(self.function(*args, **kwargs))
        outcome = await run_in_thread(partial(_called, self.function, args, kwargs))
        return await _awaited(outcome.value) if inspect.isawaitable(outcome.value) else outcome


def _called(function: Callable[..., Any], args: list[Any], kwargs: dict[str, Any]) -> Any:
    """The function's value as an output; an awaitable as it is, since it belongs to the event loop."""
    value = function(*args, **kwargs)
    return value if inspect.isawaitable(value) else as_output(value)


async def _awaited(given: Awaitable[Any]) -> Outcome:
    try:
        value = await given
    except BaseException as error:
        if passes_on(error):
            raise
        return Outcome(error=error)
    if isinstance(value, (Output, str)):
        return Outcome(as_output(value))
    return await run_in_thread(partial(as_output, value))  # writing a large value out must not hold up the event loop


@overload
def tool(function: Callable[..., Any], /) -> FunctionTool: ...
@overload
def tool(
    *, effect: Effect = "read", deadline: float = 60.0, budget: int = 2000, name: str | None = None,
    retry: int | Retry = 0, idempotent: bool = False, process: bool = False, paged: bool = False,
) -> Callable[[Callable[..., Any]], FunctionTool]: ...  # fmt: skip
def tool(
    function: Callable[..., Any] | None = None,
    /,
    *,
    effect: Effect = "read",
    deadline: float = 60.0,
    budget: int = 2000,
    name: str | None = None,
    retry: int | Retry = 0,
    idempotent: bool = False,
    process: bool = False,
    paged: bool = False,
) -> FunctionTool | Callable[[Callable[..., Any]], FunctionTool]:
    """Makes a tool of a typed function, sync or async: `@tool` or `@tool(effect="write", deadline=5)`.

    The schema comes from the type hints (`Annotated[int, "what it is"]` describes a parameter, as does the docstring's
    `Args:`), the description from the docstring. `effect` is `write` for what changes something: such calls run one
    after the other. `deadline` is in seconds, `budget` in tokens, `name` replaces the function's own. `paged` says that
    the function itself can read on in what is longer than the budget; for others the run offers `read_result`.

    `retry` is how many more attempts an error that may pass gets, or a `Retry` that says which errors and how long to
    wait; what writes must be declared `idempotent` for it. `process=True` runs the function, which must stand at the
    top of a module, in a process of its own (about 0.2 s a call): it can be killed whatever it does.

    Raises `DefinitionError`, which names function and parameter and says what to do, for `*args`, `**kwargs`,
    parameters without an annotation and types that JSON can't carry.
    """
    caller = inspect.currentframe()
    scope = dict(caller.f_back.f_locals) if caller and caller.f_back else {}
    policy = retry if isinstance(retry, Retry) else Retry(times=retry)
    made = partial(
        _tool_of, scope=scope, process=process, idempotent=idempotent,
        options={"effect": effect, "deadline": deadline, "budget": budget, "paged": paged, "retry": policy}, name=name,
    )  # fmt: skip
    return made if function is None else made(function)


def _tool_of(
    function: Callable[..., Any], *, name: str | None, options: Json, scope: Json, process: bool, idempotent: bool
) -> FunctionTool:
    if not callable(function) or inspect.isclass(function):
        raise DefinitionError(f"`@tool` is for functions, not {function!r}: write a function that does it.")
    if isinstance(function, FunctionTool):
        raise DefinitionError(f"`{function.name}` is a tool already: give `@tool` the function itself.")
    name = name or _name_of(function)
    _check_options(name, function, idempotent=idempotent, **options)
    description, notes = read_docstring(_docstring(function))
    arguments = read_signature(function, name, notes, scope)
    target = target_of(function, name) if process else None
    return FunctionTool(name=name, description=description, parameters=arguments.schema, function=function,
                        arguments=arguments, process=target, **options)  # fmt: skip


def _name_of(function: Any) -> str:
    inner = function.func if isinstance(function, partial) else function
    return str(getattr(inner, "__name__", type(inner).__name__))


def _docstring(function: Any) -> str:
    """The function's own; objects and partials would show their class's."""
    inner = function.func if isinstance(function, partial) else function
    return inspect.getdoc(inner if inspect.isroutine(inner) else type(inner).__call__) or inspect.getdoc(inner) or ""


def _check_options(
    name: str, function: Any, *, effect: str, deadline: float, budget: int, paged: bool, retry: Retry, idempotent: bool
) -> None:
    if not _NAME.fullmatch(name):
        raise DefinitionError(f"A tool can't be called {name!r}: models take letters, digits, `_` and `-`, at most 64. "
                              'Give another: `@tool(name="…")`.')  # fmt: skip
    if effect not in ("read", "write"):
        raise DefinitionError(f'`{name}`: `effect` is {effect!r}; it must be "read" or "write".')
    if not (deadline > 0 and budget > 0):
        raise DefinitionError(f"`{name}`: `deadline` (seconds) and `budget` (tokens) must be positive.")
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        raise DefinitionError(f"`{name}` is a generator; a tool gives one result: return it whole.")
    if effect == "write" and retry.times and not idempotent:
        raise DefinitionError(f"`{name}` writes, and an attempt that failed may have written already. If doing it twice "
                              "does no harm, say `idempotent=True`; otherwise leave `retry` out.")  # fmt: skip


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
