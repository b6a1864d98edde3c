"""INT4 experts on the CPU and any other torch device: products straight from packed weights, twins of
`reference.moe_int4`.

Two layouts, both 4 bits a weight plus a scale per 32:
- *planes*: int8 `[E, K/2, N]`, the two's complement of feature k in the low nibble, of feature k + K/2 in the high one.
  Two integer ops give both halves times 16 as signed bytes, with no subtraction; the 1/16 is in the scale. Plain
  torch, exact in float32. One token of 192 features onto two experts of 128 rows: 24 µs, where shifting int32 words
  takes 150 µs.
- *torch's own* `_weight_int4pack_mm_for_cpu`, bfloat16 only: 5 µs for the same, 17 GB/s on large ones (its float32
  path is scalar code: 90 µs).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from thinkloop.kernels.reference import GROUP, unpack_int4
from torch import Tensor

# Python numbers would be made into tensors at every call: 2 × 3 µs.
_FOUR = torch.tensor(4, dtype=torch.int8)
_HIGH = torch.tensor(-16, dtype=torch.int8)


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


def _signed(weight: Tensor, out: Tensor) -> Tensor:
    """16 times the packed values: int8 `[M, K/2, N]` into `out [M, K, N]`."""
    half = weight.shape[1]
    torch.bitwise_left_shift(weight, _FOUR.to(weight.device), out=out[:, :half])
    torch.bitwise_and(weight, _HIGH.to(weight.device), out=out[:, half:])
    return out


def dequantise_planes(planes: Planes, expert: int, dtype: torch.dtype) -> Tensor:
    """One expert's matrix, `[K, N]`."""
    weight = planes.weight[expert : expert + 1]
    values = weight.new_empty(1, planes.features, weight.shape[2])
    grouped = _signed(weight, values).view(-1, GROUP, weight.shape[2]).float()  # [K/32, 32, N]
    return (grouped * planes.scale[expert][:, None]).view(planes.features, -1).to(dtype)


class PlanesProduct:
    """`y[k] = x[k] @ W[ids[k]]` for K chosen experts of one shape, with scratch made once: CPU only, not to be
    shared by threads."""

    def __init__(self, planes: Planes, chosen: int) -> None:
        _, half, width = planes.weight.shape
        self._groups = 2 * half // GROUP
        self._packed = torch.empty(chosen, half, width, dtype=torch.int8)
        self._signed = torch.empty(chosen, 2 * half, width, dtype=torch.int8)
        self._low, self._high = self._signed.chunk(2, dim=1)
        self._wide = torch.empty(chosen, 2 * half, width)
        self._rows = self._wide.view(chosen * self._groups, GROUP, width)
        self._scale = torch.empty(chosen, self._groups, width)
        self._part = torch.empty(chosen * self._groups, 1, width)
        self._sums = self._part.view(chosen, self._groups, width)
        self._out = torch.empty(chosen, width)

    def __call__(self, planes: Planes, ids: Tensor, x: Tensor) -> Tensor:
        """`x` float32 `[K·features/32, 1, 32]`, one row of groups per chosen expert -> `[K, N]`, valid until the
        next call."""
        torch.index_select(planes.weight, 0, ids, out=self._packed)
        torch.bitwise_left_shift(self._packed, _FOUR, out=self._low)
        torch.bitwise_and(self._packed, _HIGH, out=self._high)
        self._wide.copy_(self._signed)
        torch.bmm(x, self._rows, out=self._part)
        torch.index_select(planes.scale, 0, ids, out=self._scale)
        return torch.sum(self._sums.mul_(self._scale), dim=1, out=self._out)


@dataclass(frozen=True, slots=True)
class TorchInt4:
    """Packed matrices in torch's CPU layout: uint8 `[E, N, K/2]`, bfloat16 scale and zero `[E, K/32, N, 2]`."""

    weight: Tensor
    scale: Tensor


def fits_torch_int4(rows: int, features: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether torch's int4 product takes a `rows × features` matrix well: bfloat16 on the CPU, rows in blocks of 32."""
    return dtype == torch.bfloat16 and device.type == "cpu" and rows % 32 == 0 and features % GROUP == 0


def to_torch_int4(packed: Tensor, scale: Tensor) -> TorchInt4:
    """Repacks published INT4 for torch's CPU product, without loss."""
    convert = torch.ops.aten._convert_weight_to_int4pack_for_cpu
    words = torch.stack([convert(unpack_int4(one).int() + 8, 1) for one in packed])
    factors = scale.bfloat16().transpose(-1, -2)
    return TorchInt4(words, torch.stack([factors, torch.zeros_like(factors)], dim=-1).contiguous())


def torch_int4_mm(x: Tensor, matrices: TorchInt4, expert: int) -> Tensor:
    """`x [M, K] @ W[expert].T` -> bfloat16 `[M, N]`."""
    product: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
        x, matrices.weight[expert], GROUP, matrices.scale[expert]
    )
    return product


def swiglu_act(gate_up: Tensor) -> Tensor:
    """`silu(gate) * up` of `[..., 2I]`."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up
