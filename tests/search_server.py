"""Search services on loopback: SearXNG, Brave, Tavily and Serper in their published formats, and ways for them to fail.

    with SearchServer() as server:
        SearXNG(server.url), Brave(KEY, base_url=server.url), ...
        server.fail("brave", status(429, {}, {"Retry-After": "1"}))

`fail` queues answers for one service; after them it behaves again. `server.requests` holds what was asked. Other paths
than the services' are looked up in `server.pages`.
"""

from __future__ import annotations

import gzip
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import repeat
from typing import Any
from urllib.parse import parse_qsl, urlsplit

Json = dict[str, Any]
KEY = "sk-b7d1f0c2e95a4d38"
"""The key that the services take."""

RESULTS: tuple[tuple[str, str, str], ...] = (
    ("https://ports.example/bergen", "Bergen harbour", "The <strong>harbour</strong> of Bergen &amp; its ferries."),
    ("https://ports.example/oslo", "Oslo harbour", "Ferries leave Oslo daily."),
    ("http://tides.example/?day=3", "Tide tables", "High water at 06:12."),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """`body` is sent in pieces, as long as it gives any; without `whole` the connection ends before the promised end."""

    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    body: Callable[[], Iterator[bytes]] = lambda: iter(())
    whole: bool = True
    silent: bool = False
    """Nothing is said until the client gives up."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A request: which service, and what it was given."""

    service: str
    params: Json
    headers: Mapping[str, str]


def status(code: int, body: Any = None, headers: Mapping[str, str] | None = None) -> Answer:
    """An answer with a body: JSON unless bytes."""
    data = body if isinstance(body, bytes) else json.dumps({} if body is None else body).encode()
    return Answer(
        status=code, headers={"Content-Type": "application/json"} | dict(headers or {}), body=lambda: iter([data])
    )


def endless() -> Answer:
    """JSON that never ends."""
    return Answer(body=lambda: repeat(b'{"results": [' + b" " * 65_536))


def trickle(seconds: float) -> Answer:
    """A byte now and then, for ever."""

    def pieces() -> Iterator[bytes]:
        while True:
            yield b" "
            time.sleep(seconds)

    return Answer(body=pieces)


def bomb() -> Answer:
    """64 MB of blanks in 64 kB of gzip."""
    return status(200, gzip.compress(b" " * (64 << 20), 6), {"Content-Encoding": "gzip"})


def cut(body: bytes = b'{"results": [{"url": "https://a.example/"') -> Answer:
    """The beginning of an answer."""
    return Answer(body=lambda: iter([body]), whole=False)


class SearchServer:
    """A thread for each connection; `url` is the base of every service."""

    def __init__(self, results: tuple[tuple[str, str, str], ...] = RESULTS) -> None:
        self.results = results
        self.requests: list[Asked] = []
        self.pages: dict[str, str] = {}
        self.hold = threading.Event()
        self.hold.set()
        self._failures: dict[str, list[Answer]] = {}
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self.closing = threading.Event()
        self.port = int(self._server.server_address[1])
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> SearchServer:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.closing.set()
        self.hold.set()
        self._server.shutdown()
        self._server.server_close()

    def fail(self, service: str, *answers: Answer) -> None:
        """The next answers of a service."""
        self._failures.setdefault(service, []).extend(answers)

    def asked(self, service: str) -> list[Asked]:
        return [request for request in self.requests if request.service == service]

    def answer(self, asked: Asked) -> Answer:
        self.requests.append(asked)
        self.hold.wait(10)
        queue = self._failures.get(asked.service, [])
        return queue.pop(0) if queue else _FORMATS[asked.service](asked, self.results)

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                url = urlsplit(self.path)
                service = {"/search": "searxng", "/res/v1/web/search": "brave"}.get(url.path)
                if service:
                    return self._send(outer.answer(Asked(service, dict(parse_qsl(url.query)), self._headers())))
                return self._page(outer.pages.get(url.path))

            def do_POST(self) -> None:
                headers = self._headers()
                params = json.loads(self.rfile.read(int(headers["content-length"])))
                service = "serper" if "x-api-key" in headers else "tavily"
                self._send(outer.answer(Asked(service, params, headers)))

            def _headers(self) -> dict[str, str]:
                return {name.lower(): value for name, value in self.headers.items()}

            def _page(self, page: str | None) -> None:
                outer.requests.append(Asked("page", {"path": self.path}, {}))
                html = {"Content-Type": "text/html; charset=utf-8"}
                self._send(status(404, b"") if page is None else status(200, page.encode(), html))

            def _send(self, answer: Answer) -> None:
                if answer.silent:
                    outer.closing.wait(30)
                    self.close_connection = True
                    return
                self.send_response(answer.status)
                for name, value in ({"Transfer-Encoding": "chunked"} | dict(answer.headers)).items():
                    self.send_header(name, value)
                self.end_headers()
                try:
                    self._send_body(answer)
                except OSError:
                    self.close_connection = True

            def _send_body(self, answer: Answer) -> None:
                for piece in answer.body():
                    if outer.closing.is_set():
                        break
                    self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece) if piece else b"")
                if answer.whole:
                    self.wfile.write(b"0\r\n\r\n")
                self.close_connection = not answer.whole

            def log_message(self, format: str, *args: Any) -> None:
                """Tests look at `requests`."""

        return Handler


