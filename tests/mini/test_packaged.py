"""The model that ships in the package does its job: the demo question, found by real calls, shown again by replay."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open
from sample import sample
from tasks import make_task
from thinkloop.engine.tokenizer import Tokenizer
from world import make_world

import thinkloop as tl

MINI = Path(__file__).parents[2] / "engine" / "mini"
WORLD = MINI / "world"


def _thinkloop(*arguments: str, cwd: Path) -> str:
    command = [sys.executable, "-m", "thinkloop", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120, check=True).stdout


def test_the_demo_question_is_answered_by_real_calls_and_replayed(tmp_path: Path) -> None:
    lines = [json.loads(line) for line in _thinkloop("run", "--json", "--trace", "t", cwd=tmp_path).splitlines()]
    end = lines[-1]
    world, task = sample()
    assert all((WORLD / entity.file).read_text(encoding="utf-8") == entity.page for entity in world.entities.values())
    assert (MINI / "demo.txt").read_text(encoding="utf-8").strip() == task.question
    assert (end["type"], end["reason"], end["answer"]) == ("run_finished", "answered", task.answer)
    assert {line["name"] for line in lines if line["type"] == "tool_call"} == {"search", "open", "python"}
    assert all((WORLD / source).is_file() for source in end["sources"])
    again = [json.loads(line) for line in _thinkloop("replay", "--json", "t", cwd=tmp_path).splitlines()]
    assert again[-1]["answer"] == end["answer"]
    assert [line for line in again if line["type"] == "tool_result"] == [
        line for line in lines if line["type"] == "tool_result"
    ]


def test_it_is_small_and_in_the_published_format() -> None:
    assert sum(file.stat().st_size for file in MINI.rglob("*") if file.is_file()) <= 10 << 20
    config = json.loads((MINI / "config.json").read_text(encoding="utf-8"))
    assert config["model_type"] == "kimi_k2"
    assert config["quantization_config"]["format"] == "pack-quantized"
    with safe_open(MINI / "model.safetensors", "pt") as tensors:
        assert "model.layers.1.mlp.experts.0.gate_proj.weight_packed" in tensors.keys()  # noqa: SIM118  # not a dict
    assert Tokenizer.load(MINI).n_vocab == config["vocab_size"]


@pytest.mark.anyio
@pytest.mark.parametrize("family", ["hop1", "chain"])
async def test_it_answers_on_a_held_out_world(family: str, tmp_path: Path) -> None:
    world = make_world(99, held_out=True, ships=12, islands=10, people=16, lights=40)
    world.write(tmp_path)
    rng = random.Random(family)
    right = 0
    async with tl.Agent(tools=[tl.Search(tmp_path), tl.Python()], trace=False) as agent:
        for _ in range(5):
            task = make_task(world, family, rng, links=12 if family == "chain" else None)
            result = await agent.run(task.question)
            right += result.answer == task.answer
    assert right >= 4


@pytest.mark.anyio
async def test_a_run_of_300_steps_reads_each_token_once_between_context_edits(tmp_path: Path) -> None:
    world = make_world(98, held_out=True, ships=60, islands=60, people=60, lights=330)
    world.write(tmp_path)
    task = make_task(world, "chain", random.Random(0), links=298)
    prefilled = reused = edits = appended = steps = 0
    answer = ""
    async with tl.Agent(tools=[tl.Search(tmp_path)], trace=False) as agent, agent.stream(task.question) as events:
        async for event in events:
            match event:
                case tl.events.Usage():
                    prefilled += event.prefilled_tokens
                    reused += event.cached_tokens
                    steps += 1
                case tl.events.TurnFinished():
                    appended += len(event.prompt_ids)
                case tl.events.ContextEdited():
                    edits += 1
                    assert event.policy == "drop_steps"
                    assert event.tokens_after < event.tokens_before
                case tl.events.RunFinished():
                    answer = event.answer
    assert (steps, answer) == (300, task.answer)
    assert edits >= 20
    assert prefilled == appended
    assert reused > 3 * prefilled  # the rest is read again after context edits, which say so
