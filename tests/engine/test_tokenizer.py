"""Promises of the tokenizer: content is only content, bytes survive, names are found, damage is named."""

import base64
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from thinkloop.engine.tokenizer import DEFAULT_SPECIALS, MAX_RUN, StreamDecoder, Tokenizer, TokenizerError, _parts
from vocabulary import MERGES, small_tokenizer, write_vocabulary

N = 256 + len(MERGES)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return small_tokenizer(tmp_path_factory.mktemp("vocabulary"))


def test_ids_follow_the_ranks_and_merges(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("the") == [257]
    assert tokenizer.encode("hi the") == [261, 258]


@given(text=st.text())
def test_content_survives_and_never_becomes_a_special_token(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text + "<|im_end|>" + text)
    assert all(token_id < N for token_id in ids)
    assert tokenizer.decode(ids) == text + "<|im_end|>" + text


def test_every_special_name_in_content_stays_bytes(tokenizer: Tokenizer) -> None:
    for name in tokenizer.specials:
        assert max(tokenizer.encode(name)) < N
        assert tokenizer.decode(tokenizer.encode(name)) == name


def test_trusted_text_gets_special_tokens(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode_with_specials("hi<|im_end|>") == [261, N + 2]


def test_specials_stand_at_k2s_offsets_and_the_rest_is_reserved(tokenizer: Tokenizer) -> None:
    assert {offset: tokenizer.special_name(N + offset) for offset in DEFAULT_SPECIALS} == dict(DEFAULT_SPECIALS)
    assert tokenizer.special_name(N + 5) == f"<|reserved_token_{N + 5}|>"
    assert tokenizer.n_vocab == N + 256
    assert (tokenizer.think_start, tokenizer.think_end) == (N + 22, N + 23)


def test_k2s_own_layout_is_used_without_a_tokenizer_config(tmp_path: Path) -> None:
    named = write_vocabulary(tmp_path)
    with_names = Tokenizer.load(named)
    (named / "tokenizer_config.json").unlink()
    assert Tokenizer.load(named).specials == with_names.specials
    assert Tokenizer.load(named).hash == with_names.hash


def test_a_vocabulary_without_think_tokens_says_so(tmp_path: Path) -> None:
    tokenizer = small_tokenizer(tmp_path, think=False)
    assert tokenizer.think_start is None
    assert tokenizer.think_end is None


def test_the_config_bounds_the_number_of_slots(tmp_path: Path) -> None:
    write_vocabulary(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": N + 32}))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.n_vocab == N + 32
    assert "[PAD]" not in tokenizer.specials


def test_the_hash_tells_vocabularies_apart(tmp_path: Path, tokenizer: Tokenizer) -> None:
    assert small_tokenizer(tmp_path, think=False).hash != tokenizer.hash


def test_an_unknown_special_token_is_an_error_with_advice(tokenizer: Tokenizer) -> None:
    with pytest.raises(TokenizerError, match=r"'<\|nope\|>'.*added_tokens_decoder"):
        tokenizer.special("<|nope|>")


@pytest.mark.parametrize("token_id", [-1, N + 256, 10**9])
def test_an_id_out_of_range_is_an_error(tokenizer: Tokenizer, token_id: int) -> None:
    with pytest.raises(TokenizerError, match=str(token_id)):
        tokenizer.decode([token_id])


@given(text=st.text())
def test_streaming_gives_whole_characters_only(tokenizer: Tokenizer, text: str) -> None:
    decoder = StreamDecoder(tokenizer)
    pieces = [decoder.feed(byte) for byte in text.encode()]  # ids 0..255 are the single bytes
    assert "".join(pieces) == text
    assert decoder.finish() == ""


def test_a_character_that_never_ends_becomes_a_replacement(tokenizer: Tokenizer) -> None:
    decoder = StreamDecoder(tokenizer)
    assert decoder.feed("上".encode()[0]) == ""
    assert decoder.finish() == "�"
    assert decoder.feed(ord("a")) == "a"


@pytest.mark.parametrize(
    "text", ["", "a" * (2 * MAX_RUN + 1), " " * (MAX_RUN + 1) + "x", "ab " * 200_000, "上" * 60_000]
)
def test_long_text_is_cut_into_bounded_runs_and_survives(tokenizer: Tokenizer, text: str) -> None:
    parts = list(_parts(text))
    assert "".join(parts) == text
    assert all(len(run) <= MAX_RUN for part in parts for run in (*part.split(), part if part.isspace() else ""))
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_half_a_surrogate_pair_is_encoded_as_a_replacement(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a�b"


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"tiktoken\.model"):
        Tokenizer.load(tmp_path)


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    write_vocabulary(tmp_path)
    with (tmp_path / "tiktoken.model").open("a") as file:
        file.write("!! x\n")
    with pytest.raises(TokenizerError, match=f"line {N + 1}"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("lines", "complaint"),
    [
        ([f"{base64.b64encode(bytes([b])).decode()} {b}" for b in range(255)], "lacks 1 single bytes"),
        ([f"{base64.b64encode(bytes([b])).decode()} {b * 2}" for b in range(256)], "not 0..255"),
    ],
)
def test_an_incomplete_vocabulary_is_refused(tmp_path: Path, lines: list[str], complaint: str) -> None:
    (tmp_path / "tiktoken.model").write_text("\n".join(lines))
    with pytest.raises(TokenizerError, match=complaint):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("file", "content", "complaint"),
    [
        ("config.json", {"vocab_size": 100}, "vocab_size 100"),
        ("config.json", [], "expected a JSON object"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"5": {"content": "<x>"}}}, "has id 5"),
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": {str(N): {"content": "a"}, str(N + 1): {"content": "a"}}},
            "share",
        ),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": 1}}, "must map ids"),
    ],
)
def test_files_that_do_not_belong_together_are_refused(
    tmp_path: Path, file: str, content: object, complaint: str
) -> None:
    write_vocabulary(tmp_path)
    (tmp_path / file).write_text(json.dumps(content))
    with pytest.raises(TokenizerError, match=complaint):
        Tokenizer.load(tmp_path)
