"""What happens on a page by itself: dialogs, pop-ups, downloads, documents that Chromium can't show, requests under way."""

from __future__ import annotations

import asyncio
import base64
import os
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
from thinkloop.tools.extract_text import clean_line
from thinkloop.tools.tool import Attachment
from thinkloop.traces.events import Json

if TYPE_CHECKING:
    from playwright.async_api import CDPSession, Dialog, Download, FileChooser, Frame, Page, Request, Response

MAX_NOTICES, MAX_RESPONSES, MAX_LINKS = 8, 100, 300
MAX_PDF = 30 << 20  # bytes
MAX_DOWNLOAD = 30 << 20
_PIECE = 1 << 20
_AWAITED = frozenset({"document", "script", "stylesheet", "fetch", "xhr"})
_HOLDS_PLACE = b"<!doctype html><title>PDF</title><p>PDF"


@dataclass(frozen=True, slots=True)
class Document:
    """A body to take text from: a PDF, which Chromium is not given, or a page's HTML."""

    url: str
    media_type: str
    body: bytes
    whole: bool = True


class Events:
    """Listens to one page. What it learns waits here until it is taken."""

    def __init__(self, page: Page, cdp: CDPSession, downloads: Path | None) -> None:
        self._page, self._cdp, self._downloads = page, cdp, downloads
        self._tasks: set[asyncio.Task[None]] = set()
        self.crashed = ""
        self.failed = ("", "")
        """URL and error of the last main document that didn't come."""
        self.response: Response | None = None
        """Of the main document; redirects aren't."""
        self._pdf: Document | None = None
        self.notices: list[str] = []
        self.responses: list[Json] = []
        self.files: list[Attachment] = []
        self.navigating: Request | None = None
        self.downloading = self.downloads = 0
        """How many downloads are under way, and have been since the last result."""
        self._main_frame = ""
        self.last = time.monotonic()
        """When something was last asked for or answered."""
        self._under_way: dict[Request, float] = {}

    async def listen(self) -> None:
        """Start; nothing may be open on the page yet."""
        page, cdp = self._page, self._cdp
        page.on("crash", lambda _: self._crash("the page crashed"))
        page.on("dialog", self._start(self._dialog))
        page.on("download", self._start(self._download))
        page.on("filechooser", self._start(self._filechooser))
        page.on("popup", self._start(self._popup))
        page.on("request", self._request)
        page.on("response", self._response)
        page.on("requestfinished", self._over)
        page.on("requestfailed", self._failed)
        page.on("framenavigated", self._navigated)
        cdp.on("Fetch.requestPaused", self._start(self._paused))
        cdp.on("Page.windowOpen", self._window)
        await cdp.send("Page.enable")
        tree: Json = await cdp.send("Page.getFrameTree")
        self._main_frame = str(tree["frameTree"]["frame"]["id"])
        pattern = {"resourceType": "Document", "requestStage": "Response"}
        await cdp.send("Fetch.enable", {"patterns": [pattern]})

    @property
    def document(self) -> Document | None:
        """The PDF that the page is, if it is one."""
        here = self._page.url.partition("#")[0]
        return self._pdf if self._pdf and self._pdf.url == here else None

    def busy(self) -> bool:
        """Whether something that may still change the page is under way (streams and images are not waited for)."""
        return bool(self._under_way or self.downloading)

    def notice(self, text: str) -> None:
        """Something the model is told with the next result; of many alike, the first few."""
        if len(self.notices) < MAX_NOTICES and text not in self.notices:
            self.notices.append(text)

    def take(self) -> tuple[list[str], list[Json], list[Attachment]]:
        """Notices, responses and files since the last time."""
        taken = self.notices, self.responses, self.files
        self.notices, self.responses, self.files, self.downloads = [], [], [], 0
        return taken

    async def downloads_over(self) -> None:
        """Wait for the download that Chromium has announced."""
        while self.downloading or not self.downloads:
            await anyio.sleep(0.02)

    def _start(self, handler: Callable[[Any], Awaitable[None]]) -> Callable[[Any], None]:
        """As a listener. What goes wrong in it concerns this page alone: a page that is gone, or hostile."""
        from playwright.async_api import Error

        async def guarded(event: Any) -> None:
            with suppress(Error, OSError, LookupError, ValueError):
                await handler(event)

        def listener(event: Any) -> None:
            task = asyncio.create_task(guarded(event))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

        return listener

    def close(self) -> None:
        """Stop what is still being handled."""
        for task in self._tasks:
            task.cancel()

    def _crash(self, reason: str) -> None:
        self.crashed = self.crashed or reason

    # Requests

    def _request(self, request: Request) -> None:
        self.last = time.monotonic()
        if request.resource_type in _AWAITED:
            self._under_way[request] = self.last
        if self._is_main(request):
            self.navigating = request

    def _is_main(self, request: Request) -> bool:
        from playwright.async_api import Error

        try:
            return request.is_navigation_request() and request.frame == self._page.main_frame
        except Error:  # the frame isn't there yet: a pop-up's request
            return False

    def _response(self, response: Response) -> None:
        if len(self.responses) < MAX_RESPONSES:
            self.responses.append(_facts(response))
        if self._is_main(response.request) and not 300 <= response.status < 400:
            self.response = response

    def _over(self, request: Request) -> None:
        self.last = time.monotonic()
        self._under_way.pop(request, None)
        if self.navigating == request:
            self.navigating = None

    def _failed(self, request: Request) -> None:
        if self._is_main(request):
            self.failed = (request.url, request.failure or "")
        self._over(request)

    def _navigated(self, frame: Frame) -> None:
        if frame == self._page.main_frame:
            self.navigating, self.last = None, time.monotonic()

    # Documents

    async def _paused(self, event: Json) -> None:
        """A document's answer has begun: let it through, or take a PDF out of Chromium's hands."""
        request = {"requestId": event["requestId"]}
        main = event.get("frameId") == self._main_frame
        if not main or _media_type(event) != "application/pdf" or event.get("responseStatusCode") != 200:
            await self._cdp.send("Fetch.continueRequest", request)
            return
        body = await self._body(request)
        self._pdf = Document(event["request"]["url"], "application/pdf", body[:MAX_PDF], len(body) <= MAX_PDF)
        headers = [{"name": "Content-Type", "value": "text/html"}]
        content = base64.b64encode(_HOLDS_PLACE).decode()
        await self._cdp.send(
            "Fetch.fulfillRequest", {**request, "responseCode": 200, "responseHeaders": headers, "body": content}
        )

    async def _body(self, request: Json) -> bytes:
        """The answer's body; of a large one a little more than `MAX_PDF`."""
        stream = (await self._cdp.send("Fetch.takeResponseBodyAsStream", request))["stream"]
        data, piece = bytearray(), {"eof": False}
        while not piece["eof"] and len(data) <= MAX_PDF:
            piece = await self._cdp.send("IO.read", {"handle": stream, "size": _PIECE})
            text = str(piece["data"])
            data += base64.b64decode(text) if piece.get("base64Encoded") else text.encode("latin-1", "replace")
        await self._cdp.send("IO.close", {"handle": stream})
        return bytes(data)

    # What asks for a person

    async def _dialog(self, dialog: Dialog) -> None:
        kind = dialog.type
        if kind == "beforeunload":
            await dialog.accept()
            return
        await dialog.dismiss()
        self.notice(f"a dialog ({kind}) said {clean_line(dialog.message, 300)!r} and was dismissed")

    async def _filechooser(self, chooser: FileChooser) -> None:
        self.notice("the page asked for a file to upload, which isn't possible here")

    def _window(self, event: Json) -> None:
        self.notice(f"a pop-up to {clean_line(event['url'], MAX_LINKS)} was not opened; open it with browser_open")

    async def _popup(self, page: Page) -> None:
        await page.close()

    async def _download(self, download: Download) -> None:
        name, url = clean_line(download.suggested_filename, 100), clean_line(download.url, MAX_LINKS)
        self.downloads += 1
        if self._downloads is None:
            self.notice(f"the download of {name!r} from {url} was refused: downloads are not allowed here")
            return
        self.downloading += 1
        try:
            await self._keep(download, name)
        finally:
            self.downloading -= 1
            self.last = time.monotonic()

    async def _keep(self, download: Download, name: str) -> None:
        path = Path(await download.path())
        data = await anyio.to_thread.run_sync(_read, path)
        await download.delete()
        if data is None:
            self.notice(f"the download {name!r} has more than {MAX_DOWNLOAD >> 20} MB and was not kept")
            return
        self.files.append(Attachment(name, "application/octet-stream", data))
        self.notice(f"{name!r} was downloaded ({len(data)} bytes) and kept for the person")


def _read(path: Path) -> bytes | None:
    """The file, `None` if it is too large. The browser could have put a link there: it isn't followed."""
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
        data = file.read(MAX_DOWNLOAD + 1)
    return data if len(data) <= MAX_DOWNLOAD else None


def _media_type(event: Json) -> str:
    for header in event.get("responseHeaders") or ():
        if header["name"].lower() == "content-type":
            return str(header["value"]).partition(";")[0].strip().lower()
    return ""


def _facts(response: Response) -> Json:
    headers = response.headers
    size = headers.get("content-length", "")
    media_type = clean_line(headers.get("content-type", ""), 100).partition(";")[0].strip()
    facts: Json = {"url": clean_line(response.url, 500), "status": response.status, "media_type": media_type}
    return facts | ({"bytes": int(size)} if size.isdigit() and len(size) < 16 else {})
