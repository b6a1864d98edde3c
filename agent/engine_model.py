"""The in-process model: turns of a conversation from an engine's session.

Each turn appends only what is new, samples until the message ends, and gives the parser's events while it does. Content
is tokenised with specials disallowed, so results and pages stay data.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal

import anyio.to_thread
from thinkloop.agent.model import Conversation, Turn
from thinkloop.agent.timeline import Timeline
from thinkloop.engine.params import Sampling
from thinkloop.engine.parser import Parser
from thinkloop.engine.template import Template, template_hash
from thinkloop.engine.tokenizer import Tokenizer
from thinkloop.traces.events import Event, FinishReason, Json, ThinkloopError, TurnFinished, Usage

if TYPE_CHECKING:  # torch comes with them
    from thinkloop.engine.engine import Engine
    from thinkloop.engine.session import Session

STOPS = ("<|im_end|>", "[EOS]", "[EOT]")
CALL_MARKERS = (
    "<|tool_calls_section_begin|>",
    "<|tool_calls_section_end|>",
    "<|tool_call_begin|>",
    "<|tool_call_argument_begin|>",
    "<|tool_call_end|>",
)
MAX_CONVERSATIONS = 8
"""Conversations whose caches are kept; one more, and the least recently used is read again if it goes on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What a checkpoint says about running it, in its optional `thinkloop.json`."""

    window: int | None = None
    """Tokens of context that it was trained for, when they are fewer than `max_position_embeddings`."""
    context_policy: Literal["hide_results", "drop_steps"] = "hide_results"
    system: str | None = None
    sampling: Json = field(default_factory=dict)
    """Its own defaults, keys as in `Sampling`."""

    @classmethod
    def load(cls, folder: str | Path) -> Settings:
        """Reads `folder/thinkloop.json`; all defaults when there is none. Raises `ThinkloopError` for a wrong field."""
        path = Path(folder) / "thinkloop.json"
        if not path.is_file():
            return cls()
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ThinkloopError(f"{path} is not readable JSON ({error}); mend or remove it.") from error
        return _checked_settings(path, data)


class EngineModel:
    """A `Model` on an engine of this process. Each conversation has a session of its own, so that runs may share one
    model; within a conversation one turn streams at a time.

    `sampling` overrides the checkpoint's own defaults; `settings` come from its `thinkloop.json`.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        tokenizer: Tokenizer,
        sampling: Sampling | None = None,
        seed: int = 0,
        settings: Settings | None = None,
        name: str = "engine",
    ) -> None:
        self._engine, self._tokenizer, self._name = engine, tokenizer, name
        self._settings = settings or Settings()
        self._sampling = sampling or replace(Sampling(), **self._settings.sampling, seed=seed)
        self._template = Template(tokenizer)
        self._stop_ids = _present(tokenizer, STOPS)
        self._open: OrderedDict[int, _Dialogue] = OrderedDict()

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        sampling: Sampling | None = None,
        seed: int = 0,
        device: Literal["cpu", "cuda"] = "cpu",
    ) -> EngineModel:
        """The model of a checkpoint folder, or the one that ships with thinkloop for "mini". Takes seconds.

        Raises `ThinkloopError` for a folder that can't be loaded.
        """
        from thinkloop.engine.engine import Engine

        engine = Engine.load(folder, device=device)
        try:
            tokenizer, settings = Tokenizer.load(engine.folder), Settings.load(engine.folder)
            return cls(engine, tokenizer=tokenizer, sampling=sampling, seed=seed, settings=settings, name=str(folder))
        except BaseException:
            engine.close()
            raise

    @property
    def name(self) -> str:
        return self._name

    @property
    def system(self) -> str | None:
        """The system prompt that the checkpoint brings, if any."""
        return self._settings.system

    @property
    def window(self) -> int:
        """Context window in tokens: the checkpoint's own, or all positions the architecture has."""
        positions = self._engine.config.max_position_embeddings
        return min(self._settings.window or positions, positions)

    @property
    def context_policy(self) -> Literal["hide_results", "drop_steps"]:
        return self._settings.context_policy

    def describe(self) -> Json:
        """Name, kind, hashes of weights, tokenizer and template, device, dtype, window, sampling and seed."""
        return {
            **self._engine.describe(),
            "name": self._name,
            "kind": "engine",
            "tokenizer": self._tokenizer.hash,
            "template": template_hash(),
            "window": self.window,
            "context_policy": self.context_policy,
            "sampling": asdict(self._sampling),
        }

    def count_tokens(self, text: str) -> int:
        """Tokens that `text` takes as content, exactly."""
        return len(self._tokenizer.encode(text))

    def stream(self, conversation: Conversation, tools: Sequence[Json], turn: Turn) -> AsyncIterator[Event]:
        """One turn's events. Raises `ThinkloopError` when the conversation leaves no room in the window, or when a turn
        of the same conversation is still streaming."""
        return self._turn(conversation, tools, turn)

    def fork(self, conversation: Conversation, branch: Conversation) -> None:
        """Lets `branch`, which must begin with the messages of `conversation`, go on from its cache: nothing is read
        again. Does nothing for a conversation that wasn't read yet."""
        held = self._open.get(id(conversation))
        if held is not None:
            self._keep(_Dialogue(Timeline(branch, self._template), held.session.fork()))

    async def aclose(self) -> None:
        """Frees the sessions and closes the engine, once what is under way there has stopped."""
        while self._open:
            self._open.popitem()[1].session.close()
        await anyio.to_thread.run_sync(self._engine.close)

    async def _turn(self, conversation: Conversation, tools: Sequence[Json], turn: Turn) -> AsyncIterator[Event]:
        dialogue = self._dialogue(conversation)
        with dialogue:
            clock = _Clock()
            prompt_ids, cached = await self._read(dialogue, tools)
            parser = Parser(self._tokenizer, tools, dialogue.timeline.next_index)
            start, sampled, thinking = len(dialogue.session), list[int](), 0
            async with aclosing(dialogue.session.generate(**self._limits(turn, start))) as tokens:
                async for token_id in tokens:
                    clock.token()
                    sampled.append(token_id)
                    dialogue.timeline.sampled(token_id)
                    thinking += parser.state == "thinking" and token_id < self._tokenizer.n_ranks
                    for event in parser.feed(token_id):
                        dialogue.timeline.note(event)
                        yield event
            reason = _reason(dialogue.session.finish_reason, parser)
            for event in parser.finish(reason):
                dialogue.timeline.note(event)
                yield event
            rng_position = dialogue.session.rng_position
        yield Usage(
            prompt_tokens=start, completion_tokens=len(sampled), cached_tokens=cached, thinking_tokens=thinking,
            prefill_seconds=clock.prefill, decode_seconds=clock.decode,
        )  # fmt: skip
        yield TurnFinished(reason=reason, prompt_ids=prompt_ids, token_ids=sampled, rng_position=rng_position)

    async def _read(self, dialogue: _Dialogue, tools: Sequence[Json]) -> tuple[list[int], int]:
        """Brings the session up to the model's turn: the ids appended, and how many tokens were there already."""
        session, timeline = dialogue.session, dialogue.timeline
        plan = timeline.plan(session, tools)
        try:
            self._check_room(plan.keep + len(plan.ids))
            if plan.keep < len(session):
                session.truncate(plan.keep)
            await session.append(plan.ids)
        except BaseException:
            timeline.forget()  # cut short anywhere in here, the session holds some other prefix
            raise
        return plan.ids, plan.keep

    def _check_room(self, tokens: int) -> None:
        positions = self._engine.config.max_position_embeddings
        if tokens >= positions:
            raise ThinkloopError(
                f"The conversation takes {tokens:,} tokens and {self._name} has room for {positions:,}: shorten the "
                "task, or give long text as a corpus to search."
            )

    def _limits(self, turn: Turn, start: int) -> dict[str, Any]:
        """Arguments for `Session.generate`."""
        room = self._engine.config.max_position_embeddings - start
        wanted = turn.max_tokens if turn.max_tokens is not None else max(self.window - start, 1)
        calls = _present(self._tokenizer, CALL_MARKERS)
        return {
            "max_tokens": min(wanted, room),
            "stop_ids": self._stop_ids,
            "think_end_id": self._tokenizer.think_end,
            "max_thinking": turn.max_thinking if self._tokenizer.think_end is not None else None,
            "call_ids": calls,
            "banned_ids": calls if turn.tool_choice == "none" else (),
        }

    def _dialogue(self, conversation: Conversation) -> _Dialogue:
        held = self._open.pop(id(conversation), None)
        if held is None:
            held = _Dialogue(Timeline(conversation, self._template), self._engine.session(sampling=self._sampling))
        return self._keep(held)

    def _keep(self, dialogue: _Dialogue) -> _Dialogue:
        """As the most recently used. What goes may still be streaming; it ends as it would have."""
        self._open[id(dialogue.timeline.conversation)] = dialogue
        while len(self._open) > MAX_CONVERSATIONS:
            self._open.popitem(last=False)[1].drop()
        return dialogue


