"""A model on any OpenAI-compatible server, as the loop sees it: thinking kept, K2's call ids, cut turns asked again."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from thinkloop.agent.markers import MarkerSplitter, Piece
from thinkloop.agent.model import Conversation, Turn
from thinkloop.agent.turn import RESTARTED
from thinkloop.agent.wire import WireHistory, wire_name
from thinkloop.engine.call_form import call_id
from thinkloop.engine.http import Backoff, ChatClient
from thinkloop.engine.params import Sampling
from thinkloop.engine.reading import Timeouts
from thinkloop.engine.refusals import StreamCut
from thinkloop.traces.events import (
    Content,
    Error,
    Event,
    Json,
    Thinking,
    ThinkloopError,
    ToolCall,
    ToolCallDelta,
    TurnFinished,
    Usage,
)

_DEFAULT_KEY, _OTHER_KEY = "THINKLOOP_API_KEY", "OPENAI_API_KEY"


@dataclass(frozen=True, slots=True, kw_only=True)
class Prices:
    """What a million tokens cost, in any one currency. `cached` prompt tokens cost as much as others when not given."""

    prompt: float
    completion: float
    cached: float | None = None

    def cost(self, usage: Usage) -> float:
        """What a turn cost."""
        cached = self.prompt if self.cached is None else self.cached
        fresh = usage.prompt_tokens - usage.cached_tokens
        return (fresh * self.prompt + usage.cached_tokens * cached + usage.completion_tokens * self.completion) / 1e6


class RemoteModel:
    """Implements `agent.model.Model` over HTTP.

    The key comes from the environment variable `api_key_env`, or, when that is the default and unset, from
    `OPENAI_API_KEY`. `window` is the server's context in tokens. Only what `sampling` and `seed` set is sent; the
    server's own defaults apply to the rest.
    A thinking budget (`Turn.max_thinking`) can't be enforced over this interface and is not.

    A turn that breaks off in the middle is asked for once more: an `Error` event with `where` `RESTARTED` comes first,
    and whoever gathers the turn forgets what came before it.
    """

    def __init__(
        self,
        base_url: str,
        model: str | None,
        *,
        api_key_env: str = _DEFAULT_KEY,
        window: int = 262_144,
        sampling: Sampling | None = None,
        seed: int | None = None,
        prices: Prices | None = None,
        timeouts: Timeouts | None = None,
        backoff: Backoff | None = None,
        max_retries: int = 4,
    ) -> None:
        if not model:
            raise ThinkloopError(
                f"Which model of {base_url}? A server needs its name: --model-name NAME, or `model_name=`."
            )
        if seed is not None:
            sampling = replace(sampling or Sampling(), seed=seed)
        self._client = ChatClient(
            base_url, model, api_key=_key(api_key_env), key_name=api_key_env, sampling=sampling,
            timeouts=timeouts, backoff=backoff, max_retries=max_retries,
        )  # fmt: skip
        self._window = window
        self._sampling = sampling
        self._prices = prices
        self._history = WireHistory()
        self._chars_per_token = 4.0
        self._calibrated = False

    @property
    def name(self) -> str:
        return self._client.model

    @property
    def window(self) -> int:
        return self._window

    @property
    def context_policy(self) -> Literal["hide_results", "drop_steps"]:
        return "hide_results"

    def describe(self) -> Json:
        """Name, kind, address, window and sampling; never the key."""
        sampling = self._sampling.to_json() if self._sampling else {}
        return {"name": self.name, "kind": "remote", "url": self._client.base_url, "window": self._window,
                "sampling": sampling}  # fmt: skip

    def count_tokens(self, text: str) -> int:
        """An estimate: characters by characters per token, 4 until the server's usage reports say better."""
        return math.ceil(len(text) / self._chars_per_token)

    async def aclose(self) -> None:
        await self._client.aclose()

    async def stream(
        self, conversation: Conversation, tools: Sequence[Json], turn: Turn
    ) -> AsyncGenerator[Event, None]:
        """One turn. Raises `thinkloop.engine.refusals.RemoteError` when it can't be had."""
        messages = self._history.follow(conversation)
        size = self._history.chars + (len(json.dumps(tools)) if tools else 0)
        first_index = self._history.next_index
        for last in (False, True):
            try:
                async with contextlib.aclosing(self._turn(messages, tools, turn, size, first_index)) as events:
                    async for event in events:
                        yield event
                return
            except StreamCut as cut:
                if last:
                    raise
                yield Error(where=RESTARTED, message=f"{cut} The turn is asked for once more.", recovered=True)

    async def _turn(
        self, messages: list[Json], tools: Sequence[Json], turn: Turn, size: int, first_index: int
    ) -> AsyncGenerator[Event, None]:
        reading = _TurnReading(tools, first_index)
        stream = self._client.stream(
            messages, tools, max_tokens=turn.max_tokens, tool_choice=turn.tool_choice, response_format=turn.response_format,
        )  # fmt: skip
        async with contextlib.aclosing(stream) as events:
            async for event in events:
                for out in reading.read(event):
                    yield self._usage(out, size, reading.chars) if isinstance(out, Usage) else out

    def _usage(self, usage: Usage, size: int, written: int) -> Usage:
        """The report where it can be true, an estimate where it is missing or can't be, and the cost."""
        if _plausible(usage.prompt_tokens, size):
            self._calibrate(size, usage.prompt_tokens)
        else:
            usage = replace(usage, prompt_tokens=self._estimate(size), cached_tokens=0)
        if not (usage.completion_tokens and written / 20 <= usage.completion_tokens <= self._window):
            usage = replace(usage, completion_tokens=self._estimate(written), thinking_tokens=0)
        return replace(usage, cost=self._prices.cost(usage)) if self._prices else usage

    def _estimate(self, chars: int) -> int:
        return math.ceil(chars / self._chars_per_token)

    def _calibrate(self, chars: int, tokens: int) -> None:
        """Moves the estimate towards what the server counted; short prompts are mostly template and say little."""
        if chars < 500:
            return
        measured = min(8.0, max(1.0, chars / tokens))
        weight = 0.3 if self._calibrated else 1.0
        self._chars_per_token += weight * (measured - self._chars_per_token)
        self._calibrated = True


