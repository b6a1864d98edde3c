"""One event of every type, and a small trace of them."""

from __future__ import annotations

from pathlib import Path

from thinkloop.traces.events import (
    Attachment,
    Content,
    ContextEdited,
    Error,
    Event,
    LimitReached,
    RunFinished,
    RunStarted,
    StepFinished,
    StepStarted,
    Thinking,
    ToolCall,
    ToolResult,
    TurnFinished,
    Unknown,
    Usage,
)
from thinkloop.traces.writer import TraceWriter

LONG = "a long page, ünicode too. " * 400

EVERY_TYPE: list[Event] = [
    RunStarted(
        run_id="r1", task="Who is the mayor?", system="Be right.", model={"name": "mini", "window": 4096},
        tools=[{"type": "function", "function": {"name": "search", "description": "", "parameters": {}}}],
        limits={"steps": 9}, sampling={"temperature": 0.0}, version="0.1.0",
    ),
    StepStarted(step=1, context_tokens=12),
    Thinking(text="I look."),
    Content(text="Searching."),
    ToolCall(id="functions.search:0", name="search", arguments={"query": "mayor"}, raw='{"query": "mayor"}'),
    ToolCall(id="functions.search:1", name="search", arguments=None, raw='{"query', problem="truncated"),
    Usage(prompt_tokens=20, completion_tokens=7, thinking_tokens=3, decode_seconds=0.1),
    TurnFinished(reason="tool_calls", prompt_ids=[1, 2, 3], token_ids=[4, 5], rng_position=2),
    ToolResult(call_id="functions.search:0", name="t", content=LONG, ok=True, record={"hits": [3]}, seconds=0.2),
    ToolResult(call_id="functions.search:1", name="search", content="error: cut", ok=False, display="bad call"),
    ToolResult(
        call_id="functions.python:2", name="python", content="[figure 1]", ok=True,
        files=[Attachment("figure-1.png", "image/png", bytes(range(256))), Attachment("empty", "text/plain", b"")],
    ),
    ContextEdited(policy="drop_steps", first_step=1, last_step=1, tokens_before=9, tokens_after=5, recomputed_tokens=2),
    LimitReached(limit="steps", used=8, allowed=9, final=False, message="[note: hurry]"),
    Error(where="model", message="lost connection", recovered=True),
    StepFinished(step=1, seconds=0.5, overhead_seconds=0.001),
    Unknown(data={"type": "from_the_future", "value": [1, {"deep": None}]}),
    RunFinished(answer="Ada", reason="answered", steps=1, usage={"completion_tokens": 7}, sources=["a"], seconds=0.6),
]  # fmt: skip


def write_trace(folder: Path, events: list[Event] = EVERY_TYPE) -> Path:
    with TraceWriter.create(folder) as writer:
        for event in events:
            writer.write(event)
    return folder
