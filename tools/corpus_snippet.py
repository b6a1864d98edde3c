"""The line of a document that a search result shows: the first with the most different words of the query."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from thinkloop.tools.index_terms import is_cjk

MAX_HIT_CHARS = 200
MAX_OCCURRENCES = 20_000  # per word and document: about 6 ms; only texts of megabytes have more

Stems = Callable[[Sequence[str]], list[list[str]]]


def best_line(text: str, words: Sequence[str], stems: Stems) -> tuple[int, str]:
    """Number (from 1) and text of the line that matches best; the first line when none has a word of the query.

    Whole words count; where no line has one, words with the same stem do.
    """
    lower = _lower(text)
    wanted = {word.lower() for word in words}
    start = _best(lower, wanted, whole=True)
    if start < 0:
        start = _best(lower, {stem.rstrip("i") for terms in stems(sorted(wanted)) for stem in terms}, whole=False)
    start = max(start, 0)
    end = text.find("\n", start)
    line = text[start : end if end >= 0 else len(text)]
    return text.count("\n", 0, start) + 1, line.strip()[:MAX_HIT_CHARS]


def _best(lower: str, wanted: set[str], *, whole: bool) -> int:
    """Where the line with the most of `wanted` starts, or -1."""
    found: dict[int, int] = {}
    for word in filter(None, wanted):
        for start in _lines_with(lower, word, whole=whole):
            found[start] = found.get(start, 0) + 1
    return min(found, key=lambda start: (-found[start], start)) if found else -1


def _lines_with(lower: str, word: str, *, whole: bool) -> Iterator[int]:
    """Starts of the lines that have `word`."""
    at = lower.find(word)
    for _ in range(MAX_OCCURRENCES):
        if at < 0:
            return
        if not whole or _stands_alone(lower, at, at + len(word)):
            yield lower.rfind("\n", 0, at) + 1
            at = lower.find("\n", at)  # one count a line is enough
            if at < 0:
                return
        at = lower.find(word, at + 1)


def _stands_alone(lower: str, start: int, end: int) -> bool:
    if is_cjk(lower[start]):
        return True
    before, after = lower[start - 1 : start], lower[end : end + 1]
    return not any((char.isalnum() or char == "_") and not is_cjk(char) for char in (before, after) if char)


def _lower(text: str) -> str:
    """In lower case, character by character: `İ` alone would become two and shift every place behind it."""
    return text.replace("İ", "i").lower()
