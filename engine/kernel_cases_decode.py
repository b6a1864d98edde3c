"""What the kernel bench runs of a decode step, beside attention and INT4 experts: its products, the choice of experts, what lies
before and after attention, and experts in bfloat16 by torch's grouped products, to hold INT4 against.

As in `kernel_cases`, twins are in float32 and calls take turns through copies of the data. Where a small result stands beside a
large one, it is scaled up in both, so that an error in it counts as much.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from math import sqrt

import torch
import torch.nn.functional as F
from thinkloop.engine.kernel_cases import EPS, POSITIONS, Case, Prepared, chosen, copies, random_rows, spread
from thinkloop.engine.kernel_shapes import (
    FEW_TOKENS,
    SPLITS,
    Shape,
    absorb_bytes,
    absorb_operations,
    dense_bytes,
    expand_bytes,
    expand_operations,
    experts_operations,
    gate_bytes,
    gate_operations,
    linear_bytes,
)
from thinkloop.kernels import reference
from torch import Tensor


def step_cases(parts: Sequence[str], shape: Shape, device: torch.device) -> Iterator[Case]:
    """The cases of `parts` that are those of this module, for one model."""
    if "linear" in parts:
        for product in products(shape):
            yield from (product.case(shape, device, tokens) for tokens in FEW_TOKENS if tokens != 8)
    for part, make in (("gate", gate_case), ("absorb", absorb_case)):
        if part in parts:
            yield from (make(shape, device, tokens) for tokens in (1, 4, 16))
    if "expand" in parts:
        yield from (expand_case(shape, device, tokens, splits) for tokens, splits in SPLITS)
    if "bf16" in parts:
        dense = Dense(shape, device)
        yield from (dense.case(tokens) for tokens in FEW_TOKENS)
        del dense


@dataclass(frozen=True, slots=True, kw_only=True)
class Product:
    """One of a layer's products, by weights `rows × features`, and what stands before and after it."""

    name: str
    rows: int
    features: int
    norms: bool = False
    gated: bool = False
    residual: bool = False
    parts: int = 0

    def case(self, shape: Shape, device: torch.device, tokens: int) -> Case:
        """`linear` for `tokens` tokens."""
        nbytes = linear_bytes(
            tokens, self.rows, self.features, gated=self.gated, residual=self.residual, parts=self.parts
        )
        operations, name = 2 * tokens * self.rows * self.features, f"{shape.name}, {tokens} tokens"
        prepare = partial(self._prepare, tokens, device, copies(nbytes))
        return Case(f"linear {self.name}", name, prepare, nbytes, operations)

    def _prepare(self, tokens: int, device: torch.device, count: int) -> Prepared:
        from thinkloop.kernels.linear import Norm, linear

        norm = 1 + 0.1 * random_rows(self.features, device=device) if self.norms else None

        def call() -> partial[Tensor]:
            x = random_rows(tokens, self.features, device=device)
            weight = random_rows(self.rows, self.features, device=device).mul_(self.features**-0.5)
            residual = random_rows(tokens, self.rows, device=device) if self.residual else None
            add = torch.randn(tokens, self.parts, self.rows, device=device) if self.parts else None
            return partial(
                linear, x, weight, norm=None if norm is None else Norm(norm, EPS), gated=self.gated, residual=residual,
                add=add, settled=self.parts > 0,
            )  # fmt: skip

        calls = [call() for _ in range(count)]
        x, weight = (one.float() for one in calls[0].args)
        want = (x if norm is None else reference.rms_norm(x, norm.float(), EPS)) @ weight.T
        if self.gated:
            gate, up = want.chunk(2, dim=1)
            want = F.silu(gate) * up
        if (residual := calls[0].keywords["residual"]) is not None:
            want += residual.float()
        if (add := calls[0].keywords["add"]) is not None:
            want += add.sum(1)
        return Prepared([*calls], calls[0], want)


