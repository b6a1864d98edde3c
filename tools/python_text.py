"""The wording of the python tool's results: plain text within a size, its middle left out when it is too long."""

from __future__ import annotations

from collections.abc import Sequence

from thinkloop.tools.outcome import visible


def lines(parts: Sequence[str]) -> str:
    """The parts that aren't empty, each from the start of a line, without what a terminal or a tokenizer would obey."""
    return "".join(part if part.endswith("\n") else part + "\n" for part in map(visible, parts) if part)


def one_line(text: str, most: int = 80) -> str:
    """A name from inside as one short line of printable characters."""
    shown = (c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text[: most + 1])
    line = "".join(shown)
    return line if len(line) <= most else f"{line[: most - 3]}..."


def fit(front: str, back: str, dropped: int, limit: int) -> tuple[str, int]:
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


def size(count: int) -> str:
    """Bytes for a reader."""
    if count < 1000:
        return f"{count} bytes"
    return f"{count / 1000:.1f} kB" if count < 1_000_000 else f"{count / 1_000_000:.1f} MB"
