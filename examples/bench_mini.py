"""Time the mini model on this machine: `python bench_mini.py`. Prints one line a figure.

Decode is greedy at batch 1 behind a context of 600 tokens; the same weights run in transformers' eager `generate` for
comparison (needs the `dev` extra). Cold start is a fresh `thinkloop run`, from the command to the first thinking token.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from importlib.resources import files
from pathlib import Path

import anyio
import torch
from safetensors.torch import load_file
from thinkloop.kernels.reference import dequantise_int4

import thinkloop as tl

MINI = Path(str(files("thinkloop.engine") / "mini"))
CONTEXT, TOKENS, REPEATS = 600, 256, 3


async def decode_speed(dtype: str) -> float:
    """Tokens a second of the engine, best of `REPEATS`."""
    engine = tl.Engine.load(MINI, dtype=dtype)
    best = 0.0
    for _ in range(REPEATS):
        session = engine.session(sampling=tl.Sampling(temperature=0))
        await session.append([(7 * index) % 2000 + 300 for index in range(CONTEXT)])
        stream = session.generate(max_tokens=TOKENS)
        await anext(stream)
        started, count = time.perf_counter(), 0
        async for _token in stream:
            count += 1
        best = max(best, count / (time.perf_counter() - started))
        session.close()
    engine.close()
    return best


def transformers_speed() -> float:
    """Tokens a second of transformers' eager `generate` on the same weights, float32, best of `REPEATS`."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    config = json.loads((MINI / "config.json").read_text(encoding="utf-8"))
    drop = ("quantization_config", "architectures", "model_type", "torch_dtype", "topk_method", "scoring_func")
    settings = {key: value for key, value in config.items() if key not in drop}
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**settings, attn_implementation="eager")).eval()
    tensors = load_file(MINI / "model.safetensors")
    weights = {name: tensor.float() for name, tensor in tensors.items() if ".weight_" not in name}
    for name in [name for name in tensors if name.endswith(".weight_packed")]:
        scale = tensors[name.replace("_packed", "_scale")]
        weights[name.removesuffix("_packed")] = dequantise_int4(tensors[name], scale, torch.float32)
    _load(model, weights)
    ids = torch.tensor([[(7 * index) % 2000 + 300 for index in range(CONTEXT)]])
    best = 0.0
    with torch.inference_mode():
        for _ in range(REPEATS):
            started = time.perf_counter()
            model.generate(ids, max_new_tokens=1, do_sample=False, eos_token_id=None)
            prefill = time.perf_counter() - started
            started = time.perf_counter()
            model.generate(ids, max_new_tokens=65, min_new_tokens=65, do_sample=False, eos_token_id=None)
            best = max(best, 64 / (time.perf_counter() - started - prefill))
    return best


def _load(model: torch.nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Load published names into a transformers model, which may keep a layer's experts in one tensor."""
    own = model.state_dict()
    for name, target in own.items():
        if name in weights:
            target.copy_(weights[name])
        elif name.endswith("experts.gate_up_proj"):
            stem = name.removesuffix("gate_up_proj")
            pairs = [
                torch.cat((weights[f"{stem}{expert}.gate_proj.weight"], weights[f"{stem}{expert}.up_proj.weight"]))
                for expert in range(target.shape[0])
            ]
            target.copy_(torch.stack(pairs))
        elif name.endswith("experts.down_proj"):
            stem = name.removesuffix("down_proj")
            target.copy_(
                torch.stack([weights[f"{stem}{expert}.down_proj.weight"] for expert in range(target.shape[0])])
            )
        else:
            raise KeyError(name)


def cold_start() -> float:
    """Seconds from the command to the first thinking token."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "thinkloop", "run", "--json"]
        started = time.perf_counter()
        with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            first = next(time.perf_counter() for line in process.stdout if json.loads(line)["type"] == "thinking")
            process.stdout.read()
    return first - started


def import_time() -> float:
    """Milliseconds that `import thinkloop` adds to a bare interpreter, best of ten."""
    code = "import time; s = time.perf_counter(); import thinkloop; print((time.perf_counter() - s) * 1000)"
    runs = (subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(10))
    return min(float(run.stdout) for run in runs)


async def python_times() -> tuple[float, float]:
    """Milliseconds to start the sandbox, and for a call (median of 50)."""
    started = time.perf_counter()
    async with tl.Python() as python:
        start = (time.perf_counter() - started) * 1000
        (tool,) = python.tools()
        calls = []
        for _ in range(50):
            began = time.perf_counter()
            await tool.call({"code": "1 + 1"})
            calls.append((time.perf_counter() - began) * 1000)
    return start, sorted(calls)[25]


def main() -> None:
    print(f"import thinkloop                  {import_time():8.1f} ms")
    print(f"cold start to first thinking token{cold_start():8.2f} s")
    start, call = anyio.run(python_times)
    print(f"python sandbox start              {start:8.1f} ms")
    print(f"python call, median               {call:8.2f} ms")
    ours = {dtype: anyio.run(decode_speed, dtype) for dtype in ("float32", "bfloat16")}
    for dtype, speed in ours.items():
        print(f"decode, {dtype:8}                  {speed:8.0f} tokens/s")
    theirs = transformers_speed()
    print(f"transformers eager generate       {theirs:8.0f} tokens/s ({max(ours.values()) / theirs:.1f} x slower)")


if __name__ == "__main__":
    main()
