"""The `python` tool: a sandboxed Python whose variables live as long as the run."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
from thinkloop.tools import python_text
from thinkloop.tools.python_files import TAKE_SECONDS, Outbox, Taken, checked_files
from thinkloop.tools.python_keep import KeptFolder
from thinkloop.tools.sandbox import Limits, SandboxError
from thinkloop.tools.sandbox_report import isolation_report
from thinkloop.tools.sandbox_session import FLOOD, GRACE, START_SECONDS, Cell, Session, start
from thinkloop.tools.tool import Effect, Output, ToolError, object_schema
from thinkloop.tools.unsafe_python import WARNING, start_unsafe
from thinkloop.traces.events import Json, ThinkloopError

__all__ = ["Python", "PythonTool", "isolation_report"]

_DESCRIPTION = "Run Python code in a sandbox; variables are kept. Shows what is printed and the last value."
_CODE_CAP = 1_000_000  # characters
TEXT_CAP = 999_000  # characters of one result; the loop keeps a million


class Python:
    """A Toolset with one tool, `python`. Entering it starts the sandbox, so that a missing one is known at once.

    `timeout` is in seconds per call, `memory_mb` bounds each process and all together, `files` can be read in the
    working folder, `budget` is the most tokens of a result that a run shows at once. What cells draw and write comes with
    the results; `keep` is a folder that takes copies. `unsafe` runs the same Python without any sandbox, as the user of
    this process: nothing chooses it but this argument.
    """

    def __init__(
        self, *, timeout: float = 30.0, memory_mb: int = 512, files: Sequence[Path] = (), budget: int = 2000,
        keep: Path | None = None, unsafe: bool = False,
    ) -> None:  # fmt: skip
        _check("timeout", timeout, least=0.1)
        _check("memory_mb", memory_mb, least=64)
        _check("budget", budget, least=50)
        self.timeout, self.budget, self._limits = timeout, budget, Limits(memory_mb=memory_mb)
        self._files, self._keep, self._unsafe = checked_files(files, unsafe=unsafe), keep, unsafe
        self._session: Session | None = None
        self._outbox, self._warned = Outbox(), not unsafe
        self._sessions, self._one_at_a_time = 0, anyio.Lock()

    @property
    def notes(self) -> Sequence[str]:
        """What the person is to know before a run."""
        return [WARNING] if self._unsafe else []

    def tools(self) -> Sequence[PythonTool]:
        """The one tool, named `python`."""
        return [PythonTool(self)]

    async def __aenter__(self) -> Python:
        """Start a session. Raises `SandboxError`, which says what to install or allow, where that isn't possible."""
        self._outbox = Outbox(KeptFolder(Path(self._keep)) if self._keep else None)
        begin = start_unsafe if self._unsafe else start
        self._session, self._sessions = await begin(self._limits, self._files), 1
        return self

    async def __aexit__(self, *exc: Any) -> None:
        session, self._session = self._session, None
        if session:
            await _end(session)

    async def run(self, code: str) -> Output:
        """Run one cell, in a fresh session if the last was lost. Raises `ToolError` outside `async with`."""
        async with self._one_at_a_time:
            session, notice = await self._living_session()
            number = self._sessions
            cell = await session.execute(code, self.timeout)
            taken = await self._outbox.take(session, cell.reply)
            if session.lost:
                cell = replace(cell, lost=session.lost)
                with suppress(SandboxError):  # then the next call tries again, and says so
                    await self._replace(session)
            return self._output(cell, taken, notice, _facts(session, number))

    async def _living_session(self) -> tuple[Session, str]:
        """A session that is ready, and what the model must be told about it first."""
        if self._session is None:
            raise ToolError("The python tool is not running: use it inside `async with Python(...)`.")
        notice = ""
        try:
            if reason := self._session.lost:
                notice = f"(Fresh session: {reason}; earlier variables are lost.)"
                await self._replace(self._session)
            await self._session.ready()
        except SandboxError as error:
            raise ToolError(str(error)) from error
        return self._session, notice

    async def _replace(self, old: Session) -> None:
        """A new session, which comes up while the model thinks."""
        await _end(old)
        self._session = type(old)(old.interpreter, self._limits, self._files)
        self._sessions += 1

    def _output(self, cell: Cell, taken: Taken, notice: str, facts: Json) -> Output:
        head, tail, dropped = cell.printed.parts()
        interrupted = cell.stop and (cell.reply.error or "").endswith("KeyboardInterrupt")
        error = "" if interrupted else cell.reply.error or ""
        rest = [cell.reply.value or "", error, *taken.lines, _verdict(cell, self.timeout)]
        front, back = ([notice, head], [tail, *rest]) if dropped else ([notice, head, *rest], [])
        text, record = self._fitted(front, back, dropped)
        ok = not (cell.stop or cell.lost or cell.reply.error)
        record = facts | _outcome(cell) | record | taken.record
        return Output(text, display=self._warning(text), record=record, ok=ok, files=tuple(taken.files))

    def _fitted(self, front: Sequence[str], back: Sequence[str], dropped: int) -> tuple[str, Json]:
        """The result's text, at most `TEXT_CAP` characters, and for the record how many were left out of its middle. The
        loop cuts it to the budget, and lets the model read on."""
        first, last = python_text.lines(front), python_text.lines(back).rstrip("\n")
        text, left_out = python_text.fit(first, last, dropped, TEXT_CAP)
        return text or "(no output)", {"left_out": left_out}

    def _warning(self, text: str) -> str:
        """What the person sees with the first result that no sandbox held; otherwise nothing of its own."""
        if self._warned:
            return ""
        self._warned = True
        return f"{WARNING}\n{text}"