def _searxng(asked: Asked, results: tuple[tuple[str, str, str], ...]) -> Answer:
    if asked.params.get("format") != "json":
        return status(200, b"<!doctype html><title>SearXNG</title>", {"Content-Type": "text/html"})
    rows = [
        {"url": url, "title": title, "content": text, "engine": "duckduckgo", "engines": ["duckduckgo"], "score": 1.0,
         "category": "general", "template": "default.html", "parsed_url": ["https", "a", "/", "", "", ""],
         "positions": [place], "publishedDate": None}
        for place, (url, title, text) in enumerate(results, 1)
    ]  # fmt: skip
    return status(200, {
        "query": asked.params["q"], "number_of_results": 0, "results": rows, "answers": [], "corrections": [],
        "infoboxes": [], "suggestions": [], "unresponsive_engines": [],
    })  # fmt: skip


def _brave(asked: Asked, results: tuple[tuple[str, str, str], ...]) -> Answer:
    if asked.headers.get("x-subscription-token") != KEY:
        return brave_error(422, "SUBSCRIPTION_TOKEN_INVALID", "The provided subscription token is invalid.")
    rows = [
        {"type": "search_result", "subtype": "generic", "url": url, "title": title, "description": text,
         "is_source_local": False, "language": "en", "family_friendly": True, "profile": {"name": "Example", "url": url}}
        for url, title, text in results[: int(asked.params["count"])]
    ]  # fmt: skip
    found: Json = {"type": "search", "query": {"original": asked.params["q"]}, "mixed": {"type": "mixed", "main": []}}
    return status(200, found | ({"web": {"type": "search", "results": rows}} if rows else {}))


def brave_error(code: int, name: str, detail: str, headers: Mapping[str, str] | None = None) -> Answer:
    """An error in Brave's form."""
    error = {"id": "5d832250", "status": code, "detail": detail, "meta": {"component": "authentication"}, "code": name}
    return status(code, {"type": "ErrorResponse", "error": error, "time": 1663072993}, headers)


def _tavily(asked: Asked, results: tuple[tuple[str, str, str], ...]) -> Answer:
    if asked.headers.get("authorization") != f"Bearer {KEY}":
        return status(401, {"detail": {"error": "Unauthorized: missing or invalid API key."}})
    rows = [
        {"url": url, "title": title, "content": text, "score": 0.9, "raw_content": None}
        for url, title, text in results[: asked.params["max_results"]]
    ]
    return status(200, {
        "query": asked.params["query"], "follow_up_questions": None, "answer": None, "images": [], "results": rows,
        "response_time": 0.51, "request_id": "123e4567",
    })  # fmt: skip


def _serper(asked: Asked, results: tuple[tuple[str, str, str], ...]) -> Answer:
    if asked.headers.get("x-api-key") != KEY:
        return status(403, {"message": "Unauthorized.", "statusCode": 403})
    rows = [
        {"title": title, "link": url, "snippet": text, "position": place}
        for place, (url, title, text) in enumerate(results[: asked.params["num"]], 1)
    ]
    parameters = {"q": asked.params["q"], "type": "search", "num": asked.params["num"], "engine": "google"}
    return status(200, {"searchParameters": parameters, "organic": rows, "relatedSearches": [], "credits": 1})


_FORMATS: Mapping[str, Callable[[Asked, tuple[tuple[str, str, str], ...]], Answer]] = {
    "searxng": _searxng, "brave": _brave, "tavily": _tavily, "serper": _serper,
}  # fmt: skip
