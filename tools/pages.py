"""Web pages as documents with lines: what `open` reads URLs with, and the kind that needs no browser."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AsyncExitStack
from typing import Any, Protocol, Self, runtime_checkable

from thinkloop.tools.call_record import remember


@runtime_checkable
class Pages(Protocol):
    """Reads web pages; entered by its user when it is an async context manager."""

    async def document(self, url: str) -> tuple[str, str, tuple[str, ...]]:
        """The final URL, title and lines of the page at `url` (http or https). Raises `ToolError`."""
        ...


class WebPages:
    """Pages fetched and turned into text without a browser: no scripts run. An async context manager.

    Public addresses only, and those of `allow_hosts` (`host` or `host:port`).
    """

    def __init__(self, *, allow_hosts: Sequence[str] = ()) -> None:
        from thinkloop.tools.addresses import Policy
        from thinkloop.tools.extract import Extractor
        from thinkloop.tools.fetch import Fetcher

        self._fetcher, self._extractor = Fetcher(Policy.of(allow_hosts)), Extractor()
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(self._fetcher)
            await stack.enter_async_context(self._extractor)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *exc: Any) -> None:
        await self._stack.aclose()

    async def document(self, url: str) -> tuple[str, str, tuple[str, ...]]:
        """The final URL, title and lines; a last line in brackets says what was cut. Raises `ToolError`."""
        fetched = await self._fetcher.get(url)
        remember(response=self._fetcher.record(fetched))
        page = await self._extractor.extract(
            fetched.body, fetched.media_type, url=fetched.final_url, charset=fetched.charset
        )
        notes = [page.note] if page.note else []
        if fetched.truncated:
            notes.append(f"only the first {len(fetched.body):,} bytes were read")
        return fetched.final_url, page.title, (*page.lines, *(f"({note})" for note in notes))
