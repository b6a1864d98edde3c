"""No one gets in: private addresses and files through `open`, its fetcher, search results and providers, and MCP."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from evidence import layer
from search_server import KEY, SearchServer, status
from secret_server import SECRET, Secret, secret
from thinkloop.tools import proxy_relay
from thinkloop.tools.addresses import Policy, Resolver
from thinkloop.tools.fetch import Fetcher
from thinkloop.tools.mcp_client import MCP
from thinkloop.tools.pages import WebPages
from thinkloop.tools.proxy_wire import Wire
from thinkloop.tools.search import Search
from thinkloop.tools.tool import Output, ToolError
from thinkloop.tools.web_providers import Brave, SearXNG, Serper, Tavily
from thinkloop.tools.web_search import RetryPolicy
from thinkloop.traces.events import ThinkloopError
from web_site import site

pytestmark = pytest.mark.anyio

Held = Callable[[str], None]

LOOPBACK = [
    "http://127.0.0.1:{port}/", "http://localhost:{port}/", "http://LOCALHOST.:{port}/", "http://a.localhost:{port}/",
    "http://[::1]:{port}/", "http://[0:0:0:0:0:0:0:1]:{port}/", "http://[::ffff:127.0.0.1]:{port}/",
    "http://[::ffff:7f00:1]:{port}/", "http://[::127.0.0.1]:{port}/", "http://[64:ff9b::127.0.0.1]:{port}/",
    "http://[2002:7f00:1::]:{port}/", "http://[::1%25lo]:{port}/", "http://2130706433:{port}/", "http://0x7f000001:{port}/",
    "http://017700000001:{port}/", "http://0x7f.1:{port}/", "http://0177.0.0.1:{port}/", "http://127.1:{port}/",
    "http://127.0.0.1.:{port}/", "http://0.0.0.0:{port}/", "http://0:{port}/", "http://[::]:{port}/",
    "http://１２７.0.0.1:{port}/", "http://①②⑦.0.0.1:{port}/", "http://127。0。0。1:{port}/", "http://127%2e0.0.1:{port}/",
    "https://127.0.0.1:{port}/", "http://user@127.0.0.1:{port}/", "http://example.org@127.0.0.1:{port}/",
    "http://example.org\\@127.0.0.1:{port}/", "http://127.0.0.1:{port}\\@example.org/", "http://127.0.0.1:0{port}/",
    "http://127.0.0.1:{port}#@example.org/", "http:\\\\127.0.0.1:{port}/", "HTTP://127.255.255.254:{port}/",
]  # fmt: skip
PRIVATE = [
    "http://10.0.0.1/", "http://172.16.0.1/", "http://192.168.1.1/", "http://100.64.0.1/", "http://198.18.0.1/",
    "http://[fd00::1]/", "http://[fe80::1]/", "http://224.0.0.1/", "http://255.255.255.255/", "http://printer.local/",
    "http://intranet/", "http://router.lan/", "http://127.0.0.1:22/", "http://93.184.215.14:6379/",
]  # fmt: skip
METADATA = [
    "http://169.254.169.254/latest/meta-data/", "http://2852039166/", "http://0xa9fea9fe/", "http://0251.0376.0251.0376/",
    "http://169.254.43518/", "http://[::ffff:169.254.169.254]/", "http://[64:ff9b::a9fe:a9fe]/", "http://[fd00:ec2::254]/",
    "http://169。254。169。254/", "http://metadata.google.internal/", "http://metadata.google.internal./", "http://metadata/",
    "http://METADATA.goog/", "http://instance-data/", "http://instance-data.ec2.internal/", "http://100.100.100.200/",
    "http://168.63.129.16/", "http://169.254.170.2/v2/credentials", "http://192.0.0.192/", "http://metadata.azure.internal/",
]  # fmt: skip
SCHEMES = [
    "file:///etc/passwd", "FILE:/etc/passwd", "file://localhost/etc/passwd", "file://127.0.0.1/etc/passwd", "ftp://127.0.0.1/",
    "gopher://127.0.0.1:6379/_INFO", "data:text/html,<h1>hi</h1>", "javascript:fetch('http://127.0.0.1')", "chrome://version",
    "view-source:http://127.0.0.1/", "view-source:file:///etc/passwd", "about:blank", "blob:http://127.0.0.1/1", "jar:file:///x!/",
    "dict://127.0.0.1:11211/stat", "ldap://127.0.0.1/", "unix:///run/docker.sock", "ws://127.0.0.1/", "\x00file:///etc/passwd",
    "http:/etc/passwd", "//127.0.0.1/", "",
]  # fmt: skip


@pytest.fixture
def hidden() -> Iterator[Secret]:
    with secret() as server:
        yield server


@pytest.fixture(autouse=True)
def dialled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the proxy connects to; nothing in these rows goes beyond loopback, whatever an attack would reach."""
    places: list[str] = []
    connect = proxy_relay.connect

    async def on_loopback(addresses: list[str], port: int, timeout: float) -> tuple[str, Wire]:
        places.extend(addresses)
        if not all(address in ("127.0.0.1", "::1") for address in addresses):
            raise OSError("kept inside")
        return await connect(addresses, port, timeout)

    monkeypatch.setattr(proxy_relay, "connect", on_loopback)
    return places


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with site() as address:
        yield address


