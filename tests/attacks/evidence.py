"""From what a result says to the layer that said it."""

from __future__ import annotations

import re
from collections.abc import Awaitable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

_LAYERS = (
    (r"is refused: the address is ([^,.]+)", "address rule: {0}"),
    (r"resolves to \S+ and is refused: the address is ([^,.]+)", "address rule, after one resolution: {0}"),
    (r"is refused: it is a (cloud metadata service|name of a private network)", "name rule: {0}"),
    (r"(Port \d+ of \S+ is refused|No https to port \d+)", "port rule: {0}"),
    (r"(no IPv[46] address)", "URL rule, one spelling a host: {0}"),
    (r"(no host name)", "URL rule, one spelling a host: {0}"),
    (r"(no http or https URL)", "URL rule: {0}"),
    (r"(a user name before the host)", "URL rule: {0}"),
    (r"contains ('[^']*'), which a URL may not", "URL rule: no {0} in it"),
    (r"(no valid port)", "URL rule: {0}"),
    (r"(at most 8000 are taken)", "URL rule: {0}"),
    (r"(there is no document)", "neither an id nor a web address: {0}"),
    (r"(redirects in a (?:loop|circle))", "redirect limit: {0}"),
    (r"(leads on through more than \d+ redirects)", "redirect limit: {0}"),
    (r"(ERR_[A-Z_]+)", "Chromium: {0}"),
    (r"(which is not shown)", "scheme rule on arrival: {0}"),
    (r"(pages of private hosts lead nowhere else)", "origin rule of the browser: {0}"),
    (r"(can't be found)", "resolver: {0}"),
)


def layer(said: str) -> str:
    """The layer whose words are in `said`. Raises `AssertionError` when none is known."""
    for pattern, form in _LAYERS:
        if match := re.search(pattern, said):
            return form.format(match[1])
    raise AssertionError(f"no known layer says this: {said[:500]}")


async def peak_of(work: Awaitable[T]) -> tuple[T, int]:
    """The result, and by how many megabytes this process's memory grew at its highest meanwhile."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = megabytes_of("VmRSS")
    result = await work
    return result, max(0, megabytes_of("VmHWM") - before)


def megabytes_of(field: str) -> int:
    """A field of `/proc/self/status`: `VmRSS` is what this process has, `VmHWM` the most that it had."""
    rows = Path("/proc/self/status").read_text().splitlines()
    return int(next(row for row in rows if row.startswith(field)).split()[1]) >> 10
