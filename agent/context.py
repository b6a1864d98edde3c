"""How the conversation is kept inside the model's window: what it holds, what may go, and at what price.

Two policies, named by the model. `hide_results` replaces the oldest tool results by a line that says what was there;
`drop_steps` removes the oldest steps whole. Both work in blocks, so that the tokens read again are paid for rarely,
and both are told of as a `ContextEdited` event. The results of the step under way are never touched: they haven't
been read.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice, takewhile
from typing import Literal

from thinkloop.agent.cut import cut_text
from thinkloop.agent.model import Conversation, Message, Model
from thinkloop.traces.events import ContextEdited, Json, ThinkloopError, Usage

MESSAGE_TOKENS = 8
"""Tokens that a message's own marks take (role, name, id), as an estimate until the model reports."""
LARGEST_RESERVE = 4096
"""Tokens kept free for the answer, at most; small windows keep an eighth."""
KEEP_SHARE = 0.6
"""Share of the window that `drop_steps` leaves: far below the trigger, so that edits are rare."""
HIDE_AIM = 0.75
"""Share of the window that `hide_results` goes down to, half of the remaining results at a time. All behind the first
hidden result is read again anyway, so a large block costs no more than a small one."""
KEEP_STEPS = 2
"""Steps that `drop_steps` keeps whatever their size."""
LEAST_RESULT = 48
"""Tokens below which a result isn't worth cutting or hiding."""


