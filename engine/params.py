"""Sampling parameters, shared by every model kind. No torch here: reading them must stay cheap."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the next token is chosen. `temperature` 0 is greedy; `top_k` 0, `top_p` 1 and `min_p` 0 switch those filters off.

    Penalties follow the OpenAI definitions (presence, frequency, subtracted from logits by generated-token counts) and
    CTRL's repetition penalty (divides positive, multiplies negative logits of seen tokens; 1 is off).
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
