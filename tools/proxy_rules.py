"""What the proxy lets through: its limits, the hosts it never serves, and the form of its refusals."""

from __future__ import annotations

import re
from dataclasses import dataclass

from thinkloop.tools.addresses import (
    AddressError,
    Policy,
    Resolver,
    UnresolvedError,
    authority,
    resolve,
    system_resolver,
)

__all__ = ["Exchange", "Refusal", "Rules"]

_TUNNEL_PORTS = frozenset({443, 8443})
_BROWSER_HOSTS = re.compile(
    r"(?:(?:update|optimizationguide-pa|clientservices|content-autofill|safebrowsing|safebrowsingohttpgateway"
    r"|passwordsleakcheck-pa|chromekanonymity-pa|chromekanonymityauth-pa|chromekanonymityquery-pa)\.googleapis\.com"
    r"|(?:accounts|mtalk|(?:[a-z-]+\.)?clients[0-9]*)\.google\.com"
    r"|(?:[a-z0-9-]+\.)*gvt[12]\.com)"
)


@dataclass(frozen=True, slots=True)
class Exchange:
    """One request as it went: `url_or_host` as asked (`host:port` for CONNECT), `address` connected to, or "".

    `bytes` came from the server, headers included (a tunnel counts both ways); `refused` says why it was refused or cut.
    """

    method: str
    url_or_host: str
    address: str
    status: int
    bytes: int
    seconds: float
    refused: str


class Refusal(Exception):
    """The answer is a refusal with this HTTP status and sentence; a quiet one isn't recorded."""

    def __init__(self, status: int, message: str, *, quiet: bool = False) -> None:
        super().__init__(message)
        self.status = status
        self.quiet = quiet


@dataclass(frozen=True, slots=True)
class Rules:
    """Limits of one exchange: bytes from the server, seconds without progress, seconds in all."""

    policy: Policy
    max_bytes: int
    timeout: float
    max_seconds: float
    resolver: Resolver = system_resolver

    async def addresses(self, host: str, port: int, *, tunnel: bool) -> list[str]:
        """The checked addresses of a host. Raises `Refusal`."""
        if not self.policy.allows(host, port):
            _refuse_browser_host(host)
            if tunnel and port not in _TUNNEL_PORTS:
                where = authority(host, port)
                raise Refusal(403, f"No https to port {port}. A person can allow it with `--allow-host {where}`.")
        try:
            return await resolve(host, port, self.policy, resolver=self.resolver)
        except UnresolvedError as error:
            raise Refusal(502, str(error)) from error
        except AddressError as error:
            raise Refusal(403, str(error)) from error


def _refuse_browser_host(host: str) -> None:
    if _BROWSER_HOSTS.fullmatch(host):
        raise Refusal(403, f"{host} is refused: browsers call it for themselves, not for a page.", quiet=True)
