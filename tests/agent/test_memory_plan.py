"""What a card's memory is used for is said before a model is loaded, and recorded; the cache's format reaches the engine."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import thinkloop.agent.agent
import thinkloop.engine.engine
import torch
from thinkloop.agent.agent import Agent
from thinkloop.agent.cli import app
from thinkloop.agent.testing import ScriptedModel
from thinkloop.engine.config import ModelConfig
from thinkloop.engine.device import MemoryPlan, plan_memory
from thinkloop.engine.engine import MINI
from thinkloop.traces.events import RunStarted, ThinkloopError
from thinkloop.traces.reader import TraceReader
from typer.testing import CliRunner, Result


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def plan(monkeypatch: pytest.MonkeyPatch) -> MemoryPlan:
    """As if the mini model were loaded onto a card with 10 GB free."""
    made = plan_memory(ModelConfig.load(MINI), torch.bfloat16, 10**10, 2048)
    monkeypatch.setattr(thinkloop.engine.engine, "plan_device", lambda *_: made)
    return made


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["run", "Who?", "--tools", "", "--max-tokens", "3", "--trace", "t", *arguments])


def test_the_screen_says_it_on_standard_error_and_the_trace_records_it(plan: MemoryPlan, here: Path) -> None:
    result = run()
    assert f"cpu: {plan}\n" in result.stderr
    assert "cpu: " not in result.stdout
    start = next(event for event in TraceReader.open(here / "t").events() if isinstance(event, RunStarted))
    assert start.model["memory"] == asdict(plan)
    assert (start.model["cache_tokens"], start.model["kv_dtype"]) == (2048, "float32")


@pytest.mark.parametrize("option", ["--quiet", "--json"])
def test_other_outputs_dont_say_it(plan: MemoryPlan, option: str) -> None:
    assert "of weights" not in run(option).stderr


def test_packed_rows_on_the_cpu_are_an_error_that_says_what_to_do() -> None:
    result = run("--kv-dtype", "fp8")
    assert result.exit_code == 1
    assert "kv_dtype 'fp8' is for the Triton kernels, with device 'cuda' (--device cuda)" in " ".join(
        result.stderr.split()
    )
    assert run("--kv-dtype", "fp7").exit_code == 2


def test_the_option_comes_from_flag_or_file(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def open_scripted(name: str, **options: Any) -> Any:
        asked.append(options["local"].kv_dtype)
        return lambda: ScriptedModel([{"content": "Ada"}])

    monkeypatch.setattr(thinkloop.agent.agent, "open_model", open_scripted)
    run("--json")
    (here / "thinkloop.toml").write_text('kv-dtype = "fp8"\n')
    CliRunner().invoke(app, ["run", "Who?", "--tools", "", "--json"])
    CliRunner().invoke(app, ["run", "Who?", "--tools", "", "--json", "--kv-dtype", "bf16"])
    assert asked == ["bf16", "fp8", "bf16"]


def test_a_server_has_no_such_option() -> None:
    with pytest.raises(ThinkloopError, match="`kv_dtype` and `context` are for a model in this process"):
        Agent("http://x/v1", model_name="k2", kv_dtype="fp8")
