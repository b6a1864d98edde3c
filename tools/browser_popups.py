"""Pop-ups load nothing: their documents are stopped before they are asked for, until the pop-up is closed.

A pop-up has the rights of the page that it comes from, towards private hosts too, and is closed some milliseconds too late.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING

from thinkloop.traces.events import Json

if TYPE_CHECKING:
    from playwright.async_api import CDPSession


class Popups:
    """Listens to a whole browser. Documents of pages that aren't `ours` fail; a page counts as ours by its main frame."""

    def __init__(self, cdp: CDPSession) -> None:
        self.ours: set[str] = set()
        """Main frames by the protocol's ids."""
        self._cdp = cdp
        self._targets: set[str] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def listen(self) -> None:
        """Start; must be done before any page is open. Raises playwright's `Error`."""
        self._cdp.on("Target.targetCreated", self._created)
        self._cdp.on("Target.targetDestroyed", lambda event: self._destroyed(str(event["targetId"])))
        self._cdp.on("Fetch.requestPaused", self._paused)
        await self._cdp.send("Target.setDiscoverTargets", {"discover": True})
        pattern = {"resourceType": "Document", "requestStage": "Request"}
        await self._cdp.send("Fetch.enable", {"patterns": [pattern]})

    def _created(self, event: Json) -> None:
        target = event["targetInfo"]
        if target["type"] == "page":  # its id is that of its main frame
            self._targets.add(str(target["targetId"]))

    def _destroyed(self, target: str) -> None:
        self._targets.discard(target)
        self.ours.discard(target)

    def _paused(self, event: Json) -> None:
        frame = event.get("frameId")
        stray = frame in self._targets and frame not in self.ours
        task = asyncio.create_task(self._answer({"requestId": event["requestId"]}, stray))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _answer(self, request: Json, stray: bool) -> None:
        from playwright.async_api import Error

        with suppress(Error):  # the page is gone
            if stray:
                await self._cdp.send("Fetch.failRequest", {**request, "errorReason": "BlockedByClient"})
            else:
                await self._cdp.send("Fetch.continueRequest", request)
