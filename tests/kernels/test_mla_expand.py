"""The splits' results, merged and expanded, are those of one softmax over all rows and the reference's last product."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from thinkloop.kernels.mla_expand import MAX_ROWS, expand, expand_tiles
from thinkloop.kernels.target import Chip
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAN, EMPTY = float("nan"), float("-inf")
ON = Chip(90, 132)


def make(queries: int, splits: int, latent: int) -> tuple[Tensor, Tensor]:
    """Partial results and base-2 logarithms of which every third is empty, its part no number; the last query has none."""
    generator = torch.Generator().manual_seed(0)
    part = torch.randn(queries, splits, latent, generator=generator)
    lse = 4 * torch.randn(queries, splits, generator=generator)
    order = torch.arange(queries * splits).view(queries, splits)
    lse[order % 3 == 2] = EMPTY
    lse[-1] = EMPTY
    part[lse == EMPTY] = NAN
    return part.to(DEVICE), lse.to(DEVICE)


def weights(heads: int, latent: int, value: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    w_uv: Tensor = torch.randn(heads, latent, value, generator=generator) / latent**0.5
    return w_uv.bfloat16().to(DEVICE)


def merged(part: Tensor, lse: Tensor) -> Tensor:
    """float32 `[Q, C]`, by the weights themselves."""
    shares = torch.exp2(lse - lse.amax(1, keepdim=True).clamp_min(-1e30))
    total = shares.sum(1, keepdim=True)
    values = torch.where(lse[..., None] == EMPTY, 0.0, part.float())
    return torch.einsum("qs,qsc->qc", shares / torch.where(total > 0, total, 1.0), values)


def expanded(part: Tensor, lse: Tensor, w_uv: Tensor) -> Tensor:
    """float32 `[T, H·V]`; the latent is rounded to bfloat16 as `expand` rounds it."""
    latent = torch.unflatten(merged(part, lse).bfloat16().float(), 0, (-1, w_uv.shape[0]))
    return torch.einsum("thc,hcv->thv", latent, w_uv.float()).flatten(1)


def error(out: Tensor, twin: Tensor) -> float:
    return float((out.float() - twin).norm() / twin.norm())


def eye(heads: int, latent: int) -> Tensor:
    """What leaves the merged latent as it is."""
    return torch.eye(latent).expand(heads, -1, -1).bfloat16().contiguous().to(DEVICE)


@pytest.mark.parametrize("latent", [16, 32, 512])
@pytest.mark.parametrize("splits", [1, 2, 7, 33, 132])
def test_the_merge_is_one_softmax(splits: int, latent: int) -> None:
    part, lse = make(5, splits, latent)
    out = expand(part, lse, eye(5, latent), torch.float32)
    torch.testing.assert_close(out.view(5, latent), merged(part, lse), rtol=2**-8 + 1e-5, atol=1e-5)
    assert torch.equal(out, out.bfloat16().float())  # the latent is rounded once
    torch.testing.assert_close(expand(part, lse - 5000, eye(5, latent), torch.float32), out, rtol=2**-7, atol=4e-3)


def test_results_may_be_bfloat16() -> None:
    part, lse = make(6, 5, 32)
    w_uv = weights(3, 32, 16)
    assert error(expand(part.bfloat16(), lse, w_uv), expanded(part.bfloat16(), lse, w_uv)) < 4e-3


@pytest.mark.parametrize(
    ("tokens", "heads", "splits", "latent", "value"),
    [
        (1, 3, 1, 512, 128), (1, 3, 33, 32, 16), (1, 2, 132, 32, 128), (4, 3, 7, 32, 16), (5, 3, 4, 512, 16),
        (16, 2, 2, 64, 32), (17, 1, 3, 32, 64), (32, 3, 1, 16, 16), (1, 128, 3, 16, 64),
    ],
)  # fmt: skip
def test_it_is_the_references_product(tokens: int, heads: int, splits: int, latent: int, value: int) -> None:
    part, lse = make(tokens * heads, splits, latent)
    w_uv = weights(heads, latent, value)
    out = expand(part, lse, w_uv)
    assert out.shape == (tokens, heads * value)
    assert out.dtype == torch.bfloat16
    assert error(out, expanded(part, lse, w_uv)) < 4e-3
    assert (out[-1, -value:] == 0).all()  # of the query without any split


def test_sums_are_float32() -> None:
    part, lse = make(2 * 3, 4, 512)
    w_uv = weights(3, 512, 16)
    assert error(expand(part, lse, w_uv, torch.float32), expanded(part, lse, w_uv)) < 1e-3


def test_a_token_is_the_same_alone_and_among_others() -> None:
    part, lse = make(MAX_ROWS * 2, 3, 64)
    w_uv = weights(2, 64, 32)
    out = expand(part, lse, w_uv)
    for tokens in (1, 2, 16):
        assert torch.equal(expand(part[: 2 * tokens], lse[: 2 * tokens], w_uv), out[:tokens])


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("part", {"part": torch.zeros(6, 32)}),
        ("part", {"part": torch.zeros(6, 4, 32, dtype=torch.float16)}),
        ("part", {"part": torch.zeros(4, 6, 32).transpose(0, 1)}),
        ("part", {"part": torch.zeros(0, 4, 32)}),
        ("part", {"part": torch.zeros(6, 4, 24)}),
        ("part", {"part": torch.zeros(7, 4, 32), "lse": torch.zeros(7, 4)}),
        ("part", {"part": torch.zeros(99, 4, 32), "lse": torch.zeros(99, 4)}),
        ("lse", {"lse": torch.zeros(6, 5)}),
        ("lse", {"lse": torch.zeros(6, 4, dtype=torch.bfloat16)}),
        ("lse", {"lse": torch.zeros(6, 0), "part": torch.zeros(6, 0, 32)}),
        ("w_uv", {"w_uv": torch.zeros(3, 16, 16, dtype=torch.bfloat16)}),
        ("w_uv", {"w_uv": torch.zeros(3, 32, 16)}),
        ("w_uv", {"w_uv": torch.zeros(3, 32, 24, dtype=torch.bfloat16)}),
        ("w_uv", {"w_uv": torch.zeros(3, 16, 32, dtype=torch.bfloat16).transpose(1, 2)}),
        ("w_uv", {"w_uv": torch.zeros(3 * 32 * 16 + 1, dtype=torch.bfloat16, device=DEVICE)[1:].view(3, 32, 16)}),
    ],
)
def test_what_does_not_fit_is_named(name: str, change: dict[str, Any]) -> None:
    arguments = {"part": torch.zeros(6, 4, 32), "lse": torch.zeros(6, 4), "w_uv": weights(3, 32, 16)} | change
    with pytest.raises(ValueError, match=f"`{name}` must"):
        expand(**{key: value.to(DEVICE) for key, value in arguments.items()})


@pytest.mark.parametrize(("heads", "columns"), [(8, 16), (16, 16), (32, 32), (64, 64), (128, 64)])
def test_every_sm_has_its_share_of_the_weights(heads: int, columns: int) -> None:
    assert expand_tiles(1, heads, 128, 16, ON).columns == columns


@pytest.mark.parametrize("tokens", [1, 3, 16, 17, 32])
@pytest.mark.parametrize("splits", [1, 2, 33])
@pytest.mark.parametrize("value", [16, 128])
def test_a_program_has_all_tokens_in_its_registers(tokens: int, splits: int, value: int) -> None:
    tiles = expand_tiles(tokens, 64, value, splits, ON)
    assert value % tiles.columns == 0
    assert 16 <= tiles.rows >= tokens
    assert tiles.rows % tiles.tokens == 0
    assert tiles.tokens * tiles.part * 512 <= 64 * 32 * tiles.num_warps  # values that are being merged, 64 a thread


def test_only_a_wide_tile_on_hopper_is_turned() -> None:
    assert expand_tiles(1, 64, 128, 16, ON).turned
    assert expand_tiles(1, 128, 64, 16, ON).turned  # the product above that is
    assert not expand_tiles(1, 64, 128, 16, Chip(80, 108)).turned
    assert not expand_tiles(1, 16, 128, 16, ON).turned
