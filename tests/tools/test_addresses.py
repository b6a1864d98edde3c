"""Every spelling of a host is judged as what it is, or refused; nothing private is reached unless a person listed it."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import threading

import anyio
import pytest
from thinkloop.tools.address_ranges import classify, is_own
from thinkloop.tools.addresses import (
    AddressError,
    Policy,
    UnresolvedError,
    checked_url,
    parse_url,
    resolve,
    system_resolver,
)
from thinkloop.traces.events import ThinkloopError

pytestmark = pytest.mark.anyio

PUBLIC = "93.184.215.14"


def answering(*addresses: str):  # type: ignore[no-untyped-def]
    """A resolver with these answers, that counts its questions."""

    async def resolver(host: str, port: int) -> list[str]:
        resolver.asked += 1  # type: ignore[attr-defined]
        return list(addresses)

    resolver.asked = 0  # type: ignore[attr-defined]
    return resolver


async def refused(url: str, policy: Policy = Policy()) -> str:  # noqa: B008 - frozen
    """Why a URL may not be reached. Every name resolves to a public address here, so it's the spelling that counts."""

    async def reach() -> None:
        _, host, port = checked_url(url)
        await resolve(host, port, policy, resolver=answering(PUBLIC))

    with pytest.raises(AddressError) as caught:
        await reach()
    return str(caught.value)


@pytest.mark.parametrize(
    ("url", "parts"),
    [
        ("http://example.org", ("http", "example.org", 80)),
        ("https://Example.ORG:8443/a?b#c", ("https", "example.org", 8443)),
        ("HTTPS://example.org.", ("https", "example.org", 443)),
        ("http://example.org:/", ("http", "example.org", 80)),
        ("http://example.org?q=a@b", ("http", "example.org", 80)),
        ("http://93.184.215.14:81/", ("http", "93.184.215.14", 81)),
        ("http://[2606:2800:0021:0::1]:81/", ("http", "2606:2800:21::1", 81)),
        ("https://münchen.example/straße", ("https", "xn--mnchen-3ya.example", 443)),
        ("http://ｅｘａｍｐｌｅ．org/", ("http", "example.org", 80)),
        ("http://_dmarc.example.org/", ("http", "_dmarc.example.org", 80)),
    ],
)
def test_a_url_has_one_reading(url: str, parts: tuple[str, str, int]) -> None:
    assert checked_url(url) == parts


def test_a_place_writes_its_url_anew() -> None:
    assert parse_url("HTTP://ExAmple.org:80?q#f").url == "http://example.org/?q"
    assert parse_url("https://[2606::1]:8443/a/../b").url == "https://[2606::1]:8443/a/../b"


@pytest.mark.parametrize(
    "url",
    [
        "",
        "example.org",
        "//example.org",
        "ftp://example.org/",
        "file:///etc/passwd",
        "view-source:http://example.org",
        "javascript:alert(1)",
        "data:text/html,x",
        "gopher://127.0.0.1:70/_x",
        "http:/example.org",
        "http:example.org",
        "http:///example.org",
        "http://",
        "http://:80/",
        "http://user@example.org/",
        "http://user:secret@example.org/",
        "http://example.org@127.0.0.1/",
        "http://example.org%40127.0.0.1/",
        "http://example.org\\@127.0.0.1/",
        "http://127.0.0.1\\.example.org/",
        "http://example.org /",
        " http://example.org/",
        "http://exa\tmple.org/",
        "http://exa\nmple.org/",
        "http://example.org/\r\nX: y",
        "http://example.org/\x00",
        "http://example.org\u2028/",
        "http://example.org/\ud800",
        "http://example.org:0/",
        "http://example.org:65536/",
        "http://example.org:8０/",
        "http://example.org:80:80/",
        "http://example.org:-1/",
        "http://example.org:+80/",
        "http://exam%70le.org/",
        "http://127.0.0.1%2f.example.org/",
        "http://example..org/",
        "http://.example.org/",
        "http://example.org../",
        "http://-example.org/",
        "http://exa*mple.org/",
        "http://" + "a" * 64 + ".org/",
        "http://" + "a." * 130 + "org/",
        "http://example.org/" + "a" * 8000,
        "http://[::1",
        "http://::1/",
        "http://[::1]x/",
        "http://[::1%25lo]/",
        "http://[fe80::1%eth0]/",
        "http://[127.0.0.1]/",
        "http://[example.org]/",
        "http://[v1.x]/",
        "http://[:::1]/",
        "http://xn--a\u200b\ufffd.example/",
    ],
)
def test_what_is_no_plain_web_address_is_refused(url: str) -> None:
    with pytest.raises(AddressError):
        checked_url(url)


