"""A session: one token timeline and the KV cache that belongs to it. Append only, unless told to truncate."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import anyio.lowlevel
import anyio.to_thread
from thinkloop.engine.constraint import Constraint
from thinkloop.engine.generation import Finish, Generation, Stops, TokenStream
from thinkloop.engine.kv_cache import CacheFull
from thinkloop.engine.params import Sampling
from thinkloop.engine.sampler import Sampler, check_sampling
from thinkloop.engine.scheduler import EngineClosed
from thinkloop.engine.sequence import Reading, Sequence
from thinkloop.engine.snapshot import Snapshot
from thinkloop.traces.events import ThinkloopError

if TYPE_CHECKING:
    from thinkloop.engine.engine import Engine


class SessionError(ThinkloopError):
    """A session was asked for what it can't do: a token out of range, a full window, two generations at once."""


class Session:
    """Made by `Engine.session()`. Every method but the properties is for one task at a time.

    Each token's keys and values are computed once: appended ones by `append`, sampled ones when the next token is asked
    for, or together with the next `append`; those of a prefix that another session holds or held lately not at all.
    """

    def __init__(self, engine: Engine, sampling: Sampling, sequence: Sequence) -> None:
        check_sampling(sampling, engine.config.vocab_size)
        self.sampling = sampling
        self.rng_position = 0
        """Draws used: one per sampled token. Set it to replay from a record."""
        self.finish_reason: Finish | None = None
        """Why the last `generate` ended; None while it runs or when it was cancelled."""
        self._engine = engine
        self._tokens: list[int] = []
        self._sequence = sequence
        self._busy: Generation | None = None
        self._reading: Reading | None = None
        self._moving = False
        self._closed = False

    @property
    def tokens(self) -> list[int]:
        """A copy of the timeline: what was appended and what was read from `generate`, in order."""
        return list(self._tokens)

    def __len__(self) -> int:
        return len(self._tokens)

    @property
    def window(self) -> int:
        """The most tokens the timeline can hold."""
        return self._engine.config.max_position_embeddings

    @property
    def prefilled_tokens(self) -> int:
        """Appended tokens computed so far, in all: each once, so their number less the reused ones, as long as nothing is
        truncated or cancelled."""
        return self._sequence.prefilled

    @property
    def reused_tokens(self) -> int:
        """Appended tokens whose rows another session had computed."""
        return self._sequence.reused

    @property
    def decoded_tokens(self) -> int:
        """Sampled tokens computed so far, those sampled ahead of the reader and dropped included, rejected drafts not."""
        return self._sequence.decoded

    async def append(self, ids: Collection[int]) -> None:
        """Puts `ids` at the end of the timeline and computes them (and only what isn't computed yet), in chunks.
        Cancelled between two chunks, it leaves the timeline as it was. Raises `SessionError` for bad ids or a full
        window, `CacheFull` when no blocks are left and no other session is at work."""
        self._check_free()
        new = self._checked(ids)
        if not new:
            await anyio.lowlevel.checkpoint()
            return
        scheduler, known = self._engine.scheduler, len(self._tokens)
        self._reading = Reading(self._sequence, self._tokens, new, self._engine.share_prefixes)
        try:
            scheduler.add(self._reading)
            await asyncio.wrap_future(self._reading.done)
        except BaseException:
            with suppress(EngineClosed):
                scheduler.start(lambda: self._sequence.trim(known))
            raise
        finally:
            self._reading = None
        self._tokens.extend(new)

    def _checked(self, ids: Collection[int]) -> list[int]:
        new = list(ids)
        for token in new:
            self._check_id(token)
        if len(self._tokens) + len(new) > self.window:
            raise SessionError(
                f"{len(new)} more tokens don't fit: {len(self._tokens)} of the window's {self.window} are used."
                " Append less, or truncate the session first."
            )
        if len(self._tokens) + len(new) > self._engine.pool.tokens:
            raise CacheFull(
                f"{len(self._tokens) + len(new):,} tokens are more than the whole KV cache holds"
                f" ({self._engine.pool.tokens:,}). Load the model with a larger `cache_tokens`."
            )
        return new

    def _check_id(self, token: object) -> None:
        vocabulary = self._engine.config.vocab_size
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocabulary:
            raise SessionError(f"{token!r} is no token id: ids are whole numbers from 0 to {vocabulary - 1}.")

    def generate(
        self, *, max_tokens: int | None = None, stop_ids: Collection[int] = (), sampling: Sampling | None = None,
        think_end_id: int | None = None, max_thinking: int | None = None, call_ids: Collection[int] = (),
        banned_ids: Collection[int] = (), constraint: Constraint | None = None, logprobs: int | None = None,
    ) -> TokenStream:  # fmt: skip
        """Samples token ids, each of them part of the timeline once it is read, a stop id included.

        Ends at a stop id (`finish_reason` "stop"), after `max_tokens` or with the window full ("length"). After
        `max_thinking` tokens without `think_end_id`, that very token comes next, and in the last eighth of them as soon
        as the model gives it a chance of 5 %, unless one of `call_ids` (a model may open a call without closing its
        thinking) has come before. `banned_ids` are never chosen; `constraint` masks tokens as the text grows; with
        `logprobs=n` the stream keeps the log probability of each token and of the n likeliest. Closing the iterator or
        cancelling its task at any token leaves the timeline at what was read. Raises `SessionError` on an empty timeline
        and `SamplingError` on bad parameters.
        """
        self._check_free()
        if think_end_id is not None:
            self._check_id(think_end_id)
        if not self._tokens:
            raise SessionError("Nothing to go on: append at least one token before generating.")
        room = self.window - len(self._tokens)
        stops = Stops(
            max_tokens=room if max_tokens is None else min(max_tokens, room),
            stop_ids=frozenset(stop_ids), think_end_id=think_end_id, max_thinking=max_thinking,
            call_ids=frozenset(call_ids),
        )  # fmt: skip
        if sampling is not None:
            check_sampling(sampling, self._engine.config.vocab_size)
        sampler = Sampler(sampling or self.sampling, self._tokens, banned_ids)
        scheduler = self._engine.scheduler
        generation = Generation(
            self._sequence, self._tokens, sampler, stops, self.rng_position, scheduler.resume,
            constraint=constraint, speculate=self._engine.speculate, logprobs=logprobs,
        )  # fmt: skip
        scheduler.add(generation)
        self.finish_reason, self._busy = None, generation
        return TokenStream(generation, self._took, self._ended)

    def _took(self, token: int) -> None:
        self._tokens.append(token)
        self.rng_position += 1

    def _ended(self, finish: Finish | None) -> None:
        self.finish_reason, self._busy = finish, None

    def fork(self) -> Session:
        """A session with the same timeline and generator position. Both go on independently; what they have in common
        stays in the cache once, and nothing is computed again. The twin lives on when this one is closed."""
        self._check_open()
        twin = self._engine.session(self.sampling)
        twin._tokens, twin.rng_position = self.tokens, self.rng_position
        length, source = len(self._tokens), self._sequence

        def share() -> None:  # before anything either does next
            twin._sequence.become(source.fork(length))

        self._engine.scheduler.start(share)
        return twin

    def truncate(self, length: int) -> None:
        """Forgets the timeline from `length` on. Raises `SessionError` when `length` is out of range."""
        self._check_free()
        if not 0 <= length <= len(self._tokens):
            raise SessionError(f"Can't truncate to {length}: the session has {len(self._tokens)} tokens.")
        self._tokens = self._tokens[:length]  # a new list: the engine's thread may still read the old one
        self._engine.scheduler.start(lambda: self._sequence.forget(length))

    async def save(self, path: str | Path) -> None:
        """Writes timeline, generator position and cache to one safetensors file. Raises `SnapshotError`."""
        self._check_free()
        self._moving = True
        try:
            snapshot = await self._engine.scheduler.run(self._snapshot)
            await anyio.to_thread.run_sync(snapshot.write, Path(path))
        finally:
            self._moving = False

    def _snapshot(self) -> Snapshot:
        self._sequence.trim(len(self._tokens))
        rows = self._sequence.cache.rows()
        return Snapshot(list(self._tokens), self.rng_position, rows, self._engine.fingerprint)

    async def load(self, path: str | Path) -> None:
        """Takes over a saved session's state. Raises `SnapshotError` when it is damaged or another model's, and
        `CacheFull`; the session stays as it was then. Whether rows belong to their tokens can't be checked: other sessions
        never share them. `Snapshot.tokens_of(path)` gives the tokens alone, from which any
        engine can build the state again."""
        self._check_free()
        self._moving = True
        try:
            engine, dtype = self._engine, self._engine.pool.rows.dtype
            saved = await anyio.to_thread.run_sync(Snapshot.read, Path(path), engine.fingerprint, engine.config, dtype)
            with anyio.CancelScope(shield=True):  # rows and timeline change together, or neither does
                await self._engine.scheduler.run(lambda: self._take(saved))
        finally:
            self._moving = False

    def _take(self, saved: Snapshot) -> None:
        self._check_open()
        self._sequence.restore(saved.rows)
        self._tokens, self.rng_position = list(saved.tokens), saved.rng_position

    def close(self) -> None:
        """Frees the cache and ends an append or a generation under way. Closing twice is fine."""
        if self._closed:
            return
        self._closed = True
        self.fail(SessionError("This session was closed while it was working."))
        with suppress(EngineClosed):
            self._engine.scheduler.start(lambda: self._sequence.leave(self._tokens))

    def fail(self, error: ThinkloopError) -> None:
        """Ends an append or a generation under way with `error`."""
        busy = self._busy
        if busy is not None:
            busy.fail(error)
        reading = self._reading
        if reading is not None:
            with suppress(EngineClosed):
                self._engine.scheduler.start(lambda: reading.fail(error))

    def _check_open(self) -> None:
        if self._closed:
            raise SessionError("This session is closed. Make another with engine.session().")

    def _check_free(self) -> None:
        self._check_open()
        if self._busy is not None:
            raise SessionError("This session is generating. Finish or close that iterator first (`aclose()`), or fork.")
        if self._reading is not None:
            raise SessionError("This session is reading what was appended. Wait for that `append` first.")
        if self._moving:
            raise SessionError("This session is being saved or loaded. Wait for that first.")
