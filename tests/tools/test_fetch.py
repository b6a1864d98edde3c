"""Fetching gives a bounded body with its facts, or one sentence that says what went wrong; it never leaves its bounds."""

from __future__ import annotations

import asyncio
import datetime
import gzip
import hashlib
import ipaddress
import ssl
import zlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import httpx
import pytest
from raw_server import Server, fixed, paths, redirect, response, serving
from thinkloop.tools.addresses import AddressError, Policy
from thinkloop.tools.extract_kind import content_type
from thinkloop.tools.extract_text import clean, clean_line
from thinkloop.tools.fetch import Fetched, Fetcher, StatusError
from thinkloop.tools.fetch_body import _Inflate, accepts, read_body, short_text
from thinkloop.tools.tool import ToolError

pytestmark = pytest.mark.anyio


@asynccontextmanager
async def fetching(*servers: Server, **options: object) -> AsyncIterator[Fetcher]:
    policy = Policy.of(server.host for server in servers)
    async with Fetcher(policy, **options) as fetcher:  # type: ignore[arg-type]
        yield fetcher


async def fetch(data: bytes, **options: object) -> Fetched:
    """What one answer, byte for byte, is fetched as."""
    async with serving(fixed(data)) as server, fetching(server, **options) as fetcher:
        return await fetcher.get(server.url)


async def failure(data: bytes, kind: type[ToolError] = ToolError, **options: object) -> str:
    with pytest.raises(kind) as caught:
        await fetch(data, **options)
    return str(caught.value)


# What comes back


async def test_a_page_from_an_ipv6_address() -> None:
    async with (
        serving(fixed(response(b"hello", "text/plain")), host="::1") as server,
        Fetcher(Policy.of([f"[::1]:{server.port}"])) as fetcher,
    ):
        page = await fetcher.get(f"http://[::1]:{server.port}/x")
        assert (page.body, page.final_url) == (b"hello", f"http://[::1]:{server.port}/x")
        for url in (f"http://[::1]:{server.port + 1}/", "http://[fd00::1]/", "https://[::1]/"):
            with pytest.raises(ToolError, match=r"is refused: the address is (loopback|private), not public"):
                await fetcher.get(url)


async def test_a_page_with_its_facts() -> None:
    body = "<p>héllo</p>".encode("latin-1")
    async with serving(fixed(response(body, 'Text/HTML; Charset="ISO-8859-1"'))) as server, fetching(server) as fetcher:
        url = f"{server.url}a?b=c#part"
        page = await fetcher.get(url)
        assert (page.url, page.final_url, page.redirects) == (url, f"{server.url}a?b=c", ())
        assert (page.status, page.media_type, page.charset) == (200, "text/html", "cp1252")
        assert (page.body, page.truncated) == (body, False)
        assert 0 < page.seconds < 5
        assert fetcher.record(page) == {
            "url": url,
            "final_url": f"{server.url}a?b=c",
            "redirects": [],
            "status": 200,
            "media_type": "text/html",
            "bytes": len(body),
            "truncated": False,
            "sha256": hashlib.sha256(body).hexdigest(),
        }
        assert b"thinkloop" in server.heads[0]
        await until(lambda: bool(fetcher.proxy.exchanges))
        assert fetcher.proxy.exchanges[0].address == "127.0.0.1"


async def until(condition: Callable[[], bool]) -> None:
    with anyio.fail_after(5):
        while not condition():
            await anyio.sleep(0.01)


@pytest.mark.parametrize(
    ("header", "parts"),
    [
        ("text/html", ("text/html", "")),
        ("text/html; charset=utf8", ("text/html", "utf-8")),
        ("text/html;charset='windows-1252'; x=y", ("text/html", "cp1252")),
        ("text/html; charset=klingon", ("text/html", "")),
        ("text/html; charset=hex", ("text/html", "")),
        ("text/html; charset=base64", ("text/html", "")),
        ("", ("", "")),
        ("nonsense", ("", "")),
        ("text/", ("", "")),
        ("a" * 10_000 + "/html", ("", "")),
    ],
)
def test_content_types(header: str, parts: tuple[str, str]) -> None:
    assert content_type(header) == parts


@pytest.mark.parametrize(
    ("coding", "encode"),
    [
        ("gzip", gzip.compress),
        ("x-gzip", gzip.compress),
        ("gzip", lambda data: gzip.compress(data[:10]) + gzip.compress(data[10:])),
        ("gzip", lambda data: gzip.compress(data) + b"\0" * 100),
        ("deflate", zlib.compress),
        ("Deflate", lambda data: zlib.compress(data, wbits=-15)),
        ("identity", bytes),
    ],
)
async def test_compressed_bodies(coding: str, encode: Callable[[bytes], bytes]) -> None:
    text = b"a sentence, " * 1000
    page = await fetch(response(encode(text), headers=(f"Content-Encoding: {coding}",)))
    assert (page.body, page.truncated) == (text, False)


