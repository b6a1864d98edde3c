"""What kernels run on: a GPU or, where there is none, Triton's interpreter; the two operations that it gets wrong; and how a
kernel starts before the one ahead of it has ended.

On Hopper a dependent launch may become resident as soon as every program of the kernel before it has what it waited for; it
then waits for that kernel's results (`wait_for_inputs`), but launching and the reading of weights, which no kernel writes, are
behind it.
"""

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


def starts_early(target: Chip) -> bool:
    """Whether kernels are launched as dependents of the one before: Hopper and later have that. A kernel that is must call
    `wait_for_inputs` on every path, so that each waits for all those before it."""
    return not INTERPRET and target.capability >= 90


def launch_early(device: torch.device) -> dict[str, bool]:
    """The launch option of a kernel that calls `wait_for_inputs`."""
    return {"launch_pdl": True} if starts_early(chip(device)) else {}


def early(device: torch.device) -> dict[str, bool]:
    """`launch_early`, and EARLY as the kernel is told it."""
    return {"EARLY": starts_early(chip(device)), **launch_early(device)}


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


@triton.jit
def wait_for_inputs(EARLY: tl.constexpr):
    """Waits for everything the kernels before have written, then lets the next one start. Before it nothing may be written,
    and only weights may be read, and what was written before the last kernel: that one has waited for it."""
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def prefetch(p_from, NBYTES: tl.constexpr, EARLY: tl.constexpr):
    """Has NBYTES (a multiple of 16) from `p_from` (16-byte aligned) brought to the second cache level, asked for by one
    thread."""
    if EARLY and NBYTES > 0:
        tl.inline_asm_elementwise(
            "{\n.reg .pred first;\n.reg .b32 thread;\nmov.u32 thread, %tid.x;\nsetp.eq.u32 first, thread, 0;\n"
            "@first cp.async.bulk.prefetch.L2.global [$1], $2;\nmov.u32 $0, 0;\n}",
            "=r,l,r", [p_from.to(tl.int64), NBYTES], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
