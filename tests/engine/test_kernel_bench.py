"""The kernel bench makes data, twins and limits that are right, and notices a result that isn't; its timing needs a GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from thinkloop.engine import kernel_bench as bench
from thinkloop.engine import kernel_cases, kernel_cases_decode
from thinkloop.engine.device import EngineError
from thinkloop.engine.kernel_shapes import (
    K2,
    MOONLIGHT,
    Shape,
    absorb_bytes,
    decode_bytes,
    decode_operations,
    dense_bytes,
    expand_bytes,
    experts_bytes,
    experts_operations,
    gate_bytes,
    linear_bytes,
    norm_bytes,
    prefill_bytes,
    prefill_operations,
    rotation_bytes,
    router_bytes,
    sampling_bytes,
)
from torch import Tensor

CPU = torch.device("cpu")
TOY = Shape(
    name="toy", hidden=64, inner=32, experts=8, top_k=2, heads=4, latent=32, rope=16, nope=16, value=16, vocab=1100,
    q_rank=48, shared=40,
)  # fmt: skip


@pytest.fixture(autouse=True)
def small_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device whose cache level holds nothing: two copies of any data do."""
    monkeypatch.setattr(kernel_cases, "ROTATED", 1)
    monkeypatch.setattr(kernel_cases, "TOKENS", (1, 12))
    monkeypatch.setattr(kernel_cases, "ROWS", (1, 9))
    monkeypatch.setattr(kernel_cases_decode, "FEW_TOKENS", (2, 16))


def made(part: kernel_cases.Part) -> list[kernel_cases.Case]:
    if part == "prefill":
        return [kernel_cases.prefill_case(TOY, CPU, tokens, 40) for tokens in (5, 12)]
    if part == "decode":
        return [kernel_cases.decode_case(TOY, CPU, 2, 3, 70)]
    return list(kernel_cases.cases([part], CPU, [TOY]))


def test_bytes_are_those_of_the_published_shapes() -> None:
    assert experts_bytes(K2, 8) == 8 * 3 * 7168 * 2048 * 9 // 16 == 198_180_864
    assert 26 * experts_bytes(MOONLIGHT, 6) == pytest.approx(759e6, rel=0.01)
    assert decode_bytes(K2, 1, 1 << 17) == 131_072 * 1152 == 150_994_944
    assert decode_bytes(K2, 8, 1 << 14) == decode_bytes(MOONLIGHT, 1, 1 << 17)
    assert prefill_bytes(K2, 1, 1) == 2 * (576 + 64 * (192 + 128) + 64 * 512 * 256)
    assert router_bytes(K2, 1) == 1536 + 1536 + 64
    assert norm_bytes(K2, 1) == 5 * 14_336
    assert rotation_bytes(K2, 1) == 16_384 + 2_304 + 256 + 1024
    assert sampling_bytes(K2, 1) == 655_360
    assert dense_bytes(K2, 384) == pytest.approx(34e9, rel=0.01)
    assert gate_bytes(K2, 1) == 384 * 14_336 + 14_336 + 1536 + 28_672 + 64
    assert absorb_bytes(K2, 1) == 2**23 + 2 * 64 * (192 + 576) + 2304 + 256 + 1024
    assert expand_bytes(K2, 1, 132) == 2**23 + 64 * (132 * 513 * 4 + 256)


def test_products_are_those_of_the_published_shapes() -> None:
    k2 = {product.name: product for product in kernel_cases_decode.products(K2)}
    assert {name: (one.rows, one.features) for name, one in k2.items()} == {
        "w_in": (2112, 7168), "w_q": (12_288, 1536), "w_o": (7168, 8192), "gate_up": (4096, 7168), "down": (7168, 2048),
    }  # fmt: skip
    moonlight = {product.name: (product.rows, product.features) for product in kernel_cases_decode.products(MOONLIGHT)}
    assert moonlight == {"w_in": (3648, 2048), "w_o": (2048, 2048), "gate_up": (5632, 2048), "down": (2048, 2816)}
    assert linear_bytes(1, 7168, 2048, gated=False, residual=True, parts=8) == 2 * (7168 * 2048 + 9216) + 7168 * 34
    assert linear_bytes(2, 4096, 7168, gated=True, residual=False, parts=0) == 2 * (4096 * 7168 + 2 * 9216)


def test_operations_are_those_of_the_published_shapes() -> None:
    assert experts_operations(K2, 4096) == pytest.approx(2.9e12, rel=0.01)
    assert decode_operations(K2, 1, 1, 1) == 2 * 64 * (576 + 512)
    assert prefill_operations(K2, 1, 1) == 2 * 64 * (192 + 128) + 2 * 64 * 512 * 256
    assert prefill_operations(K2, 1024, 101_024) == pytest.approx(4.2e12 + 1.7e12, rel=0.02)


