"""Which hosts may be reached: one spelling per host, public addresses only, private ones by explicit option.

A name is resolved once and every address among the answers is judged; whoever connects, connects to those addresses, so a
name that answers differently the next time changes nothing.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
import string
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from urllib.parse import quote

from thinkloop.tools.address_ranges import BLOCKED_PORTS, METADATA_NAMES, PRIVATE_SUFFIXES, classify
from thinkloop.tools.tool import ToolError
from thinkloop.traces.events import ThinkloopError

__all__ = [
    "AddressError",
    "Place",
    "Policy",
    "Resolver",
    "UnresolvedError",
    "authority",
    "canonical_host",
    "checked_url",
    "parse_url",
    "resolve",
    "split_authority",
    "system_resolver",
]

Resolver = Callable[[str, int], Awaitable[list[str]]]
"""Gives the addresses of a name, as text. Raises OSError when there are none."""

MAX_URL = 8000  # characters; browsers and servers cut between 8 and 64 thousand
_MAX_ADDRESSES = 16
_URL = re.compile(r"(https?)://([^/?#]*)([^#]*)(?:#.*)?", re.IGNORECASE)
_NOT_IN_URL = re.compile(r"[\x00-\x20\x7f-\xa0\\\u2028\u2029\ud800-\udfff]")
_LABEL = re.compile(r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?")
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")
_PORT = re.compile(r"[0-9]{1,5}")
_PORTS = {"http": 80, "https": 443}
_MAX_LOOKUPS = 16  # threads: `getaddrinfo` can't be interrupted, and takes 15 s and more when no name server answers
_MAX_WAITING = 1000  # lookups
_SockAddr = tuple[int, int, int, str, tuple[str | int | bytes, ...]]


class AddressError(ToolError):
    """A URL or host that may not be reached: says which, why, and how a person can allow it."""


class UnresolvedError(AddressError):
    """A host name that has no address, or whose servers don't answer."""


@dataclass(frozen=True, slots=True)
class Policy:
    """`allow_hosts` may be private: `host` (any port) or `host:port`, normalised as `Policy.of` does it.

    The host is compared as asked for: a listed address doesn't allow the names that resolve to it.
    """

    allow_hosts: frozenset[str] = frozenset()

    @classmethod
    def of(cls, entries: Iterable[str]) -> Policy:
        """Checks and normalises entries such as `localhost:8000`, `docs.corp`, `::1`, `[::1]:80`.

        Raises `ThinkloopError` for one that is no host.
        """
        if isinstance(entries, str):
            raise ThinkloopError(f"Policy.of takes several hosts, such as ({entries!r},), not one text.")
        return cls(frozenset(_entry(text) for text in entries))

    def allows(self, host: str, port: int) -> bool:
        """Whether a person listed this host (in canonical spelling) for this port."""
        return host in self.allow_hosts or authority(host, port) in self.allow_hosts


@dataclass(frozen=True, slots=True)
class Place:
    """Where a URL leads: `host` in canonical spelling, `path` with its query, in ASCII, never empty, without fragment."""

    scheme: str
    host: str
    port: int
    path: str

    @property
    def netloc(self) -> str:
        """The host, with its port where that isn't the scheme's own: what goes into `Host`."""
        plain = f"[{self.host}]" if ":" in self.host else self.host
        return plain if self.port == _PORTS[self.scheme] else authority(self.host, self.port)

    @property
    def origin(self) -> tuple[str, str, int]:
        return self.scheme, self.host, self.port

    @property
    def url(self) -> str:
        return f"{self.scheme}://{self.netloc}{self.path}"


def checked_url(url: str) -> tuple[str, str, int]:
    """The scheme, canonical host and port of an http or https URL.

    Raises `AddressError` for other schemes, credentials, control characters, white space, backslashes, more than 8,000
    characters, and hosts that `canonical_host` refuses.
    """
    return parse_url(url).origin


