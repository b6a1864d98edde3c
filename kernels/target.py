"""What kernels run on: a GPU or, where there is none, Triton's interpreter; and the two operations that it gets wrong."""

from __future__ import annotations

import os
from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
"""Triton decides when a kernel is decorated; kernels take this as a constexpr."""


class Chip(NamedTuple):
    """Compute capability, as 10 · major + minor, and number of SMs."""

    capability: int
    sms: int


HOPPER = Chip(90, 132)


def chip(device: torch.device) -> Chip:
    """The GPU of a tensor's device; under the interpreter an H200."""
    return _chip(device.index) if device.type == "cuda" else HOPPER


@cache
def _chip(index: int | None) -> Chip:
    about = torch.cuda.get_device_properties(index)
    return Chip(10 * about.major + about.minor, about.multi_processor_count)


@triton.jit
def cast(b_value, DTYPE: tl.constexpr, INTERPRET: tl.constexpr):
    """float32 to DTYPE, rounded to nearest even; the interpreter cuts bits off on the way to bfloat16."""
    if INTERPRET and tl.bfloat16 == DTYPE:
        bits = b_value.to(tl.int32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        b_value = (bits & -65536).to(tl.float32, bitcast=True)
    return b_value.to(DTYPE)


@triton.jit
def dot(b_a, b_b, INTERPRET: tl.constexpr):
    """A product with float32 sums; the interpreter gets those of bfloat16 wrong."""
    if INTERPRET:
        return tl.dot(b_a.to(tl.float32), b_b.to(tl.float32))
    return tl.dot(b_a, b_b)
