"""`thinkloop doctor DIR` tells what a checkpoint is, what it lacks and where it fits, without reading its weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import thinkloop.agent.checkpoint_report as report
import torch
from checkpoints import Json, config_json, write_checkpoint
from published import PUBLISHED
from thinkloop.agent.cli import app
from thinkloop.agent.doctor import Finding, examine, mini_folder
from thinkloop.engine.shard import Shard
from typer.testing import CliRunner


def findings(folder: Path) -> dict[str, Finding]:
    return {finding.name: finding for finding in examine(folder)}


def config_only(folder: Path, config: Json) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_the_embedded_model_is_whole_and_fits() -> None:
    result = CliRunner().invoke(app, ["doctor", str(mini_folder())])
    assert result.exit_code == 0, result.stdout
    for words in ("kimi_k2: 5 layers (1 dense, 4 with 8 experts", "million", "INT4", "tiktoken.model", "cpu", "fits: "):
        assert words in result.stdout


def test_no_weight_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Shard, "view", lambda *_: pytest.fail("a tensor was read"))
    assert findings(mini_folder())["files"].state == "ok"


def test_k2_does_not_fit_a_small_machine_but_a_slice_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "available_memory", lambda: 64_000_000_000)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = findings(config_only(tmp_path, PUBLISHED["k2_thinking"]))
    assert "1,026.41 billion, 32.86 billion of them active" in found["parameters"].detail
    assert found["cpu"].state == "missing"
    assert "70,272 bytes of cache a token, 18.42 GB for a whole window; 64.00 GB free" in found["cpu"].detail
    assert found["cpu"].fix == "load a slice: layers=range(0, 6) fits"  # five layers of experts, 10.9 GB each
    assert found["files"].state == "missing"


def test_a_model_that_fits_without_a_whole_window_says_how_many_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "available_memory", lambda: 34_000_000_000)
    found = findings(config_only(tmp_path, PUBLISHED["deepseek_v2_lite"]))["cpu"]
    assert found.state == "warn"
    assert "fits, with cache for" in found.detail


def test_missing_shards_are_named_with_the_slice_that_could_be_loaded(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", config_json(num_hidden_layers=8, first_k_dense_replace=0), shards=20)
    places = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    (folder / places["model.layers.5.self_attn.o_proj.weight"]).unlink()
    found = findings(folder)["files"]
    assert "1 of 20 shards are missing" in found.detail
    assert found.fix.startswith("or load a slice that is here: layers=range(0, ")
    (folder / places["model.embed_tokens.weight"]).unlink()
    assert findings(folder)["files"].fix == ""


def test_what_is_wrong_with_config_tensors_or_tokenizer_is_said(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["doctor", str(tmp_path / "nowhere")])
    assert result.exit_code == 1
    assert "config.json can't be read" in result.stdout
    folder = write_checkpoint(tmp_path / "m", config_json())
    assert findings(folder)["tokenizer"].state == "missing"
    config_only(folder, config_json(hidden_size=96))
    assert "shape" in findings(folder)["files"].detail
    config_only(folder, config_json(quantization_config={"quant_method": "gguf"}))
    assert "quant_method" in findings(folder)["model"].detail
