"""What a document is: told by its media type and its first bytes, before anything parses it."""

from __future__ import annotations

import re
from typing import Literal

from thinkloop.tools.extract_text import codec_of
from thinkloop.tools.tool import ToolError

Kind = Literal["html", "pdf", "text"]
MAX_BYTES: dict[Kind, int] = {"html": 10_000_000, "text": 10_000_000, "pdf": 50_000_000}

_HTML = re.compile(  # atomic groups, so that no run of comments makes it backtrack
    rb"(?>\xef\xbb\xbf)?(?>\s*)(?><\?xml[^>]{0,200}>\s*)?(?><!--.*?-->\s*)*+<(?:!doctype\s+html|html)\b", re.I | re.S
)
_MEDIA_TYPE = re.compile(r"\s*([\w!#$&^.+-]{1,100}/[\w!#$&^.+-]{1,100})\s*(?:;|$)")
_CHARSET = re.compile(r";\s*charset\s*=\s*[\"']?([\w.:-]{1,40})", re.IGNORECASE)
_HTML_TYPES = frozenset({"text/html", "application/xhtml+xml"})
PDF_TYPES = frozenset({"application/pdf", "application/x-pdf"})
TEXT_TYPES = frozenset(
    "application/" + name
    for name in (
        "json", "xml", "yaml", "x-yaml", "toml", "javascript", "x-javascript", "ecmascript", "typescript", "x-ndjson",
        "jsonl", "jsonlines", "x-jsonlines", "sql", "csv", "x-sh", "x-shellscript", "x-python", "x-tex", "x-latex", "rtf",
        "graphql", "x-httpd-php", "x-subrip",
    )
)  # fmt: skip
_UNKNOWN_TYPES = frozenset(
    {"", "application/octet-stream", "binary/octet-stream", "application/x-download", "unknown/unknown"}
)
_MAGIC = (
    (b"PK\x03\x04", "a ZIP archive or an Office document"), (b"PK\x05\x06", "an empty ZIP archive"),
    (b"\x1f\x8b", "gzip data"), (b"BZh", "bzip2 data"), (b"\xfd7zXZ\0", "xz data"), (b"\x28\xb5\x2f\xfd", "zstd data"),
    (b"7z\xbc\xaf", "a 7z archive"), (b"Rar!", "a RAR archive"), (b"\x89PNG", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"), (b"GIF8", "a GIF image"), (b"RIFF", "a RIFF file (WebP, WAV or AVI)"),
    (b"ID3", "MP3 audio"), (b"OggS", "Ogg media"), (b"\x7fELF", "an ELF program"), (b"SQLite format 3", "an SQLite database"),
    (b"\xd0\xcf\x11\xe0", "an old Office document"), (b"wOFF", "a font"), (b"\0asm", "a WebAssembly module"),
)  # fmt: skip


def kind_of(body: bytes, media_type: str) -> Kind:
    """The kind to read `body` as. Raises `ToolError` for what has no text, is not what it says, or is too large."""
    kind = _kind(body, media_type.partition(";")[0].strip().lower())
    if len(body) > MAX_BYTES[kind]:
        size, most = len(body) / 1e6, MAX_BYTES[kind] // 1_000_000
        name = "PDF" if kind == "pdf" else kind
        raise ToolError(
            f"the {name} document has {size:,.0f} MB, more than the {most} MB that are read; find a smaller one"
        )
    return kind


def content_type(header: str) -> tuple[str, str]:
    """The media type (lower case) and character set of a Content-Type header, the latter by Python's name for what browsers
    take it to mean; "" for what is missing, malformed or unknown."""
    media_type, charset = _MEDIA_TYPE.match(header[:300]), _CHARSET.search(header[:300])
    return (media_type[1].lower() if media_type else ""), (codec_of(charset[1]) if charset else "")


def _kind(body: bytes, declared: str) -> Kind:
    if b"%PDF-" in body[:1024] and (declared not in _HTML_TYPES or body.lstrip()[:5] == b"%PDF-"):
        return "pdf"
    magic = next((name for start, name in _MAGIC if body.startswith(start)), "")
    if declared in PDF_TYPES:
        raise ToolError(f"not a PDF, although it was declared as one: it begins like {magic or _textual(body)}")
    if magic:
        raise ToolError(f"binary data without text: it begins like {magic}")
    if declared in _HTML_TYPES or (_HTML.match(body[:4096]) and declared in _UNKNOWN_TYPES | {"text/plain"}):
        return "html"
    if declared in _UNKNOWN_TYPES or _is_text(declared):
        return "text"
    raise ToolError(f"`{declared[:80]}` data is not text, HTML or PDF, so there is nothing to read in it")


def _is_text(declared: str) -> bool:
    return declared.startswith("text/") or declared in TEXT_TYPES or declared.endswith(("+json", "+xml"))


def _textual(body: bytes) -> str:
    if not body:
        return "nothing (it is empty)"
    return "an HTML page" if _HTML.match(body[:4096]) else "other data"