@pytest.mark.parametrize(
    "url",
    [
        # 127.0.0.1, in the spellings that some resolvers and browsers take for it
        "http://127.0.0.1/",
        "http://127.0.0.1./",
        "http://2130706433/",
        "http://017700000001/",
        "http://0x7f000001/",
        "http://0x7F.0.0.1/",
        "http://0177.0.0.1/",
        "http://0177.0x0.0.1/",
        "http://127.1/",
        "http://127.0.1/",
        "http://127.000.000.001/",
        "http://127.0.0.1.0/",
        "http://0x/",
        "http://1/",
        "http://127.255.255.254/",
        "http://4294967297/",
        "http://127。0。0。1/",
        "http://127｡0｡0｡1/",
        "http://127．0．0．1/",
        "http://１２７.0.0.1/",
        "http://①②⑦.0.0.1/",
        "http://０ｘ7f.1/",
        "http://127.0.0.\u00ad1/",
        "http://١٢٧.0.0.1/",
        "http://localhost/",
        "http://LOCALHOST./",
        "http://ｌocalhost/",
        "http://loc\u00adalhost/",
        "http://a.localhost/",
        "http://localhost.localdomain/",
        "http://[::1]/",
        "http://[0:0:0:0:0:0:0:1]/",
        "http://[::ffff:127.0.0.1]/",
        "http://[::ffff:7f00:1]/",
        "http://[0:0:0:0:0:ffff:7f00:0001]/",
        "http://[::127.0.0.1]/",
        "http://[::ffff:0:127.0.0.1]/",
        "http://[64:ff9b::127.0.0.1]/",
        "http://[64:ff9b:1::7f00:1]/",
        "http://[2002:7f00:1::]/",
        "http://[2001:0:4136:e378:8000:63bf:80ff:fffe]/",
        # the rest of what isn't the public internet
        "http://0.0.0.0/",
        "http://0/",
        "http://[::]/",
        "http://10.0.0.1/",
        "http://172.16.0.1/",
        "http://172.31.255.255/",
        "http://192.168.1.1/",
        "http://100.64.0.1/",
        "http://100.127.255.255/",
        "http://192.0.0.8/",
        "http://192.0.2.1/",
        "http://192.88.99.1/",
        "http://198.18.0.1/",
        "http://198.51.100.1/",
        "http://203.0.113.1/",
        "http://224.0.0.1/",
        "http://239.255.255.250/",
        "http://240.0.0.1/",
        "http://255.255.255.255/",
        "http://[fc00::1]/",
        "http://[fd12:3456::1]/",
        "http://[fe80::1]/",
        "http://[fec0::1]/",
        "http://[ff02::1]/",
        "http://[2001:db8::1]/",
        "http://[3fff::1]/",
        "http://[2001:10::1]/",
        "http://[4000::1]/",
        "http://[100::1]/",
        # metadata services
        "http://169.254.169.254/latest/meta-data/",
        "http://169.254.170.2/",
        "http://100.100.100.200/",
        "http://168.63.129.16/",
        "http://192.0.0.192/",
        "http://[fd00:ec2::254]/",
        "http://[::ffff:169.254.169.254]/",
        "http://[fd20:ce::254]/",
        "http://2852039166/",
        "http://0xa9fea9fe/",
        "http://0251.0376.0251.0376/",
        "http://metadata/",
        "http://metadata.google.internal/",
        "http://metadata.google.internal./",
        "http://METADATA.GOOGLE.internal/",
        "http://metadata。google。internal/",
        "http://metadata.goog/",
        "http://instance-data.ec2.internal/",
        "http://printer.local/",
        "http://vault.internal/",
        "http://router.home.arpa/",
        "http://kubernetes.default.svc/",
        "http://kubernetes.default.svc.cluster.local/",
    ],
)
async def test_private_places_are_refused_in_every_spelling(url: str) -> None:
    await refused(url)