def parse_url(url: str) -> Place:
    """Like `checked_url`, with the path. Raises `AddressError`."""
    if len(url) > MAX_URL:
        raise AddressError(f"The URL has {len(url)} characters; at most {MAX_URL} are taken.")
    if found := _NOT_IN_URL.search(url):
        raise AddressError(f"{_shown(url)} contains {found[0]!a}, which a URL may not; percent-encode it (space: %20).")
    match = _URL.fullmatch(url)
    if match is None:
        raise AddressError(f"{_shown(url)} is no http or https URL. Give one such as https://example.org/page.")
    scheme, rest, path = match[1].lower(), match[2], match[3]
    if "@" in rest:
        raise AddressError(f"{_shown(rest.rpartition('@')[2])} came with a user name before the host; leave it out.")
    host, port = split_authority(rest, _PORTS[scheme])
    path = path if path.isascii() else quote(path, safe=string.punctuation)
    return Place(scheme, host, port, path if path.startswith("/") else f"/{path}")


def split_authority(text: str, default_port: int) -> tuple[str, int]:
    """`host`, `host:port`, `[v6]` or `[v6]:port` as canonical host and port. Raises `AddressError`."""
    end = text.find("]") if text.startswith("[") else -1
    host, colon, port = (text[: end + 1], *_after(text[end + 1 :])) if end >= 0 else text.partition(":")
    if colon and not _PORT.fullmatch(port) and port:
        raise AddressError(f"{_shown(text)} has no valid port: a number from 1 to 65535.")
    number = int(port) if port else default_port
    if not 1 <= number <= 65535:
        raise AddressError(f"{_shown(text)} has no valid port: a number from 1 to 65535.")
    return canonical_host(host), number


def canonical_host(host: str) -> str:
    """The one spelling of a host: a lower-case ASCII name without a trailing dot, or an address without brackets.

    International names (and full-width letters, digits and dots) are mapped as browsers map them, then judged as what they
    are. Raises `AddressError` for spellings that programs read differently: decimal, octal, hexadecimal or short IPv4,
    zones, percent-encoding, empty or overlong labels.
    """
    if host.startswith("["):
        return _ipv6(host)
    if len(host) > 300:
        raise AddressError(f"{_shown(host)} is no host name: it is longer than 253 characters.")
    name = (host if host.isascii() else _ascii(host)).lower().removesuffix(".")
    labels = name.split(".")
    if len(name) > 253 or not all(_LABEL.fullmatch(label) for label in labels):
        raise AddressError(f"{_shown(host)} is no host name: only letters, digits, hyphens and dots make one.")
    return _ipv4(name) if _NUMBER.fullmatch(labels[-1]) else name


