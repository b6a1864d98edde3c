"""A page as a model reads it: the accessibility snapshot made compact, in numbered lines, a budgeted part at a time."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

from thinkloop.tools.extract_text import clean_line, wrap
from thinkloop.tools.tool import CHARACTERS_PER_TOKEN

MAX_LINES = 20_000
JOIN = 200  # characters; neighbours that fit on a line of this length share it

_MAX_TEXT = 200_000  # characters of one text
_OPTIONS = 40  # of a select field
_DEPTH = 8  # levels of indentation shown
_NESTING = 60  # levels kept apart; what is nested deeper is taken as if it were on the last of them
_ENTRY = re.compile(r"( *)- (.*)")
_NODE = re.compile(
    r'(?P<role>[a-z]+)(?: (?P<name>"(?:[^"\\]|\\.)*"|/(?:[^/\\]|\\.)*/))?(?P<marks>(?: \[[^\]]*\])*)(?::(?: (?P<text>.*))?)?'
)
_ESCAPE = re.compile(r'\\(?:x([0-9a-f]{2})|u([0-9a-f]{4})|(["\\/nrtbf]))', re.IGNORECASE)
_ESCAPED = {"n": "\n", "r": "\r", "t": "\t", "b": "", "f": ""}

_ACTIVE = frozenset(
    {"link", "button", "textbox", "searchbox", "combobox", "checkbox", "radio", "switch", "slider", "spinbutton", "tab"}
    | {"menuitem", "menuitemcheckbox", "menuitemradio", "option", "treeitem"}
)
_FIELDS = frozenset({"textbox", "searchbox", "combobox", "slider", "spinbutton"})  # their text is a value, not a label
_PHRASES = frozenset(
    {"generic", "strong", "emphasis", "code", "superscript", "subscript", "time", "insertion", "deletion", "mark"}
)
_LANDMARKS = frozenset(
    {
        "navigation",
        "main",
        "banner",
        "contentinfo",
        "complementary",
        "search",
        "form",
        "dialog",
        "alertdialog",
        "region",
    }
    | {"iframe", "alert", "menu", "tablist", "toolbar", "figure", "radiogroup", "listbox", "tree"}
)
_STATES = ("checked", "disabled", "expanded", "selected", "pressed")


@dataclass(frozen=True, slots=True)
class View:
    """What was last shown of a page: `lines` are numbered from 1; `note` says what they leave out."""

    title: str
    url: str
    lines: tuple[str, ...]
    note: str = ""
    refs: bool = True
    """Whether the lines carry the refs that click, type and select take."""
    citable: int = 0
    """How many lines from the first on have the numbers that they have wherever this URL is read as an article."""


class Shown(NamedTuple):
    """A part of a view: its text with a header, and the numbers of its lines."""

    text: str
    numbers: Sequence[int] = ()

    def ranges(self, last: int) -> list[list[int]]:
        """The lines up to `last` as `[first, last]` pairs."""
        pairs: list[list[int]] = []
        for number in self.numbers:
            if number > last:
                break
            if pairs and pairs[-1][1] == number - 1:
                pairs[-1][1] = number
            else:
                pairs.append([number, number])
        return pairs


@dataclass(slots=True)
class _Node:
    role: str
    name: str = ""
    ref: str = ""
    states: str = ""
    pointer: bool = False
    level: str = ""
    text: str = ""
    url: str = ""
    children: list[_Node] = field(default_factory=list)


def snapshot_lines(snapshot: str) -> tuple[str, ...]:
    """Playwright's `aria_snapshot(mode="ai")` in fewer characters.

    Refs stay on what can be acted on and on what the page styles as clickable; wrappers without a name or text give way
    to their children; short neighbours share a line; a table's row is a line.
    """
    lines = (line for text in _blocks(_parse(snapshot).children, 0) for line in _indented_wrap(text))
    return tuple(islice(lines, MAX_LINES))


def _indented_wrap(text: str) -> list[str]:
    indent = text[: len(text) - len(text.lstrip())]
    return [indent + line for line in wrap(text.lstrip())]


# Reading the snapshot


def _parse(snapshot: str) -> _Node:
    root = _Node("root")
    path: list[tuple[int, _Node]] = [(-1, root)]
    for row in snapshot.split("\n"):
        match = _ENTRY.fullmatch(row)
        if match is None:
            continue
        indent, content = len(match[1]), match[2]
        while path[-1][0] >= indent or len(path) > _NESTING:
            path.pop()
        parent = path[-1][1]
        if content.startswith("/"):
            key, _, value = content.partition(": ")
            if key == "/url":
                parent.url = clean_line(_unquoted(value), 200)
            continue
        node = _node(content)
        parent.children.append(node)
        path.append((indent, node))
    return root


def _node(content: str) -> _Node:
    if content.startswith("text:"):
        return _Node("text", text=_value(content[5:]))
    if content.startswith("'"):
        key = re.match(r"'((?:[^']|'')*)'", content)
        if key:
            content = key[1].replace("''", "'") + content[key.end() :]
    match = _NODE.fullmatch(content)
    if match is None:
        return _Node("text", text=_value(content))
    marks = dict(_mark(mark) for mark in re.findall(r"\[([^\]]*)\]", match["marks"]))
    return _Node(
        match["role"],
        name=_name(match["name"] or ""),
        ref=marks.get("ref", ""),
        states="".join(f" [{_state(name, marks[name])}]" for name in _STATES if name in marks),
        pointer=marks.get("cursor") == "pointer",
        level=marks.get("level", ""),
        text=_value(match["text"] or ""),
    )


def _mark(mark: str) -> tuple[str, str]:
    name, _, value = mark.partition("=")
    return name, value


def _state(name: str, value: str) -> str:
    return f"{name}={value}" if value else name


def _name(quoted: str) -> str:
    try:
        return clean_line(json.loads(quoted), 300) if quoted.startswith('"') else clean_line(quoted, 300)
    except ValueError:
        return clean_line(quoted, 300)


def _value(text: str) -> str:
    return clean_line(_unquoted(text.strip()), _MAX_TEXT)


def _unquoted(text: str) -> str:
    if len(text) < 2 or text[0] != '"' or text[-1] != '"':
        return text
    return _ESCAPE.sub(_unescape, text[1:-1])


def _unescape(match: re.Match[str]) -> str:
    if code := match[1] or match[2]:
        return chr(int(code, 16))
    return _ESCAPED.get(match[3], match[3])


# Writing it shorter


def _blocks(nodes: Sequence[_Node], depth: int) -> Iterator[str]:
    """The lines of these nodes, neighbours that are short enough on one."""
    indent, row = "  " * min(depth, _DEPTH), ""
    glue = " " if any(node.role == "text" for node in nodes) else " · "
    for node in _without_labels(nodes):
        inline = _inline(node)
        if row and (inline is None or len(row) + len(inline) >= JOIN):
            yield indent + row
            row = ""
        if inline is None:
            yield from _block(node, depth)
        elif inline:
            row = row + glue + inline if row else inline
    if row:
        yield indent + row


def _without_labels(nodes: Sequence[_Node]) -> list[_Node]:
    """Without the texts that only repeat the name of a field or a box beside them."""
    names = {node.name for node in nodes if node.role in _ACTIVE and node.name}
    return [node for node in nodes if not (node.role in ("text", "generic") and not node.ref and node.text in names)]


def _inline(node: _Node) -> str | None:
    """What fits inside a line; `None` for what starts its own, empty for nothing."""
    if node.role == "text":
        return node.text
    if node.role in _ACTIVE or (node.pointer and node.ref):
        return _active(node)
    if node.role == "img":
        return f'img "{node.name}"' if node.name else ""
    return _joined(node) if node.role in _PHRASES else None


def _joined(node: _Node) -> str | None:
    parts = [node.text or node.name, *map(_inline, _without_labels(node.children))]
    if any(part is None for part in parts):
        return None
    row = " ".join(filter(None, parts))
    return row if len(row) < JOIN or not node.children else None


def _active(node: _Node) -> str | None:
    """Something to click or to fill; `None` where more such things are inside."""
    if node.role == "combobox" and node.children:
        more = f" | … {len(node.children)} in all" if len(node.children) > _OPTIONS else ""
        return f"{_head(node)}: {' | '.join(map(_option, node.children[:_OPTIONS]))}{more}"
    if any(map(_holds_active, node.children)):
        return None
    value = node.text if node.role in _FIELDS or node.name else ""
    return _head(node) + (f": {value}" if value else "")


def _option(node: _Node) -> str:
    return (node.name or node.text) + node.states


def _holds_active(node: _Node) -> bool:
    return node.role in _ACTIVE or any(map(_holds_active, node.children))


def _head(node: _Node) -> str:
    """`role "name" [ref=e1] url`; a clickable wrapper is called by what it says."""
    label = node.name or ("" if node.role in _FIELDS else clean_line(_inner_text(node), 300))
    role = "clickable" if node.role == "generic" else node.role
    named = f'{role} "{label}"' if label else role
    return f"{named}{node.states}{f' [ref={node.ref}]' if node.ref else ''}{f' {node.url}' if node.url else ''}"


def _inner_text(node: _Node) -> str:
    return " ".join(filter(None, [node.text, *(child.name or _inner_text(child) for child in node.children)]))


def _block(node: _Node, depth: int) -> Iterator[str]:
    indent = "  " * min(depth, _DEPTH)
    if node.role == "heading":
        yield f"{indent}{'#' * _level(node)} {node.name or _inner_text(node)}"
        if any(map(_holds_active, node.children)):
            yield from _blocks([child for child in node.children if _holds_active(child)], depth)
    elif node.role == "row":
        yield indent + " | ".join(map(_cell, node.children))
    elif node.role == "listitem":
        first, *rest = _content(node) or [""]
        yield f"{indent}- {first.lstrip()}"
        yield from (f"{indent}  {row}" for row in rest)
    elif node.role in _LANDMARKS or node.role in _ACTIVE or node.pointer:
        yield from _titled(node, depth)
    else:
        yield from (indent + row for row in _content(node))


def _level(node: _Node) -> int:
    return min(max(int(node.level), 1), 6) if node.level.isdecimal() else 2


def _content(node: _Node) -> list[str]:
    """Its text and its children's lines; its name where there is neither."""
    rows = [*([node.text] if node.text else []), *_blocks(node.children, 0)]
    return rows or ([node.name] if node.name else [])