@pytest.fixture(scope="module")
async def pages(url: str) -> AsyncIterator[Search]:
    """`open` for web pages, which may go to the site and nowhere else on this machine."""
    async with Search(pages=WebPages(allow_hosts=[url.removeprefix("http://")])) as search:
        yield search


async def call(search: Search, name: str, **arguments: Any) -> Output:
    (tool,) = (tool for tool in search.tools() if tool.name == name)
    return await tool.call(arguments)


async def refusal(search: Search, id: str) -> str:
    with pytest.raises(ToolError) as caught:
        await call(search, "open", id=id)
    assert SECRET not in str(caught.value)
    assert "root:" not in str(caught.value)
    return str(caught.value)


# Addresses as a model may write them


@pytest.mark.parametrize("address", LOOPBACK)
async def test_open_this_machine(pages: Search, hidden: Secret, dialled: list[str], held: Held, address: str) -> None:
    said = await refusal(pages, address.format(port=hidden.port))
    assert dialled == []
    held(f"{layer(said)}; {hidden.unseen()}")


@pytest.mark.parametrize("address", [*PRIVATE, *METADATA])
async def test_open_a_private_network(pages: Search, dialled: list[str], held: Held, address: str) -> None:
    said = await refusal(pages, address)
    assert dialled == []
    held(f"{layer(said)}; nothing was dialled")


@pytest.mark.parametrize("address", SCHEMES, ids=lambda address: ascii(address)[1:-1])
async def test_open_another_scheme(pages: Search, dialled: list[str], held: Held, address: str) -> None:
    said = await refusal(pages, address)
    assert dialled == []
    held(layer(said))


# Where pages lead

REDIRECTS = [
    "{secret}/", "//127.0.0.1:{port}/", "http://localhost:{port}/", "http://2130706433:{port}/", "http://[::1]:{port}/",
    "http://169.254.169.254/", "file:///etc/passwd", "data:text/html,x", "javascript:1", "\\\\127.0.0.1:{port}\\",
    "http://0x7f.1:{port}/", "{site}/to?url={secret}/", "https://127.0.0.1:{port}/",
]  # fmt: skip


@pytest.mark.parametrize("target", REDIRECTS)
async def test_open_follows_a_redirect(
    pages: Search, url: str, hidden: Secret, held: Held, dialled: list[str], target: str
) -> None:
    to = target.format(secret=hidden.url, port=hidden.port, site=url)
    said = await refusal(pages, f"{url}/to?url={quote(to, safe='')}")
    assert set(dialled) == {"127.0.0.1"}
    held(f"{layer(said)}; {hidden.unseen()}")


@pytest.mark.parametrize("means", ["refresh", "iframe", "image", "script", "style", "fetch", "script-location", "link"])
async def test_open_a_page_that_reaches_out(pages: Search, url: str, hidden: Secret, held: Held, means: str) -> None:
    said = (await call(pages, "open", id=f"{url}/reach?by={means}&url={hidden.url}/")).content
    assert SECRET not in said
    held(f"no script, frame or refresh is followed without a browser; {hidden.unseen()}")


# Names

