"""The body of a response, bounded: bytes are counted after decompression, and decompressed no further than the bound."""

from __future__ import annotations

import re
import zlib
from collections.abc import AsyncGenerator, Iterator
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from anyio.lowlevel import checkpoint
from thinkloop.tools.extract_kind import PDF_TYPES, TEXT_TYPES
from thinkloop.tools.extract_text import clean_line
from thinkloop.tools.tool import ToolError

if TYPE_CHECKING:
    import httpx

__all__ = ["TEXT_LIKE", "accepts", "read_body", "short_text"]

TEXT_LIKE = ("text/*", "application/*+json", "application/*+xml", *sorted(TEXT_TYPES | PDF_TYPES))
"""Media types that a model can be shown as text, as patterns."""

_PIECE = 262_144  # bytes decompressed at once
_PIECES = 100  # taken before others get a turn: httpx doesn't wait while it has data (a chunk of TLS can be one byte)
_TINY = 4  # bytes: over 10,000 chunks may not be smaller than that on average
_GZIP = b"\x1f\x8b"
_UNSEEN = re.compile(r"<(script|style|head)\b.*?(?:</\1\s*>|\Z)|<!--.*?(?:-->|\Z)", re.IGNORECASE | re.DOTALL)
_TAG = re.compile(r"<[^<>]*>")
_NOT_TEXT = re.compile(r"[\x00-\x1f\x7f-\x9f\s]+")


def accepts(patterns: tuple[str, ...], media_type: str) -> bool:
    """Whether one of the patterns (such as `text/*`) covers the media type."""
    return any(fnmatchcase(media_type, pattern) for pattern in patterns)


async def read_body(response: httpx.Response, limit: int) -> tuple[bytes, bool]:
    """At most `limit` bytes of the decompressed body, and whether there would have been more (or it was cut short).

    Raises `ToolError` for a body that can't be decompressed, or is compressed in a way that wasn't asked for.
    """
    body = bytearray()
    pieces = _pieces(response)
    try:
        async for piece in pieces:
            body += piece
            if len(body) > limit:
                return bytes(body[:limit]), True
    except zlib.error as error:
        raise ToolError(f"{response.url} sent a body that can't be decompressed: {error}.") from error
    except EOFError:
        return bytes(body), True
    finally:
        await pieces.aclose()
    return bytes(body), False


def short_text(body: bytes, charset: str, limit: int = 300) -> str:
    """The start of a page as one line of plain text, for an error message."""
    text = body[:20_000].decode(charset or "utf-8", "replace")
    line = clean_line(_NOT_TEXT.sub(" ", _TAG.sub(" ", _UNSEEN.sub(" ", text))).strip(), limit + 1)
    return line if len(line) <= limit else line[: limit - 1] + "…"


async def _pieces(response: httpx.Response) -> AsyncGenerator[bytes, None]:
    """The decompressed body. Raises EOFError when it ends too early."""
    import httpx

    inflate = _decoder(response)
    count = size = 0
    try:
        async for raw in response.aiter_raw():
            count, size = count + 1, size + len(raw)
            if count % _PIECES == 0:
                await _pause(response.url, count, size)
            for piece in inflate.feed(raw) if inflate else [raw]:
                yield piece
    except (httpx.RemoteProtocolError, httpx.ReadError) as error:
        raise EOFError from error
    if inflate and not inflate.complete:
        raise EOFError


async def _pause(url: httpx.URL, count: int, size: int) -> None:
    """Lets others have a turn. Raises `ToolError` when a body comes in absurdly small chunks."""
    if count > 10_000 and size < _TINY * count:
        raise ToolError(f"{url} was cut: it sent {size} bytes in {count} chunks.")
    await checkpoint()


def _decoder(response: httpx.Response) -> _Inflate | None:
    coding = response.headers.get("content-encoding", "").strip().lower()
    if coding in ("", "identity"):
        return None
    if coding in ("gzip", "x-gzip", "deflate"):
        return _Inflate()
    raise ToolError(f"{response.url} is compressed as {coding[:40]!a}, and only gzip and deflate were asked for.")


class _Inflate:
    """gzip (also several in a row), zlib or raw deflate, in pieces of bounded size."""

    def __init__(self) -> None:
        self._stream: zlib._Decompress | None = None
        self.complete = True
        self._padded = False

    def feed(self, raw: bytes) -> Iterator[bytes]:
        while raw and not self._padded:
            if self._stream is None:
                self._stream = zlib.decompressobj(_window(raw))
            yield self._stream.decompress(raw, _PIECE)
            self.complete = self._stream.eof
            raw = self._stream.unconsumed_tail
            if self.complete:
                raw = self._another(self._stream.unused_data)

    def _another(self, rest: bytes) -> bytes:
        if not rest.startswith(_GZIP):
            self._padded = bool(rest)  # which others ignore too; zlib would keep it all, and copy it at every piece
            return b""
        self._stream = None
        return rest


def _window(raw: bytes) -> int:
    """zlib's `wbits`: gzip by its magic, zlib by its header's check sum, else raw deflate (RFC 1950, section 2.2)."""
    if raw.startswith(_GZIP[: len(raw)]):
        return zlib.MAX_WBITS | 16
    is_zlib = raw[0] & 15 == 8 and (len(raw) < 2 or int.from_bytes(raw[:2], "big") % 31 == 0)
    return zlib.MAX_WBITS if is_zlib else -zlib.MAX_WBITS
