"""One running Chromium: started by Playwright's driver inside the sandbox of `browser_sandbox`, watched, ended for good."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import shlex
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

import anyio
import anyio.to_thread
from thinkloop.tools.browser_driver import Driver
from thinkloop.tools.browser_popups import Popups
from thinkloop.tools.browser_sandbox import PROXY, SOCKETS, BrowserError, BrowserLimits, explain, find_chromium, plan
from thinkloop.tools.process_tree import hold, kill_held, process_tree, resident_bytes
from thinkloop.tools.sandbox_limits import Watchdog

__all__ = ["BrowserError", "BrowserLimits", "Chromium", "Settings", "check_extra", "find_chromium", "prepare"]

if TYPE_CHECKING:
    from playwright.async_api import Browser as PlaywrightBrowser
    from playwright.async_api import Playwright

START_SECONDS = 30.0  # warm 0.6 s; cold from a slow disk, Chromium and Node together read 200 MB
END_SECONDS = 3.0
_EXTRAS = ("playwright", "trafilatura", "pypdf")
_ARGUMENTS = (
    "--disable-gpu",
    "--force-webrtc-ip-handling-policy=disable_non_proxied_udp",
    "--component-updater=url-source=about:blank",  # else update.googleapis.com is called at every start
    "--disable-quic",
    "--dns-prefetch-disable",
    "--no-pings",
    "--disable-domain-reliability",
    "--disable-client-side-phishing-detection",
)
_NOT_WANTED = ("--enable-unsafe-swiftshader", "--disable-popup-blocking", "--disable-ipc-flooding-protection")


def check_extra() -> None:
    """Raises `BrowserError` when the extra isn't installed."""
    if missing := [name for name in _EXTRAS if importlib.util.find_spec(name) is None]:
        raise BrowserError(f"The browser tool needs {', '.join(missing)}: run pip install 'thinkloop[browser]'")


@dataclass(frozen=True, slots=True)
class Settings:
    """What a start needs: the two programs, the bounds, and the folder with the proxies' sockets (and `downloads`, if
    allowed)."""

    bwrap: str
    chromium: Path
    folder: Path
    limits: BrowserLimits
    downloads: bool = False


class Chromium:
    """A running browser. `lost` says why it can't be used any more; empty while it can."""

    def __init__(
        self, driver: Driver, browser: PlaywrightBrowser, popups: Popups, processes: Processes, limits: BrowserLimits
    ) -> None:
        self.browser, self.popups, self.processes, self.lost = browser, popups, processes, driver.lost
        self._driver = driver
        self._watchdog = _Watchdog(processes, limits, self._end_for)
        self._watchdog.start()
        driver.on_lost = self._end_for
        browser.on("disconnected", lambda _: self._lose("the browser ended unexpectedly"))

    @classmethod
    async def start(cls, settings: Settings) -> Self:
        """Start driver and browser, in about 0.6 s. Raises `BrowserError`. Cancelling ends what was started."""
        prepare(settings)
        await anyio.to_thread.run_sync(_import_playwright)
        driver = await _start_driver()
        launching = asyncio.ensure_future(_launch(driver.playwright, settings))
        try:
            browser, popups = await asyncio.shield(launching)
            return cls(driver, browser, popups, Processes.of(settings.folder), settings.limits)
        except BaseException:
            with anyio.CancelScope(shield=True):  # the driver would forget the folders of half a launch
                await asyncio.wait([launching], timeout=END_SECONDS)
            if not launching.cancel():
                launching.exception()  # read here, or asyncio logs it
            processes = Processes.of(settings.folder)
            await _end_driver(driver)
            await processes.end()
            raise

    async def stop(self) -> None:
        """End every process and remove what they left. May be called twice; isn't cancelled."""
        from playwright.async_api import Error

        self._lose("the browser was closed")
        self._watchdog.end()
        with anyio.move_on_after(END_SECONDS, shield=True), suppress(Error):
            await self.browser.close()
        await _end_driver(self._driver)
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(self._watchdog.join)
        await self.processes.end()

    def _end_for(self, reason: str) -> None:
        """From any thread. The driver goes too: what it holds may be the reason."""
        self._lose(reason)
        self.processes.kill()

    def _lose(self, reason: str) -> None:
        self.lost = self.lost or reason


class _Watchdog(Watchdog):
    """Watches the browser's processes in sum, and the driver, which keeps what pages log, throw and send."""

    def __init__(self, processes: Processes, limits: BrowserLimits, on_excess: Callable[[str], None]) -> None:
        super().__init__(processes.inside, limits.memory_mb << 20, on_excess)
        self._driver, self._driver_mb = processes.driver, limits.driver_mb

    def _objection(self) -> str:
        if resident_bytes(self._driver) > self._driver_mb << 20:
            return f"the page's logs, errors and requests took the browser's driver over {self._driver_mb} MB of memory"
        return super()._objection().replace("it used", "the browser used")


