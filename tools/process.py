"""Runs a tool's function in a process of its own, which can be killed whatever the function does.

Each call starts a Python that imports the function by name (`tools.process_worker`), sends it the arguments and reads
one reply, both as length-prefixed JSON over pipes. Nothing in a reply is trusted or unpickled. The process and all that
it started are killed when the call is over, however it ends; when this program dies, the worker sees its pipe close and
kills its group itself.
"""

from __future__ import annotations

import base64
import inspect
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import anyio
from anyio.abc import Process
from anyio.streams.buffered import BufferedByteReceiveStream
from thinkloop.tools.outcome import told
from thinkloop.tools.process_tree import kill_family, signal_name
from thinkloop.tools.signature import DefinitionError
from thinkloop.tools.thread import Outcome
from thinkloop.tools.tool import Attachment, Output, ToolError
from thinkloop.traces.events import Json

MAX_REPLY = 128 << 20
"""Bytes."""
_START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from thinkloop.tools.process_worker import main; main()"
)


class WorkerError(Exception):
    """What a function raised in its process. `kinds` are the names of the exception's classes."""

    def __init__(self, message: str, kinds: tuple[str, ...]) -> None:
        super().__init__(message)
        self.kinds = kinds


class WorkerDied(Exception):
    """The process of a tool ended without a reply."""


def reason(error: BaseException) -> str:
    """What went wrong, as `Kind: message`, wherever it was raised."""
    return str(error) if isinstance(error, (WorkerDied, WorkerError)) else told(error)


@dataclass(frozen=True, slots=True)
class Target:
    """A function as another process finds it: by module (its file where the module can't be imported by name)."""

    module: str
    file: str
    name: str


def target_of(function: Any, tool_name: str) -> Target:
    """Where another process finds `function`. Raises `DefinitionError` for one that isn't at the top of a module."""
    if not inspect.isfunction(function) or "<" in function.__qualname__:
        what = getattr(function, "__qualname__", type(function).__name__)
        raise DefinitionError(f"`{tool_name}`: `process=True` is for functions that another process can import by name, "
                              f"which `{what}` is not. Define it with `def` at the top of a module.")  # fmt: skip
    module = sys.modules.get(function.__module__)
    file = str(getattr(module, "__file__", None) or "")
    name = function.__module__
    if name == "__main__":
        spec = getattr(module, "__spec__", None)
        name = spec.name if spec else name
        if not (spec or Path(file).is_file()):
            raise DefinitionError(f"`{tool_name}`: `process=True` can't find functions that were typed in or piped to "
                                  "Python: put it into a file.")  # fmt: skip
    return Target(name, str(Path(file).resolve()) if file else "", function.__qualname__)


async def run_in_process(target: Target, arguments: Json) -> Outcome:
    """Runs the function with a call's arguments. What it raises, and that its process died, is in the outcome.

    On cancellation the process and what it started are killed, and waited for.
    """
    with anyio.CancelScope(shield=True):  # a start cut in two would leave the process behind
        process = await _start()
    try:
        return await _ask(process, asdict(target) | {"arguments": arguments})
    except (anyio.BrokenResourceError, anyio.ClosedResourceError, anyio.EndOfStream, anyio.IncompleteRead):
        return Outcome(error=WorkerDied(f"the process of the tool {await _end_of(process)} without a result"))
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        return Outcome(error=WorkerDied(f"the process of the tool sent a reply that can't be read ({error})"))
    finally:
        kill_family(process.pid)
        with anyio.CancelScope(shield=True):
            await process.aclose()


async def _start() -> Process:
    command = [sys.executable, "-c", _START, json.dumps(sys.path)]
    return await anyio.open_process(command, stderr=None, start_new_session=True)  # stderr is this program's


async def _ask(process: Process, request: Json) -> Outcome:
    assert process.stdin is not None
    assert process.stdout is not None
    data = json.dumps(request).encode()
    await process.stdin.send(len(data).to_bytes(4, "big") + data)
    replies = BufferedByteReceiveStream(process.stdout)
    size = int.from_bytes(await replies.receive_exactly(4), "big")
    if size > MAX_REPLY:
        raise ValueError(f"{size:,} bytes")
    return _outcome(json.loads(await replies.receive_exactly(size)))


def _outcome(reply: Json) -> Outcome:
    if "error" in reply:
        kind = ToolError(str(reply["error"])) if reply.get("told") else None
        return Outcome(error=kind or WorkerError(str(reply["error"]), tuple(map(str, reply["kinds"]))))
    files = [Attachment(file["name"], file["media_type"], base64.b64decode(file["data"])) for file in reply["files"]]
    fields = {key: reply[key] for key in ("content", "display", "record", "ok")}
    return Outcome(Output(**fields, files=tuple(files)))


async def _end_of(process: Process) -> str:
    with anyio.move_on_after(1):
        code = await process.wait()
        return f"ended with exit code {code}" if code >= 0 else f"was killed by {signal_name(-code)}"
    return "closed its pipe"
