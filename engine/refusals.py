"""Why a server gave no answer: the errors of the HTTP engine, and what people are told to do about each."""

from __future__ import annotations

import contextlib
import difflib
import email.utils
import time
from collections.abc import Sequence
from typing import TypeVar

from thinkloop.engine.sse import loads
from thinkloop.traces.events import Json, ThinkloopError

_AGAIN = frozenset({408, 409, 425, 429})
_AGAIN_WORDS = ("overload", "rate_limit", "rate limit", "unavailable", "timeout", "server_error", "internal")
_E = TypeVar("_E", bound="RemoteError")
_SPENT = ("insufficient_quota", "exceeded_current_quota", "billing")


class RemoteError(ThinkloopError):
    """No (whole) answer from a server. `again`: asking again may help; `retry_after`: the server's wish, in seconds."""

    again = False
    retry_after: float | None = None
    late = False
    """A deadline passed: asked again once at most, for each try costs a whole deadline."""
    about_usage = False
    """The server doesn't know `stream_options`: ask again at once without."""

    def after(self, attempts: int) -> RemoteError:
        """This error, its message saying how often it was tried."""
        if attempts > 1:
            self.args = (f"{self.args[0]} (tried {attempts} times)", *self.args[1:])
        return self


class ServerUnreachable(RemoteError):
    """No connection, or no beginning of an answer."""

    again = True


def late(error: _E) -> _E:
    """The error, marked as a deadline that passed."""
    error.late = True
    return error


class BadReply(RemoteError):
    """An answer that is no chat completion: another kind of server, too large, compressed, redirected elsewhere."""


class ServerRefused(RemoteError):
    """An HTTP error, or an error object in place of an answer. `status`: HTTP's, or the object's code (0: none)."""

    status = 0


class StreamCut(RemoteError):
    """The answer broke off. The counts say how far it got: a lost thought is not a lost answer."""

    again = True

    def __init__(self, url: str, why: str, thinking_chars: int, content_chars: int, calls: int) -> None:
        got = f"{thinking_chars} characters of thinking, {content_chars} of text and {calls} calls"
        super().__init__(f"The answer from {url} broke off after {got}: {why}. Try again; if it happens each time, "
                         "look at the server's log.")  # fmt: skip
        self.thinking_chars, self.content_chars, self.calls = thinking_chars, content_chars, calls


def refusal(
    url: str, status: int, text: str, *, key_name: str, retry_after: str = "", model: str = "",
    models: Sequence[str] = (), begun: tuple[int, int, int] = (0, 0, 0),
) -> RemoteError:  # fmt: skip
    """The error for an HTTP status other than 200, or for an error object in a 200 reply (`text` is then its JSON).

    An error object that comes after part of the answer (`begun`) cuts the stream.
    """
    said, code = _server_words(text, status)
    if any(begun):
        return StreamCut(url, f"the server said {said!r}", *begun)
    advice = _advice(code, text.lower(), key_name, model, models)
    where = f"HTTP {status}" if status != 200 else f"error {code or ''}".strip()
    error = ServerRefused(f"The server at {url} refused the request ({where}): {said or 'no reason given'}. {advice}")
    error.status = code
    error.about_usage = code in (400, 422) and "stream_options" in text
    error.again = error.about_usage or _worth_again(code, text.lower())
    error.retry_after = seconds_of(retry_after)
    return error


def _server_words(text: str, status: int) -> tuple[str, int]:
    """The server's own message, at most 500 characters, and the status (an error object's code where HTTP says 200)."""
    message, code = text, status
    with contextlib.suppress(ValueError):
        body = loads(text)
        inner = body.get("error", body) if isinstance(body, dict) else body
        if isinstance(inner, dict):
            message = inner.get("message") or inner.get("detail") or text
            code = _code(inner) if status == 200 else status
        elif isinstance(inner, str):
            message = inner
    words = " ".join(str(message).split())
    return (words if len(words) <= 500 else words[:500] + "…").rstrip("."), code


def _code(error: Json) -> int:
    for value in (error.get("code"), error.get("status")):
        with contextlib.suppress(ValueError, TypeError):
            return int(value)  # type: ignore[arg-type]  # whatever the server sent; a wrong type is suppressed
    return 0


def _worth_again(code: int, text: str) -> bool:
    if any(word in text for word in _SPENT):
        return False
    return code in _AGAIN or 500 <= code < 600 or (code == 0 and any(word in text for word in _AGAIN_WORDS))


def _advice(code: int, text: str, key_name: str, model: str, models: Sequence[str]) -> str:
    if code in (401, 403):
        return f"Set the environment variable {key_name} to a valid key for this server."
    if any(word in text for word in _SPENT) or code == 402:
        return "The account's quota is spent: top it up or use another key."
    if models and model not in models:
        return f"The model name {model!r} is not among the server's models: {_listed(models, model)}."
    if code == 429:
        return "The server limits the rate of requests: wait, or run fewer trajectories at once."
    if code == 404:
        return "Check the URL and the model's name."
    if code >= 500 or code in _AGAIN:
        return "The server has trouble of its own: try again later."
    if "context" in text or "token limit" in text or "too long" in text or code == 413:
        return "The conversation is longer than the server allows: set the model's window to the server's limit."
    return "Check the model's name and the parameters against the server's documentation."


def _listed(models: Sequence[str], wanted: str) -> str:
    near = difflib.get_close_matches(wanted[:100], [name[:100] for name in models[:500]], n=3, cutoff=0.3)
    names = list(dict.fromkeys([*near, *(name[:100] for name in models)]))[:10]
    return ", ".join(names) + (", …" if len(models) > len(names) else "")


def seconds_of(retry_after: str) -> float | None:
    """A `Retry-After` header (a number or an HTTP date) in seconds, never negative; None when none can be read."""
    if not retry_after.strip():
        return None
    with contextlib.suppress(ValueError):
        seconds = float(retry_after)
        return max(0.0, seconds) if seconds == seconds else None
    with contextlib.suppress(ValueError, TypeError, OverflowError):
        return max(0.0, email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time())
    return None
