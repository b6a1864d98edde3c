"""The `python` tool: a sandboxed Python whose variables live as long as the run."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
from thinkloop.tools import seccomp
from thinkloop.tools.sandbox import Limits, SandboxError, bwrap_version, find_bwrap
from thinkloop.tools.sandbox_session import FLOOD, GRACE, START_SECONDS, Cell, Session, start, start_blocking
from thinkloop.tools.tool import Effect, Output, ToolError
from thinkloop.traces.events import Json, ThinkloopError

_DESCRIPTION = "Run Python code in a sandbox; variables are kept. Shows what is printed and the last value."
_CHARACTERS_PER_TOKEN = 4
_CODE_CAP = 1_000_000  # characters
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")


class Python:
    """A Toolset with one tool, `python`. Entering it starts the sandbox, so that a missing one is known at once.

    `timeout` is in seconds per call, `memory_mb` bounds each process and all together, `files` are copied into the
    working folder, `budget` is the most tokens a result may take (at about four characters each).
    """

    def __init__(
        self, *, timeout: float = 30.0, memory_mb: int = 512, files: Sequence[Path] = (), budget: int = 2000
    ) -> None:
        _check("timeout", timeout, least=0.1)
        _check("memory_mb", memory_mb, least=64)
        _check("budget", budget, least=50)
        self.timeout, self.budget, self._limits = timeout, budget, Limits(memory_mb=memory_mb)
        self._files = _checked_files(files)
        self._session: Session | None = None
        self._sessions, self._one_at_a_time = 0, anyio.Lock()

    def tools(self) -> Sequence[PythonTool]:
        """The one tool, named `python`."""
        return [PythonTool(self)]

    async def __aenter__(self) -> Python:
        """Start a session. Raises `SandboxError`, which says what to install or allow, where that isn't possible."""
        self._session, self._sessions = await start(self._limits, self._files), 1
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
            if cell.lost:
                await self._replace(session)
            return self._output(
                cell, notice, {"session": number, "python": session.python, "sum_limit": session.sum_limit}
            )

    async def _living_session(self) -> tuple[Session, str]:
        """A session that is ready, and what the model must be told about it first."""
        if self._session is None:
            raise ToolError("The python tool is not running: use it inside `async with Python(...)`.")
        notice = ""
        if reason := self._session.lost:
            notice = f"(Fresh session: {reason}; earlier variables are lost.)"
            await self._replace(self._session)
        try:
            await self._session.ready()
        except SandboxError as error:
            raise ToolError(str(error)) from error
        return self._session, notice

    async def _replace(self, old: Session) -> None:
        """A new session, which comes up while the model thinks; where it can't, the next call tries again."""
        await _end(old)
        try:
            self._session = Session(old.interpreter, self._limits, self._files)
        except SandboxError:
            return
        self._sessions += 1

    def _output(self, cell: Cell, notice: str, facts: Json) -> Output:
        head, tail, dropped = cell.printed.parts()
        interrupted = cell.stop and (cell.reply.error or "").endswith("KeyboardInterrupt")
        rest = [cell.reply.value or "", "" if interrupted else cell.reply.error or "", _verdict(cell, self.timeout)]
        front, back = ([notice, head], [tail, *rest]) if dropped else ([notice, head, *rest], [])
        text, left_out = _fit(_lines(front), _lines(back).rstrip("\n"), dropped, self.budget * _CHARACTERS_PER_TOKEN)
        record = {
            "cell": cell.number,
            "seconds": cell.seconds,
            "stopped": cell.stop,
            "lost": cell.lost,
            "left_out": left_out,
        }
        ok = not (cell.stop or cell.lost or cell.reply.error)
        return Output(text or "(no output)", record={**facts, **record}, ok=ok)


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
        code = {"type": "string", "description": "Python code."}
        return {"type": "object", "properties": {"code": code}, "required": ["code"], "additionalProperties": False}

    @property
    def effect(self) -> Effect:
        return "write"  # the variables are state: calls run one after the other

    @property
    def deadline(self) -> float:
        """Later than the tool's own limit, which keeps the variables where it can."""
        return self.toolset.timeout + GRACE + START_SECONDS

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


def isolation_report() -> Json:
    """Facts for `thinkloop doctor`: starts one session (about 50 ms) and says what holds in it.

    Keys: `works`, `error` (empty if it works), `bwrap`, `version`, `python`, `seccomp`, `uid_drop`, and `sum_limit`
    (`cgroup` or `watchdog`: what bounds the memory of all processes together).
    """
    facts: Json = {
        "works": False,
        "error": "",
        "bwrap": "",
        "version": "",
        "python": "",
        "seccomp": seccomp.supported(),
    }
    facts |= {"uid_drop": os.geteuid() == 0, "sum_limit": ""}
    try:
        facts["bwrap"] = find_bwrap()
        facts["version"] = bwrap_version(facts["bwrap"])
        session = start_blocking(Limits())
    except ThinkloopError as error:
        return facts | {"error": str(error)}
    session.end()
    return facts | {"works": True, "python": session.python, "sum_limit": session.sum_limit}


async def _end(session: Session) -> None:
    with anyio.CancelScope(shield=True):
        await anyio.to_thread.run_sync(session.end)


def _check(name: str, value: float, least: float) -> None:
    if not value >= least:
        raise ThinkloopError(f"Python({name}={value!r}) is too small: give {least} or more.")


def _checked_files(files: Sequence[Path]) -> list[Path]:
    paths = [Path(file).resolve() for file in files]
    for path in paths:
        if not path.is_file() or not os.access(path, os.R_OK):
            raise ThinkloopError(f"Python(files=...): {path} is not a readable file. Give paths of regular files.")
    if len({path.name for path in paths}) < len(paths):
        raise ThinkloopError("Python(files=...): two files have the same name; they share one folder, so rename one.")
    return paths


def _verdict(cell: Cell, timeout: float) -> str:
    """A sentence on what cut the cell short, and what became of the variables; empty if nothing did."""
    cut = {"": "Session ended", "time": f"Stopped after {timeout:g} s: time limit"}
    start = cut.get(cell.stop, f"Stopped: it printed more than {FLOOD >> 20} MB")
    if cell.lost:
        reason = f"{'; ' if cell.stop else ': '}{cell.lost}"
        return f"{start}{reason}. Variables are lost; the next call starts a fresh session."
    return f"{start}. Variables are kept." if cell.stop else ""


def _lines(parts: Sequence[str]) -> str:
    """The parts that aren't empty, each from the start of a line, without what a terminal or a tokenizer would obey."""
    return "".join(part if part.endswith("\n") else part + "\n" for part in map(_plain, parts) if part)


def _plain(text: str) -> str:
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape", "surrogatepass").decode(), text)


def _fit(front: str, back: str, dropped: int, limit: int) -> tuple[str, int]:
    """Front and back as one text of about `limit` characters, and how many were left out of its middle.

    `dropped` bytes between the two are gone already and count as characters.
    """
    whole = (front + back).rstrip("\n")
    if not dropped and len(whole) <= limit:
        return whole, 0
    if not dropped:
        front = back = whole
    first, last = front[: limit // 2], back[-(limit - limit // 2) :]
    left_out = len(whole) - limit if not dropped else dropped + len(front) - len(first) + len(back) - len(last)
    return f"{first.rstrip()}\n[... {left_out} characters left out ...]\n{last.lstrip()}", left_out