def authority(host: str, port: int) -> str:
    """`host:port`, IPv6 in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


async def system_resolver(host: str, port: int) -> list[str]:
    """The operating system's answers. Neither a cancelled caller nor the end of the process waits for them.

    At most 16 lookups run at once in a process, those that nobody waits for any more included; further ones wait.
    """
    answers = await asyncio.wrap_future(_LOOKUPS.start(_Lookup(host, port)))
    return [str(sockaddr[0]) for family, *_, sockaddr in answers if family in (socket.AF_INET, socket.AF_INET6)]


async def resolve(host: str, port: int, policy: Policy, *, resolver: Resolver = system_resolver) -> list[str]:
    """The addresses to connect to for a host, all of them checked, at most 16, in the resolver's order.

    One address that isn't public refuses all, unless `policy` allows the host. Raises `AddressError`; its subclass
    `UnresolvedError` when the name has no address.
    """
    name = canonical_host(f"[{host}]" if ":" in host and not host.startswith("[") else host)
    allowed = policy.allows(name, port)
    if not allowed:
        _check_port(name, port)
        _check_name(name, port)
    if _is_address(name):
        _check_address(name, name, port, allowed)
        return [name]
    addresses = await _answers(name, port, resolver)
    for address in addresses:
        _check_address(address, name, port, allowed)
    return addresses[:_MAX_ADDRESSES]


async def _answers(name: str, port: int, resolver: Resolver) -> list[str]:
    try:
        addresses = list(dict.fromkeys(await resolver(name, port)))
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UnresolvedError(f"{name} can't be found: {reason}. Check the spelling.") from error
    if not addresses:
        raise UnresolvedError(f"{name} can't be found: it has no address. Check the spelling.")
    return addresses


def _check_port(host: str, port: int) -> None:
    if port in BLOCKED_PORTS:
        raise AddressError(f"Port {port} of {host} is refused: it isn't a web server's. {_how(host, port)}")


def _check_name(host: str, port: int) -> None:
    if host in METADATA_NAMES:
        raise AddressError(f"{host} is refused: it is a cloud metadata service. {_how(host, port)}")
    if any(host == suffix or host.endswith(f".{suffix}") for suffix in PRIVATE_SUFFIXES):
        raise AddressError(f"{host} is refused: it is a name of a private network. {_how(host, port)}")


def _check_address(address: str, host: str, port: int, allowed: bool) -> None:
    found = classify(address)
    if found is None or (allowed and (host == address or not found.never)):
        return
    subject = host if host == address else f"{host} resolves to {address} and"
    how = _how(address if allowed else host, port)
    raise AddressError(f"{subject} is refused: the address is {found.kind}, not public. {how}")


def _how(host: str, port: int) -> str:
    return f"A person can allow it with `--allow-host {authority(host, port)}`."


def _is_address(name: str) -> bool:
    return ":" in name or name.rpartition(".")[2].isdigit()


def _after(text: str) -> tuple[str, str]:
    if text and not text.startswith(":"):
        raise AddressError(f"{_shown(text)} after an IPv6 address is no port.")
    return text[:1], text[1:]


def _ipv6(host: str) -> str:
    inner = host[1:-1]
    try:
        if not host.endswith("]") or "%" in inner:
            raise ValueError(inner)
        return ipaddress.IPv6Address(inner).compressed
    except ValueError:
        raise AddressError(f"{_shown(host)} is no IPv6 address (zones such as %eth0 are refused).") from None


def _ipv4(name: str) -> str:
    try:
        return str(ipaddress.IPv4Address(name))  # strict since 3.9.5: four decimal numbers, no leading zeros
    except ValueError:
        raise AddressError(
            f"{_shown(name)} is no IPv4 address: write four decimal numbers, such as 93.184.215.14."
        ) from None


def _ascii(host: str) -> str:
    import idna  # comes with httpx

    try:
        return idna.encode(host, uts46=True).decode("ascii")
    except (idna.IDNAError, UnicodeError):
        raise AddressError(f"{_shown(host)} is no host name: it can't be written in ASCII.") from None


def _entry(text: str) -> str:
    bare = text.strip()
    try:
        if bare.count(":") > 1 and not bare.startswith("["):
            return canonical_host(f"[{bare}]")
        if bare.endswith(":"):
            raise AddressError("The port is missing.")
        host, port = split_authority(bare, 1)
        return authority(host, port) if re.search(r":[0-9]+$", bare.rpartition("]")[2]) else host
    except AddressError as error:
        raise ThinkloopError(f"--allow-host {_shown(text)}: {error} Write HOST or HOST:PORT.") from None


class _Lookup:
    def __init__(self, host: str, port: int) -> None:
        self.answers: Future[list[_SockAddr]] = Future()
        self._asked = (host, port)

    def run(self) -> None:
        if not self.answers.set_running_or_notify_cancel():
            return
        try:
            self.answers.set_result(list(socket.getaddrinfo(*self._asked, type=socket.SOCK_STREAM)))
        except Exception as error:
            self.answers.set_exception(error)


class _Lookups:
    """Threads for lookups, each counted until it really ends; none keeps the process alive (an executor's would)."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: deque[_Lookup] = deque()
        self._threads = 0

    def start(self, lookup: _Lookup) -> Future[list[_SockAddr]]:
        with self._lock:
            if self._threads < _MAX_LOOKUPS:
                threading.Thread(target=self._run, args=(lookup,), name="thinkloop-lookup", daemon=True).start()
                self._threads += 1
            else:
                self._wait(lookup)
        return lookup.answers

    def _wait(self, lookup: _Lookup) -> None:
        self._waiting = deque(other for other in self._waiting if not other.answers.cancelled())
        if len(self._waiting) >= _MAX_WAITING:
            raise OSError("too many names are being looked up")
        self._waiting.append(lookup)

    def _run(self, lookup: _Lookup | None) -> None:
        while lookup:
            lookup.run()
            with self._lock:
                lookup = self._waiting.popleft() if self._waiting else None
                self._threads -= lookup is None


_LOOKUPS = _Lookups()


def _shown(text: str) -> str:
    return ascii(text if len(text) <= 100 else text[:99] + "…")
