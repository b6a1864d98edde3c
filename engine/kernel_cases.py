"""What the kernel bench runs: for each kernel and shape its calls on fresh random data, and what the first should give.

Twins are those in `kernels.reference`, in float32; for sampling it is the CPU's sampler. The calls of a case take turns through
so many copies of the data that 256 MB lie between two uses of the same. At most 256 copies are made: the inputs of smaller calls
(the router's, a few rows to norm) lie in the second cache level, as they do when the kernel before has just written them.

Kernels are imported when a case is prepared, so that the command line doesn't need Triton.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import fmean
from typing import Literal, get_args

import torch
from thinkloop.engine.kernel_shapes import (
    CONTEXTS,
    K2,
    MOONLIGHT,
    ROWS,
    TOKENS,
    Shape,
    decode_bytes,
    decode_operations,
    experts_bytes,
    experts_operations,
    norm_bytes,
    prefill_bytes,
    prefill_operations,
    rotation_bytes,
    router_bytes,
    sampling_bytes,
)
from thinkloop.engine.params import Sampling
from thinkloop.engine.sampler import Sampler
from thinkloop.kernels import reference
from torch import Tensor

Part = Literal[
    "experts",
    "decode",
    "prefill",
    "router",
    "norm",
    "rotation",
    "sampling",
    "linear",
    "gate",
    "absorb",
    "expand",
    "bf16",
]
PARTS: tuple[Part, ...] = get_args(Part)
ROTATED = 256 << 20
"""Bytes between two uses of the same data: five times an H200's second cache level."""
_MOST_COPIES = 256
_LAYERS_BYTES = 4 << 30
"""Copies of a layer's experts take no more than this. Moonlight's, 311 MB, are copied; K2's, 9.5 GB, are not: two calls of one
token share 2 % of their experts by chance."""
_CHECKED = 8
"""Tokens of a large step that are held against the twin, spread over it: the twin writes out every expert they chose."""
EPS = 1e-5
POSITIONS = 4096

Call = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Prepared:
    """Calls on data of their own each. `result()` makes the first one and gives, as one tensor, what should be `want`."""

    calls: list[Call]
    result: Callable[[], Tensor]
    want: Tensor


@dataclass(frozen=True, slots=True)
class Case:
    """`nbytes` and `operations` are those that one call needs at least."""

    kernel: str
    shape: str
    prepare: Callable[[], Prepared]
    nbytes: int
    operations: int


