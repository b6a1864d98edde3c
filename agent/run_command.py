"""`thinkloop run`: from options to an agent, from its events to the screen, from how it ended to an exit code."""

from __future__ import annotations

import sys
import time
import uuid
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import anyio
from thinkloop.agent.doctor import mini_folder
from thinkloop.agent.output import print_json, screen_for
from thinkloop.agent.plain import clean
from thinkloop.agent.toolsets import ToolRequest, open_toolsets
from thinkloop.traces.events import Error, Event, RunFinished, ThinkloopError
from thinkloop.traces.writer import check_free

if TYPE_CHECKING:
    from thinkloop.agent.agent import Agent

RUNS = "runs"
INTERRUPTED = 130
_WORTH_SHOWING = 1 << 28
"""Bytes of a checkpoint from which loading takes seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """The options of one run. `task` None asks the demo question, `-` reads standard input."""

    task: str | None = None
    model: str = "mini"
    model_name: str | None = None
    tools: ToolRequest = field(default_factory=ToolRequest)
    max_steps: int = 300
    max_thinking: int | None = None
    thinking_budget: int | None = None
    max_tokens: int | None = None
    time_limit: float | None = None
    seed: int | None = None
    temperature: float | None = None
    device: Literal["cpu", "cuda"] = "cpu"
    kv_dtype: Literal["bf16", "fp8"] = "bf16"
    context: int | None = None
    grammar: bool = True
    trace: Path | None = None
    output: Literal["screen", "json", "quiet"] = "screen"


def execute(request: Request) -> int:
    """Run, show, and give the exit code: 0 for an answer, 1 for an error, 130 for an interrupt.

    Raises `ThinkloopError` when the run can't start.
    """
    task = _task(request.task)
    folder = request.trace or Path(RUNS) / f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:6]}"
    check_free(folder)
    agent = _agent(request, folder)
    watch = Watch()
    try:
        with ExitStack() as stack:
            show = _shower(request.output, folder, stack)
            anyio.run(_drive, agent, task, watch, show)
    except KeyboardInterrupt:
        print(f"\nInterrupted.{_where(folder)}", file=sys.stderr)
        return INTERRUPTED
    return watch.finish(request.output, folder)


class Watch:
    """Remembers of a run what its end is judged by."""

    def __init__(self) -> None:
        self.end: RunFinished | None = None
        self.error = ""

    def note(self, event: Event) -> None:
        if isinstance(event, RunFinished):
            self.end = event
        elif isinstance(event, Error) and not event.recovered:
            self.error = event.message

    def finish(self, output: str, folder: Path) -> int:
        """Print what `--quiet` and errors owe, and give the exit code."""
        end = self.end
        if end is None or end.reason == "error":
            message = self.error or "the run stopped without saying why"
            print(f"Error: {clean(message)}{_where(folder)}", file=sys.stderr)
            return 1
        if output == "quiet":
            print(clean(end.answer).strip())
        if end.reason == "cancelled":
            return INTERRUPTED
        return 0 if end.answer.strip() else 1


async def _drive(agent: Agent, task: str, watch: Watch, show: Callable[[Event], None]) -> None:
    try:
        async with agent.stream(task) as events:
            async for event in events:
                watch.note(event)
                show(event)
    finally:
        with anyio.CancelScope(shield=True):
            await agent.aclose()


def _agent(request: Request, folder: Path) -> Agent:
    from thinkloop.agent.agent import Agent
    from thinkloop.agent.limits import Limits
    from thinkloop.engine.params import Sampling

    limits = Limits(
        steps=request.max_steps, tokens=request.max_tokens, thinking_per_step=request.max_thinking,
        thinking=request.thinking_budget, seconds=request.time_limit,
    )  # fmt: skip
    sampling = None if request.temperature is None else Sampling(temperature=request.temperature)
    return Agent(
        request.model, open_toolsets(request.tools, _sample_world(request)), limits=limits,
        seed=request.seed, sampling=sampling, trace=folder,
        model_name=request.model_name, device=request.device, kv_dtype=request.kv_dtype, context=request.context,
        grammar=request.grammar, progress=_loading if request.output == "screen" else None,
        announce=_announce if request.output == "screen" else None,
    )  # fmt: skip


def _announce(line: str) -> None:
    print(clean(line), file=sys.stderr, flush=True)


def _loading(done: int, total: int) -> None:
    """A line that counts the gigabytes, where that takes long enough to be looked at."""
    if total >= _WORTH_SHOWING and sys.stderr.isatty():
        end = "\n" if done >= total else ""
        print(f"\rloading the model: {done / 1e9:.1f} of {total / 1e9:.1f} GB", end=end, file=sys.stderr, flush=True)


def _sample_world(request: Request) -> Path | None:
    """The texts that are searched when none are named."""
    world = mini_folder() / "world"
    wanted = set(request.tools.tools) & {"search", "open"}
    if not wanted or request.tools.corpus or request.tools.web or request.tools.pages:
        return None
    if not world.is_dir():
        raise ThinkloopError(
            f"No corpus is named, and the sample world is missing from {world}. Name a folder of texts with `--corpus "
            "DIR`, leave the tools out with `--tools python`, or install thinkloop again."
        )
    if request.task is not None and request.output == "screen":
        print("No --corpus is named: searching the sample world that comes with thinkloop.", file=sys.stderr)
    return world


def _task(given: str | None) -> str:
    task = _demo() if given is None else sys.stdin.read() if given == "-" else given
    if not task.strip():
        raise ThinkloopError(
            'The task is empty. Say what to find out: `thinkloop run "Who …?"`, or leave it out for the demo.'
        )
    return task.strip()


def _demo() -> str:
    path = mini_folder() / "demo.txt"
    try:
        return path.read_text("utf-8")
    except OSError:
        raise ThinkloopError(
            f"No task is given, and the demo question is missing from {path}. Give a task: "
            '`thinkloop run "Who …?"`, or '
            "install thinkloop again."
        ) from None


def _shower(output: str, folder: Path, stack: ExitStack) -> Callable[[Event], None]:
    if output == "json":
        return print_json
    if output == "quiet":
        return lambda event: None
    return stack.enter_context(screen_for(str(folder))).show


def _where(folder: Path) -> str:
    return f" The trace is in {folder}." if folder.is_dir() else ""
