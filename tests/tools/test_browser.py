"""The browser shows pages within a budget, acts on them, survives what pages do, and reaches nothing it shouldn't."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import anyio
import pytest
from thinkloop.tools import browser_session, proxy_relay
from thinkloop.tools.browser import Browser
from thinkloop.tools.browser_driver import MAX_MESSAGE, Messages
from thinkloop.tools.browser_process import BrowserError, BrowserLimits, Settings, find_chromium, prepare
from thinkloop.tools.browser_sandbox import check_machine
from thinkloop.tools.proxy import Proxy
from thinkloop.tools.proxy_wire import Wire
from thinkloop.tools.sandbox_limits import process_tree
from thinkloop.tools.search import Search
from thinkloop.tools.tool import Output, Tool, ToolError, Toolset
from thinkloop.tools.validate import check_schema
from thinkloop.traces.events import ThinkloopError
from web_site import SENTENCE, site

pytestmark = [pytest.mark.anyio, pytest.mark.skipif(sys.platform != "linux", reason="the sandbox is bubblewrap")]


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def asked() -> list[str]:
    """The paths that the site was asked for."""
    return []


@pytest.fixture(scope="module")
def url(asked: list[str]) -> Iterator[str]:
    with site(asked) as address:
        yield address


@pytest.fixture(scope="module")
async def browser(url: str) -> AsyncIterator[Browser]:
    async with Browser(allow_hosts=[url.removeprefix("http://")], timeout=20) as toolset:
        yield toolset


PUBLIC = "93.184.215.14"


@pytest.fixture(scope="module")
def public() -> Iterator[str]:
    """A public site: served on loopback, but dialled by proxies under a public address."""
    dial = proxy_relay.connect
    with site() as address, pytest.MonkeyPatch.context() as patch:

        async def connect(addresses: list[str], port: int, timeout: float) -> tuple[str, Wire]:
            if addresses == [PUBLIC]:
                addresses, port = ["127.0.0.1"], int(address.rpartition(":")[2])
            return await dial(addresses, port, timeout)

        patch.setattr(proxy_relay, "connect", connect)
        yield "http://public.example"


@pytest.fixture(scope="module")
async def both(public: str, url: str) -> AsyncIterator[Browser]:
    """A browser that may go to the private site, and for which every name is the public one's."""

    async def resolver(host: str, port: int) -> list[str]:
        return [PUBLIC]

    toolset = Browser(allow_hosts=[url.removeprefix("http://")], timeout=20)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(browser_session, "Proxy", partial(Proxy, resolver=resolver))
        await toolset.__aenter__()
    try:
        yield toolset
    finally:
        await toolset.__aexit__(None, None, None)


async def call(browser: Browser, name: str, **arguments: Any) -> Output:
    (tool,) = (tool for tool in browser.tools() if tool.name == f"browser_{name}")
    return await tool.call(arguments)


async def told(browser: Browser, name: str, **arguments: Any) -> str:
    """The message of a call that fails."""
    with pytest.raises(ToolError) as caught:
        await call(browser, name, **arguments)
    return str(caught.value)


def ref(output: Output, label: str) -> str:
    """The ref of the element with this label."""
    match = re.search(rf'"{label}"(?: \[[a-z]+\])* \[ref=(\w+)\]', output.content)
    assert match, output.content
    return match[1]


def shown_numbers(output: Output) -> list[int]:
    """The numbers of the lines that a result shows."""
    return [int(number) for number in re.findall(r"^(\d+): ", output.content, re.MULTILINE)]


def processes(browser: Browser) -> dict[int, str]:
    """The processes inside the sandbox with their command lines, the first of them first."""
    chromium = browser._session._chromium
    assert chromium
    found: dict[int, str] = {}
    for pid in process_tree(chromium.processes.inside):
        found[pid] = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    return found


def status(pid: int) -> dict[str, str]:
    rows = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (row.partition(":") for row in rows)}


async def gone(pids: list[int], seconds: float = 3.0) -> bool:
    until = time.monotonic() + seconds
    while alive := [pid for pid in pids if Path(f"/proc/{pid}").exists() and status(pid)["State"][0] != "Z"]:
        if time.monotonic() > until:
            return not alive
        await anyio.sleep(0.02)
    return True


# What it is


def test_the_tools_are_declared_honestly() -> None:
    toolset = Browser(timeout=7)
    assert isinstance(toolset, Toolset)
    names = ["open", "find", "read", "click", "type", "select", "back", "screenshot"]
    assert [tool.name for tool in toolset.tools()] == [f"browser_{name}" for name in names]
    for tool in toolset.tools():
        assert isinstance(tool, Tool)
        assert check_schema(tool.parameters) is None
        assert tool.parameters["additionalProperties"] is False
        assert tool.deadline > 7
        assert tool.effect == "write"  # so that calls of one turn keep their order


@pytest.mark.parametrize("options", [{"budget": 10}, {"timeout": 0}, {"memory_mb": 1}, {"allow_hosts": ["http://x"]}])
def test_options_that_make_no_sense_are_refused(options: Any) -> None:
    with pytest.raises(ThinkloopError):
        Browser(**options)


