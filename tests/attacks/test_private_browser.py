"""No one gets in: private addresses and files through the browser, whoever asks for them: the model, a page, its scripts."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from urllib.parse import quote

import anyio
import pytest
from chromium import call, guarded_browser, ref, said
from evidence import layer
from secret_server import SECRET, Secret, secret
from thinkloop.tools.browser import Browser
from thinkloop.tools.tool import ToolError
from web_site import PAGES, page, site

pytestmark = [pytest.mark.anyio, pytest.mark.skipif(sys.platform != "linux", reason="the sandbox is bubblewrap")]

Held = Callable[[str], None]

NAMES = {
    "private.example": ["127.0.0.1"], "mixed.example": ["93.184.215.14", "127.0.0.1"], "mapped.example": ["::ffff:127.0.0.1"],
    "metadata.example": ["169.254.169.254"], "nat64.example": ["64:ff9b::7f00:1"], "zero.example": ["0.0.0.0"],
    "lan.example": ["192.168.0.1"],
}  # fmt: skip


ALIKE = [
    "http://a.localhost:{port}/", "http://0177.0.0.1:{port}/", "http://127.1:{port}/", "http://127。0。0。1:{port}/",
    "http://localhost:3128/", "http://0xa9fea9fe/", "http://100.100.100.200/", "http://192.168.0.1/", "http://printer.local/",
]  # fmt: skip
"""Addresses that are refused for the reasons of others here."""


@pytest.fixture(scope="module")
def hidden() -> Iterator[Secret]:
    with secret() as server:
        yield server


@pytest.fixture(scope="module")
def asked() -> list[str]:
    return []


@pytest.fixture(scope="module")
def url(asked: list[str]) -> Iterator[str]:
    with site(asked) as address:
        yield address


@pytest.fixture(scope="module")
def dialled() -> list[str]:
    return []


@pytest.fixture(scope="module")
async def browser(url: str, dialled: list[str]) -> AsyncIterator[Browser]:
    async with guarded_browser([url.removeprefix("http://")], dialled, NAMES, timeout=20) as toolset:
        yield toolset


@pytest.fixture(autouse=True)
def only_the_site_is_dialled(url: str, dialled: list[str], hidden: Secret) -> Iterator[None]:
    dialled.clear()
    hidden.seen.clear()
    yield
    assert set(dialled) <= {url.removeprefix("http://")}
    assert hidden.seen == []


# Addresses as a model may write them


@pytest.mark.parametrize(
    "address",
    [
        "http://127.0.0.1:{port}/", "http://localhost:{port}/", "http://[::1]:{port}/",
        "http://[::ffff:127.0.0.1]:{port}/", "http://[64:ff9b::7f00:1]:{port}/", "http://2130706433:{port}/",
        "http://0x7f.1:{port}/", "http://0.0.0.0:{port}/",
        "http://１２７.0.0.1:{port}/", "http://127.0.0.1.:{port}/", "https://127.0.0.1:{port}/",
        "http://user@127.0.0.1:{port}/", "http://example.org\\@127.0.0.1:{port}/", "http://127.0.0.1:3128/",
        "http://169.254.169.254/latest/meta-data/", 
        "http://[::ffff:a9fe:a9fe]/", "http://[fd00:ec2::254]/", "http://metadata.google.internal/computeMetadata/v1/",
        "http://10.0.0.1/", "http://127.0.0.1:22/",
        *(pytest.param(address, marks=pytest.mark.slow) for address in ALIKE),
    ],
)  # fmt: skip
async def test_browser_open_a_private_host(browser: Browser, hidden: Secret, held: Held, address: str) -> None:
    told = await said(browser, "open", url=address.format(port=hidden.port))
    assert told.startswith("error: ")
    assert SECRET not in told
    held(f"{layer(told)}; {hidden.unseen()}")


@pytest.mark.parametrize("host", NAMES)
async def test_browser_open_a_name_that_resolves_to(browser: Browser, hidden: Secret, held: Held, host: str) -> None:
    told = await said(browser, "open", url=f"http://{host}:{hidden.port}/")
    assert told.startswith("error: ")
    held(f"{layer(told)}; {hidden.unseen()}")


@pytest.mark.parametrize(
    "address",
    [
        "file:///etc/passwd", "FILE:/etc/passwd", "file://127.0.0.1/etc/passwd", "view-source:file:///etc/passwd",
        "view-source:http://example.org/", "chrome://version", "chrome://settings/passwords", "chrome-untrusted://print/",
        "devtools://devtools/bundled/inspector.html", "about:blank", "about:chrome-urls", "data:text/html,<h1>hi</h1>",
        "javascript:alert(1)", "blob:http://example.org/1", "filesystem:http://example.org/temporary/x", "ftp://127.0.0.1/",
        "ws://127.0.0.1/", "chrome-extension://x/", "intent://x", "\x00file:///etc/passwd", " file:///etc/passwd", "",
    ],
    ids=lambda address: ascii(address)[1:-1],
)  # fmt: skip
async def test_browser_open_another_scheme(browser: Browser, held: Held, address: str) -> None:
    told = await said(browser, "open", url=address)
    assert told.startswith("error: ")
    assert "root:" not in told
    held(layer(told))


# Pages and redirects

MEANS = ["iframe", "image", "style", "script", "fetch", "websocket", "events", "beacon", "worker", "prefetch", "webrtc",
         "open", "link", "form", "refresh", "script-location"]  # fmt: skip


@pytest.mark.parametrize("means", MEANS)
async def test_a_page_reaches_for_a_private_host_by(
    browser: Browser, url: str, hidden: Secret, held: Held, means: str
) -> None:
    shown = await said(browser, "open", url=f"{url}/reach?by={means}&url={hidden.url}/")
    if means in ("open", "link", "form"):
        shown = await said(browser, "click", ref=ref(shown, "Go"))
    await anyio.sleep(0.05)
    assert SECRET not in shown
    assert "REACHED" not in shown
    held(f"{_page_layer(shown)}; {hidden.unseen()}")


def _page_layer(shown: str) -> str:
    if "pop-up" in shown:
        return "pop-ups are not opened"
    if "download of" in shown:
        return "downloads are refused"
    with suppress(AssertionError):
        return f"proxy 403, {layer(shown)}"
    return "network namespace: no way out but the proxy, and it was not asked"


SCRIPTS = {
    "ports inside": "for (const p of [3128, 80, 9222, 8080, 22]) fetch(`http://127.0.0.1:${p}/`, {mode: 'no-cors'}).catch(() => 0)",
    "names that change": "for (const h of ['private', 'mixed', 'zero', 'mapped']) fetch(`http://${h}.example:PORT/`).catch(() => 0)",
    "a redirect under fetch": "fetch('/to?url=SECRET').then(r => r.text()).then(t => document.body.append(t)).catch(() => 0)",
    "a form by script": "const f = document.createElement('form'); f.action = 'SECRET'; f.method = 'post'; document.body.append(f); f.submit()",
    "a hundred sockets": "for (let i = 0; i < 100; i++) new WebSocket('ws://127.0.0.1:PORT/')",
    "web transport": "new WebTransport('https://127.0.0.1:PORT/').ready.catch(() => 0)",
    "a worker's fetch": "new Worker(URL.createObjectURL(new Blob([`fetch('SECRET')`])))",
    "a shared worker": "new SharedWorker('data:text/javascript,fetch(\"SECRET\")')",
    "a file in a frame": "document.body.innerHTML += '<iframe src=\"file:///etc/passwd\"></iframe><object data=\"file:///etc/passwd\">'",
    "a settings page in a frame": "document.body.innerHTML += '<iframe src=\"chrome://version\"></iframe>'; open('chrome://version')",
    "a file as the location": "location = 'file:///etc/passwd'",
    "view-source as the location": "location = 'view-source:SECRET'",
    "many names to resolve": "for (let i = 0; i < 50; i++) document.head.insertAdjacentHTML('beforeend', `<link rel=dns-prefetch href=//n${i}.leak.example>`)",
    "a download": "const a = document.createElement('a'); a.href = 'SECRET'; a.download = 'x'; a.click()",
    "print, share, install": "print(); navigator.share?.({url: 'SECRET'}).catch(() => 0)",
    "a report by policy": "document.head.insertAdjacentHTML('beforeend', '<meta http-equiv=Content-Security-Policy content=\"img-src none; report-uri SECRET\">'); new Image().src = '/x'",
    "stun and turn": "const c = new RTCPeerConnection({iceServers: [{urls: ['stun:127.0.0.1:PORT', 'turn:127.0.0.1:PORT?transport=tcp'], username: 'u', credential: 'c'}]}); c.createDataChannel('x'); c.createOffer().then(o => c.setLocalDescription(o))",
}  # fmt: skip


LONG = ("a settings page in a frame", "many names to resolve", "a hundred sockets")


@pytest.mark.parametrize(
    "script",
    [
        pytest.param(script, id=name, marks=[pytest.mark.slow] if name in LONG else [])
        for name, script in SCRIPTS.items()
    ],
)
async def test_a_script_tries(
    browser: Browser, url: str, hidden: Secret, held: Held, monkeypatch: pytest.MonkeyPatch, script: str
) -> None:
    filled = script.replace("SECRET", f"{hidden.url}/").replace("PORT", str(hidden.port))
    monkeypatch.setitem(PAGES, "/script", lambda query: page("Script", f"<p>Here</p><script>{filled}</script>"))
    shown = await said(browser, "open", url=f"{url}/script")
    await anyio.sleep(0.1)
    after = await said(browser, "find", text="root:")
    assert SECRET not in shown + after
    assert "root:x" not in shown + after
    local = any(scheme in script for scheme in ("file:", "chrome:", "view-source:"))
    held(f"{'schemes: Chromium refused to load it' if local else _page_layer(shown)}; {hidden.unseen()}")


@pytest.mark.parametrize(
    "target",
    ["{secret}/", "//127.0.0.1:{port}/", "http://2130706433:{port}/", "http://0x7f.1:{port}/", "http://[::1]:{port}/",
     "http://private.example:{port}/", "http://169.254.169.254/", "http://user@127.0.0.1:{port}/", "{site}/to?url={secret}/",
     "file:///etc/passwd", "data:text/html,x", "javascript:1", "chrome://version", "view-source:{secret}/"],
)  # fmt: skip
async def test_a_redirect_leads_to(browser: Browser, url: str, hidden: Secret, held: Held, target: str) -> None:
    to = target.format(secret=hidden.url, port=hidden.port, site=url)
    told = await said(browser, "open", url=f"{url}/to?url={quote(to, safe='')}")
    assert told.startswith("error: ") or "(the server answered with status 403)" in told  # the proxy's own page
    assert SECRET not in told
    held(f"{layer(told)}; {hidden.unseen()}")


async def test_a_link_to_a_private_host_is_clicked(browser: Browser, url: str, hidden: Secret, held: Held) -> None:
    shown = await said(browser, "open", url=f"{url}/reach?by=link&url={hidden.url}/")
    result = await call(browser, "click", ref=ref(shown, "Go"))
    assert not result.ok
    assert "# Reach by link" in result.content
    held(f"proxy 403, {layer(result.content)}, and back on the page; {hidden.unseen()}")


async def test_a_service_worker_stays_between_pages(browser: Browser, url: str, asked: list[str], held: Held) -> None:
    await said(browser, "open", url=f"{url}/reach?by=service-worker&url={url}")
    await anyio.sleep(0.05)
    assert "/worker.js" not in asked
    held("service workers are blocked: its script was not asked for")


async def test_a_page_for_search_reaches_for_a_private_host(
    browser: Browser, url: str, hidden: Secret, held: Held
) -> None:
    """`open` may read pages with the browser instead of the fetcher."""
    for address in (f"{hidden.url}/", f"{url}/to?url={hidden.url}/"):
        with pytest.raises(ToolError) as caught:
            await browser.document(address)
        assert SECRET not in str(caught.value)
    held(f"{layer(str(caught.value))}; {hidden.unseen()}")


async def test_what_the_browser_calls_by_itself(browser: Browser, url: str, dialled: list[str], held: Held) -> None:
    await said(browser, "open", url=url)
    await anyio.sleep(0.3)
    assert set(dialled) == {url.removeprefix("http://")}
    held(f"proxy: of all it asked for, only the page's own host was dialled ({len(dialled)} times)")
