"""How fast each kernel is on a CUDA device, beside what the device can do at that moment, and whether it is right.

Each of `kernel_cases` is first held against its twin, then timed: its calls, which go through copies of the data, are captured
in one graph, so that launching costs no more than in the engine; the median replay counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

import torch
from thinkloop.engine.device import EngineError, find_device
from thinkloop.engine.kernel_cases import PARTS, Call, Case, cases
from torch import Tensor

__all__ = ["LIMIT", "PARTS", "Row", "check", "run"]

LIMIT = 1e-2
"""The largest ‖out − twin‖ / ‖twin‖ that counts as right."""
_LAUNCHES = 20
"""Calls of a graph, at least: starting one takes microseconds, which a single short call would be charged whole."""
_SECONDS = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One kernel at one shape."""

    kernel: str
    shape: str
    error: float
    microseconds: float
    nbytes: int
    operations: int
    bandwidth: float
    """Bytes a second over `copy_rate`."""
    matmul: float
    """Operations a second over `matmul_rate`."""
    copy_rate: float
    """Bytes a second, read and written, of a large copy in the same run."""
    matmul_rate: float
    """Operations a second of a large bfloat16 product in the same run."""


def run(parts: Sequence[str] = PARTS, *, device: Literal["cuda"] = "cuda") -> Iterator[Row]:
    """Checks and times the cases of `parts`, one after the other. Raises `EngineError` for a part that isn't known, without
    a CUDA device, and when a result is wrong."""
    if unknown := [part for part in parts if part not in PARTS]:
        raise EngineError(f"There is no kernel {unknown[0]!r} to measure; there are {', '.join(PARTS)}.")
    where = find_device(device)
    if where.type != "cuda":
        raise EngineError("Kernels are timed on a CUDA device: use --device cuda.")
    copied, product = copy_rate(where), matmul_rate(where)
    for case in cases(parts, where):
        prepared = case.prepare()
        error = check(case, prepared.result(), prepared.want)
        seconds = _seconds(prepared.calls)
        yield Row(
            kernel=case.kernel, shape=case.shape, error=error, microseconds=seconds * 1e6, nbytes=case.nbytes,
            operations=case.operations, bandwidth=case.nbytes / seconds / copied,
            matmul=case.operations / seconds / product, copy_rate=copied, matmul_rate=product,
        )  # fmt: skip
        del prepared
        torch.cuda.empty_cache()


def check(case: Case, out: Tensor, want: Tensor) -> float:
    """The relative error of `out`. Raises `EngineError` when it is above the limit, or not a number."""
    error = float((out.double() - want.double()).norm() / want.double().norm())
    if not error <= LIMIT:
        raise EngineError(
            f"{case.kernel} at {case.shape} is wrong: relative error {error:.2e}, at most {LIMIT:g} allowed."
        )
    return error


def copy_rate(device: torch.device) -> float:
    """Bytes a second of a copy of 4 GiB, read and written."""
    source = torch.randn(1 << 30, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _long_seconds(lambda: target.copy_(source))


def matmul_rate(device: torch.device) -> float:
    """Operations a second of a bfloat16 product of two square matrices of 8,192: random ones, as equal values take less power
    and so run at higher clocks."""
    side = 8192
    a, b = torch.randn(2, side, side, dtype=torch.bfloat16, device=device)
    return 2 * side**3 / _long_seconds(lambda: a @ b)


def _long_seconds(call: Call) -> float:
    """Of a call of milliseconds, the median of those that follow the first ten: a device that rested takes some to come up to
    its clocks. Not in a graph, in which a copy is the copy engine's work: 2.8 TB/s on an H200, and 4.2 as a kernel's."""
    times = [_timed(call) for _ in range(30)]
    return median(times[10:])


def _timed(call: Call) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / 1000


def _seconds(calls: Sequence[Call]) -> float:
    """Of one call, in the median replay of a graph of all of them, at least `_LAUNCHES`."""
    torch.cuda.synchronize()  # the data was made on another stream
    with torch.cuda.stream(torch.cuda.Stream()):  # type: ignore[no-untyped-call]  # torch leaves it untyped
        for call in calls:
            call()
    torch.cuda.synchronize()
    repeated = [*calls] * -(-_LAUNCHES // len(calls))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in repeated:
            call()
    graph.replay()
    times: list[float] = []
    while len(times) < 5 or (sum(times) < _SECONDS and len(times) < 100):
        times.append(_timed(graph.replay))
    return median(times) / len(repeated)
