"""What the browser's rows share: calls as a model makes them, and the places that the proxy dialled."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import pytest
from thinkloop.tools import browser_page, browser_session, proxy_relay
from thinkloop.tools.browser import Browser
from thinkloop.tools.proxy import Proxy
from thinkloop.tools.proxy_wire import Wire
from thinkloop.tools.tool import Output, ToolError


async def call(browser: Browser, name: str, **arguments: Any) -> Output:
    (tool,) = (tool for tool in browser.tools() if tool.name == f"browser_{name}")
    return await tool.call(arguments)


async def said(browser: Browser, name: str, **arguments: Any) -> str:
    """What the model is told, as a result or as an error."""
    try:
        return (await call(browser, name, **arguments)).content
    except ToolError as error:
        return f"error: {error}"


def ref(page: str, label: str) -> str:
    """The ref of the element with this label."""
    match = re.search(rf'"{label}"(?: \[[a-z]+\])* \[ref=(\w+)\]', page)
    assert match, page
    return match[1]


@asynccontextmanager
async def guarded_browser(
    allow: Sequence[str], dialled: list[str], names: Mapping[str, Sequence[str]], **options: Any
) -> AsyncIterator[Browser]:
    """A browser whose proxy asks `names` instead of a name server, notes what it dials, and dials loopback alone."""
    connect = proxy_relay.connect

    async def resolver(host: str, port: int) -> Sequence[str]:
        if host not in names:
            raise OSError("Name or service not known")
        return names[host]

    async def on_loopback(addresses: list[str], port: int, timeout: float) -> tuple[str, Wire]:
        dialled.extend(f"{address}:{port}" for address in addresses)
        if not all(address in ("127.0.0.1", "::1") for address in addresses):
            raise OSError("kept inside")
        return await connect(addresses, port, timeout)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(proxy_relay, "connect", on_loopback)
        patch.setattr(browser_page, "_SETTLE", 0.6)  # not 3 s for every page that never comes to rest
        patch.setattr(
            browser_page, "SNAPSHOT_SECONDS", 2.0
        )  # not 6 s for every page that doesn't let itself be looked at
        patch.setattr(browser_session, "Proxy", partial(Proxy, resolver=resolver))
        async with Browser(allow_hosts=allow, **options) as browser:
            yield browser
