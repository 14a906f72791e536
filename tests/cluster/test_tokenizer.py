"""The tokenizer: against tiktoken's own encoder, user text and special tokens, streaming."""

import base64
import json

import pytest
import tiktoken
from hypothesis import given
from hypothesis import strategies as st

from flyray.cluster.config import DEMO_MODEL
from flyray.cluster.tokenizer import KIMI_PATTERN, Detokenizer, Piece, Tokenizer, TokenizerError

TOKENIZER = Tokenizer(DEMO_MODEL)
MARKERS = sorted(TOKENIZER.special)
texts = st.lists(st.one_of(st.text(max_size=12), st.sampled_from([*MARKERS, "你好", "🦙", " the", "\n\n"]))).map(
    "".join
)


@pytest.fixture(scope="module")
def oracle() -> tiktoken.Encoding:
    lines = (DEMO_MODEL / "tiktoken.model").read_bytes().splitlines()
    ranks = {base64.b64decode(line.split()[0]): int(line.split()[1]) for line in lines}
    return tiktoken.Encoding("oracle", pat_str=KIMI_PATTERN, mergeable_ranks=ranks, special_tokens=TOKENIZER.special)


@given(text=texts)
def test_encodes_as_tiktoken_does(oracle, text):
    assert TOKENIZER.encode(text, allow_special=False) == oracle.encode_ordinary(text)
    assert TOKENIZER.encode(text, allow_special=True) == oracle.encode(text, allowed_special="all")


@given(text=texts)
def test_text_comes_back(text):
    assert TOKENIZER.decode(TOKENIZER.encode(text, allow_special=False)) == text


@given(parts=st.lists(texts, min_size=1, max_size=5))
def test_pieces_of_user_text_join_before_encoding(parts):
    pieces = [Piece(part, literal=False) for part in parts]
    assert TOKENIZER.encode_prompt(pieces) == TOKENIZER.encode("".join(parts), allow_special=False)


@given(text=texts)
def test_user_text_never_becomes_a_special_token(text):
    ids = TOKENIZER.encode_prompt([Piece("<|im_user|>", True), Piece(text, False), Piece("<|im_end|>", True)])
    assert ids[0] == TOKENIZER.special["<|im_user|>"]
    assert ids[-1] == TOKENIZER.special["<|im_end|>"]
    assert all(token < TOKENIZER.base_size for token in ids[1:-1])


@given(ids=st.lists(st.integers(0, TOKENIZER.size - 1)))
def test_streaming_gives_the_same_text_and_whole_characters(ids):
    stream = Detokenizer(TOKENIZER)
    pieces = [stream.add(token) for token in ids]
    assert "".join(pieces) + stream.finish() == TOKENIZER.decode(ids)


def test_a_character_waits_for_its_last_byte():
    ids = TOKENIZER.encode("🦙", allow_special=False)
    assert len(ids) > 1
    stream = Detokenizer(TOKENIZER)
    assert [stream.add(token) for token in ids] == [""] * (len(ids) - 1) + ["🦙"]
    assert stream.finish() == ""
    assert stream.add(ids[0]) == ""
    assert stream.finish() == "\ufffd"


def test_hidden_tokens_leave_no_text_and_think_does():
    ids = [TOKENIZER.special[name] for name in ("<|im_end|>", "<think>", "[PAD]", "</think>")]
    assert TOKENIZER.decode(ids) == "<think></think>"


@pytest.mark.parametrize("text", ["x" * 30_000 + " " * 30_000, "ab " * 20_000, "x" * 25_001, "é" * 450_000])
def test_long_texts_come_back(text):
    assert TOKENIZER.decode(TOKENIZER.encode(text, allow_special=False)) == text


def _folder(tmp_path, vocabulary: bytes, config: object):
    (tmp_path / "tiktoken.model").write_bytes(vocabulary)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return tmp_path


GOOD_CONFIG = {"added_tokens_decoder": {"1": {"content": "[EOS]", "special": True}}}


@pytest.mark.parametrize(
    ("vocabulary", "config", "says"),
    [
        (b"YQ== zero", GOOD_CONFIG, r"tiktoken\.model:1: expected 'base64 rank'"),
        (b"YQ== 0\n\nYg== 2", GOOD_CONFIG, r"ranks must be 0\.\.1, each once"),
        (b"YQ== 0", {}, "'added_tokens_decoder' must list"),
        (b"YQ== 0", {"added_tokens_decoder": {"0": {"content": "x"}}}, "must be a number from 1 on"),
        (b"YQ== 0", {"added_tokens_decoder": {"1": {}}}, "'content' must be the token's text"),
        (b"YQ== 0", [], "expected a JSON object"),
    ],
)
def test_bad_files_are_named(tmp_path, vocabulary, config, says):
    with pytest.raises(TokenizerError, match=says):
        Tokenizer(_folder(tmp_path, vocabulary, config))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(TokenizerError, match=r"tiktoken\.model: cannot read"):
        Tokenizer(tmp_path)
