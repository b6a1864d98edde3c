"""Loading takes little more memory than the model, says how far it is, and can take a slice of the layers."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import FP8, INT4, Json, config_json, mini_config_json, random_tensors, write_checkpoint
from published import PUBLISHED
from thinkloop.engine.checkpoint import Checkpoint
from thinkloop.engine.config import ModelConfig
from thinkloop.engine.engine import Engine
from thinkloop.engine.footprint import active_parameters, cache_bytes, parameters, weight_bytes
from thinkloop.engine.layout import expected_tensors
from thinkloop.engine.shard import Shard
from thinkloop.engine.weights import Weights, load_weights
from torch import Tensor

CPU = torch.device("cpu")
MIB = 1 << 20


def load(folder: Path, dtype: torch.dtype = torch.float32, layers: range | None = None, **options: Any) -> Weights:
    config = ModelConfig.load(folder)
    return load_weights(Checkpoint(folder, config.sliced(layers) if layers else config), dtype, CPU, **options)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor of (a part of) the weights, in order, those that experts' products hold included, packed ones too."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for one in value:
            yield from tensors_in(one)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from tensors_in(getattr(value, field.name))
    else:
        for cell in getattr(value, "__closure__", None) or ():
            yield from tensors_in(cell.cell_contents)


def content(weights: Weights) -> list[Tensor]:
    """What the weights' tensors hold, those packed for oneDNN unpacked."""
    return [tensor.to_dense() if tensor.is_mkldnn else tensor.clone() for tensor in tensors_in(weights)]


def memory_of(weights: Weights) -> int:
    """Bytes of the weights' storages, each counted once."""
    packed = {id(tensor): tensor.nbytes for tensor in tensors_in(weights) if tensor.is_mkldnn}
    storages = [tensor.untyped_storage() for tensor in tensors_in(weights) if not tensor.is_mkldnn]
    return sum(packed.values()) + sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


# -- memory ----------------------------------------------------------------------------------------------------------

MEASURE = """
import sys, torch
from pathlib import Path
from thinkloop.engine.checkpoint import Checkpoint
from thinkloop.engine.config import ModelConfig
from thinkloop.engine.engine import Engine
from thinkloop.engine.footprint import weight_bytes
from thinkloop.engine.weights import load_weights

def status(field):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) << 10

folder, dtype = sys.argv[1], getattr(torch, sys.argv[2])
torch.randn(64, 64) @ torch.randn(64, 64)
config = ModelConfig.load(folder)
checkpoint = Checkpoint(folder, config)
Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
before = status("VmRSS")
weights = load_weights(checkpoint, dtype, torch.device("cpu"))
print(status("VmHWM") - before - weight_bytes(config, dtype), weight_bytes(config, dtype))
"""

HEAVY: Json = {
    "vocab_size": 16000, "hidden_size": 1024, "intermediate_size": 2048, "moe_intermediate_size": 512,
    "q_lora_rank": 256, "kv_lora_rank": 128, "n_routed_experts": 48, "torch_dtype": "bfloat16",
}  # fmt: skip


