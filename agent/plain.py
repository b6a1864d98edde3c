"""Makes text from models, tools and traces safe to print: it can't move the cursor, colour or hide anything."""

from __future__ import annotations

import re

_ESCAPE = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]"  # CSI: colours, cursor
    r"|(?:\x1b\]|\x9d)[^\x07\x1b\n]*(?:\x07|\x1b\\)?"  # OSC: titles, links, clipboard
    r"|\x1b[PX^_][^\x1b\n]*(?:\x1b\\)?"  # DCS, SOS, PM, APC
    r"|\x1b[ -/]*[0-~]?"
)
_OPEN_ESCAPE = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*|(?:\x1b\]|\x9d)[^\x07\x1b\n]*\x1b?|\x1b[PX^_][^\x1b\n]*\x1b?|\x1b[ -/]*|\r"
)
_LONGEST_ESCAPE = 256
_LINE_END = re.compile(r"\r\n?|[\x0b\x0c\x85\u2028\u2029]")
_CONTROL = re.compile(
    "[\x00-\x08\x0e-\x1f\x7f-\x9f"
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # directions: they can show text in another order than it has
    "\ufeff\ud800-\udfff]"  # lone surrogates can't be encoded
)


def clean(text: str) -> str:
    """`text` without escape sequences, control and direction characters; line ends are newlines, tabs four spaces."""
    text = _LINE_END.sub("\n", _ESCAPE.sub("", text))
    return _CONTROL.sub("", text).replace("\t", "    ")


class Cleaner:
    """`clean` for text in pieces: an escape sequence cut in two is still taken out."""

    def __init__(self) -> None:
        self._held = ""

    def feed(self, piece: str) -> str:
        """What can be shown by now."""
        text = self._held + piece
        start = max(text.rfind(mark, len(text) - _LONGEST_ESCAPE) for mark in "\x1b\x9b\x9d\r")
        # `ESC \` ends a sequence: what it ends begins earlier.
        if start > 0 and text.startswith("\x1b", start) and (before := text.rfind("\x1b", 0, start)) >= 0:
            start = before if _OPEN_ESCAPE.fullmatch(text, before) else start
        if start < 0 or not _OPEN_ESCAPE.fullmatch(text, start):
            start = len(text)
        self._held = text[start:]
        return clean(text[:start])


def clip(text: str, lines: int, width: int) -> tuple[str, int]:
    """The first `lines` rows that `text` takes at `width` columns, about, and how many of its lines are left out."""
    kept: list[str] = []
    rows = text.split("\n")
    room = lines
    for index, row in enumerate(rows):
        if room <= 0:
            return "\n".join(kept), len(rows) - index
        if len(row) > room * width:
            return "\n".join([*kept, row[: room * width - 1] + "…"]), len(rows) - index - 1
        kept.append(row)
        room -= max(1, -(-len(row) // width))
    return "\n".join(kept), 0


def one_line(text: str, length: int = 80) -> str:
    """`text` cleaned, on one line of at most `length` characters."""
    line = " ".join(clean(text[: 4 * length]).split())
    return line if len(line) <= length else line[: length - 1] + "…"


def clock(seconds: float) -> str:
    """Seconds as `0:07`, `12:30` or `1:02:03`."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def size(count: int) -> str:
    """Bytes as `812 B`, `12.3 kB` or `4.0 MB`."""
    if count < 1000:
        return f"{count} B"
    return f"{count / 1000:.1f} kB" if count < 1_000_000 else f"{count / 1e6:.1f} MB"


def file_name(text: str) -> str:
    """A file name that a stranger gave, as one that is safe in any folder."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", text).lstrip(".")[-80:] or "file"
