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

MAX_NOTICES, MAX_RESPONSES = 8, 100
MAX_URL = 300  # characters of an address in a notice
MAX_PDF = 30 << 20  # bytes
MAX_DOWNLOAD = 30 << 20
MAX_FILES, MAX_FILES_BYTES = 8, 60 << 20  # kept for one result
_PIECE = 1 << 20
_AWAITED = frozenset({"document", "script", "stylesheet", "fetch", "xhr"})
_HOLDS_PLACE, _EMPTY = b"<!doctype html><title>PDF</title><p>PDF", b"<!doctype html><title></title>"


@dataclass(frozen=True, slots=True)
class Document:
    """A body to take text from: a PDF, which Chromium is not given, or a page's HTML."""

    url: str
    media_type: str
    body: bytes
    whole: bool = True


class Events:
    """Listens to one page. What it learns waits here until it is taken."""

    def __init__(
        self, page: Page, cdp: CDPSession, downloads: Path | None, stays: Callable[[str], bool] | None
    ) -> None:
        """`downloads` is where files go, if they may be kept; `stays` says which documents may be shown, if not all."""
        self._page, self._cdp, self._downloads, self._stays = page, cdp, downloads, stays
        self._keeping = anyio.Lock()
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
        self.main_frame = ""
        """By the protocol's id."""
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
        self.main_frame = str(tree["frameTree"]["frame"]["id"])
        pattern = {"resourceType": "Document", "requestStage": "Response"}
        await cdp.send("Fetch.enable", {"patterns": [pattern]})

    @property
    def picky(self) -> bool:
        """Whether only some documents are shown."""
        return self._stays is not None

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
        """A document's answer has begun: let it through, or show nothing of it, or take a PDF out of Chromium's hands."""
        request = {"requestId": event["requestId"]}
        if self._stays and not self._stays(str(event["request"]["url"])):
            await self._fulfil(request, 403, _EMPTY)
            return
        main = event.get("frameId") == self.main_frame
        if not main or _media_type(event) != "application/pdf" or event.get("responseStatusCode") != 200:
            await self._cdp.send("Fetch.continueRequest", request)
            return
        body = await self._body(request)
        self._pdf = Document(event["request"]["url"], "application/pdf", body[:MAX_PDF], len(body) <= MAX_PDF)
        await self._fulfil(request, 200, _HOLDS_PLACE)

    async def _fulfil(self, request: Json, status: int, body: bytes) -> None:
        headers = [{"name": "Content-Type", "value": "text/html"}]
        answer = {"responseCode": status, "responseHeaders": headers, "body": base64.b64encode(body).decode()}
        await self._cdp.send("Fetch.fulfillRequest", request | answer)

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
        self.notice(f"a pop-up to {clean_line(event['url'], MAX_URL)} was not opened; open it with browser_open")

    async def _popup(self, page: Page) -> None:
        await page.close()

    async def _download(self, download: Download) -> None:
        name, url = clean_line(download.suggested_filename, 100), clean_line(download.url, MAX_URL)
        self.downloads += 1
        if self._downloads is None:
            self.notice(f"the download of {name!r} from {url} was refused: downloads are not allowed here")
            return
        if self.downloads > MAX_FILES:
            await download.cancel()
            self.notice(f"more files were not downloaded: at most {MAX_FILES} are kept at a time")
            return
        self.downloading += 1
        try:
            async with self._keeping:
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
        if len(data) + sum(len(file.data) for file in self.files) > MAX_FILES_BYTES:
            self.notice(f"{name!r} was not kept: the files have more than {MAX_FILES_BYTES >> 20} MB together")
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
