"""Headers on their way through the proxy: what ends at one hop goes, and a message has one length, or none at all."""

from __future__ import annotations

from collections.abc import Iterable

from thinkloop.tools.proxy_rules import Refusal

__all__ = ["Headers", "bracketed", "check_lengths", "for_client", "for_server", "values"]

Headers = list[tuple[bytes, bytes]]

_HOP_BY_HOP = frozenset(
    {b"connection", b"keep-alive", b"te", b"trailer", b"transfer-encoding", b"upgrade", b"expect"}
    | {b"proxy-authenticate", b"proxy-authorization", b"proxy-connection", b"proxy-status"}
)


def bracketed(target: str, headers: Iterable[tuple[bytes, bytes]]) -> str:
    """The request's target with the brackets of an IPv6 address, which httpx leaves out there and, for plain http, has in
    its `Host`. Any other target stays as it is."""
    scheme, slashes, rest = target.rpartition("://")
    authority, slash, path = rest.partition("/")
    if authority.count(":") < 2 or "[" in authority or "@" in authority:
        return target
    host, _, port = authority.rpartition(":")
    named = b"".join(values(headers, b"host")).decode("latin-1")
    whole = named if named.replace("[", "").replace("]", "") == authority and "[" in named else f"[{host}]:{port}"
    return f"{scheme}{slashes}{whole}{slash}{path}"


def for_server(headers: Iterable[tuple[bytes, bytes]], host: str) -> Headers:
    """A request's headers for the server: its own `Host`, the same length, one request on the connection."""
    known = list(headers)
    kept = [(name, value) for name, value in _end_to_end(known) if name.lower() != b"host"]
    chunked = [(b"Transfer-Encoding", b"chunked")] if values(known, b"transfer-encoding") else []
    return [(b"Host", host.encode("ascii")), *kept, *chunked, (b"Connection", b"close")]


def for_client(headers: Iterable[tuple[bytes, bytes]]) -> Headers:
    """A response's headers for the client."""
    return [*_end_to_end(list(headers)), (b"Connection", b"close")]


def check_lengths(headers: Iterable[tuple[bytes, bytes]], status: int) -> None:
    """Raises `Refusal` with `status` where two parties could read two different ends into one message."""
    known = list(headers)
    lengths, codings = values(known, b"content-length"), values(known, b"transfer-encoding")
    if len(lengths) > 1 or len(codings) > 1 or (lengths and codings):
        raise Refusal(status, "The message gives more than one length (Content-Length, Transfer-Encoding).")


def values(headers: Iterable[tuple[bytes, bytes]], name: bytes) -> list[bytes]:
    """All values of a header, split at commas, in lower case."""
    found = b",".join(value for key, value in headers if key.lower() == name)
    return [part.strip().lower() for part in found.split(b",") if part.strip()]


def _end_to_end(headers: Headers) -> Headers:
    dropped = _HOP_BY_HOP | set(values(headers, b"connection"))
    return [(name, value) for name, value in headers if name.lower() not in dropped]
