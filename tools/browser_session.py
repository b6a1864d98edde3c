"""The browser of a run: started when first needed, started again when it died, one page at a time; and who was refused."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import anyio
from thinkloop.tools.addresses import Policy
from thinkloop.tools.browser_errors import net_error, places
from thinkloop.tools.browser_page import ACT_SECONDS, Tab
from thinkloop.tools.browser_process import Chromium, Settings, check_extra
from thinkloop.tools.browser_sandbox import BrowserLimits, check_machine, find_chromium
from thinkloop.tools.extract import Extractor
from thinkloop.tools.extract_text import clean_line
from thinkloop.tools.proxy import Exchange, Proxy
from thinkloop.tools.tool import ToolError

if TYPE_CHECKING:
    from playwright.async_api import BrowserContext, Page

_KEPT_REFUSALS = 500
_REFUSING = frozenset({403, 502, 504})  # what the proxy answers in a server's place


class Session:
    """Proxy, browser, pages. An async context manager; entering raises `BrowserError` where something is missing."""

    def __init__(self, policy: Policy, executable: str | Path | None, limits: BrowserLimits, downloads: bool) -> None:
        self._policy, self._executable, self._limits, self._downloads = policy, executable, limits, downloads
        self._stack, self._extractor = AsyncExitStack(), Extractor()
        self._settings: Settings | None = None
        self._chromium: Chromium | None = None
        self._context: BrowserContext | None = None
        self._starting = anyio.Lock()
        self._pages: set[Page] = set()
        self._refused: dict[str, tuple[int, str]] = {}
        self.refusals = 0
        """How many requests the proxy has refused so far."""

    async def __aenter__(self) -> Self:
        check_extra()
        bwrap, chromium = check_machine(), find_chromium(self._executable)
        async with AsyncExitStack() as stack:
            folder = stack.enter_context(_folder())
            self._settings = Settings(bwrap, chromium, folder, self._limits, self._downloads)
            proxy = Proxy(self._policy, unix_socket=folder / "proxy.sock", on_exchange=self._on_exchange)
            await stack.enter_async_context(proxy)
            await stack.enter_async_context(self._extractor)
            stack.push_async_callback(self.stop)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *exc: Any) -> None:
        await self._stack.aclose()
        self._settings = None

    async def context(self) -> BrowserContext:
        """Where pages live, in a browser that runs. Raises `BrowserError`, and `ToolError` outside `async with`."""
        if self._settings is None:
            raise ToolError("The browser is not running: use it inside `async with Browser(...)`.")
        async with self._starting:
            if self._chromium and self._chromium.lost:
                await self.stop()
            if self._chromium is None:
                self._chromium = await Chromium.start(self._settings)
                self._context = None
            if self._context is None:
                self._context = await self._new_context(self._chromium)
            return self._context

    async def open_tab(self) -> Tab:
        """A blank page. Raises as `context` does."""
        context = await self.context()
        page = await context.new_page()
        self._pages.add(page)
        page.on("close", lambda gone: self._pages.discard(gone))
        folder = self._settings.folder / "downloads" if self._settings and self._downloads else None
        try:
            return await Tab.open(page, self._extractor, folder)
        except BaseException:
            self._pages.discard(page)
            raise

    async def close_tab(self, tab: Tab) -> None:
        """Close a page; a browser that doesn't let go of it is ended."""
        with anyio.CancelScope(shield=True):
            try:
                await tab.close()
            except TimeoutError:
                await self.stop()

    async def close_strays(self) -> None:
        """Close pop-ups of pop-ups, which no listener has seen."""
        from playwright.async_api import Error

        for page in self._context.pages if self._context else ():
            if page not in self._pages:
                with anyio.move_on_after(1.0), suppress(Error):
                    await page.close()

    @property
    def lost(self) -> str:
        """Why the browser is gone; empty while it isn't."""
        return self._chromium.lost if self._chromium else ""

    async def stop(self) -> None:
        """End the browser; the next page starts another. Isn't cancelled."""
        chromium, self._chromium, self._context = self._chromium, None, None
        if chromium:
            with anyio.CancelScope(shield=True):
                await chromium.stop()

    def refused(self, url: str) -> str:
        """Why the proxy did not fetch `url` the last time it was asked to; empty if it did."""
        return next((self._refused[place][1] for place in places(url) if place in self._refused), "")

    def refused_since(self, count: int) -> list[tuple[str, str]]:
        """What was refused after the first `count` refusals, as (url or host:port, reason)."""
        return [(place, reason) for place, (number, reason) in self._refused.items() if number > count]

    def problem(self, tab: Tab) -> str:
        """Why what the tab holds is not a page to show; empty if it is."""
        url = tab.events.response.url if tab.events.response else ""
        if tab.url.startswith("chrome-error:"):
            url, message = tab.events.failed
            reason = self.refused(url) or net_error(message) or "it can't be shown"
            return f"{clean_line(url, 300)} was not opened: {reason}"
        if not tab.url.startswith(("http://", "https://")):
            return f"the page went to {clean_line(tab.url, 100)}, which is not shown"
        if tab.status in _REFUSING and (reason := self.refused(url)):
            return f"{clean_line(url, 300)} was not opened: {reason}"
        return ""

    async def _new_context(self, chromium: Chromium) -> BrowserContext:
        context = await chromium.browser.new_context(
            service_workers="block",
            accept_downloads=self._downloads,
            viewport={"width": 1280, "height": 800},
            locale="en-US",
            timezone_id="UTC",
            reduced_motion="reduce",
        )
        context.set_default_timeout(ACT_SECONDS * 1000)
        return context

    def _on_exchange(self, exchange: Exchange) -> None:
        place = exchange.url_or_host
        self._refused.pop(place, None)
        if exchange.refused and exchange.status in _REFUSING:
            self.refusals += 1
            self._refused[place] = (self.refusals, clean_line(exchange.refused, 300))
        if len(self._refused) > _KEPT_REFUSALS:
            del self._refused[next(iter(self._refused))]


@contextmanager
def _folder() -> Iterator[Path]:
    """For the proxy's socket, the script that starts the browser, and downloads."""
    folder = Path(tempfile.mkdtemp(prefix="thinkloop-browser-"))
    try:
        (folder / "downloads").mkdir()
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
