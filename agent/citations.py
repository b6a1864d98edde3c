"""Citations in an answer, `[id:L12-L15]`, held against what was opened.

A citation holds when every line that it names was shown to the model. That says where a claim comes from, not that the
lines support it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from thinkloop.traces.events import Json, ToolResult

MOST = 200
"""Citations of one answer that are looked at."""
MOST_LINES = 100_000
"""Lines of one result."""
_NUMBERED = re.compile(r"^(\d{1,9}): ", re.MULTILINE)
_CITATION = re.compile(r"\[([^\[\]\n]{1,500}?):L(\d{1,9})(?:\s?[-–]\s?L?(\d{1,9}))?\]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Citation:
    """One citation as written: document, first and last line. `problem` says why it doesn't hold; empty when it does."""

    text: str
    document: str
    first: int
    last: int
    problem: str = ""

    @property
    def holds(self) -> bool:
        return not self.problem

    def to_json(self) -> Json:
        """For the event that ends a run."""
        lines = [self.first, self.last]
        return {"text": self.text, "document": self.document, "lines": lines, "holds": self.holds} | (
            {"problem": self.problem} if self.problem else {}
        )


@dataclass(slots=True)
class Shown:
    """Which lines of which documents the model was shown, from the records of results (`document`, `lines`).

    Documents count by id alone: a title is whatever a page says, another page's address too.
    """

    _lines: dict[str, set[int]] = field(default_factory=dict)

    @property
    def documents(self) -> list[str]:
        """Ids, in order of first opening."""
        return list(self._lines)

    def note(self, result: ToolResult, *, cut: bool = False) -> None:
        """Takes in a result; of one that was `cut`, only lines that still stand in it with their number. Records come
        from tools, which may be anybody's: what has another form is passed over."""
        document = result.record.get("document")
        if not result.ok or not isinstance(document, str):
            return
        shown = self._lines.setdefault(document, set())
        left = {int(number) for number in _NUMBERED.findall(result.content)} if cut else None
        for first, last in _ranges(result.record.get("lines")):
            lines = range(first, last + 1)
            shown.update(lines if left is None else left.intersection(lines))

    def check(self, answer: str) -> list[Citation]:
        """The citations in `answer`, in order, each once."""
        found = dict.fromkeys((*match.groups(), match[0]) for match in _CITATION.finditer(answer))
        return [self._checked(*parts) for parts in list(found)[:MOST]]

    def _checked(self, name: str, first: str, last: str | None, text: str) -> Citation:
        document, start, end = name.strip(), int(first), int(last or first)
        problem = self._problem(document, start, end)
        return Citation(text=text, document=document, first=start, last=end, problem=problem)

    def _problem(self, document: str, first: int, last: int) -> str:
        if document not in self._lines:
            return "this document was not opened"
        if last < first:
            return "its last line comes before its first"
        shown = self._lines[document]
        missing = next((line for line in range(first, last + 1) if line not in shown), None)
        return "" if missing is None else f"line {missing} was not shown"


def _ranges(lines: object) -> Iterator[tuple[int, int]]:
    for pair in lines if isinstance(lines, list) else []:
        match pair:
            case [int(first), int(last)] if 1 <= first <= last < first + MOST_LINES:
                yield first, last
