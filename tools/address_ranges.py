"""The tables behind `addresses`: networks that aren't the public internet, metadata services, ports no web server has.

Sources: the IANA special-purpose registries for IPv4 and IPv6, the clouds' documents for their metadata services, and the
port list of the WHATWG fetch standard (section 2.9, port blocking).
"""

from __future__ import annotations

import ipaddress
import socket
from dataclasses import dataclass
from functools import lru_cache

__all__ = ["BLOCKED_PORTS", "METADATA_NAMES", "PRIVATE_SUFFIXES", "Range", "classify", "is_own"]

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address


@dataclass(frozen=True, slots=True)
class Range:
    """What a network is for. `never`: an allowed name may not lead there either, only the address itself, if listed."""

    kind: str
    never: bool = False


_METADATA = Range("a cloud metadata service", never=True)
_LINK_LOCAL = Range("link-local", never=True)
_MULTICAST = Range("multicast", never=True)
_UNSPECIFIED = Range("unspecified", never=True)
_RESERVED = Range("reserved", never=True)
_TRANSLATED = Range("an IPv4 address in disguise", never=True)
_LOOPBACK = Range("loopback")
_PRIVATE = Range("private")
_OWN = Range("this machine's own")

# Order matters: the first network that contains an address names it.
_TABLE: tuple[tuple[str, Range], ...] = (
    ("169.254.169.254/32", _METADATA),  # AWS, Azure, Google, Oracle, DigitalOcean
    ("169.254.170.2/32", _METADATA),  # AWS, credentials of containers
    ("169.254.170.23/32", _METADATA),  # AWS, credentials of pods
    ("169.254.0.23/32", _METADATA),  # Tencent
    ("100.100.100.200/32", _METADATA),  # Alibaba
    ("168.63.129.16/32", _METADATA),  # Azure, in the middle of public space
    ("192.0.0.192/32", _METADATA),  # Oracle
    ("fd00:ec2::/32", _METADATA),  # AWS
    ("fd20:ce::254/128", _METADATA),  # Google
    ("0.0.0.0/8", _UNSPECIFIED),
    ("10.0.0.0/8", _PRIVATE),
    ("100.64.0.0/10", _PRIVATE),  # shared by carriers, and used by overlay networks
    ("127.0.0.0/8", _LOOPBACK),
    ("169.254.0.0/16", _LINK_LOCAL),
    ("172.16.0.0/12", _PRIVATE),
    ("192.0.0.0/24", _RESERVED),
    ("192.0.2.0/24", _RESERVED),
    ("192.88.99.0/24", _RESERVED),  # 6to4 relays
    ("192.168.0.0/16", _PRIVATE),
    ("198.18.0.0/15", _PRIVATE),  # benchmarks
    ("198.51.100.0/24", _RESERVED),
    ("203.0.113.0/24", _RESERVED),
    ("224.0.0.0/4", _MULTICAST),
    ("240.0.0.0/4", _RESERVED),
    ("::/128", _UNSPECIFIED),
    ("::1/128", _LOOPBACK),
    ("::ffff:0:0/96", _TRANSLATED),  # mapped
    ("::ffff:0:0:0/96", _TRANSLATED),  # translated (SIIT)
    ("::/96", _TRANSLATED),  # compatible
    ("64:ff9b::/96", _TRANSLATED),  # NAT64
    ("64:ff9b:1::/48", _TRANSLATED),  # NAT64, local
    ("2001::/32", _TRANSLATED),  # Teredo
    ("2002::/16", _TRANSLATED),  # 6to4
    ("2001::/23", _RESERVED),  # protocol assignments
    ("2001:db8::/32", _RESERVED),
    ("3fff::/20", _RESERVED),
    ("fc00::/7", _PRIVATE),
    ("fe80::/10", _LINK_LOCAL),
    ("fec0::/10", _PRIVATE),  # site-local
    ("ff00::/8", _MULTICAST),
)
_NETWORKS = tuple((ipaddress.ip_network(text), found) for text, found in _TABLE)
_UNICAST = ipaddress.ip_network("2000::/3")  # all that IANA has given out of IPv6

METADATA_NAMES = frozenset(
    {
        "metadata",
        "metadata.google.internal",
        "metadata.goog",
        "metadata.azure.com",
        "metadata.azure.internal",
        "metadata.tencentyun.com",
        "metadata.oraclecloud.com",
        "instance-data",
        "instance-data.ec2.internal",
        "rancher-metadata",
        "kubernetes.default.svc",
    }
)
PRIVATE_SUFFIXES = ("localhost", "local", "localdomain", "internal", "home.arpa", "lan", "intranet", "corp")

BLOCKED_PORTS = frozenset(
    {1, 7, 9, 11, 13, 15, 17, 19, 20, 21, 22, 23, 25, 37, 42, 43, 53, 69, 77, 79, 87, 95, 101, 102, 103, 104, 109, 110}
    | {111, 113, 115, 117, 119, 123, 135, 137, 139, 143, 161, 179, 389, 427, 465, 512, 513, 514, 515, 526, 530, 531}
    | {532, 540, 548, 554, 556, 563, 587, 601, 636, 989, 990, 993, 995, 1719, 1720, 1723, 2049, 3659, 4045, 4190, 5060}
    | {5061, 6000, 6566, 6665, 6666, 6667, 6668, 6669, 6679, 6697, 10080}
    | {445, 1433, 1521, 2375, 2376, 2379, 3306, 3389, 5432, 5900, 5985, 6379, 9042, 9200, 10250, 11211, 27017}
)
"""The standard's list, and on the last line file shares, databases, remote desktops and container daemons."""


def classify(address: str) -> Range | None:
    """What an address is, if not public: None means that it may be connected to."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return Range("no address", never=True)
    if isinstance(ip, ipaddress.IPv6Address) and ip.scope_id:
        return _LINK_LOCAL
    return _special(ip) or (_OWN if is_own(address) else None)


@lru_cache(maxsize=1024)
def _special(ip: IPAddress) -> Range | None:
    for network, found in _NETWORKS:
        if ip in network:
            return found
    if not ip.is_global or ip.is_reserved or ip.is_multicast or (ip.version == 6 and ip not in _UNICAST):
        return _RESERVED
    return None


def is_own(address: str) -> bool:
    """Whether the address belongs to this machine: the kernel then answers from it. No packet is sent."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((address, 9))
            return bool(probe.getsockname()[0] == address)
    except OSError:
        return False
