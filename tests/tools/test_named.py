"""Tools by name: what is found, and what is said when it isn't."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import anyio
import pytest
from thinkloop.tools.function import FunctionTool
from thinkloop.tools.named import LoadError, load_tools
from thinkloop.tools.signature import DefinitionError
from thinkloop.tools.tool import Tool, Toolset

SOURCE = '''
"""Tools."""
from thinkloop.tools.function import tool
from thinkloop.tools.tool import Output

NUMBER = 3

@tool
def weather(city: str) -> str:
    """The weather."""
    return f"rain in {city}"

@tool(effect="write")
def save(text: str) -> str:
    return text

again = save

def plain(n: int) -> int:
    return n + 1

def bare(n):
    return n

def _hidden(n: int) -> int:
    return n

class Own:
    name, description, effect, deadline, budget = "own", "Mine.", "read", 1.0, 100
    parameters = {"type": "object"}
    async def call(self, arguments):
        return Output("own")

class Set:
    def tools(self):
        return [own]
    async def __aenter__(self):
        return self
    async def __aexit__(self, *exc):
        return None

own, toolset = Own(), Set()
'''


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty current folder; what is imported from it is forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    path, modules = list(sys.path), set(sys.modules)
    (tmp_path / "my_tools.py").write_text(SOURCE)
    yield tmp_path
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        del sys.modules[name]


def names(*loaded: Tool | Toolset) -> list[str]:
    return [tool.name for tool in loaded if isinstance(tool, Tool)]


def refused(name: str) -> str:
    with pytest.raises(LoadError) as caught:
        load_tools(name)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("my_tools:weather", ["weather"]),
        ("my_tools:weather,plain", ["weather", "plain"]),
        (" my_tools: weather , own ", ["weather", "own"]),
        ("my_tools", ["weather", "save"]),
        ("my_tools:", ["weather", "save"]),
        ("my_tools.py:weather", ["weather"]),
        ("./my_tools.py", ["weather", "save"]),
    ],
)
def test_functions_tools_and_whole_modules_are_found_in_the_current_folder(name: str, found: list[str]) -> None:
    assert names(*load_tools(name)) == found


def test_files_beside_a_tool_take_no_librarys_place(folder: Path) -> None:
    (folder / "colorsys.py").write_text("raise SystemExit('mine')")
    sys.modules.pop("colorsys", None)
    load_tools("./my_tools.py")
    assert importlib.import_module("colorsys").__file__ != str(folder / "colorsys.py")


def test_plain_functions_become_tools_and_others_stay_what_they_are() -> None:
    (plain,) = load_tools("my_tools:plain")
    assert isinstance(plain, FunctionTool)
    assert anyio.run(plain.call, {"n": 1}).content == "2"
    (own,) = load_tools("my_tools:own")
    assert own is sys.modules["my_tools"].own
    (toolset,) = load_tools("my_tools:toolset")
    assert isinstance(toolset, Toolset)


def test_packages_files_elsewhere_and_their_neighbours_are_found(folder: Path) -> None:
    package = folder / "pack" / "age"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "inner.py").write_text("def f(n: int) -> int:\n    return n\n")
    assert names(*load_tools("pack.age.inner:f")) == ["f"]
    elsewhere = folder / "else where"
    elsewhere.mkdir()
    (elsewhere / "near_by.py").write_text("WORD = 'hello'\n")
    (elsewhere / "json.py").write_text("import near_by\ndef say() -> str:\n    return near_by.WORD\n")
    (say,) = load_tools("else where/json.py:say")
    assert isinstance(say, FunctionTool)
    assert say() == "hello"
    import json

    assert hasattr(json, "loads")


def test_a_file_is_imported_once(folder: Path) -> None:
    (folder / "once.py").write_text("def f() -> int:\n    return 1\ndef g() -> int:\n    return 2\n")
    (first,), (second,) = load_tools("once.py:f"), load_tools(f"{folder}/once.py:f")
    (third,) = load_tools("once:f")
    functions = [tool.function for tool in (first, second, third) if isinstance(tool, FunctionTool)]
    assert functions[0] is functions[1] is functions[2]


def test_a_function_from_a_file_can_run_in_a_process(folder: Path) -> None:
    (folder / "test.py").write_text(  # the standard library has a module of this name
        "from thinkloop.tools.function import tool\n@tool(process=True)\ndef f(n: int) -> int:\n    return n + 1\n"
    )
    (made,) = load_tools("test.py:f")
    assert isinstance(made, FunctionTool)
    assert anyio.run(made.call, {"n": 1}).content == "2"


def test_what_is_missing_is_said_with_where_it_was_looked_for(folder: Path) -> None:
    assert f"There is no module 'nowhere': looked in {folder}" in refused("nowhere:f")
    assert "There is no module 'my_tools.deeper'" in refused("my_tools.deeper:f")
    assert f"There is no file 'nowhere.py' (looked in {folder})" in refused("nowhere.py:f")
    assert "There is no file 'some/where'" in refused("some/where:f")
    assert "did you mean weather?" in refused("my_tools:wether")
    assert "it has weather, save, again, plain, bare" in refused("my_tools:qqq")
    assert "names no module" in refused(":f")
    assert "names no module" in refused("")


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("x = 1\ny = x / 0\n", ["broken.py, line 2", "ZeroDivisionError: division by zero"]),
        ("def f(:\n", ["broken.py, line 1", "SyntaxError"]),
        ("import not_there_at_all\n", ["broken.py, line 1", "ModuleNotFoundError", "not_there_at_all"]),
        ("def g():\n    raise KeyError('k')\n\ng()\n", ["broken.py, line 2", "KeyError: 'k'"]),
        ("raise SystemExit(3)\n", ["broken.py, line 1", "SystemExit: 3"]),
        ("raise BaseException('\\x1b[31m')\n", ["broken.py, line 1", "BaseException: \\x1b[31m"]),
    ],
)
@pytest.mark.parametrize("name", ["broken:f", "broken.py:f", "broken"])
def test_an_error_inside_the_module_is_told_with_its_line(folder: Path, code: str, told: list[str], name: str) -> None:
    (folder / "broken.py").write_text(code)
    for _ in range(2):  # half an import must not be taken for a whole one
        message = refused(name)
        assert all(words in message for words in told), message


def test_what_is_no_tool_is_said(folder: Path) -> None:
    assert "`NUMBER` in 'my_tools' is no tool but int" in refused("my_tools:NUMBER")
    assert "`Own` in 'my_tools' is a class: make an instance" in refused("my_tools:Own")
    with pytest.raises(DefinitionError, match="`bare`: parameter `n` has no annotation"):
        load_tools("my_tools:bare")
    (folder / "empty.py").write_text("")
    (folder / "plain.py").write_text("def f(n: int) -> int:\n    return n\n")
    assert "holds no functions with `@tool`: write a typed function in it" in refused("empty.py")
    assert "name one (plain:f)" in refused("plain")
