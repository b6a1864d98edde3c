"""The Model contract: one turn's events for a conversation. Engine, remote server and recorded trace all look like this."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from thinkloop.traces.events import Event, Json

Message = dict[str, Any]
"""An OpenAI chat message. Assistant messages carry `reasoning_content`; `token_ids` (when present) are the ids the model
sampled for it, so that an engine never tokenises its own words again. Remote models leave `token_ids` out."""


@dataclass(slots=True)
class Conversation:
    """Messages so far, append-only within an `epoch`. A context edit replaces messages and raises the epoch: a model that
    keeps state may trust everything it has read as long as the epoch is the one it saw last."""

    messages: list[Message] = field(default_factory=list)
    epoch: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """What one turn may do. Token limits of None mean: as much as the window allows."""

    max_tokens: int | None = None
    """The most tokens the turn may sample, thinking included."""
    max_thinking: int | None = None
    """The most thinking tokens; a model that can enforces it by writing the end of thinking itself."""
    tool_choice: Literal["auto", "none"] = "auto"
    """`none` on the last step: the model must answer."""
    response_format: Json | None = None
    """The form of the answer, as OpenAI has it: `json_object` or `json_schema`."""
    forbidden: tuple[tuple[str, str], ...] = ()
    """Calls that must not come again, tool and argument text; a model that writes by a grammar can't write them."""


class Model(Protocol):
    """Streams one turn at a time. The last events of a turn are always `Usage`, then `TurnFinished`.

    `stream` raises `ThinkloopError` when the turn can't be had (after its own retries). Cancelling the task that iterates
    it stops the model; what was already yielded stays valid. Within a turn events come in the order the model wrote:
    `Thinking`*, `Content`*, (`ToolCallDelta`* `ToolCall`)*, though a model may mix them.
    """

    @property
    def name(self) -> str: ...
    @property
    def window(self) -> int:
        """Context window in tokens."""
        ...

    @property
    def context_policy(self) -> Literal["hide_results", "drop_steps"]:
        """What to do when the window fills: hide the oldest tool results, or drop the oldest steps whole."""
        ...

    def describe(self) -> Json:
        """What the trace records about the model: name, kind, hashes, device, dtype, sampling parameters and seed."""
        ...

    def count_tokens(self, text: str) -> int:
        """Tokens that `text` takes in the context (an estimate where the tokenizer isn't at hand)."""
        ...

    def stream(self, conversation: Conversation, tools: Sequence[Json], turn: Turn) -> AsyncIterator[Event]: ...

    async def aclose(self) -> None: ...