@pytest.mark.parametrize("url", [f"http://{PUBLIC}/", "http://[2606:2800:21f::1]/", "https://1.1.1.1:8443/"])
async def test_public_addresses_pass(url: str) -> None:
    _, host, port = checked_url(url)
    assert await resolve(host, port, Policy()) == [host]


async def test_a_public_name_passes_with_all_its_addresses() -> None:
    answers = answering(PUBLIC, "2606:2800:21f::1", PUBLIC)
    assert await resolve("example.org", 443, Policy(), resolver=answers) == [PUBLIC, "2606:2800:21f::1"]
    assert answers.asked == 1


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "10.1.2.3", "169.254.169.254", "::1", "::ffff:10.0.0.1", "fe80::1%2", "64:ff9b::a00:1", "x"],
)
async def test_one_private_answer_refuses_all(address: str) -> None:
    with pytest.raises(AddressError) as caught:
        await resolve("evil.example", 8080, Policy(), resolver=answering(PUBLIC, address))
    assert f"evil.example resolves to {address} and is refused" in str(caught.value)
    assert "`--allow-host evil.example:8080`" in str(caught.value)


@pytest.mark.parametrize("port", [22, 25, 53, 110, 143, 445, 587, 3306, 5432, 6000, 6379, 6667, 11211])
async def test_ports_of_other_services_are_refused(port: int) -> None:
    assert f"Port {port} of example.org is refused" in await refused(f"http://example.org:{port}/")
    policy = Policy.of((f"example.org:{port}",))
    assert await resolve("example.org", port, policy, resolver=answering(PUBLIC)) == [PUBLIC]


async def test_a_name_without_an_address_is_a_case_of_its_own() -> None:
    with pytest.raises(UnresolvedError, match="nowhere\\.invalid can't be found"):
        await resolve("nowhere.invalid", 80, Policy(), resolver=answering())
    with pytest.raises(UnresolvedError, match="nowhere\\.invalid can't be found"):
        await resolve("nowhere.invalid", 80, Policy(), resolver=system_resolver)


async def test_lookups_that_hang_are_bounded_in_number(monkeypatch: pytest.MonkeyPatch) -> None:
    answer, original = threading.Event(), socket.getaddrinfo
    asked: list[str] = []

    def hanging(host: str, *rest: object, **options: object) -> object:
        asked.append(host)
        answer.wait(30)
        return original("127.0.0.1", 80, type=socket.SOCK_STREAM)

    monkeypatch.setattr(socket, "getaddrinfo", hanging)
    given_up = [asyncio.create_task(system_resolver(f"{number}.example", 80)) for number in range(40)]
    await anyio.sleep(0.05)
    for task in given_up:
        task.cancel()
    await asyncio.gather(*given_up, return_exceptions=True)
    waiting = [asyncio.create_task(system_resolver("last.example", 80)) for _ in range(20)]
    await anyio.sleep(0.05)
    assert sorted(asked) == sorted(f"{number}.example" for number in range(16))
    answer.set()
    with anyio.fail_after(10):
        assert await asyncio.gather(*waiting) == [["127.0.0.1"]] * 20
    assert asked[16:] == ["last.example"] * 20


