"""A chat model on an OpenAI-compatible server: one streamed turn at a time, with time, size and retry limits.

What the server sends is never trusted: every wait has a deadline, every line and reply a size limit, the reply is asked
for uncompressed (a few bytes can't unpack into gigabytes), and redirects are followed on the same origin only, so that
the key can't be sent elsewhere.
"""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urljoin, urlsplit, urlunsplit

import anyio
from anyio.lowlevel import RunVar
from thinkloop.engine.address import checked_key, normal_url, same_origin
from thinkloop.engine.chunks import ReplyReader, error_of
from thinkloop.engine.reading import Reading, Timeouts
from thinkloop.engine.refusals import BadReply, RemoteError, ServerUnreachable, late, refusal
from thinkloop.engine.sse import MAX_LINE, BadStream, SseDecoder, loads
from thinkloop.traces.events import Event, Json, ThinkloopError

if TYPE_CHECKING:
    import httpx
    from thinkloop.engine.params import Sampling

MAX_REPLY = 256 * 2**20
"""Most bytes of one reply: 96K thinking tokens at 300 bytes a chunk are 30 MB."""

MAX_ERROR = 64 * 2**10
MAX_REDIRECTS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Backoff:
    """Waits between attempts: `first` doubled each time up to `most`, of which a random half is taken off; a server's
    `Retry-After` is honoured up to `most`."""

    first: float = 0.5
    most: float = 30.0

    def seconds(self, attempt: int, retry_after: float | None) -> float:
        """How long to wait after attempt number `attempt` (from 0) failed."""
        delay = min(self.most, self.first * 2.0 ** min(attempt, 30)) * random.uniform(0.5, 1.0)
        return min(self.most, max(delay, retry_after or 0.0))


