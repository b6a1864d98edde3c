"""The one vocabulary of thinkloop: what a model streams, the loop adds, the screen shows and the trace stores.

Every event is a frozen, slotted dataclass with a class-level `type`. `to_json` and `from_json` are exact inverses; a type
this version doesn't know becomes `Unknown`, never an error, so that an older reader can open a newer trace.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar, Literal

Json = dict[str, Any]


class ThinkloopError(Exception):
    """Base of every error raised on purpose: the message says what was wrong, where, and what to do next."""


FinishReason = Literal["stop", "tool_calls", "length", "cancelled"]
"""Why a model turn ended: an answer, calls, out of room, or cut short by the caller."""

EndReason = Literal[
    "answered", "steps", "tokens", "context", "time", "cost", "repetition", "bad_calls", "cancelled", "error"
]
"""Why a run ended. Anything but `answered` names the limit that forced the last step, or what cut the run short."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStarted:
    """First event of a run: everything that is needed to do it again."""

    type: ClassVar[str] = "run_started"
    run_id: str
    task: str
    system: str
    model: Json
    """Name, kind, and for the engine: hashes of weights, tokenizer and template, device, dtype."""
    tools: list[Json]
    """Declarations in OpenAI form, as the model sees them."""
    limits: Json
    sampling: Json
    version: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StepStarted:
    """A model turn is about to begin. `step` counts from 1; `context_tokens` is what the model last reported."""

    type: ClassVar[str] = "step_started"
    step: int
    context_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Thinking:
    """A piece of the model's reasoning (a delta while streaming; a trace joins neighbours)."""

    type: ClassVar[str] = "thinking"
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Content:
    """A piece of the model's visible text."""

    type: ClassVar[str] = "content"
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCallDelta:
    """A piece of a call while it is being written. `index` counts calls within the turn; `name` comes once it is known."""

    type: ClassVar[str] = "tool_call_delta"
    index: int
    name: str = ""
    arguments: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """A whole call. `raw` is the argument text exactly as written; `arguments` is None when it isn't a JSON object.

    `problem` says what is wrong with the call's form (truncated, not JSON, no name); it is empty for a well-formed call.
    """

    type: ClassVar[str] = "tool_call"
    id: str
    name: str
    arguments: Json | None
    raw: str
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Attachment:
    """A file that came with a result: a figure, a screenshot, a document. The trace keeps `data` as a blob."""

    name: str
    media_type: str
    data: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolResult:
    """What a call gave: `content` for the model, `display` for the person (empty: same as content), `record` and `files`
    for the trace."""

    type: ClassVar[str] = "tool_result"
    call_id: str
    name: str
    content: str
    ok: bool
    display: str = ""
    record: Json = field(default_factory=dict)
    files: list[Attachment] = field(default_factory=list)
    seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Token counts and times of one turn. `prompt_tokens` counts what the turn's context held, `cached_tokens` the part
    of it that was not computed again. What only an engine of this process knows is 0 for others."""

    type: ClassVar[str] = "usage"
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    thinking_tokens: int = 0
    prefill_seconds: float = 0.0
    """From the request to the first token."""
    decode_seconds: float = 0.0
    """From the first token to the last."""
    queue_seconds: float = 0.0
    """The part of `prefill_seconds` that went by before the engine took the turn up."""
    prefilled_tokens: int = 0
    """Appended tokens that were computed."""
    decoding_passes: int = 0
    """Forward passes for the sampled tokens; fewer where drafts held."""
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    """Tokens drafted from the context, and those of them that the model chose."""
    cost: float = 0.0
    """In the currency of the configured prices; 0 when none are configured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnFinished:
    """The last event of a model turn. Engines that have token ids give those appended before (`prompt_ids`) and sampled
    in this turn (`token_ids`), and the position of the random generator after it."""

    type: ClassVar[str] = "turn_finished"
    reason: FinishReason
    prompt_ids: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    rng_position: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class StepFinished:
    """A step is whole: turn done, results known. `overhead_seconds` is the runtime's own share, without model and tools."""

    type: ClassVar[str] = "step_finished"
    step: int
    seconds: float
    overhead_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ContextEdited:
    """The context policy changed what the model will see, and what that costs (`recomputed_tokens` are read again)."""

    type: ClassVar[str] = "context_edited"
    policy: Literal["hide_results", "drop_steps"]
    first_step: int
    last_step: int
    tokens_before: int
    tokens_after: int
    recomputed_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitReached:
    """A limit is near (`final` false: the model has been warned) or reached (`final` true: the next step must answer)."""

    type: ClassVar[str] = "limit"
    limit: Literal["steps", "tokens", "thinking", "context", "time", "cost", "repetition", "bad_calls"]
    used: float
    allowed: float
    final: bool
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Error:
    """Something failed. `recovered` says whether the run went on."""

    type: ClassVar[str] = "error"
    where: str
    message: str
    recovered: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFinished:
    """Last event of a run: always an answer (empty only when the run was cut short before any) and a reason."""

    type: ClassVar[str] = "run_finished"
    answer: str
    reason: EndReason
    steps: int
    usage: Json
    """Sums over the run, keys as in `Usage`."""
    sources: list[str] = field(default_factory=list)
    """Ids of the documents that were opened, in order of first opening."""
    citations: list[Json] = field(default_factory=list)
    """The answer's citations: `text`, `document`, `lines` (first and last), whether it `holds`, and if not the
    `problem`."""
    seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Unknown:
    """An event of a type this version doesn't know, kept as it is."""

    type: ClassVar[str] = "unknown"
    data: Json


Event = (
    RunStarted | StepStarted | Thinking | Content | ToolCallDelta | ToolCall | ToolResult | Usage | TurnFinished
    | StepFinished | ContextEdited | LimitReached | Error | RunFinished | Unknown
)  # fmt: skip

_CLASSES: dict[str, Any] = {
    cls.type: cls
    for cls in (
        RunStarted, StepStarted, Thinking, Content, ToolCallDelta, ToolCall, ToolResult, Usage, TurnFinished,
        StepFinished, ContextEdited, LimitReached, Error, RunFinished,
    )
}  # fmt: skip


def to_json(event: Event) -> Json:
    """The event as a JSON object whose first key is `type`; the data of files stays `bytes`."""
    if isinstance(event, Unknown):
        return event.data
    data = {"type": event.type} | {f.name: getattr(event, f.name) for f in fields(event)}
    if isinstance(event, ToolResult):
        data["files"] = [asdict(file) for file in event.files]
    return data


def from_json(data: Mapping[str, Any]) -> Event:
    """The event that `to_json` wrote. Fields this version doesn't know are dropped, an unknown type gives `Unknown`."""
    cls = _CLASSES.get(str(data.get("type")))
    if cls is None:
        return Unknown(data=dict(data))
    known = {f.name for f in fields(cls)}
    values = {key: value for key, value in data.items() if key in known}
    if cls is ToolResult:
        values["files"] = [Attachment(**file) for file in values.get("files", [])]
    event: Event = cls(**values)
    return event
