"""A server's messages, cut down to what is read of them before the SDK validates them.

The SDK validates as unions, at every depth, and keeps each error: a result of 240,000 blocks without their fields, 4 MB,
gave 2.9 million errors, took 9 s of the loop and 2.3 GB.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

MAX_BLOCKS = 1000
"""Content blocks of a result."""
MAX_PAGE = 1000
"""Tools of one page of a list: more than are offered, since `only` may name any of them."""
MAX_PARTS = 1000
"""Values in anything else, such as the server's capabilities; honest ones have some 20."""
_FIELDS: Mapping[str, tuple[str, ...]] = {
    "text": ("text",),
    "image": ("data", "mimeType"),
    "audio": ("data", "mimeType"),
    "resource_link": ("name", "uri"),
}
_TOOL = ("name", "description", "inputSchema")


def reduce_message(message: Any) -> bool:
    """Cut a JSON-RPC message in place. Returns whether the session should have it at all."""
    if hasattr(message, "result"):
        message.result = _result(message.result)
    elif hasattr(message, "error"):
        message.error.data = _if_small(message.error.data)
    elif not _is_small(message.params):
        message.params = {}
        return hasattr(message, "id")  # a request must be answered, if only with an error
    return True


def _result(result: dict[str, Any]) -> dict[str, Any]:
    if len(result) > MAX_PARTS:
        return {}
    return {key: part for key, value in result.items() if (part := _KEPT.get(key, _if_small)(value)) is not None}


def _content(content: Any) -> Any:
    """Each block by its own type, with what is read of it; notes on the others."""
    if not isinstance(content, list):
        return _if_small(content)
    blocks = list(map(_block, content[:MAX_BLOCKS]))
    kept: list[Any] = [block for block in blocks if block is not None]
    if wrong := len(blocks) - len(kept):
        kept.append(_note(f"{wrong:,} parts left out: no valid content"))
    if more := len(content) - len(blocks):
        kept.append(_note(f"{more:,} more parts left out"))
    return kept


def _note(text: str) -> dict[str, Any]:
    return {"type": "text", "text": f"[{text}]"}


def _block(block: Any) -> dict[str, Any] | None:
    kind = block.get("type") if isinstance(block, dict) else None
    if kind == "resource":
        inner = _resource(block.get("resource"))
        return inner and {"type": "resource", "resource": inner}
    fields = _FIELDS.get(kind, ()) if isinstance(kind, str) else ()
    return {"type": kind, **_texts(block, *fields)} if fields and _has_texts(block, *fields) else None


def _resource(resource: Any) -> dict[str, Any] | None:
    if not isinstance(resource, dict) or not _has_texts(resource, "uri"):
        return None
    held = next((name for name in ("text", "blob") if _has_texts(resource, name)), None)
    return _texts(resource, "uri", "mimeType", held) if held else None


def _has_texts(holder: Mapping[str, Any], *names: str) -> bool:
    return all(isinstance(holder.get(name), str) for name in names)


def _texts(holder: Mapping[str, Any], *names: str) -> dict[str, str]:
    return {name: holder[name] for name in names if isinstance(holder.get(name), str)}


def _tools(tools: Any) -> Any:
    return list(map(_tool, tools[:MAX_PAGE])) if isinstance(tools, list) else _if_small(tools)


def _tool(tool: Any) -> Any:
    if not isinstance(tool, dict):
        return None
    kept = {name: tool[name] for name in _TOOL if name in tool}
    if not _is_uniform(kept.get("inputSchema")):
        kept["inputSchema"] = None  # one error instead of one for each property
    if isinstance(hints := tool.get("annotations"), dict) and isinstance(read := hints.get("readOnlyHint"), bool):
        kept["annotations"] = {"readOnlyHint": read}
    return kept


def _is_uniform(schema: Any) -> bool:
    """Whether the lists in it that the SDK looks through are of the right kind."""
    if not isinstance(schema, dict):
        return False
    properties, required = schema.get("properties") or {}, schema.get("required") or []
    return (
        isinstance(properties, dict) and all(isinstance(part, dict | bool) for part in properties.values())
        and isinstance(required, list) and all(isinstance(name, str) for name in required)
    )  # fmt: skip


def _free(value: Any) -> Any:
    """Free-form: the SDK doesn't look inside."""
    return value


def _if_small(value: Any) -> Any:
    return value if _is_small(value) else None


def _is_small(value: Any) -> bool:
    """Whether there are at most `MAX_PARTS` values in it."""
    left, stack = MAX_PARTS, [value]
    while stack and left >= 0:
        part = stack.pop()
        if isinstance(part, dict | list):
            left -= len(part)
            if left >= 0:
                stack += part.values() if isinstance(part, dict) else part
    return left >= 0


_KEPT: Mapping[str, Callable[[Any], Any]] = {"content": _content, "tools": _tools, "structuredContent": _free}