def products(shape: Shape) -> list[Product]:
    """Those of a layer, in the order of the step: `w_q` where queries are compressed, and the shared expert's two."""
    s, queries = shape, shape.heads * (shape.nope + shape.rope)
    found = [Product(name="w_in", rows=(s.q_rank or queries) + s.width, features=s.hidden, norms=True)]
    if s.q_rank:
        found.append(Product(name="w_q", rows=queries, features=s.q_rank, norms=True))
    found.append(Product(name="w_o", rows=s.hidden, features=s.heads * s.value, residual=True))
    if s.shared:
        found.append(Product(name="gate_up", rows=2 * s.shared, features=s.hidden, norms=True, gated=True))
        found.append(Product(name="down", rows=s.hidden, features=s.shared, residual=True, parts=s.top_k))
    return found


def gate_case(shape: Shape, device: torch.device, tokens: int) -> Case:
    """A layer's norm and choice of experts, by one launch where that pays, or by its parts. Compared are the normed rows; how
    good the chosen experts are, not their ids, as two may be equally good; and each share over the one that its id should
    have."""
    nbytes, s = gate_bytes(shape, tokens), shape

    def prepare() -> Prepared:
        from thinkloop.kernels.gate import gate, gate_pays
        from thinkloop.kernels.linear import linear
        from thinkloop.kernels.rms_norm import rms_norm
        from thinkloop.kernels.router import route

        norm, bias = 1 + 0.1 * random_rows(s.hidden, device=device), 0.1 * torch.randn(s.experts, device=device)
        counters = torch.zeros(tokens, dtype=torch.int32, device=device)

        def choose(x: Tensor, router: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            if gate_pays(tokens, router):
                return gate(x, norm, EPS, router, bias, counters, top_k=s.top_k)
            h = rms_norm(x, norm, EPS)
            return h, *route(linear(h, router, dtype=torch.float32), bias, top_k=s.top_k)

        calls = []
        for _ in range(copies(nbytes)):
            router = random_rows(s.experts, s.hidden, device=device).mul_(s.hidden**-0.5)
            calls.append(partial(choose, random_rows(tokens, s.hidden, device=device), router))
        x, router = (one.float() for one in calls[0].args)
        h, factor = reference.rms_norm(x, norm.float(), EPS), sqrt(s.top_k / s.hidden)
        scores = (h @ router.T).sigmoid()
        goodness = scores + bias
        best = goodness.topk(s.top_k).values

        def result() -> Tensor:
            h, ids, shares = calls[0]()
            own = scores.gather(1, ids.long())
            relative = shares / (own / own.sum(1, keepdim=True))
            return torch.cat([factor * h.float(), goodness.gather(1, ids.long()), relative], 1)

        return Prepared([*calls], result, torch.cat([factor * h, best, torch.ones_like(best)], 1))

    return Case("gate", f"{s.name}, {tokens} tokens", prepare, nbytes, gate_operations(s, tokens))


def absorb_case(shape: Shape, device: torch.device, tokens: int) -> Case:
    """Absorbing and rotating queries, writing the cache's row; compared are queries and rows."""
    nbytes, s = absorb_bytes(shape, tokens), shape

    def prepare() -> Prepared:
        from thinkloop.kernels.mla_absorb import absorb_and_store

        table = reference.rope_table(reference.inv_freq(s.rope, 1e4), 0, POSITIONS).to(device)
        norm, count = 1 + 0.1 * random_rows(s.latent, device=device), copies(nbytes)
        positions = torch.randint(POSITIONS, (count, tokens), device=device)
        slots = torch.randperm(count * tokens, device=device).view(count, tokens)
        cache = random_rows(count * tokens, s.width, device=device)
        calls = []
        for position, slot in zip(positions, slots, strict=True):
            q = random_rows(tokens, s.heads, s.nope + s.rope, device=device)
            row = random_rows(tokens, s.width, device=device)
            w_uk = random_rows(s.heads, s.nope, s.latent, device=device).mul_(s.nope**-0.5)
            calls.append(partial(absorb_and_store, q, row, norm, EPS, table, position, slot, cache, w_uk))
        first = calls[0].args
        q, row, w_uk, turn, factor = (
            first[0].float(),
            first[1].float(),
            first[8].float(),
            table[first[5]],
            sqrt(s.heads),
        )
        absorbed = torch.einsum("thn,hnc->thc", q[..., : s.nope], w_uk)
        queries = torch.cat([absorbed, reference.rope(q[..., s.nope :], turn)], 2).flatten(1)
        latent, key = torch.split(row, [s.latent, s.rope], 1)
        rows = torch.cat([reference.rms_norm(latent, norm.float(), EPS), reference.rope(key, turn)], 1)

        def result() -> Tensor:
            out = calls[0]()
            return torch.cat([out.flatten(1).float(), factor * cache[slots[0]].float()], 1)

        return Prepared([*calls], result, torch.cat([queries, factor * rows], 1))

    return Case("absorb", f"{s.name}, {tokens} tokens", prepare, nbytes, absorb_operations(s, tokens))


def expand_case(shape: Shape, device: torch.device, tokens: int, splits: int) -> Case:
    """The merge of attention's parts, and the heads' values."""
    nbytes, s = expand_bytes(shape, tokens, splits), shape

    def prepare() -> Prepared:
        from thinkloop.kernels.mla_expand import expand

        def data() -> tuple[Tensor, Tensor, Tensor]:
            part = torch.randn(tokens * s.heads, splits, s.latent, device=device)
            lse = torch.randn(tokens * s.heads, splits, device=device)
            return part, lse, random_rows(s.heads, s.latent, s.value, device=device).mul_(s.latent**-0.5)

        calls = [partial(expand, *data()) for _ in range(copies(nbytes))]
        part, lse, w_uv = calls[0].args
        weights = torch.exp2(lse - lse.amax(1, keepdim=True))
        latent = (part * (weights / weights.sum(1, keepdim=True))[..., None]).sum(1)
        want = torch.einsum("thc,hcv->thv", torch.unflatten(latent, 0, (tokens, s.heads)), w_uv.float())
        return Prepared([*calls], calls[0], want.flatten(1))

    name = f"{s.name}, {tokens} tokens, {splits} splits"
    return Case("expand", name, prepare, nbytes, expand_operations(s, tokens, splits))


class Dense:
    """One layer's random experts in bfloat16, made when the first case is prepared and gone with the last: K2's are 34 GB."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        self.shape, self.device = shape, device

    @cached_property
    def layer(self) -> tuple[Tensor, Tensor]:
        """Gate and up `[E, D, 2I]`, down `[E, I, D]`, filled expert by expert, so that nothing of their size is beside them."""
        s = self.shape
        gate_up, down = (
            torch.empty(s.experts, *sizes, dtype=torch.bfloat16, device=self.device)
            for sizes in ((s.hidden, 2 * s.inner), (s.inner, s.hidden))
        )
        for weight in (gate_up, down):
            for one in weight:
                one.normal_(0.0, one.shape[0] ** -0.5)
        return gate_up, down

    def case(self, tokens: int) -> Case:
        """`tokens` tokens that choose their experts uniformly. The bytes are those of the experts that were chosen."""
        s = self.shape
        ids, nbytes = chosen(s, self.device, tokens, partial(dense_bytes, s))
        name = f"{s.name}, {tokens} tokens"
        return Case("experts, bf16", name, partial(self._prepare, ids), nbytes, experts_operations(s, tokens))

    def _prepare(self, ids: list[Tensor]) -> Prepared:
        from thinkloop.engine.kernel_model import grouped_experts

        calls = []
        for one in ids:
            x, shares = (
                random_rows(len(one), self.shape.hidden, device=self.device),
                torch.rand(one.shape, device=self.device),
            )
            calls.append(partial(grouped_experts, x, one, shares, *self.layer))
        checked = spread(len(ids[0]))
        x, _, shares = calls[0].args[:3]
        want = torch.cat([self._twin(x[[t]], ids[0][t].long(), shares[[t]]) for t in checked])
        return Prepared([*calls], lambda: calls[0]()[checked], want)

    def _twin(self, x: Tensor, ids: Tensor, shares: Tensor) -> Tensor:
        """`reference.moe` of one token with only the experts that it chose."""
        own = torch.arange(len(ids))[None]
        gate_up, down = (weight[ids].float().transpose(1, 2) for weight in self.layer)
        return reference.moe(x.float(), own, shares, gate_up, down)
