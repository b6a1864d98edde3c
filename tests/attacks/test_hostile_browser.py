"""Pages that would drown, stall or steer the model or the machine, in the browser: each ends in time, and the next one works."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import anyio
import pytest
from chromium import guarded_browser, ref, said
from control_tokens import control_tokens_of
from evidence import megabytes_of, peak_of
from hostile_site import pages_of_harm
from thinkloop.tools.browser import Browser
from web_site import PAGES, page, site

pytestmark = [pytest.mark.anyio, pytest.mark.skipif(sys.platform != "linux", reason="the sandbox is bubblewrap")]

Held = Callable[[str], None]

CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\U000e0000-\U000e007f]")
TIMEOUT = 3.0
MEMORY_MB = 1536


def slow(*cases: str) -> list[Any]:
    """Cases that take 5 to 15 s, each like another one that doesn't."""
    return [pytest.param(case, marks=pytest.mark.slow) for case in cases]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with pages_of_harm(), site() as address:
        yield address


@pytest.fixture(scope="module")
async def browser(url: str) -> AsyncIterator[Browser]:
    async with guarded_browser([url.removeprefix("http://")], [], {}, timeout=TIMEOUT, memory_mb=MEMORY_MB) as toolset:
        await said(toolset, "open", url=f"{url}/table")
        yield toolset


async def shown(browser: Browser, name: str, **arguments: object) -> tuple[str, int]:
    """What the model is told, in time and in bounds, and the megabytes that it took here."""
    started = time.monotonic()
    content, megabytes = await peak_of(said(browser, name, **arguments))
    assert time.monotonic() - started < 2 * browser.timeout + 10
    assert len(content) < 8_500
    assert not CONTROL.search(content)
    return content, megabytes


async def next_works(browser: Browser, url: str) -> None:
    with patience(browser):
        assert "Crane 1" in await said(browser, "open", url=f"{url}/table")


@contextmanager
def patience(browser: Browser) -> Iterator[None]:
    """The time that a call has by default: for rows that aren't about time."""
    browser.timeout = 30.0
    try:
        yield
    finally:
        browser.timeout = TIMEOUT


def bound(content: str) -> str:
    known = (
        (r"too large[^:;]*for refs \(\d+ elements\)", "snapshot bound: {}"),
        (r"cut after \d+ characters", "text bound: {}"),
        (r"did not answer within [\d.]+ s|nothing came within [\d.]+ s|is still loading", "time limit: {}"),
        (r"redirects in a circle \(\w+\)", "Chromium: {}"),
        (r"\d+ requests were refused", "proxy: {}"),
        (r"a dialog \(\w+\) said .* was dismissed", "dialogs are dismissed: {:.60}"),
        (r"a pop-up to \S+ was not opened", "pop-ups are not opened: {}"),
        (r"the download of .* was refused", "downloads are refused: {:.60}"),
        (r"asked for a file to upload, which isn't possible", "no upload: {}"),
        (r"used more than \d+ MB of memory", "watchdog: {}"),
        (r"the page crashed", "Chromium's own bounds: {}"),
        (r"the PDF [^:]*|the pdf [^:;]*", "parser in a process of its own: {:.80}"),
    )
    for pattern, form in known:
        if match := re.search(pattern, content):
            return form.format(match[0])
    return f"budget and snapshot: {len(content):,} characters"


@pytest.mark.parametrize(
    "path",
    ["/loop", "/flood", "/entities", "/style", "/broken.pdf", "/comments", "/long-title",
     *slow("/links?n=1000000", "/drip?n=100", "/bomb.pdf", "/plain?mb=100", "/big?mb=100", "/hang", "/nested", "/onward", "/gzip-bomb",
                              "/long-line")],
)  # fmt: skip
async def test_a_page_without_end(browser: Browser, url: str, held: Held, path: str) -> None:
    content, megabytes = await shown(browser, "open", url=url + path)
    assert "root:" not in content
    assert megabytes < 150
    await next_works(browser, url)
    held(f"{bound(content)}; {megabytes} MB here, {len(content):,} characters for the model")


