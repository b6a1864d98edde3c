"""Text from an MCP server: made harmless to show and to read, and cut to a length."""

from __future__ import annotations

import re

_ESCAPE = re.compile(r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]|(?:\x1b\]|\x9d)[^\x07\x1b\n]*(?:\x07|\x1b\\)?|\x1b[ -/]*[0-~]?")
_LINE_END = re.compile(r"\r\n?|[\x0b\x0c\x85\u2028\u2029]")
_CONTROL = re.compile(
    "[\x00-\x08\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufeff"
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # directions: they show text in another order than it has
    "\u200b\u2060-\u2064\U000e0000-\U000e007f]"  # invisible to a person, not to a model
)


def clean(text: str) -> str:
    """`text` without escape sequences, control, direction and invisible characters; line ends are newlines."""
    return _CONTROL.sub("", _LINE_END.sub("\n", _ESCAPE.sub("", text)))


def clip(text: str, most: int) -> str:
    """`text` cleaned, at most `most` characters and a note of how many more there were."""
    if len(text) <= most:
        return clean(text)
    return f"{clean(text[:most])}\n[{len(text) - most:,} more characters left out]"


def one_line(text: str, most: int = 200) -> str:
    """`text` cleaned, on one line of at most `most` characters."""
    line = " ".join(clean(text[: 4 * most]).split())
    return line if len(line) <= most else line[: most - 1] + "…"


def last_line(text: str, most: int = 300) -> str:
    """The end of `text` cleaned, on one line of at most `most` characters."""
    line = " ".join(clean(text[-4 * most :]).split())
    return line if len(line) <= most else "…" + line[1 - most :]
