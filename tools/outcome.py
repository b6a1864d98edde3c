"""What a tool gave, made plain: text that is bounded and holds no control characters, a record that is JSON, files that
are files. Tools are other people's code: whatever they give or raise, this doesn't fail but as it says, and doesn't
take long.
"""

from __future__ import annotations

import math
import re
import signal
import threading
from asyncio import current_task
from itertools import islice
from opcode import opmap
from typing import Any

import anyio
from thinkloop.tools.tool import Attachment, Output

MAX_CHARS = 1_000_000
"""Of one result's text."""
TAIL_CHARS = 100_000
"""Of those, what is kept of the end of a longer text."""
MAX_ERROR_CHARS = 4000
MAX_RECORD_VALUES, MAX_RECORD_CHARS, MAX_RECORD_DEPTH = 50_000, 4_000_000, 32
MAX_FILES, MAX_FILE_BYTES = 64, 64 << 20
"""Of one result; the bytes are of all its files together."""

_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
_ESCAPES = {code: f"\\x{code:02x}" for code in (*range(9), *range(0x0B, 0x20), *range(0x7F, 0xA0))} | {
    code: f"\\u{code:04x}" for code in range(0xD800, 0xE000)
}


def plain_output(given: object) -> Output:
    """`given` as an `Output` of plain, bounded parts. What had to be left out is named in the record under `left_out`.

    Raises `TypeError` for anything but an `Output` whose content is text.
    """
    if not isinstance(given, Output):
        raise TypeError(f"a tool must give an `Output`, not {type(given).__name__}")
    content, display = given.content, given.display
    if not isinstance(content, str):
        raise TypeError(f"the `content` of an `Output` must be text, not {type(content).__name__}")
    files, left_out = _files(given.files)
    if not isinstance(display, str):
        display, left_out = "", [*left_out, f"display, which is no text but {type(display).__name__}"]
    record = plain_json(given.record)
    if not isinstance(record, dict):
        record = {"record": record}
    if left_out:
        record = record | {"left_out": left_out}
    return Output(plain_text(content), plain_text(display), record, bool(given.ok), files)


def plain_text(text: str, most: int = MAX_CHARS) -> str:
    """`text` with control characters and half surrogates written out as escapes and with plain line ends; of more than
    `most` characters only beginning and end, with a note between them."""
    return visible(_within(str.__str__(text), most))


def visible(text: str) -> str:
    """`text` with control characters and half surrogates written out as escapes (`\\x1b`) and with plain line ends."""
    if not _CONTROL.search(text):
        return text
    return text.replace("\r\n", "\n").replace("\r", "\n").translate(_ESCAPES)


def _within(text: str, most: int) -> str:
    if len(text) <= most:
        return text
    tail = min(TAIL_CHARS, most // 10)
    note = f"\n[… {len(text) - most:,} of {len(text):,} characters dropped here …]\n"
    return text[: most - tail] + note + text[len(text) - tail :]


def told(error: BaseException) -> str:
    """An exception as `Kind: message`, or its kind alone when it has no message or can't say it."""
    kind, message = type(error).__name__, message_of(error)
    return plain_text(f"{kind}: {message}" if message else kind, MAX_ERROR_CHARS)


def message_of(error: BaseException) -> str:
    """What an exception says, or why it can't say it."""
    try:
        return plain_text(str(error))
    except Exception as problem:
        return f"(its message can't be read: {type(problem).__name__})"


def passes_on(error: BaseException) -> bool:
    """Whether an exception that came out of a tool isn't the tool's own doing: the run is being cancelled, or someone
    has pressed Ctrl-C. Must be asked where the call was awaited."""
    if isinstance(error, anyio.get_cancelled_exc_class()):
        task = current_task()
        return anyio.current_effective_deadline() == -math.inf or bool(task and task.cancelling())
    if isinstance(error, BaseExceptionGroup):
        return any(passes_on(inner) for inner in error.exceptions)
    return isinstance(error, KeyboardInterrupt) and _from_keyboard(error)


def _from_keyboard(error: KeyboardInterrupt) -> bool:
    """Whether a signal raised it: then it came out of the signal's handler, or in the midst of some instruction that
    isn't a `raise`."""
    trace = error.__traceback__
    if trace is None or threading.current_thread() is not threading.main_thread():
        return False
    while trace.tb_next:
        trace = trace.tb_next
    code = trace.tb_frame.f_code
    handler = signal.getsignal(signal.SIGINT)
    is_handler = getattr(getattr(handler, "func", handler), "__code__", None) is code
    return is_handler or code.co_code[trace.tb_lasti] != opmap["RAISE_VARARGS"]


# Records and files


def plain_json(value: object) -> Any:
    """`value` as JSON of bounded size and depth: what isn't JSON, or is too much, is replaced by a word for it."""
    return _Plain().of(value, MAX_RECORD_DEPTH)


class _Plain:
    def __init__(self) -> None:
        self._values, self._chars = MAX_RECORD_VALUES, MAX_RECORD_CHARS

    def of(self, value: object, depth: int) -> Any:
        self._values -= 1
        if isinstance(value, str):
            return self._text(value)
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, int):
            return int(value) if value.bit_length() <= 64 else self._text(f"a number of {value.bit_length()} bits")
        if isinstance(value, float):
            return float(value) if math.isfinite(value) else str(float(value))
        if isinstance(value, (dict, list, tuple)) and depth and self._values > 0:
            return self._container(value, depth)
        return self._text(_word_for(value))

    def _container(self, value: dict[Any, Any] | list[Any] | tuple[Any, ...], depth: int) -> Any:
        room = max(self._values, 0)
        if not isinstance(value, dict):
            return [self.of(item, depth - 1) for item in islice(value, room)]
        items = list(islice(value.items(), room))
        return {self._key(key): self.of(item, depth - 1) for key, item in items}

    def _key(self, key: object) -> str:
        return self._text(key if isinstance(key, str) else _word_for(key))

    def _text(self, text: str) -> str:
        text = str.__str__(text)[: max(self._chars, 0)]
        self._chars -= len(text)
        return text


def _word_for(value: object) -> str:
    if isinstance(value, (bool, int, float, type(None))):
        return str(value)
    size = f" of {len(value):,}" if type(value) in (bytes, bytearray, dict, list, tuple, set) else ""  # type: ignore[arg-type]
    return f"<{type(value).__name__}{size}>"


def _files(given: object) -> tuple[tuple[Attachment, ...], list[str]]:
    """The files that are files, and words for those that were left out."""
    if given == ():
        return (), []
    if not isinstance(given, (tuple, list)):
        return (), [f"files, which are no tuple but {type(given).__name__}"]
    kept, left_out, room = list[Attachment](), list[str](), MAX_FILE_BYTES
    for file in given[:MAX_FILES]:
        problem = _file_problem(file, room)
        if problem:
            left_out.append(problem)
            continue
        kept.append(Attachment(plain_text(file.name, 200), plain_text(file.media_type, 100), bytes(file.data)))
        room -= len(file.data)
    if len(given) > MAX_FILES:
        left_out.append(f"{len(given) - MAX_FILES} more files")
    return tuple(kept), left_out


def _file_problem(file: object, room: int) -> str:
    if not isinstance(file, Attachment):
        return f"a file that is no `Attachment` but {type(file).__name__}"
    if not (isinstance(file.name, str) and isinstance(file.media_type, str) and isinstance(file.data, bytes)):
        return "a file whose name, media type or data is of a wrong type"
    return "" if len(file.data) <= room else f"the file {plain_text(file.name, 100)!r}: {len(file.data):,} bytes"
