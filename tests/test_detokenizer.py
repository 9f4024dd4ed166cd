"""Text that appears token by token is the text that decoding at once gives."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_tokenizer import byte_level, make, sentencepiece

from headrace.bpe import ALPHABET
from headrace.detokenizer import Detokenizer
from headrace.tokenizer import Tokenizer

BYTES = make(byte_level("Ã ©", "Ġ a", special=("<|x|>", "<|im_end|>")))
SPACED = make(sentencepiece(["▁", "a", "▁a", "é", "▁▁"]))


def byte_id(byte: int) -> int:
    found = BYTES.id_of(ALPHABET[byte])
    assert found is not None
    return found


@pytest.mark.parametrize("tokenizer", [BYTES, SPACED], ids=["bpe", "spm"])
@given(data=st.data(), skip=st.booleans())
def test_pieces_join_to_the_decoded_text(tokenizer: Tokenizer, data: st.DataObject, skip: bool):
    ids = data.draw(st.lists(st.integers(0, tokenizer.n_vocab - 1)))
    stream = Detokenizer(tokenizer, skip_special=skip)
    pieces = [stream.push(each) for each in ids]
    text = "".join(pieces) + stream.finish()
    assert text == tokenizer.decode(ids, skip_special=skip)


@given(st.text())
def test_no_half_characters(text: str) -> None:
    stream = Detokenizer(BYTES)
    pieces = [stream.push(byte_id(byte)) for byte in text.encode()]
    assert "".join(pieces) == text
    assert all(len(piece) <= 1 for piece in pieces)
    assert stream.finish() == ""


def test_invalid_bytes_are_replaced_once_certain() -> None:
    stream = Detokenizer(BYTES)
    assert stream.push(byte_id(0xE4)) == ""  # may become a character yet
    assert stream.push(byte_id(0xBD)) == ""
    assert stream.push(byte_id(ord("x"))) == "\ufffdx"
    assert stream.push(byte_id(0xFF)) == "\ufffd"  # never can
    assert stream.push(byte_id(0xF0)) == ""
    assert stream.finish() == "\ufffd"
    assert stream.finish() == ""


def test_leading_space_depends_on_what_came_before() -> None:
    a, spaced_a = 260, 261
    assert Detokenizer(SPACED).push(spaced_a) == "a"
    assert Detokenizer(SPACED, after=1).push(spaced_a) == "a"  # after <s>
    assert Detokenizer(SPACED, after=a).push(spaced_a) == " a"
    stream = Detokenizer(SPACED)
    assert [stream.push(each) for each in (1, spaced_a, spaced_a)] == ["", "a", " a"]


def test_control_tokens_show_on_request() -> None:
    end = BYTES.id_of("<|im_end|>")
    assert end is not None
    assert Detokenizer(BYTES).push(end) == ""
    assert Detokenizer(BYTES, skip_special=False).push(end) == "<|im_end|>"
