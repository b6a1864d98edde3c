"""The browser tools: one page in a locked-in Chromium, read as text with refs and acted on by them.

    async with Browser(allow_hosts=["localhost:8000"]) as browser:
        open_page = browser.tools()[0]
        print((await open_page.call({"url": "http://localhost:8000/"})).content)

The network is reached through our own proxy alone (`tools/proxy.py`), whatever a page does; see `tools/browser_sandbox.py`.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import anyio
from thinkloop.tools import browser_verbs as verbs
from thinkloop.tools.addresses import Policy, parse_url
from thinkloop.tools.browser_errors import first_line, net_error, why_not_done
from thinkloop.tools.browser_page import ACT_SECONDS, Form, StaleRefError, Tab
from thinkloop.tools.browser_sandbox import BrowserError, BrowserLimits
from thinkloop.tools.browser_scripts import options_of
from thinkloop.tools.browser_session import Session
from thinkloop.tools.browser_text import Shown, View, find, first_change, heading, show, unchanged
from thinkloop.tools.browser_verbs import BrowserTool, Verb
from thinkloop.tools.extract_text import clean_line
from thinkloop.tools.tool import Attachment, Output, Tool, ToolError
from thinkloop.traces.events import Json, ThinkloopError

if TYPE_CHECKING:
    from playwright.async_api import Error, Locator

_BLANK = "No page is open; open one with browser_open."
_RECORDED = 50  # responses of one call
_GOING = 0.8  # of the seconds of a call; the rest is for looking at what came
_GONE = re.compile(r"has been closed|crashed|Connection closed")
_GROWS = 6  # times that an endless page is scrolled for one call


class PageLostError(ToolError):
    """The page or the browser died in the middle of a call; `arrived` says whether the page that was asked for had come."""

    def __init__(self, why: str, *, arrived: bool = False) -> None:
        super().__init__(f"The page was lost: {why}. The next browser_open starts afresh.")
        self.arrived = arrived


class Browser:
    """A toolset of `browser_open`, `_find`, `_read`, `_click`, `_type`, `_select`, `_back` and `_screenshot`.

    `allow_hosts` are private hosts that may be reached (`host` or `host:port`), by `browser_open` and from each other's
    pages; pages of other sites can't reach them. `executable` is a Chromium to use instead of the one on the PATH,
    `budget` the most tokens of a result (at four characters each), `downloads` whether files are kept (8 of up to 30 MB
    each, 60 MB together; refused otherwise), `timeout` the seconds of one call, `memory_mb` the bound of all the browser's
    processes together. With `warm` the browser starts in the background when the toolset is entered, otherwise with the
    first page. Entering raises `BrowserError` where something is missing.
    """

    def __init__(
        self,
        *,
        allow_hosts: Sequence[str] = (),
        executable: str | Path | None = None,
        budget: int = 2000,
        downloads: bool = False,
        timeout: float = 30.0,
        memory_mb: int = 3072,
        warm: bool = False,
    ) -> None:
        _check("budget", budget, least=200)
        _check("timeout", timeout, least=1)
        _check("memory_mb", memory_mb, least=512)
        self.budget, self.timeout, self.warm = budget, timeout, warm
        self._session = Session(Policy.of(allow_hosts), executable, BrowserLimits(memory_mb=memory_mb), downloads)
        self._turn = anyio.Lock()
        self._warming: asyncio.Task[None] | None = None
        self._tab: Tab | None = None
        self._view: View | None = None
        self._blank = _BLANK
        self._refusals = 0
        self._users, self._entering = 0, anyio.Lock()

    def tools(self) -> Sequence[Tool]:
        """One tool a verb."""
        return [BrowserTool(self, verb, act) for verb, act in _ACTS]

    async def __aenter__(self) -> Self:
        """May be entered again while it is open, by a `Search` that reads with it: the last to leave closes it. Raises
        `BrowserError`, which says what to install or allow, where the browser can't work."""
        async with self._entering:
            if self._users == 0:
                await self._session.__aenter__()
                if self.warm:
                    self._warming = asyncio.create_task(self._warm())
            self._users += 1
        return self

    async def __aexit__(self, *exc: Any) -> None:
        self._users -= 1
        if self._users:
            return
        with anyio.CancelScope(shield=True):
            if self._warming:
                self._warming.cancel()
                await asyncio.wait([self._warming])
            self._forget("The browser was closed.")
            await self._session.__aexit__(*exc)

    async def document(self, url: str) -> tuple[str, str, tuple[str, ...]]:
        """The final URL, title and lines of the page at `url`, read beside the open one: its article, or else all its
        text; a last line in brackets says what was cut. Raises `ToolError`."""
        parse_url(url)
        tab = await self._new_tab(url)
        try:
            async with self._explained(tab):
                await tab.goto(url, self.timeout * _GOING)
                self._check_shown(tab)
                if tab.status >= 400:
                    raise ToolError(f"{url} answered with status {tab.status}; try another result or address")
                page = await tab.article()
                return tab.url, page.title, (*page.lines, *([f"({page.note})"] if page.note else []))
        finally:
            await self._session.close_tab(tab)

    async def call(self, act: Callable[[Browser, Json], Awaitable[Output]], arguments: Json) -> Output:
        """One call of a tool; calls take turns. Raises `ToolError`."""
        async with self._turn:
            self._refusals = self._session.refusals
            if self._tab and (why := await self._lost(self._tab)):
                await self._drop(f"{_BLANK} The last one was lost: {why}.")
            try:
                return await act(self, arguments)
            finally:
                await self._session.close_strays()

    # Verbs

    async def _open(self, arguments: Json) -> Output:
        url, form = str(arguments["url"]).strip(), arguments.get("form", "page")
        parse_url(url)
        try:
            return await self._go(url, form)
        except PageLostError as error:
            if error.arrived:  # so it is this page's doing, and would be again
                raise
            return await self._go(url, form)

    async def _go(self, url: str, form: Form) -> Output:
        if self._tab and self._tab.private != self._session.is_private(url):
            await self._drop(_BLANK)
        tab = self._tab = self._tab or await self._new_tab(url)
        self._view, self._blank = None, _BLANK
        async with self._current(tab):
            try:
                await tab.goto(url, self.timeout * _GOING)
            except _errors() as error:
                if "Download is starting" in error.message:
                    return await self._downloaded(tab)
                if self._session.sent_wrong(tab, url) or await self._lost(tab, error):
                    raise
                await self._drop(_BLANK)  # Chromium puts an error page there, at a time of its own
                raise ToolError(f"{url} was not opened: {self._reason(url, error.message)}") from error
            self._check_shown(tab)
            return await self._shown(tab, form)

    async def _find(self, arguments: Json) -> Output:
        view = self._open_view()
        return _output(view, find(view, str(arguments["text"]), self.budget))

    async def _read(self, arguments: Json) -> Output:
        view, cursor = self._open_view(), int(arguments["cursor"])
        if cursor > len(view.lines) and view.refs and self._tab:
            async with self._current(self._tab):
                view = self._view = await _grown(self._tab, view, cursor)
        if cursor > len(view.lines):
            raise ToolError(f"{heading(view)} has {len(view.lines)} lines; there is no line {cursor}.")
        return _output(view, show(view, cursor, self.budget))

    async def _click(self, arguments: Json) -> Output:
        return await self._act(arguments, lambda element: element.click(timeout=ACT_SECONDS * 1000))

    async def _type(self, arguments: Json) -> Output:
        async def fill(element: Locator) -> None:
            await element.fill(str(arguments["text"]), timeout=ACT_SECONDS * 1000)
            if arguments.get("submit"):
                await element.press("Enter", timeout=ACT_SECONDS * 1000, no_wait_after=True)

        return await self._act(arguments, fill)

    async def _select(self, arguments: Json) -> Output:
        async def choose(element: Locator) -> None:
            labels, values = await options_of(element)
            wanted = clean_line(str(arguments["value"]), 500)
            if labels and wanted not in labels and wanted not in values:
                names = ", ".join(repr(clean_line(label, 60)) for label in labels[:30])
                raise ToolError(f"There is no option {wanted!r}; there are {names}.")
            await element.select_option(wanted, timeout=ACT_SECONDS * 1000)

        return await self._act(arguments, choose)

    async def _back(self, arguments: Json) -> Output:
        self._open_view()
        tab = self._open_tab()
        async with self._current(tab):
            if not await tab.back(self.timeout * _GOING):
                raise ToolError("There is no page before this one.")
            self._check_shown(tab)
            return await self._shown(tab)

    async def _screenshot(self, arguments: Json) -> Output:
        tab = self._open_tab()
        async with self._current(tab):
            picture = Attachment("screenshot.png", "image/png", await tab.screenshot())
        text = f"{picture.name}: 1280 x 800 pixels, {len(picture.data)} bytes, of {clean_line(tab.url, 300)}"
        return Output(f"{text}. The person can see it.", record={"url": tab.url[:500]}, files=(picture,))

    # What verbs share

    async def _act(self, arguments: Json, action: Callable[[Locator], Awaitable[Any]]) -> Output:
        before, tab, ref = self._open_view(), self._open_tab(), str(arguments["ref"])
        async with self._current(tab):
            try:
                await tab.act(ref, action, self.timeout)
            except StaleRefError as error:
                tab.events.notice(f"ref {error} is gone: the page changed; here is the page now")
                return await self._shown(tab, ok=False)
            except _errors() as error:
                if await self._lost(tab, error):
                    raise
                raise ToolError(f"{ref} was left as it is: {why_not_done(error.message)}.") from error
            if problem := self._session.problem(tab):
                tab.events.notice(problem)
                await tab.back(self.timeout * _GOING)
                return await self._shown(tab, ok=False)
            return await self._shown(tab, since=before)

    async def _shown(self, tab: Tab, form: Form = "page", since: View | None = None, ok: bool = True) -> Output:
        """The page as it is now, from where it differs from `since` on the same page."""
        view = self._view = await tab.look(form)
        problem = self._session.problem(tab)
        self._tell(tab, problem)
        source = await tab.source()
        notices, responses, files = tab.events.take()
        change = first_change(since, view) if since and since.url == view.url else 1
        shown = show(view, max(1, change - 1), self.budget, notices) if change else unchanged(view, notices)
        output = _output(view, shown, ok=ok and tab.status < 400 and not problem)
        record = output.record | {"responses": responses[:_RECORDED]}
        if source:
            record["source"] = source.facts()
            files.append(source.attachment())
        return Output(output.content, record=record, ok=output.ok, files=tuple(files))

    def _tell(self, tab: Tab, problem: str) -> None:
        """What the model should know besides the text."""
        if problem:
            tab.events.notice(problem)
        elif tab.status >= 400:
            tab.events.notice(f"the server answered with status {tab.status}")
        if refused := self._session.refused_since(self._refusals):
            place, reason = refused[0]
            tab.events.notice(f"{len(refused)} requests were refused, such as {clean_line(place, 200)}: {reason}")

    async def _downloaded(self, tab: Tab) -> Output:
        """The result where the address was a file instead of a page."""
        await tab.events.downloads_over()
        notices, responses, files = tab.events.take()
        return Output("\n".join(notices), record={"responses": responses}, ok=bool(files), files=tuple(files))

    def _open_view(self) -> View:
        if self._view is None:
            raise ToolError(self._blank)
        return self._view

    def _open_tab(self) -> Tab:
        if self._tab is None or self._view is None:
            raise ToolError(self._blank)
        return self._tab

    def _check_shown(self, tab: Tab) -> None:
        if self._session.sent_wrong(tab, tab.url):
            raise PageLostError(self._session.lost)
        if problem := self._session.problem(tab):
            self._view, self._blank = None, f"{_BLANK} The last one: {problem}."
            raise ToolError(problem)

    def _reason(self, url: str, message: str) -> str:
        if "Timeout" in message:
            return f"nothing came within {self.timeout * _GOING:g} s"
        return self._session.refused(url) or net_error(message) or first_line(message)

    # Pages and their ends

    async def _new_tab(self, url: str) -> Tab:
        try:
            return await self._session.open_tab(url)
        except (BrowserError, _errors()) as error:
            raise ToolError(f"The browser did not start: {error}") from error

    @asynccontextmanager
    async def _current(self, tab: Tab) -> AsyncIterator[None]:
        """What is done to the open page: a time-out, a crash or a cancelled call leaves no page behind."""
        try:
            async with self._explained(tab):
                yield
        except ToolError:
            if tab is self._tab and (tab.lost or self._session.lost):
                await self._drop(f"{_BLANK} The last one was lost.")
            raise
        except BaseException:
            await self._drop(f"{_BLANK} The last one was closed: the call was cancelled.")
            raise

    @asynccontextmanager
    async def _explained(self, tab: Tab) -> AsyncIterator[None]:
        """Time is bounded, and the browser's errors become the model's."""
        try:
            with anyio.fail_after(self.timeout):
                yield
        except TimeoutError as error:
            tab.events.crashed = f"it did not answer within {self.timeout:g} s"
            raise ToolError(f"The page was closed: {tab.lost}. Open it again, or another.") from error
        except _errors() as error:
            if why := await self._lost(tab, error):
                raise PageLostError(why, arrived=tab.events.response is not None) from error
            raise ToolError(f"The browser could not do that: {first_line(error.message)}") from error

    async def _lost(self, tab: Tab, error: Error | None = None) -> str:
        """Why page or browser are gone, if they are; that they are may be known a little before why."""
        if tab.lost or (error and _GONE.search(error.message)):
            with anyio.move_on_after(1.0):
                while not self._session.lost and not tab.events.crashed:
                    await anyio.sleep(0.02)
        return self._session.lost or tab.lost

    async def _drop(self, why: str) -> None:
        tab = self._tab
        self._forget(why)
        if tab:
            await self._session.close_tab(tab)

    def _forget(self, why: str) -> None:
        self._tab, self._view, self._blank = None, None, why

    async def _warm(self) -> None:
        with suppress(BrowserError, _errors()):  # the first page will meet it again, and say so
            await self._session.context()