def copies(nbytes: int) -> int:
    """How many calls of `nbytes` each take turns, so that `ROTATED` bytes lie between two uses of the same data."""
    return min(1 + -(-ROTATED // nbytes), _MOST_COPIES)


def spread(count: int) -> list[int]:
    """Which of `count` tokens are checked: the first, the last, and some between."""
    steps = min(count, _CHECKED) - 1
    return [index * (count - 1) // max(steps, 1) for index in range(steps + 1)]


def cases(parts: Sequence[str], device: torch.device, shapes: Sequence[Shape] = (K2, MOONLIGHT)) -> Iterator[Case]:
    """Every case of `parts` for the models in `shapes`."""
    from thinkloop.engine.kernel_cases_decode import step_cases  # which takes the rest from here

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
        for part, make in (("router", router_case), ("norm", norm_case), ("rotation", rotation_case)):
            if part in parts:
                yield from (make(shape, device, tokens) for tokens in TOKENS)
        if "sampling" in parts:
            yield from (make(shape, device, rows) for make in (greedy_case, draw_case) for rows in ROWS)
        yield from step_cases(parts, shape, device)


def chosen(
    shape: Shape, device: torch.device, tokens: int, nbytes_of: Callable[[int], int]
) -> tuple[list[Tensor], int]:
    """Experts that `tokens` tokens choose uniformly, int32 `[T, K]` for each call, and the mean bytes of the distinct ones."""
    expected = shape.experts * (1 - (1 - shape.top_k / shape.experts) ** tokens)
    count = copies(nbytes_of(round(expected)))
    ids = [torch.rand(tokens, shape.experts, device=device).topk(shape.top_k).indices.int() for _ in range(count)]
    return ids, round(fmean(nbytes_of(len(torch.unique(one))) for one in ids))


class Experts:
    """One layer's random experts, made once for all numbers of tokens, and copies of it where it is small."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        from thinkloop.kernels.int4_moe import pack_experts

        self.shape, self.device = shape, device
        self.gate_up = _published(shape.experts, 2 * shape.inner, shape.hidden, device)
        self.down = _published(shape.experts, shape.hidden, shape.inner, device)
        one_token, whole = experts_bytes(shape, shape.top_k), experts_bytes(shape, shape.experts)
        packed = [pack_experts(*published) for published in (self.gate_up, self.down)]
        self.layers = [packed]
        for _ in range(min(copies(one_token), _LAYERS_BYTES // whole) - 1):
            self.layers.append([replace(one, weight=one.weight.clone(), scale=one.scale.clone()) for one in packed])

    def case(self, tokens: int) -> Case:
        """`tokens` tokens that choose their experts uniformly. The bytes are those of the experts that were chosen."""
        s = self.shape
        ids, nbytes = chosen(s, self.device, tokens, partial(experts_bytes, s))
        name = f"{s.name}, {tokens} tokens"
        return Case("experts", name, partial(self._prepare, ids), nbytes, experts_operations(s, tokens))

    def _prepare(self, ids: list[Tensor]) -> Prepared:
        from thinkloop.kernels.int4_moe import moe_int4

        x = [random_rows(len(one), self.shape.hidden, device=self.device) for one in ids]
        shares = [torch.rand(one.shape, device=self.device) for one in ids]
        calls = [
            partial(moe_int4, *data, *self.layers[index % len(self.layers)])
            for index, data in enumerate(zip(x, ids, shares, strict=True))
        ]
        checked = spread(len(ids[0]))
        want = torch.cat([self._twin(x[0][[t]], ids[0][t], shares[0][[t]]) for t in checked])
        return Prepared([*calls], lambda: calls[0]()[checked], want)

    def _twin(self, x: Tensor, ids: Tensor, shares: Tensor) -> Tensor:
        """`reference.moe_int4` of one token with only the experts that it chose."""
        own = torch.arange(len(ids))[None]
        chosen = [(packed[ids.long()], scale[ids.long()]) for packed, scale in (self.gate_up, self.down)]
        return reference.moe_int4(x.float(), own, shares, *chosen)


def _published(experts: int, rows: int, features: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Random experts in the published layout, their products of about unit size: nibbles have a root mean square of 4.6."""
    packed = torch.empty(experts, rows, features // 8, dtype=torch.int32, device=device).random_(-(2**31), 2**31 - 1)
    scale = torch.empty(experts, rows, features // 32, dtype=torch.bfloat16, device=device).uniform_(0.5, 1.5)
    return packed, scale.mul_(features**-0.5 / 4.6)


def decode_case(shape: Shape, device: torch.device, batch: int, tokens: int, length: int) -> Case:
    """Attention of `tokens` new tokens of each of `batch` sequences of `length` rows, in pages of any order."""
    nbytes, scale = decode_bytes(shape, batch, length), (shape.nope + shape.rope) ** -0.5

    def prepare() -> Prepared:
        from thinkloop.kernels.mla_decode import PAGE, mla_decode

        count, pages = copies(nbytes), -(-length // PAGE)
        slots = count * batch * pages
        cache = random_rows(slots * PAGE, shape.width, device=device)
        tables = torch.randperm(slots, device=device).int().view(count, batch, pages)
        lengths = torch.full((batch,), length, dtype=torch.int32, device=device)
        q = random_rows(batch, tokens, shape.heads, shape.width, device=device)
        eye = torch.eye(shape.latent, device=device).expand(shape.heads, -1, -1)

        def twin(sequence: int) -> Tensor:
            rows = cache.view(slots, PAGE, -1)[tables[0, sequence].long()].flatten(0, 1)[:length]
            return reference.mla_absorbed(q[sequence].float(), rows.float(), eye, eye, scale)

        calls = [partial(mla_decode, q, cache, table, lengths, scale) for table in tables]
        return Prepared([*calls], calls[0], torch.stack([twin(sequence) for sequence in range(batch)]))

    name = f"{shape.name}, {batch} × {tokens} tokens, {length:,} rows"
    return Case("decode attention", name, prepare, nbytes, decode_operations(shape, batch, tokens, length))


def prefill_case(shape: Shape, device: torch.device, tokens: int, total: int) -> Case:
    """Attention of `tokens` new tokens over `total` rows, keys and values written out."""
    nbytes, s, scale = prefill_bytes(shape, tokens, total), shape, (shape.nope + shape.rope) ** -0.5

    def data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        q, rows = (
            random_rows(tokens, s.heads, s.nope + s.rope, device=device),
            random_rows(total, s.width, device=device),
        )
        w_uk = random_rows(s.heads, s.nope, s.latent, device=device) * s.latent**-0.5
        return q, rows, w_uk, random_rows(s.heads, s.latent, s.value, device=device) * s.latent**-0.5

    def prepare() -> Prepared:
        from thinkloop.kernels.mla_prefill import mla_prefill

        calls = [partial(mla_prefill, *data(), scale) for _ in range(copies(nbytes))]
        q, rows, w_uk, w_uv = (one.float() for one in calls[0].args[:4])
        checked = spread(tokens)
        want = torch.cat(  # a token as the last of the rows that it sees
            [reference.mla_absorbed(q[[t]], rows[: total - tokens + t + 1], w_uk, w_uv, scale) for t in checked]
        )
        return Prepared([*calls], lambda: calls[0]()[checked], want)

    name = f"{s.name}, {tokens:,} tokens, {total:,} rows"
    return Case("prefill attention", name, prepare, nbytes, prefill_operations(s, tokens, total))


def router_case(shape: Shape, device: torch.device, tokens: int) -> Case:
    """Choosing experts. Compared are the shares, and those that the chosen ids should have: ids themselves may differ where
    two experts are equally good."""
    nbytes = router_bytes(shape, tokens)

    def prepare() -> Prepared:
        from thinkloop.kernels.router import route

        bias = 0.1 * torch.randn(shape.experts, device=device)
        logits = [torch.randn(tokens, shape.experts, device=device) for _ in range(copies(nbytes))]
        calls = [partial(route, one, bias, top_k=shape.top_k) for one in logits]
        _, want = reference.route(logits[0], bias, top_k=shape.top_k)

        def result() -> Tensor:
            ids, shares = calls[0]()
            scores = logits[0].sigmoid().gather(1, ids.long())
            return torch.cat([shares, scores / scores.sum(1, keepdim=True)])

        return Prepared([*calls], result, torch.cat([want, want]))

    return Case("router", f"{shape.name}, {tokens} tokens", prepare, nbytes, 0)


def norm_case(shape: Shape, device: torch.device, tokens: int) -> Case:
    """The norm with the residual's addition; compared are both."""
    nbytes = norm_bytes(shape, tokens)

    def prepare() -> Prepared:
        from thinkloop.kernels.rms_norm import rms_norm

        weight = 1 + 0.1 * random_rows(shape.hidden, device=device)
        pairs = [random_rows(2, tokens, shape.hidden, device=device).unbind() for _ in range(copies(nbytes))]
        calls = [partial(rms_norm, x, weight, EPS, residual=residual) for x, residual in pairs]
        x, residual = pairs[0]
        total = x.float() + residual.float()
        want = torch.cat([reference.rms_norm(total, weight.float(), EPS), total])
        return Prepared([*calls], lambda: torch.cat([calls[0](), residual]), want)

    return Case("norm", f"{shape.name}, {tokens} tokens", prepare, nbytes, 0)


def rotation_case(shape: Shape, device: torch.device, tokens: int) -> Case:
    """Rotating queries and key, norming the latent, writing the cache's row; compared are rotated channels and rows."""
    nbytes, s = rotation_bytes(shape, tokens), shape

    def prepare() -> Prepared:
        from thinkloop.kernels.rope_cache import rope_and_store

        table = reference.rope_table(reference.inv_freq(s.rope, 1e4), 0, POSITIONS).to(device)
        norm = 1 + 0.1 * random_rows(s.latent, device=device)
        count = copies(nbytes)
        positions = torch.randint(POSITIONS, (count, tokens), device=device)
        slots = torch.randperm(count * tokens, device=device).view(count, tokens)
        cache = random_rows(count * tokens, s.width, device=device)
        q = [random_rows(tokens, s.heads, s.nope + s.rope, device=device) for _ in range(count)]
        rows = [random_rows(tokens, s.width, device=device) for _ in range(count)]
        calls = [
            partial(rope_and_store, *data[:2], norm, EPS, table, *data[2:], cache)
            for data in zip(q, rows, positions, slots, strict=True)
        ]
        turn, (latent, key) = table[positions[0]], torch.split(rows[0].float(), [s.latent, s.rope], 1)
        pairs = reference.rope(q[0][..., s.nope :].float(), turn).flatten(1)
        want = torch.cat([pairs, reference.rms_norm(latent, norm.float(), EPS), reference.rope(key, turn)], 1)

        def result() -> Tensor:
            calls[0]()
            return torch.cat([q[0][..., s.nope :].flatten(1), cache[slots[0]]], 1)

        return Prepared([*calls], result, want)

    return Case("rotation", f"{s.name}, {tokens} tokens", prepare, nbytes, 0)


def greedy_case(shape: Shape, device: torch.device, rows: int) -> Case:
    """The best token of each row; compared are its logits."""

    def prepare() -> Prepared:
        from thinkloop.kernels.sampling import argmax

        logits = _logits(shape, device, rows)
        calls = [partial(argmax, one) for one in logits]
        return Prepared([*calls], lambda: logits[0].gather(1, calls[0]()[:, None])[:, 0], logits[0].amax(1))

    return Case("greedy", f"{shape.name}, {rows} rows", prepare, sampling_bytes(shape, rows), 0)


def draw_case(shape: Shape, device: torch.device, rows: int) -> Case:
    """A token of each row at temperature 1 and top-p 0.95. Compared is the draw: it lies within the token's stretch of the
    summed probabilities, which the CPU's sampler gives, and never falls on a token that top-p drops."""

    def prepare() -> Prepared:
        from thinkloop.kernels.sampling import sample

        logits = _logits(shape, device, rows)
        uniform = torch.rand(rows, dtype=torch.float64, device=device)
        temperature, top_p = torch.ones(rows, device=device), torch.full((rows,), 0.95, device=device)
        calls = [partial(sample, one, temperature=temperature, uniform=uniform, top_p=top_p) for one in logits]
        checked, sampler = spread(rows), Sampler(Sampling(temperature=1.0, top_p=0.95))
        chances = torch.stack([sampler.probabilities(logits[0][row]) for row in checked])

        def result() -> Tensor:
            token = calls[0]()[checked, None]
            chance, end = chances.gather(1, token), chances.cumsum(1).gather(1, token)
            within = torch.clamp(uniform[checked, None], end - chance, end)
            return torch.where(chance > 0, within, torch.nan)[:, 0]

        return Prepared([*calls], result, uniform[checked])

    return Case("draw, top-p", f"{shape.name}, {rows} rows", prepare, sampling_bytes(shape, rows), 0)


def _logits(shape: Shape, device: torch.device, rows: int) -> list[Tensor]:
    return [3 * torch.randn(rows, shape.vocab, device=device) for _ in range(copies(sampling_bytes(shape, rows)))]


def random_rows(*sizes: int, device: torch.device) -> Tensor:
    return torch.randn(*sizes, dtype=torch.bfloat16, device=device)