class Processes:
    """The processes of one start, held by descriptors that can't come to mean another process."""

    def __init__(self, bwrap: int, driver: int, profile: str) -> None:
        self.bwrap, self.driver, self.profile = bwrap, driver, Path(profile)
        tree = list(process_tree(bwrap)) if bwrap else []
        self.inside = tree[1] if len(tree) > 1 else 0
        """Pid 1 of the sandbox, by the host's number."""
        self._held = [fd for pid in (self.inside, bwrap, driver) if pid and (fd := hold(pid)) is not None]

    @classmethod
    def of(cls, folder: Path) -> Self:
        """Those that `browser_launch.py` wrote down; none if it hasn't run."""
        try:
            return cls(**json.loads((folder / "pids").read_text()))
        except FileNotFoundError:
            return cls(0, 0, "")

    def kill(self) -> None:
        """Kill them all, with pid 1 of the inside everything there. Doesn't wait."""
        kill_held(self._held)

    async def end(self) -> None:
        """Kill what still runs, wait until all have ended, and remove the profile folder that the driver made."""
        kill_held(self._held)
        with anyio.move_on_after(END_SECONDS, shield=True):
            for fd in self._held:
                await anyio.wait_readable(fd)
        for fd in self._held:
            os.close(fd)
        self._held = []
        if self.profile.name.startswith("playwright"):
            shutil.rmtree(self.profile, ignore_errors=True)


def _import_playwright() -> None:
    """It takes 160 ms, too long for the event loop."""
    check_extra()
    import playwright.async_api  # noqa: F401 - for its cost alone


def prepare(settings: Settings) -> None:
    """Write the plan and the script that the driver runs; let the browser's user reach the socket and nothing else."""
    folder = settings.folder
    content = plan(settings.bwrap, settings.chromium, folder, settings.limits, downloads=settings.downloads)
    (folder / "pids").unlink(missing_ok=True)
    (folder / "plan.json").write_text(json.dumps(content))
    _hand_over(folder, content["uid"])
    command = [sys.executable, "-I", "-S", "-B", str(Path(__file__).with_name("browser_launch.py"))]
    script = folder / "chromium"
    script.write_text(f'#!/bin/sh\nexec {shlex.join([*command, str(folder / "plan.json")])} "$@"\n')
    script.chmod(0o700)


def _hand_over(folder: Path, uid: int | None) -> None:
    if uid is None:
        return
    if closed := [parent for parent in folder.parents if not parent.stat().st_mode & 0o001]:
        raise BrowserError(
            f"The browser's user may not enter {closed[0]}: set TMPDIR to a folder open to all, such as /tmp"
        )
    folder.chmod(0o711)
    for name in (*SOCKETS, "downloads"):
        if (folder / name).exists():
            os.chown(folder / name, uid, uid)
            (folder / name).chmod(0o700)


async def _start_driver() -> Driver:
    """Shielded, because a start cut in the middle leaves no handle to end the driver with."""
    from playwright.async_api import Error

    driver = Driver()
    try:
        with anyio.fail_after(START_SECONDS, shield=True):
            await driver.start()
            return driver
    except (Error, OSError, TimeoutError) as error:
        raise BrowserError(
            f"Playwright's driver did not start: {error or 'no answer'}. Reinstall playwright."
        ) from error


async def _launch(playwright: Playwright, settings: Settings) -> tuple[PlaywrightBrowser, Popups]:
    from playwright.async_api import Error

    try:
        browser = await playwright.chromium.launch(
            executable_path=settings.folder / "chromium",
            chromium_sandbox=True,
            env={},
            proxy=PROXY,
            args=_ARGUMENTS,
            ignore_default_args=_NOT_WANTED,
            artifacts_dir=settings.folder / "artifacts",
            downloads_path=settings.folder / "downloads",
            timeout=START_SECONDS * 1000,
        )
        popups = Popups(await browser.new_browser_cdp_session())
        await popups.listen()
        return browser, popups
    except Error as error:
        raise BrowserError(explain(_said(error.message))) from error


def _said(message: str) -> str:
    """The lines that bubblewrap or Chromium wrote, out of Playwright's long report."""
    rows = [row.split("[err]", 1)[1].strip() for row in message.splitlines() if "[err]" in row]
    return "\n".join(dict.fromkeys(rows[-5:])) or message.strip().splitlines()[0]


async def _end_driver(driver: Driver) -> None:
    from playwright.async_api import Error

    with anyio.move_on_after(END_SECONDS, shield=True), suppress(Error):
        await driver.stop()
