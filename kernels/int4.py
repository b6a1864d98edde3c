"""INT4 experts on the CPU and any other torch device: products straight from packed weights, twins of
`reference.moe_int4`.

Two layouts, both 4 bits a weight plus a scale per 32:
- *planes*: int8 `[E, K/2, N]`, the two's complement of feature k in the low nibble, of feature k + K/2 in the high one.
  Two integer ops give both halves times 16 as signed bytes, with no subtraction; the 1/16 is in the scale. Plain
  torch, exact in float32.
- *torch's own* `_weight_int4pack_mm_for_cpu`, bfloat16 only (its float32 path is scalar code): 11 GB/s a core, which its
  arithmetic sets, not memory. Many tokens go through the matrix written out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from thinkloop.kernels.reference import GROUP, unpack_int4
from torch import Tensor

_PANEL = 64


@dataclass(frozen=True, slots=True)
class Planes:
    """Packed matrices of E experts: `weight` int8 `[E, K/2, N]`, `scale` float32 `[E, K/32, N]`, already divided by
    16."""

    weight: Tensor
    scale: Tensor

    @property
    def features(self) -> int:
        """Input features K."""
        return 2 * self.weight.shape[1]


def to_planes(packed: Tensor, scale: Tensor) -> Planes:
    """Repacks published INT4 (`packed [E, N, K/8]`, `scale [E, N, K/32]`) without loss."""
    values = unpack_int4(packed).transpose(-1, -2)  # [E, K, N]
    low, high = values.chunk(2, dim=1)
    return Planes((low & 15 | high << 4).contiguous(), (scale.float().transpose(-1, -2) / 16).contiguous())


def dequantise_planes(planes: Planes, expert: int, dtype: torch.dtype) -> Tensor:
    """One expert's matrix, `[K, N]`."""
    weight = planes.weight[expert]  # [K/2, N]
    grouped = torch.cat([weight << 4, weight & -16]).view(-1, GROUP, weight.shape[1])  # [K/32, 32, N], 16 times as much
    return (grouped.float() * planes.scale[expert][:, None]).view(planes.features, -1).to(dtype)


@dataclass(frozen=True, slots=True)
class TorchInt4:
    """Packed matrices in torch's CPU layout: uint8 `[E, N, K/2]`, bfloat16 scale and zero `[E, K/32, N, 2]`.

    Under AVX-512 the bytes are really `[N/64, K, 32]`: row d of 64 in the low nibble of byte d, row d + 32 in the high
    one, both plus 8."""

    weight: Tensor
    scale: Tensor


def fits_torch_int4(rows: int, features: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether torch's int4 product takes a `rows × features` matrix well: bfloat16 on the CPU, rows in blocks of 32."""
    return dtype == torch.bfloat16 and device.type == "cpu" and rows % 32 == 0 and features % GROUP == 0


def _in_panels(rows: int) -> bool:
    """Whether torch lays a matrix out in panels of 64 rows, as it does under AVX-512."""
    return rows % _PANEL == 0 and torch.backends.cpu.get_cpu_capability() == "AVX512"


def to_torch_int4(packed: Tensor, scale: Tensor) -> TorchInt4:
    """Repacks published INT4 (`packed [E, N, K/8]`, `scale [E, N, K/32]`) for torch's CPU product, without loss."""
    factors = scale.bfloat16().transpose(-1, -2)
    scales = torch.stack([factors, torch.zeros_like(factors)], dim=-1)  # [E, K/32, N, 2]
    if _in_panels(packed.shape[1]):
        return TorchInt4(_to_panels(packed), scales)
    convert = torch.ops.aten._convert_weight_to_int4pack_for_cpu
    return TorchInt4(torch.stack([convert(unpack_int4(one).int() + 8, 1) for one in packed]), scales)


def _to_panels(packed: Tensor) -> Tensor:
    """What torch's converter makes under AVX-512, in 1.2 ms instead of 18 for 2,816 × 2,048."""
    experts, rows, words = packed.shape
    pairs = packed.contiguous().view(torch.uint8).view(-1, 2, _PANEL // 2, 4 * words)  # a byte: features 2i, 2i + 1
    low, high = pairs[:, 0], pairs[:, 1]  # rows d, and d + 32
    panels = torch.empty(low.shape[0], 4 * words, 2, _PANEL // 2, dtype=torch.uint8)
    panels[:, :, 0] = (low & 15 | high << 4).transpose(1, 2)
    panels[:, :, 1] = (low >> 4 | high & 0xF0).transpose(1, 2)
    return panels.view(experts, rows, -1)


def is_written_out(tokens: int, rows: int) -> bool:
    """Whether a product of `tokens` with a matrix of `rows` goes faster by way of the whole matrix in bfloat16.

    For 2,816 × 2,048 on two cores, writing it out takes 1.4 ms and a token then 0.038 ms; a token straight from the
    packed weights takes 0.069 ms, all that the float32 units can do. Even at 48 tokens, 1.4 times faster at 128.
    """
    return tokens >= 64 and _in_panels(rows)


def dequantise_torch_int4(matrices: TorchInt4, expert: int) -> Tensor:
    """One expert's matrix in bfloat16 as panels of 64 rows, `[N/64, K, 64]` (AVX-512's layout only)."""
    weight, scale = matrices.weight[expert], matrices.scale[expert]
    panels, features = weight.shape[0] // _PANEL, 2 * weight.shape[1]
    signed = weight.view(panels, features, -1) ^ 0x88  # two's complement: shifted up, a nibble is 16 times its value
    out = torch.empty(panels, features, _PANEL, dtype=torch.bfloat16)
    out[:, :, : _PANEL // 2] = (signed << 4).view(torch.int8)
    out[:, :, _PANEL // 2 :] = (signed & 0xF0).view(torch.int8)
    factors = (scale[:, :, 0] / 16).view(-1, panels, _PANEL).transpose(0, 1)  # [N/64, K/32, 64]
    out.view(panels, -1, GROUP, _PANEL).mul_(factors[:, :, None])
    return out


def torch_int4_mm(x: Tensor, matrices: TorchInt4, expert: int) -> Tensor:
    """`x [M, K] @ W[expert].T` -> bfloat16 `[M, N]`."""
    tokens, rows = x.shape[0], matrices.weight.shape[1]
    if is_written_out(tokens, rows):
        panels = dequantise_torch_int4(matrices, expert)
        return torch.bmm(x.expand(panels.shape[0], -1, -1), panels).transpose(0, 1).reshape(tokens, rows)
    product: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
        x, matrices.weight[expert], GROUP, matrices.scale[expert]
    )
    return product


def swiglu_act(gate_up: Tensor) -> Tensor:
    """`silu(gate) * up` of `[..., 2I]`."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up
