"""INT4 experts in the order in which a tensor core's registers hold them, so that unpacking needs no shuffle.

In `mma.m16n8k16` (and in `wgmma`, with A in registers) lane `4r + c` of a warp holds, of each 16 features, numbers
`8·half + 2c + pair` of rows r and r + 8. A *granule* is therefore 8 rows by 128 features: 32 lanes times 16 bytes, one
128-bit load a lane, and all 32 nibbles that a lane loads are its own fragments of row r. With a feature written as
`64·ihi + 32·jhi + 16·ilo + 8·jlo + 2·c + pair`:

- a granule is int32 `[r 8, c 4, ihi 2, ilo 2]`; a word keeps nibble `(pair, jhi, jlo)` at bit `16·pair + 8·jhi + 4·jlo`,
  so that one mask yields a bfloat16 pair, and a word spans the two scale groups `2·ihi` and `2·ihi + 1`;
- scales lie as `[r 8, group 4]`: one 32-bit load gives both scales of a word.

Granules of the same 8 rows follow each other (28 KB for 7168 features). Features are padded with zeros to a multiple of
128; K2 and Moonlight need none: 7168, 2048 and 1408 = 11·128.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from thinkloop.kernels.reference import GROUP
from thinkloop.kernels.target import cast
from torch import Tensor

GRANULE_ROWS = 8
GRANULE_FEATURES = 128

_PARTS = (2, 2, 2, 2, 4, 2)  # of a feature's number within a granule: ihi, jhi, ilo, jlo, c, pair


@dataclass(frozen=True, slots=True)
class PackedExperts:
    """E matrices of `rows × features`: `weight` int32 `[E, rows/8, F]`, `scale` bfloat16 `[E, rows/8, F/4]`, where F is
    `features` rounded up to a multiple of 128. Experts are independent: dimension 0 may be sliced and concatenated."""

    weight: Tensor
    scale: Tensor
    rows: int
    features: int

    @property
    def experts(self) -> int:
        """Number of matrices E."""
        return self.weight.shape[0]


def padded_features(features: int) -> int:
    """`features` rounded up to whole granules."""
    return -(-features // GRANULE_FEATURES) * GRANULE_FEATURES


def pack_experts(packed: Tensor, scale: Tensor) -> PackedExperts:
    """Repacks published INT4 without loss, one expert at a time: the scratch is about 3 bytes a weight of one expert.

    `packed` is int32 `[E, N, K/8]` (offset-binary q + 8, lowest nibble first), `scale` bfloat16 `[E, N, K/32]`; N is a
    multiple of 8 and K of 32. Raises ValueError for other shapes and types.
    """
    if packed.dim() != 3 or packed.dtype != torch.int32:
        raise ValueError(f"packed must be int32 [E, N, K/8], not {packed.dtype} {list(packed.shape)}")
    experts, rows, features = packed.shape[0], packed.shape[1], 8 * packed.shape[2]
    if rows % GRANULE_ROWS or features % GROUP:
        raise ValueError(f"packed must have rows in eights and features in {GROUP}s, not {rows} × {features}")
    if scale.dtype != torch.bfloat16 or list(scale.shape) != [experts, rows, features // GROUP]:
        expected = [experts, rows, features // GROUP]
        raise ValueError(f"scale must be bfloat16 {expected}, not {scale.dtype} {list(scale.shape)}")
    padded = padded_features(features)
    shape = (experts, rows // GRANULE_ROWS)
    weight = torch.empty(*shape, padded, dtype=torch.int32, device=packed.device)
    factors = torch.empty(*shape, padded // 4, dtype=torch.bfloat16, device=packed.device)
    for expert in range(experts):
        weight[expert] = _pack_weight(packed[expert], padded)
        factors[expert] = _pack_scale(scale[expert], padded)
    return PackedExperts(weight, factors, rows, features)


def _pack_weight(packed: Tensor, padded: int) -> Tensor:
    """`[N, K/8]` -> `[N/8, F]`."""
    rows = packed.shape[0]
    pairs = packed.contiguous().view(torch.uint8)  # [N, K/2], little-endian: lowest nibble first
    nibbles = torch.stack([pairs & 15, pairs >> 4], dim=-1).flatten(-2)
    nibbles = F.pad(nibbles, (0, padded - nibbles.shape[-1]), value=8)  # q = 0
    parts = nibbles.view(
        -1, GRANULE_ROWS, padded // GRANULE_FEATURES, *_PARTS
    )  # [n, r, k, ihi, jhi, ilo, jlo, c, pair]
    low, high = parts.permute(0, 2, 1, 7, 3, 5, 8, 4, 6).unbind(-1)  # [n, k, r, c, ihi, ilo, pair, jhi], jlo 0 and 1
    return (low | high << 4).flatten().view(torch.int32).view(rows // GRANULE_ROWS, padded)


def _pack_scale(scale: Tensor, padded: int) -> Tensor:
    """`[N, K/32]` -> `[N/8, F/4]`."""
    rows, groups = scale.shape
    whole = F.pad(scale, (0, padded // GROUP - groups))
    parts = whole.view(-1, GRANULE_ROWS, padded // GRANULE_FEATURES, GRANULE_FEATURES // GROUP)  # [n, r, k, group]
    return parts.transpose(1, 2).reshape(rows // GRANULE_ROWS, padded // 4)


def unpack_experts(experts: PackedExperts) -> tuple[Tensor, Tensor]:
    """The inverse of `pack_experts`: int32 `[E, N, K/8]` and bfloat16 `[E, N, K/32]` in the published layout."""
    rows, features, padded = experts.rows, experts.features, padded_features(experts.features)
    packed = torch.stack([_unpack_weight(one, padded)[:, : features // 8] for one in experts.weight])
    granules = padded // GRANULE_FEATURES
    scale = experts.scale.view(-1, rows // GRANULE_ROWS, granules, GRANULE_ROWS, GRANULE_FEATURES // GROUP)
    scale = scale.transpose(2, 3).reshape(-1, rows, padded // GROUP)
    return packed.contiguous(), scale[..., : features // GROUP].contiguous()


def _unpack_weight(weight: Tensor, padded: int) -> Tensor:
    """`[N/8, F]` -> `[N, F/8]`."""
    pairs = weight.contiguous().view(torch.uint8).view(-1, padded // GRANULE_FEATURES, GRANULE_ROWS, 4, 2, 2, 2, 2)
    nibbles = torch.stack([pairs & 15, pairs >> 4], dim=-1)  # [n, k, r, c, ihi, ilo, pair, jhi, jlo]
    values = nibbles.permute(0, 2, 1, 4, 7, 5, 8, 3, 6)  # [n, r, k, ihi, jhi, ilo, jlo, c, pair]
    values = values.reshape(-1, padded // 2, 2)
    return (values[..., 0] | values[..., 1] << 4).view(torch.int32)


# A word holds four bfloat16 pairs. A nibble n under the exponent of 128 reads as 128 + n, exactly; the subtraction of 136
# is exact too, so the product with the scale is the only rounding. fma, as sm_80 has no plain bf16x2 subtraction.
_UNPACK = tl.constexpr("""{
.reg .b16 l, h;
.reg .b32 low, high, t, a, b, c, d, one, offset, zero;
mov.b32 one, 0x3F803F80;
mov.b32 offset, 0xC308C308;
mov.b32 zero, 0x80008000;
mov.b32 {l, h}, $9;
mov.b32 low, {l, l};
mov.b32 high, {h, h};
lop3.b32 a, $8, 0x000F000F, 0x43004300, 0xEA;
shr.u32 t, $8, 4;
lop3.b32 b, t, 0x000F000F, 0x43004300, 0xEA;
shr.u32 t, $8, 8;
lop3.b32 c, t, 0x000F000F, 0x43004300, 0xEA;
shr.u32 t, $8, 12;
lop3.b32 d, t, 0x000F000F, 0x43004300, 0xEA;
fma.rn.bf16x2 a, a, one, offset;
fma.rn.bf16x2 b, b, one, offset;
fma.rn.bf16x2 c, c, one, offset;
fma.rn.bf16x2 d, d, one, offset;
fma.rn.bf16x2 a, a, low, zero;
fma.rn.bf16x2 b, b, low, zero;
fma.rn.bf16x2 c, c, high, zero;
fma.rn.bf16x2 d, d, high, zero;
mov.b32 {$0, $1}, a;
mov.b32 {$2, $3}, b;
mov.b32 {$4, $5}, c;
mov.b32 {$6, $7}, d;
}""")


@triton.jit
def _nibble(b_words, b_factor, SHIFT: tl.constexpr):
    return cast((((b_words >> SHIFT) & 15) - 8).to(tl.float32) * b_factor, tl.bfloat16, True)


@triton.jit
def unpack_words(b_words, b_scales, INTERPRET: tl.constexpr):
    """int32 words and pairs of scales, same shape -> bfloat16 `[..., pair, jhi, jlo]` named as above."""
    if INTERPRET:
        low = (b_scales << 16).to(tl.float32, bitcast=True)
        high = (b_scales & -65536).to(tl.float32, bitcast=True)
        a0, a1 = _nibble(b_words, low, 0), _nibble(b_words, low, 16)
        b0, b1 = _nibble(b_words, low, 4), _nibble(b_words, low, 20)
        c0, c1 = _nibble(b_words, high, 8), _nibble(b_words, high, 24)
        d0, d1 = _nibble(b_words, high, 12), _nibble(b_words, high, 28)
    else:
        a0, a1, b0, b1, c0, c1, d0, d1 = tl.inline_asm_elementwise(
            _UNPACK, "=h,=h,=h,=h,=h,=h,=h,=h,r,r", [b_words, b_scales], (tl.bfloat16,) * 8, is_pure=True, pack=1
        )
    return tl.join(tl.join(tl.join(a0, a1), tl.join(c0, c1)), tl.join(tl.join(b0, b1), tl.join(d0, d1)))