def test_a_cache_level_is_read_over_between_two_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_cases, "ROTATED", 256 << 20)
    for nbytes in (2 << 20, 198_180_864, 256 << 20, 3 << 30):
        assert (kernel_cases.copies(nbytes) - 1) * nbytes >= 256 << 20
    assert kernel_cases.copies(1600) == 256


@pytest.mark.parametrize("count", [1, 2, 7, 8, 9, 512, 4096])
def test_first_and_last_token_are_checked(count: int) -> None:
    checked = kernel_cases.spread(count)
    assert (checked[0], checked[-1]) == (0, count - 1)
    assert sorted(set(checked)) == checked
    assert len(checked) == min(count, 8)


@pytest.mark.parametrize("part", bench.PARTS)
def test_each_case_holds_its_kernel_against_the_twin(part: kernel_cases.Part) -> None:
    for case in made(part):
        prepared = case.prepare()
        assert len(prepared.calls) == 2
        assert bench.check(case, prepared.result(), prepared.want) <= bench.LIMIT
        assert case.nbytes > 0


@pytest.mark.parametrize("part", bench.PARTS)
def test_no_two_calls_use_the_same_data(part: kernel_cases.Part) -> None:
    for case in made(part):
        first, second = (tensors(call) for call in case.prepare().calls)
        assert first != second


def tensors(call: kernel_cases.Call) -> list[int]:
    return [one.data_ptr() for one in call.args if isinstance(one, Tensor)]  # type: ignore[attr-defined]  # a partial


def test_the_parts_of_a_gate_hold_against_its_twin(monkeypatch: pytest.MonkeyPatch) -> None:
    from thinkloop.kernels import gate

    monkeypatch.setattr(gate, "gate_pays", lambda tokens, router: False)
    case = kernel_cases_decode.gate_case(TOY, CPU, 3)
    prepared = case.prepare()
    assert bench.check(case, prepared.result(), prepared.want) <= bench.LIMIT


def test_bf16_experts_are_not_made_before_they_are_needed() -> None:
    dense = kernel_cases_decode.Dense(TOY, CPU)
    case = dense.case(2)
    assert "layer" not in vars(dense)
    assert case.nbytes <= dense_bytes(TOY, 4)
    case.prepare()
    assert sum(weight.nbytes for weight in vars(dense)["layer"]) == dense_bytes(TOY, 8)


def test_a_small_models_experts_are_copied_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_cases, "ROTATED", 3 * experts_bytes(TOY, TOY.top_k))
    weights = [gate_up.weight.data_ptr() for gate_up, _ in kernel_cases.Experts(TOY, CPU).layers]
    assert len(set(weights)) == 4
    monkeypatch.setattr(kernel_cases, "_LAYERS_BYTES", 0)
    assert len(kernel_cases.Experts(TOY, CPU).layers) == 1


def test_bytes_of_experts_are_of_those_that_were_chosen() -> None:
    one, many = made("experts")
    assert one.nbytes == experts_bytes(TOY, 2)
    assert experts_bytes(TOY, 2) < many.nbytes <= experts_bytes(TOY, 8)


def test_a_wrong_result_stops_the_bench() -> None:
    case = replace(kernel_cases.norm_case(TOY, CPU, 3), kernel="a broken norm")
    prepared = case.prepare()
    for wrong in (prepared.result() + 0.1, torch.full_like(prepared.want, float("nan"))):
        with pytest.raises(EngineError, match="a broken norm at toy, 3 tokens is wrong"):
            bench.check(case, wrong, prepared.want)


@pytest.mark.parametrize("part", bench.PARTS)
def test_an_error_in_the_last_row_is_noticed(part: kernel_cases.Part) -> None:
    case = made(part)[-1]
    prepared = case.prepare()
    out = prepared.result()
    out[-1] += 1
    with pytest.raises(EngineError, match="is wrong"):
        bench.check(case, out, prepared.want)


@pytest.mark.parametrize("token", ["another", "dropped"])
def test_a_wrong_draw_is_noticed(token: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from thinkloop.kernels import sampling

    def wrong(logits: Tensor, *, uniform: Tensor, **_: Tensor) -> Tensor:
        end = logits.softmax(1).cumsum(1)
        far = (end - uniform[:, None]).abs().argmax(1)
        return far if token == "another" else logits.argmin(1)

    monkeypatch.setattr(sampling, "sample", wrong)
    case = kernel_cases.draw_case(TOY, CPU, 9)
    prepared = case.prepare()
    with pytest.raises(EngineError, match="is wrong"):
        bench.check(case, prepared.result(), prepared.want)


def test_a_part_that_is_not_there_is_refused() -> None:
    with pytest.raises(EngineError, match=r"no kernel 'expert' .* experts, decode"):
        next(bench.run(["expert"]))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_without_a_cuda_device_it_says_so() -> None:
    with pytest.raises(EngineError, match="no CUDA device"):
        next(bench.run())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_whole_sweep_runs() -> None:
    rows = list(bench.run(["router", "norm", "rotation", "sampling"]))
    assert all(row.microseconds > 0 and row.error <= bench.LIMIT for row in rows)
