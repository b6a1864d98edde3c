"""MCP servers as people write them: `[mcp.NAME]` tables of a settings file, and `name=command` on the command line."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

from thinkloop.traces.events import ThinkloopError

_KINDS: Mapping[str, tuple[type | tuple[type, ...], str]] = {
    "command": ((str, list), "a text or a list of texts"),
    "url": (str, "a text"),
    "env": (dict, "a table of texts"),
    "headers": (dict, "a table of texts"),
    "allow_hosts": (list, "a list of texts"),
    "sandbox": (bool, "true or false"),
    "effect": (str, '"read", "write" or "hint"'),
    "deadline": ((int, float), "a number of seconds"),
    "budget": (int, "a number of tokens"),
    "only": (list, "a list of texts"),
    "pin": (str, "a text"),
}
_NAME = re.compile(r"[A-Za-z0-9_-]{1,32}")
_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")


def parse_table(name: str, table: Any) -> dict[str, Any]:
    """Options for `MCP` from one `[mcp.NAME]` table. `${VARIABLE}` in `env` and `headers` is taken from the environment.

    Raises `ThinkloopError` for unknown keys, wrong types and variables that aren't set.
    """
    if not isinstance(table, Mapping):
        raise ThinkloopError(f"[mcp.{name}] must be a table with `command` or `url`.")
    options = {str(key).replace("-", "_"): value for key, value in table.items()}
    for key, value in options.items():
        _check(name, key, value)
    _check_secrets(name, options)
    for key in ("env", "headers"):
        if key in options:
            options[key] = {field: _expanded(name, key, text) for field, text in options[key].items()}
    if isinstance(options.get("command"), str):
        options["command"] = _split(f"[mcp.{name}]", options["command"])
    return {"name": name, **options}


def parse_options(text: str) -> dict[str, Any]:
    """Options for `MCP` from `NAME=COMMAND ARGUMENTS` or `NAME=URL`. Raises `ThinkloopError`."""
    name, equals, rest = text.partition("=")
    name, rest = name.strip(), rest.strip()
    if not (name and equals and rest):
        raise ThinkloopError(f"--mcp {text!r} must be NAME=COMMAND or NAME=https://….")
    if re.match(r"https?://", rest, re.IGNORECASE):
        return {"name": name, "url": rest}
    return {"name": name, "command": _split("--mcp", rest)}


def check_options(
    name: str, *, command: Any, url: Any, env: Any, headers: Mapping[str, str], sandbox: bool, effect: str,
    deadline: float, budget: int,
) -> None:  # fmt: skip
    """Raises `ThinkloopError` for options of `MCP` that don't go together."""
    problems = {
        "its name must be 1 to 32 letters, digits, `_` or `-`": not _NAME.fullmatch(name),
        "give either `command` or `url`": (command is None) == (url is None),
        "`command` must be a list of texts: the program and its arguments": command is not None
        and not _is_words(command),
        "`headers` are for a `url`": command is not None and bool(headers),
        "`headers` must be printable ASCII": not all(map(_is_plain, (*headers, *headers.values()))),
        "`env` and `sandbox` are for a `command`": url is not None and (bool(env) or sandbox),
        f'`effect` is {effect!r}; it must be "read", "write" or "hint"': effect not in ("read", "write", "hint"),
        "`deadline` (seconds) and `budget` (tokens) must be positive": not (deadline > 0 and budget > 0),
    }
    for problem, found in problems.items():
        if found:
            raise ThinkloopError(f"The MCP server {name!r}: {problem}.")


def _is_words(command: Any) -> bool:
    return not isinstance(command, str) and len(command) > 0 and all(isinstance(word, str) for word in command)


def _is_plain(text: str) -> bool:
    return text.isascii() and text.isprintable()


def _check(name: str, key: str, value: Any) -> None:
    if key not in _KINDS:
        raise ThinkloopError(f"[mcp.{name}] has an unknown key {key!r}. Known are: {', '.join(_KINDS)}.")
    kind, words = _KINDS[key]
    parts = value if isinstance(value, list) else value.values() if isinstance(value, Mapping) else ()
    right = isinstance(value, kind) and (not isinstance(value, bool) or kind is bool)
    if not right or not all(isinstance(part, str) for part in parts):
        raise ThinkloopError(f"[mcp.{name}]: `{key}` must be {words}.")


def _check_secrets(name: str, options: Mapping[str, Any]) -> None:
    """What stands in a variable is a secret, most often."""
    expands = any(_VARIABLE.search(text) for text in options.get("headers", {}).values())
    if expands and not _is_confidential(options.get("url", "")):
        raise ThinkloopError(
            f"[mcp.{name}]: `headers` take a value from the environment, which would go to {options['url']!r} unencrypted. "
            "Use an https address (plain http is for this machine alone), or leave the header out."
        )


def _is_confidential(url: str) -> bool:
    """Whether what goes to `url` can't be read on the way: https, or this machine."""
    try:
        parts = urlsplit(url)
        host = (parts.hostname or "").rstrip(".")
        return parts.scheme != "http" or host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def _expanded(name: str, key: str, text: str) -> str:
    def value(match: re.Match[str]) -> str:
        found = os.environ.get(match[1])
        if found is None:
            raise ThinkloopError(f"[mcp.{name}]: `{key}` needs the environment variable {match[1]}, which is not set.")
        return found

    return _VARIABLE.sub(value, text)


def _split(where: str, text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise ThinkloopError(f"{where}: the command {text!r} can't be split into words: {error}.") from None
