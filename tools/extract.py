"""Text from web pages, PDFs and text files, taken out in a process of its own that can be killed.

What is parsed here comes from anywhere, so the parsers (lxml, trafilatura, pypdf) run in a worker process with limits on
memory, time and open files; see `extract_worker`. What the worker sends back is treated as untrusted too.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from functools import partial
from typing import Literal, Self

import anyio
import anyio.to_thread
from thinkloop.tools.extract_bounds import MEMORY_MB
from thinkloop.tools.extract_kind import Kind, content_type, kind_of
from thinkloop.tools.extract_process import Answer, Worker, WorkerEnded
from thinkloop.tools.tool import ToolError

__all__ = ["DEADLINE", "BlockingExtractor", "ExtraMissing", "Extractor", "Form", "Kind", "Page"]

Form = Literal["article", "full"]
DEADLINE = 10.0  # seconds for one document
_USES = 500  # documents for one worker, so that nothing a document left behind in it stays for long


class ExtraMissing(ToolError):
    """The libraries that read this kind of document aren't installed; the message names the extra."""


@dataclass(frozen=True, slots=True)
class Page:
    """The text of one document, in lines of at most 500 characters.

    `links` are (text, absolute http or https url), at most 500; in `lines`, `[#3]` after a text marks the third.
    `note` says what was cut or chosen ("cut after 2,000,000 characters", "pages 1-200 of 900"); empty when nothing was.
    """

    title: str
    lines: tuple[str, ...]
    links: tuple[tuple[str, str], ...]
    kind: Kind
    note: str = ""


class BlockingExtractor:
    """One warm worker process, used by one call at a time: a context manager, safe to use from several threads.

    The worker starts with the first document or with `warm`, and is replaced when it was killed.
    """

    def __init__(self, *, deadline: float = DEADLINE, memory: int = MEMORY_MB) -> None:
        """`deadline` is in seconds, for one document; a worker that takes longer is killed. `memory` is the most address
        space it may have, in megabytes."""
        self.deadline, self.memory = deadline, memory
        self._turn = threading.Lock()
        self._worker: Worker | None = None
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def pid(self) -> int | None:
        """The worker's process id; `None` while there is none."""
        worker = self._worker
        return worker.pid if worker and worker.alive else None

    def close(self) -> None:
        """Kill the worker and wait until it is gone, for good. A call under way raises `ToolError`."""
        self._closed = True
        self.stop()

    def stop(self) -> None:
        """Kill the worker and wait until it is gone; from any thread. The next call starts a new one."""
        while not self._turn.acquire(timeout=0.01):
            if worker := self._worker:
                worker.kill()
        try:
            if self._worker:
                self._worker.end()
            self._worker = None
        finally:
            self._turn.release()

    def warm(self) -> None:
        """Start the worker now, so that the first document doesn't wait 0.5 s for it. Raises `ToolError`."""
        with self._turn:
            self._ready()

    def extract(
        self, body: bytes, media_type: str, *, url: str = "", charset: str = "", form: Form = "article"
    ) -> Page:
        """The text of `body`. `media_type` as in Content-Type (empty: look at the data); `url` makes links absolute.

        Raises `ToolError` saying what is wrong with the document, `ExtraMissing` when a library isn't installed.
        """
        kind = kind_of(body, media_type)
        charset = charset or content_type(media_type)[1]
        header = {"kind": kind, "url": url[:2000], "charset": charset[:40], "form": form}
        with self._turn:
            try:
                answer = self._ready().ask(header, body, self.deadline)
            except WorkerEnded as error:
                raise ToolError(f"no text could be taken from this {_name(kind)}: {error}") from None
        return _page(answer, kind)

    def _ready(self) -> Worker:
        worker = self._worker
        if self._closed:
            raise WorkerEnded("the extractor is closed")
        if worker and worker.alive and worker.uses < _USES:
            return worker
        if worker:
            worker.end()
        self._worker = worker = Worker(self.memory)
        worker.greet()
        return worker


class Extractor:
    """As `BlockingExtractor`, for async callers: an async context manager. Calls take turns."""

    def __init__(self, *, deadline: float = DEADLINE, memory: int = MEMORY_MB) -> None:
        """`deadline` is in seconds, for one document; `memory` in megabytes, for the worker."""
        self._blocking = BlockingExtractor(deadline=deadline, memory=memory)
        self._turn = anyio.Lock()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        """Kill the worker and wait until it is gone."""
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(self._blocking.close)

    @property
    def pid(self) -> int | None:
        """The worker's process id; `None` while there is none."""
        return self._blocking.pid

    async def warm(self) -> None:
        """Start the worker now, so that the first document doesn't wait 0.5 s for it. Raises `ToolError`."""
        async with self._turn:
            await anyio.to_thread.run_sync(self._blocking.warm)

    async def extract(
        self, body: bytes, media_type: str, *, url: str = "", charset: str = "", form: Form = "article"
    ) -> Page:
        """The text of `body`. `media_type` as in Content-Type (empty: look at the data); `url` makes links absolute.

        Raises `ToolError` saying what is wrong with the document, `ExtraMissing` when a library isn't installed.
        Cancelling kills the work at once; the next call gets a fresh worker.
        """
        work = partial(self._blocking.extract, body, media_type, url=url, charset=charset, form=form)
        async with self._turn:
            try:
                return await anyio.to_thread.run_sync(work, abandon_on_cancel=True)
            except anyio.get_cancelled_exc_class():
                with anyio.CancelScope(shield=True):
                    await anyio.to_thread.run_sync(self._blocking.stop)
                raise


def _page(answer: Answer, kind: Kind) -> Page:
    if answer.missing:
        extra = f"reading {_name(kind)}s needs {answer.missing}; run `pip install 'thinkloop[browser]'`"
        raise ExtraMissing(extra)
    if answer.error:
        raise ToolError(answer.error)
    return Page(answer.title, answer.lines, answer.links, answer.kind, answer.note)


def _name(kind: Kind) -> str:
    return {"html": "web page", "pdf": "PDF", "text": "text"}[kind]
