"""How fast the engine decodes, prefills and loads, beside what the machine can do at that moment.

Each round looks at the machine first, so that another program's load meets both sides of a percentage. A rate is given
for the best round, which other programs disturbed least, and for the median one; a percentage for the median one.
"""

from __future__ import annotations

import asyncio
import gc
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple

import torch
from thinkloop.engine.checkpoint import Checkpoint
from thinkloop.engine.config import ModelConfig
from thinkloop.engine.device import Device, cache_size, choose_backend, find_device, plan_device
from thinkloop.engine.engine import MINI, Engine, default_chunk
from thinkloop.engine.footprint import active_parameters, weight_bytes
from thinkloop.engine.generation import GenerationStats
from thinkloop.engine.kv_cache import BlockPool
from thinkloop.engine.model import Transformer
from thinkloop.engine.params import Sampling
from thinkloop.engine.session import Session
from thinkloop.engine.synthetic import MADE_UP, RandomTensors
from thinkloop.engine.tokenizer import Tokenizer
from thinkloop.engine.weights import load_weights

READ_BYTES = 256 << 20
"""What one reading of the memory's speed goes through: several times any cache."""
CACHED = 64 << 20
"""Models that read less than this a token may find it in a cache; for them memory's speed says nothing."""
_SIDE = 2048
_GREEDY = Sampling(temperature=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """How much of the memory's speed went into reading weights, in the median round."""

    weight_bytes: int
    """Bytes of weights that one token reads, all formats as they lie in memory."""
    rate: float
    """Bytes of weights a second."""
    bandwidth: float
    """Bytes a second in one reading of much memory."""
    share: float
    """The first over the second."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decode:
    """Some sessions decoding together, greedily."""

    sessions: int
    speculate: bool
    best: float
    """Tokens a second, all sessions together, in the best round."""
    median: float
    tokens_per_pass: float
    """Tokens of one session for each forward pass: above 1 where drafts held."""
    reading: Reading | None
    """For one session without drafts, of a model that no cache holds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefill:
    """One session reading a text."""

    tokens: int
    best: float
    """Tokens a second in the best round."""
    median: float
    operations: int
    """Floating-point operations a token takes in products with weights, the head's left out."""
    matmul: float
    """Operations a second of one large matrix product of the model's dtype in the median round."""
    share: float
    """Operations a second over `matmul`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """A checkpoint folder becoming an engine."""

    nbytes: int
    """Bytes of tensors in the checkpoint."""
    best: float
    """Bytes a second in the best round."""
    median: float
    resident: int | None
    """Bytes of memory that the engine took, and at most took on the way; None where the system doesn't say."""
    peak: int | None


def open_engine(model: str, device: Device = "cpu") -> Engine:
    """The engine of `mini`, of a checkpoint folder, or of one of `synthetic.MADE_UP`. Raises `ThinkloopError`."""
    if model not in MADE_UP:
        return Engine.load(model, device=device, share_prefixes=False)
    # A thread of its own: as long as two threads have used OpenMP, its workers go to sleep between one op and the next,
    # and the engine's thread would wait for them to wake (a token 40 instead of 35 ms).
    with ThreadPoolExecutor(1) as thread:
        transformer, pool = thread.submit(_made_up, MADE_UP[model], device).result()
    config, chunk = transformer.config, default_chunk(device)
    return Engine(Path(model), config, transformer, "random", pool, prefill_chunk=chunk, share_prefixes=False)


def _made_up(data: dict[str, Any], name: Device) -> tuple[Transformer, BlockPool]:
    config, device, dtype = ModelConfig.from_json(data), find_device(name), torch.bfloat16
    window = config.max_position_embeddings
    plan = plan_device(window, config, dtype, device)  # which refuses what doesn't fit
    tokens = cache_size(None, config, dtype) if plan is None else window
    pool, backend = BlockPool(config, tokens, dtype, device), choose_backend(device, dtype)
    weights = load_weights(RandomTensors(config, device=device), dtype, device, backend=backend)
    return Transformer(config, weights), pool


def read_bandwidth(device: torch.device) -> float:
    """Bytes a second in one reading of much memory, by all of torch's threads; on CUDA of so much that waiting for the result
    counts for nothing."""
    nbytes = READ_BYTES
    if device.type == "cuda":
        nbytes = min(16 * READ_BYTES, torch.cuda.mem_get_info(device)[0] // 2) // 4 * 4
    buffer = torch.ones(nbytes // 4, device=device)
    return nbytes / min(_seconds(lambda: float(buffer.amax())) for _ in range(4))


def matmul_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Operations a second of a product of two square matrices of 2,048."""
    a = torch.ones(_SIDE, _SIDE, dtype=dtype, device=device)
    return 2 * _SIDE**3 / min(_seconds(lambda: float((a @ a)[0, 0])) for _ in range(3))


def _seconds(work: Callable[[], object]) -> float:
    started = perf_counter()
    work()
    return perf_counter() - started


def token_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes of weights that one token reads: everything but the embeddings and the experts that aren't chosen."""
    chosen = replace(config, n_routed_experts=config.num_experts_per_tok)
    return weight_bytes(chosen, dtype) - config.vocab_size * config.hidden_size * dtype.itemsize


def token_operations(config: ModelConfig) -> int:
    """Floating-point operations of one prefilled token in products with weights."""
    tables = 1 if config.tie_word_embeddings else 2
    return 2 * (active_parameters(config) - tables * config.vocab_size * config.hidden_size)


def has_vocabulary(engine: Engine) -> bool:
    """Whether the engine's model can read text; a made-up one can't."""
    return (engine.folder / "tiktoken.model").is_file()


def texts(engine: Engine, count: int, length: int, seed: int = 0) -> list[list[int]]:
    """`count` different texts of `length` tokens: the sample world's pages where the model has a vocabulary, otherwise
    (and when the pages don't suffice) random tokens."""
    ids: list[int] = []
    if has_vocabulary(engine):
        tokenizer = Tokenizer.load(engine.folder)
        pages = [page.read_text(encoding="utf-8") for page in sorted((MINI / "world").glob("*.md"))]
        ids = [token for page in pages for token in tokenizer.encode(page)]
    missing, generator = max(0, count * length - len(ids)), torch.Generator().manual_seed(seed)
    ids += torch.randint(engine.config.vocab_size, (missing,), generator=generator).tolist()
    return [ids[at : at + length] for at in range(0, count * length, length)]


async def decode(engine: Engine, sessions: int, *, context: int, tokens: int, rounds: int) -> Decode:
    """Lets `sessions` sessions, each after a text of `context` tokens, decode `tokens` tokens each, `rounds` times."""
    roots = [engine.session(_GREEDY) for _ in range(sessions)]
    for root, text in zip(roots, texts(engine, sessions, context), strict=True):
        await root.append(text)
    rates, bandwidths, passes = [], [], 0.0
    for _ in range(rounds):
        bandwidths.append(await engine.scheduler.run(lambda: read_bandwidth(engine.model.weights.device)))
        seconds, stats = await _decode_round(roots, tokens)
        rates.append(sessions * tokens / seconds)
        passes += sum(one.passes for one in stats) / sessions
    for root in roots:
        root.close()
    plain = sessions == 1 and not engine.speculate
    return Decode(
        sessions=sessions, speculate=engine.speculate, best=max(rates), median=median(rates),
        tokens_per_pass=rounds * tokens / passes, reading=_reading(engine, rates, bandwidths) if plain else None,
    )  # fmt: skip


def _reading(engine: Engine, rates: Sequence[float], bandwidths: Sequence[float]) -> Reading | None:
    nbytes = token_bytes(engine.config, engine.model.weights.dtype)
    shares = [nbytes * rate / bandwidth for rate, bandwidth in zip(rates, bandwidths, strict=True)]
    if nbytes < CACHED:
        return None
    return Reading(weight_bytes=nbytes, rate=nbytes * median(rates), bandwidth=median(bandwidths), share=median(shares))


async def _decode_round(roots: Sequence[Session], tokens: int) -> tuple[float, list[GenerationStats]]:
    forks = [root.fork() for root in roots]
    started = perf_counter()
    stats = await asyncio.gather(*(_generate(fork, tokens) for fork in forks))
    seconds = perf_counter() - started
    for fork in forks:
        fork.close()
    return seconds, stats


async def _generate(session: Session, tokens: int) -> GenerationStats:
    stream = session.generate(max_tokens=tokens + 1)  # the first comes from logits that are at hand
    async for _ in stream:
        pass
    return stream.stats


async def prefill(engine: Engine, *, tokens: int, rounds: int) -> Prefill:
    """Lets new sessions read a text of `tokens` tokens, one after the other."""
    weights, operations = engine.model.weights, token_operations(engine.config)
    (text,) = texts(engine, 1, tokens)
    rates, products = [], []
    for _ in range(rounds):
        products.append(await engine.scheduler.run(lambda: matmul_rate(weights.dtype, weights.device)))
        session = engine.session(_GREEDY)
        started = perf_counter()
        await session.append(text)
        rates.append(tokens / (perf_counter() - started))
        session.close()
    shares = [operations * rate / product for rate, product in zip(rates, products, strict=True)]
    return Prefill(
        tokens=tokens, best=max(rates), median=median(rates), operations=operations, matmul=median(products),
        share=median(shares),
    )  # fmt: skip


def load(model: str, device: Device = "cpu", *, rounds: int) -> Load:
    """Loads a model `rounds` times; one of `MADE_UP` is written to a temporary folder first. Files that were read
    lately come from the system's memory, not from the disk. Raises `ThinkloopError`."""
    if model not in MADE_UP:
        return _load(model, device, rounds)
    with tempfile.TemporaryDirectory() as folder:
        RandomTensors(ModelConfig.from_json(MADE_UP[model])).write(Path(folder), MADE_UP[model])
        return _load(folder, device, rounds)


def _load(folder: str, device: Device, rounds: int) -> Load:
    rates, nbytes = [], 0
    memory: tuple[int | None, int | None] = (None, None)
    for number in range(rounds):
        gc.collect()
        before, started = _memory(reset=True), perf_counter()
        engine = Engine.load(folder, device=device)
        seconds, after = perf_counter() - started, _memory()
        nbytes = Checkpoint(engine.folder, engine.config).nbytes
        rates.append(nbytes / seconds)
        if number == 0 and before is not None and after is not None:  # later ones reuse what was taken then
            memory = (after.resident - before.resident, after.peak - before.resident)
        engine.close()
        del engine
    return Load(nbytes=nbytes, best=max(rates), median=median(rates), resident=memory[0], peak=memory[1])


class _Memory(NamedTuple):
    resident: int
    peak: int


def _memory(*, reset: bool = False) -> _Memory | None:
    """This process's resident memory in bytes, now and at most since the last reset. None where there is no /proc."""
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    fields = dict(line.split(":", 1) for line in lines)
    resident, peak = (int(fields[name].split()[0]) << 10 for name in ("VmRSS", "VmHWM"))
    return _Memory(resident, peak)
