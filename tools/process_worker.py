"""The other side of `tools.process`: one call of one function, in a process that is killed afterwards."""

from __future__ import annotations

import base64
import importlib
import importlib.util
import inspect
import json
import os
import signal
import sys
import threading
from dataclasses import asdict
from types import ModuleType
from typing import Any

from thinkloop.tools.function import FunctionTool, tool
from thinkloop.tools.outcome import message_of, plain_output, told
from thinkloop.tools.process_tree import adopt_orphans
from thinkloop.tools.tool import Output, ToolError
from thinkloop.tools.values import as_output
from thinkloop.traces.events import Json

MAIN = "__thinkloop_main__"
"""Name under which a program's main file is imported, so that what it does as a program isn't done again."""


def main() -> None:
    """Reads a request, replies, and waits to be killed."""
    adopt_orphans()
    request_pipe, reply_pipe = os.dup(0), os.dup(1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)  # what the function prints must not get between the replies
    request = json.loads(_read(request_pipe, int.from_bytes(_read(request_pipe, 4), "big")))
    threading.Thread(target=_die_with, args=(request_pipe,), daemon=True).start()
    reply = json.dumps(_reply(request)).encode()
    _write(reply_pipe, len(reply).to_bytes(4, "big") + reply)
    while True:
        signal.pause()


def _read(pipe: int, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        piece = os.read(pipe, min(size - len(data), 1 << 20))
        if not piece:
            os._exit(1)
        data += piece
    return bytes(data)


def _write(pipe: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(pipe, rest) :]


def _die_with(pipe: int) -> None:
    """Waits for the other end of the pipe to close, then kills this process and all that it started."""
    while os.read(pipe, 4096):
        pass
    os.killpg(os.getpgrp(), signal.SIGKILL)


def _reply(request: Json) -> Json:
    try:
        output = plain_output(_run(_function(request), request["arguments"]))
    except BaseException as error:
        kinds = [f"{kind.__module__}.{kind.__qualname__}" for kind in type(error).__mro__]
        is_told = isinstance(error, ToolError)
        return {"error": message_of(error) if is_told else told(error), "kinds": kinds, "told": is_told}
    files = [asdict(file) | {"data": base64.b64encode(file.data).decode()} for file in output.files]
    return {"content": output.content, "display": output.display, "record": output.record, "ok": output.ok,
            "files": files}  # fmt: skip


def _run(made: FunctionTool, arguments: Json) -> Output:
    import anyio

    args, kwargs = made.arguments.bind(arguments)
    value = made.function(*args, **kwargs)
    if inspect.isawaitable(value):
        value = anyio.run(_awaited, value)
    return as_output(value)


async def _awaited(value: Any) -> Any:
    return await value


def _function(request: Json) -> FunctionTool:
    found: Any = _module(request["module"], request["file"])
    for part in request["name"].split("."):
        found = getattr(found, part)
    return found if isinstance(found, FunctionTool) else tool(name="f")(found)


def _module(name: str, file: str) -> ModuleType:
    if name != "__main__":
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name or not file:
                raise
    own = MAIN if name == "__main__" else name
    spec = importlib.util.spec_from_file_location(own, file)
    if spec is None or spec.loader is None:
        raise ToolError(f"{file} can't be imported in the tool's process.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[own] = module
    spec.loader.exec_module(module)
    return module
