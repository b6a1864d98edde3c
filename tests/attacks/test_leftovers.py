"""After all rows: nothing that the battery started or made is left."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from leftovers import Left

pytestmark = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads /proc")


def test_something_is_left_of_all_these_attacks(
    before: Left, temporary_folder: Path, held: Callable[[str], None]
) -> None:
    until = time.monotonic() + 5
    while (now := _now()).processes - before.processes and time.monotonic() < until:
        time.sleep(0.05)
    assert now.processes - before.processes == set()
    assert now.descriptors - before.descriptors == set()
    assert [path.name for path in temporary_folder.iterdir()] == []
    held(
        f"structured ends: no process, {len(now.descriptors - before.descriptors)} sockets or pipes, no file in the "
        "temporary folder"
    )


def _now() -> Left:
    gc.collect()
    return Left.now()
