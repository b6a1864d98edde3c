"""`thinkloop bench`: what it measures, on the mini model and on a small model of random weights."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from thinkloop.agent.cli import app
from thinkloop.engine import bench
from thinkloop.engine.config import ModelConfig
from thinkloop.engine.layout import expected_tensors
from thinkloop.engine.synthetic import MOONLIGHT_SLICE, RandomTensors
from typer.testing import CliRunner

SMALL = MOONLIGHT_SLICE | {
    "vocab_size": 500, "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "kv_lora_rank": 32, "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8, "v_head_dim": 16, "n_routed_experts": 8, "num_experts_per_tok": 2,
    "max_position_embeddings": 1024,
}  # fmt: skip


@pytest.fixture
def small(tmp_path: Path) -> Path:
    RandomTensors(ModelConfig.from_json(SMALL)).write(tmp_path / "small", SMALL)
    return tmp_path / "small"


def measured(*arguments: str | Path) -> dict[str, Any]:
    result = CliRunner().invoke(app, ["bench", *map(str, arguments), "--rounds", "1", "--json"])
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_decoding_the_mini_model_alone_and_together_with_and_without_drafts() -> None:
    found = measured("decode", "--tokens", "6")
    assert (found["bench"], found["model"], found["dtype"]) == ("decode", "mini", "float32")
    assert [(row["sessions"], row["speculate"]) for row in found["rows"]] == [
        (1, False), (8, False), (1, True), (8, True),
    ]  # fmt: skip
    for row in found["rows"]:
        assert row["best"] == row["median"] > 0
        assert row["reading"] is None  # 4 million weights lie in a cache
    assert [row["tokens_per_pass"] for row in found["rows"][:2]] == [1.0, 1.0]


def test_a_model_without_a_vocabulary_decodes_without_drafts(small: Path) -> None:
    found = measured("decode", "--model", small, "--tokens", "3")
    assert [(row["sessions"], row["speculate"]) for row in found["rows"]] == [(1, False), (8, False)]


def test_prefill_is_held_against_a_matrix_product(small: Path) -> None:
    (row,) = measured("prefill", "--model", small, "--tokens", "100")["rows"]
    assert row["tokens"] == 100
    assert row["share"] == pytest.approx(row["operations"] * row["best"] / row["matmul"])


def test_loading_tells_rate_and_memory(small: Path) -> None:
    (row,) = measured("load", "--model", small)["rows"]
    assert row["nbytes"] == RandomTensors(ModelConfig.from_json(SMALL)).nbytes
    assert row["best"] > 0
    assert row["peak"] >= row["resident"]


def test_without_json_it_prints_a_table(small: Path) -> None:
    result = CliRunner().invoke(app, ["bench", "prefill", "--model", str(small), "--tokens", "20", "--rounds", "1"])
    first, names, row, *_ = result.stdout.splitlines()
    assert first.startswith("bench prefill, model ")
    assert names.split() == ["tokens", "tokens/s", "median", "GFLOP/s", "matmul", "share"]
    assert row.split()[0] == "20"


def test_reading_weights_is_held_against_the_memory_of_the_same_run(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "CACHED", 0)
    with bench.open_engine(str(small)) as engine:
        engine.speculate = False
        alone = asyncio.run(bench.decode(engine, 1, context=10, tokens=5, rounds=1)).reading
        together = asyncio.run(bench.decode(engine, 2, context=10, tokens=5, rounds=1)).reading
    assert alone is not None
    assert alone.weight_bytes == bench.token_bytes(engine.config, torch.float32)
    assert alone.share == pytest.approx(alone.rate / alone.bandwidth)
    assert together is None


def test_a_token_reads_all_but_the_embeddings_and_the_idle_experts() -> None:
    config = ModelConfig.from_json(MOONLIGHT_SLICE)
    nbytes, operations = 0.0, 0
    for name, want in expected_tensors(config).items():
        size = want.shape.numel() if isinstance(want.shape, torch.Size) else torch.Size(want.shape).numel()
        chosen = ".experts." not in name or int(name.split(".")[5]) < config.num_experts_per_tok
        if "embed" in name or not chosen or name.endswith(("weight_shape", "weight_scale")):
            continue
        packed, router = name.endswith("weight_packed"), ".gate." in name
        nbytes += size * (8 * 0.625 if packed else 4 if router else 2)
        operations += 2 * size * (8 if packed else 1) * ("lm_head" not in name and len(want.shape) == 2)
    assert bench.token_bytes(config, torch.bfloat16) == pytest.approx(nbytes, rel=0.002)
    assert bench.token_operations(config) == pytest.approx(operations, rel=0.001)


def test_texts_are_pages_where_the_model_can_read_and_differ_from_session_to_session(small: Path) -> None:
    with bench.open_engine("mini") as mini, bench.open_engine(str(small)) as made_up:
        for engine in (mini, made_up):
            texts = bench.texts(engine, 3, 40)
            assert [len(text) for text in texts] == [40, 40, 40]
            assert len({tuple(text) for text in texts}) == 3
        assert bench.has_vocabulary(mini)
        assert not bench.has_vocabulary(made_up)


def test_what_it_cannot_measure_is_a_clear_error() -> None:
    runner = CliRunner()
    unknown = runner.invoke(app, ["bench", "decode", "--model", "nowhere"])
    assert unknown.exit_code == 1
    assert "'nowhere' is neither" in unknown.stderr
    assert runner.invoke(app, ["bench", "flight"]).exit_code == 2
    long = runner.invoke(app, ["bench", "prefill", "--tokens", "1000000", "--rounds", "1"])
    assert long.exit_code == 1
    assert "don't fit" in long.stderr


def test_kernels_are_measured_on_a_gpu_alone_and_by_name() -> None:
    unknown = CliRunner().invoke(app, ["bench", "kernels", "--part", "router", "--part", "wheels"])
    assert unknown.exit_code == 1
    assert "no kernel 'wheels'" in unknown.output
    if not torch.cuda.is_available():
        without = CliRunner().invoke(app, ["bench", "kernels"])
        assert "no CUDA device" in without.output