async def test_an_unnamed_media_type_is_text_unless_it_is_binary() -> None:
    assert (await fetch(response(b"plain", kind=""))).media_type == ""
    assert "binary data" in await failure(response(b"\x7fELF\0\0", kind=""))


@pytest.mark.parametrize(
    "kind", ["application/json", "application/ld+json", "application/pdf", "application/xml", "text/x-y"]
)
async def test_kinds_that_are_read(kind: str) -> None:
    assert (await fetch(response(b"x", kind))).media_type == kind


@pytest.mark.parametrize("kind", ["application/octet-stream", "image/png", "application/zip", "video/mp4"])
async def test_downloads_are_refused_before_their_body_is_read(kind: str) -> None:
    sent = 0

    async def stream(head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        writer.write(f"HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\n\r\n".encode())
        while True:
            writer.write(b"x" * 65536)
            await writer.drain()
            sent += 65536

    async with serving(stream) as server, fetching(server) as fetcher:
        with pytest.raises(ToolError, match=f"is {kind}, a download"):
            await fetcher.get(server.url)
        await until(lambda: server.open == 0)
    assert sent < 20_000_000  # what the kernel's buffers on the way take


async def test_other_kinds_can_be_asked_for() -> None:
    async with serving(fixed(response(b"\x89PNG", "image/png"))) as server, fetching(server) as fetcher:
        page = await fetcher.get(server.url, accept=("image/*",))
        assert page.body == b"\x89PNG"
        assert b"Accept: image/*\r\n" in server.heads[0]


def test_patterns_cover_media_types() -> None:
    assert accepts(("text/*",), "text/html")
    assert not accepts(("text/*",), "application/text")
    assert not accepts((), "text/html")


# Bounds


async def test_a_large_body_is_cut_and_says_so() -> None:
    page = await fetch(response(b"x" * 300_000), max_bytes=100_000)
    assert (len(page.body), page.truncated) == (100_000, True)
    page = await fetch(response(b"x" * 100_000), max_bytes=100_000)
    assert (len(page.body), page.truncated) == (100_000, False)


async def test_an_endless_body_is_cut() -> None:
    async def endless(head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n\r\n")
        while True:
            writer.write(b"line\n" * 10_000)
            await writer.drain()

    async with serving(endless) as server, fetching(server, max_bytes=1_000_000) as fetcher:
        page = await fetcher.get(server.url)
        assert (len(page.body), page.truncated) == (1_000_000, True)
        await until(lambda: server.open == 0)


@pytest.mark.parametrize("codings", ["gzip", "deflate"])
async def test_a_decompression_bomb_stays_small(codings: str) -> None:
    import resource

    encode = gzip.compress if codings == "gzip" else zlib.compress
    bomb = encode(b"\0" * 200_000_000)  # 200 kB
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    page = await fetch(response(bomb, headers=(f"Content-Encoding: {codings}",)), max_bytes=1_000_000)
    assert (len(page.body), page.truncated) == (1_000_000, True)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB


@pytest.mark.parametrize("coding", ["gzip, gzip", "br", "zstd", "compress", "gzip, identity", "x" * 500])
async def test_compression_that_was_not_asked_for_is_refused(coding: str) -> None:
    said = await failure(response(gzip.compress(gzip.compress(b"x")), headers=(f"Content-Encoding: {coding}",)))
    assert "only gzip and deflate were asked for" in said


async def test_a_broken_compression_is_named() -> None:
    broken = b"\x1f\x8b\x08\x00nonsense that is no deflate stream"
    assert "can't be decompressed" in await failure(response(broken, headers=("Content-Encoding: gzip",)))


class Pieces(httpx.AsyncByteStream):
    """A body in pieces that are all there already."""

    def __init__(self, piece: bytes, count: int) -> None:
        self._pieces = [piece] * count

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for piece in self._pieces:
            yield piece


async def test_others_get_a_turn_while_a_body_of_small_pieces_is_read() -> None:
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    task = asyncio.create_task(others())
    answer = httpx.Response(200, stream=Pieces(b"abcd", 20_000), request=httpx.Request("GET", "http://a.example/"))
    assert await read_body(answer, 100_000) == (b"abcd" * 20_000, False)
    task.cancel()
    assert turns >= 200


def test_padding_after_compressed_data_is_not_kept() -> None:
    whole = gzip.compress(b"one") + gzip.compress(b"two")
    inflate = _Inflate()
    assert b"".join(inflate.feed(whole[:25])) + b"".join(inflate.feed(whole[25:])) == b"onetwo"
    for _ in range(100):
        assert b"".join(inflate.feed(b"\0" * 1000)) == b""
    assert inflate._stream
    assert len(inflate._stream.unused_data) <= 1000


async def test_a_body_cut_short_is_given_as_cut() -> None:
    page = await fetch(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 100\r\n\r\nthe start")
    assert (page.body, page.truncated) == (b"the start", True)
    half = gzip.compress(b"the start" * 1000)[:-20]
    page = await fetch(response(half, headers=("Content-Encoding: gzip",)))
    assert page.truncated
    assert page.body.startswith(b"the start")


@pytest.mark.parametrize("start", [b"", b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n\r\nx"])
async def test_time_is_bounded_in_all(start: bytes) -> None:
    async def slow(head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(start)
        while start:
            await asyncio.sleep(0.05)
            writer.write(b"x")
            await writer.drain()
        await reader.read()

    async with serving(slow) as server, fetching(server, timeout=0.5) as fetcher:
        with (
            anyio.fail_after(3),
            pytest.raises(ToolError, match=r"did not answer in (full within 0\.5 s|time)|Nothing came"),
        ):
            await fetcher.get(server.url)
        await until(lambda: server.open == 0)


async def test_cancelling_stops_the_transfer() -> None:
    async def silent(head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    async with serving(silent) as server, fetching(server) as fetcher:
        with anyio.move_on_after(0.2):
            await fetcher.get(server.url)
        await until(lambda: server.open == 0)
        assert not fetcher.proxy._tasks


async def test_a_client_of_many_pages_at_once() -> None:
    async with serving(fixed(response(b"x"))) as server, fetching(server, cache=0) as fetcher:
        pages: list[Fetched] = []

        async def one(number: int) -> None:
            pages.append(await fetcher.get(f"{server.url}{number}"))

        async with anyio.create_task_group() as group:
            for number in range(40):
                group.start_soon(one, number)
    assert {page.final_url for page in pages} == {f"{server.url}{number}" for number in range(40)}


# Redirects


async def test_redirects_are_followed_and_listed() -> None:
    table = {
        "/": redirect("/a"),
        "/a": redirect("b?c#d", "307 Temporary Redirect"),
        "/b?c": redirect("/with space/é", "308 Permanent Redirect"),
        "/with%20space/%C3%A9": response(b"here"),
    }
    async with serving(paths(table)) as server, fetching(server) as fetcher:
        page = await fetcher.get(server.url)
        assert page.body == b"here"
        assert page.url == server.url
        assert page.redirects == (f"{server.url}a", f"{server.url}b?c", f"{server.url}with%20space/%C3%A9")
        assert page.final_url == page.redirects[-1]


@pytest.mark.parametrize(
    "location",
    [
        "http://127.0.0.1:{port}/",
        "//127.0.0.1:{port}/",
        "http://localhost:{port}/",
        "http://[::1]:{port}/",
        "http://[::ffff:127.0.0.1]:{port}/",
        "http://2130706433:{port}/",
        "http://0x7f.1:{port}/",
        "http://127.1:{port}/",
        "https://127.0.0.1:{port}/",
        "http://127。0。0。1:{port}/",
        "http://user@127.0.0.1:{port}/",
        "http:\\\\127.0.0.1:{port}\\",
        "http://169.254.169.254/latest/meta-data/",
        "http://metadata.google.internal/",
        "file:///etc/passwd",
        "data:text/plain,secret",
        "javascript:alert(1)",
        "ftp://127.0.0.1/",
        "gopher://127.0.0.1:{port}/",
        "http://[broken/",
        "http://{port}",
    ],
)
async def test_a_redirect_into_the_machine_is_refused(location: str) -> None:
    async with serving(fixed(response(b"the secret"))) as secret:
        answer = redirect(location.format(port=secret.port).encode().decode("latin-1"))
        async with serving(fixed(answer)) as server, fetching(server) as fetcher:
            with pytest.raises(AddressError):
                await fetcher.get(server.url)
        assert secret.heads == []


async def test_redirects_end() -> None:
    async with serving(fixed(redirect("/"))) as server, fetching(server) as fetcher:
        with pytest.raises(ToolError, match="redirects in a loop"):
            await fetcher.get(server.url)
        assert len(server.heads) == 11

    async def onward(head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(redirect(head.split(b" ")[1].decode() + "x"))

    async with serving(onward) as server, fetching(server, max_redirects=3) as fetcher:
        with pytest.raises(ToolError, match="more than 3 redirects"):
            await fetcher.get(server.url)


async def test_headers_and_cookies_stay_where_they_belong() -> None:
    async with serving(fixed(response(b"other"))) as other:
        location = other.url.replace("127.0.0.1", "localhost")
        onward = response(status="302 Found", headers=(f"Location: {location}",))
        table = {"/": response(status="302 Found", headers=("Location: /next", "Set-Cookie: a=b")), "/next": onward}
        async with (
            serving(paths(table)) as server,
            Fetcher(Policy.of((server.host, f"localhost:{other.port}")), cache=0) as fetcher,
        ):
            await fetcher.get(server.url, headers={"Authorization": "Bearer key"})
            assert [b"Bearer key" in head for head in server.heads] == [True, True]
            assert [b"Cookie: a=b" in head for head in server.heads] == [False, True]
            assert not any(b"key" in head or b"Cookie" in head for head in other.heads)
            await fetcher.get(server.url)
            assert b"Cookie" not in server.heads[2]


# Errors


async def test_an_error_status_comes_with_what_the_page_says() -> None:
    html = b"<html><head><style>p {}</style></head><script>var x</script><h1>No  such\n page</h1>\x00<!-- x --></html>"
    said = await failure(response(html, "text/html", "404 Not Found"), StatusError)
    assert said.endswith("answered 404 Not Found: No such page")
    assert len(await failure(response(b"long " * 50_000, status="500 Oh"), StatusError)) < 450
    assert (await failure(response(b"\x89PNG", "image/png", "410 Gone"))).endswith("answered 410 Gone.")
    assert (await failure(response(b"x", status="404 No", headers=("Content-Encoding: br",)))).endswith(
        "answered 404 No."
    )


async def test_an_error_status_tells_when_to_come_back() -> None:
    with pytest.raises(StatusError) as caught:
        await fetch(response(status="429 Slow Down", headers=("Retry-After: 7",)))
    assert (caught.value.status, caught.value.retry_after) == (429, 7.0)


def test_short_text_is_one_bounded_line() -> None:
    assert short_text(b"a\x1b[31m\r\n b<!-- never closed", "") == "a [31m b"
    assert short_text("ü".encode("latin-1"), "latin-1") == "ü"
    assert len(short_text(b"<" * 1_000_000, "")) == 300
    assert short_text(b" " * 5000 + b"x" * 301, "") == "x" * 299 + "…"


HIDDEN = "".join(map(chr, [*range(0xE0000, 0xE0080), *range(0xE0100, 0xE01F0), *range(0x202A, 0x202F), 0x200B, 0x200E]))
HIDDEN += "\xad\u115f\u1160\u180e\u200f\u2066\u2067\u2068\u2069\u206a\u206f\u3164\ufe00\ufe0e\uffa0\ufff9\ufffa\ufffb"


def test_nothing_hidden_stays_in_a_text() -> None:
    for letter in HIDDEN:
        assert clean(f"a{letter}b é{letter * 3}è {letter}x") == "ab éè x", hex(ord(letter))
    text = f"{HIDDEN}a{HIDDEN}b"
    assert short_text(text.encode(), "") == clean_line(text, 2000) == "ab"
    assert clean_line(f"a {letter} b", 300) == "a b"


async def test_what_an_error_page_hides_is_left_out() -> None:
    page = f"Go {HIDDEN}away\u202e"
    said = await failure(response(page.encode(), "text/plain; charset=utf-8", "404 Not Found"), StatusError)
    assert said.endswith(" answered 404 Not Found: Go away")


@pytest.mark.parametrize("text", ["می\u200cخواهم", "क्\u200dष", "❤\ufe0f\u200d🔥", "👩\u200d💻", "1\ufe0f\u20e3"])
def test_joiners_stay_where_a_script_or_an_emoji_needs_them(text: str) -> None:
    assert clean(text) == text


def test_a_row_of_joiners_is_one() -> None:
    assert clean("م\u200c\u200d\u200b\u200c\u200cب") == "م\u200cب"


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://nowhere.invalid/", "nowhere.invalid can't be found"),
        ("https://nowhere.invalid/", "nowhere.invalid can't be found"),
        ("http://localhost/", "--allow-host localhost:80"),
        ("https://localhost/", "--allow-host localhost:443"),
        ("https://10.0.0.1/", "10.0.0.1 is refused: the address is private"),
        ("http://2130706433/", "is no IPv4 address"),
        ("file:///etc/passwd", "is no http or https URL"),
        ("nonsense", "is no http or https URL"),
    ],
)
async def test_what_cannot_be_reached_is_explained(url: str, words: str) -> None:
    async with Fetcher(timeout=5) as fetcher:
        with pytest.raises(ToolError) as caught:
            await fetcher.get(url)
    assert words in str(caught.value)


async def test_a_closed_port_is_explained() -> None:
    async with serving(fixed(b"")) as server:
        gone = server
    async with fetching(gone) as fetcher:
        for url in (gone.url, gone.url.replace("http:", "https:")):
            with pytest.raises(ToolError, match=r"Can't connect to 127\.0\.0\.1"):
                await fetcher.get(url)


async def test_an_answer_that_is_no_http_is_explained() -> None:
    assert "malformed" in await failure(b"SSH-2.0-OpenSSH\r\n\r\n")
    assert await failure(b"")


async def test_bad_headers_are_refused() -> None:
    async with serving(fixed(response())) as server, fetching(server) as fetcher:
        with pytest.raises(ToolError):
            await fetcher.get(server.url, headers={"X": "a\r\nY: b"})
        assert server.heads == []


# TLS


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate of 127.0.0.1 that signed itself, with its key."""
    pytest.importorskip("cryptography")
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "a test")])
    now = datetime.datetime.now(datetime.UTC)
    signed = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
        .sign(key, hashes.SHA256())
    )
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    path = tmp_path_factory.mktemp("tls") / "certificate.pem"
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain)
    path.write_bytes(private + signed.public_bytes(pem))
    return path


async def test_https_goes_through_a_tunnel_and_is_verified(certificate: Path) -> None:
    asyncio.get_running_loop().set_debug(False)  # it would report the refused handshake as an error of this test
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate)
    async with serving(fixed(response(b"hello over TLS")), tls=tls) as server:
        url = f"https://{server.host}/"
        async with fetching(server, ssl_context=ssl.create_default_context(cafile=str(certificate))) as fetcher:
            assert (await fetcher.get(url)).body == b"hello over TLS"
            await until(lambda: bool(fetcher.proxy.exchanges))
            assert fetcher.proxy.exchanges[0].method == "CONNECT"
        async with fetching(server) as fetcher:
            with pytest.raises(ToolError, match="can't be reached: certificate verify failed"):
                await fetcher.get(url)


async def test_absurdly_small_chunks_end_a_fetch_over_tls_too(certificate: Path) -> None:
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate)
    context = ssl.create_default_context(cafile=str(certificate))
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nTransfer-Encoding: chunked\r\n\r\n"
    table = {
        "/small": head + b"1\r\nx\r\n" * 9_000 + b"0\r\n\r\n",
        "/absurd": head + b"1\r\nx\r\n" * 15_000 + b"0\r\n\r\n",
    }
    async with serving(paths(table), tls=tls) as server, fetching(server, ssl_context=context) as fetcher:
        assert (await fetcher.get(f"https://{server.host}/small")).body == b"x" * 9_000
        with pytest.raises(ToolError, match=r"bytes in 10\d00 chunks"):
            await fetcher.get(f"https://{server.host}/absurd")


# The cache, and POST


async def test_a_page_is_fetched_once() -> None:
    table = {"/": response(b"x"), "/fresh": response(b"x", headers=("Cache-Control: No-Store",))}
    async with serving(paths(table)) as server, fetching(server, cache=2) as fetcher:
        first = await fetcher.get(server.url)
        assert await fetcher.get(server.url) is first
        assert len(server.heads) == 1
        await fetcher.get(server.url, headers={"X": "y"})
        await fetcher.get(server.url, accept=("text/plain",))
        assert len(server.heads) == 3
        for _ in range(2):
            await fetcher.get(f"{server.url}fresh")
            with pytest.raises(StatusError):
                await fetcher.get(f"{server.url}missing")
        assert len(server.heads) == 7
        await fetcher.get(f"{server.url}", accept=("text/*",))  # the third entry: the oldest goes
        await fetcher.get(server.url)
        assert len(server.heads) == 9


async def test_the_environment_does_not_reroute_it(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(fixed(response(b"elsewhere"))) as other, serving(fixed(response(b"here"))) as server:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, other.url)
        monkeypatch.setenv("NO_PROXY", "*")
        async with fetching(server) as fetcher:
            assert (await fetcher.get(server.url)).body == b"here"
            with pytest.raises(AddressError):
                await fetcher.get(other.url)
        assert other.heads == []
