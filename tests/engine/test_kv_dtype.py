"""Cache rows in 8 bits: where they can be had, what they take, that saved ones stay among their own, how far a model moves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import thinkloop.engine.engine
import torch
from checkpoints import config_json, mini_config_json, random_tensors, write_checkpoint
from published import PUBLISHED
from safetensors import safe_open
from safetensors.torch import save_file
from thinkloop.engine.checkpoint import Checkpoint
from thinkloop.engine.config import ModelConfig
from thinkloop.engine.device import EngineError, MemoryPlan, check_kv_dtype, plan_memory
from thinkloop.engine.engine import MINI, Engine
from thinkloop.engine.footprint import cache_bytes
from thinkloop.engine.kv_cache import BLOCK, BlockPool, LatentCache
from thinkloop.engine.model import Segment, Transformer
from thinkloop.engine.params import Sampling
from thinkloop.engine.snapshot import Snapshot, SnapshotError
from thinkloop.engine.tokenizer import Tokenizer
from thinkloop.engine.weights import load_weights
from thinkloop.kernels.kv_rows import KvDtype, pack_rows, unpack_rows
from torch import Tensor

BF16, CPU = torch.bfloat16, torch.device("cpu")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CUDA = torch.device("cuda")  # a name: nothing is made there
HOPPER, GB = (9, 0), 10**9
MOONLIGHT = ModelConfig.from_json(PUBLISHED["moonlight"])
K2 = ModelConfig.from_json(PUBLISHED["k2_thinking"])
SIZES = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "q_lora_rank": None,
    "kv_lora_rank": 128, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16, "intermediate_size": 32,
    "max_position_embeddings": 96, "vocab_size": 64, "torch_dtype": "bfloat16", "first_k_dense_replace": 2,
}  # fmt: skip
TEXT = [(7 * index) % 64 for index in range(80)]


# -- where they can be had ------------------------------------------------------------------------------------------


def test_packed_rows_are_for_the_kernels_on_a_gpu_that_converts() -> None:
    check_kv_dtype("fp8", K2, BF16, CUDA, HOPPER)
    check_kv_dtype("bf16", K2, torch.float32, CPU)
    for words, arguments in (
        ("isn't known; use 'bf16' or 'fp8'", ("int4", K2, BF16, CUDA, HOPPER)),
        ("--device cuda.*this is 'cpu' in bfloat16", ("fp8", K2, BF16, CPU)),
        ("this is 'cuda' in float32", ("fp8", K2, torch.float32, CUDA, HOPPER)),
        ("`kv_lora_rank` is 64", ("fp8", replace(K2, kv_lora_rank=64), BF16, CUDA, HOPPER)),
        (r"capability 9\.0 \(H100\).*has 8\.9", ("fp8", K2, BF16, CUDA, (8, 9))),
    ):
        with pytest.raises(EngineError, match=words):
            check_kv_dtype(*arguments)  # type: ignore[arg-type]  # of different lengths


def test_on_the_cpu_they_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="kv_dtype 'fp8' is for the Triton kernels"):
        Engine.load(write_checkpoint(tmp_path / "m", mini_config_json()), kv_dtype="fp8")


# -- what they take -------------------------------------------------------------------------------------------------


def test_a_token_takes_656_bytes_a_layer() -> None:
    assert cache_bytes(K2, BF16, "fp8") == 61 * 656
    assert cache_bytes(K2, BF16) == 61 * 1152
    pool = BlockPool(ModelConfig.from_json(config_json(**SIZES)), 100, BF16, CPU, "fp8")
    assert (pool.rows.shape, pool.rows.dtype) == ((2, 2 * BLOCK, 128 + 4 + 32), torch.uint8)


def test_a_plan_counts_them_and_names_them() -> None:
    weights = plan_memory(MOONLIGHT, BF16, 140 * GB).weights
    free = weights + 3 * GB
    plain, packed = (plan_memory(MOONLIGHT, BF16, free, kv_dtype=kv_dtype) for kv_dtype in ("bf16", "fp8"))  # type: ignore[arg-type]
    assert plain.weights + plain.workspace + plain.cache <= free
    assert packed.cache == packed.cache_tokens * 27 * 656
    assert packed.cache_tokens / plain.cache_tokens == pytest.approx(1152 / 656, rel=1e-3)
    assert (plain.kv_dtype, packed.kv_dtype) == ("bf16", "fp8")
    assert plan_memory(MOONLIGHT, torch.float32, 140 * GB).kv_dtype == "float32"
    room = packed.weights + packed.workspace + 1000 * 27 * 656
    with pytest.raises(EngineError, match="1,000 tokens fit"):
        plan_memory(MOONLIGHT, BF16, room, cache_tokens=1001, kv_dtype="fp8")


def test_a_plan_is_one_line() -> None:
    plan = MemoryPlan(
        free=140_205_000_000, weights=11_310_000_000, workspace=2_100_000_000, cache=8_150_000_000, cache_tokens=262_144,
        kv_dtype="bf16",
    )  # fmt: skip
    assert str(plan) == (
        "11.31 GB of weights, 2.10 GB for steps, 8.15 GB of cache for 262,144 tokens (bf16); 140.21 GB were free"
    )


def test_a_plan_is_announced_before_weights_are_taken_and_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    plan = replace(plan_memory(K2.sliced(range(2)), BF16, 140 * GB, 5000), cache_tokens=640)
    monkeypatch.setattr(thinkloop.engine.engine, "plan_device", lambda *_: plan)
    folder = write_checkpoint(tmp_path / "m", mini_config_json(max_position_embeddings=600))
    with Engine.load(folder, announce=said.append, progress=lambda *_: said.append("reading")) as engine:
        about = engine.describe()
    assert said[0] == f"cpu: {plan}"
    assert set(said[1:]) == {"reading"}
    assert (about["cache_tokens"], about["kv_dtype"]) == (640, "float32")
    assert about["memory"] == {
        "free": 140 * GB, "weights": plan.weights, "workspace": plan.workspace, "cache": plan.cache, "cache_tokens": 640,
        "kv_dtype": "bf16",
    }  # fmt: skip


def test_on_the_cpu_nothing_is_announced(tmp_path: Path) -> None:
    said: list[str] = []
    with Engine.load(write_checkpoint(tmp_path / "m", mini_config_json()), announce=said.append) as engine:
        assert "memory" not in engine.describe()
    assert said == []


# -- saved ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, ModelConfig]:
    """A file of 70 tokens with packed rows."""
    config, path = ModelConfig.from_json(config_json(**SIZES)), tmp_path / "s.safetensors"
    cache = LatentCache(BlockPool(config, 256, BF16, CPU, "fp8"))
    cache.restore(pack_rows(torch.randn(2, 70, 144).to(BF16), 128))
    Snapshot(TEXT[:70], 3, cache.rows(), "w:bfloat16:fp8").write(path)
    return path, config


def test_packed_rows_are_saved_and_read_as_they_are(saved: tuple[Path, ModelConfig]) -> None:
    path, config = saved
    found = Snapshot.read(path, "w:bfloat16:fp8", config, torch.uint8)
    assert (found.rows.shape, found.rows.dtype, found.rng_position) == ((2, 70, 164), torch.uint8, 3)
    other = LatentCache(BlockPool(config, 256, BF16, CPU, "fp8"))
    other.restore(found.rows)
    twin = other.fork()
    twin.reserve(71)  # copies the begun block
    assert torch.equal(twin.rows(), found.rows)


def test_packed_rows_and_plain_ones_dont_mix(saved: tuple[Path, ModelConfig], tmp_path: Path) -> None:
    path, config = saved
    with pytest.raises(SnapshotError, match=r"rows in fp8, and this engine keeps them in bf16.*--kv-dtype fp8"):
        Snapshot.read(path, "w:bfloat16", config, BF16)
    Snapshot([1], 0, torch.zeros(2, 1, 144, dtype=BF16), "w:bfloat16").write(tmp_path / "plain")
    with pytest.raises(SnapshotError, match=r"rows in bf16, and this engine keeps them in fp8.*--kv-dtype bf16"):
        Snapshot.read(tmp_path / "plain", "w:bfloat16:fp8", config, torch.uint8)
    with pytest.raises(SnapshotError, match="another model"):
        Snapshot.read(path, "v:bfloat16:fp8", config, torch.uint8)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ("code", "no number"), ("scale", "no number"), ("overflow", "no number"), ("key", "no number"), ("width", "rows are"),
        ("type", "rows are"),
    ],
)  # fmt: skip
def test_packed_rows_that_no_session_can_hold_are_refused(
    saved: tuple[Path, ModelConfig], wrong: str, words: str
) -> None:
    path, config = saved
    with safe_open(str(path), framework="pt") as file:
        metadata, tokens, rows = file.metadata(), file.get_tensor("tokens"), file.get_tensor("rows")
    if wrong == "code":
        rows[1, 5, 3] = 0x7F
    elif wrong in ("scale", "overflow"):
        value = float("inf") if wrong == "scale" else 3e38
        rows[0, 69, 128:132] = torch.tensor([value]).view(torch.uint8)
    elif wrong == "key":
        rows[1, 0, 132:134] = torch.tensor([float("nan")], dtype=BF16).view(torch.uint8)
    rows = rows[..., :144].contiguous() if wrong == "width" else rows.to(BF16) if wrong == "type" else rows
    save_file({"tokens": tokens, "rows": rows}, path, metadata=metadata)
    with pytest.raises(SnapshotError, match=words):
        Snapshot.read(path, "w:bfloat16:fp8", config, torch.uint8)


# -- how far a model moves ------------------------------------------------------------------------------------------


class Packing:
    """One layer's cache whose rows are packed and unpacked on their way in, for the forward pass by torch."""

    def __init__(self, rows: Tensor, latent: int) -> None:
        self.rows, self.latent = rows, latent

    def index_copy_(self, dim: int, slots: Tensor, rows: Tensor) -> Tensor:
        return self.rows.index_copy_(dim, slots, unpack_rows(pack_rows(rows, self.latent), self.latent).to(rows.dtype))


