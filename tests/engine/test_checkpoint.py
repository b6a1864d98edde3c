"""A checkpoint is loaded as published, or refused with what is wrong before any weight is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import FP8, INT4, config_json, dequantised, random_tensors, write_checkpoint
from thinkloop.engine.checkpoint import Checkpoint, CheckpointError
from thinkloop.engine.config import ModelConfig
from thinkloop.engine.device import EngineError
from thinkloop.engine.engine import Engine
from thinkloop.traces.events import ThinkloopError
from torch import Tensor

EXPERT = "model.layers.1.mlp.experts.3.up_proj"


def open_checkpoint(folder: Path) -> Checkpoint:
    return Checkpoint(folder, ModelConfig.load(folder))


def tensors_of(**changes: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    config = config_json(**changes)
    return config, random_tensors(ModelConfig.from_json(config))


@pytest.mark.parametrize("int4", [False, True], ids=["whole", "int4"])
def test_shards_hold_the_same_model_as_one_file(tmp_path: Path, int4: bool) -> None:
    config, tensors = tensors_of(**({"quantization_config": INT4} if int4 else {}))
    one = write_checkpoint(tmp_path / "one", config, tensors)
    many = write_checkpoint(tmp_path / "many", config, tensors, shards=5)
    with Engine.load(one) as a, Engine.load(many) as b:
        assert torch.equal(a.logits([3, 1, 4, 1, 5]), b.logits([3, 1, 4, 1, 5]))


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16])
def test_every_float_type_is_read(tmp_path: Path, kind: torch.dtype) -> None:
    config, tensors = tensors_of()
    folder = write_checkpoint(tmp_path / "m", config, {n: t.to(kind) for n, t in tensors.items()})
    with Engine.load(folder) as engine:
        assert engine.logits([1, 2]).isfinite().all()


def test_layers_for_multi_token_prediction_are_skipped_where_the_config_has_them(tmp_path: Path) -> None:
    config, tensors = tensors_of(num_nextn_predict_layers=1)
    tensors["model.layers.3.eh_proj.weight"] = torch.zeros(2, 2)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
    open_checkpoint(write_checkpoint(tmp_path / "m", config, tensors))
    with pytest.raises(CheckpointError, match=r"no place in this model: model\.layers\.3\.eh_proj"):
        open_checkpoint(write_checkpoint(tmp_path / "m", config | {"num_nextn_predict_layers": 0}, tensors))


def test_a_shard_that_holds_nothing_needed_may_be_missing(tmp_path: Path) -> None:
    config, tensors = tensors_of(num_nextn_predict_layers=1)
    tensors |= {f"model.layers.3.part{i}": torch.zeros(2) for i in range(len(tensors))}
    folder = write_checkpoint(tmp_path / "m", config, tensors, shards=2)
    (folder / "model-00002-of-00002.safetensors").unlink()
    open_checkpoint(folder)


@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
def test_weight_shape_may_be_of_either_integer_type(tmp_path: Path, kind: torch.dtype) -> None:
    config, tensors = tensors_of(quantization_config=INT4)
    tensors = {n: t.to(kind) if n.endswith("weight_shape") else t for n, t in tensors.items()}
    open_checkpoint(write_checkpoint(tmp_path / "m", config, tensors))


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    config, tensors = tensors_of()
    folder = write_checkpoint(tmp_path / "m", config, tensors, shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match="model-00002-of-00003"):
        open_checkpoint(folder)


def test_a_cut_shard_is_named(tmp_path: Path) -> None:
    config, tensors = tensors_of()
    folder = write_checkpoint(tmp_path / "m", config, tensors, shards=2)
    shard = folder / "model-00001-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=r"model-00001-of-00002.*promises"):
        open_checkpoint(folder)


@pytest.mark.parametrize("content", [b"", b"\xff" * 64, b"\x02\0\0\0\0\0\0\0[]", b'\x10\0\0\0\0\0\0\0{"a": 1'])
def test_a_file_that_is_no_safetensors_is_refused(tmp_path: Path, content: bytes) -> None:
    folder = write_checkpoint(tmp_path / "m", config_json())
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        open_checkpoint(folder)


def test_tensors_that_share_bytes_are_refused(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", *tensors_of())
    path = folder / "model.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    norms = sorted(name for name in header if name.endswith("input_layernorm.weight"))
    header[norms[1]]["data_offsets"] = header[norms[0]]["data_offsets"]
    changed = json.dumps(header).encode()
    path.write_bytes(len(changed).to_bytes(8, "little") + changed + content[8 + length :])
    with pytest.raises(CheckpointError, match="bytes that belong to another tensor"):
        open_checkpoint(folder)


def test_missing_misshapen_mistyped_and_unexpected_tensors_are_named(tmp_path: Path) -> None:
    config, good = tensors_of(quantization_config=INT4)
    name = f"{EXPERT}.weight_packed"
    absent = {n: t for n, t in good.items() if n != name}
    bad: dict[str, tuple[dict[str, Tensor], str]] = {
        "missing": (absent, "1 tensors are missing"),
        "misnamed": (
            absent | {f"{EXPERT}.packed": good[name]},
            r"missing: .*weight_packed; .*up_proj\.packed has no place",
        ),
        "shape": (good | {name: torch.zeros(32, 4, dtype=torch.int32)}, r"shape \[32, 4\].*\[32, 8\]"),
        "type": (good | {name: torch.zeros(32, 8)}, "F32 where I32"),
        "unexpected": (good | {f"{EXPERT}.weight_zero_point": torch.zeros(1)}, "no place"),
    }
    for kind, (tensors, words) in bad.items():
        folder = write_checkpoint(tmp_path / kind, config, tensors)
        with pytest.raises(CheckpointError, match=words) as caught:
            open_checkpoint(folder)
        assert EXPERT in str(caught.value)


def test_fp8_needs_the_scales_of_its_blocks(tmp_path: Path) -> None:
    config, good = tensors_of(quantization_config=FP8, hidden_size=160)
    name = "model.layers.0.self_attn.o_proj.weight_scale_inv"
    for bad, words in (
        ({n: t for n, t in good.items() if n != name}, "1 tensors are missing"),
        (good | {name: torch.ones(1, 1)}, r"shape \[1, 1\].*\[2, 1\]"),
        (good | {name: torch.ones(2, 1, dtype=torch.int32)}, "I32 where"),
    ):
        with pytest.raises(CheckpointError, match=words) as caught:
            open_checkpoint(write_checkpoint(tmp_path / "m", config, bad))
        assert name in str(caught.value)
    with pytest.raises(CheckpointError, match=r"F8_E4M3 where BF16|no place"):
        open_checkpoint(write_checkpoint(tmp_path / "m", config | {"quantization_config": None}, good))


def test_an_fp8_model_may_leave_projections_whole(tmp_path: Path) -> None:
    config, tensors = tensors_of(quantization_config=FP8 | {"modules_to_not_convert": ["self_attn"]})
    whole = dequantised(tensors)
    mixed = {n: t for n, t in tensors.items() if "self_attn" not in n} | {
        n: t for n, t in whole.items() if "self_attn" in n
    }
    one = write_checkpoint(tmp_path / "one", config, tensors)
    other = write_checkpoint(tmp_path / "other", config, mixed)
    with Engine.load(one) as a, Engine.load(other) as b:
        assert torch.equal(a.logits([3, 1, 4]), b.logits([3, 1, 4]))


def test_a_slice_asks_only_for_its_layers_and_their_shards(tmp_path: Path) -> None:
    config, tensors = tensors_of(num_hidden_layers=6, num_nextn_predict_layers=1)
    folder = write_checkpoint(tmp_path / "m", config, tensors, shards=8)
    places = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    kept = {
        file
        for name, file in places.items()
        if "layers" not in name or name.startswith(("model.layers.2", "model.layers.3"))
    }
    for file in set(places.values()) - kept:
        (folder / file).unlink()
    whole = ModelConfig.load(folder)
    with pytest.raises(CheckpointError, match="shards are missing"):
        Checkpoint(folder, whole)
    piece = Checkpoint(folder, whole.sliced(range(2, 4)))
    assert piece.fingerprint != Checkpoint(folder, whole.sliced(range(2, 3))).fingerprint
    (folder / places["model.layers.3.input_layernorm.weight"]).unlink()
    with pytest.raises(CheckpointError, match="shards are missing"):
        Checkpoint(folder, whole.sliced(range(2, 4)))


@pytest.mark.parametrize("file", ["../model.safetensors", "/etc/passwd", 7])
def test_an_index_that_names_no_file_of_the_folder_is_refused(tmp_path: Path, file: object) -> None:
    config, tensors = tensors_of()
    folder = write_checkpoint(tmp_path / "m", config, tensors, shards=2)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(tensors, file)}))
    with pytest.raises(CheckpointError, match=r"index\.json is damaged"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"shape": [159, 64]}, "isn't"),
        ({"data_offsets": [8, 0]}, "out of order"),
        ({"data_offsets": [-8, 40952]}, "out of order"),
        ({"data_offsets": [0]}, "header"),
        ({"shape": "64"}, "lists"),
        ({"dtype": None}, "is None where"),
    ],
)
def test_a_header_that_contradicts_itself_is_refused(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    config, tensors = tensors_of()
    file = write_checkpoint(tmp_path / "m", config, tensors) / "model.safetensors"
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["lm_head.weight"] |= change
    raw = json.dumps(header).encode()
    file.write_bytes(len(raw).to_bytes(8, "little") + raw + content[8 + length :])
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(tmp_path / "m")


def test_weights_that_are_not_there_are_asked_for(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config_json()))
    with pytest.raises(CheckpointError, match="Fetch the weights"):
        open_checkpoint(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"index\.json is damaged"):
        open_checkpoint(tmp_path)


def test_nothing_is_read_before_everything_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, tensors = tensors_of()
    del tensors["lm_head.weight"]
    folder = write_checkpoint(tmp_path / "m", config, tensors)
    monkeypatch.setattr(Checkpoint, "view", lambda *_: pytest.fail("a tensor was read"))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight"):
        Engine.load(folder)


def test_the_fingerprint_changes_with_weights_and_config(tmp_path: Path) -> None:
    config, tensors = tensors_of()
    one = open_checkpoint(write_checkpoint(tmp_path / "1", config, tensors)).fingerprint
    assert open_checkpoint(write_checkpoint(tmp_path / "2", config, tensors)).fingerprint == one
    other = tensors | {"lm_head.weight": tensors["lm_head.weight"] + 1}
    assert open_checkpoint(write_checkpoint(tmp_path / "3", config, other)).fingerprint != one
    config["rms_norm_eps"] = 1e-6
    assert open_checkpoint(write_checkpoint(tmp_path / "4", config, tensors)).fingerprint != one


@pytest.mark.parametrize(
    ("model", "options", "words"),
    [
        ("no-such-model", {}, "neither 'mini' nor a folder"),
        (".", {"device": "tpu"}, "tpu"),
        (".", {"dtype": "int3"}, "int3"),
    ],
)
def test_an_unknown_model_device_or_dtype_is_an_error_with_advice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, options: dict[str, Any], words: str
) -> None:
    monkeypatch.chdir(write_checkpoint(tmp_path / "m", config_json()))
    with pytest.raises(EngineError, match=words):
        Engine.load(model, **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_cuda_without_a_cuda_device_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="finds no CUDA device"):
        Engine.load(write_checkpoint(tmp_path / "m", config_json()), device="cuda")


def test_token_ids_out_of_range_are_refused(tmp_path: Path) -> None:
    with Engine.load(write_checkpoint(tmp_path / "m", config_json())) as engine:
        for ids in ([], [160], [-1], [0] * 513):
            with pytest.raises(ThinkloopError):
                engine.logits(ids)


def test_describe_names_hashes_device_and_dtype(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", config_json())
    (folder / "chat_template.jinja").write_text("x")
    with Engine.load(folder, dtype="bfloat16") as engine:
        about = engine.describe()
    assert about["device"] == "cpu"
    assert about["dtype"] == "bfloat16"
    assert len(about["weights"]) == 64
    assert list(about["files"]) == ["chat_template.jinja"]
    json.dumps(about)
