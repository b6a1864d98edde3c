"""Playwright's driver, with bounds on what it sends: its messages carry what pages say, of any size and in any number.

Playwright has no option for that, so it is done to one transport of its private API. Where that API is not as expected, the
driver runs without these bounds, and the watchdog on its memory alone holds.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from playwright.async_api import Playwright

MAX_MESSAGE = 24 << 20  # bytes; the largest that is wanted is the HTML of a page, 5,000,000 characters
MAX_BURST, PER_SECOND = (
    96 << 20,
    8 << 20,
)  # bytes; 30 MB of a PDF take 40, and parsing 1 MB holds the event loop for 5 ms

Message = dict[str, Any]


class Driver:
    """The running driver. When it ends or sends too much, `lost` says so and `on_lost` is called with it, once."""

    def __init__(self) -> None:
        self.lost = ""
        self.on_lost: Callable[[str], None] = lambda reason: None
        self._playwright: Playwright | None = None
        self._stop: Callable[[], Awaitable[object]] | None = None

    @property
    def playwright(self) -> Playwright:
        assert self._playwright
        return self._playwright

    async def start(self) -> None:
        """Takes 0.3 s. Cut in the middle, it leaves no handle to end the driver with. Raises what Playwright raises."""
        from playwright.async_api import async_playwright

        client = self._bounded_client()
        if client is None:
            self._playwright = await async_playwright().start()
            self._stop = self._playwright.stop
        else:
            from playwright.async_api import Playwright

            self._stop = client.stop
            self._playwright = Playwright(await client._playwright)

    async def stop(self) -> None:
        """End it, when it lets itself be ended."""
        if self._stop:
            await self._stop()

    def _bounded_client(self) -> Any:
        """What `async_playwright` makes, before it has started anything; `None` where it is made in another way."""
        try:
            from playwright._impl.out_of_process import PlaywrightClient

            client: Any = PlaywrightClient()
        except (ImportError, TypeError):
            return None
        with suppress(AttributeError):
            self._bound(client._transport)
        return client

    def _bound(self, transport: Any) -> None:
        connect, deliver = transport.connect, transport.on_message

        async def connect_bounded() -> None:
            await connect()
            process = transport._proc
            process.stdout = Messages(process.stdout, self._lose)

        transport.connect, transport.on_message = connect_bounded, lambda message: _without_bulk(message, deliver)
        transport.on_error_future.add_done_callback(lambda ended: ended.cancelled() or ended.exception())

    def _lose(self, reason: str) -> None:
        if not self.lost:
            self.lost = reason
            self.on_lost(reason)


class Messages:
    """Stands in for the stream of the driver's messages, each its length in four bytes and a body: it ends before one of
    more than `MAX_MESSAGE` bytes, or more of them than `MAX_BURST` bytes and `PER_SECOND`."""

    def __init__(self, stream: asyncio.StreamReader, on_end: Callable[[str], None]) -> None:
        self._stream, self._on_end = stream, on_end
        self._left = 0
        """Bytes of the message that is being read."""
        self._credit, self._at = float(MAX_BURST), time.monotonic()

    async def readexactly(self, size: int) -> bytes:
        try:
            data = await self._stream.readexactly(size)
        except asyncio.IncompleteReadError:
            self._on_end("the browser's driver ended unexpectedly")
            raise
        if self._left:
            self._left -= size
        else:
            self._left = int.from_bytes(data, "little")
            self._check(self._left)
        return data

    async def read(self, size: int = -1) -> bytes:
        """To the end, which the transport waits for: what comes by then is dropped."""
        while await self._stream.read(1 << 16):
            pass
        return b""

    def _check(self, size: int) -> None:
        now = time.monotonic()
        self._credit = min(MAX_BURST, self._credit + (now - self._at) * PER_SECOND) - size
        self._at = now
        if size > MAX_MESSAGE:
            most = f"of {size >> 20} MB; at most {MAX_MESSAGE >> 20} MB are taken"
        elif self._credit < 0:
            most = f"of more than {MAX_BURST >> 20} MB within seconds"
        else:
            return
        self._on_end(f"the page gave off errors, requests or texts {most}")
        raise asyncio.IncompleteReadError(b"", size)


def _without_bulk(message: Message, deliver: Callable[[Message], None]) -> None:
    """Errors of pages, which nobody listens to, and bodies of requests, which would stay as long as their page."""
    if message.get("method") == "pageError":
        return
    params = message.get("params")
    if message.get("method") == "__create__" and isinstance(params, dict) and params.get("type") == "Request":
        params["initializer"].pop("postData", None)
    deliver(message)
