"""On Hopper a split's result and its sum of weights are those of plain float32, whatever lies in the cache around its rows."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from thinkloop.kernels import mla_decode, mla_decode_hopper
from thinkloop.kernels.mla_decode_hopper import decode_parts, fits
from torch import Tensor

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
on_hopper = pytest.mark.skipif(not HOPPER, reason="needs a GPU of compute capability 9.0")
DEVICE = "cuda" if HOPPER else "cpu"
PAGE, WIDTH, LATENT = 64, 576, 512
SCALE = 0.05
LOG2_E = 1.4426950408889634

COMPILE = """
import json, subprocess, tempfile
from pathlib import Path
import triton
from thinkloop.kernels.mla_decode_hopper import compile_cases
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource

tool, found = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump", {}
for case in compile_cases():
    source = GluonASTSource(case.kernel, case.signature, case.constexprs, case.attrs)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": case.num_warps})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        code = subprocess.run([tool, "-sass", file.name], capture_output=True, text=True, check=True).stdout
    found[case.name] = {"warps": compiled.metadata.num_warps} | {
        part: code.count(part) for part in ("HGMMA.64x64x16", "HGMMA.64x128x16", "UTMALDG", "UTMASTG")}
print(json.dumps(found))
"""


def test_it_compiles_to_the_instructions_that_it_is_written_for() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert len(found) == 8
    for name, case in found.items():
        assert case.pop("warps") == 12, name
        # A product each for 16 of 576 columns; 16 of 64 rows and 2 chunks; loads of the queries, two tiles and the next: 3
        # copies each; results in 2 chunks
        assert case == {"HGMMA.64x64x16": 36, "HGMMA.64x128x16": 8, "UTMALDG": 12, "UTMASTG": 2}, name


@pytest.mark.parametrize(
    ("latent", "rope", "capability", "dtype", "served"),
    [
        (512, 64, 90, torch.bfloat16, True),
        (512, 64, 80, torch.bfloat16, False),
        (512, 64, 100, torch.bfloat16, False),
        (512, 64, 90, torch.float16, False),
        (256, 64, 90, torch.bfloat16, False),
        (512, 32, 90, torch.bfloat16, False),
    ],
)
def test_which_shapes_and_gpus_it_serves(
    latent: int, rope: int, capability: int, dtype: torch.dtype, served: bool
) -> None:
    assert fits(latent, rope, capability, dtype) is served


def test_nothing_is_compiled_for_another_gpu() -> None:
    assert list(mla_decode_hopper.compile_cases(80)) == []


def paged(lengths: list[int], pages: int | None = None, seed: int = 1) -> tuple[Tensor, Tensor, list[Tensor]]:
    """A cache that is no number wherever no row lies, a table with pages in any order and far outside behind a sequence's
    last, and each sequence's rows."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    pages = pages or max(-(-length // PAGE) for length in lengths) + 2
    order = torch.randperm(len(lengths) * pages + 3, generator=generator, device=DEVICE)[: len(lengths) * pages]
    table = order.view(len(lengths), pages).int()
    cache = torch.full(((len(lengths) * pages + 3) * PAGE, WIDTH), float("nan"), dtype=torch.bfloat16, device=DEVICE)
    rows = [torch.randn(length, WIDTH, generator=generator, device=DEVICE).bfloat16() for length in lengths]
    for index, own in enumerate(rows):
        place = torch.arange(len(own), device=DEVICE)
        cache[table[index, place // PAGE].long() * PAGE + place % PAGE] = own
        table[index, -(-len(own) // PAGE) :] = 1 << 24
    return cache, table, rows


def queries(batch: int, tokens: int, heads: int, seed: int = 2) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(batch, tokens, heads, WIDTH, generator=generator, device=DEVICE).bfloat16()


def ends(lengths: list[int]) -> Tensor:
    return torch.tensor(lengths, dtype=torch.int32, device=DEVICE)


def run(q: Tensor, cache: Tensor, table: Tensor, lengths: list[int], splits: int) -> tuple[Tensor, Tensor]:
    """Parts `[B, T·H, splits, C]` and logarithms `[B, T·H, splits]`; -2 where nothing was written."""
    batch, tokens, heads, _ = q.shape
    part = torch.full((batch * tokens * heads, splits, LATENT), -2.0, dtype=torch.bfloat16, device=DEVICE)
    lse = torch.full((batch * tokens * heads, splits), -2.0, device=DEVICE)
    decode_parts(q, cache, table, ends(lengths), SCALE, splits, part, lse)
    torch.cuda.synchronize()
    return part.view(batch, tokens * heads, splits, LATENT).float(), lse.view(batch, tokens * heads, splits)


def twin(query: Tensor, own: Tensor, splits: int) -> tuple[Tensor, Tensor]:
    """The same for one sequence, `[T·H, splits, C]`, and -2 where nothing is to be written."""
    tokens, heads, _ = query.shape
    length = len(own)
    share = max(math.ceil(math.ceil(length / splits) / PAGE), 1) * PAGE
    scores = query.float().flatten(0, 1) @ own.float().T * (SCALE * LOG2_E)  # [T·H, S]
    seen = length - tokens + torch.arange(tokens * heads, device=DEVICE) // heads + 1
    scores.masked_fill_(torch.arange(length, device=DEVICE) >= seen[:, None], float("-inf"))
    part = torch.full((tokens * heads, splits, LATENT), -2.0, device=DEVICE)
    lse = torch.full((tokens * heads, splits), float("-inf"), device=DEVICE)
    for split in range(-(-length // share)):
        some = scores[:, split * share : (split + 1) * share]
        most = some.amax(1, keepdim=True).clamp(min=-1e30)
        weights = torch.exp2(some - most)
        total = weights.sum(1, keepdim=True)
        part[:, split] = weights @ own[split * share : (split + 1) * share, :LATENT].float() / total.clamp(min=1e-30)
        lse[:, split] = (most + total.log2()).squeeze(1)
    return part, lse


def compare(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> None:
    """With where they differ: per split, and per 16 query rows and 64 columns of the worst split."""
    allowed = 2**-7  # weights and results are rounded to 8 bits, 2^-8 each where all weights of a row err to one side
    (part, lse), (want_part, want_lse) = got, want
    rows = lambda x: torch.nn.functional.pad(x, (0, 0, 0, -len(x) % 16)).view(-1, 16, LATENT // 64, 64)  # noqa: E731
    size = lambda x: rows(x).square().sum((1, 3)).sqrt()  # noqa: E731
    error = (part - want_part).square().sum(2).sqrt() / want_part.square().sum(2).sqrt().clamp(min=1e-3)
    error = error.nan_to_num(nan=1e9)
    worst = int(error.amax(0).argmax())
    blocks = size(part[:, worst] - want_part[:, worst]) / size(want_part[:, worst]).clamp(min=1e-3)
    about = (
        f"largest error {float(error.max()):.2e} in split {worst} of {part.shape[1]}\nby split "
        f"{[f'{float(x):.1e}' for x in error.amax(0)[:12]]}\nby 16 query rows (down) and 64 columns of split {worst}:\n"
        + "\n".join(" ".join(f"{float(x):8.1e}" for x in line) for line in blocks)
        + f"\nlogarithms (got, wanted), query rows 0, 1, 8, 16: {[(float(lse[r, worst]), float(want_lse[r, worst])) for r in (0, 1, 8, 16) if r < len(lse)]}"  # noqa: E501
    )
    print(f"largest error {float(error.max()):.2e}")
    assert torch.equal(lse.isneginf(), want_lse.isneginf()), about
    difference = (lse - want_lse).nan_to_num(nan=0.0, posinf=1e9, neginf=1e9).abs().max()
    assert difference < 1e-3, f"logarithms differ by {float(difference)}\n{about}"
    assert error.max() < allowed, about


def check(lengths: list[int], tokens: int, heads: int, splits: int) -> None:
    cache, table, rows = paged(lengths)
    q = queries(len(lengths), tokens, heads)
    part, lse = run(q, cache, table, lengths, splits)
    for index, own in enumerate(rows):
        compare((part[index], lse[index]), twin(q[index], own, splits))


@on_hopper
def test_one_tile() -> None:
    check([64], 1, 64, 1)


@on_hopper
def test_two_tiles() -> None:
    check([128], 1, 64, 1)


@on_hopper
@pytest.mark.parametrize("tiles", [3, 4, 5, 17])
def test_more_tiles_than_there_is_room_for(tiles: int) -> None:
    check([64 * tiles], 1, 64, 1)


@on_hopper
@pytest.mark.parametrize("length", [1, 7, 63, 65, 100, 191])
def test_a_last_tile_with_no_numbers_behind_its_rows(length: int) -> None:
    check([length], 1, 64, 1)


@on_hopper
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("length", [66, 200])
def test_a_token_sees_the_rows_up_to_its_own(tokens: int, length: int) -> None:
    check([length], tokens, 64, 2)


@on_hopper
def test_fewer_rows_than_tokens() -> None:
    cache, table, rows = paged([2])
    q = queries(1, 4, 64)
    part, lse = run(q, cache, table, [2], 1)
    assert lse[0, :128].isneginf().all()
    assert (part[0, :128] == 0).all()
    want_part, want_lse = twin(q[0, 2:], rows[0], 1)
    compare((part[0, 128:], lse[0, 128:]), (want_part, want_lse))


@on_hopper
@pytest.mark.parametrize("heads", [5, 40, 96])
@pytest.mark.parametrize("tokens", [1, 3])
def test_heads_that_fill_no_tile_of_queries(heads: int, tokens: int) -> None:
    check([150, 3, 700], tokens, heads, 3)


@on_hopper
@pytest.mark.parametrize("splits", [1, 2, 5, 132])
def test_sequences_of_all_lengths(splits: int) -> None:
    check([1, 64, 65, 1000, 4097], 2, 64, splits)


@on_hopper
def test_a_split_without_rows_reads_and_writes_nothing_but_its_logarithm() -> None:
    cache, table, rows = paged([70, 0])
    table[1] = 1 << 30
    q = queries(2, 1, 64)
    part, lse = run(q, cache, table, [70, 0], 4)
    assert lse[1].isneginf().all()
    assert (part[1] == -2).all()
    assert (part[0, :, 2:] == -2).all()
    compare((part[0], lse[0]), twin(q[0], rows[0], 4))


@on_hopper
def test_a_long_sequence() -> None:
    check([131_072], 1, 64, 132)


@on_hopper
def test_a_long_sequence_of_moonlight() -> None:
    check([100_003], 1, 16, 132)


@on_hopper
def test_large_scores_do_not_overflow_and_growing_maxima_are_followed() -> None:
    cache, table, rows = paged([64 * 9 + 5])
    q = queries(1, 1, 64)
    place = torch.arange(len(rows[0]), device=DEVICE)
    grown = (rows[0].float() * (1 + place[:, None] / 40)).bfloat16()
    cache[table[0, place // PAGE].long() * PAGE + place % PAGE] = grown
    part, lse = run(4 * q, cache, table, [len(grown)], 1)
    assert lse.isfinite().all()
    want_part, want_lse = twin(4 * q[0], grown, 1)
    # A weight that is nearly the whole sum is rounded to 8 bits, and the sum isn't
    torch.testing.assert_close(lse[0], want_lse, rtol=1e-4, atol=1e-3)
    assert float((part[0] - want_part).norm() / want_part.norm()) < 1e-2


@on_hopper
def test_rows_lie_beyond_two_thousand_million_values() -> None:
    page = (1 << 31) // (PAGE * WIDTH) + 1
    cache = torch.empty((page + 1) * PAGE, WIDTH, dtype=torch.bfloat16, device=DEVICE)  # 4 GB, one page of it touched
    rows = torch.randn(PAGE, WIDTH, device=DEVICE).bfloat16()
    cache[page * PAGE :] = rows
    q = queries(1, 1, 64)
    part, lse = run(q, cache, torch.tensor([[page]], dtype=torch.int32, device=DEVICE), [PAGE], 1)
    compare((part[0], lse[0]), twin(q[0], rows, 1))


@on_hopper
def test_the_same_input_gives_the_same_bits() -> None:
    cache, table, _ = paged([9000])
    q = queries(1, 1, 64)
    first, again = (run(q, cache, table, [9000], 20) for _ in range(2))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])


@on_hopper
def test_it_writes_what_the_other_kernel_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mla_decode, "_hopper", lambda: None)
    cache, table, _ = paged([5000, 300])
    q = queries(2, 2, 64)
    part, lse = run(q, cache, table, [5000, 300], 8)
    want_part, want_lse = mla_decode.decode_parts(q, cache, table, ends([5000, 300]), SCALE, splits=8)
    written = want_lse.view(lse.shape) > float("-inf")
    assert torch.equal(written, lse > float("-inf"))
    torch.testing.assert_close(lse[written], want_lse.view(lse.shape)[written], rtol=1e-4, atol=1e-3)
    difference = part[written] - want_part.view(part.shape)[written]
    assert float(difference.norm() / part[written].norm()) < 6e-3


@on_hopper
def test_in_a_graph_it_follows_lengths_and_queries_that_kernels_before_it_write() -> None:
    cache, table, rows = paged([3000])
    source, q = queries(1, 1, 64), torch.zeros(1, 1, 64, WIDTH, dtype=torch.bfloat16, device=DEVICE)
    lengths, wanted = ends([64]), ends([64])
    part = torch.empty(64, 12, LATENT, dtype=torch.bfloat16, device=DEVICE)
    lse = torch.empty(64, 12, device=DEVICE)

    def step() -> None:
        lengths.copy_(wanted)
        torch.mul(source, 1.0, out=q)
        decode_parts(q, cache, table, lengths, SCALE, 12, part, lse)
        decode_parts(q, cache, table, lengths, SCALE, 12, part, lse)  # one after the other, as a dependent launch

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for length in (3000, 700, 65, 2999):
        wanted.fill_(length)
        source.mul_(-1)
        part.fill_(-2.0)
        graph.replay()
        torch.cuda.synchronize()
        compare((part.float(), lse), twin(source[0], rows[0][:length], 12))


def arguments() -> dict[str, Any]:
    return {
        "q": torch.zeros(1, 2, 4, WIDTH, dtype=torch.bfloat16), "cache": torch.zeros(64, WIDTH, dtype=torch.bfloat16),
        "table": torch.zeros(1, 1, dtype=torch.int32), "lengths": torch.ones(1, dtype=torch.int32), "scale": 0.1,
        "splits": 3, "part": torch.zeros(8, 3, LATENT, dtype=torch.bfloat16), "lse": torch.zeros(8, 3),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("q", torch.zeros(1, 2, 4, WIDTH)),
        ("q", torch.zeros(1, 2, 4, 80, dtype=torch.bfloat16)),
        ("q", torch.zeros(8 * WIDTH + 1, dtype=torch.bfloat16)[1:].view(1, 2, 4, WIDTH)),
        ("cache", torch.zeros(64, WIDTH)),
        ("cache", torch.zeros(WIDTH, 64, dtype=torch.bfloat16).T),
        ("table", torch.zeros(2, 1, dtype=torch.int32)),
        ("lengths", torch.ones(1, dtype=torch.int64)),
        ("scale", -0.1),
        ("part", torch.zeros(8, 2, LATENT, dtype=torch.bfloat16)),
        ("part", torch.zeros(8, 3, LATENT)),
        ("part", torch.zeros(8, 3, LATENT, dtype=torch.float16)),
        ("lse", torch.zeros(8, 3, dtype=torch.bfloat16)),
    ],
)
def test_what_does_not_fit_is_named(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"`{name}` must"):
        decode_parts(**(arguments() | {name: value}))
