"""Results longer than their tool's budget: what the model sees of them, and `read_result` to read on in the rest.

The whole text of a result that was cut is kept for the run, in memory and bounded. Tools that page themselves (`paged`)
have their own way to read on; for the others the note in a cut result says how `read_result` is to be called.
"""

from __future__ import annotations

import re
from array import array
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

from thinkloop.agent.cut import cut_text
from thinkloop.tools.tool import Effect, Output, Tool, ToolError, object_schema
from thinkloop.traces.events import Json, ToolResult

READ_RESULT = "read_result"
MAX_CHARS = 1_000_000
"""Of one result that are kept, and that the record gets."""
MAX_RESULTS, MAX_TOTAL_CHARS = 200, 20_000_000
"""Kept for one run; the oldest go first."""
LINE_CHARS = 500
"""A longer line counts as several."""
HEAD_TOKENS = 60
"""Of a page's budget, for its first line."""
MOST_NAMED = 8

Count = Callable[[str], int]


class KeptResult:
    """The text of one result and where its lines begin."""

    def __init__(self, text: str) -> None:
        self.text = text[:MAX_CHARS]
        self.lost = len(text) - len(self.text)
        self._starts: array[int] | None = None

    @property
    def lines(self) -> int:
        return len(self._line_starts())

    def line(self, number: int) -> str:
        """Line `number`, counted from 1."""
        starts = self._line_starts()
        end = starts[number] if number < len(starts) else len(self.text)
        return self.text[starts[number - 1] : end].rstrip("\n")

    def found(self, words: str, first: int) -> Iterator[int]:
        """Numbers of the lines from `first` on in which `words` begins, whatever its case."""
        starts, pattern = self._line_starts(), re.compile(re.escape(words), re.IGNORECASE)
        at = starts[first - 1]
        while match := pattern.search(self.text, at):
            number = bisect_right(starts, match.start())
            yield number
            if number == len(starts):
                return
            at = starts[number]

    def _line_starts(self) -> array[int]:
        """Found once, when somebody reads: 10 ms for a million characters."""
        if self._starts is None:
            self._starts, at = array("I"), 0
            for line in self.text.split("\n"):
                self._starts.extend(range(at, at + max(len(line), 1), LINE_CHARS))
                at += len(line) + 1
        return self._starts


def last_line_of(head: str) -> int:
    """The number of the line in which the beginning `head` of a result ends."""
    return sum(max(-(-len(line) // LINE_CHARS), 1) for line in head.split("\n"))


class ResultStore:
    """The results of a run that were cut."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, KeptResult] = OrderedDict()
        self._chars = 0

    def keep(self, call_id: str, text: str) -> None:
        """Keeps a result's text, as the newest one."""
        self._drop(call_id)
        kept = self._kept[call_id] = KeptResult(text)
        self._chars += len(kept.text)
        while len(self._kept) > MAX_RESULTS or self._chars > MAX_TOTAL_CHARS:
            self._drop(next(iter(self._kept)))

    def get(self, call_id: str) -> KeptResult:
        """The result of a call. Raises `ToolError`, which says what there is instead."""
        if call_id in self._kept:
            return self._kept[call_id]
        names = ", ".join(list(self._kept)[-MOST_NAMED:])
        here = f"there are {names}" if names else "there are none: after a resume they are gone"
        raise ToolError(f'no result of "{call_id[:100]}" is kept; only long results are, and the newest of them: {here}. '
                        "Make the call again if it is needed")  # fmt: skip

    def _drop(self, call_id: str) -> None:
        gone = self._kept.pop(call_id, None)
        self._chars -= len(gone.text) if gone else 0


def _parameters() -> Json:
    return object_schema(
        ["call"],
        call={"type": "string", "description": "Id of the call, as the cut result says."},
        line={"type": "integer", "minimum": 1, "description": "First line to show."},
        find={"type": "string", "description": "Show only the lines with this text."},
    )


@dataclass(frozen=True, slots=True)
class ReadResult:
    """The tool `read_result`. `count` gives a text's tokens."""

    store: ResultStore
    count: Count
    name: str = READ_RESULT
    description: str = "Read on in a result that was cut, or find a text in it."
    parameters: Json = field(default_factory=_parameters)
    effect: Effect = "read"
    deadline: float = 30.0
    budget: int = 2000
    paged: bool = True

    async def call(self, arguments: Json) -> Output:
        """Numbered lines from `line` on, or those of them with `find`, within the budget."""
        call_id, first, words = str(arguments["call"]), int(arguments.get("line", 1)), str(arguments.get("find", ""))
        kept = self.store.get(call_id)
        if not 1 <= first <= kept.lines:
            raise ToolError(f"{call_id} has lines 1 to {kept.lines}; there is no line {first}")
        numbers = kept.found(words, first) if words else iter(range(first, kept.lines + 1))
        shown, following = self._page(kept, numbers)
        if not shown:
            raise ToolError(f'no line of {call_id} from line {first} on has "{words[:100]}"')
        more = f"; more from line {following} on" if following else ""
        lost = f"; its last {kept.lost:,} characters were not kept" if kept.lost else ""
        return Output("\n".join([f"{call_id} ({kept.lines} lines{lost}{more})", *shown]), record={"call": call_id})

    def _page(self, kept: KeptResult, numbers: Iterator[int]) -> tuple[list[str], int | None]:
        """The lines that fit, and the number of the first that doesn't."""
        shown, room = list[str](), self.budget - HEAD_TOKENS
        for number in numbers:
            row = f"{number}: {kept.line(number)}".rstrip()
            room -= self.count(row) + 1
            if shown and room < 0:
                return shown, number
            shown.append(row)
        return shown, None


def with_paging(tools: Mapping[str, Tool], count: Count) -> dict[str, Tool]:
    """The tools of a run, with `read_result` where one of them doesn't page by itself. A tool of the user's with that
    name stays: then there is no reading on."""
    if READ_RESULT in tools or all(_pages_itself(tool) for tool in tools.values()):
        return dict(tools)
    return {**tools, READ_RESULT: ReadResult(ResultStore(), count)}


def store_of(tools: Mapping[str, Tool]) -> ResultStore | None:
    """Where `read_result` reads, if it is among the tools."""
    reader = tools.get(READ_RESULT)
    return reader.store if isinstance(reader, ReadResult) else None


def within_budget(result: ToolResult, tool: Tool, count: Count, store: ResultStore | None) -> ToolResult:
    """The result, cut to its tool's budget in tokens. Its whole text goes to the record and, for tools that don't page
    by themselves, to the store."""
    kept = None if _pages_itself(tool) else store
    why = "ask for less, or read on from there" if kept is None else partial(_reading_on, result.call_id)
    content = cut_text(result.content, tool.budget, count, why)
    if content is result.content:
        return result
    if kept is not None:
        kept.keep(result.call_id, result.content)
    return replace(result, content=content, record={"uncut": result.content[:MAX_CHARS]} | result.record)


def _reading_on(call_id: str, head: str) -> str:
    return f'read on with {READ_RESULT}(call="{call_id}", line={last_line_of(head)})'


def _pages_itself(tool: Tool) -> bool:
    return bool(getattr(tool, "paged", False))
