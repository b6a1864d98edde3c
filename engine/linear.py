"""Matrices of a bfloat16 model on the CPU, in the blocked layout of oneDNN, which torch brings along.

A token reads each matrix once, so a product of few rows should go at the speed of memory. With two cores of an EPYC
(Zen 4) that read 35 GB/s, one row times 2,048 × 163,840 takes 37 ms as `F.linear` (18 GB/s: it repacks each block as it
goes), 55 ms as `x @ w`, 27 ms packed beforehand and 23 ms (29 GB/s) packed and padded to four rows. Many rows lose
nothing: 390 GFLOP/s either way.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_FEWEST_ROWS = 4


def can_pack(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether matrices of `dtype` on `device` can be packed: bfloat16 on a CPU whose oneDNN computes in it."""
    available = bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]  # torch leaves it untyped
    if dtype != torch.bfloat16 or device.type != "cpu" or not available:
        return False
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def pack(weight: Tensor) -> Tensor:
    """`weight [in, out]` packed: an opaque tensor of shape `[out, in]` for `project`. Fastest where `weight.T` is
    contiguous."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.T.contiguous(), _FEWEST_ROWS)
    return packed


def project(x: Tensor, weight: Tensor) -> Tensor:
    """`x [T, in] @ weight` -> `[T, out]`, for a weight `[in, out]` or a packed one."""
    if not weight.is_mkldnn:
        return x @ weight
    rows = x.shape[0]
    if rows == 1:
        x = x.expand(_FEWEST_ROWS, -1)
    elif rows < _FEWEST_ROWS:
        x = F.pad(x, (0, 0, 0, _FEWEST_ROWS - rows))
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return y[:rows]
