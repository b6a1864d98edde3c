"""The Python face of a run: an `Agent` is a model, tools and limits; `run` gives a `Result`, `stream` the events."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Self

import anyio
import anyio.to_thread
from thinkloop.agent.citations import Citation
from thinkloop.agent.context import Context
from thinkloop.agent.limits import Limits
from thinkloop.agent.loop import Listener, Loop
from thinkloop.agent.model import Model
from thinkloop.agent.named import Announce, Device, KvDtype, Local, Progress, is_url, open_model
from thinkloop.agent.results import with_paging
from thinkloop.agent.stream import EventStream
from thinkloop.engine.params import Sampling
from thinkloop.tools.tool import Tool, Toolset, declaration, entered
from thinkloop.traces.events import EndReason, Event, Json, RunStarted, ThinkloopError, Usage
from thinkloop.traces.writer import TraceWriter

SYSTEM = "You are a research agent. Think, call tools, read the results, and answer with what they show."
"""The system prompt of a model that doesn't bring its own."""
CITING = " Cite the lines that show it, as [id:L12-L15]."
"""What it adds where documents can be opened."""
TRACES = "runs"
"""Folder under the current directory that traces go to unless told otherwise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """How a run ended. `usage` sums over all turns; `trace` is the trace's folder, None when none was written;
    `citations` says which of the answer's citations hold; `error` is what went wrong when `reason` is `error`."""

    answer: str
    reason: EndReason
    steps: int
    usage: Usage
    sources: list[str] = field(default_factory=list)
    citations: list[Citation] = field(default_factory=list)
    seconds: float = 0.0
    trace: Path | None = None
    error: str = ""


class Agent:
    """A model with tools and limits, ready for tasks.

    `model` is `"mini"`, a checkpoint folder, the URL of an OpenAI-compatible server, or any `Model`; one that is
    named is loaded for the first task and kept until `aclose`. `tools` are tools, toolsets, or functions decorated
    with `@tool`. `sampling` and `seed` are how a named model samples; what neither of them sets stays as the checkpoint
    or the server has it, and a model in this process draws with seed 0. `device` is where such a model runs, `kv_dtype`
    what its cache holds ("fp8" packs rows into 8 bits, on "cuda"), `context` the most tokens of its window (None: all it
    has). It writes its calls under a grammar where the `grammar` extra is
    installed, unless `grammar` is False. `response_format` (OpenAI's `json_object` or `json_schema`) is the form of the
    answer; `forbid_repeats` keeps such a grammar from writing a call of the last three steps again. `progress` is
    called, from another thread, while a named model is loaded, `announce` before that with a line that says how a CUDA
    device's memory is shared out. `trace` is the folder for the trace of a run (one that
    holds none yet), None for a new one under `runs/`, False for no trace.

    Raises `ThinkloopError` for a model, tool or option that can't be used.
    """

    def __init__(
        self,
        model: str | Path | Model = "mini",
        tools: Sequence[Tool | Toolset] = (),
        *,
        limits: Limits | None = None,
        seed: int | None = None,
        system: str | None = None,
        sampling: Sampling | None = None,
        trace: str | Path | Literal[False] | None = None,
        model_name: str | None = None,
        device: Device = "cpu",
        kv_dtype: KvDtype = "bf16",
        context: int | None = None,
        grammar: bool = True,
        response_format: Json | None = None,
        forbid_repeats: bool = False,
        progress: Progress | None = None,
        announce: Announce | None = None,
    ) -> None:
        self._tools = [_checked_tool(tool) for tool in tools]
        self._limits = limits or Limits()
        if sampling is not None and seed is not None:
            sampling = replace(sampling, seed=seed)
        self._sampling = sampling or Sampling(seed=seed)
        self._system, self._trace = system, trace
        self._response_format, self._forbid_repeats = response_format, forbid_repeats
        local = Local(
            device=device, kv_dtype=kv_dtype, context=context, grammar=grammar, progress=progress, announce=announce
        )
        self._open = _opener(model, sampling, seed, model_name, local)
        self._model: Model | None = None if isinstance(model, str | Path) else model
        self._owned = self._model is None
        self._remote = isinstance(model, str) and is_url(model)
        self._loading = anyio.Lock()

    async def run(self, task: str) -> Result:
        """Runs the task to its answer. Cancelling stops model and tools and leaves a whole trace.

        Raises `ThinkloopError` when the run can't start (empty or too long a task, no model, no sandbox) or its trace
        can't be written. A model that fails on the way gives a `Result` whose reason is `error`.
        """
        return await self._run(task, _ignore)

    def run_sync(self, task: str) -> Result:
        """`run` for code that isn't async."""
        return anyio.run(self._run_and_close, task)

    def stream(self, task: str) -> EventStream:
        """The events of a run, for `async for`; see `EventStream` for how leaving early stops the run."""
        checked = _checked_task(task)

        async def drive(listener: Listener) -> Result:
            return await self._run(checked, listener)

        return EventStream(drive)

    async def aclose(self) -> None:
        """Closes a model that was given by name. A `Model` given as an object stays open: its owner closes it."""
        if self._owned and self._model is not None:
            model, self._model = self._model, None
            await model.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.aclose()

    async def _run_and_close(self, task: str) -> Result:
        try:
            return await self.run(task)
        finally:
            if self._remote:  # connections belong to the event loop, which ends here; an engine is worth keeping
                await self.aclose()

    async def _run(self, task: str, listener: Listener) -> Result:
        task = _checked_task(task)
        model = await self._ready_model()
        async with AsyncExitStack() as stack:
            tools = with_paging(await entered(self._tools, stack), model.count_tokens)
            start = self._started(task, model, tools)
            context = Context(model, start.system, task, start.tools)
            writer = stack.enter_context(self._writer(start.run_id)) if self._trace is not False else None
            loop = Loop(
                start, model, context, tools, self._limits, listener=listener, journal=writer, notes=_notes(self._tools),
                response_format=self._response_format, forbid_repeats=self._forbid_repeats,
            )  # fmt: skip
            end = await loop.run()
        return Result(
            answer=end.answer, reason=end.reason, steps=end.steps, usage=Usage(**end.usage), sources=end.sources,
            citations=loop.citations(end.answer), seconds=end.seconds, trace=writer.folder if writer else None,
            error=loop.error,
        )  # fmt: skip

    async def _ready_model(self) -> Model:
        async with self._loading:
            if self._model is None:
                self._model = await anyio.to_thread.run_sync(self._open, abandon_on_cancel=True)
            return self._model

    def _started(self, task: str, model: Model, tools: Mapping[str, Tool]) -> RunStarted:
        own: str | None = self._system if self._system is not None else getattr(model, "system", None)
        system = own if own is not None else SYSTEM + (CITING if "open" in tools else "")
        return RunStarted(
            run_id=uuid.uuid4().hex[:12], task=task, system=system,
            model=model.describe(), tools=[declaration(tool) for tool in tools.values()], limits=self._limits.to_json(),
            sampling=self._sampling.to_json(), version=_version(),
        )  # fmt: skip

    def _writer(self, run_id: str) -> TraceWriter:
        if isinstance(self._trace, str | Path):
            return TraceWriter.create(self._trace)
        return TraceWriter.create(Path(TRACES) / f"{time.strftime('%Y%m%d-%H%M%S')}-{run_id}")


