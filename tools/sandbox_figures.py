"""matplotlib's backend inside the sandbox: figures become PNG, and no window is ever opened.

The host copies this file in as text; the runner imports it once matplotlib is used.
"""

from __future__ import annotations

import sys
from io import BytesIO
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.backends.backend_agg import FigureCanvasAgg as FigureCanvas

__all__ = ["FigureCanvas", "show", "take"]

MOST = 20
"""Figures of one cell; matplotlib itself warns above twenty."""

_shown: list[bytes] = []


def show(*_args: Any, **_options: Any) -> None:
    """`plt.show()`: draw every open figure and close it."""
    for number in plt.get_fignums():
        try:
            if len(_shown) < MOST:
                _shown.append(_drawn(number))
            else:
                print(f"Figure {number} isn't shown: a cell shows {MOST} at most.", file=sys.stderr)
        finally:  # one that can't be drawn must not be tried again after every cell
            plt.close(number)


def take() -> list[bytes]:
    """The PNGs of what was shown since the last time and of what is still open."""
    show()
    pictures, _shown[:] = list(_shown), []
    return pictures


def _drawn(number: int) -> bytes:
    buffer = BytesIO()
    plt.figure(number).savefig(buffer, format="png")
    return buffer.getvalue()
