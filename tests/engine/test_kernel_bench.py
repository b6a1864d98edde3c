"""The kernel bench makes data, twins and limits that are right; its timing needs a GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from thinkloop.engine import kernel_bench as bench
from thinkloop.engine.device import EngineError
from thinkloop.engine.kernel_shapes import (
    K2,
    MOONLIGHT,
    Shape,
    decode_bytes,
    decode_operations,
    experts_bytes,
    prefill_operations,
)

CPU = torch.device("cpu")
TOY = Shape(name="toy", hidden=64, inner=32, experts=8, top_k=2, heads=4, latent=32, rope=16, nope=16, value=16)


def test_limits_are_those_of_the_published_shapes() -> None:
    assert experts_bytes(K2, 8) == pytest.approx(198e6, rel=0.01)
    assert decode_bytes(K2, 1, 1 << 17) == pytest.approx(151e6, rel=0.01)
    assert decode_operations(K2, 1, 1, 1) == 2 * 64 * (576 + 512)
    assert 26 * experts_bytes(MOONLIGHT, 6) == pytest.approx(759e6, rel=0.01)
    assert prefill_operations(K2, 1, 1) == 2 * 64 * (192 + 128) + 2 * 64 * 512 * 256


@pytest.mark.parametrize("part", bench.PARTS)
def test_each_case_holds_its_kernel_against_the_twin(part: bench.Part, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "TOKENS", (1, 5))
    for case in made(part):
        calls, want = case.make(2)
        assert bench.check(case, calls[0](), want) <= bench.LIMIT
        assert case.nbytes > 0


def made(part: bench.Part) -> list[bench.Case]:
    if part == "prefill":
        return [bench.prefill_case(TOY, CPU, 5, 40)]
    if part == "decode":
        return [bench.decode_case(TOY, CPU, 2, 3, 70)]
    return list(bench.cases([part], CPU, [TOY]))


def test_a_wrong_result_stops_the_bench() -> None:
    case = replace(bench.norm_case(TOY, CPU, 3), kernel="a broken norm")
    calls, want = case.make(1)
    for wrong in (calls[0]() + 0.1, torch.full_like(want, float("nan"))):
        with pytest.raises(EngineError, match="a broken norm at toy, 3 tokens is wrong"):
            bench.check(case, wrong, want)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_without_a_cuda_device_it_says_so() -> None:
    with pytest.raises(EngineError, match="no CUDA device"):
        next(bench.run())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_whole_sweep_runs() -> None:
    rows = list(bench.run(["router", "norm"]))
    assert all(row.microseconds > 0 and row.error <= bench.LIMIT for row in rows)
