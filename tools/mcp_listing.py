"""What an MCP server offers: read in bounded pages, fingerprinted as it was sent, and made into declarations for a model."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from thinkloop.tools.mcp_text import clean, clip, one_line
from thinkloop.tools.validate import check_schema
from thinkloop.traces.events import Json

if TYPE_CHECKING:
    from mcp import ClientSession

MAX_PAGES, MAX_TOOLS, MAX_NOTES = 50, 256, 50
MAX_LISTING = 4_000_000
"""Characters of all definitions as they are sent."""
MAX_NAME, MAX_DESCRIPTION = 128, 4000  # characters
MAX_SCHEMA = 40_000
"""Characters of one schema as JSON; some 10,000 tokens of context, far above honest tools."""
MAX_DECLARATIONS = 200_000
"""Characters of all declarations of a server."""
_HASH_DIGITS = 32
"""128 bits: who makes both lists of a colliding pair needs 2^64 tries."""


@dataclass(frozen=True, slots=True)
class Definition:
    """A tool as the server sent it."""

    name: str
    description: str
    schema: Json
    read_only: bool

    def canonical(self) -> str:
        """One text per definition; the hash is made of these."""
        return json.dumps([self.name, self.description, self.schema, self.read_only], sort_keys=True)


@dataclass(frozen=True, slots=True)
class Offered:
    """A tool as the model is told of it, and the server's own definition."""

    name: str
    description: str
    parameters: Json
    definition: Definition


async def read_definitions(session: ClientSession, only: Sequence[str]) -> tuple[list[Definition], list[str]]:
    """The server's tools (those in `only`, if it names any), and notes on what was left out. Raises what the SDK does."""
    from mcp_types import PaginatedRequestParams

    listing, cursor = _Listing(only), None
    for _ in range(MAX_PAGES):
        page = await session.list_tools(params=PaginatedRequestParams(cursor=cursor) if cursor else None)
        for tool in page.tools:
            listing.take(tool)
        cursor = page.next_cursor
        if not cursor or listing.full:
            break
    if cursor or listing.full:
        listing.note(
            f"the list goes on after {len(listing.found)} tools; it is cut there: name those you need in `only`"
        )
    for name in only:
        if name not in listing.found:
            listing.note(f"there is no tool {name!r}, which `only` names")
    return list(listing.found.values()), listing.notes


class _Listing:
    """Definitions as they come in, bounded in number and size."""

    def __init__(self, only: Sequence[str]) -> None:
        self.found: dict[str, Definition] = {}
        self.notes: list[str] = []
        self.full = False
        self._only, self._size = only, 0

    def note(self, text: str) -> None:
        if len(self.notes) < MAX_NOTES:
            self.notes.append(text)

    def take(self, tool: Any) -> None:
        if self.full or (self._only and tool.name not in self._only):
            return
        if len(tool.name) > MAX_NAME:
            self.note(f"a tool is left out: its name is longer than {MAX_NAME} characters: {one_line(tool.name, 40)!r}")
        elif tool.name in self.found:
            self.note(f"a second tool {one_line(tool.name)!r} is left out")
        else:
            self._add(tool)

    def _add(self, tool: Any) -> None:
        hint = bool(tool.annotations and tool.annotations.read_only_hint)
        definition = Definition(tool.name, tool.description or "", tool.input_schema, hint)
        self._size += len(definition.canonical())
        self.full = self._size > MAX_LISTING or len(self.found) >= MAX_TOOLS
        if not self.full:
            self.found[tool.name] = definition


def fingerprint(definitions: Sequence[Definition]) -> str:
    """SHA-256 over the sorted definitions, 32 hexadecimal digits."""
    rows = sorted(definition.canonical() for definition in definitions)
    return sha256(json.dumps(rows).encode()).hexdigest()[:_HASH_DIGITS]


def changes(old: Sequence[Definition], new: Sequence[Definition]) -> dict[str, str]:
    """What is different, by tool name: `it is gone`, `it is new`, or which parts changed."""
    before, after = ({tool.name: tool for tool in tools} for tools in (old, new))
    found = dict.fromkeys(before.keys() - after.keys(), "it is gone")
    found |= dict.fromkeys(after.keys() - before.keys(), "it is new")
    for name in before.keys() & after.keys():
        if before[name].canonical() != after[name].canonical():
            found[name] = f"its {' and '.join(_parts(before[name], after[name]))} changed"
    return dict(sorted(found.items()))


def _parts(old: Definition, new: Definition) -> list[str]:
    named = {"description": "description", "schema": "parameters", "read_only": "read-only mark"}
    return [words for part, words in named.items() if _canonical(old, part) != _canonical(new, part)]


def _canonical(definition: Definition, part: str) -> str:
    return json.dumps(getattr(definition, part), sort_keys=True)


def in_words(changed: Mapping[str, str]) -> str:
    """The changes on one line, at most ten of them."""
    rows = [f"{one_line(name, 60)}: {what}" for name, what in changed.items()]
    return "; ".join([*rows[:10], *([f"and {len(rows) - 10} more"] if len(rows) > 10 else [])])


def offer(definitions: Sequence[Definition], server: str) -> tuple[list[Offered], list[str]]:
    """Declarations for a model of those tools that it can be given, and notes on the others."""
    offered: dict[str, Offered] = {}
    notes: list[str] = []
    size = 0
    for definition in definitions:
        made = _declare(definition, server)
        if isinstance(made, str):
            notes.append(f"the tool {one_line(definition.name)!r} is left out: {made}")
            continue
        if made.name in offered:
            other = one_line(offered[made.name].definition.name)
            notes.append(
                f"the tool {one_line(definition.name)!r} is left out: as {made.name!r} it can't be told from {other!r}; "
                "name the one you need in `only`"
            )
            continue
        size += len(made.description) + len(json.dumps(made.parameters))
        if size > MAX_DECLARATIONS:
            notes.append(f"{definition.name!r} and what follows is left out: more than {MAX_DECLARATIONS:,} characters")
            break
        offered[made.name] = made
    return list(offered.values()), notes


def _declare(definition: Definition, server: str) -> Offered | str:
    if problem := check_schema(definition.schema):
        return f"its schema can't be used: {one_line(problem, 300)}"
    if (length := len(json.dumps(definition.schema))) > MAX_SCHEMA:
        return f"its schema has {length:,} characters, more than {MAX_SCHEMA:,}"
    kind = definition.schema.get("type", "object")
    if kind != "object":
        return f"its parameters are of type {one_line(str(kind))!r}, not object"
    schema = _cleaned({"type": "object", **definition.schema})
    if isinstance(schema, str):
        return schema
    name = re.sub(r"[^A-Za-z0-9_-]", "_", f"{server}_{definition.name}")[:64]
    return Offered(name, clip(definition.description, MAX_DESCRIPTION).strip(), schema, definition)


def _cleaned(schema: Json) -> Json | str:
    """A copy with harmless descriptions; what is wrong if a property's name itself isn't harmless."""
    copy: Json = json.loads(json.dumps(schema))
    stack: list[Any] = [copy]
    while stack:
        node = stack.pop()
        if isinstance(node, list):
            stack += node
        elif isinstance(node, dict):
            if bad := next((key for key in node if clean(key) != key), None):
                return f"its schema has a name with control characters: {one_line(bad, 40)!r}"
            for key in ("description", "title", "$comment"):
                if isinstance(node.get(key), str):
                    node[key] = clip(node[key], MAX_DESCRIPTION)
            stack += node.values()
    return copy
