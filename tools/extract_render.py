"""A parsed page as lines: headings, lists, tables, code and links stay readable, everything else is words.

One walk serves two vocabularies: HTML as it came, and the tree that trafilatura makes of an article.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from thinkloop.tools.extract_bounds import LINK_TEXT_CHARS, MAX_LINKS, TOTAL_CHARS, OutOfTime
from thinkloop.tools.extract_text import clean, clean_line, web_url

_MAX_INDENT = 6
_SPACES = re.compile(r"\s+")
_HIDDEN = re.compile(r"(?:^|[;\s])(?:display\s*:\s*none|visibility\s*:\s*(?:hidden|collapse))", re.I)


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What each tag does (a tag without a role is inline), and the tags that make a table row more than a row."""

    roles: Mapping[str, str]
    structures: tuple[str, ...]
    code_blocks: bool = False
    """Whether `code` may stand for a block, as trafilatura writes both."""


def _vocabulary(structures: str, code_blocks: bool = False, **roles: str) -> Vocabulary:
    by_tag = {tag: role for role, tags in roles.items() for tag in tags.split()}
    return Vocabulary(by_tag, tuple(structures.split()), code_blocks)


HTML = _vocabulary(
    "table pre h1 h2 h3 h4",
    skip="head script style template svg math canvas object embed iframe audio video map datalist select textarea noframes",
    block="address article aside body caption center dd details dialog div dl dt fieldset figcaption figure footer form "
    "header hgroup legend main nav noscript p plaintext search section summary table tbody tfoot thead",
    heading="h1 h2 h3 h4 h5 h6",
    list="ul ol menu dir",
    item="li",
    row="tr",
    cell="td th",
    pre="pre listing xmp",
    code="code kbd samp tt",
    quote="blockquote",
    line="br hr",
    link="a",
    image="img",
)
ARTICLE = _vocabulary(
    "table", True, block="p table fw div", heading="head", list="list", item="item", row="row", cell="cell", code="code",
    quote="quote", line="lb", link="ref", skip="graphic",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Rendered:
    """The text with its links numbered from 1 by `[#n]`, and a note when something was left out."""

    text: str
    links: list[tuple[str, str]]
    note: str = ""


def render(root: Any, vocabulary: Vocabulary, base: str) -> Rendered:
    """The visible text of an lxml tree. `base` makes links absolute; those that then aren't http or https stay text.

    Running out of time (`OutOfTime`) or past 2,000,000 characters gives what there is by then, and says so.
    """
    page = _Page(vocabulary, base)
    try:
        page.walk(root)
    except OutOfTime:
        page.note = "cut: the page takes too long to read"
    page.flush()
    return Rendered("\n".join(page.lines), page.links, page.note)


class _Page:
    def __init__(self, vocabulary: Vocabulary, base: str) -> None:
        self.lines: list[str] = []
        self.links: list[tuple[str, str]] = []
        self.note = ""
        self._roles, self._vocabulary, self._base = vocabulary.roles, vocabulary, base
        self._parts: list[str] = []
        self._size = self._quotes = self._pre = 0
        self._bullet = ""
        self._lists: list[int | None] = []  # per open list the number of its last item, None when it has bullets
        self._cells: list[str] | None = None  # of the open row
        self._opened: list[tuple[int, int]] = []  # per open link, lines and parts before it
        self._numbers: dict[str, int] = {}  # by href as written; 0: not a link to follow

    def walk(self, root: Any) -> None:
        """Iterative, so that no depth of nesting can exhaust the stack."""
        from lxml import etree

        structured = _structured_rows(root, self._vocabulary)
        walker = etree.iterwalk(root, events=("start", "end"))
        for event, node in walker:
            role = "block" if node in structured else self._roles.get(node.tag, "inline")
            hidden = role == "skip" or (node.attrib and is_hidden(node))
            if event == "start":
                if hidden:
                    walker.skip_subtree()
                    continue
                self._open(role, node)
                self._add(node.text)
                continue
            if not hidden:
                self._close(role, node)
            if node is not root:
                self._add(node.tail)
            if self._size > TOTAL_CHARS:
                self.note = f"cut after {TOTAL_CHARS:,} characters"
                return

    def flush(self) -> None:
        """End the line, if there is anything on it."""
        if self._cells is not None:
            self._parts.append(" ")
            return
        text = _collapsed(self._parts)
        self._parts.clear()
        if text:
            self._emit(text)

    def _emit(self, text: str, prefix: str = "") -> None:
        indent = "  " * min(len(self._lists) - bool(self._bullet), _MAX_INDENT) if self._lists else ""
        self.lines.append("> " * min(self._quotes, 3) + indent + self._bullet + prefix + text)
        self._bullet = ""

    def _add(self, text: str | None) -> None:
        if text:
            self._parts.append(text)
            self._size += len(text)

    def _open(self, role: str, node: Any) -> None:
        match role:
            case "block" | "heading" | "item" | "quote" | "list" | "row" | "cell" | "line":
                self.flush()
        match role:
            case "list":
                self._lists.append(0 if node.tag == "ol" or node.get("rend") == "ol" else None)
            case "item":
                self._bullet = self._next_bullet()
            case "quote":
                self._quotes += 1
            case "row":
                self._cells = []
            case "pre" | "code":
                self._open_code(role, node)
            case "link":
                self._opened.append((len(self.lines), len(self._parts)))
            case "image":
                self._add(f" {clean_line(node.get('alt') or '', LINK_TEXT_CHARS)} ")

    def _close(self, role: str, node: Any) -> None:
        match role:
            case "heading":
                self._close_heading(node)
            case "block" | "item" | "line":
                self.flush()
            case "list":
                self.flush()
                del self._lists[-1:]
            case "quote":
                self.flush()
                self._quotes -= 1
            case "row":
                self._close_row()
            case "cell":
                self._close_cell()
            case "pre" | "code":
                self._close_code()
            case "link":
                self._close_link(node)
        if role == "item":
            self._bullet = ""

    def _next_bullet(self) -> str:
        if not self._lists or self._lists[-1] is None:
            return "- "
        self._lists[-1] += 1
        return f"{self._lists[-1]}. "

    def _close_heading(self, node: Any) -> None:
        text = _collapsed(self._parts)
        if self._cells is not None or not text:
            self.flush()
            return
        self._parts.clear()
        level = (node.get("rend") or node.tag)[1:]
        if self.lines and self.lines[-1]:
            self.lines.append("")
        self._emit(text, "#" * (int(level) if level in ("1", "2", "3", "4", "5", "6") else 2) + " ")

    def _close_cell(self) -> None:
        if self._cells is None:
            self.flush()
        else:
            self._cells.append(_collapsed(self._parts))
            self._parts.clear()

    def _close_row(self) -> None:
        cells, self._cells = self._cells or [], None
        if any(cells):
            self._emit(" | ".join(cells))
        self.flush()

    def _open_code(self, role: str, node: Any) -> None:
        if self._pre or role == "pre" or (self._vocabulary.code_blocks and _is_block(node)):
            if not self._pre and self._cells is None:
                self.flush()
            self._pre += 1
        else:
            self._parts.append("`")

    def _close_code(self) -> None:
        if not self._pre:
            self._parts.append("`")
            return
        self._pre -= 1
        if self._pre or self._cells is not None:
            return
        code = clean("".join(self._parts)).strip("\n").rstrip()
        self._parts.clear()
        if code:
            fence = "~~~" if "```" in code else "```"
            self.lines += [fence, *code.split("\n"), fence]

    def _close_link(self, node: Any) -> None:
        lines, parts = self._opened.pop()
        added = self.lines[lines : lines + 20]  # more than any text of a link needs
        text = _collapsed([" ".join(added), " ", *(self._parts if added else self._parts[parts:])])
        number = self._number(text, node.get("href") or node.get("target") or "")
        if not number or self._pre:
            return
        if any(part.strip() for part in self._parts):
            while self._parts[-1].isspace():
                self._parts.pop()
            self._parts.append(f" [#{number}]")
        else:
            self.lines[-1] += f" [#{number}]"

    def _number(self, text: str, href: str) -> int:
        """The link's place in the list, from 1; 0 when it can't be followed or the list is full."""
        if not text or href[:1] in ("", "#"):
            return 0
        known = self._numbers.get(href)
        if known is None and len(self.links) < MAX_LINKS:
            known = self._numbers[href] = self._resolve(text, href)
        elif known is None:
            self.note = self.note or f"only the first {MAX_LINKS} links are listed"
        return known or 0

    def _resolve(self, text: str, href: str) -> int:
        url = web_url(self._base, href)
        if not url:
            return 0
        self.links.append((clean_line(text, LINK_TEXT_CHARS), url))
        return len(self.links)


def _structured_rows(root: Any, vocabulary: Vocabulary) -> set[Any]:
    """Table rows that hold structure (another table, code, headings): layout, not data, so read as blocks."""
    rows = [tag for tag, role in vocabulary.roles.items() if role == "row"]
    found: set[Any] = set()
    for node in root.iter(*vocabulary.structures):
        for row in node.iterancestors(*rows):
            if row in found:
                break
            found.add(row)
    return found


def is_hidden(node: Any) -> bool:
    """Whether the element is there but not shown, by its own attributes."""
    if node.get("hidden") is not None or (node.tag == "dialog" and node.get("open") is None):
        return True
    style = node.get("style")
    return bool(style and _HIDDEN.search(style[:2000]))


def _is_block(node: Any) -> bool:
    """Whether trafilatura's `code` was a block: it stands between paragraphs or has several lines."""
    parent = node.getparent()
    return (parent is not None and parent.tag == "body" and node.tail is None) or "\n" in "".join(node.itertext())


def _collapsed(parts: Iterable[str]) -> str:
    return _SPACES.sub(" ", "".join(parts)).strip()