class ChatClient:
    """Streams turns from `POST {base_url}/chat/completions`.

    `base_url` may be given with or without `/v1`, a trailing slash or the endpoint's own path. `key_name` is the
    environment variable that messages tell people to set. Requests that fail before anything was yielded are sent again
    up to `max_retries` times when that can help: no connection, 408, 409, 429 (but not for a spent quota), 5xx, a cut
    stream.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        api_key: str | None = None,
        key_name: str = "THINKLOOP_API_KEY",
        sampling: Sampling | None = None,
        timeouts: Timeouts | None = None,
        backoff: Backoff | None = None,
        max_retries: int = 4,
        max_line: int = MAX_LINE,
        max_reply: int = MAX_REPLY,
    ) -> None:
        self.base_url = normal_url(base_url)
        self.model = model
        self.max_retries = max_retries
        self._key = checked_key(api_key, key_name)
        self._key_name = key_name
        self._sampling = sampling_fields(sampling)
        self._timeouts = timeouts or Timeouts()
        self._backoff = backoff or Backoff()
        self._max_line, self._max_reply = max_line, max_reply
        self._url = self.base_url + "/chat/completions"
        self._with_usage = True
        self._client: RunVar[httpx.AsyncClient | None] = RunVar("chat_client", None)

    async def stream(
        self,
        messages: Sequence[Json],
        tools: Sequence[Json] = (),
        *,
        max_tokens: int | None = None,
        tool_choice: Literal["auto", "none"] = "auto",
        response_format: Json | None = None,
    ) -> AsyncGenerator[Event, None]:
        """One turn's events: `Thinking`, `Content`, `ToolCallDelta` as they come; `ToolCall`s, `Usage`, `TurnFinished`.

        Raises `ServerUnreachable`, `ServerRefused` or `BadReply` when there is no answer to be had, `StreamCut` when
        it broke off after events were yielded (it says how far it got; the caller decides whether to ask again).
        """
        fields = {"max_tokens": max_tokens, "tool_choice": tool_choice, "response_format": response_format}
        attempt = 0
        while True:
            began = False
            try:
                async with contextlib.aclosing(self._attempt(self._body(messages, tools, fields), tools)) as events:
                    async for event in events:
                        began = True
                        yield event
                return
            except RemoteError as error:
                if began or not error.again or attempt >= self._most_retries(error):
                    raise error.after(attempt + 1) from None
                await self._wait(error, attempt)
                attempt += 1

    def _most_retries(self, error: RemoteError) -> int:
        return min(self.max_retries, 1) if error.late else self.max_retries

    async def _wait(self, error: RemoteError, attempt: int) -> None:
        if error.about_usage and self._with_usage:
            self._with_usage = False
            return
        await anyio.sleep(self._backoff.seconds(attempt, error.retry_after))

    def _body(self, messages: Sequence[Json], tools: Sequence[Json], fields: Json) -> bytes:
        body: Json = {"model": self.model, "messages": messages, "stream": True} | self._sampling
        if self._with_usage:
            body["stream_options"] = {"include_usage": True}
        body |= {name: fields[name] for name in ("max_tokens", "response_format") if fields[name] is not None}
        if tools:
            body |= {"tools": tools, "tool_choice": fields["tool_choice"]}
        return json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")

    async def _attempt(self, body: bytes, tools: Sequence[Json]) -> AsyncGenerator[Event, None]:
        """One request, one reply; every failure comes out as a `RemoteError`."""
        reading = Reading(ReplyReader(_names(tools)), self._timeouts)
        response = await self._send("POST", self._url, body, self._timeouts.idle)
        try:
            if response.status_code != 200:
                raise await self._refused(response)
            async with contextlib.aclosing(self._chunks(response, reading)) as chunks:
                async for chunk in chunks:
                    for event in self._events(chunk, reading):
                        yield event
        except (BadStream, ValueError) as error:
            why = self._redacted(str(error))
            raise BadReply(f"The server at {self.base_url} sent a reply that can't be read: {why}. "
                           "Check that the URL is an OpenAI-compatible API.") from None  # fmt: skip
        finally:
            with anyio.CancelScope(shield=True):
                await response.aclose()
        for event in reading.finish():
            yield event

    def _events(self, chunk: Any, reading: Reading) -> list[Event]:
        if (error := error_of(chunk)) is not None:
            raise refusal(self.base_url, 200, self._redacted(json.dumps(error)), key_name=self._key_name,
                          begun=reading.progress())  # fmt: skip
        return reading.events(chunk)

    async def _chunks(self, response: httpx.Response, reading: Reading) -> AsyncGenerator[Any, None]:
        """The JSON values of the reply, be it an event stream or, from a server that doesn't stream, one object."""
        async with contextlib.aclosing(self._pieces(response, reading)) as pieces:
            start = b""
            kind: Literal["", "sse", "json"] = ""
            async for piece in pieces:
                start = (start + piece).lstrip()
                if kind := _sniff(start, response.headers.get("content-type", "")):
                    break
            if kind == "json":
                yield loads(start + b"".join([piece async for piece in pieces]))
                return
            decoder = SseDecoder(self._max_line)
            for chunk in decoder.feed(start):
                yield chunk
            async for piece in pieces:
                for chunk in decoder.feed(piece):
                    yield chunk
                if decoder.done:
                    break
            if decoder.done:
                await _drain(pieces)
                return
        for chunk in decoder.close():
            yield chunk
        if not (decoder.done or reading.said_its_end()):
            raise reading.cut(self.base_url, "the connection was closed before the answer's end")

    async def _pieces(self, response: httpx.Response, reading: Reading) -> AsyncGenerator[bytes, None]:
        """The reply's bytes, under the deadlines and the size limit."""
        if response.headers.get("content-encoding", "identity").lower() != "identity":
            raise BadReply(f"The server at {self.base_url} compressed its reply although it was asked not to.")
        pieces, total = response.aiter_raw(), 0
        while (piece := await self._next(pieces, reading)) is not None:
            total += len(piece)
            if total > self._max_reply:
                raise BadReply(f"The server at {self.base_url} sent more than {self._max_reply:,} bytes in one reply.")
            yield piece

    async def _next(self, pieces: AsyncIterator[bytes], reading: Reading) -> bytes | None:
        import httpx

        try:
            with anyio.fail_after(reading.seconds_left()):
                return await anext(pieces)
        except StopAsyncIteration:
            return None
        except TimeoutError:
            raise late(reading.cut(self.base_url, reading.why_late())) from None
        except httpx.HTTPError as error:
            raise reading.cut(self.base_url, self._redacted(str(error)) or type(error).__name__) from None

    async def _send(self, method: str, url: str, body: bytes | None, seconds: float) -> httpx.Response:
        import httpx

        try:
            for _ in range(MAX_REDIRECTS + 1):
                with anyio.fail_after(seconds):
                    request = self._http().build_request(method, url, content=body, headers=self._headers())
                    response = await self._http().send(request, stream=True)
                if response.status_code not in (301, 302, 307, 308):
                    return response
                await response.aclose()
                url = self._redirected(url, response.headers.get("location", ""))
        except TimeoutError:
            raise late(ServerUnreachable(f"The server at {self.base_url} did not begin to answer within {seconds:g} s. "
                                         "It may be overloaded; try again, or allow more time.")) from None  # fmt: skip
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            why = self._redacted(str(error)) or type(error).__name__
            raise ServerUnreachable(f"No answer from {self.base_url}: {why}. Check that the server runs "
                                    "and that the address is right.") from None  # fmt: skip
        raise BadReply(f"The server at {self.base_url} redirects in circles. Check the URL.")

    def _redirected(self, url: str, location: str) -> str:
        target = urljoin(url, location)
        if not same_origin(url, target):
            where = urlunsplit(urlsplit(target)._replace(query="", fragment=""))
            raise BadReply(f"The server at {self.base_url} redirects to {where[:200]}, another origin: the key "
                           "is not sent there. If you trust it, give that address as the URL.")  # fmt: skip
        return target

    async def _refused(self, response: httpx.Response) -> RemoteError:
        text = self._redacted((await self._bounded(response, MAX_ERROR)).decode("utf-8", "replace"))
        retry_after = response.headers.get("retry-after", "")
        models = await self._models() if response.status_code in (400, 404, 422) and "model" in text.lower() else []
        return refusal(self.base_url, response.status_code, text, key_name=self._key_name, retry_after=retry_after,
                       model=self.model, models=models)  # fmt: skip

    async def _bounded(self, response: httpx.Response, most: int) -> bytes:
        """As much of a body as comes within `most` bytes and 5 seconds."""
        import httpx

        body = bytearray()
        with contextlib.suppress(httpx.HTTPError), anyio.move_on_after(5):
            async for piece in response.aiter_raw():
                body += piece
                if len(body) >= most:
                    break
        return bytes(body[:most])

    async def _models(self) -> list[str]:
        """The server's model names if it gives them quickly, else an empty list."""
        try:
            response = await self._send("GET", self.base_url + "/models", None, 5)
            try:
                reply = loads(await self._bounded(response, 2**20)) if response.status_code == 200 else {}
            finally:
                await response.aclose()
        except (ThinkloopError, ValueError):
            return []
        listed = reply.get("data") if isinstance(reply, dict) else None
        models = [model.get("id") for model in listed if isinstance(model, dict)] if isinstance(listed, list) else []
        return [name for name in models if isinstance(name, str)]

    def _http(self) -> httpx.AsyncClient:
        """The connection pool, made at first use, one for each event loop that uses this client."""
        client = self._client.get()
        if client is None:
            import httpx

            limits = httpx.Timeout(None, connect=self._timeouts.connect)
            client = httpx.AsyncClient(timeout=limits, follow_redirects=False)
            self._client.set(client)
        return client

    def _headers(self) -> dict[str, str]:
        headers = {"content-type": "application/json", "accept": "text/event-stream, application/json",
                   "accept-encoding": "identity"}  # fmt: skip
        return headers | ({"authorization": f"Bearer {self._key}"} if self._key else {})

    def _redacted(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text

    async def aclose(self) -> None:
        """Closes the connections of this event loop."""
        client = self._client.get()
        if client is not None:
            self._client.set(None)
            await client.aclose()


def sampling_fields(sampling: Sampling | None) -> Json:
    """The request fields for what `sampling` sets; the server's own defaults apply to the rest.

    OpenAI's names, and for what it doesn't have (`top_k`, `min_p`, `repetition_penalty`) those of vLLM and SGLang.
    """
    sent = sampling.to_json() if sampling else {}
    if sent.get("top_k") == 0:
        sent["top_k"] = -1  # off: SGLang refuses 0, and vLLM and llama.cpp take -1 too
    if "repetition_penalty" in sent:
        sent["repeat_penalty"] = sent["repetition_penalty"]  # llama.cpp's name for it
    return sent


def _names(tools: Sequence[Json]) -> set[str]:
    return {tool["function"]["name"] for tool in tools if isinstance(tool.get("function"), dict)}


async def _drain(pieces: AsyncIterator[bytes]) -> None:
    """Reads what little follows `[DONE]`: only a reply read to its end leaves the connection open for the next turn."""
    with contextlib.suppress(RemoteError), anyio.move_on_after(0.2):
        async for _ in pieces:
            pass


def _sniff(start: bytes, content_type: str) -> Literal["", "sse", "json"]:
    """What a reply is, by how it begins (content types lie); "" while only white space has come."""
    start = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    if not start:
        return ""
    if start[:1] == b"{":
        return "json"
    fields = (b"data", b"event", b"id", b"retry", b":")
    if any(start.startswith(name[: len(start)]) for name in fields):
        return "sse"
    raise BadStream(f"it is {content_type or 'of no declared type'} and begins with {start[:80]!r}")
