"""Text to ids and back; streams never show half a character and miss nothing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from model_factory import write_byte_tokenizer

from hotset.runtime.model.config import ModelConfig
from hotset.runtime.model.errors import CorruptCheckpoint, ModelNotFound
from hotset.runtime.model.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def byte_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Every byte is a token: each character beyond ASCII is split over several."""
    folder = tmp_path_factory.mktemp("tokenizer")
    write_byte_tokenizer(folder)
    return Tokenizer(folder, eos_token_ids=(0,))


def token_of(tokenizer: Tokenizer, byte: int) -> int:
    """The token of one byte, by way of a character whose UTF-8 form holds it."""
    from tokenizers.pre_tokenizers import ByteLevel

    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [value for value in range(256) if value not in printable]
    character = chr(byte) if byte in printable else chr(256 + others.index(byte))
    return 1 + sorted(ByteLevel.alphabet()).index(character)


def test_encoding_gives_int32_ids_and_decoding_the_text(byte_tokenizer: Tokenizer) -> None:
    ids = byte_tokenizer.encode("naïve 🦔")
    assert ids.dtype == np.int32
    assert len(ids) == len("naïve 🦔".encode())
    assert byte_tokenizer.decode(ids) == "naïve 🦔"


def test_special_tokens_have_no_text(byte_tokenizer: Tokenizer) -> None:
    assert byte_tokenizer.decode([0, *byte_tokenizer.encode("a"), 0]) == "a"
    assert byte_tokenizer.encode("<|endoftext|>").tolist() == [0]
    assert byte_tokenizer.eos_token_ids == {0}


def test_a_character_comes_with_its_last_byte(byte_tokenizer: Tokenizer) -> None:
    stream = byte_tokenizer.stream()
    pieces = [stream.push(int(token)) for token in byte_tokenizer.encode("a🦔é!")]
    assert pieces == ["a", "", "", "", "🦔", "", "é", "!"]
    assert stream.finish() == ""


def test_the_end_shows_an_incomplete_character_as_such(byte_tokenizer: Tokenizer) -> None:
    stream = byte_tokenizer.stream()
    pieces = [stream.push(int(token)) for token in byte_tokenizer.encode("ab🦔")[:-1]]
    assert pieces == ["a", "b", "", "", ""]
    assert stream.finish() == "\ufffd"
    assert stream.finish() == ""


def test_bytes_that_never_become_text_do_not_hold_back_what_follows(byte_tokenizer: Tokenizer) -> None:
    invalid = token_of(byte_tokenizer, 0xFF)
    stream = byte_tokenizer.stream()
    pieces = [stream.push(invalid) for _ in range(40)]
    assert "".join(pieces) == "\ufffd" * 39
    assert stream.push(int(byte_tokenizer.encode("x")[0])) == "\ufffdx"


@given(st.text(max_size=60).filter(lambda text: "<|endoftext|>" not in text))  # that is a token, which has no text
def test_pieces_joined_are_the_text(byte_tokenizer: Tokenizer, text: str) -> None:
    stream = byte_tokenizer.stream()
    pieces = [stream.push(int(token)) for token in byte_tokenizer.encode(text)]
    assert "".join(pieces) + stream.finish() == text
    assert not any("\ufffd" in piece for piece in pieces if "\ufffd" not in text)


@given(st.lists(st.integers(0, 256), max_size=60))
def test_pieces_joined_are_the_decoded_tokens(byte_tokenizer: Tokenizer, ids: list[int]) -> None:
    stream = byte_tokenizer.stream()
    pieces = [stream.push(token) for token in ids]
    assert "".join(pieces) + stream.finish() == byte_tokenizer.decode(ids)


def test_the_shipped_tokenizer_streams_source_code(trained_folder: Path) -> None:
    tokenizer = Tokenizer(trained_folder, ModelConfig.load(trained_folder).eos_token_ids)
    text = Path(__file__).with_name("test_config.py").read_text(encoding="utf-8") + "# 🦔 naïve\n"
    stream = tokenizer.stream()
    pieces = [stream.push(int(token)) for token in tokenizer.encode(text)]
    assert "".join(pieces) + stream.finish() == text


def test_no_tokenizer_and_a_broken_one(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"tokenizer\.json"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CorruptCheckpoint, match="tokenizer"):
        Tokenizer(tmp_path)


def test_a_token_before_each_text_where_only_tokenizer_config_says_so(tmp_path: Path) -> None:
    write_byte_tokenizer(tmp_path)
    plain = Tokenizer(tmp_path).encode("ab").tolist()
    for token in ("<|endoftext|>", {"content": "<|endoftext|>", "lstrip": False}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": True, "bos_token": token}))
        tokenizer = Tokenizer(tmp_path)
        assert tokenizer.encode("ab").tolist() == [0, *plain]
        assert tokenizer.encode("<|endoftext|>ab").tolist() == [0, *plain], "it is there already"
        assert tokenizer.encode("ab", add_special_tokens=False).tolist() == plain
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": False, "bos_token": "<|endoftext|>"}))
    assert Tokenizer(tmp_path).encode("ab").tolist() == plain
