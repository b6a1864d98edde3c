"""A call of an MCP tool, and its result as a tool's output: text joined, files attached, all of it bounded and cleaned."""

from __future__ import annotations

import base64
import binascii
import json
import re
from functools import cache
from typing import TYPE_CHECKING, Any

from thinkloop.tools.mcp_messages import PARSE_ERROR
from thinkloop.tools.mcp_text import clip, one_line, said
from thinkloop.tools.tool import Attachment, Output
from thinkloop.traces.events import Json

if TYPE_CHECKING:
    from mcp import ClientSession

MAX_TEXT = 1_000_000  # characters
MAX_FILES, MAX_FILE_BYTES = 32, 10_000_000
"""Of one result; the bytes of all its files together."""
_MEDIA_TYPE = re.compile(r"[a-z0-9]+/[a-z0-9][a-z0-9.+-]{0,80}")
_SUFFIXES = {"image/png": "png", "image/jpeg": "jpg", "image/webp": "webp", "image/gif": "gif", "audio/wav": "wav",
             "audio/mpeg": "mp3", "application/pdf": "pdf", "text/plain": "txt", "application/json": "json"}  # fmt: skip


async def call_tool(session: ClientSession, *, name: str, arguments: Json) -> Any:
    """`tools/call` without the SDK's check of the server's output schema, whose patterns could stall the loop."""
    from mcp_types import CallToolRequest, CallToolRequestParams

    params = CallToolRequestParams(name=name, arguments=arguments)
    return await session.send_request(CallToolRequest(params=params), _call_results())


@cache
def _call_results() -> Any:
    from mcp_types import CallToolResult, InputRequiredResult
    from pydantic import TypeAdapter

    return TypeAdapter(CallToolResult | InputRequiredResult)


def why_failed(error: Exception) -> str:
    """What a request's error means, to follow `the MCP server 'x'`."""
    from mcp import MCPError

    if isinstance(error, MCPError) and error.code == PARSE_ERROR:
        return f"sent an answer that can't be read: {one_line(error.message, 500)}"
    if isinstance(error, MCPError):
        return f"refused: {one_line(error.message, 1000)} ({error.code})"
    if type(error).__name__ == "ValidationError":
        return f"sent something that is no valid MCP result: {said(error)}"
    return f"failed: {type(error).__name__}: {said(error)}"


def output_of(result: Any, tool: str, record: Json) -> Output:
    """The output for a `CallToolResult`. Structured content stands in, as JSON, where there is no text."""
    reading = _Reading(tool)
    for block in result.content:
        reading.take(block)
    if not reading.has_text and result.structured_content is not None:
        reading.text.append(json.dumps(result.structured_content, ensure_ascii=False))
    content = clip("\n".join(reading.text), MAX_TEXT).strip() or "(no output)"
    if result.is_error and not content.lower().startswith("error"):
        content = f"error: {content}"
    return Output(content, record=record, ok=not result.is_error, files=tuple(reading.files))


class _Reading:
    """Text and files out of content blocks."""

    def __init__(self, tool: str) -> None:
        self.text: list[str] = []
        self.has_text = False
        self.files: list[Attachment] = []
        self._tool, self._bytes = tool, 0

    def take(self, block: Any) -> None:
        match block.type:
            case "text":
                self._take_text(block.text)
            case "image" | "audio":
                self._take_data(block.data, block.mime_type, "")
            case "resource" if hasattr(block.resource, "text"):
                self._take_text(block.resource.text)
            case "resource":
                self._take_data(block.resource.blob, block.resource.mime_type or "", str(block.resource.uri))
            case "resource_link":
                self.text.append(f"[resource: {one_line(block.name, 80)} {one_line(str(block.uri), 300)}]")

    def _take_text(self, text: str) -> None:
        self.text.append(text)
        self.has_text = self.has_text or bool(text.strip())

    def _take_data(self, data: str, media_type: str, uri: str) -> None:
        kind = media_type.lower() if _MEDIA_TYPE.fullmatch(media_type.lower()) else "application/octet-stream"
        if self._bytes + len(data) * 3 // 4 > MAX_FILE_BYTES or len(self.files) >= MAX_FILES:
            self.text.append(f"[{kind}, about {len(data) * 3 // 4:,} bytes: left out, too large or too many]")
            return
        try:
            content = base64.b64decode(data, validate=True)
        except (binascii.Error, ValueError):
            self.text.append(f"[{kind}: left out, its data is no base64]")
            return
        self._bytes += len(content)
        file = Attachment(self._name(uri, kind), kind, content)
        self.files.append(file)
        self.text.append(f"[{kind}, {len(content):,} bytes: kept as {file.name}]")

    def _name(self, uri: str, kind: str) -> str:
        last = re.split(r"[/?#]", uri.rstrip("/"))[-1] if "?" not in uri else ""
        plain = re.sub(r"[^A-Za-z0-9._-]+", "_", last).lstrip(".")[-60:]
        return plain or f"{self._tool}-{len(self.files) + 1}.{_SUFFIXES.get(kind, 'bin')}"
