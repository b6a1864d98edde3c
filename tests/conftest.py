"""Fixtures every room's tests share."""

import os
from pathlib import Path

import pytest

if not Path("/proc/driver/nvidia/version").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is decorated, so before any kernel is imported


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"
