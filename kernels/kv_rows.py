"""Rows of the latent cache in 8 bits, by torch alone: the format, and the twins of the kernels in `kv_fp8`.

A row of C latent values and R of the rotated key is, one behind the other, C codes in float8 e4m3 (no infinities, largest
448), C/128 float32 scales, each one 128 latents' largest magnitude over 448, and the key in bfloat16: the layout that
FlashMLA reads. For C = 512 and R = 64 it takes 656 bytes instead of 1,152.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

KvDtype = Literal["bf16", "fp8"]
"""What cache rows are held in: as they were computed, or as here."""
PAGE = 64
"""Rows of a cache block, `engine.kv_cache.BLOCK`."""
GROUP = 128
"""Latents that share a scale."""
LARGEST = 448.0


def row_bytes(latent: int, rope: int) -> int:
    """Bytes of a row. Raises `ValueError` when `latent` isn't groups of 128 or the row can't be seen as 4-byte numbers."""
    if latent < GROUP or latent % GROUP:
        raise ValueError(f"`latent` must be a multiple of {GROUP}, not {latent}.")
    if rope < 2 or rope % 2:
        raise ValueError(f"`rope` must be even, not {rope}.")
    return latent + 4 * (latent // GROUP) + 2 * rope


def pack_rows(rows: Tensor, latent: int) -> Tensor:
    """uint8 `[…, row_bytes]` of `rows […, C+R]`, C = `latent`. A group with a value that isn't finite reads back as
    values that aren't."""
    groups = torch.unflatten(rows[..., :latent].float(), -1, (-1, GROUP))
    most = groups.abs().amax(-1).nan_to_num(nan=float("inf"), posinf=float("inf"))
    scales = torch.where(most > 0, most / LARGEST, 1.0)
    codes = (groups / scales[..., None]).nan_to_num(nan=0.0).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
    key = rows[..., latent:].to(torch.bfloat16).contiguous()
    parts = (codes.flatten(-2), scales, key)
    return torch.cat([part.contiguous().view(torch.uint8) for part in parts], dim=-1)


def unpack_rows(packed: Tensor, latent: int) -> Tensor:
    """bfloat16 `[…, C+R]` of uint8 rows: each latent is its code times its group's scale, rounded once."""
    ends = latent, latent + 4 * (latent // GROUP)
    codes = packed[..., : ends[0]].contiguous().view(torch.float8_e4m3fn).float()
    scales = packed[..., ends[0] : ends[1]].contiguous().view(torch.float32)
    latents = (torch.unflatten(codes, -1, (-1, GROUP)) * scales[..., None]).flatten(-2).to(torch.bfloat16)
    return torch.cat([latents, packed[..., ends[1] :].contiguous().view(torch.bfloat16)], dim=-1)