def answer_reserve(window: int) -> int:
    """Tokens of a window that are kept free for the last step."""
    return min(LARGEST_RESERVE, window // 8)


@dataclass(slots=True)
class Result:
    """A tool result in the conversation: where it stands within its step, and what it takes."""

    offset: int
    call_id: str
    tokens: int


@dataclass(slots=True)
class StepSpan:
    """The messages of one step, which follow those of the step before, and what they take."""

    number: int
    messages: int = 0
    tokens: int = 0
    results: list[Result] = field(default_factory=list)


class Context:
    """The conversation, its size in tokens, and the policy that keeps it inside the window. Appending is O(1).

    The size is what the model last reported plus an estimate of what came after. Raises `ThinkloopError` when the
    task alone leaves no room to work in.
    """

    def __init__(self, model: Model, system: str, task: str, tools: Sequence[Json]) -> None:
        self._model = model
        self.window = model.window
        self.reserve = answer_reserve(self.window)
        self.conversation = Conversation([{"role": "system", "content": system}, {"role": "user", "content": task}])
        self.tokens = sum(self._count(text) for text in (system, task, json.dumps(list(tools)) if tools else ""))
        self._head_tokens = self.tokens
        self._head = len(self.conversation.messages)
        self._steps: deque[StepSpan] = deque()
        if self.room(0) < 0:
            raise ThinkloopError(_too_long(self))

    @property
    def turn_room(self) -> int:
        """The least that a turn must be able to write, besides the reserve."""
        return self.reserve // 2

    def room(self, extra: int = 0) -> int:
        """Tokens left for a further result once `extra` are appended, with the next turn and the reserve kept free."""
        return self.window - self.reserve - self.turn_room - self.tokens - extra

    def max_tokens(self, final: bool) -> int:
        """The most that the next turn may sample; the last step may use the reserve."""
        return max(self.window - self.tokens - (0 if final else self.reserve), 1)

    def begin_step(self, number: int) -> None:
        self._steps.append(StepSpan(number))

    def append_turn(self, message: Message, usage: Usage | None) -> None:
        """Appends an assistant message. `usage` corrects the size; without it the message's text is counted."""
        before = self.tokens
        if usage is None or usage.prompt_tokens <= 0:
            self.tokens += self._count_turn(message)
        else:
            self._correct(usage)
            before = usage.prompt_tokens
        self._grow(message, self.tokens - before)

    def append_user(self, text: str) -> None:
        tokens = self._count(text)
        self.tokens += tokens
        self._grow({"role": "user", "content": text}, tokens)

    def append_result(self, call_id: str, name: str, content: str) -> None:
        tokens = self._count(content)
        self.tokens += tokens
        step = self._steps[-1]
        step.results.append(Result(step.messages, call_id, tokens))
        self._grow({"role": "tool", "tool_call_id": call_id, "name": name, "content": content}, tokens)

    def fit(self, content: str, others: int) -> tuple[str, list[ContextEdited]]:
        """The part of a new result that there is room for, once the policy has made what room it can.

        `others` counts the calls of this turn whose results are still to come; each keeps room for a short word.
        """
        tokens = self._count(content) + others * LEAST_RESULT
        edits = self.make_room(tokens)
        room = self.room(others * LEAST_RESULT) - MESSAGE_TOKENS
        if self.room(tokens) >= 0:
            return content, edits
        if room < LEAST_RESULT:
            return "error: the context is full; there is no room for this result", edits
        return cut_text(content, room, self._model.count_tokens, "there was no more room in the context"), edits

    def make_room(self, extra: int = 0) -> list[ContextEdited]:
        """Edits the conversation when `extra` more tokens would not fit, and says what was done; often nothing."""
        if self.room(extra) >= 0:
            return []
        hide = self._model.context_policy == "hide_results"
        return self._hide_results(extra) if hide else self._drop_steps(extra)

    def _hide_results(self, extra: int) -> list[ContextEdited]:
        read = islice(self._steps, max(len(self._steps) - 1, 0))
        candidates = [step for step in read if _hideable(step)]
        if not candidates:
            return []
        before, kept = self.tokens, self._tokens_before_results(candidates[0])
        messages, starts = list(self.conversation.messages), self._starts()
        hidden: list[StepSpan] = []
        while candidates and self.tokens + extra > int(HIDE_AIM * self.window):
            block = (len(candidates) + 1) // 2
            for step in candidates[:block]:
                self._hide(step, messages, starts[step.number])
            hidden += candidates[:block]
            del candidates[:block]
        return [self._edited("hide_results", messages, hidden, before, kept)]

    def _hide(self, step: StepSpan, messages: list[Message], start: int) -> None:
        for result in step.results:
            text = f"[hidden: result of {result.call_id}, {result.tokens} tokens; call it again if it is needed]"
            freed = result.tokens - self._count(text)
            if freed > 0:
                messages[start + result.offset] = messages[start + result.offset] | {"content": text}
                step.tokens -= freed
                self.tokens -= freed
        step.results = []

    def _drop_steps(self, extra: int) -> list[ContextEdited]:
        before, dropped = self.tokens, list[StepSpan]()
        while len(self._steps) > KEEP_STEPS and self.tokens + extra > int(KEEP_SHARE * self.window):
            step = self._steps.popleft()
            dropped.append(step)
            self.tokens -= step.tokens
        if not dropped:
            return []
        messages = self.conversation.messages
        gone = sum(step.messages for step in dropped)
        kept = messages[: self._head] + messages[self._head + gone :]
        return [self._edited("drop_steps", kept, dropped, before, self._head_tokens)]

    def _edited(
        self,
        policy: Literal["hide_results", "drop_steps"],
        messages: list[Message],
        steps: list[StepSpan],
        before: int,
        kept: int,
    ) -> ContextEdited:
        self.conversation.messages = messages
        self.conversation.epoch += 1
        return ContextEdited(
            policy=policy, first_step=steps[0].number, last_step=steps[-1].number,
            tokens_before=before, tokens_after=self.tokens, recomputed_tokens=max(self.tokens - kept, 0),
        )  # fmt: skip

    def _starts(self) -> dict[int, int]:
        starts, at = {}, self._head
        for step in self._steps:
            starts[step.number] = at
            at += step.messages
        return starts

    def _tokens_before_results(self, step: StepSpan) -> int:
        earlier = takewhile(lambda other: other is not step, self._steps)
        own = step.tokens - sum(result.tokens for result in step.results)
        return self._head_tokens + sum(other.tokens for other in earlier) + own

    def _correct(self, usage: Usage) -> None:
        # What the model reports includes what was estimated so far: the difference belongs to the newest step before
        # this turn, or to the head when there is none.
        drift = usage.prompt_tokens - self.tokens
        if len(self._steps) > 1:
            self._steps[-2].tokens += drift
        else:
            self._head_tokens += drift
        self.tokens = usage.prompt_tokens + usage.completion_tokens

    def _grow(self, message: Message, tokens: int) -> None:
        self.conversation.messages.append(message)
        if self._steps:
            self._steps[-1].messages += 1
            self._steps[-1].tokens += tokens
        else:
            self._head += 1
            self._head_tokens += tokens

    def _count(self, text: str) -> int:
        return self._model.count_tokens(text) + MESSAGE_TOKENS if text else 0

    def _count_turn(self, message: Message) -> int:
        calls = [call["function"] for call in message.get("tool_calls", ())]
        texts = [
            message["reasoning_content"],
            message["content"],
            *(call["name"] + call["arguments"] for call in calls),
        ]
        return sum(self._count(text) for text in texts)


def _hideable(step: StepSpan) -> bool:
    return any(result.tokens > LEAST_RESULT for result in step.results)


def _too_long(context: Context) -> str:
    return (
        f"The task is too long: system prompt, tools and task take about {context.tokens:,} tokens, and the window of "
        f"{context.window:,} must keep {context.reserve + context.turn_room:,} free for the model's own words. "
        f"Shorten the task, or put the long text into a folder and give it as a corpus to search."
    )
