"""A model by the Triton kernels says what the same model says by torch in float32: reading, decoding, batches in padded
sizes. Under the interpreter where there is no GPU; with one, through captured graphs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoints import INT4, Json, config_json, random_tensors, write_checkpoint
from thinkloop.engine.checkpoint import Checkpoint
from thinkloop.engine.config import ModelConfig
from thinkloop.engine.kernel_steps import BATCHES, COUNTS, Size
from thinkloop.engine.kv_cache import BlockPool, LatentCache
from thinkloop.engine.model import Segment, Transformer
from thinkloop.engine.weights import Backend, load_weights
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CPU = torch.device("cpu")
SIZES = {
    "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 64,
    "kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32, "intermediate_size": 96,
    "moe_intermediate_size": 64, "n_routed_experts": 8, "num_experts_per_tok": 2, "max_position_embeddings": 96,
    "vocab_size": 300, "torch_dtype": "bfloat16",
}  # fmt: skip
TEXT = [(7 * index) % 300 for index in range(80)]


class Runner:
    """One model with sequences of its own."""

    def __init__(self, folder: Path, dtype: torch.dtype, device: torch.device, backend: Backend) -> None:
        config = ModelConfig.load(folder)
        self.model = Transformer(config, load_weights(Checkpoint(folder, config), dtype, device, backend=backend))
        self.pool = BlockPool(config, 2048, dtype, device)
        self.pool.rows.zero_()

    def sequence(self) -> LatentCache:
        return LatentCache(self.pool)

    def step(self, *parts: tuple[LatentCache, list[int]]) -> list[Tensor]:
        with torch.inference_mode():
            for cache, ids in parts:
                cache.reserve(cache.length + len(ids))
            logits = self.model.forward([Segment(cache, ids, every=True) for cache, ids in parts])
            return [one.cpu().clone() for one in logits]


def written(folder: Path, config: Json) -> Path:
    """A checkpoint whose selection biases lie further apart than scores can: near ties fall differently in bfloat16."""
    tensors = random_tensors(ModelConfig.from_json(config), dtype=torch.bfloat16)
    for name, tensor in tensors.items():
        if name.endswith("e_score_correction_bias"):
            tensors[name] = 2 * torch.arange(len(tensor)).to(tensor.dtype)
    return write_checkpoint(folder, config, tensors)


def runners(folder: Path) -> tuple[Runner, Runner]:
    return Runner(folder, torch.bfloat16, DEVICE, "triton"), Runner(folder, torch.float32, CPU, "torch")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Runner, Runner]:
    """Without experts, whose near ties fall differently in bfloat16."""
    dense = config_json(**SIZES, first_k_dense_replace=SIZES["num_hidden_layers"])
    return runners(written(tmp_path_factory.mktemp("kernels") / "m", dense))


def close(got: Tensor, want: Tensor) -> bool:
    """Within 3 % for every token; torch's own bfloat16 is within 1 to 2."""
    errors = (got - want).norm(dim=1) / want.norm(dim=1)
    return got.shape == want.shape and float(errors.max()) < 0.03


@pytest.mark.parametrize("quantised", [{}, {"quantization_config": INT4}], ids=["bf16", "int4"])
def test_reading_and_decoding_agree_with_float32(tmp_path: Path, quantised: Json) -> None:
    pair = runners(written(tmp_path / "m", config_json(**SIZES, **quantised)))
    sequences = [runner.sequence() for runner in pair]
    for piece in (TEXT[:66], TEXT[66:67], TEXT[67:70], TEXT[70:80], [5]):
        (got,), (want,) = (runner.step((cache, piece)) for runner, cache in zip(pair, sequences, strict=True))
        assert close(got, want)


def test_sequences_of_any_lengths_decode_together(pair: tuple[Runner, Runner]) -> None:
    lengths, pieces = [1, 64, 66], [[9], [8, 7, 6], [5, 4]]
    caches = [[runner.sequence() for _ in lengths] for runner in pair]
    for runner, own in zip(pair, caches, strict=True):
        for cache, length in zip(own, lengths, strict=True):
            runner.step((cache, TEXT[:length]))
    results = [runner.step(*zip(own, pieces, strict=True)) for runner, own in zip(pair, caches, strict=True)]
    for got, want in zip(*results, strict=True):
        assert close(got, want)


def test_a_long_piece_and_short_ones_share_a_step(pair: tuple[Runner, Runner]) -> None:
    results = []
    for runner in pair:
        first, second = runner.sequence(), runner.sequence()
        runner.step((first, TEXT[:10]))
        results.append(runner.step((first, [3]), (second, TEXT[:20])))
    for got, want in zip(*results, strict=True):
        assert close(got, want)


def test_a_step_up_to_the_windows_last_token(pair: tuple[Runner, Runner]) -> None:
    kernels, _ = pair
    window = kernels.model.config.max_position_embeddings
    cache, other = kernels.sequence(), kernels.sequence()
    kernels.step((cache, [TEXT[index % 80] for index in range(window - 1)]))
    kernels.step((other, TEXT[:5]))
    alone, _ = kernels.step((cache, [1]), (other, TEXT[5:12]))  # padded to eight tokens, past the window
    assert alone.isfinite().all()
    assert cache.length == window


def test_sizes_are_the_next_larger_ones() -> None:
    assert Size.of(1, 1, 5) == Size(1, 1, 1024)
    assert Size.of(3, 5, 1025) == Size(4, 8, 4096)
    assert Size.of(32, 8, 1 << 19) == Size(32, 8, 1 << 19)
    assert Size.of(1, 1, (1 << 18) + 1) == Size.of(1, 1, (1 << 19) - 1)  # not a graph for every token
    assert Size.of(32, 8, 1).tokens == BATCHES[-1] * COUNTS[-1]
    for wrong in ((33, 1), (1, 9)):
        with pytest.raises(ValueError, match="more than a step takes"):
            Size.of(*wrong, 100)


def test_models_with_other_routers_and_without_query_compression_run_too(tmp_path: Path) -> None:
    grouped = {"n_group": 4, "topk_group": 2, "model_type": "deepseek_v3", "q_lora_rank": None}
    pair = runners(written(tmp_path / "m", config_json(**(SIZES | grouped))))
    (got,), (want,) = (runner.step((runner.sequence(), TEXT[:20])) for runner in pair)
    assert close(got, want)
