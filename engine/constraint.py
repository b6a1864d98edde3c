"""What may come next in a turn: the contract between the grammar and the decoder. No torch here, only its name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class Constraint(Protocol):
    """Followed by one generation on the engine's thread. It moves forward by accepted tokens only, one at a time and in
    order, so that speculation never needs to take anything back: a draft that was refused was never accepted."""

    def mask(self) -> Tensor | None:
        """Tokens that may come next, bool `[V]` on the CPU; None where every token may. The tensor may be one that is
        used again: read it before the next call, and don't write to it."""
        ...

    def accept(self, token: int) -> None:
        """The token that came next, sampled or forced: called once for each, in order."""
        ...

    def forced(self) -> list[int]:
        """Tokens that are certain to come next as text, in their likeliest spelling; [] when nothing is. Good as a draft:
        the model may spell the same text with other tokens."""
        ...
