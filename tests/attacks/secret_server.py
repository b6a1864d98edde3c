"""A server on loopback that nobody may reach: it counts whoever does, by TCP (both families) or UDP."""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

SECRET = "the-secret-of-the-house"
ANSWER = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nAccess-Control-Allow-Origin: *\r\nConnection: close\r\n"
    b"Content-Length: %d\r\n\r\n%b" % (len(SECRET), SECRET.encode())
)


class Secret:
    """`seen` has one entry for each connection or datagram, with its first bytes."""

    def __init__(self) -> None:
        self.seen: list[bytes] = []
        self._waking, self._woken = socket.socketpair()
        self._sockets = [socket.create_server(("127.0.0.1", 0))]
        self.port = int(self._sockets[0].getsockname()[1])
        with suppress(OSError):  # no IPv6 here
            self._sockets.append(socket.create_server(("::1", self.port), family=socket.AF_INET6))
        udp = socket.socket(type=socket.SOCK_DGRAM)
        udp.bind(("127.0.0.1", self.port))
        self._sockets.append(udp)
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def unseen(self) -> str:
        """Asserts that nobody came."""
        assert self.seen == []
        return "the secret server saw nothing"

    def close(self) -> None:
        self._waking.send(b"x")
        self._thread.join()
        for each in (*self._sockets, self._waking, self._woken):
            each.close()

    def _serve(self) -> None:
        with selectors.DefaultSelector() as selector:
            for each in (*self._sockets, self._woken):
                selector.register(each, selectors.EVENT_READ)
            while True:
                for key, _ in selector.select():
                    if key.fileobj is self._woken:
                        return
                    assert isinstance(key.fileobj, socket.socket)
                    with contextlib.suppress(OSError):
                        self._take(key.fileobj)

    def _take(self, server: socket.socket) -> None:
        if server.type == socket.SOCK_DGRAM:
            self.seen.append(server.recv(2000))
            return
        client, _ = server.accept()
        self.seen.append(b"connected")
        with client:
            client.settimeout(1)
            self.seen[-1] = client.recv(2000)
            client.sendall(ANSWER)


@contextmanager
def secret() -> Iterator[Secret]:
    server = Secret()
    try:
        yield server
    finally:
        server.close()