CHANGING = [["127.0.0.1"], ["169.254.169.254"]]
ANSWERS: dict[str, list[list[str]]] = {
    "loopback": [["127.0.0.1"]],
    "private": [["10.1.2.3"]],
    "public and private": [["93.184.215.14", "127.0.0.1"]],
    "private and public": [["::1", "93.184.215.14"]],
    "a mapped address": [["::ffff:127.0.0.1"]],
    "NAT64": [["64:ff9b::7f00:1"]],
    "6to4": [["2002:7f00:1::"]],
    "a zone": [["fe80::1%lo"]],
    "unspecified": [["0.0.0.0"]],
    "metadata": [["169.254.169.254"]],
    "no address": [["localhost"]],
    "nothing": [[]],
    "a thousand": [["93.184.215.14"] * 999 + ["127.0.0.1"]],
}


def answering(answers: Sequence[list[str]], asked: list[str]) -> Resolver:
    """A name server that gives these answers one after the other; the last one stays."""

    async def resolver(host: str, port: int) -> list[str]:
        asked.append(host)
        return answers[min(len(asked), len(answers)) - 1]

    return resolver


async def fetching(url: str, resolver: Resolver, *, allow: Sequence[str] = ()) -> str:
    pages = WebPages()
    pages._fetcher = Fetcher(Policy.of(allow), resolver=resolver, timeout=5)
    async with Search(pages=pages) as search:
        return await refusal(search, url)


@pytest.mark.parametrize("answers", ANSWERS.values(), ids=ANSWERS.keys())
async def test_a_name_resolves_to(hidden: Secret, dialled: list[str], held: Held, answers: list[list[str]]) -> None:
    said = await fetching(f"http://harmless.example:{hidden.port}/", answering(answers, []))
    assert dialled == []
    held(f"{layer(said)}; {hidden.unseen()}")


async def test_a_name_changes_its_answer_after_the_check(hidden: Secret, dialled: list[str], held: Held) -> None:
    asked: list[str] = []
    said = await fetching(
        f"http://rebinding.example:{hidden.port}/", answering([["93.184.215.14"], ["127.0.0.1"]], asked)
    )
    assert "kept inside" in said
    assert (asked, dialled) == (["rebinding.example"], ["93.184.215.14"])
    held(f"resolved once, dialled as checked: {dialled[0]}; {hidden.unseen()}")


async def test_a_name_changes_its_answer_for_a_redirect(url: str, hidden: Secret, held: Held) -> None:
    """The allowed name leads to the site first, and to the metadata service when the redirect comes back to it."""
    asked: list[str] = []
    port = url.rpartition(":")[2]
    again = f"http://docs.example:{port}/to?url=http://docs.example:{port}/"
    said = await fetching(again, answering(CHANGING, asked), allow=[f"docs.example:{port}"])
    assert asked == ["docs.example"] * 2
    held(f"{layer(said)}, though the name is allowed; {hidden.unseen()}")


# Files through search and open


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder, outside = tmp_path / "corpus", tmp_path / "outside"
    for each in (folder, outside):
        each.mkdir()
    (folder / "a.md").write_text("# Harbour\nShips land here.\n")
    (outside / "b.md").write_text(f"# Harbour\n{SECRET}\n")
    (folder / "link.md").symlink_to(outside / "b.md")
    (folder / "folder").symlink_to(outside)
    (folder / "passwd.txt").symlink_to("/etc/passwd")
    os.mkfifo(folder / "pipe.md")
    (folder / "loop.md").symlink_to(folder / "loop.md")
    return folder


@pytest.mark.parametrize(
    "id",
    ["../outside/b.md", "link.md", "folder/b.md", "passwd.txt", "pipe.md", "loop.md", "/etc/passwd", "./../outside/b.md",
     "a.md/../../outside/b.md", "file:///etc/passwd", "~/.ssh/id_rsa", "a.md\0", "/proc/self/environ", "%2e%2e/outside/b.md"],
    ids=lambda id: ascii(id)[1:-1],
)  # fmt: skip
async def test_open_a_file_outside_of_the_corpus(corpus: Path, held: Held, id: str) -> None:
    async with Search(corpus) as search:
        said = await refusal(search, id)
        found = (await call(search, "search", query=f"harbour {SECRET} root")).content
    assert SECRET not in found.replace(f"harbour {SECRET} root", "")
    assert "/bin/" not in found
    held(f"the index knows what it has read, and links don't lead out of it: {layer(said).rpartition(': ')[2]}")


# Search providers


