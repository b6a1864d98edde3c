"""A model from its name: the mini model, a checkpoint folder, or the URL of a server."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from thinkloop.agent.model import Model
from thinkloop.engine.params import Sampling
from thinkloop.traces.events import ThinkloopError

MINI = "mini"
Device = Literal["cpu", "cuda"]
KvDtype = Literal["bf16", "fp8"]
Progress = Callable[[int, int], None]
"""Called with the bytes of a checkpoint read so far, and in all."""
Announce = Callable[[str], None]
"""Called with a line about what is to be loaded."""


def is_url(name: str) -> bool:
    """Whether a model's name is a server's address."""
    return name.startswith(("http://", "https://"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Local:
    """How a model in this process is loaded."""

    device: Device = "cpu"
    kv_dtype: KvDtype = "bf16"
    context: int | None = None
    grammar: bool = True
    progress: Progress | None = None
    announce: Announce | None = None


def open_model(
    name: str, *, sampling: Sampling | None, seed: int | None, model_name: str | None, local: Local
) -> Callable[[], Model]:
    """What opens the model called `name`; calling it may take seconds. What `sampling` and `seed` leave open is the
    checkpoint's or the server's to say. Raises `ThinkloopError` when there is no such model."""
    if is_url(name):
        if not model_name:
            raise ThinkloopError(f"Which model of {name}? A server needs its name: `model_name=` (--model-name NAME).")
        if local.device != "cpu" or local.kv_dtype != "bf16" or local.context is not None:
            raise ThinkloopError(
                f"`device`, `kv_dtype` and `context` are for a model in this process; {name} is a server."
            )
        return lambda: _remote(name, sampling, seed, model_name)
    if model_name is not None:
        raise ThinkloopError(f"`model_name` is for a server given by URL; {name!r} is not a URL.")
    if name == MINI or Path(name).is_dir():
        return lambda: _engine(name, sampling, seed, local)
    raise ThinkloopError(
        f'There is no model {name!r}: give "{MINI}", an existing checkpoint folder, or the http(s) URL of an '
        "OpenAI-compatible server."
    )


def _engine(name: str, sampling: Sampling | None, seed: int | None, local: Local) -> Model:
    from thinkloop.agent.engine_model import EngineModel  # brings torch: only a run needs it

    return EngineModel.load(
        name, sampling=sampling, seed=seed or 0, device=local.device, kv_dtype=local.kv_dtype, context=local.context,
        grammar=local.grammar, progress=local.progress, announce=local.announce,
    )  # fmt: skip


def _remote(url: str, sampling: Sampling | None, seed: int | None, model_name: str | None) -> Model:
    from thinkloop.agent.remote_model import RemoteModel

    return RemoteModel(url, model_name, sampling=sampling, seed=seed)
