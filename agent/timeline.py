"""One conversation as the engine has read it: which messages are in the session's tokens, and what to append next.

Append only: a turn's prompt starts with exactly the tokens of the turn before. What the model sampled stays as it is
and is never rendered again. Only when the conversation itself was edited is the timeline cut back, to the longest
prefix that still holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from thinkloop.agent.model import Conversation, Message
from thinkloop.engine.template import CallIds, Template
from thinkloop.traces.events import Content, Event, Json, Thinking


class Tokens(Protocol):
    """The part of an engine session that a timeline plans for. `tokens` may cost a copy, the length doesn't."""

    @property
    def tokens(self) -> Sequence[int]: ...
    def __len__(self) -> int: ...


class Plan(NamedTuple):
    """How to bring a session up to date: keep the first `keep` tokens, append `ids`."""

    keep: int
    ids: list[int]


@dataclass(slots=True)
class OwnTurn:
    """The turn that the model wrote last, until its message is seen in the conversation."""

    start: int
    """Tokens before its generation prompt."""
    thinking: list[str] = field(default_factory=list)
    content: list[str] = field(default_factory=list)
    sampled: list[int] = field(default_factory=list)

    def note(self, event: Event) -> None:
        if isinstance(event, Thinking):
            self.thinking.append(event.text)
        elif isinstance(event, Content):
            self.content.append(event.text)

    def wrote(self, message: Message) -> bool:
        """Whether this message is what was sampled here: by its ids, or by its text when the turn was cut short."""
        if message.get("role") != "assistant" or not self.sampled:
            return False
        if message.get("token_ids"):
            return list(message["token_ids"]) == self.sampled
        texts = (message.get("reasoning_content") or "", message.get("content") or "")
        return texts == ("".join(self.thinking), "".join(self.content))


class Timeline:
    """Plans what a session must hold for a conversation's next turn. It never touches the session itself."""

    def __init__(self, conversation: Conversation, template: Template) -> None:
        self.conversation = conversation
        self._template = template
        self._call_ids = CallIds()
        self._seen = self._held = 0
        self._epoch: int | None = None
        self._tools: list[Json] = []
        self._own: OwnTurn | None = None

    @property
    def next_index(self) -> int:
        """The first call index of the conversation that is free."""
        return self._call_ids.next_index

    def plan(self, session: Tokens, tools: Sequence[Json]) -> Plan:
        """What to keep of `session` and what to append before the next turn is sampled, generation prompt included.
        Costs time in proportion to what is new, unless the conversation was edited."""
        messages, tools = self.conversation.messages, list(tools)
        follows = self._held == len(session) and self._epoch == self.conversation.epoch and tools == self._tools
        plan = self._next(messages[self._seen :]) if follows else self._anew(session, tools)
        self._seen, self._epoch, self._tools = len(messages), self.conversation.epoch, tools
        self._own = OwnTurn(start=plan.keep + len(plan.ids))
        self._held = self._own.start + len(self._template.generation_prompt)
        return Plan(plan.keep, plan.ids + self._template.generation_prompt)

    def sampled(self, token_id: int) -> None:
        """A token of the model's turn."""
        if self._own is not None:
            self._held += 1
            self._own.sampled.append(token_id)

    def note(self, event: Event) -> None:
        """An event of the model's turn."""
        if self._own is not None:
            self._own.note(event)

    def forget(self) -> None:
        """The session no longer holds what was planned: the next plan compares everything."""
        self._epoch = None

    def _next(self, new: Sequence[Message]) -> Plan:
        """The messages behind those already read. The first should be the model's own last turn; when it isn't, that
        turn is no part of the conversation and goes."""
        own, renamed = self._own, self._call_ids.rename(new)
        assert own is not None
        if not new or not own.wrote(new[0]):
            return Plan(own.start, self._template.render_new(renamed))
        close = [] if own.sampled[-1:] == self._template.close else self._template.close
        return Plan(self._held, close + self._template.render_new(renamed[1:]))

    def _anew(self, session: Tokens, tools: Sequence[Json]) -> Plan:
        """Renders everything and keeps the part that the session already holds."""
        self._call_ids = CallIds()
        ids = self._template.render_prefix(tools, self._call_ids.rename(self.conversation.messages))
        keep = common_prefix(session.tokens, ids)
        return Plan(keep, ids[keep:])


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences share from the start."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