class _TurnReading:
    """One turn's events, with the leaks read and the calls numbered."""

    def __init__(self, tools: Sequence[Json], first_index: int) -> None:
        self.chars = 0
        self._splitter = MarkerSplitter(tools)
        self._next_index = first_index
        self._positions: dict[int, int] = {}
        self._leaked: set[tuple[str, str]] = set()
        self._calls = 0

    def read(self, event: Event) -> list[Event]:
        match event:
            case Thinking():
                self.chars += len(event.text)
                return self._placed(self._splitter.feed("thinking", event.text))
            case Content():
                self.chars += len(event.text)
                return self._placed(self._splitter.feed("content", event.text))
            case ToolCallDelta():
                self.chars += len(event.arguments)
                return [replace(event, index=self._position(event.index))]
            case ToolCall():
                return [*self._placed(self._splitter.finish()), *self._numbered(event)]
            case TurnFinished():
                return [replace(event, reason="tool_calls" if self._calls and event.reason == "stop" else event.reason)]
            case _:
                return [*self._placed(self._splitter.finish()), event]

    def _placed(self, pieces: Sequence[Piece]) -> list[Event]:
        events: list[Event] = []
        for piece in pieces:
            events += self._leaked_call(piece) if isinstance(piece, ToolCall) else [piece]
        return events

    def _leaked_call(self, call: ToolCall) -> list[Event]:
        self._leaked.add((call.name, call.raw))
        delta = ToolCallDelta(index=self._position(-1 - self._calls), name=call.name, arguments=call.raw)
        return [delta, self._with_id(call)]

    def _numbered(self, call: ToolCall) -> list[Event]:
        """The server's own call, unless it is one that was leaked as text too."""
        return [] if (call.name, call.raw) in self._leaked else [self._with_id(call)]

    def _with_id(self, call: ToolCall) -> ToolCall:
        index, self._next_index = self._next_index, self._next_index + 1
        self._calls += 1
        return replace(call, id=call_id(wire_name(call.name), index))

    def _position(self, index: int) -> int:
        """Where a call stands in the turn, the server's and the leaked ones in the order they began."""
        return self._positions.setdefault(index, len(self._positions))


def _plausible(tokens: int, chars: int) -> bool:
    """Whether a prompt of so many characters can have so many tokens: 20 characters a token are as unheard of as 3
    tokens a character; templates add some."""
    return chars / 20 <= tokens <= 3 * chars + 2000 and tokens > 0


def _key(name: str) -> str | None:
    key = os.environ.get(name)
    return key if key or name != _DEFAULT_KEY else os.environ.get(_OTHER_KEY)