@pytest.mark.parametrize(
    "path", ["/utf-7", "/utf-16", "/unknown-charset", "/surrogates", "/noise", "/cut-gzip", "/not-gzip"]
)
async def test_a_bad_encoding(browser: Browser, url: str, held: Held, path: str) -> None:
    content, _ = await shown(browser, "open", url=url + path)
    content.encode()
    held(f"decoded with replacements, or refused: {ascii(content.partition(chr(10))[2][:50] or content[:80])[1:-1]}")


async def test_control_tokens_in_a_page(browser: Browser, url: str, held: Held) -> None:
    held(await control_tokens_of(browser.tools(), "browser_open", {"url": f"{url}/injected"}))


SCRIPTS = {
    "a busy loop": "for (;;) {}",
    "alerts without end": "for (;;) alert('once more')",
    "prompts and confirmations": "while (!confirm('Sure?')); prompt('Key?')",
    "leaving is not allowed": "onbeforeunload = e => { e.preventDefault(); return 'stay' }",
    "five hundred pop-ups": "for (let i = 0; i < 500; i++) open('/table')",
    "reloading without end": "setTimeout(() => location.reload(), 5)",
    "addresses without end": "setInterval(() => location.hash = Math.random(), 0)",
    "a history without end": "for (let i = 0; i < 300; i++) history.pushState(0, '', '/script?' + i)",
    "frames of itself": "document.body.innerHTML = '<iframe src=/script></iframe><iframe src=/script?2></iframe>'",
    "a hundred workers": "for (let i = 0; i < 100; i++) new Worker(URL.createObjectURL(new Blob(['for (;;) {}'])))",
    "requests without end": "setInterval(() => fetch('/missing' + Math.random()), 1)",
    "fifty downloads": "for (let i = 0; i < 50; i++) { const a = document.createElement('a'); a.href = URL.createObjectURL(new Blob(['x'])); a.download = '../../x' + i; a.click() }",
    "elements without end": "for (let i = 0; i < 300_000; i++) document.body.append(document.createElement('i'))",
    "text without end": "document.body.append('harbour '.repeat(20_000_000))",
    "a megabyte of labels": "for (let i = 0; i < 100; i++) { const b = document.createElement('button'); b.ariaLabel = 'x'.repeat(10_000); document.body.append(b) }",
    "changing all the time": "setInterval(() => document.body.innerHTML = `<p>${'x'.repeat(Math.random() * 1e5)}</p>`, 0)",
    "a page that clears itself": "document.documentElement.remove()",
    "asking for everything": "for (const name of ['camera', 'microphone']) navigator.mediaDevices?.getUserMedia({[name === 'camera' ? 'video' : 'audio']: true}).catch(() => 0); navigator.geolocation?.getCurrentPosition(() => document.title = 'WHERE'); Notification?.requestPermission(); navigator.clipboard?.readText().then(t => document.title = 'CLIPBOARD').catch(() => 0); document.documentElement.requestFullscreen().catch(() => 0)",
    "a pattern that stalls": "/(a+)+$/.test('a'.repeat(60) + '!')",
    "memory without end": "const kept = []; for (;;) kept.push(new Uint8Array(1 << 26).fill(1))",
    "storage without end": "let s = 'x'.repeat(1 << 20); try { for (let i = 0; i < 500; i++) localStorage[i] = s } catch {} document.title = 'stored'",
    "functions that throw": "document.createTreeWalker = () => { throw 7 }",
    "a terabyte canvas": "const c = document.createElement('canvas'); c.width = c.height = 32_000; document.body.append(c); c.getContext('2d').fillRect(0, 0, 9, 9)",
    "it closes itself": "window.close(); open('', '_self').close()",
}  # fmt: skip
LONG = ("a hundred workers", "elements without end", "a history without end", "prompts and confirmations",
        "a pattern that stalls", "text without end", "alerts without end", "requests without end", "reloading without end",
        "memory without end", "addresses without end", "frames of itself", "five hundred pop-ups")  # fmt: skip


def _page(script: str) -> None:
    PAGES["/script"] = lambda query: page("Script", f"<p>Here</p><script>{script}</script>")


@pytest.mark.parametrize("name", [*(name for name in SCRIPTS if name not in LONG), *slow(*LONG)])
async def test_a_script(browser: Browser, url: str, held: Held, name: str) -> None:
    _page(SCRIPTS[name])
    content, megabytes = await shown(browser, "open", url=f"{url}/script")
    assert megabytes < 150
    assert "WHERE" not in content
    assert "CLIPBOARD" not in content
    await next_works(browser, url)
    held(f"{bound(content)}; the next page worked")


