"""Every kernel compiles for the GPUs it is meant for, without one: nothing spills while decoding, and shared memory and
registers fit the chip."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SHARED = {80: 163 << 10, 90: 227 << 10}
"""Bytes of shared memory that one program can have (CUDA C++ programming guide, table of compute capabilities)."""
REGISTERS = 1 << 16  # of an SM
HERE = Path(__file__).parent
KERNELS = HERE.parent.parent / "kernels"

SPILLING = """
import triton
import triton.language as tl
from thinkloop.kernels.compile_case import CompileCase

@triton.jit
def _kernel(p_x, p_out, SIZE: tl.constexpr):
    o_x = tl.arange(0, SIZE)
    b_x = tl.load(p_x + o_x)
    b_sums = tl.cumsum(b_x, 0)
    tl.store(p_out + o_x, b_x * b_sums)

def compile_cases():
    signature = {"p_x": "*fp32", "p_out": "*fp32", "SIZE": "constexpr"}
    return [CompileCase("too much", _kernel, signature, {"SIZE": 8192}, 1, 1, True)]
"""

OVERSIZED = """
import triton
import triton.language as tl
from thinkloop.kernels.compile_case import CompileCase

@triton.jit
def _kernel(p_a, p_b, p_out, steps, SIDE: tl.constexpr):
    o_tile = tl.arange(0, SIDE)[:, None] * SIDE + tl.arange(0, SIDE)[None, :]
    b_sum = tl.zeros([SIDE, SIDE], tl.float32)
    for i_step in range(steps):
        o_step = i_step * SIDE * SIDE + o_tile
        b_sum = tl.dot(tl.load(p_a + o_step), tl.load(p_b + o_step), b_sum)
    tl.store(p_out + o_tile, b_sum)

def compile_cases():
    signature = {"p_a": "*bf16", "p_b": "*bf16", "p_out": "*fp32", "steps": "i32", "SIDE": "constexpr"}
    return [CompileCase(f"{stages} stages", _kernel, signature, {"SIDE": 128}, 8, stages, False) for stages in (2, 6)]
"""


def compiled(folder: Path, capability: int, *files: str) -> list[dict[str, Any]]:
    environment = os.environ | {"TRITON_CACHE_DIR": str(folder)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(HERE / "compiled.py"), str(capability), *files]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def spills(case: dict[str, Any]) -> bool:
    return bool(case["stack"] or case["local"])


def waits_first(case: dict[str, Any]) -> bool:
    """Whether it lets the next kernel start only after it has waited for the one before, as each relies on the last but one
    having ended. The assembler may turn the two around."""
    order = case["dependent"]
    return all(step == ("ACQBULK", "PREEXIT")[index % 2] for index, step in enumerate(order))


def fits(case: dict[str, Any], capability: int) -> bool:
    return bool(case["shared"] <= SHARED[capability] and case["registers"] * 32 * case["warps"] <= REGISTERS)


@pytest.mark.parametrize("capability", [90, pytest.param(80, marks=pytest.mark.slow)])
def test_every_kernel_compiles_and_fits(tmp_path: Path, capability: int) -> None:
    found = compiled(tmp_path, capability)
    assert len(found) > 50
    assert [case["name"] for case in found if not fits(case, capability)] == []
    assert [case["name"] for case in found if case["decode"] and spills(case)] == []
    assert [case["name"] for case in found if not waits_first(case)] == []
    written = {
        name
        for file in KERNELS.glob("*.py")
        for name in re.findall(r"^def (\w+_kernel)\(", file.read_text(), re.MULTILINE)
    }
    kernels = {case["kernel"] for case in found}
    assert (
        kernels == written if capability >= 90 else kernels < written
    )  # rows of fp8 and what is in Gluon are for Hopper
    assert {"k2", "moonlight"} <= {part for case in found for part in case["name"].split("-")}


def test_a_kernel_that_spills_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "spilling.py"
    path.write_text(SPILLING)
    (case,) = compiled(tmp_path, 90, str(path))
    assert spills(case)


def test_a_kernel_that_takes_too_much_shared_memory_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "oversized.py"
    path.write_text(OVERSIZED)
    small, large = compiled(tmp_path, 90, str(path))
    assert fits(small, 90)
    assert not fits(large, 90)
    assert not spills(large)


def test_registers_of_all_threads_must_fit_an_sm() -> None:
    assert fits({"shared": 0, "registers": 255, "warps": 8}, 90)
    assert not fits({"shared": 0, "registers": 255, "warps": 16}, 90)
