"""From a file's bytes to documents: title and lines of text, whatever the format."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self
from unicodedata import normalize

from thinkloop.tools.corpus_files import CODE, DATA, LINES, MAX_FILE_BYTES, PAGES, File, SkipFile
from thinkloop.tools.extract_bounds import LINE_CHARS
from thinkloop.tools.extract_text import wrap
from thinkloop.tools.tool import ToolError

MAX_TITLE = 200
_SNIFF = 8192
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
_HEADING = re.compile(r"^#+ +(.+?)\s*$", re.MULTILINE)
_UNDERLINED = re.compile(r"^(?:[=*#~-]{3,}\n)?(\S.*)\n[=*#~-]{3,}$", re.MULTILINE)
_ORG = re.compile(r"^(?:#\+title:|\*+) +(.+?)\s*$", re.MULTILINE | re.IGNORECASE)
_LINK = re.compile(r" ?\[#\d{1,3}\]")  # marks of links, which a corpus doesn't keep
_BOMS = {b"\xef\xbb\xbf": "utf-8-sig", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
_TITLES = ("title", "name", "id", "_id", "url")
_TEXTS = ("text", "content", "body", "contents")


class Text(NamedTuple):
    """One document before it is indexed."""

    id: str
    title: str
    text: str


class TextReader:
    """Makes documents of files. A context manager: web pages and PDFs are parsed in a worker process, started on need."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._extractor: Any = None
        self._missing: dict[str, str] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._extractor = None
        self._stack.close()

    def texts(self, file: File, body: bytes) -> Iterator[Text]:
        """The documents in `file`: one, none when it is blank, or one a line. Raises `SkipFile`."""
        suffix = file.path.suffix.lower()
        if suffix in PAGES:
            title, text = self._page(body, PAGES[suffix])
            yield from _some(file.id, title or file.path.stem, text)
        elif suffix in LINES:
            yield from _json_lines(file.id, body)
        else:
            text = _decoded(body)
            yield from _some(file.id, _title(file.path, text), text)

    def _page(self, body: bytes, media_type: str) -> tuple[str, str]:
        from thinkloop.tools.extract import BlockingExtractor, ExtraMissing

        if media_type in self._missing:
            raise SkipFile(self._missing[media_type], again=True)
        if self._extractor is None:
            self._extractor = self._stack.enter_context(BlockingExtractor())
        try:
            page = self._extractor.extract(body, media_type, form="article")
        except ExtraMissing as error:
            self._missing[media_type] = str(error)
            raise SkipFile(str(error), again=True) from error
        except ToolError as error:
            raise SkipFile(str(error)) from error
        return _clean(page.title), _clean(_LINK.sub("", "\n".join(page.lines)) if page.links else "\n".join(page.lines))


def _some(name: str, title: str, text: str) -> Iterator[Text]:
    text = _wrapped(text.rstrip("\n"))
    if text.strip():
        yield Text(name, " ".join(title.split())[:MAX_TITLE], text)


def _decoded(body: bytes) -> str:
    encoding = next((name for mark, name in _BOMS.items() if body.startswith(mark)), "utf-8")
    if encoding != "utf-16" and b"\0" in body[:_SNIFF]:
        raise SkipFile("is binary, not text")
    return _clean(body.decode(encoding, "replace"))


def _clean(text: str) -> str:
    """Without control characters, accents joined to their letters; line ends are `\\n`, tabs stay."""
    text = _CONTROL.sub("", text.replace("\r\n", "\n").replace("\r", "\n"))
    return text if text.isascii() else normalize("NFC", text)


def _wrapped(text: str) -> str:
    """No line is longer than a page shows: what is cut off there could never be read."""
    lines = text.split("\n")
    if max(map(len, lines)) <= LINE_CHARS:
        return text
    return "\n".join(piece for line in lines for piece in _pieces(line))


def _pieces(line: str) -> list[str]:
    return [line] if len(line) <= LINE_CHARS else [piece.rstrip() for piece in wrap(line)]


def _title(path: Path, text: str) -> str:
    suffix = path.suffix.lower()
    if suffix in CODE or suffix in DATA:
        return path.stem
    form = {".rst": _UNDERLINED, ".org": _ORG}.get(suffix, _HEADING)
    heading = form.search(text)
    return heading.group(1) if heading else path.stem


def _json_lines(name: str, body: bytes) -> Iterator[Text]:
    for number, line in enumerate(io.BytesIO(body), 1):
        if line.strip():
            yield from _json_line(f"{name}#{number}", line[:MAX_FILE_BYTES])


def _json_line(name: str, line: bytes) -> Iterator[Text]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):  # not JSON after all: a line of text
        return _some(name, name, _clean(line.decode("utf-8", "replace")))
    if not isinstance(value, dict):
        return _some(name, name, _clean(_shown(value)))
    title = _first(value, _TITLES)
    text = _first(value, _TEXTS)
    if not text:
        return _some(name, title or name, _clean(_shown(value)))
    url = _first(value, ("url",))
    head = [part for part in (title, url if url != title else "") if part and not text.startswith(part)]
    return _some(name, title or name, _clean("\n".join([*head, *([""] if head else []), text])))


def _first(value: dict[str, Any], fields: tuple[str, ...]) -> str:
    found = (value[field] for field in fields if isinstance(value.get(field), str | int) and value[field] != "")
    return str(next(found, ""))


def _shown(value: object) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, indent=1)
    except RecursionError:
        return ""
