"""A chat server on loopback that behaves, or misbehaves, as told. Raw sockets, so that every byte is chosen here.

    with ChatServer([turn(thinking="…", content="hi"), status(429, headers={"Retry-After": "0"})]) as server:
        ChatClient(server.url, "m")

Each request takes the next `Reply` of the list (the last one is repeated); `server.requests` holds what was asked.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

Json = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """`pieces` are sent as they are (bytes), or waited for (seconds). `cut` closes the connection without an end."""

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    pieces: Sequence[bytes | float] = ()
    cut: bool = False
    silent: bool = False
    """Read the request, say nothing until the client gives up."""


@dataclass(frozen=True, slots=True)
class Request:
    method: str
    path: str
    headers: dict[str, str]
    body: Any


def sse(chunks: Iterable[Any], *, done: bool = True, end: str = "\n\n") -> list[bytes]:
    """The chunks as server-sent events, one piece each."""
    lines = [json.dumps(chunk, ensure_ascii=False) for chunk in chunks] + (["[DONE]"] if done else [])
    return [f"data: {line}{end}".encode() for line in lines]


def delta(finish: str | None = None, **fields: Any) -> Json:
    """One chunk with the given delta fields."""
    return {"object": "chat.completion.chunk", "choices": [{"index": 0, "delta": fields, "finish_reason": finish}]}


def call(index: int, name: str, arguments: Any, call_id: str = "call_x") -> Json:
    """A whole tool call as a delta's element."""
    return {"index": index, "id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def turn(
    *, thinking: str = "", content: str = "", calls: Sequence[tuple[str, Any]] = (), usage: Json | None = None
) -> Reply:
    """A well-behaved streamed turn."""
    chunks = [delta(reasoning_content=word) for word in _words(thinking)]
    chunks += [delta(content=word) for word in _words(content)]
    for index, (name, arguments) in enumerate(calls):
        text = arguments if isinstance(arguments, str) else json.dumps(arguments)
        chunks.append(delta(tool_calls=[call(index, name, "", f"call_{name}_{index}")]))
        chunks += [
            delta(tool_calls=[{"index": index, "function": {"arguments": text[at : at + 7]}}])
            for at in range(0, len(text), 7)
        ]
    chunks.append(delta(finish="tool_calls" if calls else "stop"))
    counts = usage if usage is not None else {"prompt_tokens": 100, "completion_tokens": 20, "total_tokens": 120}
    return stream([*chunks, {"choices": [], "usage": counts}])


def stream(chunks: Iterable[Any], *, done: bool = True, cut: bool = False) -> Reply:
    """Chunks as an event stream."""
    return Reply(pieces=sse(chunks, done=done), cut=cut)


def status(code: int, body: Any = None, headers: dict[str, str] | None = None) -> Reply:
    """An HTTP error with a body (JSON unless bytes)."""
    text = body if isinstance(body, bytes) else json.dumps(body or {"error": {"message": f"status {code}"}}).encode()
    return Reply(status=code, headers={"Content-Type": "application/json"} | (headers or {}), pieces=[text])


def _words(text: str) -> list[str]:
    return [text[at : at + 5] for at in range(0, len(text), 5)]


class ChatServer:
    """A thread for each connection; `url` is the base without `/v1`. `models` answers `GET /v1/models`."""

    def __init__(self, replies: Sequence[Reply], models: Sequence[str] = ()) -> None:
        self.requests: list[Request] = []
        self.connections = 0
        self._replies = list(replies)
        self._models = models
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self.port = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> ChatServer:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._closing.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(5)

    @property
    def posts(self) -> list[Request]:
        """The chat requests."""
        return [request for request in self.requests if request.method == "POST"]

    def _accept(self) -> None:
        while not self._closing.is_set():
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, connection.makefile("rb") as reader:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            try:
                while (request := _read_request(reader)) is not None and self._answer(connection, request):
                    pass
            except OSError:
                return

    def _answer(self, connection: socket.socket, request: Request) -> bool:
        """Whether the connection stays open."""
        with self._lock:
            self.requests.append(request)
            reply = self._models_reply() if request.method == "GET" else self._next_reply()
        if reply.silent:
            self._closing.wait(10)
            return False
        headers = {"Content-Type": "text/event-stream", "Transfer-Encoding": "chunked"} | reply.headers
        head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        connection.sendall(f"HTTP/1.1 {reply.status} Status\r\n{head}\r\n".encode("latin-1"))
        for piece in reply.pieces:
            if isinstance(piece, bytes):
                connection.sendall(b"%x\r\n%b\r\n" % (len(piece), piece) if piece else b"")
            else:
                time.sleep(piece)
        if not reply.cut:
            connection.sendall(b"0\r\n\r\n")
        return not reply.cut

    def _models_reply(self) -> Reply:
        body = {"data": [{"id": name} for name in self._models]}
        return status(200, body) if self._models else status(404)

    def _next_reply(self) -> Reply:
        return self._replies.pop(0) if len(self._replies) > 1 else self._replies[0]


def _read_request(reader: Any) -> Request | None:
    line = reader.readline().decode("latin-1")
    if not line.strip():
        return None
    method, path, _ = line.split(" ", 2)
    headers: dict[str, str] = {}
    while (header := reader.readline().decode("latin-1").strip()) != "":
        name, _, value = header.partition(":")
        headers[name.lower()] = value.strip()
    body = reader.read(int(headers.get("content-length", 0)))
    return Request(method, path, headers, json.loads(body) if body else None)
