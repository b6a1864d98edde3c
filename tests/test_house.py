"""The house keeps its shape: arrows between rooms, the cost of an import, the size of files."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import thinkloop

ROOT = Path(__file__).parent.parent
ALLOWED = {
    "kernels": {"thinkloop.kernels"},
    "traces": {"thinkloop.traces"},
    "engine": {"thinkloop.engine", "thinkloop.kernels", "thinkloop.traces.events"},
    "tools": {"thinkloop.tools", "thinkloop.traces.events"},
    "agent": {
        "thinkloop.agent",
        "thinkloop.kernels",
        "thinkloop.traces",
        "thinkloop.engine",
        "thinkloop.tools",
        "thinkloop",
    },
}
FILES = [(room, file) for room in ALLOWED for file in sorted((ROOT / room).glob("*.py"))]


def _imports(file: Path) -> list[str]:
    names: list[str] = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports are absolute"
            names.append(node.module or "")
    return [name for name in names if name.split(".")[0] == "thinkloop"]


@pytest.mark.parametrize(("room", "file"), FILES, ids=[f"{room}/{file.name}" for room, file in FILES])
def test_arrows_point_down(room: str, file: Path) -> None:
    for name in _imports(file):
        allowed = any(name == prefix or name.startswith(prefix + ".") for prefix in ALLOWED[room] - {"thinkloop"})
        assert allowed or (name == "thinkloop" and "thinkloop" in ALLOWED[room]), f"{room} may not import {name}"


def test_import_brings_no_torch() -> None:
    code = (
        "import sys, thinkloop; print(sorted(m for m in ('torch', 'httpx', 'rich', 'jsonschema') if m in sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_every_public_name_can_be_had() -> None:
    for name in thinkloop.__all__:
        assert getattr(thinkloop, name) is not None


def test_files_hold_one_idea() -> None:
    long = {str(file): n for _, file in FILES if (n := len(file.read_text(encoding="utf-8").splitlines())) > 420}
    assert long == {}
