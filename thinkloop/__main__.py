"""`thinkloop` and `python -m thinkloop`."""

from __future__ import annotations

import os
import sys

INTERRUPTED = 130


def main() -> None:
    """The command line. Exits 0 for an answer, 1 for an error, 2 for wrong usage, 130 for Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        # A terminal that can't show a character gets a question mark, not a traceback.
        getattr(stream, "reconfigure", lambda **_: None)(errors="replace")
    try:
        from thinkloop.agent.cli import app

        app(prog_name="thinkloop")
    except KeyboardInterrupt:
        _leave()
    except SystemExit as end:
        if end.code == INTERRUPTED:
            _leave()
        raise


def _leave() -> None:
    """Exit at once: a thread that is still loading a model would hold up a normal exit for as long as that takes."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(INTERRUPTED)


if __name__ == "__main__":
    main()
