"""Research on a web site: its own search finds pages, and a real browser opens them. `python site_search.py "QUESTION"`.

`Site` shows how to search anything: a class with a name, `search` and, where its documents aren't URLs to be opened,
`document`. The site here is the sample world on loopback, so the embedded mini model can do the work.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from urllib.parse import quote

import anyio
import httpx
from thinkloop.tools.browser import Browser
from thinkloop.tools.corpus import Document, Hit
from world_site import world_site

import thinkloop as tl


class Site:
    """A site whose pages are known by name, as a source for `Search`."""

    name = "site"

    def __init__(self, url: str, browser: Browser) -> None:
        self.url, self.browser = url, browser

    async def search(self, query: str, limit: int) -> Sequence[Hit]:
        async with httpx.AsyncClient() as client:
            reply = await client.get(f"{self.url}/search", params={"q": query, "format": "json"})
        return [Hit(f"{row['title']}.md", row["title"], 1, row["content"]) for row in reply.json()["results"][:limit]]

    async def document(self, id: str) -> Document:
        name = id.removesuffix(".md")
        _, title, lines = await self.browser.document(f"{self.url}/page/{quote(name)}")
        return Document(id, title, lines)


async def main(task: str) -> None:
    with world_site() as url:
        async with Browser(allow_hosts=[url.removeprefix("http://")]) as browser:
            tools = [tl.Search(Site(url, browser)), tl.Python()]
            async with tl.Agent(model="mini", tools=tools, limits=tl.Limits(steps=20)) as agent:
                result = await agent.run(task)
    print(f"{result.answer} ({result.reason} after {result.steps} steps; read {', '.join(result.sources)})")


if __name__ == "__main__":
    question = "What is Mekres's area divided by Resnir's area, to two decimals?"
    anyio.run(main, sys.argv[1] if len(sys.argv) > 1 else question)