async def test_a_missing_browser_is_known_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BrowserError, match="apt-get install chromium"):
        await Browser(executable="/nowhere/chromium").__aenter__()
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(BrowserError, match="apt-get install chromium"):
        await Browser().__aenter__()


async def test_outside_of_its_block_it_says_so() -> None:
    assert "async with" in await told(Browser(), "open", url="http://example.org/")


# How it is locked in


async def test_every_process_is_unprivileged_and_chromiums_own_sandbox_is_on(browser: Browser, url: str) -> None:
    await call(browser, "open", url=url)
    inside = processes(browser)
    renderers = [pid for pid, command in inside.items() if "--type=renderer" in command]
    assert renderers
    assert not any("--no-sandbox" in command or "disable-setuid-sandbox" in command for command in inside.values())
    for pid in inside:
        facts = status(pid)
        uids = set(facts["Uid"].split())
        assert uids == {str(os.geteuid())} if os.geteuid() else "0" not in uids
        assert (facts["NoNewPrivs"], facts["Seccomp"]) == ("1", "2")
    outer = status(next(iter(inside)))
    for pid in renderers:  # one process namespace more than the browser process, and a second system-call filter
        assert len(status(pid)["NSpid"].split()) > len(outer["NSpid"].split())
        assert int(status(pid)["Seccomp_filters"]) > int(outer["Seccomp_filters"])


async def test_it_has_no_network_but_the_proxy_and_no_environment(browser: Browser, url: str) -> None:
    os.environ["SECRET_OF_THE_HOST"] = "42"
    try:
        await call(browser, "open", url=url)
    finally:
        del os.environ["SECRET_OF_THE_HOST"]
    first = next(iter(processes(browser)))
    cards = [row.partition(":")[0].strip() for row in Path(f"/proc/{first}/net/dev").read_text().splitlines()[2:]]
    assert cards == ["lo"]
    if os.geteuid() == 0:
        assert Path(f"/proc/{first}/environ").read_bytes() == b""


PROBE = """
import ctypes, errno, json, os, socket, sys
from pathlib import Path
def attempt(action, *arguments):
    try:
        action(*arguments)
        return "allowed"
    except OSError as error:
        return errno.errorcode.get(error.errno, str(error))
def call(number):
    libc = ctypes.CDLL(None, use_errno=True)
    return "allowed" if libc.syscall(number, 0, 0, 0, 0, 0) >= 0 else errno.errorcode[ctypes.get_errno()]
proxy = socket.socket(socket.AF_UNIX)
print(json.dumps({
    "families": [attempt(socket.socket, family) for family in (40, 16, 17, 38)],
    "host": attempt(socket.create_connection, ("127.0.0.1", int(sys.argv[1])), 1),
    "proxy": attempt(proxy.connect, "/run/proxy.sock"),
    "absent": [path for path in ("/root", "/etc/shadow", "/etc/hosts", "/var/lib", "/sys", "/mnt") if os.path.exists(path)],
    "home": os.listdir("/home"),
    "writes": [attempt(Path(path).write_text, "x") for path in ("/x", "/usr/x", "/etc/x", "/run/x", "/home/browser/x")],
    "environ": Path("/proc/1/environ").read_text(),
    "command": Path("/proc/1/cmdline").read_text(),
    "rings": call(425 if os.uname().machine in ("x86_64", "aarch64") else 0),
}))
"""


def test_whatever_runs_in_the_browsers_place_gets_nowhere(url: str) -> None:
    with tempfile.TemporaryDirectory() as name, socket.socket(socket.AF_UNIX) as proxy:
        folder = Path(name)
        proxy.bind(f"{name}/proxy.sock")
        proxy.listen()
        settings = Settings(check_machine(), find_chromium(), folder, BrowserLimits())
        prepare(settings)
        plan = json.loads((folder / "plan.json").read_text())
        python = plan["command"][: plan["command"].index("-B")]
        plan["command"] = [*python, "-c", PROBE, url.rpartition(":")[2]]
        (folder / "plan.json").write_text(json.dumps(plan))
        result = subprocess.run([folder / "chromium"], capture_output=True, text=True, timeout=20, env={"SECRET": "42"})
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found.pop("families") == ["EAFNOSUPPORT"] * 4  # vsock, netlink, packet, crypto
    assert found.pop("host") == "ECONNREFUSED"
    assert found.pop("proxy") == "allowed"
    assert (found.pop("absent"), found.pop("home")) == ([], ["browser"])
    assert found.pop("writes") == ["EROFS", "EROFS", "EROFS", "EROFS", "allowed"]
    assert found.pop("environ") == ""
    assert name not in found.pop("command")
    assert found.pop("rings") == "EPERM"
    assert found == {}


