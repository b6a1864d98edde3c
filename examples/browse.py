"""The browser tool by hand: open a page, look for something, click. `python browse.py URL TEXT`; without arguments a page
of the sample world, served on loopback.

Every call gives what a model would read. Private addresses are refused unless they are allowed by name.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from urllib.parse import urlsplit

import anyio
from thinkloop.tools.browser import Browser
from world_site import world_site

import thinkloop as tl


async def main(url: str, text: str, allow: list[str]) -> None:
    async with Browser(allow_hosts=allow) as browser:
        tools = {tool.name: tool for tool in browser.tools()}
        for name, arguments in (
            ("browser_open", {"url": url}),
            ("browser_find", {"text": text}),
            ("browser_screenshot", {}),
            ("browser_open", {"url": "http://169.254.169.254/latest/meta-data"}),
        ):
            print(f"→ {name} {arguments}")
            try:
                output = await tools[name].call(arguments)
            except tl.ToolError as refusal:
                print(f"refused: {refusal}")
            else:
                print(output.content, *(f"[{file.name}: {len(file.data):,} bytes]" for file in output.files), sep="\n")


if __name__ == "__main__":
    with world_site() if len(sys.argv) < 3 else nullcontext("") as site:
        url, text = sys.argv[1:3] if len(sys.argv) > 2 else (f"{site}/page/Mekres", "governor")
        anyio.run(main, url, text, [urlsplit(url).netloc] if site else [])
