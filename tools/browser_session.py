"""The browser of a run: started when first needed, started again when it died, one page at a time; and who was refused."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import anyio
from thinkloop.tools.addresses import AddressError, Policy, parse_url
from thinkloop.tools.browser_errors import net_error, places
from thinkloop.tools.browser_page import ACT_SECONDS, Tab
from thinkloop.tools.browser_process import Chromium, Settings, check_extra
from thinkloop.tools.browser_sandbox import PRIVATE_PROXY, PROXY, BrowserLimits, check_machine, find_chromium
from thinkloop.tools.extract import Extractor
from thinkloop.tools.extract_text import clean_line
from thinkloop.tools.proxy import Exchange, Proxy
from thinkloop.tools.tool import ToolError

if TYPE_CHECKING:
    from playwright.async_api import BrowserContext, Page, ProxySettings

_KEPT_REFUSALS = 500
_REFUSING = frozenset({403, 502, 504})  # what the proxy answers in a server's place
_FROM_OUTSIDE = "pages of other sites may not reach this host; browser_open may"
_TO_OUTSIDE = "pages of private hosts lead nowhere else; open it with browser_open"


class Session:
    """Proxies, browser, pages. An async context manager; entering raises `BrowserError` where something is missing.

    Pages of the private hosts that a person has allowed have a browser context and a proxy of their own, and show no other
    documents. The proxy of all other pages reaches public hosts alone.
    """

    def __init__(self, policy: Policy, executable: str | Path | None, limits: BrowserLimits, downloads: bool) -> None:
        self._policy, self._executable, self._limits, self._downloads = policy, executable, limits, downloads
        self._stack, self._extractor = AsyncExitStack(), Extractor()
        self._settings: Settings | None = None
        self._chromium: Chromium | None = None
        self._contexts: dict[bool, BrowserContext] = {}
        """By whether they are for private hosts."""
        self._starting, self._opening = anyio.Lock(), anyio.Lock()
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
            on_exchange = partial(self._on_exchange, policy=Policy())
            await stack.enter_async_context(Proxy(unix_socket=folder / "proxy.sock", on_exchange=on_exchange))
            if self._policy.allow_hosts:
                on_exchange = partial(self._on_exchange, policy=self._policy)
                private = Proxy(self._policy, unix_socket=folder / "private.sock", on_exchange=on_exchange)
                await stack.enter_async_context(private)
            await stack.enter_async_context(self._extractor)
            stack.push_async_callback(self.stop)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *exc: Any) -> None:
        await self._stack.aclose()
        self._settings = None

    async def context(self, private: bool = False) -> BrowserContext:
        """Where pages live, in a browser that runs. Raises `BrowserError`, and `ToolError` outside `async with`."""
        if self._settings is None:
            raise ToolError("The browser is not running: use it inside `async with Browser(...)`.")
        async with self._starting:
            if self._chromium and self._chromium.lost:
                await self.stop()
            if self._chromium is None:
                self._chromium = await Chromium.start(self._settings)
                self._contexts = {}
            if private not in self._contexts:
                self._contexts[private] = await self._new_context(self._chromium, PRIVATE_PROXY if private else PROXY)
            return self._contexts[private]

    def is_private(self, url: str) -> bool:
        """Whether a person has allowed the private host of `url`."""
        try:
            place = parse_url(url)
        except AddressError:
            return False
        return self._policy.allows(place.host, place.port)

    async def open_tab(self, url: str) -> Tab:
        """A blank page for `url`. Raises as `context` does."""
        private = self.is_private(url)
        context = await self.context(private)
        async with self._opening:  # a page that isn't among ours yet is no stray
            page = await context.new_page()
            self._pages.add(page)
        page.on("close", lambda gone: self._pages.discard(gone))
        folder = self._settings.folder / "downloads" if self._settings and self._downloads else None
        try:
            tab = await Tab.open(page, self._extractor, downloads=folder, stays=self.is_private if private else None)
        except BaseException:
            self._pages.discard(page)
            raise
        if self._chromium:
            self._chromium.popups.ours.add(tab.events.main_frame)
        return tab

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

        async with self._opening:
            pages = [page for context in self._contexts.values() for page in context.pages]
            strays = [page for page in pages if page not in self._pages]
        for page in strays:
            with anyio.move_on_after(1.0), suppress(Error):
                await page.close()

    @property
    def lost(self) -> str:
        """Why the browser is gone; empty while it isn't."""
        return self._chromium.lost if self._chromium else ""

    async def stop(self) -> None:
        """End the browser; the next page starts another. Isn't cancelled."""
        chromium, self._chromium, self._contexts = self._chromium, None, {}
        if chromium:
            with anyio.CancelScope(shield=True):
                await chromium.stop()

    def sent_wrong(self, tab: Tab, url: str) -> bool:
        """Whether a private page was asked for by the other proxy: Chromium's network process, when it has died, comes back
        without the contexts' own. The browser counts as lost then."""
        wrong = tab.private and tab.status in (0, 403) and self.refused(url) == _FROM_OUTSIDE
        if wrong and self._chromium:
            self._chromium.lost = self._chromium.lost or "its network process had ended"
        return wrong

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
        if tab.private and url and not self.is_private(url):
            return f"{clean_line(url, 300)} was not opened: {self.refused(url) or _TO_OUTSIDE}"
        if tab.status in _REFUSING and (reason := self.refused(url)):
            return f"{clean_line(url, 300)} was not opened: {reason}"
        return ""

    async def _new_context(self, chromium: Chromium, proxy: ProxySettings) -> BrowserContext:
        context = await chromium.browser.new_context(
            proxy=proxy,
            service_workers="block",
            accept_downloads=self._downloads,
            viewport={"width": 1280, "height": 800},
            locale="en-US",
            timezone_id="UTC",
            reduced_motion="reduce",
        )
        context.set_default_timeout(ACT_SECONDS * 1000)
        return context

    def _on_exchange(self, exchange: Exchange, policy: Policy) -> None:
        place = exchange.url_or_host
        self._refused.pop(place, None)
        if exchange.refused and exchange.status in _REFUSING:
            self.refusals += 1
            url = place if "://" in place else f"https://{place}/"
            known = self.is_private(url) and policy != self._policy
            self._refused[place] = (self.refusals, _FROM_OUTSIDE if known else clean_line(exchange.refused, 300))
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
