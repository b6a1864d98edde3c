"""How fast each kernel is on a CUDA device, beside what the device can do at that moment, and whether it is right.

Each case makes fresh random data, holds the result against its twin in `kernels.reference`, and is then timed: its calls go
through so many copies of the data that none finds its own in the second cache level, all in one captured graph, so that
launching costs no more than in the engine; the median replay counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any, Literal, get_args

import torch
from thinkloop.engine.device import EngineError, find_device
from thinkloop.engine.kernel_shapes import (
    CONTEXTS,
    K2,
    MOONLIGHT,
    TOKENS,
    Shape,
    decode_bytes,
    decode_operations,
    experts_bytes,
    experts_operations,
    prefill_operations,
)
from thinkloop.kernels import reference
from torch import Tensor

Part = Literal["experts", "decode", "prefill", "router", "norm"]
PARTS: tuple[Part, ...] = get_args(Part)
LIMIT = 1e-2
"""The largest ‖out − twin‖ / ‖twin‖ that counts as right."""
_ROTATED = 256 << 20
"""Bytes between two uses of the same data: five times an H200's second cache level."""
_SECONDS = 0.5
_CHECKED = 2
"""Tokens of a large step that are held against the twin: it writes out every expert they chose."""

Call = Callable[[], Tensor]


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
    """Bytes a second over those of a large copy in the same run, read and written."""
    matmul: float
    """Operations a second over those of a large bfloat16 product in the same run."""


@dataclass(frozen=True, slots=True)
class Case:
    """`make(copies)` gives that many calls, each on data of its own, and what the first one must give (its first rows, where
    that has fewer)."""

    kernel: str
    shape: str
    make: Callable[[int], tuple[list[Call], Tensor]]
    nbytes: int
    operations: int


