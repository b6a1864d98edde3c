"""`thinkloop bench`: what `engine.bench` measured, as a table or as JSON."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, assert_never

import torch
from rich.table import Table
from thinkloop.agent.screen import plain_console
from thinkloop.engine import bench, kernel_bench
from thinkloop.engine.device import Device
from thinkloop.engine.engine import Engine

What = Literal["decode", "prefill", "load", "kernels"]
Row = bench.Decode | bench.Prefill | bench.Load | kernel_bench.Row
SESSIONS = (1, 8)
CONTEXT = 256
PREFILL_TOKENS = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """The options of one bench. `tokens` None means as many as make a round of a fraction of a second; `parts` are which
    kernels, none for all."""

    what: What
    model: str = "mini"
    device: Device = "cpu"
    tokens: int | None = None
    rounds: int = 5
    parts: tuple[str, ...] = ()
    json: bool = False


def execute(request: Request) -> None:
    """Measures and prints. Raises `ThinkloopError` when the model can't be opened or the tokens don't fit."""
    rows: Sequence[Row]
    if request.what == "load":
        facts, rows = _load(request)
    elif request.what == "kernels":
        facts, rows = _kernels(request)
    else:
        with bench.open_engine(request.model, request.device) as engine:
            facts = _about(engine)
            rows = asyncio.run(_decode(engine, request) if request.what == "decode" else _prefill(engine, request))
    facts = {"bench": request.what, "model": request.model, "device": request.device} | facts
    if request.json:
        print(json.dumps(facts | {"rows": [asdict(row) for row in rows]}))
        return
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    plain_console().print(_table([_cells(row) for row in rows]))


def _about(engine: Engine) -> dict[str, Any]:
    dtype = str(engine.model.weights.dtype).removeprefix("torch.")
    return {"dtype": dtype, "threads": torch.get_num_threads(), "torch": torch.__version__}


async def _decode(engine: Engine, request: Request) -> list[bench.Decode]:
    config, weights = engine.config, engine.model.weights
    quick = bench.token_bytes(config, weights.dtype) < bench.CACHED
    tokens = request.tokens or (128 if quick else 16)
    rows = []
    for speculate in (False, True) if bench.has_vocabulary(engine) else (False,):
        engine.speculate = speculate
        for sessions in SESSIONS:
            rows.append(await bench.decode(engine, sessions, context=CONTEXT, tokens=tokens, rounds=request.rounds))
    return rows


async def _prefill(engine: Engine, request: Request) -> list[bench.Prefill]:
    return [await bench.prefill(engine, tokens=request.tokens or PREFILL_TOKENS, rounds=request.rounds)]


def _load(request: Request) -> tuple[dict[str, Any], list[bench.Load]]:
    return {"torch": torch.__version__}, [bench.load(request.model, request.device, rounds=request.rounds)]


def _kernels(request: Request) -> tuple[dict[str, Any], list[kernel_bench.Row]]:
    rows = list(kernel_bench.run(request.parts or kernel_bench.PARTS))
    about = {
        "model": "random data", "device": "cuda", "card": torch.cuda.get_device_name(), "torch": torch.__version__,
        "copy GB/s": round(rows[0].copy_rate / 1e9), "matmul TFLOP/s": round(rows[0].matmul_rate / 1e12),
    }  # fmt: skip
    return about, rows


def _cells(row: Row) -> dict[str, str]:
    match row:
        case bench.Decode():
            cells = {
                "sessions": str(row.sessions), "drafts": "on" if row.speculate else "off",
                "tokens/s": f"{row.best:.1f}", "median": f"{row.median:.1f}", "a pass": f"{row.tokens_per_pass:.2f}",
            }  # fmt: skip
            return cells | ({} if row.reading is None else _reading(row.reading))
        case bench.Prefill():
            return {
                "tokens": str(row.tokens), "tokens/s": f"{row.best:.0f}", "median": f"{row.median:.0f}",
                "GFLOP/s": f"{row.operations * row.median / 1e9:.0f}", "matmul": f"{row.matmul / 1e9:.0f}",
                "share": f"{row.share:.0%}",
            }  # fmt: skip
        case bench.Load():
            return {
                "GB": _giga(row.nbytes), "GB/s": _giga(row.best), "median": _giga(row.median),
                "memory GB": _giga(row.resident), "peak GB": _giga(row.peak),
            }  # fmt: skip
        case kernel_bench.Row():
            return {
                "kernel": row.kernel, "shape": row.shape, "error": f"{row.error:.1e}", "µs": f"{row.microseconds:.1f}",
                "GB/s": f"{row.nbytes / row.microseconds / 1e3:.0f}", "of copy": f"{row.bandwidth:.0%}",
                "TFLOP/s": f"{row.operations / row.microseconds / 1e6:.0f}", "of matmul": f"{row.matmul:.0%}",
            }  # fmt: skip
        case _:
            assert_never(row)


def _reading(reading: bench.Reading) -> dict[str, str]:
    return {
        "GB/token": _giga(reading.weight_bytes), "GB/s": _giga(reading.rate), "memory": _giga(reading.bandwidth),
        "share": f"{reading.share:.0%}",
    }  # fmt: skip


def _giga(amount: float | None) -> str:
    return "–" if amount is None else f"{amount / 1e9:.{2 if amount < 1e10 else 1}f}"


def _table(rows: list[dict[str, str]]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    names = max(rows, key=len)
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*(row.get(name, "") for name in names))
    return table