def test_how_far_the_mini_model_moves() -> None:
    """In float32 but for its rows, reading eight pages of its world: text that it can't foresee, which moves most."""
    with Engine.load("mini") as engine:
        pages = sorted((MINI / "world").glob("*.md"))[:8]
        ids = Tokenizer.load(engine.folder).encode("\n".join(page.read_text("utf-8") for page in pages))
        plain, packed = (BlockPool(engine.config, 2048, torch.float32, CPU) for _ in range(2))
        packed.layers = [Packing(rows, engine.config.kv_lora_rank) for rows in packed.layers]  # type: ignore[misc]
        want, got = (_read(engine.model, LatentCache(pool), ids) for pool in (plain, packed))
    moved = (got - want).norm(dim=1) / want.norm(dim=1)
    kept = float((got.argmax(1) == want.argmax(1)).float().mean())
    print(
        f"\nfp8 rows, mini on {len(ids)} tokens: logits move by {float(moved.mean()):.3f}, {kept:.1%} keep their first token"
    )
    assert 0.01 < float(moved.mean()) < 0.2
    assert kept > 0.8


def _read(model: Transformer, cache: LatentCache, ids: list[int]) -> Tensor:
    cache.reserve(len(ids))
    return model.forward([Segment(cache, ids, every=True)])[0]