class _Dialogue:
    """A conversation's timeline and session. As a context manager it is the turn that streams."""

    def __init__(self, timeline: Timeline, session: Session) -> None:
        self.timeline, self.session = timeline, session
        self._streaming = False

    def __enter__(self) -> None:
        if self._streaming:
            raise ThinkloopError("A turn of this conversation is still streaming: finish or close it first.")
        self._streaming = True

    def __exit__(self, *exc: object) -> None:
        self._streaming = False

    def drop(self) -> None:
        """Frees the cache now, or leaves that to the turn that streams."""
        if not self._streaming:
            self.session.close()


class _Clock:
    """Seconds up to the first token, and from it on."""

    def __init__(self) -> None:
        self._start = self._first = self._last = perf_counter()
        self._begun = False

    def token(self) -> None:
        self._last = perf_counter()
        if not self._begun:
            self._begun, self._first = True, self._last

    @property
    def prefill(self) -> float:
        return self._first - self._start

    @property
    def decode(self) -> float:
        return self._last - self._first


def _present(tokenizer: Tokenizer, names: Sequence[str]) -> tuple[int, ...]:
    return tuple(tokenizer.specials[name] for name in names if name in tokenizer.specials)


def _reason(finish: str | None, parser: Parser) -> FinishReason:
    if finish == "length":
        return "length"
    return "tool_calls" if parser.calls else "stop"


def _checked_settings(path: Path, data: Any) -> Settings:
    if not isinstance(data, dict):
        raise ThinkloopError(f"{path} holds {type(data).__name__}, expected a JSON object; mend or remove it.")
    for key, value in data.items():
        allowed = _FIELDS.get(key)
        if allowed is None:
            raise ThinkloopError(f"{path} has an unknown field {key!r}; known: {', '.join(_FIELDS)}.")
        if not allowed[0](value):
            raise ThinkloopError(f"{path}: {key} is {value!r}, but must be {allowed[1]}.")
    return Settings(**data)


def _is_sampling(value: Any) -> bool:
    return isinstance(value, dict) and value.keys() <= _SAMPLING


_SAMPLING = {f.name for f in fields(Sampling)}
_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "window": (lambda v: v is None or (type(v) is int and v > 0), "a number of tokens"),
    "context_policy": (lambda v: v in ("hide_results", "drop_steps"), '"hide_results" or "drop_steps"'),
    "system": (lambda v: v is None or isinstance(v, str), "a text"),
    "sampling": (_is_sampling, f"an object with some of {', '.join(sorted(_SAMPLING))}"),
}
"""Fields of `thinkloop.json`: what is allowed, and how to say it."""