def run(parts: Sequence[Part] = PARTS, *, device: Literal["cuda"] = "cuda") -> Iterator[Row]:
    """Checks and times the cases of `parts`, one after the other. Raises `EngineError` without a CUDA device, and when a
    result is wrong."""
    where = find_device(device)
    if where.type != "cuda":
        raise EngineError("Kernels are timed on a CUDA device: use --device cuda.")
    copied, product = copy_rate(where), product_rate(where)
    for case in cases(parts, where):
        calls, want = case.make(max(2, -(-_ROTATED // case.nbytes)) if case.nbytes < _ROTATED else 1)
        error = check(case, calls[0](), want)
        seconds = _seconds(calls)
        yield Row(
            kernel=case.kernel, shape=case.shape, error=error, microseconds=seconds * 1e6, nbytes=case.nbytes,
            operations=case.operations, bandwidth=case.nbytes / seconds / copied,
            matmul=case.operations / seconds / product,
        )  # fmt: skip
        del calls, want
        torch.cuda.empty_cache()


def check(case: Case, out: Tensor, want: Tensor) -> float:
    """The relative error of `out`'s first rows. Raises `EngineError` when it is above the limit, or not a number."""
    got = out[: len(want)].float()
    error = float((got - want.float()).norm() / want.float().norm())
    if not error <= LIMIT:
        raise EngineError(
            f"{case.kernel} at {case.shape} is wrong: relative error {error:.2e}, at most {LIMIT:g} allowed."
        )
    return error


def cases(parts: Sequence[Part], device: torch.device, shapes: Sequence[Shape] = (K2, MOONLIGHT)) -> Iterator[Case]:
    """Every case of `parts` for the models in `shapes`."""
    for shape in shapes:
        if "experts" in parts:
            experts = Experts(shape, device)
            yield from (experts.case(tokens) for tokens in TOKENS)
            del experts
        if "decode" in parts:
            for length in CONTEXTS:
                yield from (decode_case(shape, device, 1, tokens, length) for tokens in (1, 4))
            yield decode_case(shape, device, 8, 1, 1 << 14)
        if "prefill" in parts:
            yield from (prefill_case(shape, device, 1024, 1024 + prefix) for prefix in (0, 16_000, 100_000))
        if "router" in parts:
            yield from (router_case(shape, device, tokens) for tokens in TOKENS)
        if "norm" in parts:
            yield from (norm_case(shape, device, tokens) for tokens in TOKENS)


class Experts:
    """One layer's random experts, made once for all numbers of tokens."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        self.shape, self.device = shape, device
        self.gate_up = _published(shape.experts, 2 * shape.inner, shape.hidden, device)
        self.down = _published(shape.experts, shape.hidden, shape.inner, device)
        self.packed = [self._packed(*published) for published in (self.gate_up, self.down)]

    @staticmethod
    def _packed(packed: Tensor, scale: Tensor) -> Any:
        from thinkloop.kernels.int4_moe import PackedExperts, pack_experts

        first = pack_experts(packed[:1], scale[:1])
        weight = first.weight.new_empty(len(packed), *first.weight.shape[1:])
        scales = first.scale.new_empty(len(packed), *first.scale.shape[1:])
        for expert in range(len(packed)):  # one at a time: a few times a layer's memory otherwise
            one = pack_experts(packed[expert : expert + 1], scale[expert : expert + 1])
            weight[expert], scales[expert] = one.weight[0], one.scale[0]
        return PackedExperts(weight, scales, first.rows, first.features)

    def case(self, tokens: int) -> Case:
        s = self.shape
        distinct = s.experts * (1 - (1 - s.top_k / s.experts) ** tokens)  # expected, with uniform routing
        nbytes = experts_bytes(s, round(distinct))
        return Case(
            "experts", f"{s.name}, {tokens} tokens", partial(self._make, tokens), nbytes, experts_operations(s, tokens)
        )

    def _make(self, tokens: int, copies: int) -> tuple[list[Call], Tensor]:
        from thinkloop.kernels.int4_moe import moe_int4

        s, calls, first = self.shape, list[Call](), None
        for _ in range(copies):
            x = torch.randn(tokens, s.hidden, dtype=torch.bfloat16, device=self.device)
            ids = torch.rand(tokens, s.experts, device=self.device).topk(s.top_k).indices.int()
            shares = torch.rand(tokens, s.top_k, device=self.device)
            first = first or (x, ids, shares)
            calls.append(partial(moe_int4, x, ids, shares, *self.packed))
        assert first is not None
        return calls, self._twin(*(part[:_CHECKED] for part in first))

    def _twin(self, x: Tensor, ids: Tensor, shares: Tensor) -> Tensor:
        """`reference.moe_int4` with only the experts that were chosen."""
        used, own = torch.unique(ids.long(), return_inverse=True)
        pairs = [(packed[used], scale[used]) for packed, scale in (self.gate_up, self.down)]
        return reference.moe_int4(x.float(), own, shares, *pairs)


def _published(experts: int, rows: int, features: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Random experts in the published layout, their products of unit size."""
    packed = torch.empty(experts, rows, features // 8, dtype=torch.int32, device=device).random_(-(2**31), 2**31 - 1)
    scale = torch.full((experts, rows, features // 32), features**-0.5 / 4.6, dtype=torch.bfloat16, device=device)
    return packed, scale


def decode_case(shape: Shape, device: torch.device, batch: int, tokens: int, length: int) -> Case:
    """Attention of `tokens` new tokens of each of `batch` sequences of `length` rows, in pages of any order."""

    def make(copies: int) -> tuple[list[Call], Tensor]:
        from thinkloop.kernels.mla_decode import PAGE, mla_decode

        pages, scale = -(-length // PAGE), (shape.nope + shape.rope) ** -0.5
        slots = copies * batch * pages
        cache = torch.randn(slots * PAGE, shape.width, dtype=torch.bfloat16, device=device)
        tables = torch.randperm(slots, device=device).int().view(copies, batch, pages)
        lengths = torch.full((batch,), length, dtype=torch.int32, device=device)
        q = torch.randn(batch, tokens, shape.heads, shape.width, dtype=torch.bfloat16, device=device)
        rows = cache.view(slots, PAGE, -1)[tables[0, 0].long()].flatten(0, 1)[:length].float()
        eye = torch.eye(shape.latent, device=device).expand(shape.heads, -1, -1)
        want = reference.mla_absorbed(q[0].float(), rows, eye, eye, scale)
        return [partial(mla_decode, q, cache, table, lengths, scale) for table in tables], want[None]

    operations = decode_operations(shape, batch, tokens, length)
    name = f"{shape.name}, {batch} × {tokens} tokens, {length:,} rows"
    return Case("decode attention", name, make, decode_bytes(shape, batch, length), operations)


def prefill_case(shape: Shape, device: torch.device, tokens: int, total: int) -> Case:
    """Attention of `tokens` new tokens over `total` rows, keys and values written out."""

    def make(copies: int) -> tuple[list[Call], Tensor]:
        from thinkloop.kernels.mla_prefill import mla_prefill

        s, scale = shape, (shape.nope + shape.rope) ** -0.5

        def random(*sizes: int) -> Tensor:
            return torch.randn(*sizes, dtype=torch.bfloat16, device=device)

        q, rows = random(tokens, s.heads, s.nope + s.rope), random(total, s.width)
        w_uk = random(s.heads, s.nope, s.latent) * s.latent**-0.5
        w_uv = random(s.heads, s.latent, s.value) * s.latent**-0.5
        seen = rows[: total - tokens + _CHECKED].float()
        want = reference.mla_absorbed(q[:_CHECKED].float(), seen, w_uk.float(), w_uv.float(), scale)
        return [partial(mla_prefill, q, rows, w_uk, w_uv, scale)], want

    name = f"{shape.name}, {tokens:,} tokens, {total:,} rows"
    return Case("prefill attention", name, make, total * shape.width * 2, prefill_operations(shape, tokens, total))


def router_case(shape: Shape, device: torch.device, tokens: int) -> Case:
    """Choosing experts; the shares are what is compared."""

    def make(copies: int) -> tuple[list[Call], Tensor]:
        from thinkloop.kernels.router import route

        logits = torch.randn(tokens, shape.experts, device=device)
        bias = 0.1 * torch.randn(shape.experts, device=device)
        _, want = reference.route(logits, bias, top_k=shape.top_k)
        return [lambda: route(logits, bias, top_k=shape.top_k, scale=1.0, normalise=True)[1]], want

    nbytes = tokens * (4 * shape.experts + 8 * shape.top_k)
    return Case("router", f"{shape.name}, {tokens} tokens", make, nbytes, 0)


def norm_case(shape: Shape, device: torch.device, tokens: int) -> Case:
    """The norm with the residual's addition."""

    def make(copies: int) -> tuple[list[Call], Tensor]:
        from thinkloop.kernels.rms_norm import rms_norm

        x, residual = torch.randn(2, tokens, shape.hidden, dtype=torch.bfloat16, device=device)
        weight = torch.ones(shape.hidden, dtype=torch.bfloat16, device=device)
        want = reference.rms_norm(x + residual, weight, 1e-5)
        return [lambda: rms_norm(x, weight, 1e-5, residual=residual)], want

    return Case("norm", f"{shape.name}, {tokens} tokens", make, tokens * 8 * shape.hidden, 0)


def copy_rate(device: torch.device) -> float:
    """Bytes a second of a copy of 1 GiB, read and written."""
    source = torch.ones(1 << 28, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _seconds([lambda: target.copy_(source)])


def product_rate(device: torch.device) -> float:
    """Operations a second of a bfloat16 product of two square matrices of 8,192."""
    side = 8192
    a = torch.ones(side, side, dtype=torch.bfloat16, device=device)
    return 2 * side**3 / _seconds([lambda: a @ a])


def _seconds(calls: Sequence[Call]) -> float:
    """Of one call, in the median replay of a graph of all of them."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times: list[float] = []
    while len(times) < 5 or (sum(times) < _SECONDS and len(times) < 100):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    return median(times) / len(calls)
