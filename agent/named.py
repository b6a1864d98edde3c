"""A model from its name: the mini model, a checkpoint folder, or the URL of a server."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from thinkloop.agent.model import Model
from thinkloop.engine.params import Sampling
from thinkloop.traces.events import ThinkloopError

MINI = "mini"


def is_url(name: str) -> bool:
    """Whether a model's name is a server's address."""
    return name.startswith(("http://", "https://"))


def open_model(name: str, *, sampling: Sampling | None, seed: int, model_name: str | None) -> Callable[[], Model]:
    """What opens the model called `name`; calling it may take seconds. Raises `ThinkloopError` when there is none."""
    if is_url(name):
        if not model_name:
            raise ThinkloopError(f"Which model of {name}? A server needs its name: `model_name=` (--model-name NAME).")
        return lambda: _remote(name, sampling, seed, model_name)
    if model_name is not None:
        raise ThinkloopError(f"`model_name` is for a server given by URL; {name!r} is not a URL.")
    if name == MINI or Path(name).is_dir():
        return lambda: _engine(name, sampling, seed)
    raise ThinkloopError(
        f'There is no model {name!r}: give "{MINI}", an existing checkpoint folder, or the http(s) URL of an '
        "OpenAI-compatible server."
    )


def _engine(name: str, sampling: Sampling | None, seed: int) -> Model:
    from thinkloop.agent.engine_model import EngineModel  # brings torch: only a run needs it

    return EngineModel.load(name, sampling=sampling, seed=seed)


def _remote(url: str, sampling: Sampling | None, seed: int, model_name: str | None) -> Model:
    from thinkloop.agent.remote_model import RemoteModel

    return RemoteModel(url, model_name, sampling=sampling, seed=seed)
