"""Cuts a text to a number of tokens: head and tail stay, a note in the middle says how much was left out."""

from __future__ import annotations

from collections.abc import Callable

HEAD_SHARE = 0.7
"""Share of what is kept that comes from the beginning; results put what matters first."""
NOTE_TOKENS = 24
"""Tokens that the note itself takes, about."""
COUNTED_CHARS = 64
"""Characters per token of budget that are counted at all: beyond, the rest is estimated, since a result of 100 MB must
not be tokenised to be thrown away."""


def cut_text(text: str, budget: int, count: Callable[[str], int], why: str | Callable[[str], str] = "") -> str:
    """`text` if it takes at most `budget` tokens, otherwise its head and tail within the budget and a note between
    them.

    `count` gives a text's tokens; `why` is added to the note, or what it makes of the head.
    """
    if len(text.encode("utf-8", "surrogatepass")) <= budget:  # a token is at least one byte
        return text
    total = _count(text, budget, count)
    if total <= budget:
        return text
    said = why if callable(why) else lambda head: why
    room = max(budget - NOTE_TOKENS - len(said(text[:budget])) // 4, 1)
    chars = min(int(len(text) * room / total), len(text))
    while True:
        head, tail = _ends(text, chars)
        kept = count(head) + count(tail)
        if kept <= room or chars <= 1:
            note = said(head)
            return f"{head}\n[… about {total - kept:,} tokens left out here{'; ' + note if note else ''} …]\n{tail}"
        chars = min(int(chars * room / kept), chars - 1)


def _count(text: str, budget: int, count: Callable[[str], int]) -> int:
    most = COUNTED_CHARS * max(budget, 1)
    if len(text) <= most:
        return count(text)
    return int(count(text[:most]) * len(text) / most)


def _ends(text: str, chars: int) -> tuple[str, str]:
    head = int(chars * HEAD_SHARE)
    tail = chars - head
    return text[:head], text[len(text) - tail :]