OURS = {
    "the markup": ("article", "Object.defineProperty(Element.prototype, 'outerHTML', {get() { return {slice: () => 'x'.repeat(3e7)} }})"),
    "the text": ("page", "for (let i = 0; i < 20_100; i++) document.body.append(document.createElement('i')); Array.prototype.join = () => ({slice: () => 'x'.repeat(3e7)})"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("form", "script"),
    [pytest.param(*OURS["the text"], id="the text"), pytest.param(*OURS["the markup"], id="the markup", marks=pytest.mark.slow)],
)  # fmt: skip
async def test_a_page_replaces_functions_and_hands_us_thirty_megabytes_for(
    browser: Browser, url: str, held: Held, form: str, script: str
) -> None:
    _page(script)
    with patience(browser):
        content, megabytes = await shown(browser, "open", url=f"{url}/script", form=form)
    await next_works(browser, url)
    assert megabytes < 60
    held(f"{bound(content)}; {megabytes} MB here")


async def test_a_page_replaces_functions_and_hands_us_another_type(browser: Browser, url: str, held: Held) -> None:
    _page("document.getElementsByTagName = () => ({length: 'x'})")
    content, _ = await shown(browser, "open", url=f"{url}/script")
    held(f"{bound(content)}")


async def test_a_title_of_thirty_megabytes(browser: Browser, url: str, held: Held) -> None:
    _page("document.title = 'x'.repeat(3e7)")
    with patience(browser):
        content, megabytes = await shown(browser, "open", url=f"{url}/script")
    await next_works(browser, url)
    assert megabytes < 60
    held(f"{bound(content)}; {megabytes} MB here")


async def test_a_request_with_a_body_of_fifty_megabytes(browser: Browser, url: str, held: Held) -> None:
    _page("fetch('/x', {method: 'POST', body: 'x'.repeat(5e7)}).catch(() => 0)")

    before = megabytes_of("VmRSS")
    with patience(browser):
        content, _ = await shown(browser, "open", url=f"{url}/script")
    with anyio.move_on_after(2):  # the driver's message comes when it has read the body itself
        while (megabytes := megabytes_of("VmHWM") - before) < 60:
            await anyio.sleep(0.05)
    await next_works(browser, url)
    assert megabytes < 60
    held(f"{bound(content)}; {megabytes} MB here")


@pytest.mark.slow
async def test_a_button_that_hangs(browser: Browser, url: str, held: Held) -> None:
    content, _ = await shown(browser, "open", url=f"{url}/busy")
    content, _ = await shown(browser, "click", ref=ref(content, "Hang"))
    await next_works(browser, url)
    held(bound(content))


async def test_a_ref_that_is_none(browser: Browser, url: str, held: Held) -> None:
    await said(browser, "open", url=f"{url}/form")
    tried = [
        "e1 >> css=body",
        "css=body",
        "xpath=//*",
        "f999999e1",
        "e999999999",
        "e1]; text=x",
        "aria-ref=e1",
        "\x00",
        "",
    ]
    answers = [(await shown(browser, "click", ref=each))[0] for each in tried]
    assert all("is no ref" in answer or "is gone" in answer for answer in answers)
    held(f"refs have one form: {len(tried)} others were refused, no selector was run")


async def test_a_form_that_asks_for_a_file(browser: Browser, url: str, held: Held) -> None:
    form, _ = await shown(browser, "open", url=f"{url}/form")
    clicked, _ = await shown(browser, "click", ref=ref(form, "Papers"))
    typed, _ = await shown(browser, "type", ref=ref(form, "Papers"), text="/etc/passwd")
    assert typed.startswith("error: ")
    held(f"{bound(clicked)}; a path can't be typed: {typed.removeprefix('error: ')[:80]}")


async def test_the_driver_is_killed(url: str, held: Held) -> None:
    async with guarded_browser([url.removeprefix("http://")], [], {}, timeout=TIMEOUT) as mortal:
        await next_works(mortal, url)
        chromium = mortal._session._chromium
        assert chromium
        os.kill(chromium.processes.driver, signal.SIGKILL)
        first = await said(mortal, "open", url=f"{url}/table")
        await next_works(mortal, url)
    held(f"a fresh browser: {first[:80]}")
