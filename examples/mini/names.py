"""Made-up names: two syllables a word, every word either for training worlds or for held-out ones, never both."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator

ONSETS = "bdfgklmnprtv"
VOWELS = "aeiou"
CODAS = "nrslk"
SYLLABLES = [onset + vowel + coda for onset in ONSETS for vowel in VOWELS for coda in CODAS]
HELD_OUT_SHARE = 10
"""One word in this many is held out."""


def is_held_out(word: str) -> bool:
    """Whether `word` belongs to held-out worlds, by a hash: the split needs no list and can be checked anywhere."""
    return hashlib.sha256(word.lower().encode()).digest()[0] % HELD_OUT_SHARE == 0


def words(rng: random.Random, *, held_out: bool) -> Iterator[str]:
    """Endless different words of one side of the split, such as `Kantor`."""
    seen: set[str] = set()
    while True:
        word = (rng.choice(SYLLABLES) + rng.choice(SYLLABLES)).capitalize()
        if word not in seen and is_held_out(word) == held_out:
            seen.add(word)
            yield word