@dataclass(frozen=True, slots=True)
class PythonTool:
    """What the model may call: `python` with `code`."""

    toolset: Python

    @property
    def name(self) -> str:
        return "python"

    @property
    def description(self) -> str:
        return _DESCRIPTION

    @property
    def parameters(self) -> Json:
        return object_schema(["code"], code={"type": "string", "description": "Python code."})

    @property
    def effect(self) -> Effect:
        return "write"  # the variables are state: calls run one after the other

    @property
    def deadline(self) -> float:
        """Later than the tool's own limit, which keeps the variables where it can."""
        return self.toolset.timeout + GRACE + TAKE_SECONDS + START_SECONDS

    @property
    def budget(self) -> int:
        return self.toolset.budget

    async def call(self, arguments: Json) -> Output:
        """Run `arguments["code"]`. A Python error or a time-out gives `ok=False`, no sandbox a `ToolError`."""
        code = arguments.get("code")
        if not isinstance(code, str):
            raise ToolError('`code` must be a string of Python code, as in {"code": "1 + 1"}.')
        if len(code) > _CODE_CAP:
            raise ToolError(f"`code` has {len(code)} characters; the most is {_CODE_CAP}. Write it in several calls.")
        return await self.toolset.run(code)


async def _end(session: Session) -> None:
    with anyio.CancelScope(shield=True):
        await anyio.to_thread.run_sync(session.end)


def _check(name: str, value: float, least: float) -> None:
    if not value >= least:
        raise ThinkloopError(f"Python({name}={value!r}) is too small: give {least} or more.")


def _facts(session: Session, number: int) -> Json:
    held = {"isolation": session.isolation, "sum_limit": session.sum_limit}
    return {"session": number, "python": session.python, **held}


def _outcome(cell: Cell) -> Json:
    return {"cell": cell.number, "seconds": cell.seconds, "stopped": cell.stop, "lost": cell.lost}


def _verdict(cell: Cell, timeout: float) -> str:
    """A sentence on what cut the cell short, and what became of the variables; empty if nothing did."""
    cut = {"": "Session ended", "time": f"Stopped after {timeout:g} s: time limit"}
    start = cut.get(cell.stop, f"Stopped: it printed more than {FLOOD >> 20} MB")
    if cell.lost:
        reason = f"{'; ' if cell.stop else ': '}{cell.lost}"
        return f"{start}{reason}. Variables are lost; the next call starts a fresh session."
    return f"{start}. Variables are kept." if cell.stop else ""
