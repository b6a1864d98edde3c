"""One page of the browser: go somewhere, act on an element, look. Nothing here waits for ever or reads without bound."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import anyio
from thinkloop.tools.browser_events import MAX_PDF, Document, Events
from thinkloop.tools.browser_scripts import Scripts
from thinkloop.tools.browser_text import View, snapshot_lines
from thinkloop.tools.extract import Extractor
from thinkloop.tools.extract import Page as ExtractedPage
from thinkloop.tools.extract_text import bounded, clean_line
from thinkloop.tools.tool import Attachment, ToolError
from thinkloop.traces.events import Json

if TYPE_CHECKING:
    from playwright.async_api import CDPSession, Locator, Page, Response

Form = Literal["page", "article"]

MAX_ELEMENTS = 20_000  # a snapshot takes 0.1 ms an element: 2 s
MAX_CHARACTERS = 1_000_000  # of a page's text and attributes, beyond which there is no snapshot either
MAX_HTML = 5_000_000  # characters given to the extractor
MAX_BODY = 1_000_000  # bytes of the main document kept for the trace
SNAPSHOT_SECONDS = 6.0
ACT_SECONDS = 5.0  # for an element to become ready to be clicked or filled
_CLOSE_SECONDS = 3.0
_QUIET, _SETTLE = 0.06, 3.0  # seconds without traffic that count as done; the most to wait for them
_STEP = 0.02
_MOVED_ON = re.compile(r"context was destroyed|Cannot find context|No frame for given id|navigated or closed")

_REF = re.compile(r"(?:\[?ref=)?((?:f\d{1,9})?e\d{1,9})\]?")
_TEXT_CHARACTERS, _TEXT_SECONDS = 200_000, 2.0


class StaleRefError(Exception):
    """The element is not on the page any more."""


@dataclass(frozen=True, slots=True)
class Source:
    """The main document as it came: for the record."""

    url: str
    status: int
    media_type: str
    body: bytes

    def facts(self) -> Json:
        return {"bytes": len(self.body), "sha256": hashlib.sha256(self.body).hexdigest()}

    def attachment(self) -> Attachment:
        name = "page.pdf" if self.media_type == "application/pdf" else "page.html"
        return Attachment(name, self.media_type or "text/html", self.body)


class Tab:
    """A page with its listeners. Made by `open`; a failure of the browser's in a method is playwright's `Error`."""

    def __init__(self, page: Page, cdp: CDPSession, events: Events, extractor: Extractor) -> None:
        self.events, self._page, self._cdp, self._extractor = events, page, cdp, extractor
        self._scripts = Scripts(cdp, events.main_frame)
        self._kept: tuple[Response, Document | None] | None = None

    @classmethod
    async def open(
        cls,
        page: Page,
        extractor: Extractor,
        *,
        downloads: Path | None = None,
        stays: Callable[[str], bool] | None = None,
    ) -> Self:
        """Listen to `page`, which is blank. Files go to `downloads`; without it they are refused. With `stays`, documents
        of other addresses come as empty ones with status 403."""
        cdp = await page.context.new_cdp_session(page)
        events = Events(page, cdp, downloads, stays)
        await events.listen()
        return cls(page, cdp, events, extractor)

    @property
    def lost(self) -> str:
        """Why the page can't be used any more; empty while it can."""
        return self.events.crashed or ("the page was closed" if self._page.is_closed() else "")

    @property
    def url(self) -> str:
        return self._page.url

    @property
    def private(self) -> bool:
        """Whether it shows some documents only."""
        return self.events.picky

    @property
    def status(self) -> int:
        """Of the main document; 0 where there is none."""
        return self.events.response.status if self.events.response else 0

    async def goto(self, url: str, seconds: float) -> None:
        """Open `url` and wait until it stands; a page that goes on loading is left to it."""
        from playwright.async_api import Error

        self.events.response = None
        try:
            await self._page.goto(url, wait_until="commit", timeout=seconds * 1000)
        except Error as error:  # the page before may have been about to leave by itself
            if "interrupted by another navigation" not in error.message:
                raise
            await self._settle(seconds)
            await self._page.goto(url, wait_until="commit", timeout=seconds * 1000)
        await self._settle(seconds)

    async def back(self, seconds: float) -> bool:
        """Whether there was a page to go back to."""
        history: Json = await self._cdp.send("Page.getNavigationHistory")
        before = history["entries"][: history["currentIndex"]]
        if not before or before[-1]["url"] == "about:blank":
            return False
        await self._page.go_back(wait_until="commit", timeout=seconds * 1000)
        await self._settle(seconds)
        return True

    async def act(self, ref: str, action: Callable[[Locator], Awaitable[Any]], seconds: float) -> None:
        """Do `action` with the element and wait for what follows. Raises `StaleRefError`, and `ToolError` for no ref."""
        match = _REF.fullmatch(ref.strip())
        if match is None:
            raise ToolError(f'{clean_line(ref, 40)!r} is no ref; take one from the page, such as "e12" from [ref=e12]')
        element = self._page.locator(f"aria-ref={match[1]}")
        if not await _exists(element):
            raise StaleRefError(match[1])
        await action(element)
        await self._settle(seconds)

    async def scroll_to_end(self) -> None:
        """What endless pages wait for before they load more."""
        await self._scripts.scroll_to_end()
        await self._settle(_SETTLE)

    async def article(self) -> ExtractedPage:
        """The text of the page, "article" where there is one, else all of it. Raises `ToolError`."""
        document = self.events.document
        if document is None:
            html = await self._scripts.html(MAX_HTML)
            document = Document(self._page.url, "text/html", html.encode("utf-8", "replace"))
        return await self._extract(document)

    async def look(self, form: Form = "page") -> View:
        """The page as text, in one of its forms; a page too large for either as the start of its plain text."""
        from playwright.async_api import Error

        try:
            return await self._look(form)
        except Error as error:  # it went on to another page just now
            if self.lost or not _MOVED_ON.search(error.message):
                raise
            await self._settle(_SETTLE)
            return await self._look(form)

    async def _look(self, form: Form) -> View:
        title, elements, characters = await self._scripts.measure(MAX_ELEMENTS, MAX_CHARACTERS)
        url = clean_line(self._page.url, 500)
        if self.events.document:
            return _extracted_view(await self.article(), title, url)
        if form == "article":
            try:
                return _extracted_view(await self.article(), title, url)
            except ToolError as error:
                self.events.notice(f"no article could be taken out ({error}); here is the page")
        if _is_plain(self.events.response):
            return await self._plain_text(title, url)
        small = elements <= MAX_ELEMENTS and characters < MAX_CHARACTERS
        snapshot = await self._snapshot() if small else None
        if snapshot is None:
            return await self._start_of_text(title, url, elements)
        return View(title, url, snapshot_lines(snapshot))

    async def screenshot(self) -> bytes:
        """What the window shows, as PNG."""
        return await self._page.screenshot(animations="disabled", caret="hide", timeout=ACT_SECONDS * 1000)

    async def source(self) -> Source | None:
        """The main document as it came, once, if it is small."""
        response, document = self.events.response, self.events.document
        if response is None or self._kept == (response, document):
            return None
        self._kept = (response, document)
        if document:
            return Source(document.url, response.status, document.media_type, document.body[: 20 * MAX_BODY])
        size = response.headers.get("content-length", "0")
        if not size.isdigit() or int(size) > MAX_BODY:
            return None
        return await self._body(response)

    async def close(self) -> None:
        """Close the page. Raises `TimeoutError` where it doesn't let go within 3 s."""
        from playwright.async_api import Error

        self.events.close()
        with anyio.fail_after(_CLOSE_SECONDS, shield=True), suppress(Error):
            await self._page.close()

    async def _body(self, response: Response) -> Source | None:
        from playwright.async_api import Error

        with anyio.move_on_after(1.0), suppress(Error):
            body = await response.body()
            media_type = response.headers.get("content-type", "").partition(";")[0].strip()
            if len(body) <= MAX_BODY:
                return Source(clean_line(response.url, 500), response.status, clean_line(media_type, 100), body)
        return None

    async def _extract(self, document: Document) -> ExtractedPage:
        if not document.whole:
            raise ToolError(f"{clean_line(document.url, 500)} has more than {MAX_PDF >> 20} MB, too much to read here")
        charset = "utf-8" if document.media_type == "text/html" else ""
        return await self._extractor.extract(
            document.body, document.media_type, url=document.url, charset=charset, form="article"
        )

    async def _snapshot(self) -> str | None:
        """`None` where it takes too long: for elements nested by the thousand, for one."""
        from playwright.async_api import TimeoutError

        with suppress(TimeoutError):
            return await self._page.aria_snapshot(mode="ai", timeout=SNAPSHOT_SECONDS * 1000)
        return None

    async def _start_of_text(self, title: str, url: str, elements: int) -> View:
        text = await self._scripts.text(_TEXT_CHARACTERS, _TEXT_SECONDS)
        lines = filter(None, (" ".join(row.split()) for row in bounded(text).lines))
        note = (
            f"this page is too large or too deep for refs ({elements} elements): here is the start of its text, with the "
            "addresses of links in <>; open them with browser_open"
        )
        return View(title, url, tuple(lines), note, refs=False)

    async def _plain_text(self, title: str, url: str) -> View:
        """A text file, whose line ends and indents a snapshot would lose."""
        text = await self._scripts.text(2 * _TEXT_CHARACTERS, _TEXT_SECONDS)
        note = f"cut after {2 * _TEXT_CHARACTERS} characters" if len(text) >= 2 * _TEXT_CHARACTERS else ""
        return View(title, url, tuple(bounded(text).lines), note)

    async def _settle(self, seconds: float) -> None:
        """Wait until the page has its structure and asks for nothing more, or for `_SETTLE` seconds, or `seconds` for
        a page that is on its way to another."""
        from playwright.async_api import Error, TimeoutError

        started = time.monotonic()
        await anyio.sleep(_STEP)
        while True:
            waited = time.monotonic() - started
            if waited > (seconds if self.events.navigating or self.events.downloading else _SETTLE):
                break
            quiet = time.monotonic() - max(self.events.last, started) > _QUIET
            if quiet and not self.events.busy() and not self.events.navigating:
                break
            await anyio.sleep(_STEP)
        if self.lost:
            raise Error(self.lost)
        try:
            left = max(0.1, _SETTLE - waited)
            await self._page.wait_for_load_state("domcontentloaded", timeout=left * 1000)
        except TimeoutError:
            self.events.notice("the page is still loading")


async def _exists(element: Locator) -> bool:
    from playwright.async_api import Error

    try:
        return bool(await element.count())
    except Error as error:
        if "Invalid frame" in error.message:  # the ref is of a frame that is gone
            return False
        raise


def _is_plain(response: Response | None) -> bool:
    media_type = response.headers.get("content-type", "").partition(";")[0].strip().lower() if response else ""
    text = media_type.startswith("text/") and media_type not in ("text/html", "text/xml")
    return text or media_type.endswith(("/json", "+json", "/javascript"))


def _extracted_view(page: ExtractedPage, title: str, url: str) -> View:
    links = [f"[#{number}] {text}: {address}" for number, (text, address) in enumerate(page.links, 1)]
    lines = (*page.lines, *(["Links:", *links] if links else []))
    return View(page.title or title, url, lines, page.note, refs=False, citable=len(page.lines))
