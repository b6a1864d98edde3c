"""Compiles every kernel for a chip that needn't be there, and prints what each takes as JSON: run by `test_compile.py` in a
process of its own, because Triton decides at import whether it interprets."""

from __future__ import annotations

import importlib
import inspect
import json
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import triton
from thinkloop.kernels.compile_case import CompileCase
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction

FILES = (
    "gate", "int4_moe", "kv_fp8", "linear", "mla_absorb", "mla_decode", "mla_decode_hopper", "mla_expand", "mla_prefill",
    "rms_norm", "rope_cache", "router", "sampling", "sampling_threshold",
)  # fmt: skip
_OBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def cases(file: str, capability: int) -> list[CompileCase]:
    """The cases of one kernel file; from a path, those of a file outside the package."""
    if file.endswith(".py"):
        sys.path.insert(0, str(Path(file).parent))
    make = importlib.import_module(
        Path(file).stem if file.endswith(".py") else f"thinkloop.kernels.{file}"
    ).compile_cases
    return list(make(capability) if inspect.signature(make).parameters else make())


def used(file: str, index: int, capability: int) -> dict[str, Any]:
    """What one case takes: registers a thread, bytes of stack and of local memory, bytes of shared memory a program; and the
    order in which it waits for the kernel before it and lets the next one start."""
    case = cases(file, capability)[index]
    written = GluonASTSource if isinstance(case.kernel, GluonJITFunction) else ASTSource
    source = written(fn=case.kernel, signature=case.signature, constexprs=case.constexprs, attrs=case.attrs)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        report, code = (
            subprocess.run([_OBJDUMP, what, cubin.name], capture_output=True, text=True, check=True).stdout
            for what in ("-res-usage", "-sass")
        )
    found = {kind: int(amount) for kind, amount in re.findall(r"(REG|STACK|LOCAL):(\d+)", report)}
    return {
        "name": case.name, "kernel": case.kernel.__name__, "decode": case.decode,
        "warps": compiled.metadata.num_warps,  # more than asked for where groups of warps are specialised
        "shared": compiled.metadata.shared, "registers": found["REG"], "stack": found["STACK"], "local": found["LOCAL"],
        "dependent": re.findall(r"\b(ACQBULK|PREEXIT)\b", code),
    }  # fmt: skip


def main() -> None:
    capability, files = int(sys.argv[1]), sys.argv[2:] or FILES
    jobs = [(file, index) for file in files for index in range(len(cases(file, capability)))]
    with ProcessPoolExecutor() as pool:
        found = pool.map(used, *zip(*jobs, strict=True), [capability] * len(jobs), chunksize=4)
        print(json.dumps(list(found)))


if __name__ == "__main__":
    main()
