"""The in-process model: turns of a conversation from an engine's session.

Each turn appends only what is new, samples until the message ends, and gives the parser's events while it does. Content
is tokenised with specials disallowed, so results and pages stay data.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import anyio.to_thread
from thinkloop.agent.model import Conversation, Turn
from thinkloop.agent.model_settings import ModelSettings
from thinkloop.agent.timeline import Timeline
from thinkloop.engine.params import Sampling
from thinkloop.engine.parser import Parser
from thinkloop.engine.stop_strings import StopStrings
from thinkloop.engine.template import Template, template_hash
from thinkloop.engine.tokenizer import Tokenizer
from thinkloop.traces.events import Content, Error, Event, FinishReason, Json, ThinkloopError, TurnFinished, Usage

if TYPE_CHECKING:  # torch comes with them
    from thinkloop.engine.engine import Engine
    from thinkloop.engine.grammar import CallGrammar
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


class EngineModel:
    """A `Model` on an engine of this process. Each conversation has a session of its own, so that runs may share one
    model; within a conversation one turn streams at a time.

    What `sampling` sets overrides the checkpoint's own defaults; `settings` come from its `thinkloop.json`. Where the
    `grammar` extra is installed and `grammar` isn't False, calls are written under a grammar: declared tools, the next
    index, arguments that fit the schema. What a schema can't have enforced is told by an `Error` event, once.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        tokenizer: Tokenizer,
        sampling: Sampling | None = None,
        seed: int = 0,
        settings: ModelSettings | None = None,
        name: str = "engine",
        grammar: bool = True,
    ) -> None:
        self._engine, self._tokenizer, self._name = engine, tokenizer, name
        self._settings = settings or ModelSettings()
        own = Sampling.from_json(self._settings.sampling).over(Sampling(seed=seed))
        self._sampling = (sampling or Sampling()).over(own).resolved()
        self._constrained = grammar and find_spec("llguidance") is not None
        self._lapses: set[tuple[str, str]] = set()
        self._compiled: tuple[Sequence[Json], Json | None] | None = None  # what the last grammar was made of
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
        kv_dtype: Literal["bf16", "fp8"] = "bf16",
        context: int | None = None,
        grammar: bool = True,
        progress: Callable[[int, int], None] | None = None,
        announce: Callable[[str], None] | None = None,
    ) -> EngineModel:
        """The model of a checkpoint folder, or the one that ships with thinkloop for "mini", on `device`, with a cache in
        `kv_dtype` and a window of at most `context` tokens. Takes seconds or more; `progress` is called with the bytes read
        so far and in all, `announce` on CUDA with one line before, how the device's memory is shared out.

        Raises `ThinkloopError` for a folder that can't be loaded.
        """
        from thinkloop.engine.engine import Engine

        engine = Engine.load(
            folder, device=device, kv_dtype=kv_dtype, context=context, progress=progress, announce=announce
        )
        try:
            tokenizer, settings = Tokenizer.load(engine.folder), ModelSettings.load(engine.folder)
            model = cls(
                engine, tokenizer=tokenizer, sampling=sampling, seed=seed, settings=settings, name=str(folder),
                grammar=grammar,
            )  # fmt: skip
            model._prepare_grammar()
            return model
        except BaseException:
            engine.close()
            raise

    def _prepare_grammar(self) -> None:
        """Now rather than in the first turn: 0.5 s for a vocabulary of 163,840."""
        if self._constrained:
            from thinkloop.engine.vocabulary import vocabulary

            _ = vocabulary(self._tokenizer).llguidance

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
        """Name, kind, hashes of weights, tokenizer and template, device, dtype, cache, window, sampling and
        seed."""
        return {
            **self._engine.describe(),
            "name": self._name,
            "kind": "engine",
            "tokenizer": self._tokenizer.hash,
            "template": template_hash(),
            "window": self.window,
            "context_policy": self.context_policy,
            "sampling": self._sampling.to_json(),
            "grammar": "llguidance" if self._constrained else None,
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
            asked, before = perf_counter(), _Counted.of(dialogue.session)
            prompt_ids, kept = await self._read(dialogue, tools)
            read = perf_counter() - asked
            parser = Parser(self._tokenizer, tools, dialogue.timeline.next_index)
            start, sampled, thinking = len(dialogue.session), list[int](), 0
            stops = StopStrings(self._sampling.stop)
            grammar = await self._grammar(dialogue, tools, turn)
            stream = dialogue.session.generate(**self._limits(turn, start), constraint=grammar)
            async with aclosing(stream) as tokens:
                async for token_id in tokens:
                    sampled.append(token_id)
                    dialogue.timeline.sampled(token_id)
                    thinking += parser.state == "thinking" and token_id < self._tokenizer.n_ranks
                    for event in _shown(parser.feed(token_id), stops):
                        dialogue.timeline.note(event)
                        yield event
                    if stops.hit is not None:
                        break
            reason = _reason(dialogue.session.finish_reason, parser)
            for event in [*_shown(parser.finish(reason), stops), *_text(stops.finish())]:
                dialogue.timeline.note(event)
                yield event
            rng_position = dialogue.session.rng_position
            stats, counted = stream.stats, _Counted.of(dialogue.session)
        for event in self._new_lapses(grammar):
            yield event
        yield Usage(
            prompt_tokens=start, completion_tokens=len(sampled), thinking_tokens=thinking,
            cached_tokens=kept + counted.reused - before.reused,
            prefilled_tokens=counted.prefilled - before.prefilled,
            queue_seconds=stats.queue_seconds,
            prefill_seconds=read + stats.queue_seconds + stats.first_token_seconds,
            decode_seconds=stats.decode_seconds, decoding_passes=stats.passes,
            drafted_tokens=stats.drafted, accepted_tokens=stats.accepted,
        )  # fmt: skip
        yield TurnFinished(reason=reason, prompt_ids=prompt_ids, token_ids=sampled, rng_position=rng_position)

    async def _grammar(self, dialogue: _Dialogue, tools: Sequence[Json], turn: Turn) -> CallGrammar | None:
        if not self._constrained:
            if turn.response_format or turn.forbidden:
                raise ThinkloopError(
                    "`response_format` and `forbid_repeats` need the grammar: pip install 'thinkloop[grammar]', and leave"
                    " `grammar` on."
                )
            return None
        from thinkloop.engine.grammar import CallGrammar  # torch comes with it

        make = partial(
            CallGrammar, self._tokenizer, tools, next_index=dialogue.timeline.next_index,
            tool_choice=turn.tool_choice, response_format=turn.response_format, forbidden=turn.forbidden,
        )  # fmt: skip
        schemas = (tools, turn.response_format)
        if schemas == self._compiled:
            return make()  # 20 µs
        grammar = await anyio.to_thread.run_sync(make, abandon_on_cancel=True)  # seconds for a schema made to stall
        self._compiled = schemas
        return grammar

    def _new_lapses(self, grammar: CallGrammar | None) -> Iterator[Error]:
        """What the grammar doesn't enforce and wasn't told before."""
        for lapse in list((grammar.unsupported if grammar else {}).items()):
            if lapse not in self._lapses:
                self._lapses.add(lapse)
                yield Error(where=f"grammar: {lapse[0]}", message=lapse[1], recovered=True)

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
            "banned_ids": calls if turn.tool_choice == "none" and not self._constrained else (),
        }

    def _dialogue(self, conversation: Conversation) -> _Dialogue:
        held = self._open.pop(id(conversation), None)
        if held is None:
            held = _Dialogue(
                Timeline(conversation, self._template), self._engine.session(replace(self._sampling, stop=()))
            )
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


class _Counted(NamedTuple):
    """A session's counters at a moment."""

    prefilled: int
    reused: int

    @classmethod
    def of(cls, session: Session) -> _Counted:
        return cls(session.prefilled_tokens, session.reused_tokens)


def _shown(events: Iterable[Event], stops: StopStrings) -> Iterator[Event]:
    """The events, content only as far as no stop string was written."""
    for event in events:
        if isinstance(event, Content):
            yield from _text(stops.feed(event.text))
        else:
            yield event


def _text(text: str) -> Iterator[Content]:
    if text:
        yield Content(text=text)


def _present(tokenizer: Tokenizer, names: Sequence[str]) -> tuple[int, ...]:
    return tuple(tokenizer.specials[name] for name in names if name in tokenizer.specials)


def _reason(finish: str | None, parser: Parser) -> FinishReason:
    if finish == "length":
        return "length"
    return "tool_calls" if parser.calls else "stop"
