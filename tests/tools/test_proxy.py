"""The proxy connects to checked addresses only, refuses with a reason, and nothing makes it hang, leak or be fooled."""

from __future__ import annotations

import asyncio
import contextlib
import re
from base64 import b64decode, b64encode
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import anyio
import h11
import httpx
import pytest
from raw_server import Handler, Server, fixed, redirect, response, serving
from thinkloop.tools.addresses import Policy
from thinkloop.tools.proxy import Exchange, Proxy
from thinkloop.traces.events import ThinkloopError

pytestmark = pytest.mark.anyio

SECRET = response(b"the secret")


def authorization(proxy: Proxy) -> bytes:
    parts = urlsplit(proxy.url)
    return b64encode(f"{parts.username}:{parts.password}".encode())


def port_of(proxy: Proxy) -> int:
    port = urlsplit(proxy.url).port
    assert port
    return port


async def ask(proxy: Proxy, head: str | bytes, body: bytes = b"", *, authorized: bool = True) -> bytes:
    """What the proxy answers to raw bytes, until it closes. A line of the head ends with \\n."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port_of(proxy))
    lines = head.encode("latin-1") if isinstance(head, str) else head
    token = b"Proxy-Authorization: Basic " + authorization(proxy) + b"\n" if authorized else b""
    with contextlib.suppress(OSError):
        writer.write((lines.rstrip(b"\n") + b"\n" + token + b"\n").replace(b"\n", b"\r\n") + body)
        await writer.drain()
    answer = b""
    with anyio.fail_after(10), contextlib.suppress(OSError):
        while data := await reader.read(65536):
            answer += data
    writer.transport.abort()
    return answer


async def get(proxy: Proxy, url: str, **headers: str) -> bytes:
    lines = "".join(f"{name.replace('_', '-')}: {value}\n" for name, value in headers.items())
    return await ask(proxy, f"GET {url} HTTP/1.1\nHost: {urlsplit(url).netloc}\n{lines}")


def status(answer: bytes) -> int:
    found = re.match(rb"HTTP/1\.1 (\d{3}) ", answer)
    assert found, answer[:200]
    return int(found[1])


async def until(condition: Callable[[], object]) -> None:
    with anyio.fail_after(5):
        while not condition():
            await anyio.sleep(0.01)


def open_sockets() -> int:
    count = 0
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # the folder lists the descriptor it was read through
            count += str(entry.readlink()).startswith("socket:")
    return count


@pytest.fixture
async def secret() -> AsyncIterator[Server]:
    async with serving(fixed(SECRET)) as server:
        yield server


@pytest.fixture
async def proxy() -> AsyncIterator[Proxy]:
    async with Proxy(timeout=2) as running:
        yield running


# What works


async def test_a_page_comes_through_as_the_server_sent_it() -> None:
    async with serving(fixed(response(b"hello", headers=("X-Kept: 1",)))) as server:
        heard: list[Exchange] = []
        async with Proxy(Policy.of((server.host,)), on_exchange=heard.append) as proxy:
            answer = await ask(
                proxy,
                f"GET {server.url}a/../b?c=d#e HTTP/1.1\nHost: other.example\nX-Mine: 1\nX-Hop: 1\nTE: trailers\n"
                "Connection: X-Hop, close\nProxy-Connection: keep-alive\nKeep-Alive: 5\n",
            )
        assert answer.endswith(b"\r\n\r\nhello")
        assert b"X-Kept: 1" in answer
        assert server.heads == [
            f"GET /a/../b?c=d HTTP/1.1\r\nHost: {server.host}\r\nX-Mine: 1\r\nConnection: close\r\n\r\n".encode()
        ]
        (exchange,) = heard
        assert exchange == proxy.exchanges[0]
        assert (exchange.method, exchange.address, exchange.status, exchange.refused) == ("GET", "127.0.0.1", 200, "")
        assert exchange.url_or_host == f"{server.url}a/../b?c=d#e"
        assert exchange.bytes > 5
        assert 0 < exchange.seconds < 2


async def test_httpx_goes_through_it_with_bodies_both_ways() -> None:
    async def echo(head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert b"Transfer-Encoding: chunked" in head
        body = await reader.readuntil(b"0\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + body)

    async def chunks() -> AsyncIterator[bytes]:
        yield b"a" * 100_000
        yield b"b" * 100_000

    async with (
        serving(echo) as server,
        Proxy(Policy.of((server.host,))) as proxy,
        httpx.AsyncClient(proxy=proxy.url, trust_env=False) as client,
    ):
        answer = await client.post(server.url, content=chunks())
    assert answer.content == b"a" * 100_000 + b"b" * 100_000


@pytest.mark.parametrize(
    ("method", "raw", "body"),
    [
        ("HEAD", b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n", b""),
        ("GET", b"HTTP/1.1 204 No Content\r\n\r\n", b""),
        ("GET", b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\n\r\n" + response(b"late"), b"late"),
        ("GET", b"HTTP/1.0 200 OK\r\n\r\nuntil the end", b"until the end"),
        ("OPTIONS", response(b"fine"), b"fine"),
        ("GET", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nX: trailer\r\n\r\n", b"abc"),
    ],
)
async def test_each_way_to_end_a_response(method: str, raw: bytes, body: bytes) -> None:
    async with (
        serving(fixed(raw)) as server,
        Proxy(Policy.of((server.host,))) as proxy,
        httpx.AsyncClient(proxy=proxy.url, trust_env=False) as client,
    ):
        answer = await client.request(method, server.url)
        assert answer.content == body


async def test_a_client_that_waits_for_100_gets_it() -> None:
    async def upload(head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert b"expect" not in head.lower()
        writer.write(response(await reader.readexactly(4)))

    async with serving(upload) as server, Proxy(Policy.of((server.host,))) as proxy:
        reader, writer = await asyncio.open_connection("127.0.0.1", port_of(proxy))
        writer.write(
            f"POST {server.url} HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\nExpect: 100-continue\r\n"
            f"Proxy-Authorization: Basic {authorization(proxy).decode()}\r\n\r\n".encode()
        )
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 \r\n\r\n"
        writer.write(b"body")
        assert (await reader.read()).endswith(b"body")
        writer.close()


async def test_the_unix_socket_needs_no_token_and_goes_away(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir(mode=0o700)
    path = folder / "proxy.sock"
    async with serving(fixed(response(b"hello"))) as server:
        async with Proxy(Policy.of((server.host,)), unix_socket=path) as proxy:
            assert status(await get(proxy, server.url)) == 200
            reader, writer = await asyncio.open_unix_connection(path)
            writer.write(f"GET {server.url} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            assert (await reader.read()).endswith(b"hello")
            writer.close()
        assert not path.exists()


async def test_a_unix_socket_that_everyone_could_use_is_refused() -> None:
    with pytest.raises(ThinkloopError, match="open to every user"):
        async with Proxy(unix_socket=Path("/tmp/thinkloop-proxy-open.sock")):
            pass


async def test_it_can_be_entered_and_left_by_different_tasks() -> None:
    proxy = Proxy()
    await asyncio.create_task(proxy.__aenter__())
    assert status(await get(proxy, "http://10.0.0.1/")) == 403
    await asyncio.create_task(proxy.__aexit__())
    with pytest.raises(ThinkloopError, match="isn't running"):
        _ = proxy.url


# Who may ask


@pytest.mark.parametrize(
    "header", ["", "Basic !", "Basic dGhpbmtsb29wOng=", "Bearer x", "Basic", "basic " + "A" * 5000]
)
async def test_without_the_token_nothing_is_served(proxy: Proxy, secret: Server, header: str) -> None:
    line = f"Proxy-Authorization: {header}\n" if header else ""
    for request in (f"GET {secret.url} HTTP/1.1", f"CONNECT {secret.host} HTTP/1.1"):
        answer = await ask(proxy, f"{request}\nHost: x\n{line}", authorized=False)
        assert status(answer) == 407
        assert b"Proxy-Authenticate: Basic" in answer
    assert secret.heads == []
    assert proxy.exchanges == []


async def test_two_tokens_are_none(proxy: Proxy) -> None:
    line = f"Proxy-Authorization: Basic {authorization(proxy).decode()}\n"
    assert status(await ask(proxy, f"GET http://a.example/ HTTP/1.1\nHost: x\n{line}")) == 407


async def test_the_token_is_random_and_never_passed_on() -> None:
    async with serving(fixed(response())) as server, Proxy(Policy.of((server.host,))) as one, Proxy() as other:
        assert one.url.split("@")[0] != other.url.split("@")[0]
        assert len(b64decode(authorization(one))) > 40
        await get(one, server.url)
        assert b"authorization" not in server.heads[0].lower()


# Where it doesn't go


@pytest.mark.parametrize(
    "host",
    [
        *(
            "127.0.0.1",
            "localhost",
            "127.1",
            "2130706433",
            "0x7f.1",
            "0177.0.0.1",
            "0.0.0.0",
            "127.0.0.1.",
            "localhost.",
        ),
        *("[::1]", "[::ffff:127.0.0.1]", "[::]", "[::127.0.0.1]", "[64:ff9b::7f00:1]", "[::1%lo]", "127%2e0.0.1"),
    ],
)
async def test_a_server_on_this_machine_is_out_of_reach(proxy: Proxy, secret: Server, host: str) -> None:
    plain = await get(proxy, f"http://{host}:{secret.port}/")
    tunnel = await ask(proxy, f"CONNECT {host}:{secret.port} HTTP/1.1\nHost: x\n")
    assert (status(plain), status(tunnel)) == (403, 403)
    assert b"Content-Type: text/plain" in plain
    assert b"Proxy-Status: thinkloop" in plain
    assert secret.heads == []
    assert [exchange.status for exchange in proxy.exchanges] == [403, 403]
    assert all(exchange.refused and not exchange.address for exchange in proxy.exchanges)


async def test_neither_is_it_over_ipv6() -> None:
    try:
        async with serving(fixed(SECRET), host="::1") as secret, Proxy() as proxy:
            for host in ("[::1]", "localhost", "[0:0:0:0:0:0:0:1]"):
                assert status(await get(proxy, f"http://{host}:{secret.port}/")) == 403
            assert secret.heads == []
    except OSError:
        pytest.skip("no IPv6 on loopback")


async def test_a_tunnel_to_443_is_judged_by_address_too(proxy: Proxy) -> None:
    for host in ("127.0.0.1", "localhost", "[::1]", "169.254.169.254", "10.0.0.1", "[::ffff:10.0.0.1]"):
        answer = await ask(proxy, f"CONNECT {host}:443 HTTP/1.1\nHost: x\n")
        assert status(answer) == 403
        assert b"--allow-host" in answer


async def test_a_redirect_leads_no_further_than_a_link(secret: Server) -> None:
    async with (
        serving(fixed(redirect(secret.url))) as server,
        Proxy(Policy.of((server.host,))) as proxy,
        httpx.AsyncClient(proxy=proxy.url, trust_env=False, follow_redirects=True) as client,
    ):
        answer = await client.get(server.url)
    assert answer.status_code == 403
    assert f"--allow-host {secret.host}" in answer.text
    assert secret.heads == []


async def test_a_name_that_changes_its_answer_is_asked_once() -> None:
    answers = [["127.0.0.1"], ["127.0.0.2"], ["10.0.0.1"]]
    asked: list[str] = []

    async def rebinding(host: str, port: int) -> list[str]:
        asked.append(host)
        return answers[len(asked) - 1]

    async with (
        serving(fixed(response(b"public"))) as server,
        serving(fixed(SECRET), host="127.0.0.2", port=server.port) as secret,
        Proxy(Policy.of((f"rebind.example:{server.port}",)), resolver=rebinding) as proxy,
    ):
        answer = await get(proxy, f"http://rebind.example:{server.port}/")
        assert answer.endswith(b"public")
        assert asked == ["rebind.example"]
        assert secret.heads == []


async def test_a_name_with_a_private_address_among_public_ones_is_refused(secret: Server) -> None:
    async def mixed(host: str, port: int) -> list[str]:
        return ["93.184.215.14", "127.0.0.1"]

    async with Proxy(resolver=mixed) as proxy:
        answer = await get(proxy, f"http://evil.example:{secret.port}/")
    assert status(answer) == 403
    assert b"evil.example resolves to 127.0.0.1" in answer
    assert secret.heads == []


@pytest.mark.parametrize(
    "target",
    [
        *(
            "/",
            "*",
            "https://a.example/",
            "ftp://a.example/",
            "file:///etc/passwd",
            "http://u:p@a.example/",
            "http:///x",
        ),
        *(
            "a.example",
            "http://a.example:22/",
            "http://a.example:x/",
            "http://a\\b/",
            "chrome://version",
            "ws://a.example/",
        ),
    ],
)
async def test_only_plain_http_urls_are_fetched(proxy: Proxy, target: str) -> None:
    assert status(await ask(proxy, f"GET {target} HTTP/1.1\nHost: a.example\n")) == 403


@pytest.mark.parametrize(
    "target", ["a.example", "a.example:80", "a.example:22", "a.example:0", "http://a.example/", ":443"]
)
async def test_only_https_ports_are_tunnelled_to(proxy: Proxy, target: str) -> None:
    assert status(await ask(proxy, f"CONNECT {target} HTTP/1.1\nHost: x\n")) == 403


@pytest.mark.parametrize("method", ["TRACE", "PROPFIND", "DEBUG", "get"])
async def test_odd_methods_are_refused(proxy: Proxy, secret: Server, method: str) -> None:
    async with Proxy(Policy.of((secret.host,))) as open_proxy:
        assert status(await ask(open_proxy, f"{method} {secret.url} HTTP/1.1\nHost: x\n")) == 403
    assert secret.heads == []


async def test_websockets_are_refused() -> None:
    async with serving(fixed(SECRET)) as server, Proxy(Policy.of((server.host,))) as proxy:
        answer = await get(proxy, server.url, Connection="Upgrade", Upgrade="websocket", Sec_WebSocket_Version="13")
        assert status(answer) == 403
        assert server.heads == []
        assert status(await get(proxy, server.url, Connection="Upgrade", Upgrade="h2c")) == 200
        assert b"upgrade" not in server.heads[0].lower()


async def test_what_a_browser_calls_for_itself_is_refused_quietly(proxy: Proxy) -> None:
    for host in ("update.googleapis.com", "accounts.google.com", "clients2.google.com", "redirector.gvt1.com"):
        assert status(await ask(proxy, f"CONNECT {host}:443 HTTP/1.1\nHost: x\n")) == 403
        assert status(await get(proxy, f"http://{host}/")) == 403
    assert proxy.exchanges == []


async def test_a_name_that_does_not_exist_is_502(proxy: Proxy) -> None:
    answer = await get(proxy, "http://nowhere.invalid/")
    assert status(answer) == 502
    assert b"nowhere.invalid can't be found" in answer


# Requests made to confuse


@pytest.mark.parametrize(
    "lines",
    [
        "Content-Length: 5\nTransfer-Encoding: chunked",
        "Content-Length: 5\nContent-Length: 6",
        "Content-Length: 5, 6",
        "Content-Length: -1",
        "Content-Length: +5",
        "Content-Length: 0x5",
        "Transfer-Encoding: chunked\nTransfer-Encoding: chunked",
        "Transfer-Encoding: identity",
        "Transfer-Encoding: gzip, chunked",
        "Transfer-Encoding: xchunked",
        "Transfer-Encoding : chunked",
        "X: a\x00b",
        "X\x01: a",
        "Bad Name: x",
        "no colon here",
    ],
)
async def test_a_request_with_two_readings_reaches_nobody(secret: Server, lines: str) -> None:
    async with Proxy(Policy.of((secret.host,))) as proxy:
        answer = await ask(proxy, f"POST {secret.url} HTTP/1.1\nHost: x\n{lines}\n", b"0\r\n\r\nGET / HTTP/1.1\r\n\r\n")
    assert status(answer) in (400, 501)
    assert secret.heads == []


async def test_a_second_request_behind_the_first_is_not_read(secret: Server) -> None:
    async with Proxy(Policy.of((secret.host,))) as proxy:
        again = f"GET {secret.url}again HTTP/1.1\r\nHost: x\r\n\r\n".encode()
        answer = await ask(proxy, f"GET {secret.url} HTTP/1.1\nHost: x\n", again)
    assert answer.count(b"HTTP/1.1 200") == 1
    assert len(secret.heads) == 1


@pytest.mark.parametrize(
    "raw",
    [
        b"\x16\x03\x01\x02\x00\x01",
        b"\x05\x01\x00" + b"\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET http://a.example/ HTTP/9.9\r\n\r\n",
        b"\x00" * 100_000,
        b"GET http://a.example/ HTTP/1.1\r\n" + b"X: " + b"a" * 200_000,
        b"GET http://a.example/" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n",
        b"GET http://a.example/ HTTP/1.1\r\n" + b"A: b\r\n" * 50_000,
    ],
)
async def test_garbage_and_huge_heads_are_refused(raw: bytes) -> None:
    async with Proxy(timeout=0.5) as proxy:
        reader, writer = await asyncio.open_connection("127.0.0.1", port_of(proxy))
        answer = b""
        with contextlib.suppress(OSError):
            writer.write(raw)
            await writer.drain()
            with anyio.fail_after(5):
                answer = await reader.read()
        writer.transport.abort()
        if answer:
            assert status(answer) in (400, 407, 431, 504)
        assert status(await get(proxy, "http://10.0.0.1/")) == 403


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"garbage\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\nX: " + b"a" * 200_000 + b"\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n",
    ],
)
async def test_a_malformed_answer_becomes_502(raw: bytes) -> None:
    async with serving(fixed(raw)) as server, Proxy(Policy.of((server.host,)), timeout=2) as proxy:
        assert status(await get(proxy, server.url)) == 502
        assert "answer" in proxy.exchanges[0].refused or "length" in proxy.exchanges[0].refused


async def test_an_answer_cut_short_looks_cut_short() -> None:
    for raw in (
        b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n",
    ):
        async with (
            serving(fixed(raw)) as server,
            Proxy(Policy.of((server.host,))) as proxy,
            httpx.AsyncClient(proxy=proxy.url, trust_env=False) as client,
        ):
            with pytest.raises(httpx.RemoteProtocolError):
                await client.get(server.url)
            await until(partial(len, proxy.exchanges))
            assert "cut short" in proxy.exchanges[0].refused


async def test_a_server_cannot_speak_for_the_proxy() -> None:
    raw = response(b"x", headers=("Proxy-Status: thinkloop; error=x", "Proxy-Authenticate: Basic", "Keep-Alive: 9"))
    async with serving(fixed(raw)) as server, Proxy(Policy.of((server.host,))) as proxy:
        answer = (await get(proxy, server.url)).lower()
    assert b"proxy-" not in answer
    assert b"keep-alive" not in answer


# Bounds


async def _endless(head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
    while True:
        writer.write(b"x" * 65536)
        await writer.drain()


async def _trickle(head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
    while True:
        writer.write(b"x")
        await writer.drain()
        await asyncio.sleep(0.05)


async def _silent(head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while await reader.read(65536):
        pass


async def test_an_endless_answer_is_cut_at_the_bound() -> None:
    async with serving(_endless) as server, Proxy(Policy.of((server.host,)), max_bytes=1_000_000) as proxy:
        answer = await get(proxy, server.url)
        assert 800_000 < len(answer) < 1_100_000
        assert not answer.endswith(b"0\r\n\r\n")
        assert proxy.exchanges[0].refused == "Cut after 1000000 bytes."
        await until(lambda: server.open == 0)


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


async def test_many_small_chunks_hold_up_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    parsed = most = 0
    original = h11.Connection.next_event

    def counted(self: h11.Connection) -> object:
        nonlocal parsed, most
        parsed += 1
        most = max(most, parsed)
        return original(self)

    async def turns() -> None:
        nonlocal parsed
        while True:
            parsed = 0
            await asyncio.sleep(0)

    monkeypatch.setattr(h11.Connection, "next_event", counted)
    raw = CHUNKED + b"1\r\nx\r\n" * 20_000 + b"0\r\n\r\n"
    async with serving(fixed(raw)) as server, Proxy(Policy.of((server.host,))) as proxy:
        ticking = asyncio.create_task(turns())
        answer = await get(proxy, server.url)
        ticking.cancel()
    assert most <= 210  # twice a hundred: another task's turn may come between the relay's and the count's
    chunks = re.findall(rb"\r\n([0-9a-f]+)\r\nx", answer)
    assert sum(int(size, 16) for size in chunks) == 20_000
    assert len(chunks) < 100
    assert answer.endswith(b"\r\n0\r\n\r\n")


@pytest.mark.parametrize(
    "raw",
    [
        CHUNKED + b"1\r\nx\r\n" * 200_000,
        CHUNKED + (b"1;" + b"a" * 5000 + b"\r\nx\r\n") * 100,
        b"HTTP/1.1 100 Continue\r\n\r\n" * 20_000,
    ],
)
async def test_an_answer_that_is_hardly_more_than_framing_is_cut(raw: bytes) -> None:
    async with serving(fixed(raw)) as server, Proxy(Policy.of((server.host,))) as proxy:
        answer = await get(proxy, server.url)
        await until(partial(len, proxy.exchanges))
    assert re.fullmatch(r"Cut: \d+ bytes of the server's answer held \d+ of content\.", proxy.exchanges[0].refused)
    assert proxy.exchanges[0].bytes < 250_000
    assert not answer.endswith(b"0\r\n\r\n")


async def test_a_silent_server_is_given_up() -> None:
    async with serving(_silent) as server, Proxy(Policy.of((server.host,)), timeout=0.3) as proxy:
        assert status(await get(proxy, server.url)) == 504
        await until(lambda: server.open == 0)


async def test_a_trickle_ends_at_the_total_time() -> None:
    async with serving(_trickle) as server, Proxy(Policy.of((server.host,)), timeout=5, max_seconds=0.5) as proxy:
        with anyio.fail_after(3):
            await get(proxy, server.url)
        assert proxy.exchanges[0].refused == "Cut after 0.5 s."
        await until(lambda: server.open == 0)


async def test_a_request_that_trickles_in_has_the_timeout_in_all() -> None:
    async with Proxy(timeout=0.4) as proxy:
        reader, writer = await asyncio.open_connection("127.0.0.1", port_of(proxy))
        answer = asyncio.create_task(reader.read())
        with anyio.fail_after(3), contextlib.suppress(OSError):
            for letter in b"GET http://a.example/ HTTP/1.1\r\nX: " + b"slow" * 100:
                if not answer.done():
                    writer.write(bytes([letter]))
                    await anyio.sleep(0.05)
        assert status(await answer) == 504
        writer.transport.abort()


async def test_a_client_that_never_speaks_is_let_go() -> None:
    async with Proxy(timeout=0.3) as proxy:
        reader, writer = await asyncio.open_connection("127.0.0.1", port_of(proxy))
        with anyio.fail_after(3):
            assert await reader.read() == b""
        writer.close()
        assert proxy.exchanges == []


async def test_a_client_that_never_reads_is_let_go() -> None:
    async with serving(_endless) as server, Proxy(Policy.of((server.host,)), timeout=0.5) as proxy:
        _, writer = await asyncio.open_connection("127.0.0.1", port_of(proxy), limit=1024)
        head = f"GET {server.url} HTTP/1.1\r\nHost: x\r\nProxy-Authorization: Basic {authorization(proxy).decode()}"
        writer.write(head.encode() + b"\r\n\r\n")
        await until(lambda: bool(proxy.exchanges))
        await until(lambda: server.open == 0)
        writer.transport.abort()


async def test_an_upload_is_bounded_too() -> None:
    async def swallow(head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(65536):
            pass

    async with serving(swallow) as server, Proxy(Policy.of((server.host,)), max_bytes=100_000) as proxy:
        answer = await ask(proxy, f"POST {server.url} HTTP/1.1\nHost: x\nContent-Length: 500000\n", b"x" * 500_000)
        assert status(answer) == 403
        assert b"more than 100000 bytes" in answer


async def test_a_client_that_leaves_stops_the_server_side() -> None:
    async with serving(_silent) as server, Proxy(Policy.of((server.host,)), timeout=30) as proxy:
        _, writer = await asyncio.open_connection("127.0.0.1", port_of(proxy))
        head = f"GET {server.url} HTTP/1.1\r\nHost: x\r\nProxy-Authorization: Basic {authorization(proxy).decode()}"
        writer.write(head.encode() + b"\r\n\r\n")
        await until(lambda: server.open == 1)
        writer.close()
        await until(lambda: server.open == 0)
        await until(lambda: bool(proxy.exchanges))


async def test_connections_are_bounded() -> None:
    async with Proxy(connections=4, timeout=5) as proxy:
        waiting = [await asyncio.open_connection("127.0.0.1", port_of(proxy)) for _ in range(4)]
        await anyio.sleep(0.05)
        assert status(await get(proxy, "http://10.0.0.1/")) == 503
        for _, writer in waiting:
            writer.close()
        await until(lambda: not proxy._tasks)
        assert status(await get(proxy, "http://10.0.0.1/")) == 403


async def test_leaving_closes_everything_at_once() -> None:
    async with serving(_silent) as server, serving(_endless) as other:
        before, tasks = open_sockets(), len(asyncio.all_tasks())
        async with Proxy(Policy.of((server.host, other.host))) as proxy, anyio.create_task_group() as group:
            for target in (server, other, server, other):
                group.start_soon(get, proxy, target.url)
            await until(lambda: server.open == 2 and other.open == 2)
            with anyio.fail_after(1):
                await proxy.__aexit__()
        await until(lambda: server.open == other.open == 0)
        await until(lambda: open_sockets() <= before)
        assert len(asyncio.all_tasks()) <= tasks


async def test_the_record_is_bounded(proxy: Proxy) -> None:
    del proxy.exchanges[:]
    proxy.exchanges.extend([Exchange("GET", "x", "", 200, 0, 0.0, "")] * 1000)
    await get(proxy, "http://10.0.0.1/" + "a" * 5000)
    assert len(proxy.exchanges) == 1000
    assert len(proxy.exchanges[-1].url_or_host) == 2000


# Tunnels


async def test_a_tunnel_carries_tls_and_nothing_else(secret: Server) -> None:
    async with Proxy(Policy.of((secret.host,)), timeout=2) as proxy:
        for plain in (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"SSH-2.0-x\r\n", b"\x16GET / HTTP/1.1\r\n\r\n"):
            answer = await ask(proxy, f"CONNECT {secret.host} HTTP/1.1\nHost: x\n", plain)
            assert answer == b"HTTP/1.1 200 Connection established\r\n\r\n"
        assert secret.heads == []
        assert all("something else than TLS" in exchange.refused for exchange in proxy.exchanges)


async def test_connect_with_a_body_is_refused(secret: Server) -> None:
    async with Proxy(Policy.of((secret.host,))) as proxy:
        answer = await ask(proxy, f"CONNECT {secret.host} HTTP/1.1\nHost: x\nContent-Length: 3\n", b"abc")
    assert status(answer) == 400


async def _raw_tunnel(proxy: Proxy, host: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port_of(proxy))
    head = f"CONNECT {host} HTTP/1.1\r\nHost: x\r\nProxy-Authorization: Basic {authorization(proxy).decode()}\r\n\r\n"
    writer.write(head.encode())
    assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
    return reader, writer


HELLO = b"\x16\x03\x01\r\n\r\n"  # enough of TLS for the proxy, and a head's end for the server of these tests


async def test_a_tunnel_passes_bytes_and_half_closing() -> None:
    async def upper(head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write((await reader.read()).upper())

    async with serving(upper) as server, Proxy(Policy.of((server.host,))) as proxy:
        reader, writer = await _raw_tunnel(proxy, server.host)
        writer.write(HELLO + b"hello")
        writer.write_eof()
        assert await reader.read() == b"HELLO"
        writer.close()
        await until(lambda: bool(proxy.exchanges))
        (exchange,) = proxy.exchanges
        assert (exchange.method, exchange.url_or_host, exchange.refused) == ("CONNECT", server.host, "")
        assert (exchange.status, exchange.bytes) == (200, len(HELLO) + 10)


@pytest.mark.parametrize(
    ("handler", "refused"),
    [(_endless, "Cut after 1000000 bytes."), (_silent, "Nothing came"), (_trickle, "Cut after 1 s.")],
)
async def test_a_tunnel_is_bounded(handler: Handler, refused: str) -> None:
    async with (
        serving(handler) as server,
        Proxy(Policy.of((server.host,)), max_bytes=1_000_000, timeout=0.5, max_seconds=1) as proxy,
    ):
        reader, writer = await _raw_tunnel(proxy, server.host)
        writer.write(HELLO)
        with anyio.fail_after(5), contextlib.suppress(OSError):
            while await reader.read(65536):
                pass
        writer.transport.abort()
        assert refused in proxy.exchanges[0].refused
        await until(lambda: server.open == 0)


async def test_a_tunnel_ends_with_its_client() -> None:
    async with serving(_endless) as server, Proxy(Policy.of((server.host,))) as proxy:
        _, writer = await _raw_tunnel(proxy, server.host)
        writer.write(HELLO)
        await until(lambda: server.open == 1)
        writer.transport.abort()
        await until(lambda: server.open == 0)
