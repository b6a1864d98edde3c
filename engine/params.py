"""Sampling parameters, shared by every model kind. No torch here: reading them must stay cheap."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from thinkloop.traces.events import Json, ThinkloopError

MAX_SEED = 2**63 - 1


class SamplingError(ThinkloopError):
    """A sampling parameter that is out of its range, or that leaves no token to choose."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the next token is chosen. What is None is left to the model: to a server's or a checkpoint's own default, and
    without one to the neutral value that `ResolvedSampling` gives.

    Filters apply in Hugging Face's order: temperature, top-k, top-p of what is left, min-p of what is left. Raises
    `SamplingError` naming the parameter that is out of range.
    """

    temperature: float | None = None
    """0 is greedy."""
    top_k: int | None = None
    """The most tokens to choose from; 0 is off."""
    top_p: float | None = None
    """The likeliest tokens that together have this probability; 1 is off."""
    min_p: float | None = None
    """Tokens at least this share as likely as the likeliest; 0 is off."""
    presence_penalty: float | None = None
    """Subtracted from the logit of each token that was generated (OpenAI's definition)."""
    frequency_penalty: float | None = None
    """Subtracted from a token's logit as often as it was generated (OpenAI's definition)."""
    repetition_penalty: float | None = None
    """Divides the positive and multiplies the negative logits of tokens in the context, generated or not (CTRL, Keskar
    et al. 2019, section 4.1); 1 is off."""
    logit_bias: Mapping[int, float] | None = None
    """Added to the logits of these token ids, from -100 (all but forbids) to 100 (all but forces)."""
    stop: tuple[str, ...] | None = None
    """Texts that end the answer, themselves left out of it. They need text: a session, which sees token ids only,
    refuses them and takes `stop_ids`."""
    seed: int | None = None
    """With the position in the text it decides every draw."""

    def __post_init__(self) -> None:
        for name, (good, wanted) in _RANGES.items():
            value = getattr(self, name)
            if value is not None and not good(value):
                raise SamplingError(f"`{name}` is {value!r}; it must be {wanted}.")

    def __repr__(self) -> str:
        return f"Sampling({', '.join(f'{name}={value!r}' for name, value in self._set().items())})"

    def over(self, defaults: Sampling) -> Sampling:
        """These parameters, and those of `defaults` where they are None."""
        return Sampling(**(defaults._set() | self._set()))

    def resolved(self) -> ResolvedSampling:
        """These parameters, and the neutral values where they are None."""
        return ResolvedSampling(**self._set())

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises `SamplingError` when `logit_bias` names a token that a model of `vocab_size` tokens doesn't have."""
        if outside := sorted(token for token in self.logit_bias or () if token >= vocab_size):
            raise SamplingError(
                f"`logit_bias` names token {outside[0]}, but the model's tokens are 0 to {vocab_size - 1}."
            )

    def to_json(self) -> Json:
        """The parameters that are set. JSON objects have text keys: the token ids of `logit_bias` become text."""
        data = self._set()
        if self.logit_bias is not None:
            data["logit_bias"] = {str(token): bias for token, bias in self.logit_bias.items()}
        if self.stop is not None:
            data["stop"] = list(self.stop)
        return data

    @classmethod
    def from_json(cls, data: Json) -> Sampling:
        """What `to_json` gave, or a person wrote. Raises `SamplingError` for an unknown parameter too."""
        known = {parameter.name for parameter in fields(cls)}
        if unknown := sorted(data.keys() - known):
            raise SamplingError(f"There is no sampling parameter `{unknown[0]}`; there are {', '.join(sorted(known))}.")
        values = dict(data)
        if isinstance(bias := values.get("logit_bias"), Mapping):
            values["logit_bias"] = {_token_id(token): value for token, value in bias.items()}
        if isinstance(stop := values.get("stop"), list):
            values["stop"] = tuple(stop)
        return cls(**values)

    def _set(self) -> dict[str, Any]:
        values = {parameter.name: getattr(self, parameter.name) for parameter in fields(self)}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedSampling(Sampling):
    """Sampling with every parameter set; the defaults are the neutral values."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    seed: int = 0


def _token_id(text: Any) -> Any:
    return int(text) if isinstance(text, str) and text.isascii() and text.isdigit() else text


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return (_is_int(value) or isinstance(value, float)) and math.isfinite(value)


def _is_bias(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        _is_int(token) and token >= 0 and _is_number(bias) and -100 <= bias <= 100 for token, bias in value.items()
    )


def _is_stop(value: Any) -> bool:
    return isinstance(value, tuple) and all(isinstance(text, str) and text for text in value)


_PENALTY = (lambda v: _is_number(v) and -2 <= v <= 2, "a number from -2 to 2; 0 is off")
_RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    # below 1e-5 the quotients of float32 logits run out of digits, and 0 says it better
    "temperature": (lambda v: _is_number(v) and (v == 0 or 1e-5 <= v <= 1e5), "0 (greedy), or from 0.00001 to 100000"),
    "top_k": (lambda v: _is_int(v) and v >= 0, "a whole number, 0 (off) or more"),
    "top_p": (lambda v: _is_number(v) and 0 < v <= 1, "above 0 and at most 1 (off)"),
    "min_p": (lambda v: _is_number(v) and 0 <= v < 1, "0 (off) or more and below 1"),
    "presence_penalty": _PENALTY,
    "frequency_penalty": _PENALTY,
    "repetition_penalty": (lambda v: _is_number(v) and 0.01 <= v <= 100, "from 0.01 to 100; 1 is off"),
    "logit_bias": (_is_bias, "a mapping from token ids (whole numbers, 0 or more) to numbers from -100 to 100"),
    "stop": (_is_stop, "a tuple of texts, none of them empty"),
    "seed": (lambda v: _is_int(v) and 0 <= v <= MAX_SEED, f"a whole number from 0 to {MAX_SEED}"),
}
"""What is allowed, and how to say it."""