def _cell(node: _Node) -> str:
    return " ".join(row.strip() for row in _content(node)).replace("|", "/")


def _titled(node: _Node, depth: int) -> Iterator[str]:
    """`role "name":` and its content, indented below or, when that is one short line, behind it."""
    ref = f" [ref={node.ref}]" if node.ref and (node.role in _ACTIVE or node.pointer) else ""
    role = "clickable" if node.role == "generic" else node.role
    head = role + (f' "{node.name}"' if node.name else "") + node.states + ref + (f" {node.url}" if node.url else "")
    rows = [*([node.text] if node.text else []), *_blocks(node.children, 0)]
    indent = "  " * min(depth, _DEPTH)
    if len(rows) == 1 and len(rows[0]) < JOIN:
        yield f"{indent}{head}: {rows[0].lstrip()}"
    elif rows:
        yield f"{indent}{head}:"
        inner = "  " * min(depth + 1, _DEPTH)
        yield from (inner + row for row in rows)
    elif node.name or ref:
        yield indent + head


# Showing a part


def show(view: View, cursor: int, budget: int, notices: Sequence[str] = ()) -> Shown:
    """Numbered lines from `cursor` on, within `budget` tokens; the first line says which page and which part of it."""
    room = budget * CHARACTERS_PER_TOKEN - len(view.title) - len(view.url) - 120
    extra = _fitting([f"({notice})" for notice in (*notices, view.note) if notice], room // 2)
    room -= sum(len(row) + 1 for row in extra)
    rows = _fitting((f"{number}: {text}" for number, text in _from(view, cursor)), room)
    last = cursor + len(rows) - 1
    if not rows:
        return Shown("\n".join([f"{heading(view)} (no text)", *extra]))
    part = f"lines {cursor}-{last} of {len(view.lines)}"
    more = f"; read on with browser_read(cursor={last + 1})" if last < len(view.lines) else ""
    return Shown("\n".join([f"{heading(view)} ({part}{more})", *extra, *rows]), range(cursor, last + 1))


def unchanged(view: View, notices: Sequence[str]) -> Shown:
    """What is said instead of the same page once more."""
    return Shown("\n".join([f"{heading(view)} (nothing changed on the page)", *(f"({text})" for text in notices)]))


def find(view: View, text: str, budget: int) -> Shown:
    """The numbered lines that have `text`, whatever its case, within `budget` tokens."""
    hits = [(number, line) for number, line in _from(view, 1) if text.casefold() in line.casefold()]
    room = budget * CHARACTERS_PER_TOKEN - len(view.title) - len(view.url) - 200
    rows = _fitting((f"{number}: {line}" for number, line in hits), room)
    part = f"{clean_line(text, 60)!r} on {len(hits)} of {len(view.lines)} lines"
    if not hits:
        return Shown(f"{heading(view)} ({part})")
    more = f"; the first {len(rows)} are here" if len(rows) < len(hits) else ""
    around = f"; read around one with browser_read(cursor={hits[0][0]})"
    numbers = [number for number, _ in hits[: len(rows)]]
    return Shown("\n".join([f"{heading(view)} ({part}{more}{around})", *rows]), numbers)


def first_change(old: View, new: View) -> int:
    """The number of the first line of `new` that differs from `old`'s; 0 when nothing does."""
    for number, (before, after) in enumerate(zip(old.lines, new.lines, strict=False), 1):
        if before != after:
            return number
    return 0 if len(old.lines) == len(new.lines) else min(len(old.lines) + 1, max(1, len(new.lines)))


def _from(view: View, cursor: int) -> Iterator[tuple[int, str]]:
    return ((number, view.lines[number - 1]) for number in range(cursor, len(view.lines) + 1))


def _fitting(rows: Iterable[str], room: int) -> list[str]:
    """The first rows that fit, but one at least."""
    kept: list[str] = []
    for row in rows:
        room -= len(row) + 1
        if kept and room < 0:
            break
        kept.append(row)
    return kept


def heading(view: View) -> str:
    """Which page: its address first, which no title can imitate there."""
    return f"{view.url} — {view.title}" if view.title else view.url
