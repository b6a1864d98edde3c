"""Small vocabularies for tests: 256 bytes, some merges, K2's special tokens behind them."""

import base64
import json
from pathlib import Path

from thinkloop.engine.tokenizer import DEFAULT_SPECIALS, Tokenizer

MERGES = (
    b"th",
    b"the",
    b" the",
    b"in",
    b"thin",
    b"hi",
    b"func",
    b"functions",
    b'{"',
    b'":',
    b"se",
    b"ar",
    b"<|",
    b"|>",
)


def write_vocabulary(folder: Path, *, think: bool = True) -> Path:
    """A folder with `tiktoken.model` and `tokenizer_config.json`, with or without think tokens."""
    tokens = [bytes([byte]) for byte in range(256)] + list(MERGES)
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens)]
    (folder / "tiktoken.model").write_text("".join(lines))
    names = {len(tokens) + k: name for k, name in DEFAULT_SPECIALS.items() if think or "think" not in name}
    added = {"added_tokens_decoder": {str(i): {"content": name} for i, name in names.items()}}
    (folder / "tokenizer_config.json").write_text(json.dumps(added))
    return folder


def small_tokenizer(folder: Path, *, think: bool = True) -> Tokenizer:
    return Tokenizer.load(write_vocabulary(folder, think=think))
