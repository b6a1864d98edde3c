"""The process that parses hostile documents: `python -I -m thinkloop.tools.extract_worker MEGABYTES [UID]`.

It loads its libraries, gives up what it won't need again (opening any file or socket, writing files, forking, being
root), and then answers one request after the other on standard input until it ends. There
is no namespace round it: bubblewrap is the python tool's, whose code is meant to run; here only data is read.
"""

from __future__ import annotations

import encodings
import gc
import importlib
import logging
import math
import os
import pkgutil
import resource
import socket
import sys
from contextlib import suppress
from typing import Any

from thinkloop.tools.extract_bounds import (
    ERROR_CHARS,
    NOTE_CHARS,
    TITLE_CHARS,
    Document,
    DocumentError,
    OutOfTime,
    join_notes,
)
from thinkloop.tools.extract_frame import REQUEST_BODY_CAP, REQUEST_HEADER_CAP, Json, encode, receive
from thinkloop.tools.extract_text import bounded, clean_line, decode, looks_binary

_PATIENCE = 0.8  # share of the host's deadline after which it answers with what it has

_SAMPLE = b"<html><title>t</title><body><article><h1>h</h1>" + b"<p>Some words, for the first run.</p>" * 20
_SAMPLE_PDF = (
    b"%PDF-1.4\n1 0 obj<</Type/Catalog/Pages 2 0 R>>endobj\n2 0 obj<</Type/Pages/Kids[3 0 R]/Count 1>>endobj\n"
    b"3 0 obj<</Type/Page/Parent 2 0 R/MediaBox[0 0 9 9]/Contents 4 0 R/Resources<</Font<</F 5 0 R>>>>>>endobj\n"
    b"4 0 obj<</Length 29>>stream\nBT /F 9 Tf 1 1 Td (one) Tj ET\nendstream endobj\n"
    b"5 0 obj<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>endobj\ntrailer<</Root 1 0 R>>\nstartxref\n0\n%%EOF\n"
)


def main() -> None:
    """Serve until standard input ends."""
    memory, uid = int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else None
    _limit("AS", memory * 1_000_000)
    logging.disable()
    missing = _load()
    channel = socket.socket(fileno=0)
    _lock(uid)
    _send(channel, {"id": "hello"})
    while True:
        header, body = receive(lambda size: _exactly(channel, size), REQUEST_HEADER_CAP, REQUEST_BODY_CAP)
        _limit_cpu(float(header["deadline"]) + 1)
        reply, text = _answer(header, body, missing)
        _send(channel, {**reply, "id": header["id"]}, text.encode("utf-8", "replace"))
        if reply.get("final"):
            return


def _answer(header: Json, body: bytes, missing: dict[str, str]) -> tuple[Json, str]:
    """The reply's header and text. `final` says that this process is not to be used again."""
    library = missing.get(header["kind"])
    if library:
        return {"error": library, "missing": library}, ""
    try:
        return _reply(_read(header, body))
    except DocumentError as error:
        return {"error": str(error)[:ERROR_CHARS]}, ""
    except MemoryError:
        return {"error": "reading it takes more memory than it may have", "final": True}, ""
    except (OutOfTime, Exception) as error:  # a bug in a parser, found by the document
        said = clean_line(f"{type(error).__name__}: {error}", 200)
        return {"error": f"the parser failed on it ({said})", "final": True}, ""


def _read(header: Json, body: bytes) -> Document:
    seconds = float(header["deadline"]) * _PATIENCE
    match header["kind"]:
        case "html":
            from thinkloop.tools.extract_html import read_html

            return read_html(body, url=header["url"], charset=header["charset"], form=header["form"], seconds=seconds)
        case "pdf":
            from thinkloop.tools.extract_pdf import read_pdf

            return read_pdf(body, seconds=seconds)
        case _:
            return _read_text(body, header["charset"])


def _read_text(body: bytes, charset: str) -> Document:
    text = decode(body, charset)
    if looks_binary(text):
        raise DocumentError("binary data: it is no text in any character set")
    first = next((line for line in text[:5000].split("\n") if line.startswith("# ")), "")
    return Document("text", clean_line(first[2:], TITLE_CHARS), text, [], "" if body else "the document is empty")


def _reply(found: Document) -> tuple[Json, str]:
    text = bounded(found.text)
    note = join_notes(found.note, text.note) or ("" if text.lines else "the document has no visible text")
    header = {"kind": found.kind, "title": found.title, "note": note[:NOTE_CHARS], "links": found.links}
    return header, "\n".join(text.lines)


def _load() -> dict[str, str]:
    """Import and run everything once, since nothing can be opened later. Which library is missing, by kind."""
    for module in pkgutil.iter_modules(encodings.__path__):
        with suppress(ImportError, AttributeError):  # those of other systems
            importlib.import_module(f"encodings.{module.name}")
    missing = {}
    for kind, library, sample in (("html", "trafilatura", _SAMPLE), ("pdf", "pypdf", _SAMPLE_PDF)):
        try:
            _read({"kind": kind, "url": "", "charset": "", "form": "article", "deadline": 10}, sample)
        except ImportError as error:
            missing[kind] = f"{library} ({clean_line(str(error), 150)})"
    with suppress(ImportError):
        importlib.import_module("pypdf._crypt_providers")
    gc.freeze()
    return missing


def _lock(uid: int | None) -> None:
    """Give up for good what parsing doesn't need. Descriptors 0 to 2 are taken, so a limit of 3 forbids any new one."""
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 2)
    os.close(silence)
    if uid is not None:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    for name, most in (("NOFILE", 3), ("FSIZE", 0), ("NPROC", 0), ("CORE", 0)):
        _limit(name, most)


def _limit(name: str, most: int) -> None:
    with suppress(AttributeError, ValueError, OSError):  # not every system has every limit
        kind = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(kind)[1]
        resource.setrlimit(kind, (most, most) if hard == resource.RLIM_INFINITY else (min(most, hard),) * 2)


def _limit_cpu(seconds: float) -> None:
    """The kernel ends this process after so much more processor time, whether or not the host still lives."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    soft = math.ceil(used.ru_utime + used.ru_stime + seconds)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.getrlimit(resource.RLIMIT_CPU)[1]))


def _send(channel: socket.socket, header: dict[str, Any], body: bytes = b"") -> None:
    for part in encode(header, body):
        channel.sendall(part)


def _exactly(channel: socket.socket, size: int) -> bytes:
    data = bytearray(size)
    view = memoryview(data)
    while view:
        count = channel.recv_into(view)
        if not count:
            sys.exit(0)  # the host is gone
        view = view[count:]
    return bytes(data)


if __name__ == "__main__":
    main()
