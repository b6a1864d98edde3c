"""Where a model's server is: addresses as people give them, keys as they paste them, what counts as the same place."""

from __future__ import annotations

import contextlib
from urllib.parse import urlsplit, urlunsplit

from thinkloop.traces.events import ThinkloopError


def normal_url(url: str) -> str:
    """The API's base: `https://host`, `https://host/`, `…/v1` and `…/v1/chat/completions` give `https://host/v1`; a
    path that holds a version already is kept. Raises `ThinkloopError` for what can't be an API's address."""
    example = "Give it like https://api.example.com/v1."
    try:
        parts = urlsplit(url.strip())
        host = parts.hostname
        _ = parts.port
    except ValueError as error:
        raise ThinkloopError(f"The model's URL can't be read: {error}. {example}") from None
    if parts.scheme not in ("http", "https") or not host:
        raise ThinkloopError(f"The model's URL must begin with http:// or https:// and name a host. {example}")
    if parts.username or parts.password or parts.query:
        raise ThinkloopError("The model's URL holds a user name, password or query. Put the key into the environment "
                             f"variable THINKLOOP_API_KEY instead. {example}")  # fmt: skip
    path = parts.path.rstrip("/").removesuffix("/chat/completions").rstrip("/")
    versioned = any(part[:1] == "v" and part[1:2].isdigit() for part in path.split("/"))
    return urlunsplit((parts.scheme, parts.netloc, path if versioned else path + "/v1", "", ""))


def checked_key(key: str | None, name: str) -> str:
    """The key without white space around it ("" for none). Raises `ThinkloopError`, key not shown, for a broken one."""
    key = (key or "").strip()
    if not (key.isascii() and (key == "" or key.isprintable())) or " " in key:
        raise ThinkloopError(
            f"The API key in {name} holds characters that no key has (line breaks, spaces or non-ASCII). Set it again."
        )
    return key


def same_origin(url: str, target: str) -> bool:
    """Whether a redirect keeps scheme, host and port, or goes from http to https on one host's standard ports."""
    old, new = urlsplit(url), urlsplit(target)
    with contextlib.suppress(ValueError):
        upgraded = (old.scheme, new.scheme, old.port or 80, new.port or 443) == ("http", "https", 80, 443)
        same = (old.scheme, old.port) == (new.scheme, new.port)
        return old.hostname == new.hostname and not new.username and (same or upgraded)
    return False