def write_heavy(folder: Path, config: Json) -> int:
    """Writes a checkpoint of this config with arbitrary values; returns the bytes of its largest tensor."""
    tensors: dict[str, Tensor] = {}
    for name, (shape, dtypes) in expected_tensors(ModelConfig.from_json(config)).items():
        if "F8_E4M3" in dtypes:
            tensors[name] = torch.zeros(shape, dtype=torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = torch.ones([-(-size // 128) for size in shape])
        else:
            integer = {"weight_packed": torch.int32, "weight_shape": torch.int64}.get(name.rsplit(".", 1)[1])
            tensors[name] = torch.ones(shape, dtype=integer or torch.bfloat16)
    write_checkpoint(folder, config, tensors, shards=3)
    return max(tensor.nbytes for tensor in tensors.values())


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("form", "dtype"), [(None, "bfloat16"), (INT4, "float32"), (INT4, "bfloat16"), (FP8, "bfloat16")],
    ids=["bf16", "int4_planes", "int4_torch", "fp8"],
)  # fmt: skip
def test_loading_keeps_one_tensor_and_some_scratch_beyond_the_model(
    tmp_path: Path, form: Json | None, dtype: str
) -> None:
    largest = write_heavy(tmp_path / "m", config_json(**HEAVY, quantization_config=form))
    run = subprocess.run([sys.executable, "-c", MEASURE, str(tmp_path / "m"), dtype], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    beyond, model = map(int, run.stdout.split())
    # The promise is 512 MiB of scratch; here the model itself is smaller than that, so the test asks for more.
    assert model > 160 * MIB
    assert beyond < largest + 128 * MIB


def test_weights_own_their_memory(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", config_json(torch_dtype="bfloat16"))
    weights = load(folder, torch.bfloat16)
    before = content(weights)
    file = folder / "model.safetensors"
    file.write_bytes(bytes(file.stat().st_size))
    assert all(map(torch.equal, before, content(weights)))


def test_a_tensor_that_is_not_aligned_is_read(tmp_path: Path) -> None:
    values = torch.randn(3, 5)
    header = json.dumps({"odd": {"dtype": "F32", "shape": [3, 5], "data_offsets": [1, 61]},
                         "byte": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}).encode()  # fmt: skip
    file = tmp_path / "x.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + b"\7" + values.numpy().tobytes())
    with Shard(file).view("odd") as tensor:
        assert torch.equal(tensor, values)


# -- progress --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [None, INT4, FP8], ids=["whole", "int4", "fp8"])
def test_progress_counts_the_bytes_of_every_tensor_that_is_read(tmp_path: Path, form: Json | None) -> None:
    config = config_json(quantization_config=form)
    tensors = random_tensors(ModelConfig.from_json(config))
    seen: list[tuple[int, int]] = []
    load(write_checkpoint(tmp_path / "m", config, tensors), progress=lambda done, total: seen.append((done, total)))
    total = sum(tensor.nbytes for name, tensor in tensors.items() if not name.endswith("weight_shape"))
    assert {whole for _, whole in seen} == {total}
    counts = [done for done, _ in seen]
    assert counts[0] == 0
    assert counts[-1] == total
    assert counts == sorted(counts)
    assert len(counts) > 50


# -- slices ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", [None, INT4, FP8], ids=["whole", "int4", "fp8"])
def test_a_slice_is_the_model_of_just_these_layers(tmp_path: Path, form: Json | None, dtype: torch.dtype) -> None:
    config = config_json(num_hidden_layers=6, first_k_dense_replace=3, quantization_config=form)
    tensors = random_tensors(ModelConfig.from_json(config))
    folder = write_checkpoint(tmp_path / "whole", config, tensors, shards=3)
    piece = load(folder, dtype, range(2, 5))
    moved = {name: tensor for name, tensor in tensors.items() if "layers" not in name}
    for new, old in enumerate(range(2, 5)):
        prefix = f"model.layers.{old}."
        moved |= {n.replace(prefix, f"model.layers.{new}."): t for n, t in tensors.items() if n.startswith(prefix)}
    short = config | {"num_hidden_layers": 3, "first_k_dense_replace": 1}
    alone = load(write_checkpoint(tmp_path / "short", short, moved), dtype)
    assert len(piece.layers) == 3
    ours, theirs = content(piece), content(alone)
    assert len(ours) == len(theirs)
    assert all(map(torch.equal, ours, theirs))


def test_an_engine_runs_a_slice_of_a_folder_with_a_part_of_its_shards(tmp_path: Path) -> None:
    config = config_json(num_hidden_layers=8, first_k_dense_replace=2)
    folder = write_checkpoint(tmp_path / "m", config, shards=9)
    with Engine.load(folder) as engine:
        whole = engine.logits([3, 1, 4])
    places = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    needed = ("model.layers.1.", "model.layers.2.", "model.embed", "model.norm", "lm_head")
    kept = {file for name, file in places.items() if name.startswith(needed)}
    for file in set(places.values()) - kept:
        (folder / file).unlink()
    with Engine.load(folder, layers=range(1, 3)) as engine:
        assert len(engine.model.weights.layers) == 2
        part = engine.logits([3, 1, 4])
    assert part.shape == whole.shape
    assert not torch.allclose(part, whole)


# -- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", [None, INT4], ids=["whole", "int4"])
def test_the_size_in_memory_is_known_beforehand(tmp_path: Path, form: Json | None, dtype: torch.dtype) -> None:
    config = mini_config_json(quantization_config=form, moe_layer_freq=2)
    folder = write_checkpoint(tmp_path / "m", config)
    expected = weight_bytes(ModelConfig.load(folder), dtype)
    assert memory_of(load(folder, dtype)) == pytest.approx(expected, rel=0.005)


# Reference 2.7 for K2, the model cards for the others, in billions.
SIZES = {
    "k2_thinking": (1026.408232448, 32.86), "deepseek_v3": (671, 37), "deepseek_v2": (236, 21),
    "deepseek_v2_lite": (15.7, 2.4), "moonlight": (16, 3),
}  # fmt: skip


@pytest.mark.parametrize("name", SIZES)
def test_parameters_are_the_published_ones(name: str) -> None:
    total, active = SIZES[name]
    config = ModelConfig.from_json(PUBLISHED[name])
    assert parameters(config) / 1e9 == pytest.approx(total, rel=0.005)
    assert active_parameters(config) / 1e9 == pytest.approx(active, abs=1)


def test_k2s_parameters_and_cache_are_the_references_to_the_last_digit() -> None:
    config = ModelConfig.from_json(PUBLISHED["k2_thinking"])
    assert parameters(config) == 1_026_408_232_448 - 60 * 384  # the reference counts the routers' biases
    assert cache_bytes(config, torch.bfloat16) == 70_272
    assert math.isclose(weight_bytes(config, torch.bfloat16), 594.2e9 * 1.11, rel_tol=0.02)
