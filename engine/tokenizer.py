"""Text to token ids and back, for checkpoints that ship a `tiktoken.model` (the Kimi-K2 family).

Ids 0..N-1 are byte-level BPE ranks, ids from N on are special tokens. Content is encoded with specials disallowed: the
text of a special token inside a page or a message stays ordinary bytes and never becomes a control token.
"""

from __future__ import annotations

import base64
import binascii
import codecs
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import tiktoken
from thinkloop.traces.events import Json, ThinkloopError

PATTERN = "|".join(
    (
        r"[\p{Han}]+",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*"
        r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+"
        r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
"""K2's split of text into pieces before merging, in tiktoken's regex syntax (`&&` intersects classes)."""

DEFAULT_SPECIALS: Mapping[int, str] = {
    0: "[BOS]",
    1: "[EOS]",
    2: "<|im_end|>",
    3: "<|im_user|>",
    4: "<|im_assistant|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    9: "[EOT]",
    10: "<|im_system|>",
    11: "<|tool_calls_section_begin|>",
    12: "<|tool_calls_section_end|>",
    13: "<|tool_call_begin|>",
    14: "<|tool_call_argument_begin|>",
    15: "<|tool_call_end|>",
    17: "<|im_middle|>",
    18: "<|media_begin|>",
    19: "<|media_content|>",
    20: "<|media_end|>",
    21: "<|media_pad|>",
    22: "<think>",
    23: "</think>",
    254: "[UNK]",
    255: "[PAD]",
}
"""K2's special tokens by offset from N, used when a folder has no `tokenizer_config.json` (K2: N = 163,584)."""

SLOTS = 256
MAX_CHUNK = 400_000
MAX_RUN = 25_000
"""Characters encoded at once, and the longest run of (non-)whitespace: K2's own limits, to bound the regex."""


class TokenizerError(ThinkloopError):
    """A tokenizer file is missing or wrong, or a token is asked for that the vocabulary doesn't have."""


class Tokenizer:
    """A byte-level BPE vocabulary with named special tokens. Immutable; safe to share between threads."""

    def __init__(self, ranks: Mapping[bytes, int], specials: Mapping[str, int]) -> None:
        """`ranks` maps token bytes to ids 0..N-1, all single bytes among them; `specials` names to ids from N on.

        Raises `TokenizerError` when that doesn't hold.
        """
        _check_ranks(ranks)
        _check_specials(specials, len(ranks))
        self._encoding = tiktoken.Encoding(
            "thinkloop", pat_str=PATTERN, mergeable_ranks=dict(ranks), special_tokens=dict(specials)
        )
        self._names = {token_id: name for name, token_id in specials.items()}
        self.specials: Mapping[str, int] = dict(specials)
        self.n_ranks = len(ranks)
        self.n_vocab = 1 + max(specials.values(), default=len(ranks) - 1)
        self.think_start = specials.get("<think>")
        self.think_end = specials.get("</think>")
        self.hash = _hash(ranks, specials)

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """The tokenizer of a checkpoint folder: `tiktoken.model`, names of special tokens from `tokenizer_config.json`
        (K2's own layout when that file is absent), their number from `vocab_size` in `config.json` (256 when absent).

        Raises `TokenizerError` naming the file that is missing or malformed.
        """
        folder = Path(folder)
        ranks = _read_ranks(folder / "tiktoken.model")
        config = _read_json(folder / "config.json")
        vocab_size = (config or {}).get("vocab_size") or len(ranks) + SLOTS
        if vocab_size < len(ranks):
            raise TokenizerError(
                f"{folder}: config.json gives vocab_size {vocab_size}, but tiktoken.model has {len(ranks)} tokens; "
                "the two files are not from the same checkpoint"
            )
        return cls(ranks, _special_names(folder / "tokenizer_config.json", len(ranks), vocab_size))

    def encode(self, text: str) -> list[int]:
        """Ids of content. Special tokens are disallowed: their text is encoded as ordinary bytes."""
        return [token_id for part in _parts(text) for token_id in self._encoding.encode_ordinary(part)]

    def encode_with_specials(self, text: str) -> list[int]:
        """Ids of trusted text in which the names of special tokens become those tokens. Never use it on content."""
        return [token_id for part in _parts(text) for token_id in self._encoding.encode(part, allowed_special="all")]

    def special(self, name: str) -> int:
        """The id of a special token. Raises `TokenizerError` when the vocabulary has no token of that name."""
        try:
            return self.specials[name]
        except KeyError:
            raise TokenizerError(
                f"the vocabulary has no special token {name!r}; name it in added_tokens_decoder of the checkpoint's "
                "tokenizer_config.json, or use a checkpoint of the Kimi-K2 family"
            ) from None

    def special_name(self, token_id: int) -> str | None:
        """The name of a special token, None for an ordinary one."""
        return self._names.get(token_id)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes that ids stand for; a special token gives its name. Raises `TokenizerError` for unknown ids."""
        return b"".join(map(self.token_bytes, ids))

    def decode(self, ids: Iterable[int]) -> str:
        """The text that ids stand for, with U+FFFD for bytes that are not UTF-8."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token. Raises `TokenizerError` for an id that the vocabulary doesn't have."""
        if 0 <= token_id < self.n_ranks:
            return self._encoding.decode_single_token_bytes(token_id)
        name = self._names.get(token_id)
        if name is None:
            raise TokenizerError(f"token id {token_id} is not in the vocabulary (ids 0 to {self.n_vocab - 1})")
        return name.encode()


class StreamDecoder:
    """Decodes one token at a time, holding back bytes of a character that isn't whole yet."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token_id: int) -> str:
        """The text that this token completes (empty while a character is incomplete)."""
        return self._utf8.decode(self._tokenizer.token_bytes(token_id))

    def finish(self) -> str:
        """What was held back, as U+FFFD when it never became a character. The decoder starts afresh."""
        return self._utf8.decode(b"", final=True)


def _parts(text: str) -> Iterator[str]:
    """The text in pieces that are encoded apart: at most `MAX_CHUNK` characters, no run longer than `MAX_RUN`."""
    for start in range(0, len(text), MAX_CHUNK):
        yield from _split_runs(text[start : start + MAX_CHUNK])


def _split_runs(chunk: str) -> Iterator[str]:
    if len(chunk) <= MAX_RUN:
        yield chunk
        return
    cuts = [cut for run in re.finditer(r"\s+|\S+", chunk) for cut in range(run.start() + MAX_RUN, run.end(), MAX_RUN)]
    for start, end in zip([0, *cuts], [*cuts, len(chunk)], strict=True):
        yield chunk[start:end]


def _read_ranks(path: Path) -> dict[bytes, int]:
    """Lines of `base64(token bytes) rank`."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise TokenizerError(
            f"cannot read {path} ({error.strerror}); thinkloop needs the checkpoint's tiktoken.model"
        ) from error
    return dict(_read_rank(path, number, line) for number, line in enumerate(lines, 1) if line.strip())


def _read_rank(path: Path, number: int, line: bytes) -> tuple[bytes, int]:
    try:
        token, rank = line.split()
        return base64.b64decode(token, validate=True), int(rank)
    except (ValueError, binascii.Error) as error:
        raise TokenizerError(
            f"{path}, line {number}: expected `base64 rank`, found {line[:40]!r}; download the file again"
        ) from error


def _read_json(path: Path) -> Json | None:
    """The object in a JSON file, None when there is no such file."""
    if not path.exists():
        return None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise TokenizerError(f"{path} is not readable JSON ({error}); download the file again") from error
    if not isinstance(data, dict):
        raise TokenizerError(f"{path} holds {type(data).__name__}, expected a JSON object; download the file again")
    return data


def _special_names(path: Path, n_ranks: int, vocab_size: int) -> dict[str, int]:
    """Name to id for every slot from `n_ranks` up to `vocab_size`; slots nobody named get K2's placeholder."""
    named = _named_specials(path, n_ranks)
    if named is None:
        named = {n_ranks + offset: name for offset, name in DEFAULT_SPECIALS.items() if n_ranks + offset < vocab_size}
    for token_id, name in named.items():
        if not n_ranks <= token_id < vocab_size:
            raise TokenizerError(
                f"{path}: special token {name!r} has id {token_id}, outside {n_ranks}..{vocab_size - 1} "
                "(tokens in tiktoken.model .. vocab_size in config.json); the files don't belong together"
            )
    if len(set(named.values())) < len(named):
        raise TokenizerError(f"{path}: two ids in added_tokens_decoder share a name; each special token needs its own")
    return {named.get(i, f"<|reserved_token_{i}|>"): i for i in range(n_ranks, vocab_size)}


def _named_specials(path: Path, n_ranks: int) -> dict[int, str] | None:
    config = _read_json(path)
    if config is None or "added_tokens_decoder" not in config:
        return None
    try:
        return {int(key): str(entry["content"]) for key, entry in config["added_tokens_decoder"].items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise TokenizerError(
            f'{path}: added_tokens_decoder must map ids to {{"content": name}}, as Hugging Face writes it'
        ) from error


def _check_ranks(ranks: Mapping[bytes, int]) -> None:
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise TokenizerError(
            f"the vocabulary lacks {len(missing)} single bytes (first: {missing[0]}); it can't encode all text"
        )
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise TokenizerError(
            f"the {len(ranks)} ranks of the vocabulary are not 0..{len(ranks) - 1}; tiktoken.model is damaged"
        )


def _check_specials(specials: Mapping[str, int], n_ranks: int) -> None:
    ids = sorted(specials.values())
    if ids != list(range(n_ranks, n_ranks + len(ids))):
        raise TokenizerError(f"special tokens must have the ids from {n_ranks} on without gaps, each once")


def _hash(ranks: Mapping[bytes, int], specials: Mapping[str, int]) -> str:
    digest = hashlib.sha256(PATTERN.encode())
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        digest.update(b"%d:%d:%s" % (rank, len(token), token))
    digest.update(json.dumps(sorted(specials.items())).encode())
    return digest.hexdigest()
