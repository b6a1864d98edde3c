"""Text from an MCP server: made harmless to show and to read, and cut to a length."""

from __future__ import annotations

import re

from thinkloop.tools import extract_text

_ESCAPE = re.compile(r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]|(?:\x1b\]|\x9d)[^\x07\x1b\n]*(?:\x07|\x1b\\)?|\x1b[ -/]*[0-~]?")


def clean(text: str) -> str:
    """`text` without escape sequences, control, direction and invisible characters; line ends are newlines."""
    return extract_text.clean(_ESCAPE.sub("", text))


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


def said(error: BaseException) -> str:
    """An error's own words, cleaned, on one line. One of many parts is only counted: its words take seconds to make."""
    parts = error.error_count() if hasattr(error, "error_count") else 1
    return f"{parts} values in it are wrong" if parts > 20 else one_line(str(error).partition("For further")[0], 500)
