"""One model turn, gathered from its events while they stream by."""

from __future__ import annotations

from dataclasses import dataclass, field

from thinkloop.agent.model import Message
from thinkloop.traces.events import Content, Error, Event, FinishReason, Thinking, ToolCall, TurnFinished, Usage

RESTARTED = "turn restarted"
"""`where` of the `Error` with which a model says: forget what this turn gave so far, it begins again."""


@dataclass(slots=True)
class TurnRecord:
    """What a turn has given so far. Pieces are joined once, at the end: a turn may come in thousands of them."""

    thinking: list[str] = field(default_factory=list)
    content: list[str] = field(default_factory=list)
    calls: list[ToolCall] = field(default_factory=list)
    usage: Usage | None = None
    token_ids: list[int] = field(default_factory=list)
    finish: FinishReason = "cancelled"
    """Stays `cancelled` when the turn was cut before its `TurnFinished`."""

    def add(self, event: Event) -> None:
        match event:
            case Thinking():
                self.thinking.append(event.text)
            case Content():
                self.content.append(event.text)
            case ToolCall():
                self.calls.append(event)
            case Usage():
                self.usage = event
            case Error(where=where) if where == RESTARTED:
                self.thinking, self.content, self.calls = [], [], []
            case TurnFinished():
                self.finish, self.token_ids = event.reason, event.token_ids

    def end(self) -> None:
        """The stream is over; a model that didn't say why has stopped or called."""
        if self.finish == "cancelled":
            self.finish = "tool_calls" if self.calls else "stop"

    @property
    def is_answer(self) -> bool:
        """Whole text and no calls."""
        return self.finish not in ("length", "cancelled") and not self.calls and bool(self.text.strip())

    @property
    def is_blank(self) -> bool:
        """Nothing at all, not even thinking."""
        return not (self.thinking or self.content or self.calls or self.token_ids)

    @property
    def text(self) -> str:
        """The visible text."""
        return "".join(self.content)

    def message(self) -> Message:
        """The turn as an assistant message: thinking kept, calls in OpenAI's form with their arguments as written."""
        message: Message = {"role": "assistant", "reasoning_content": "".join(self.thinking), "content": self.text}
        if self.calls:
            message["tool_calls"] = [_call(call) for call in self.calls]
        if self.token_ids:
            message["token_ids"] = self.token_ids
        return message


def _call(call: ToolCall) -> Message:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.raw}}
