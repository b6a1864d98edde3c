"""Chromium's and Playwright's errors in sentences for a model."""

from __future__ import annotations

import re

from thinkloop.tools.addresses import AddressError, authority, parse_url
from thinkloop.tools.extract_text import clean_line

_NET = re.compile(r"net::(ERR_[A-Z_0-9]+)")
_COVERED = re.compile(r"(<[^>]{1,200}>).{0,300}? intercepts pointer events", re.DOTALL)
_MEANING = {
    "ERR_TOO_MANY_REDIRECTS": "it redirects in a circle",
    "ERR_ABORTED": "the server sent nothing that can be shown",
    "ERR_HTTP_RESPONSE_CODE_FAILURE": "the server answered with an error and no page",
    "ERR_EMPTY_RESPONSE": "the server closed the connection without an answer",
    "ERR_BLOCKED_BY_ADMINISTRATOR": "such addresses are not opened here",
    "ERR_UNSAFE_REDIRECT": "it redirects to an address that is not opened here",
    "ERR_CERT_AUTHORITY_INVALID": "its certificate is not trusted",
    "ERR_CERT_COMMON_NAME_INVALID": "its certificate is for another host",
    "ERR_CERT_DATE_INVALID": "its certificate has expired",
    "ERR_SSL_PROTOCOL_ERROR": "it does not speak https properly",
    "ERR_TUNNEL_CONNECTION_FAILED": "it can't be reached",
    "ERR_UNSAFE_PORT": "its port is not one of a web server",
    "ERR_INVALID_RESPONSE": "the server's answer is malformed",
    "ERR_INCOMPLETE_CHUNKED_ENCODING": "the answer was cut short",
    "ERR_CONTENT_LENGTH_MISMATCH": "the answer was cut short",
}
_ACTIONS = (
    ("is not an <input>", "it is no field to fill; use browser_click"),
    ("cannot be filled", "it is no field to fill with text; use browser_click"),
    ("not a <select>", "it is no select field; use browser_click"),
    ("is not enabled", "it is disabled"),
    ("is not visible", "it is hidden"),
    ("is outside of the viewport", "it can't be brought into view"),
    ("is not editable", "it is read-only"),
)


def net_error(message: str) -> str:
    """What Chromium's `net::ERR_…` in `message` means; empty where there is none."""
    match = _NET.search(message)
    return f"{_MEANING[match[1]]} ({match[1]})" if match and match[1] in _MEANING else match[1] if match else ""


def why_not_done(message: str) -> str:
    """Why an element could not be clicked or filled, from Playwright's call log."""
    if covered := _COVERED.search(message):
        return f"another element covers it: {clean_line(covered[1], 200)}"
    for sign, meaning in _ACTIONS:
        if sign in message:
            return meaning
    return first_line(message)


def first_line(message: str) -> str:
    """Of a long report."""
    return clean_line(message.strip().split("\n", 1)[0], 300)


def places(url: str) -> tuple[str, ...]:
    """How the proxy names requests to `url`: in full, and as a tunnel."""
    bare = url.partition("#")[0]
    try:
        place = parse_url(bare)
    except AddressError:
        return (bare,)
    return (bare, authority(place.host, place.port))
