"""A conversation as an OpenAI-compatible server gets it: nothing in it can make the server refuse the next request.

Each message is converted once, when it is new; a step's cost doesn't grow with the history. What has been sent stays
as it was, so that a server's prefix cache keeps working.
"""

from __future__ import annotations

import json
import re
from typing import Any

from thinkloop.agent.model import Conversation, Message
from thinkloop.engine.call_form import call_id, parse_arguments
from thinkloop.traces.events import Json

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,63}")
_ID = re.compile(r"functions\.(.+):([0-9]{1,9})", re.ASCII)
NO_RESULT = "No result: the call was cut short."


class WireHistory:
    """Follows one conversation at a time.

    Assistant messages keep `reasoning_content` ("" as well as text); `token_ids` stay behind. Call ids have K2's form
    `functions.{name}:{index}` with an index that only grows: those already so are kept, others renamed, in calls and
    results alike. Arguments that are no JSON object are wrapped in one. Calls without a result get one that says so;
    results without a call become text.
    """

    def __init__(self) -> None:
        self._conversation: Conversation | None = None
        self._reset()

    def _reset(self) -> None:
        self.next_index = 0
        self.chars = 0
        self._epoch = -1
        self._read = 0
        self._last: Message | None = None
        self._messages: list[Json] = []
        self._open: dict[str, Json] = {}
        self._aside: list[Json] = []

    def follow(self, conversation: Conversation) -> list[Json]:
        """The whole history as request messages. Only messages that are new since the last call are converted."""
        if not self._knows(conversation):
            self._reset()
            self._conversation, self._epoch = conversation, conversation.epoch
        for message in conversation.messages[self._read :]:
            self._add(message)
            self._last = message
        self._read = len(conversation.messages)
        return [*self._messages, *self._open.values(), *self._aside]

    def _knows(self, conversation: Conversation) -> bool:
        same = self._conversation is conversation and self._epoch == conversation.epoch
        return same and (
            self._read == 0
            or (self._read <= len(conversation.messages) and conversation.messages[self._read - 1] is self._last)
        )

    def _add(self, message: Message) -> None:
        if message.get("role") == "tool":
            self._add_result(message)
            return
        self._close()
        if message.get("role") == "assistant":
            self._add_assistant(message)
            return
        kept = {key: message[key] for key in ("role", "name") if message.get(key)}
        self._put(kept | {"content": _content(message.get("content"))})

    def _close(self) -> None:
        """Every call has its result before anything else is said."""
        for message in [*self._open.values(), *self._aside]:
            self._put(message)
        self._open, self._aside = {}, []

    def _put(self, message: Json) -> None:
        self._messages.append(message)
        self.chars += _chars(message)

    def _add_assistant(self, message: Message) -> None:
        calls = [self._call(call) for call in message.get("tool_calls") or () if isinstance(call, dict)]
        wire: Json = {"role": "assistant"}
        reasoning = message.get("reasoning_content")
        if reasoning is not None or "reasoning_content" in message or calls:
            wire["reasoning_content"] = reasoning or ""
        content = _content(message.get("content"))
        if content or not calls:
            wire["content"] = content
        if calls:
            wire["tool_calls"] = calls
        if calls or content or reasoning:
            self._put(wire)

    def _call(self, call: Json) -> Json:
        function = call.get("function") if isinstance(call.get("function"), dict) else {}
        name = wire_name(str((function or {}).get("name") or ""))
        given = str(call.get("id") or "")
        new = call_id(name, self._index_of(given, name))
        self._open[given] = {"role": "tool", "tool_call_id": new, "name": name, "content": NO_RESULT}
        arguments = _arguments((function or {}).get("arguments"))
        return {"id": new, "type": "function", "function": {"name": name, "arguments": arguments}}

    def _index_of(self, given: str, name: str) -> int:
        form = _ID.fullmatch(given)
        kept = form is not None and form[1] == name and int(form[2]) >= self.next_index
        index = int(form[2]) if form is not None and kept else self.next_index
        self.next_index = index + 1
        return index

    def _add_result(self, message: Message) -> None:
        content = _content(message.get("content"))
        call = self._open.pop(str(message.get("tool_call_id") or ""), None)
        if call is not None:
            self._put(call | {"content": content})
            return
        name = str(message.get("name") or "a tool")
        self._aside.append(
            {"role": "user", "content": f"Result of a call to {name} that is no longer shown:\n{content}"}
        )
        if not self._open:
            self._close()


def wire_name(name: str) -> str:
    """The name if servers take it, else the nearest that they do: letters, digits, `_` and `-`, at most 64."""
    if _NAME.fullmatch(name):
        return name
    cleaned = re.sub(r"[^A-Za-z0-9_-]+", "_", name)[:63].strip("_")
    if not cleaned:
        return "unnamed"
    return cleaned if _NAME.fullmatch(cleaned) else "_" + cleaned


def _arguments(given: Any) -> str:
    """Argument text that any server can parse: as it was written if it is an object, else wrapped in one."""
    raw = given if isinstance(given, str) else _json(given if given is not None else {})
    if not raw.strip():
        return "{}"
    return raw if parse_arguments(raw)[0] is not None else _json({"malformed_arguments": raw})


def _content(content: Any) -> Any:
    if content is None:
        return ""
    return content if isinstance(content, (str, list)) else _json(content)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), default=str)


def _chars(message: Json) -> int:
    """Characters that the model will read, with 20 for what stands around a message."""
    calls = message.get("tool_calls") or ()
    content = message.get("content") or ""
    spoken = len(message.get("reasoning_content") or "") + len(content if isinstance(content, str) else _json(content))
    return 20 + spoken + sum(len(call["id"]) + len(call["function"]["arguments"]) + 20 for call in calls)