class Runner:
    """A small model by the kernels, with a cache of one kind."""

    def __init__(self, folder: Path, kv_dtype: KvDtype) -> None:
        config = ModelConfig.load(folder)
        weights = load_weights(Checkpoint(folder, config), BF16, DEVICE, backend="triton")
        self.pool = BlockPool(config, 2048, BF16, DEVICE, kv_dtype)
        self.pool.rows.zero_()
        self.model = Transformer(config, weights)

    def step(self, *parts: tuple[LatentCache, list[int]]) -> list[Tensor]:
        for cache, ids in parts:
            cache.reserve(cache.length + len(ids))
        return [x.cpu().clone() for x in self.model.forward([Segment(cache, ids, every=True) for cache, ids in parts])]


@pytest.fixture(scope="module")
def runners(tmp_path_factory: pytest.TempPathFactory) -> list[Runner]:
    config = config_json(**(SIZES | {"num_hidden_layers": 1}))  # the interpreter takes seconds for a step of two
    tensors = random_tensors(ModelConfig.from_json(config), dtype=BF16)
    folder = write_checkpoint(tmp_path_factory.mktemp("kv") / "m", config, tensors)
    return [Runner(folder, "bf16"), Runner(folder, "fp8")]


def test_reading_and_decoding_by_the_kernels_move_little(runners: list[Runner]) -> None:
    caches, errors = [LatentCache(runner.pool) for runner in runners], []
    for piece in (TEXT[:66], TEXT[66:67], TEXT[67:77]):  # written out, one, absorbed
        (want,), (got,) = (runner.step((cache, piece)) for runner, cache in zip(runners, caches, strict=True))
        errors += ((got - want).norm(dim=1) / want.norm(dim=1)).tolist()
    print(
        f"\nfp8 rows, random model of one layer: logits move by {sum(errors) / len(errors):.4f}, at most {max(errors):.4f}"
    )
    assert 1e-4 < max(errors) < 0.06
    assert caches[1].rows().dtype == torch.uint8