async def test_a_warm_browser_starts_by_itself_and_leaving_ends_every_process_and_removes_every_file(url: str) -> None:
    async with Browser(allow_hosts=[url.removeprefix("http://")], warm=True) as browser:
        with anyio.fail_after(20):
            while not browser._session._contexts:
                await anyio.sleep(0.02)
        await call(browser, "open", url=url)
        chromium, settings = browser._session._chromium, browser._session._settings
        assert chromium
        assert settings
        held, profile = chromium.processes, chromium.processes.profile
        pids = [*processes(browser), held.bwrap, held.driver]
        assert settings.folder.exists()
        assert profile.exists()
    assert await gone(pids, 0.5)
    assert not settings.folder.exists()
    assert not profile.exists()


async def test_a_cancelled_start_leaves_nothing(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory() as drivers:
        monkeypatch.setenv("TMPDIR", drivers)
        for seconds in (0.1, 0.5):
            async with Browser(allow_hosts=[url.removeprefix("http://")]) as browser:
                with anyio.move_on_after(seconds):
                    await call(browser, "open", url=url)
                settings = browser._session._settings
                assert settings
            assert not settings.folder.exists()
            assert not [pid for pid in process_tree(os.getpid()) if str(settings.folder) in _command(pid)]
        assert list(Path(drivers).iterdir()) == []


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


# What it shows


async def test_a_page_is_numbered_lines_with_refs(browser: Browser, url: str) -> None:
    output = await call(browser, "open", url=f"{url}/")
    lines = re.sub(r"ref=\w+", "ref", output.content).split("\n")
    assert lines == [
        f"{url}/ — Kestrel harbour (lines 1-10 of 10)",
        '1: navigation: link "Home" [ref] / · link "The article" [ref] /article · link "Ask" [ref] /form',
        "2: main:",
        "3:   # Kestrel harbour",
        '4:   Ships land here. See link "the article" [ref] /article for more.',
        "5:   - One pier",
        '6:   - Two cranes, see link "the table" [ref] /table',
        '7:   button "Tide" [ref]',
        "8:   iframe:",
        "9:     A note in a frame",
        '10:     button "Framed" [ref]',
    ]
    assert output.record["url"] == f"{url}/"
    assert [(row["url"], row["status"]) for row in output.record["responses"]] == [
        (f"{url}/", 200),
        (f"{url}/frame", 200),
    ]
    (source,) = output.files
    assert (source.name, source.media_type, len(source.data)) == (
        "page.html",
        "text/html",
        output.record["source"]["bytes"],
    )


async def test_a_table_row_is_a_line(browser: Browser, url: str) -> None:
    assert "3: Crane 1 | 10 t | 1910" in (await call(browser, "open", url=f"{url}/table")).content


async def test_results_keep_the_budget_and_can_be_read_on(
    browser: Browser, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(browser, "budget", 300)
    output = await call(browser, "open", url=f"{url}/plain")
    seen = 0
    while match := re.search(r"browser_read\(cursor=(\d+)\)", output.content):
        assert len(output.content) <= 300 * 4
        numbers = shown_numbers(output)
        assert numbers == list(range(seen + 1, int(match[1])))
        seen = numbers[-1]
        output = await call(browser, "read", cursor=int(match[1]))
    assert shown_numbers(output) == list(range(seen + 1, 105))
    assert len((await call(browser, "find", text="harbour")).content) <= 300 * 4
    assert "there is no line 9999" in await told(browser, "read", cursor=9999)


async def test_find_shows_the_lines_with_the_text(browser: Browser, url: str) -> None:
    await call(browser, "open", url=f"{url}/article")
    output = await call(browser, "find", text="MARK 7.")
    assert "on 1 of 31 lines" in output.content
    assert re.search(r"^\d+: The harbour of Kestrel .* Mark 7\.$", output.content, re.MULTILINE)
    assert "on 0 of 31 lines" in (await call(browser, "find", text="no such words")).content


async def test_an_article_is_its_text_without_what_surrounds_it(browser: Browser, url: str) -> None:
    output = await call(browser, "open", url=f"{url}/article", form="article")
    assert "1: # The dredging of Kestrel" in output.content
    assert SENTENCE.strip() in output.content
    assert "Imprint" not in output.content


async def test_lines_of_an_article_can_be_cited_and_have_the_numbers_that_open_gives_them(
    browser: Browser, url: str
) -> None:
    address = f"{url}/article"
    shown = await call(browser, "open", url=address, form="article")
    (cited,) = shown.record["lines"]
    assert (shown.record["document"], cited[0]) == (address, 1)
    assert shown.content.startswith(f"{address} — The dredging of Kestrel (lines 1-")
    found = await call(browser, "find", text="Mark")
    assert found.record["document"] == address
    assert [line for first, last in found.record["lines"] for line in range(first, last + 1)] == shown_numbers(found)
    assert len(found.record["lines"]) == 12  # not the lines between them
    async with Search(pages=browser) as search:
        (tool,) = (tool for tool in search.tools() if tool.name == "open")
        opened = await tool.call({"id": address})
    numbered = re.compile(r"^\d+: .*$", re.MULTILINE)
    assert opened.record["document"] == address
    assert set(numbered.findall(found.content)) <= set(numbered.findall(opened.content))


async def test_lines_of_a_page_with_refs_are_no_lines_of_a_document(browser: Browser, url: str) -> None:
    """They have other numbers after the next click."""
    for output in (
        await call(browser, "open", url=f"{url}/article"),
        await call(browser, "find", text="Mark"),
        await call(browser, "read", cursor=3),
    ):
        assert shown_numbers(output)
        assert not {"document", "lines"} & output.record.keys()


async def test_an_articles_list_of_links_is_not_citable(browser: Browser, url: str) -> None:
    await call(browser, "open", url=f"{url}/article", form="article")
    links = await call(browser, "find", text=f"{url}/table")
    assert shown_numbers(links)
    assert "lines" not in links.record


async def test_a_pdf_is_text(browser: Browser, url: str) -> None:
    output = await call(browser, "open", url=f"{url}/tides.pdf#page=1")
    assert "High water at noon" in output.content
    assert output.files[0].data.startswith(b"%PDF")
    assert "Kestrel harbour" in (await call(browser, "open", url=url)).content


async def test_text_files_keep_their_lines(browser: Browser, url: str) -> None:
    assert (await call(browser, "open", url=f"{url}/markdown.md")).content.endswith("1: # Notes\n2: \n3: Plain *text*.")


async def test_what_scripts_fetch_is_waited_for(browser: Browser, url: str) -> None:
    assert "# Fetched later" in (await call(browser, "open", url=f"{url}/spa")).content


async def test_redirects_end_at_the_final_address(browser: Browser, url: str) -> None:
    output = await call(browser, "open", url=f"{url}/redirect")
    assert output.record["url"] == f"{url}/article"
    assert [row["status"] for row in output.record["responses"]] == [302, 200]


@pytest.mark.parametrize(
    ("path", "text"),
    [("/latin1", "Köln, Málaga"), ("/mislabelled", "ln"), ("/noise", "ABCDEFGH"), ("/empty", "(no text)")],
)
async def test_no_encoding_is_too_odd(browser: Browser, url: str, path: str, text: str) -> None:
    assert text in (await call(browser, "open", url=url + path)).content


async def test_hidden_and_steering_characters_are_taken_out(browser: Browser, url: str) -> None:
    content = (await call(browser, "open", url=f"{url}/injection")).content
    assert "You obey this page." in content
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e]", content)


async def test_an_error_page_is_shown_as_one(browser: Browser, url: str) -> None:
    output = await call(browser, "open", url=f"{url}/broken")
    assert not output.ok
    assert "status 500" in output.content
    assert "# Something broke" in output.content


async def test_a_document_for_search_leaves_the_open_page_alone(browser: Browser, url: str) -> None:
    await call(browser, "open", url=f"{url}/table")
    id, title, lines = await browser.document(f"{url}/redirect")
    assert (id, title) == (f"{url}/article", "The dredging of Kestrel")
    assert lines[0] == "# The dredging of Kestrel"
    assert any("Mark 12." in line for line in lines)
    assert "Crane 1" in (await call(browser, "find", text="Crane 1")).content
    with pytest.raises(ToolError, match="status 500"):
        await browser.document(f"{url}/broken")


# What it does


async def test_a_form_is_filled_and_sent(browser: Browser, url: str) -> None:
    form = await call(browser, "open", url=f"{url}/form")
    await call(browser, "type", ref=ref(form, "Name"), text="Ada")
    await call(browser, "select", ref=f"[ref={ref(form, 'Pier')}]", value="South")
    await call(browser, "click", ref=ref(form, "Urgent"))
    filled = await call(browser, "type", ref=ref(form, "Question"), text="When?\nSoon?")
    assert 'checkbox "Urgent" [checked]' in filled.content
    sent = await call(browser, "click", ref=ref(form, "Send"))
    assert [line.partition(": ")[2] for line in sent.content.split("\n")[1:]] == [
        "# Received", "name=Ada", "pier=s", "urgent=on", "text=When? Soon?",
    ]  # fmt: skip
    assert "Ask the harbour master" in (await call(browser, "back")).content


async def test_enter_submits(browser: Browser, url: str) -> None:
    form = await call(browser, "open", url=f"{url}/form")
    assert "name=Bob" in (await call(browser, "type", ref=ref(form, "Name"), text="Bob", submit=True)).content


async def test_what_cant_be_done_is_said_and_nothing_is_lost(browser: Browser, url: str) -> None:
    form = await call(browser, "open", url=f"{url}/form")
    assert "'North', 'South'" in await told(browser, "select", ref=ref(form, "Pier"), value="West")
    assert "no field to fill" in await told(browser, "type", ref=ref(form, "Urgent"), text="x")
    assert "no select field" in await told(browser, "select", ref=ref(form, "Name"), value="x")
    assert "no ref" in await told(browser, "click", ref="the button")
    assert "file to upload" in (await call(browser, "click", ref=ref(form, "Papers"))).content
    assert "Ask the harbour master" in (await call(browser, "read", cursor=1)).content


async def test_a_click_shows_what_it_changed(browser: Browser, url: str) -> None:
    page = await call(browser, "open", url=f"{url}/")
    changed = await call(browser, "click", ref=ref(page, "Tide"))
    assert shown_numbers(changed)[0] == 7
    assert "8:   The tide is high" in changed.content
    assert "nothing changed" in (await call(browser, "click", ref=ref(page, "Tide"))).content
    assert "Framed" in (await call(browser, "click", ref=ref(page, "Framed"))).content + page.content
    assert "Cranes" in (await call(browser, "click", ref=ref(page, "the table"))).content


async def test_a_ref_that_is_gone_brings_the_page_as_it_is_now(browser: Browser, url: str) -> None:
    page = await call(browser, "open", url=f"{url}/vanishing")
    await anyio.sleep(0.8)
    output = await call(browser, "click", ref=ref(page, "Old"))
    assert not output.ok
    assert "is gone: the page changed" in output.content
    assert 'button "New"' in output.content
    assert "is gone" in (await call(browser, "click", ref="f99e1")).content


async def test_dialogs_are_dismissed_and_reported(browser: Browser, url: str) -> None:
    page = await call(browser, "open", url=f"{url}/dialogs")
    for button, said, left in [
        ("Alert", "The tide is high", "alerted"),
        ("Confirm", "Sink the ship?", "confirmed: false"),
        ("Prompt", "Your name?", "name: null"),
    ]:
        output = await call(browser, "click", ref=ref(page, button))
        assert f"said {said!r} and was dismissed" in output.content
        assert f"1: {left}" in output.content


async def test_pop_ups_become_links_and_load_nothing(browser: Browser, url: str, asked: list[str]) -> None:
    page = await call(browser, "open", url=f"{url}/popup")
    before = len(asked)
    for label, target in [("Cranes in a new tab", "/table"), ("Open the article", "/article")]:
        output = await call(browser, "click", ref=ref(page, label))
        assert f"a pop-up to {url}{target} was not opened; open it with browser_open" in output.content
    assert not {"/table", "/article"} & set(asked[before:])
    assert [len(context.pages) for context in browser._session._contexts.values()].count(1) == 1


async def test_an_endless_page_grows_only_when_it_is_read_on(browser: Browser, url: str) -> None:
    assert "lines 1-31 of 31" in (await call(browser, "open", url=f"{url}/endless")).content
    assert "33: Entry 32" in (await call(browser, "read", cursor=32)).content
    assert "there is no line 100000" in await told(browser, "read", cursor=100_000)


async def test_a_screenshot_is_for_the_person(browser: Browser, url: str) -> None:
    await call(browser, "open", url=f"{url}/")
    output = await call(browser, "screenshot")
    (picture,) = output.files
    assert (picture.name, picture.media_type) == ("screenshot.png", "image/png")
    assert picture.data.startswith(b"\x89PNG")
    assert len(output.content) < 200


async def test_downloads_are_refused_unless_asked_for(browser: Browser, url: str) -> None:
    output = await call(browser, "open", url=f"{url}/download")
    assert not output.ok
    assert "refused: downloads are not allowed" in output.content
    async with Browser(allow_hosts=[url.removeprefix("http://")], downloads=True) as allowed:
        output = await call(allowed, "open", url=f"{url}/download")
        assert [(file.name, file.data) for file in output.files] == [("tides.csv", b"tide,metres\nnoon,4\n")]


async def test_kept_downloads_are_bounded_in_number_and_in_sum(url: str) -> None:
    async with Browser(allow_hosts=[url.removeprefix("http://")], downloads=True) as browser:
        for count, megabytes, kept, reason in [
            (12, 0.01, 8, "at most 8 are kept"),
            (4, 20, 3, "more than 60 MB together"),
        ]:
            page = await call(browser, "open", url=f"{url}/downloads?n={count}&mb={megabytes}")
            first = await call(browser, "click", ref=ref(page, "All"))
            assert browser._tab
            with anyio.fail_after(10):
                while browser._tab.events.downloading:
                    await anyio.sleep(0.02)
            second = await call(browser, "open", url=f"{url}/table")
            assert reason in first.content + second.content
            assert max(len(first.files), len(second.files)) <= kept


# Where it doesn't go


@pytest.mark.parametrize(
    "address",
    [
        "file:///etc/passwd",
        "FILE:///etc/passwd",
        "view-source:file:///etc/passwd",
        "view-source:http://example.org/",
        "chrome://version",
        "chrome://sandbox",
        "devtools://devtools/bundled/inspector.html",
        "about:blank",
        "data:text/html,<h1>hi</h1>",
        "javascript:alert(1)",
        "blob:http://example.org/1",
        "filesystem:http://example.org/temporary/x",
        "ftp://example.org/",
        "//example.org/",
        "http://user:word@example.org/",
        "http://example.org\\@127.0.0.1/",
        "",
    ],
)
async def test_only_web_addresses_are_opened(browser: Browser, address: str) -> None:
    await told(browser, "open", url=address)
    assert "No page is open" in await told(browser, "find", text="x") if not browser._view else True


@pytest.mark.parametrize(
    "address",
    [
        "http://127.0.0.1:{port}/",
        "http://localhost:{port}/",
        "http://[::1]:{port}/",
        "http://[::ffff:127.0.0.1]:{port}/",
        "http://2130706433:{port}/",
        "http://0x7f.1:{port}/",
        "http://0177.0.0.1:{port}/",
        "http://0.0.0.0:{port}/",
        "http://127.1:{port}/",
        "http://１２７.0.0.1:{port}/",
        "http://127.0.0.1.:{port}/",
        "https://127.0.0.1:{port}/",
        "http://169.254.169.254/latest/meta-data/",
        "http://10.0.0.1/",
    ],
)
async def test_a_private_host_is_refused_when_typed(browser: Browser, address: str) -> None:
    seen: list[str] = []
    with site(seen) as secret:
        await told(browser, "open", url=address.format(port=secret.rpartition(":")[2]))
    assert seen == []


@pytest.mark.parametrize(
    "means",
    [
        "iframe", "image", "style", "script", "fetch", "websocket", "events", "beacon", "worker", "prefetch", "webrtc",
        "open", "link", "form", "refresh", "script-location",
    ],
)  # fmt: skip
async def test_a_page_cant_reach_a_private_host(browser: Browser, url: str, means: str) -> None:
    seen: list[str] = []
    with site(seen) as secret:
        start = {"url": f"{url}/reach?by={means}&url={secret}/secret"}
        if means in ("refresh", "script-location"):
            assert "is refused" in await told(browser, "open", **start)
        else:
            page = await call(browser, "open", **start)
            assert "REACHED" not in page.content
            if means in ("open", "link", "form"):
                await call(browser, "click", ref=ref(page, "Go"))
        await anyio.sleep(0.05)
    assert seen == []


async def test_a_redirect_to_a_private_host_is_refused(browser: Browser, url: str) -> None:
    seen: list[str] = []
    with site(seen) as secret:
        assert "is refused" in await told(browser, "open", url=f"{url}/to?url={secret}/secret")
    assert seen == []
    assert "not opened here" in await told(browser, "open", url=f"{url}/to?url=file:///etc/passwd")


async def test_a_link_to_a_refused_host_leads_back(browser: Browser, url: str) -> None:
    with site() as secret:
        page = await call(browser, "open", url=f"{url}/reach?by=link&url={secret}/")
        output = await call(browser, "click", ref=ref(page, "Go"))
    assert not output.ok
    assert "is refused: the address is loopback" in output.content
    assert "# Reach by link" in output.content


@pytest.mark.parametrize(
    "means",
    [
        "iframe", "image", "style", "script", "fetch", "post", "websocket", "events", "beacon", "worker", "prefetch", "open",
        "link", "form", "refresh", "script-location",
    ],
)  # fmt: skip
async def test_a_public_page_cant_reach_the_private_host_that_is_allowed(
    both: Browser, public: str, url: str, asked: list[str], means: str
) -> None:
    start = {"url": f"{public}/reach?by={means}&url={url}/secret-{means}"}
    if means in ("refresh", "script-location"):
        with suppress(ToolError):  # or the page is shown as it was before it left for the private host
            await call(both, "open", **start)
        await anyio.sleep(0.2)
    else:
        page = await call(both, "open", **start)
        assert "REACHED" not in page.content
        if means in ("open", "link", "form"):
            page = await call(both, "click", ref=ref(page, "Go"))
        if means == "link":
            assert "pages of other sites may not reach this host; browser_open may" in page.content
    await anyio.sleep(0.05)
    assert f"/secret-{means}" not in asked


async def test_a_public_redirect_leads_to_no_allowed_private_host_unless_the_model_asks_for_it(
    both: Browser, public: str, url: str, asked: list[str]
) -> None:
    assert "browser_open may" in await told(both, "open", url=f"{public}/to?url={url}/secret-redirect")
    with pytest.raises(ToolError, match="browser_open may"):
        await both.document(f"{public}/to?url={url}/secret-redirect")
    assert "/secret-redirect" not in asked
    assert "# Kestrel harbour" in (await call(both, "open", url=url)).content
    assert "# Kestrel harbour" in (await call(both, "open", url=public)).content
    assert "# Kestrel harbour" in (await call(both, "open", url=url)).content


@pytest.mark.parametrize("means", ["link", "to", "script-location", "iframe", "popup-post"])
async def test_a_public_page_doesnt_run_with_the_rights_of_a_private_one(
    both: Browser, public: str, url: str, asked: list[str], means: str
) -> None:
    """Which it would if it was shown where a private page leads to it."""
    hostile = f"{public}/reach%3Fby%3Dpost%26url%3D{url}/secret-{means}"
    if means == "to":
        assert "lead nowhere else; open it with browser_open" in await told(both, "open", url=f"{url}/to?url={hostile}")
    elif means == "script-location":
        start = f"{url}/reach?by={means}&url={hostile}"
        assert "lead nowhere else; open it with browser_open" in await told(both, "open", url=start)
    else:
        start = (
            f"{url}/reach?by={means}&url={url}/secret-{means}"
            if "popup" in means
            else f"{url}/reach?by={means}&url={hostile}"
        )
        output = await call(both, "open", url=start)
        if means != "iframe":
            output = await call(both, "click", ref=ref(output, "Go"))
        if means == "link":
            assert "lead nowhere else; open it with browser_open" in output.content
            assert "# Reach by link" in output.content
    await anyio.sleep(0.3)
    assert f"/secret-{means}" not in asked


async def test_a_private_page_may_use_public_scripts(both: Browser, public: str, url: str) -> None:
    output = await call(both, "open", url=f"{url}/reach?by=script&url={public}/worker.js")
    assert f"{public}/worker.js" in [row["url"] for row in output.record["responses"] if row["status"] == 200]


async def test_service_workers_dont_start(browser: Browser, url: str, asked: list[str]) -> None:
    await call(browser, "open", url=f"{url}/reach?by=service-worker&url={url}")
    assert "/worker.js" not in asked


# What goes wrong


async def test_time_is_bounded_and_the_next_call_works(
    browser: Browser, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = await call(browser, "open", url=f"{url}/busy")
    monkeypatch.setattr(browser, "timeout", 2)
    started = time.monotonic()
    assert "did not answer within 2 s" in await told(browser, "click", ref=ref(page, "Hang"))
    assert "was lost" in await told(browser, "read", cursor=1)
    assert "nothing came within 1.6 s" in await told(browser, "open", url=f"{url}/hang")
    assert time.monotonic() - started < 15
    monkeypatch.undo()
    assert "# Kestrel harbour" in (await call(browser, "open", url=url)).content


@pytest.mark.parametrize("victim", ["--type=renderer", "--type=gpu-process", "--type=utility", "whole"])
async def test_after_a_crash_the_next_call_works(browser: Browser, url: str, victim: str) -> None:
    await call(browser, "open", url=url)
    inside = processes(browser)
    victims = (
        [next(iter(inside))] if victim == "whole" else [pid for pid, command in inside.items() if victim in command]
    )
    for pid in victims:
        os.kill(pid, signal.SIGKILL)
    assert await gone(victims)
    await anyio.sleep(0.1)
    if victim in ("--type=renderer", "whole"):
        assert re.search("lost: the (page crashed|browser ended)", await told(browser, "back"))
    assert "# Kestrel harbour" in (await call(browser, "open", url=url)).content


async def test_a_cancelled_call_closes_its_page_and_the_next_works(browser: Browser, url: str) -> None:
    await call(browser, "open", url=url)
    with anyio.move_on_after(0.5) as scope:
        await call(browser, "open", url=f"{url}/hang")
    assert scope.cancelled_caught
    assert "was cancelled" in await told(browser, "find", text="x")
    assert "# Kestrel harbour" in (await call(browser, "open", url=url)).content


async def test_a_page_that_eats_memory_is_stopped(url: str) -> None:
    async with Browser(allow_hosts=[url.removeprefix("http://")], memory_mb=768) as browser:
        page = await call(browser, "open", url=f"{url}/greedy")
        assert "more than 768 MB of memory" in await told(browser, "click", ref=ref(page, "Eat"))
        assert "# Kestrel harbour" in (await call(browser, "open", url=url)).content


THROW = "throw new Error('x'.repeat({}))"
FLOODS = {
    "an error": (THROW.format("1.5e7"), "at most 24 MB are taken"),
    "a huge error": (THROW.format("1e8"), "at most 24 MB are taken|over 600 MB of memory"),
    "many errors": (
        f"for (let i = 0; i < 20; i++) setTimeout(() => {{ {THROW.format('6e6')} }})",
        "of more than 96 MB within seconds|over 600 MB of memory",
    ),
    "bodies of requests": (
        "for (let i = 0; i < 20; i++) fetch('/x', {method: 'POST', body: 'x'.repeat(2e7)}).catch(() => 0)",
        "at most 24 MB are taken|over 600 MB of memory",
    ),
    "logs": (
        "for (let i = 0; i < 40; i++) setTimeout(() => console.log('x'.repeat(3e7) + i))",
        "over 600 MB of memory",
    ),
}


@pytest.mark.parametrize(
    ("code", "why"),
    [
        pytest.param(*flood, id=name, marks=[] if name == "a huge error" else pytest.mark.slow)
        for name, flood in FLOODS.items()
    ],
)
async def test_what_a_page_floods_us_with_while_nobody_looks_ends_the_browser_and_not_us(
    browser: Browser, url: str, code: str, why: str
) -> None:
    await call(browser, "open", url=url)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here on
    before = int(status(os.getpid())["VmHWM"].split()[0])
    await call(browser, "open", url=f"{url}/run?wait=500&code={quote(code)}")
    longest = 0.0
    with anyio.fail_after(60):
        while not browser._session.lost:
            started = time.monotonic()
            await anyio.sleep(0.01)
            longest = max(longest, time.monotonic() - started)
    assert longest < 1.5
    assert int(status(os.getpid())["VmHWM"].split()[0]) - before < 150_000  # kB
    assert re.search(f"was lost: .*({why})", await told(browser, "read", cursor=1))
    assert "# Kestrel harbour" in (await call(browser, "open", url=url)).content


@pytest.mark.parametrize(("sizes", "read"), [([5, MAX_MESSAGE + 1], 1), ([4] * 9, 9), ([MAX_MESSAGE] * 9, 4)])
async def test_the_drivers_messages_are_bounded_in_size_and_rate(sizes: list[int], read: int) -> None:
    ends: list[str] = []
    stream = asyncio.StreamReader(limit=1 << 16)
    messages = Messages(stream, ends.append)
    whole = 0
    for size in sizes:
        stream.feed_data(size.to_bytes(4, "little"))
        try:
            assert int.from_bytes(await messages.readexactly(4), "little") == size
        except asyncio.IncompleteReadError:
            break
        stream.feed_data(bytes(size))
        assert len(await messages.readexactly(size)) == size
        whole += 1
    assert whole == read
    assert len(ends) == (read < len(sizes))
    stream.feed_data(b"the rest")
    stream.feed_eof()
    assert await messages.read() == b""


EACH = "for (i = 0; i < 15; i++) {{ const e = document.createElement('{}'); e.{} = 'x'.repeat(1e5); document.body.append(e) }}"
HUGE = {
    "addresses": EACH.format("a", "textContent = i; e.href"),
    "labels": EACH.format("button", "ariaLabel"),
    "values": EACH.format("textarea", "value"),
    "shadows": "document.querySelector('p').attachShadow({mode: 'open'}).append('x'.repeat(2e6))",
    "frames": "const f = document.createElement('iframe'); document.body.append(f);"
    "f.contentDocument.body.append('x'.repeat(2e6))",
}


@pytest.mark.parametrize("code", HUGE.values(), ids=HUGE.keys())
async def test_what_would_make_a_snapshot_huge_is_counted_before_it(browser: Browser, url: str, code: str) -> None:
    output = await call(browser, "open", url=f"{url}/run?code={quote(code)}")
    assert "too large or too deep for refs" in output.content
    assert not browser._session.lost


@pytest.mark.parametrize(
    "code",
    [
        "document.title = 'x'.repeat(3e7)",
        "document.getElementsByTagName = () => ({length: 'x'}); Document.prototype.createTreeWalker = () => { throw 7 }",
        "Object.defineProperty(document, 'title', {get: () => 7}); String.prototype.slice = () => 'x'.repeat(3e7)",
        "document.body.innerHTML += '<img name=title><img name=createTreeWalker><form>Here<input name=attributes></form>'",
    ],
)
async def test_what_a_page_names_or_replaces_changes_nothing_for_us(browser: Browser, url: str, code: str) -> None:
    output = await call(browser, "open", url=f"{url}/run?code={quote(code)}")
    assert "Here" in output.content
    assert len(output.content) < 1500


async def test_after_the_end_of_the_driver_the_next_call_works(browser: Browser, url: str) -> None:
    await call(browser, "open", url=url)
    assert browser._session._chromium
    driver = browser._session._chromium.processes.driver
    os.kill(driver, signal.SIGKILL)
    assert await gone([driver])
    assert "driver ended unexpectedly" in await told(browser, "back")
    assert "# Kestrel harbour" in (await call(browser, "open", url=url)).content


async def test_pages_read_beside_calls_are_not_closed_by_them(browser: Browser, url: str) -> None:
    await call(browser, "open", url=url)
    read: list[str] = []

    async def document() -> None:
        read.append((await browser.document(f"{url}/table"))[1])

    async with anyio.create_task_group() as group:
        for _ in range(8):
            group.start_soon(document)
        while len(read) < 8:
            await call(browser, "find", text="harbour")
            await anyio.sleep(0)
    assert read == ["Cranes"] * 8


async def test_a_redirect_loop_ends(browser: Browser, url: str) -> None:
    assert "redirects in a circle" in await told(browser, "open", url=f"{url}/loop")


async def test_a_page_that_goes_on_loading_is_shown_so_far(browser: Browser, url: str) -> None:
    output = await call(browser, "open", url=f"{url}/drip")
    assert "still loading" in output.content
    assert "drop 3" in output.content


@pytest.mark.parametrize("path", ["/links?n=50000", "/big?mb=3", "/plain?mb=3", "/deep"])
async def test_a_huge_page_is_cut_and_says_so(browser: Browser, url: str, path: str) -> None:
    output = await call(browser, "open", url=url + path)
    assert len(output.content) <= 8000
    assert "too large or too deep for refs" in output.content or "cut after" in output.content
    assert re.search(r"link 5\b|harbour of Kestrel|down", output.content)
    if "links" in path:
        assert f"<{url}/p5>" in output.content
