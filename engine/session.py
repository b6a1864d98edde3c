"""A session: one token timeline and the KV cache that belongs to it. Append only, unless told to truncate."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import anyio.lowlevel
from thinkloop.engine.generation import Finish, Generation, Stops, TokenStream
from thinkloop.engine.kv_cache import LatentCache
from thinkloop.engine.params import Sampling
from thinkloop.engine.sampler import Sampler, check_sampling
from thinkloop.engine.snapshot import Snapshot
from thinkloop.engine.worker import EngineClosed
from thinkloop.traces.events import ThinkloopError
from torch import Tensor

if TYPE_CHECKING:
    from thinkloop.engine.engine import Engine


class SessionError(ThinkloopError):
    """A session was asked for what it can't do: a token out of range, a full window, two generations at once."""


class Session:
    """Made by `Engine.session()`. Every method but the properties is for one task at a time.

    Each token's keys and values are computed once: appended ones by `append`, sampled ones when the next token is asked
    for, or together with the next `append`.
    """

    def __init__(self, engine: Engine, sampling: Sampling) -> None:
        check_sampling(sampling)
        self.sampling = sampling
        self.prefilled_tokens = 0
        """Appended tokens computed so far, in all: each once, so their number, as long as nothing is truncated or
        cancelled."""
        self.decoded_tokens = 0
        """Sampled tokens computed so far, those sampled ahead of the reader and dropped included."""
        self.rng_position = 0
        """Draws used: one per sampled token. Set it to replay from a record."""
        self.finish_reason: Finish | None = None
        """Why the last `generate` ended; None while it runs or when it was cancelled."""
        self._engine = engine
        self._tokens: list[int] = []
        self._cache: LatentCache = engine.model.new_cache()
        self._valid = 0
        self._logits: Tensor | None = None
        self._logits_at = -1
        self._busy: Generation | None = None
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

    async def append(self, ids: Sequence[int]) -> None:
        """Puts `ids` at the end of the timeline and computes them (and only what isn't computed yet), in chunks.
        Cancelled between two chunks, it leaves the timeline as it was. Raises `SessionError` for bad ids or a full
        window."""
        self._check_free()
        new = self._checked(ids)
        if not new:
            await anyio.lowlevel.checkpoint()
            return
        timeline, known = self._tokens + new, len(self._tokens)
        await self._engine.worker.run(self._trim)
        while self._valid < len(timeline):
            await self._engine.worker.run(lambda: self._prefill(timeline, known))
        self._tokens = timeline

    def _checked(self, ids: Sequence[int]) -> list[int]:
        new, vocabulary = list(ids), self._engine.config.vocab_size
        for token in new:
            if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocabulary:
                raise SessionError(f"{token!r} is no token id: ids are whole numbers from 0 to {vocabulary - 1}.")
        if len(self._tokens) + len(new) > self.window:
            raise SessionError(
                f"{len(new)} more tokens don't fit: {len(self._tokens)} of the window's {self.window} are used."
                " Append less, or truncate the session first."
            )
        return new

    def _prefill(self, timeline: list[int], known: int) -> None:
        start = self._cache.length
        chunk = timeline[start : start + self._engine.model.chunk_size(start)]
        self._compute(chunk)
        appended = max(0, start + len(chunk) - max(start, known))
        self.prefilled_tokens += appended
        self.decoded_tokens += len(chunk) - appended

    def _compute(self, ids: list[int]) -> Tensor:
        logits = self._logits = self._engine.model.forward(ids, self._cache)
        self._valid = self._logits_at = self._cache.length
        return logits

    def _trim(self) -> None:
        """Drops rows that don't belong to the timeline: of tokens sampled ahead, of a cancelled append, of a
        truncation."""
        self._cache.truncate(min(self._valid, len(self._tokens)))
        self._valid = self._cache.length

    def generate(
        self, *, max_tokens: int | None = None, stop_ids: Collection[int] = (), sampling: Sampling | None = None,
        think_end_id: int | None = None, max_thinking: int | None = None, call_ids: Collection[int] = (),
        banned_ids: Collection[int] = (),
    ) -> TokenStream:  # fmt: skip
        """Samples token ids, each of them part of the timeline once it is read, a stop id included.

        Ends at a stop id (`finish_reason` "stop"), after `max_tokens` or with the window full ("length"). After
        `max_thinking` tokens without `think_end_id`, that very token comes next, unless one of `call_ids` (a model may
        open a call without closing its thinking) has come before. `banned_ids` are never chosen. Closing the iterator
        or cancelling its task at any token leaves the timeline at what was read. Raises `SessionError` on an empty
        timeline and `SamplingError` on bad parameters.
        """
        self._check_free()
        if not self._tokens:
            raise SessionError("Nothing to go on: append at least one token before generating.")
        room = self.window - len(self._tokens)
        stops = Stops(
            max_tokens=room if max_tokens is None else min(max_tokens, room),
            stop_ids=frozenset(stop_ids), think_end_id=think_end_id, max_thinking=max_thinking,
            call_ids=frozenset(call_ids),
        )  # fmt: skip
        sampler = Sampler(sampling or self.sampling, self._tokens, banned_ids)
        self.finish_reason = None
        source = _LogitsSource(self, self.tokens)
        self._busy = Generation(source, sampler, stops, self.rng_position, self._engine.worker.submit)
        return TokenStream(self._busy, self._took, self._ended)

    def _took(self, token: int) -> None:
        self._tokens.append(token)
        self.rng_position += 1

    def _ended(self, finish: Finish | None) -> None:
        self.finish_reason, self._busy = finish, None

    def fork(self) -> Session:
        """A session with the same timeline, generator position and (copied) cache; both go on independently."""
        self._check_open()
        twin = self._engine.session(self.sampling)
        twin._tokens, twin.rng_position = self.tokens, self.rng_position
        length = len(self._tokens)
        self._engine.worker.start(lambda: self._copy_into(twin, length))  # before anything either does next
        return twin

    def _copy_into(self, twin: Session, length: int) -> None:
        valid = min(self._valid, length)
        twin._cache.restore(self._cache.rows()[:, :valid])
        twin._valid = valid
        if self._logits_at == length:
            twin._logits, twin._logits_at = self._logits, length

    def truncate(self, length: int) -> None:
        """Forgets the timeline from `length` on. Raises `SessionError` when `length` is out of range."""
        self._check_free()
        if not 0 <= length <= len(self._tokens):
            raise SessionError(f"Can't truncate to {length}: the session has {len(self._tokens)} tokens.")
        del self._tokens[length:]
        self._valid = min(self._valid, length)
        self._logits_at = -1

    async def save(self, path: str | Path) -> None:
        """Writes timeline, generator position and cache to one safetensors file."""
        self._check_free()
        await self._engine.worker.run(lambda: self._snapshot().write(Path(path)))

    def _snapshot(self) -> Snapshot:
        self._trim()
        return Snapshot(self._tokens, self.rng_position, self._cache.rows(), self._engine.fingerprint)

    async def load(self, path: str | Path) -> None:
        """Takes over a saved session's state. Raises `SnapshotError` when it is damaged or another model's."""
        self._check_free()
        saved = await self._engine.worker.run(lambda: Snapshot.read(Path(path), self._engine.fingerprint))
        await self._engine.worker.run(lambda: self._cache.restore(saved.rows))
        self._tokens, self.rng_position = list(saved.tokens), saved.rng_position
        self._valid, self._logits_at = saved.rows.shape[1], -1

    def close(self) -> None:
        """Frees the cache and ends a generation under way. Closing twice is fine."""
        if self._closed:
            return
        self._closed = True
        if self._busy is not None:
            self._busy.fail(SessionError("This session was closed while it was generating."))
        with suppress(EngineClosed):
            self._engine.worker.start(self._cache.release)

    def fail(self, error: ThinkloopError) -> None:
        """Ends a generation under way with `error` (the engine is closing)."""
        if self._busy is not None:
            self._busy.fail(error)

    def _check_open(self) -> None:
        if self._closed:
            raise SessionError("This session is closed. Make another with engine.session().")

    def _check_free(self) -> None:
        self._check_open()
        if self._busy is not None:
            raise SessionError("This session is generating. Finish or close that iterator first (`aclose()`), or fork.")


class _LogitsSource:
    """Gives a generation its logits, on the worker: first those after `timeline`, then those after each sampled
    token."""

    def __init__(self, session: Session, timeline: list[int]) -> None:
        self._session, self._timeline = session, timeline

    def __call__(self, last: int | None) -> Tensor:
        if last is None:
            return self._first()
        self._session.decoded_tokens += 1
        return self._session._compute([last])

    def _first(self) -> Tensor:
        """At hand after an append, else from the tokens not computed yet, at least the last."""
        session, length = self._session, len(self._timeline)
        session._trim()
        if session._logits is not None and session._logits_at == length:
            return session._logits
        session._cache.truncate(length - 1)
        while True:
            start = session._cache.length
            chunk = self._timeline[start : start + session._engine.model.chunk_size(start)]
            session.decoded_tokens += len(chunk)
            logits = session._compute(chunk)
            if session._cache.length == length:
                return logits
