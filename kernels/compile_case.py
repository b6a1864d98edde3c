"""One ahead-of-time compilation of a Triton kernel: what a test needs to compile it for a chip that isn't there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
"""Triton's names for pointers to the float types that kernels take."""


@dataclass(frozen=True, slots=True)
class CompileCase:
    """A kernel at the tile sizes that its policy chooses for one shape.

    `kernel` is the `JITFunction`, `signature` maps each runtime argument to Triton's type (`"*bf16"`, `"i32"`) and each
    constexpr to `"constexpr"`, `constexprs` holds their values. `num_warps` and `num_stages` are the launch options.
    `decode` marks a kernel of the decode path, which must not spill registers.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int
    decode: bool

    @property
    def attrs(self) -> dict[tuple[int], list[list[Any]]]:
        """`ASTSource`'s `attrs`: every pointer is 16-byte aligned and every stride (`s_…`) a multiple of 16 values, as a
        launch finds those of the models here to be. Without it loads are narrow and the figures aren't those of the
        kernel that runs."""
        aligned = [name[:2] == "s_" or kind[0] == "*" for name, kind in self.signature.items()]
        return {(index,): [["tt.divisibility", 16]] for index, holds in enumerate(aligned) if holds}
