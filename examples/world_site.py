"""The sample world as a web site on loopback: `/page/NAME` is a page as HTML, `/search?q=…&format=json` finds pages and
answers as SearXNG does. Other examples browse it, so that they need no network; run alone, it serves until Ctrl-C.
"""

from __future__ import annotations

import html
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote, urlsplit

import thinkloop.engine
from thinkloop.tools.corpus import Corpus

WORLD = Path(thinkloop.engine.__file__).parent / "mini" / "world"


def page(markdown: str) -> bytes:
    """The Markdown of the world (a heading, lines, a list) as HTML."""
    title, *lines = markdown.strip().splitlines()
    body = "".join(_block(line) for line in lines if line.strip())
    name = html.escape(title.removeprefix("# "))
    body = re.sub(r"(<li>.*</li>)", r"<ul>\1</ul>", body)
    return f"<!doctype html><title>{name}</title><main><h1>{name}</h1>{body}</main>".encode()


def _block(line: str) -> str:
    if line.startswith("- "):
        return f"<li>{html.escape(line[2:])}</li>"
    return f"<p>{html.escape(line)}</p>"


@contextmanager
def world_site(folder: Path = WORLD) -> Iterator[str]:
    """The site's address, `http://127.0.0.1:PORT`, until the block ends."""
    corpus = Corpus(folder)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            parts = urlsplit(self.path)
            if parts.path == "/search":
                return self._send(self._results(parse_qs(parts.query)["q"][0]), "application/json")
            path = folder / f"{Path(unquote(parts.path)).name}.md"
            if not path.is_file():
                return self.send_error(404)
            return self._send(page(path.read_text("utf-8")), "text/html; charset=utf-8")

        def _results(self, query: str) -> bytes:
            address = f"http://{self.headers['Host']}/page/"
            hits = [
                {"url": address + quote(hit.title), "title": hit.title, "content": hit.text}
                for hit in corpus.search(query, 10)
            ]
            return json.dumps({"query": query, "results": hits, "unresponsive_engines": []}).encode()

        def _send(self, body: bytes, media_type: str) -> None:
            self.send_response(200)
            self.send_header("Content-Type", media_type)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
        corpus.close()


if __name__ == "__main__":
    with world_site() as address:
        print(f"{address}/page/Mekres", flush=True)
        threading.Event().wait()
