"""Runs inside the browser's sandbox, with the standard library alone: starts the browser, and carries its connections
from 127.0.0.1 (the only network there is) to the proxies' unix sockets.

    python -I -S browser_relay.py PORT=SOCKET[,PORT=SOCKET] BROWSER [ARGUMENT...]
"""

from __future__ import annotations

import socket
import subprocess
import sys
from contextlib import suppress
from threading import Thread

_CHUNK = 1 << 16
_DEVTOOLS_PIPE = (3, 4)


def _carry(source: socket.socket, target: socket.socket) -> None:
    """Bytes from one side to the other until either ends; then both know, so that nothing waits for ever."""
    with suppress(OSError):
        while data := source.recv(_CHUNK):
            target.sendall(data)
    for end, how in ((source, socket.SHUT_RD), (target, socket.SHUT_WR)):
        with suppress(OSError):
            end.shutdown(how)


def _connection(client: socket.socket, path: str) -> None:
    with client, socket.socket(socket.AF_UNIX) as proxy:
        try:
            proxy.connect(path)
        except OSError:
            return
        back = Thread(target=_carry, args=(proxy, client), daemon=True)
        back.start()
        _carry(client, proxy)
        back.join()


def _serve(listener: socket.socket, path: str) -> None:
    while True:
        client, _ = listener.accept()
        Thread(target=_connection, args=(client, path), daemon=True).start()


def main(ways: str, *command: str) -> int:
    """Run the browser; its exit status is ours."""
    for way in ways.split(","):
        port, _, path = way.partition("=")
        listener = socket.create_server(("127.0.0.1", int(port)), backlog=128)
        Thread(target=_serve, args=(listener, path), daemon=True).start()
    return subprocess.run(command, pass_fds=_DEVTOOLS_PIPE, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
