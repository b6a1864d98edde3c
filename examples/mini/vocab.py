"""The mini model's vocabulary: syllables, numbers up to 999 and the words of its worlds, as a `tiktoken.model` file.

It is built, not counted: every name splits at its syllables, whatever stands around it, and every number below 1,000 is one
token. A small model can then copy a name it has never seen token by token, and count by looking up the next number.
"""

from __future__ import annotations

import base64
import json
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import regex
from names import ONSETS, SYLLABLES, VOWELS
from thinkloop.engine.tokenizer import DEFAULT_SPECIALS, PATTERN
from world import RELATIONS

SLOTS = 256
NAME = regex.compile(f"[^\\p{{L}}]?((?:{'|'.join(SYLLABLES)}){{2}})(?:'s)?", regex.IGNORECASE)


def build_ranks(texts: Iterable[str]) -> dict[bytes, int]:
    """Token bytes to ids: bytes, syllables (alone, capital, capital after a space), numbers, then the pieces of `texts`."""
    tokens = {bytes([value]): value for value in range(256)}

    def add(text: str) -> None:
        tokens.setdefault(text.encode(), len(tokens))

    pairs = [onset + vowel for onset in ONSETS for vowel in VOWELS]
    for part in pairs + SYLLABLES:
        add(part)
        add(part.capitalize())
    for part in SYLLABLES:
        add(f" {part.capitalize()}")
    for number in [*range(10, 100), *range(1000)]:
        add(f"{number:03d}" if number > 99 else str(number))
    for number in range(100):
        add(f"{number:03d}")
    add("'s")
    for word in RELATIONS:
        _make_reachable(f" {word}", tokens)
    for piece, count in sorted(_pieces(texts).items(), key=lambda item: (-item[1], item[0])):
        if count >= 3:
            add(piece)
    return tokens


def _pieces(texts: Iterable[str]) -> Counter[str]:
    """Pieces that aren't names or numbers: a whole piece that is a token is found without merges."""
    split = regex.compile(PATTERN, regex.V1)
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(
            piece
            for piece in split.findall(text)
            if not NAME.fullmatch(piece) and not piece.isdigit() and not piece.endswith("'s")
        )
    return counts


def _make_reachable(word: str, tokens: dict[bytes, int]) -> None:
    """Add the merges that lead greedy byte-pair encoding to `word` as one token, also before a suffix such as 's."""
    parts = [word[i : i + 1].encode() for i in range(len(word))]
    while len(parts) > 1:
        ranked = [(tokens[a + b], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in tokens]
        if not ranked:
            tokens[parts[0] + parts[1]] = len(tokens)
            ranked = [(0, 0)]
        at = min(ranked)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


def write_vocabulary(folder: Path, ranks: dict[bytes, int]) -> int:
    """Write `tiktoken.model` and `tokenizer_config.json`; returns the size of the vocabulary, special slots included."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = (f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items())
    (folder / "tiktoken.model").write_text("".join(lines))
    names = {str(len(ranks) + offset): {"content": name} for offset, name in DEFAULT_SPECIALS.items()}
    config = {"added_tokens_decoder": names, "tokenizer_class": "TikTokenTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")
    return len(ranks) + SLOTS