_ACTS: tuple[tuple[Verb, Callable[[Browser, Json], Awaitable[Output]]], ...] = (
    (verbs.OPEN, Browser._open),
    (verbs.FIND, Browser._find),
    (verbs.READ, Browser._read),
    (verbs.CLICK, Browser._click),
    (verbs.TYPE, Browser._type),
    (verbs.SELECT, Browser._select),
    (verbs.BACK, Browser._back),
    (verbs.SCREENSHOT, Browser._screenshot),
)


def _errors() -> type[Error]:
    """What playwright raises; imported late, because it takes long."""
    from playwright.async_api import Error

    return Error


async def _grown(tab: Tab, view: View, cursor: int) -> View:
    """The page scrolled to its end until it has line `cursor`, or grows no more."""
    for _ in range(_GROWS):
        await tab.scroll_to_end()
        before, view = len(view.lines), await tab.look()
        if cursor <= len(view.lines) or len(view.lines) == before:
            break
    return view


def _output(view: View, shown: Shown, ok: bool = True) -> Output:
    """Only lines whose numbers mean the same whenever this URL is read are recorded as lines of a document."""
    lines = shown.ranges(view.citable)
    record: Json = {"document": view.url, "lines": lines} if lines else {"url": view.url}
    return Output(shown.text, record=record, ok=ok)


def _check(name: str, value: float, least: float) -> None:
    if not value >= least:
        raise ThinkloopError(f"Browser({name}={value!r}) is too small: give {least} or more.")