def test_a_lookup_that_hangs_does_not_keep_the_process() -> None:
    program = """
import anyio, socket, threading
from thinkloop.tools.addresses import system_resolver
socket.getaddrinfo = lambda *asked, **options: threading.Event().wait()
async def main():
    with anyio.move_on_after(0.1):
        await system_resolver("slow.example", 80)
    print("left", flush=True)
anyio.run(main)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=20)
    assert (done.returncode, done.stdout, done.stderr) == (0, "left\n", "")


async def test_the_system_resolver_judges_what_it_gets() -> None:
    policy = Policy.of(("localhost:80",))
    assert "127.0.0.1" in await resolve("localhost", 80, policy)
    with pytest.raises(AddressError):
        await resolve("localhost", 81, policy)


@pytest.mark.parametrize(
    ("entries", "host", "port", "allowed"),
    [
        (("localhost:8000",), "localhost", 8000, True),
        (("localhost:8000",), "localhost", 8001, False),
        (("localhost:8000",), "127.0.0.1", 8000, False),
        (("LocalHost.",), "localhost", 1, True),
        (("localhost",), "a.localhost", 80, False),
        (("127.0.0.1",), "127.0.0.1", 9999, True),
        (("127.0.0.1",), "127.0.0.2", 9999, False),
        (("::1",), "::1", 80, True),
        (("[::1]",), "::1", 80, True),
        (("[0:0::1]:80",), "::1", 80, True),
        (("[::1]:80",), "::1", 81, False),
        (("docs.corp", "10.0.0.1:80"), "10.0.0.1", 80, True),
        ((), "localhost", 80, False),
    ],
)
def test_a_policy_allows_what_it_lists(entries: tuple[str, ...], host: str, port: int, allowed: bool) -> None:
    assert Policy.of(entries).allows(host, port) is allowed


@pytest.mark.parametrize(
    "entry",
    [
        *(
            "",
            "*",
            "*.corp",
            "10.0.0.0/8",
            "http://localhost",
            "localhost:",
            "localhost:x",
            "localhost:0",
            "localhost/x",
        ),
        *("a b", "user@localhost", "127.1", "0x7f000001", "[::1", "::1%lo", "localhost:80:80", "localhost:99999"),
    ],
)
def test_nonsense_in_a_policy_is_named(entry: str) -> None:
    with pytest.raises(ThinkloopError, match=r"--allow-host .* Write HOST or HOST:PORT"):
        Policy.of((entry,))


def test_one_text_is_no_list_of_hosts() -> None:
    with pytest.raises(ThinkloopError, match="several hosts"):
        Policy.of("localhost")


async def test_an_allowed_name_may_be_private_but_never_metadata() -> None:
    policy = Policy.of(("docs.corp", "169.254.169.254"))
    assert await resolve("docs.corp", 80, policy, resolver=answering("10.0.0.5", "fd00::5")) == ["10.0.0.5", "fd00::5"]
    for address in ("169.254.169.254", "0.0.0.0", "224.0.0.1", "fe80::1", "::ffff:10.0.0.5"):
        with pytest.raises(AddressError):
            await resolve("docs.corp", 80, policy, resolver=answering("10.0.0.5", address))
    assert await resolve("169.254.169.254", 80, policy) == ["169.254.169.254"]


def test_this_machines_own_addresses_are_known() -> None:
    assert is_own("127.0.0.1")
    assert not is_own("192.0.2.1")
    assert not is_own("nonsense")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing; needs a route
        except OSError:
            return
        assert is_own(probe.getsockname()[0])


def test_a_public_address_of_this_machine_is_not_public(monkeypatch: pytest.MonkeyPatch) -> None:
    assert classify(PUBLIC) is None
    monkeypatch.setattr("thinkloop.tools.address_ranges.is_own", lambda address: True)
    found = classify(PUBLIC)
    assert found is not None
    assert found.kind == "this machine's own"