def test_the_kernels_write_the_rows_that_the_twin_packs(runners: list[Runner]) -> None:
    for count in (3, 40):  # by the kernel for few rows, and by that for many
        caches = [LatentCache(runner.pool) for runner in runners]
        for runner, cache in zip(runners, caches, strict=True):
            runner.step((cache, TEXT[:count]))
        plain, packed = (cache.rows()[0].cpu() for cache in caches)
        assert torch.equal(packed, pack_rows(plain, 128))


def test_sequences_of_any_lengths_decode_together_over_packed_rows(runners: list[Runner]) -> None:
    runner = runners[1]
    together, alone = ([LatentCache(runner.pool) for _ in range(2)] for _ in range(2))
    for cache, length in zip(together + alone, (1, 20) * 2, strict=True):
        runner.step((cache, TEXT[:length]))
    pieces = [[9], [8, 7]]
    for got, cache, piece in zip(runner.step(*zip(together, pieces, strict=True)), alone, pieces, strict=True):
        (want,) = runner.step((cache, piece))
        assert float((got - want).norm() / want.norm()) < 2e-2


@pytest.mark.anyio
async def test_a_session_over_packed_rows_is_saved_and_goes_on(runners: list[Runner], tmp_path: Path) -> None:
    def engine(runner: Runner) -> Any:
        return Engine(tmp_path, runner.model.config, runner.model, "w", runner.pool, share_prefixes=False)

    with engine(runners[1]) as packed, engine(runners[0]) as plain:
        assert (packed.fingerprint, packed.describe()["kv_dtype"]) == ("w:bfloat16:fp8", "fp8")
        session = packed.session(Sampling(temperature=0))
        await session.append(TEXT[:9])
        await session.save(tmp_path / "s")
        again = packed.session(Sampling(temperature=0))
        await again.load(tmp_path / "s")
        first, second = [[token async for token in one.generate(max_tokens=2)] for one in (session, again)]
        assert first == second
        with pytest.raises(SnapshotError, match="rows in fp8"):
            await plain.session().load(tmp_path / "s")