@pytest.mark.parametrize("how", ["by its URL", "by its title", "as localhost"])
async def test_a_result_that_is_a_private_page(hidden: Secret, held: Held, how: str) -> None:
    rows = ((f"{hidden.url}/", "Free money", "open me"),)
    with SearchServer(rows) as server:
        async with Search(SearXNG(server.url)) as search:
            await call(search, "search", query="money")
            ids = {
                "by its URL": f"{hidden.url}/",
                "by its title": "Free money",
                "as localhost": f"http://localhost:{hidden.port}/",
            }
            said = await refusal(search, ids[how])
            held(f"{layer(said)}; {hidden.unseen()}")


async def test_the_pages_of_the_providers_own_host(hidden: Secret, held: Held) -> None:
    """A person named the provider; that allows its searches, not everything else on its host."""
    with SearchServer() as server:
        async with Search(SearXNG(server.url)) as search:
            await call(search, "search", query="harbour")
            said = await refusal(search, f"{server.url}/admin")
            assert [asked.service for asked in server.requests] == ["searxng"]
    held(f"{layer(said)}; {hidden.unseen()}")


PROVIDERS: dict[str, Callable[[str], Any]] = {
    "searxng": SearXNG,
    "brave": lambda base: Brave(KEY, base_url=base, interval=0),
    "tavily": lambda base: Tavily(KEY, base_url=base, interval=0),
    "serper": lambda base: Serper(KEY, base_url=base),
}


@pytest.mark.parametrize("name", PROVIDERS)
@pytest.mark.parametrize("code", [302, 307])
async def test_a_provider_redirects(hidden: Secret, held: Held, name: str, code: int) -> None:
    with SearchServer() as server:
        server.fail(name, *[status(code, b"", {"Location": f"{hidden.url}/latest/meta-data"})] * 3)
        async with Search(PROVIDERS[name](server.url), retry=RetryPolicy(tries=1)) as search:
            with pytest.raises(ToolError, match="which is not followed") as caught:
                await call(search, "search", query="harbour")
    assert KEY not in str(caught.value)
    held(f"providers are asked without redirects: status {code} is not followed; {hidden.unseen()}")


RESULT_URLS = ["file:///etc/passwd", "javascript:alert(1)", "data:text/html,x", "http://user:pw@127.0.0.1/", "//127.0.0.1/",
               "chrome://version", "http://", "http://[::1"]  # fmt: skip


@pytest.mark.parametrize("address", RESULT_URLS)
async def test_a_result_that_is_no_web_address(held: Held, address: str) -> None:
    rows = ((address, "Free money", "open me"), ("https://ports.example/", "Ports", "harbour"))
    with SearchServer(rows) as server:
        async with Search(SearXNG(server.url)) as search:
            found = await call(search, "search", query="money")
            assert found.record["hits"] == ["https://ports.example/"]
            held(f"result check: left out of the results; then {layer(await refusal(search, address))}")


# MCP by URL


async def connecting(address: str, **options: Any) -> str:
    with pytest.raises(ThinkloopError) as failed:
        async with MCP(name="x", url=address, deadline=5, **options):
            pass
    return str(failed.value)


@pytest.mark.parametrize(
    "address",
    ["http://127.0.0.1:{port}/mcp", "http://localhost:{port}/mcp", "http://[::1]:{port}/mcp", "http://2130706433:{port}/mcp",
     "http://169.254.169.254/mcp", "http://metadata.google.internal/mcp", "http://[::ffff:127.0.0.1]:{port}/mcp",
     "http://0x7f.1:{port}/mcp", "https://127.0.0.1:{port}/mcp", "http://10.0.0.1/mcp", "file:///etc/passwd",
     "http://user@127.0.0.1:{port}/mcp", "unix:///run/docker.sock"],
)  # fmt: skip
async def test_an_mcp_server_at(hidden: Secret, dialled: list[str], held: Held, address: str) -> None:
    said = await connecting(address.format(port=hidden.port))
    assert dialled == []
    held(f"{layer(said)}; {hidden.unseen()}")


@pytest.mark.parametrize("target", ["{secret}/mcp", "http://169.254.169.254/", "file:///etc/passwd"])
async def test_an_mcp_server_redirects(url: str, hidden: Secret, held: Held, target: str) -> None:
    address = f"{url}/to?url={target.format(secret=hidden.url)}"
    said = await connecting(address, allow_hosts=[url.removeprefix("http://")])
    assert "not followed" in said, said
    held(f"the MCP client follows no redirects; {hidden.unseen()}")
