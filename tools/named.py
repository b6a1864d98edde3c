"""Tools from their names, as a command line gives them: `module:function`, `file.py:function`, or all of a module."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import inspect
import sys
import traceback
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

from thinkloop.tools.function import FunctionTool, tool
from thinkloop.tools.outcome import told
from thinkloop.tools.tool import Tool, Toolset
from thinkloop.traces.events import ThinkloopError

MOST_NAMED = 10


class LoadError(ThinkloopError):
    """A named tool can't be had; the message says which, why, and what there is instead."""


def load_tools(name: str) -> list[Tool | Toolset]:
    """The tools that `name` stands for: `package.module:function`, `path/to/file.py:function`, several functions with
    commas between them, or a module or file alone for all the tools in it.

    Modules are looked for in the current folder first, then where Python looks. Plain functions are wrapped by `tool`,
    tools and toolsets are taken as they are. Importing runs the module's code. Raises `LoadError`, and
    `DefinitionError` for a function that can't be a tool.
    """
    where, _, wanted = name.strip().rpartition(":") if ":" in name else (name.strip(), "", "")
    if not where:
        raise LoadError(f"{name!r} names no module: write module:function or file.py:function.")
    module = _imported(where)
    names = [part.strip() for part in wanted.split(",") if part.strip()]
    return [_tool(module, where, part) for part in names] if names else _all_tools(module, where)


def _imported(where: str) -> ModuleType:
    path = Path(where)
    is_file = path.suffix == ".py" or "/" in where
    if is_file and not path.is_file():
        raise LoadError(f"There is no file {where!r} (looked in {Path.cwd()}).")
    try:
        with _ErrorsOf(where):
            return _import_file(path.resolve()) if is_file else _import_module(where)
    finally:
        importlib.invalidate_caches()


def _import_module(name: str) -> ModuleType:
    _look_in(Path.cwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if missing and (name == missing or name.startswith(missing + ".")):
            raise LoadError(f"There is no module {missing!r}: looked in {Path.cwd()} and in the {len(sys.path)} places "
                            f"of Python's path. A file is named with its ending: {missing}.py:function.") from None  # fmt: skip
        raise


def _import_file(path: Path) -> ModuleType:
    _look_in(path.parent)
    name = _module_name(path)
    known = sys.modules.get(name)
    if known is not None:
        return known
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise LoadError(f"{path} is not a Python file.")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _module_name(path: Path) -> str:
    """The name under which the file is imported anyway, or one that no other module has."""
    with suppress(ImportError, ValueError):
        spec = importlib.util.find_spec(path.stem) if path.stem.isidentifier() else None
        if spec is not None and spec.origin and Path(spec.origin).resolve() == path:
            return path.stem
    return f"{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"


def _look_in(folder: Path) -> None:
    """At the end: a file in there must not take a library's place for whatever is imported later."""
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


class _ErrorsOf:
    """Turns what a module's own code raises into a `LoadError` with the line in it."""

    def __init__(self, where: str) -> None:
        self._where = where

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is None or isinstance(error, (ThinkloopError, KeyboardInterrupt)):
            return
        place = _place_of(error)
        raise LoadError(f"Importing {self._where!r} failed{f' at {place}' if place else ''}: {told(error)}") from error


def _place_of(error: BaseException) -> str:
    """The last line of the imported code that the error passed, as `file, line n`."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}, line {error.lineno}"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not _is_machinery(frame.filename)]
    return f"{frames[-1].filename}, line {frames[-1].lineno}" if frames else ""


def _is_machinery(filename: str) -> bool:
    return filename.startswith("<frozen") or filename in (__file__, importlib.__file__)


def _tool(module: ModuleType, where: str, name: str) -> Tool | Toolset:
    try:
        found: Any = inspect.getattr_static(module, name)
    except AttributeError:
        raise LoadError(_not_there(module, where, name)) from None
    if isinstance(found, type):
        raise LoadError(f"`{name}` in {where!r} is a class: make an instance of it in the module, and name that.")
    if isinstance(found, (Tool, Toolset)):
        return found
    if not inspect.isroutine(found) and not callable(found):
        raise LoadError(f"`{name}` in {where!r} is no tool but {type(found).__name__}: name a typed function, a tool or "
                        "a toolset.")  # fmt: skip
    return tool(found)


def _not_there(module: ModuleType, where: str, name: str) -> str:
    names = [known for known in vars(module) if not known.startswith("_")]
    near = difflib.get_close_matches(name, names, n=3)
    own = [known for known in names if _is_own_function(module, vars(module)[known])]
    hint = f"did you mean {' or '.join(near)}?" if near else f"it has {', '.join(own[:MOST_NAMED]) or 'no functions'}."
    return f"{where!r} has no `{name}`: {hint}"


def _all_tools(module: ModuleType, where: str) -> list[Tool | Toolset]:
    found = {id(value): value for value in vars(module).values() if isinstance(value, FunctionTool)}
    if not found:
        own = [name for name, value in vars(module).items() if _is_own_function(module, value)]
        hint = f"name one ({where}:{own[0]})" if own else "write a typed function in it"
        raise LoadError(f"{where!r} holds no functions with `@tool`: {hint}, or decorate them.")
    return list(found.values())


def _is_own_function(module: ModuleType, value: Any) -> bool:
    own = inspect.isfunction(value) and value.__module__ == module.__name__ and not value.__name__.startswith("_")
    return own or isinstance(value, FunctionTool)
