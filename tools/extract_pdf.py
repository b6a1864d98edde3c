"""PDF to text, page by page, with pypdf."""

from __future__ import annotations

from io import BytesIO
from typing import Any

from thinkloop.tools.extract_bounds import (
    LINK_TEXT_CHARS,
    MAX_LINKS,
    TITLE_CHARS,
    TOTAL_CHARS,
    Document,
    DocumentError,
    OutOfTime,
    join_notes,
    within,
)
from thinkloop.tools.extract_text import clean_line, web_url

MAX_PAGES = 1000


def read_pdf(body: bytes, *, seconds: float) -> Document:
    """The text of each page after a line `--- page 3 ---`, as far as `seconds` and the bounds allow; the note says how
    far. Raises `DocumentError` for a file that is damaged, locked, or only pictures."""
    pdf = _Pdf()
    try:
        with within(seconds):
            pdf.read(body)
    except OutOfTime:
        pdf.reason = pdf.reason or "it takes too long to read"
    if not any(pdf.texts):
        raise DocumentError(pdf.why_nothing())
    text = "\n".join(f"--- page {number} ---\n{page}" for number, page in enumerate(pdf.texts, 1))
    return Document("pdf", pdf.title or _first_line(pdf.texts), text, pdf.links, pdf.note())


class _Pdf:
    """What has been read so far; running out of time in the middle leaves it usable."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.links: list[tuple[str, str]] = []
        self.title, self.reason, self.count, self.failed = "", "", 0, 0

    def read(self, body: bytes) -> None:
        reader = _open(body)
        self.count = len(reader.pages)
        self.title = _title(reader)
        size = 0
        for number in range(1, min(self.count, MAX_PAGES) + 1):
            page = self._page(reader, number)
            size += len(page)
            self.texts.append(page)
            if size > TOTAL_CHARS:
                return

    def _page(self, reader: Any, number: int) -> str:
        try:
            page = reader.pages[number - 1]
            text = page.extract_text()
        except MemoryError:
            raise
        except Exception:  # one bad page doesn't spoil the others; pypdf raises all sorts of things
            self.failed += 1
            return ""
        self._collect_links(page, number)
        return "\n".join(line for line in map(str.rstrip, text.splitlines()) if line)

    def _collect_links(self, page: Any, number: int) -> None:
        seen = {url for _, url in self.links}
        try:
            for item in (page.get("/Annots") or ())[:MAX_LINKS]:
                url = web_url("", str(item.get_object()["/A"]["/URI"]))
                if url and url not in seen and len(self.links) < MAX_LINKS:
                    self.links.append((f"page {number}", url))
        except Exception:  # links are extra
            return

    def note(self) -> str:
        notes = []
        if len(self.texts) < self.count:
            notes.append(f"pages 1-{len(self.texts)} of {self.count}" + (f": {self.reason}" if self.reason else ""))
        if self.failed:
            notes.append(f"{self.failed} pages could not be read")
        return join_notes(*notes)

    def why_nothing(self) -> str:
        if self.reason:
            return f"the PDF can't be read: {self.reason}"
        if not self.count:
            return "the PDF has no pages"
        if self.failed:
            return "the PDF is damaged: none of its pages could be read"
        return f"the PDF has no text (pages: {self.count}): probably scanned pictures, which would need OCR"


def _open(body: bytes) -> Any:
    from pypdf import PasswordType, PdfReader
    from pypdf.errors import DependencyError

    try:
        reader = PdfReader(BytesIO(body), strict=False)
        if reader.is_encrypted and reader.decrypt("") == PasswordType.NOT_DECRYPTED:
            raise DocumentError("the PDF is encrypted and needs a password")
        len(reader.pages)
    except DependencyError as error:
        raise DocumentError(f"the PDF is encrypted, and a library for that is missing: {error}") from None
    except (MemoryError, DocumentError):
        raise
    except Exception as error:  # pypdf raises all sorts of things on damaged files
        raise DocumentError(f"the PDF is damaged: {clean_line(str(error), LINK_TEXT_CHARS)}") from None
    return reader


def _title(reader: Any) -> str:
    try:
        return clean_line(str((reader.metadata or {}).get("/Title") or ""), TITLE_CHARS)
    except Exception:  # the title is extra
        return ""


def _first_line(texts: list[str]) -> str:
    lines = (line for text in texts[:3] for line in text.split("\n"))
    return next((title for line in lines if (title := clean_line(line, TITLE_CHARS))), "")
