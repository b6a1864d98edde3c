"""What runs where is decided, planned and refused before any memory is taken."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoints import mini_config_json, random_tensors, write_checkpoint
from published import PUBLISHED
from thinkloop.engine.checkpoint import Checkpoint
from thinkloop.engine.config import ModelConfig
from thinkloop.engine.device import (
    EngineError,
    check_cuda,
    check_kernels,
    choose_backend,
    find_device,
    narrowed,
    plan_memory,
)
from thinkloop.engine.engine import Engine
from thinkloop.engine.weights import load_weights

BF16 = torch.bfloat16
GB = 10**9
MOONLIGHT = ModelConfig.from_json(PUBLISHED["moonlight"])
K2 = ModelConfig.from_json(PUBLISHED["k2_thinking"])


def test_a_plan_adds_up_and_gives_the_cache_what_is_left() -> None:
    plan = plan_memory(MOONLIGHT, BF16, 140 * GB)
    assert plan.weights + plan.workspace + plan.cache <= plan.free
    assert plan.cache_tokens == 16 * 8192  # more than sixteen windows are of no use
    tight = plan_memory(MOONLIGHT, BF16, plan.weights + plan.workspace + 31_104 * 1000)
    assert tight.cache_tokens == 1000  # 27 layers of 576 values of two bytes
    assert "for 1,000 tokens" in str(tight)


def test_a_model_that_is_too_large_is_refused_with_the_layers_that_fit() -> None:
    with pytest.raises(EngineError, match=r"first (\d+) layers would fit") as caught:
        plan_memory(K2, BF16, 140 * GB)
    layers = int(str(caught.value).split("its first ")[1].split()[0])
    assert 10 <= layers <= 14  # a layer of K2's experts takes 9.8 GB
    plan_memory(K2.sliced(range(layers)), BF16, 140 * GB)
    with pytest.raises(EngineError, match="would fit"):
        plan_memory(K2.sliced(range(layers + 1)), BF16, 140 * GB)
    with pytest.raises(EngineError, match="nor would one layer"):
        plan_memory(K2, BF16, GB)


def test_a_cache_that_is_too_large_is_refused_with_the_tokens_that_fit() -> None:
    free = plan_memory(MOONLIGHT, BF16, 140 * GB)
    with pytest.raises(EngineError, match="beside the model 1,000 tokens fit"):
        plan_memory(MOONLIGHT, BF16, free.weights + free.workspace + 31_104 * 1000, cache_tokens=1001)


def test_a_shorter_window_needs_less_and_a_longer_one_is_refused() -> None:
    assert narrowed(K2, 10_000).max_position_embeddings == 10_000
    assert plan_memory(narrowed(MOONLIGHT, 1000), BF16, 140 * GB).cache_tokens == 16_000
    for wrong in (0, 262_145):
        with pytest.raises(EngineError, match="from 1 to 262,144"):
            narrowed(K2, wrong)


def test_a_session_keeps_to_the_context_it_was_given(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = write_checkpoint(tmp_path_factory.mktemp("m") / "m", mini_config_json(max_position_embeddings=600))
    with Engine.load(folder) as whole, Engine.load(folder, context=40) as narrow:
        assert narrow.session().window == 40
        assert narrow.describe()["weights"] == whole.describe()["weights"]


def test_sizes_that_the_kernels_dont_take_are_named() -> None:
    check_kernels(K2)
    check_kernels(MOONLIGHT)
    for changes, name in (
        ({"kv_lora_rank": 48}, "kv_lora_rank"), ({"qk_rope_head_dim": 8}, "qk_rope_head_dim"), ({"v_head_dim": 24}, "v_head_dim"),
        ({"kv_lora_rank": 32}, "qk_rope_head_dim"), ({"kv_lora_rank": 1 << 20}, "kv_lora_rank"),
        ({"hidden_size": 7164}, "hidden_size"), ({"moe_intermediate_size": 2044}, "moe_intermediate_size"),
        ({"q_lora_rank": 1532}, "q_lora_rank"),
    ):  # fmt: skip
        with pytest.raises(EngineError, match=f"`{name}` is"):
            check_kernels(replace(K2, **changes))


def test_int4_scales_of_another_type_are_refused_for_the_kernels(tmp_path: Path) -> None:
    config = ModelConfig.from_json(mini_config_json())
    tensors = {
        name: tensor.float() if name.endswith("weight_scale") else tensor
        for name, tensor in random_tensors(config, dtype=BF16).items()
    }
    folder = write_checkpoint(tmp_path / "m", mini_config_json(), tensors)
    with pytest.raises(EngineError, match=r"scales are torch\.float32"):
        load_weights(Checkpoint(folder, config), BF16, torch.device("cpu"), backend="triton")


def test_a_cache_that_no_memory_holds_is_a_clear_error(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", mini_config_json())
    with pytest.raises(EngineError, match=r"no memory for a KV cache of 10,000,000,000,000 tokens.*cache_tokens"):
        Engine.load(folder, cache_tokens=10**13)


@pytest.mark.parametrize(
    ("capability", "triton", "words"),
    [((7, 5), (3, 6), "capability 7.5"), ((9, 0), None, "isn't installed"), ((9, 0), (2, 1), "this is 2.1")],
)
def test_a_card_or_a_triton_that_cant_do_it_is_named(
    capability: tuple[int, int], triton: tuple[int, int] | None, words: str
) -> None:
    with pytest.raises(EngineError, match=words):
        check_cuda(capability, triton)


def test_a_card_and_a_triton_that_can_are_taken() -> None:
    check_cuda((8, 0), (3, 6))
    check_cuda((9, 0), (3, 7))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_without_a_cuda_device_the_error_says_so() -> None:
    with pytest.raises(EngineError, match="no CUDA device"):
        find_device("cuda")


def test_the_kernels_serve_bfloat16_on_cuda_and_torch_the_rest() -> None:
    assert choose_backend(torch.device("cuda"), BF16) == "triton"
    assert choose_backend(torch.device("cuda"), torch.float32) == "torch"
    assert choose_backend(torch.device("cpu"), BF16) == "torch"
