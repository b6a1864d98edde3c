"""`thinkloop index`: a folder's search index brought up to date, with a line on what changed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal

from thinkloop.agent.plain import clean
from thinkloop.tools.corpus import index_folder


def execute(folder: Path, engine: Literal["sqlite", "tantivy"]) -> None:
    """Index and print. Raises `ThinkloopError` when there is nothing to index."""
    changes = index_folder(folder, _progress if sys.stderr.isatty() else None, engine=engine)
    print(
        f"{clean(str(folder))}: {changes.added:,} added, {changes.changed:,} changed, {changes.removed:,} removed, "
        f"{changes.unchanged:,} as they were, in {changes.seconds:.1f} s"
    )
    for reason, count in sorted(changes.skipped.items()):
        print(f"skipped {count:,}: {clean(reason)}")


def _progress(done: int, total: int) -> None:
    end = "\n" if done >= total else ""
    print(f"\rindexing: {done:,} of {total:,} files", end=end, file=sys.stderr, flush=True)