async def _ignore(event: Event) -> None:
    """The listener of a run that nobody watches."""


def _opener(
    model: object,
    sampling: Sampling | None,
    seed: int | None,
    model_name: str | None,
    local: Local,
) -> Callable[[], Model]:
    if isinstance(model, str | Path):
        return open_model(str(model), sampling=sampling, seed=seed, model_name=model_name, local=local)
    if not (hasattr(model, "stream") and hasattr(model, "count_tokens")):
        raise ThinkloopError(
            f'`model` is {type(model).__name__}: give "mini", a checkpoint folder, a server\'s URL, or a `Model`.'
        )
    if any(option is not None for option in (sampling, seed, model_name)):
        raise ThinkloopError(
            "`sampling`, `seed` and `model_name` are for a model given by name: set them on your model instead."
        )
    return _never_opened


def _never_opened() -> Model:
    raise ThinkloopError("This agent's model was given as an object and has been closed: make a new agent.")


def _checked_tool(tool: Any) -> Tool | Toolset:
    if isinstance(tool, Tool | Toolset) and not isinstance(tool, type):
        return tool
    if isinstance(tool, type):
        raise ThinkloopError(
            f"`{tool.__name__}` is a class: give an instance of it, as in tools=[{tool.__name__}(...)]."
        )
    name = getattr(tool, "__name__", repr(tool))
    hint = "decorate the function with `@tool`" if callable(tool) else "give tools, toolsets or functions with `@tool`"
    raise ThinkloopError(f"`{name}` is not a tool: {hint}.")


def _checked_task(task: str) -> str:
    if not isinstance(task, str) or not task.strip():
        raise ThinkloopError("The task is empty: say what the agent should find out or do.")
    return task


def _notes(given: Sequence[Tool | Toolset]) -> list[str]:
    """What toolsets have to tell the person before the run: an attribute `notes`, where there is one."""
    return [str(note) for entry in given for note in getattr(entry, "notes", ())]


def _version() -> str:
    from importlib.metadata import version  # takes 20 ms, and only a run needs it

    return version("thinkloop")
