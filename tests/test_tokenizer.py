"""Encoding and decoding, against llama.cpp's results and small vocabularies written out here."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.bpe import ALPHABET, Bpe, merge, pieces_of
from headrace.errors import HeadraceError, ModelFileError, UnsupportedError
from headrace.pretokenizers import PRE_TOKENIZERS, PreTokenizer
from headrace.tokenizer import Tokenizer

DATA = Path(__file__).parent / "data"
KEY = "tokenizer.ggml."


def golden(name: str) -> dict[str, Any]:
    return json.loads((DATA / name).read_text("utf-8"))


def metadata(model: str, tokens: list[str], **values: Any) -> dict[str, Any]:
    return {
        f"{KEY}model": model,
        f"{KEY}tokens": tokens,
        **{KEY + key: value for key, value in values.items()},
    }


def byte_level(*merges: str, special: tuple[str, ...] = (), **values: Any) -> dict[str, Any]:
    """A byte-level vocabulary: 256 bytes, the results of `merges`, control tokens."""
    tokens = [*ALPHABET, *(rule.replace(" ", "") for rule in merges), *special]
    types = [1] * (len(tokens) - len(special)) + [3] * len(special)
    return metadata(
        "gpt2", tokens, **{"merges": list(merges), "token_type": types, "pre": "gpt-2"} | values
    )


def sentencepiece(pieces: list[str], **values: Any) -> dict[str, Any]:
    """<unk>, <s>, </s>, the bytes, then pieces of falling score."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    scores = np.array([0.0] * 259 + [-float(i) for i in range(len(pieces))], np.float32)
    types = np.array([2, 3, 3] + [6] * 256 + [1] * len(pieces), np.int32)
    return metadata("llama", tokens, **{"scores": scores, "token_type": types} | values)


def make(values: dict[str, Any]) -> Tokenizer:
    return Tokenizer.from_metadata(values, "some.gguf")


@pytest.fixture(scope="module")
def smollm2(smollm2_path: Path) -> Tokenizer:
    from headrace.loaders.gguf import read_gguf

    return Tokenizer.from_metadata(read_gguf(smollm2_path).metadata, smollm2_path)


@pytest.fixture(scope="module")
def tok512() -> Tokenizer:
    return make(sentencepiece(golden("tokenizer_tok512.json")["pieces"]))


# --- SmolLM2 and stories260K, as llama.cpp has them ---


def test_smollm2_golden_prompts(smollm2: Tokenizer) -> None:
    for row in golden("tokenizer_smollm2.json")["prompts"]:
        assert smollm2.encode(row["prompt"]) == row["ids"], row["prompt"]
        assert smollm2.decode(row["ids"], skip_special=False) == row["prompt"]
        assert smollm2.decode(row["greedy48"], skip_special=False) == row["greedy_text"]


@pytest.mark.filterwarnings("ignore:the vocabulary has no token for byte")
def test_smollm2_equals_llama_cpp(smollm2: Tokenizer) -> None:
    rows = golden("tokenizer_smollm2.json")
    for text, with_special, without in rows["llama_cpp"]:
        assert smollm2.encode(text) == with_special, text
        assert smollm2.encode(text, add_special=False, parse_special=False) == without, text
    assert sorted(smollm2.eos_ids) == rows["eog"]
    assert (smollm2.n_vocab, smollm2.bos_id, smollm2.eos_id) == (49152, 1, 2)
    assert not smollm2.add_bos


def test_tok512_equals_llama_cpp(tok512: Tokenizer) -> None:
    for text, with_special, without in golden("tokenizer_tok512.json")["llama_cpp"]:
        assert tok512.encode(text) == with_special, text
        assert tok512.encode(text, add_special=False, parse_special=False) == without, text


# --- byte-level BPE ---


def test_merges_follow_rank_then_position() -> None:
    tokenizer = make(byte_level("b c", "a b", "a a", "aa a"))
    ids = tokenizer.encode("abc")
    assert [tokenizer.token_bytes(each) for each in ids] == [b"a", b"bc"]
    pieces = [tokenizer.token_bytes(each) for each in tokenizer.encode("aaaaa")]
    assert pieces == [b"aa", b"aaa"]


def test_first_of_two_equal_merges_counts() -> None:
    values = byte_level("a b", "b c")
    values[f"{KEY}merges"].append("a b")
    pieces = [make(values).token_bytes(each) for each in make(values).encode("abc")]
    assert pieces == [b"ab", b"c"]


def test_ignore_merges_takes_whole_words() -> None:
    tokens = [*ALPHABET, "abc", "<b>"]
    values = metadata("gpt2", tokens, merges=[], pre="llama-bpe", bos_token_id=257)
    assert make(values).encode("abc") == [257, 256]
    values[f"{KEY}pre"] = "qwen2"
    assert len(make(values).encode("abc")) == 3


@given(st.text())
def test_byte_level_round_trip(text: str) -> None:
    tokenizer = make(byte_level("Ġ t", "h e", "Ġt he", "Ã ©", special=("<|x|>",)))
    assert tokenizer.decode(tokenizer.encode(text), skip_special=False) == text


def test_missing_byte_is_left_out_with_a_warning() -> None:
    values = byte_level()
    values[f"{KEY}tokens"] = values[f"{KEY}tokens"][1:]  # without byte 0
    values[f"{KEY}token_type"] = values[f"{KEY}token_type"][1:]
    with pytest.warns(RuntimeWarning, match="byte 0x00"):
        assert make(values).encode("a\0") == [ord("a") - 1]


def words_of(name: str, text: str) -> list[str]:
    from tokenizers.pre_tokenizers import Sequence

    steps = Sequence(PRE_TOKENIZERS[name].steps())
    return [word for word, _ in steps.pre_tokenize_str(text)] if text else []


@given(text=st.text(), name=st.sampled_from(sorted(PRE_TOKENIZERS)))
def test_words_join_to_the_text(name: str, text: str) -> None:
    assert "".join(words_of(name, text)) == text


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("gpt-2", "I'm 123  é\n\n x", ["I", "'m", " 123", " ", " é", "\n\n", " x"]),
        ("smollm", "x 12 é", ["x", " ", "1", "2", " é"]),
        ("llama3", "12345 CAN'T\r\n  x", ["123", "45", " CAN", "'T", "\r\n", " ", " x"]),
        ("qwen2", "12 don't é", ["1", "2", " don", "'t", " é"]),
        ("gpt-4o", "CamelCase ÉTÉ's", ["Camel", "Case", " ÉTÉ's"]),
        ("deepseek-v3", "1234 日本 x", ["123", "4", " ", "日本", " x"]),
        ("default", "a+b 1234", ["a", "+", "b", " ", "123", "4"]),
    ],
)
def test_words(name: str, text: str, words: list[str]) -> None:
    assert words_of(name, text) == words


# --- SentencePiece ---


@given(text=st.text(" \n\r\taZ1.'s,()é", max_size=40), name=st.sampled_from([*PRE_TOKENIZERS]))
def test_words_do_not_reach_across_pieces(text: str, name: str) -> None:
    text = f"One line.\n{text}\n A\n{text}\nEnd\n\n"
    pieces = list(pieces_of(text, 2))
    assert "".join(pieces) == text and len(pieces) > 1
    words = [word for piece in pieces for word in words_of(name, piece)]
    assert words == words_of(name, text)


def quadratic_merge(symbols: list[str], scores: dict[str, float]) -> list[str]:
    """The definition: join the best-scored neighbours, leftmost first, until none is a piece."""
    while True:
        found = [
            (-scores[a + b], index)
            for index, (a, b) in enumerate(pairwise(symbols))
            if a + b in scores
        ]
        if not found:
            return symbols
        _, at = min(found)
        symbols = [*symbols[:at], symbols[at] + symbols[at + 1], *symbols[at + 2 :]]


@given(
    st.lists(st.text("ab▁", min_size=2, max_size=5), max_size=12),
    st.text("ab▁", max_size=30),
    st.lists(st.sampled_from([0.0, 1.0, 2.0]), min_size=12, max_size=12),
)
def test_merge_equals_its_definition(pieces: list[str], text: str, values: list[float]) -> None:
    scores = dict(zip(pieces, values, strict=False))

    def rank(joined: str) -> float | None:
        return -scores[joined] if joined in scores else None

    assert merge(list(text), rank) == quadratic_merge(list(text), scores)


@given(st.text("ab ", max_size=200), st.lists(st.text("ab▁", min_size=2, max_size=4), unique=True))
def test_cutting_at_spaces_changes_nothing(text: str, pieces: list[str]) -> None:
    tokenizer = make(sentencepiece(["▁", "a", "b", *pieces]))
    whole = make(sentencepiece(["▁", "a", "b", *pieces]))
    whole.__dict__["_tokens_span_words"] = True  # do not cut
    assert tokenizer.encode(text) == whole.encode(text)


def test_space_prefix_and_byte_fallback() -> None:
    tokenizer = make(sentencepiece(["▁", "a", "▁a", "b"]))
    assert tokenizer.add_bos
    assert tokenizer.encode("a") == [1, 261]
    assert tokenizer.encode("é", add_special=False) == [259, 3 + 0xC3, 3 + 0xA9]
    assert tokenizer.encode("a<s>a", add_special=False) == [261, 1, 261]
    assert tokenizer.decode([1, 261, 262]) == "ab"
    assert tokenizer.decode([261, 1, 261], skip_special=False) == "a<s>a"
    assert tokenizer.encode("") == [1]
    plain = make(sentencepiece(["▁", "a", "▁a", "b"], add_space_prefix=False))
    assert plain.encode("a", add_special=False) == [260]
    assert plain.decode([261]) == " a"


def test_unknown_character_without_bytes() -> None:
    values = metadata("llama", ["<unk>", "<s>", "</s>", "a"], scores=[0.0] * 4)
    values[f"{KEY}add_space_prefix"] = False
    assert make(values).encode("aé") == [1, 3, 0, 0]
    short = metadata("gemma4", ["a", "<b>"], merges=[], bos_token_id=1)
    with pytest.raises(HeadraceError, match="no token for byte 0xc3"):
        make(short).encode("é")


@given(st.text())
def test_sentencepiece_round_trip(text: str) -> None:
    tokenizer = make(sentencepiece(golden("tokenizer_tok512.json")["pieces"]))
    if "▁" not in text:  # SentencePiece cannot tell it from a space
        ids = tokenizer.encode(text, add_special=False)
        assert tokenizer.decode(ids, skip_special=False) == text


def test_gemma4_newlines_and_spaces() -> None:
    tokens = ["<bos>", "▁", "a", "▁a", "\n", "\n\n", *(f"<0x{byte:02X}>" for byte in range(256))]
    values = metadata("gemma4", tokens, merges=["▁ a"], bos_token_id=0, add_bos_token=False)
    tokenizer = make(values)
    assert tokenizer.encode("a a\n\né") == [0, 2, 3, 5, 6 + 0xC3, 6 + 0xA9]
    assert tokenizer.token_bytes(3) == b" a"


# --- special tokens ---


def test_special_tokens_in_text() -> None:
    values = byte_level(special=("<|im_start|>", "<|im_end|>", "<user>"))
    values[f"{KEY}token_type"][-1] = 4
    tokenizer = make(values)
    start, end, user = 256, 257, 258
    assert tokenizer.encode("<|im_start|>a<user><|im_end|>") == [start, ord("a"), user, end]
    plain = tokenizer.encode("<|im_end|><user>", parse_special=False)
    assert end not in plain and plain[-1] == user  # user-defined tokens are no commands
    assert tokenizer.decode([start, user, end]) == "<user>"
    assert tokenizer.decode([start, user], skip_special=False) == "<|im_start|><user>"
    assert tokenizer.eos_ids == {end}
    assert tokenizer.id_of("<|im_end|>") == end


def test_longest_special_token_first() -> None:
    tokenizer = make(byte_level(special=("<a>", "<a><b>")))
    assert tokenizer.encode("<a><b><a>") == [257, 256]


def test_bos_and_eos_are_added() -> None:
    values = byte_level(special=("<s>", "</s>"), bos_token_id=256, eos_token_id=257)
    assert make(values).encode("a") == [97]
    values |= {f"{KEY}add_bos_token": True, f"{KEY}add_eos_token": True}
    assert make(values).encode("a") == [256, 97, 257]
    assert make(values).encode("a", add_special=False) == [97]


def test_end_tokens_marked_as_text_are_control_tokens() -> None:
    values = byte_level(special=("<|im_end|>", "<|file_sep|>", "<fim_prefix>"))
    values[f"{KEY}token_type"] = [1] * 259
    tokenizer = make(values)
    assert tokenizer.encode("<|im_end|><fim_prefix>") == [256, 258]
    assert tokenizer.decode([256, 257, 258]) == ""
    assert tokenizer.eos_ids == {256, 257}
    assert tokenizer.eot_id == 256


def test_harmony_end_is_not_the_end() -> None:
    tokenizer = make(byte_level(special=("<|end|>", "<|return|>", "<|call|>", "<|channel|>")))
    assert tokenizer.eos_ids == {257, 258}
    assert tokenizer.decode([256, 258, 259]) == "<|end|><|channel|>"


def test_phi3_swallows_space_after_special_tokens() -> None:
    values = sentencepiece(["▁", "a", "▁a", "<|user|>"])
    values[f"{KEY}token_type"][-1] = 3
    assert make(values).encode("<|user|>\n a", add_special=False)[1:] != [261]
    values["general.name"] = "Phi-3 mini"
    assert make(values).encode("<|user|>\n a", add_special=False) == [262, 261]


# --- odd input ---


def test_lone_surrogate_is_refused() -> None:
    with pytest.raises(ValueError, match=r"U\+DCFF\) at character 1"):
        make(byte_level()).encode("a\udcff")


def test_ids_outside_the_vocabulary() -> None:
    tokenizer = make(byte_level())
    for bad in (-1, 256):
        with pytest.raises(ValueError, match="outside the vocabulary"):
            tokenizer.decode([bad])


def test_tokens_that_are_not_utf8_keep_their_bytes() -> None:
    values = byte_level(special=("<\udcff>",))
    tokenizer = make(values)
    assert tokenizer.token_bytes(256) == b"<\xff>"
    assert tokenizer.decode([256], skip_special=False) == "<\ufffd>"


def test_rules_with_tokens_that_are_not_utf8_never_apply() -> None:
    values = byte_level("a b", "\udcff c", "ab c", special=("\udcff",))
    tokenizer = make(values)
    tokens = values[f"{KEY}tokens"]
    assert [tokens[each] for each in tokenizer.encode("abcab")] == ["abc", "ab"]
    assert tokenizer.id_of("\udcffc") == tokens.index("\udcffc")
    assert tokenizer.id_of("\udcfe") is None


def test_a_panic_in_the_library_is_an_ordinary_error() -> None:
    ids = {letter: index for index, letter in enumerate(ALPHABET)}
    bpe = Bpe(ids, [], PreTokenizer((r"(?:a|aa)+b",)), byte_level=True)
    with pytest.raises(HeadraceError, match="retry-limit"):
        bpe.encode("a" * 60, lambda byte: [])
    assert bpe.encode("ab", lambda byte: []) == [ids["a"], ids["b"]]


def test_missing_bytes_stand_between_their_neighbours() -> None:
    values = byte_level("a b", "a c")
    gone = values[f"{KEY}tokens"].index("x")
    del values[f"{KEY}tokens"][gone], values[f"{KEY}token_type"][gone]
    tokenizer = make(values)
    with pytest.warns(RuntimeWarning, match="byte 0x78"):
        ids = tokenizer.encode("axb")
    assert [tokenizer.token_bytes(each) for each in ids] == [b"a", b"b"]
    assert tokenizer.id_of("x") is None


def test_long_word_without_a_break() -> None:
    tokenizer = make(byte_level("a a", "aa aa"))
    assert len(tokenizer.encode("a" * 50_000)) == 12_500


def test_token_outside_the_byte_alphabet_stands_for_itself() -> None:
    values = byte_level()
    values[f"{KEY}tokens"].append("Ġ世")
    values[f"{KEY}token_type"].append(1)
    assert make(values).token_bytes(256) == b" \xe4\xb8\x96"


# --- bad metadata ---


def without(values: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name != KEY + key}


def spoiled(key: str, value: Any) -> dict[str, Any]:
    return byte_level("a b", special=("<s>",)) | {KEY + key: value}


BAD = [
    (without(byte_level(), "model"), "model is missing"),
    (spoiled("model", 3), "model is int"),
    (without(byte_level(), "tokens"), "tokens is missing"),
    (without(byte_level(), "merges"), "merges is missing"),
    (without(sentencepiece(["a"]), "scores"), "scores is missing"),
    (spoiled("tokens", "abc"), "tokens is str"),
    (spoiled("tokens", []), "tokens is empty"),
    (spoiled("tokens", ["a", 1]), "tokens holds items"),
    (spoiled("tokens", ["a", "b", "a"]), r"tokens \[0\] = 'a' is there twice"),
    (spoiled("merges", ["a b", "a zz"]), r"merges \[1\] = 'a zz': 'zz' is not in"),
    (spoiled("merges", ["a c"]), r"merges \[0\] = 'a c': 'ac' is not in"),
    (spoiled("merges", ["xyz"]), r"merges \[0\] = 'xyz' is not two parts"),
    (spoiled("merges", ["a b", ""]), r"merges \[1\] = '' is not two parts"),
    (spoiled("merges", ["ab "]), r"merges \[0\] = 'ab ' is not two parts"),
    (spoiled("merges", [" a"]), r"merges \[0\] = ' a' is not two parts"),
    (spoiled("merges", ["a b c"]), r"merges \[0\] = 'a b c': 'b c' is not in"),
    (spoiled("merges", ["a \udcff"]), r"merges \[0\] = .* is not in"),
    (spoiled("merges", [1]), "merges holds items"),
    (spoiled("token_type", [1]), "token_type has 1 entries for 258 tokens"),
    (spoiled("token_type", ["x"] * 258), "token_type is"),
    (spoiled("token_type", [6] * 258), "is not a byte <0xNN>"),
    (spoiled("bos_token_id", 258), "bos_token_id is 258, outside the vocabulary"),
    (spoiled("eos_token_id", -1), "eos_token_id is -1, outside"),
    (spoiled("eos_token_id", True), "eos_token_id is True, expected a token id"),
    (spoiled("add_bos_token", 1), "add_bos_token is 1, expected true or false"),
    (spoiled("add_bos_token", True), "bos_token_id is missing"),
    (spoiled("add_eos_token", True), "eos_token_id is missing"),
    (sentencepiece(["a"], scores=np.zeros(3)), "scores has 3 entries for 260 tokens"),
    (sentencepiece(["a"], scores=np.full(260, np.nan)), r"scores \[0\] is not a number"),
    (sentencepiece(["a"], scores=[[0.0], [1.0, 2.0]]), "scores is not an array of numbers"),
]


@pytest.mark.parametrize(("values", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_metadata_names_the_key(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelFileError, match=message) as caught:
        make(values)
    assert "some.gguf: tokenizer.ggml." in str(caught.value)


@pytest.mark.parametrize(("key", "value"), [("pre", "no-such"), ("model", "bert")])
def test_unknown_kinds_are_unsupported(key: str, value: str) -> None:
    with pytest.raises(UnsupportedError, match=re.escape(repr(value))):
        make(spoiled(key, value))


def test_missing_pre_tokenizer_is_said_aloud() -> None:
    with pytest.warns(RuntimeWarning, match=r"tokenizer\.ggml\.pre is missing"):
        make(without(byte_level(), "pre"))


def test_empty_tokens_get_names() -> None:
    values = byte_level()
    values[f"{KEY}tokens"] += ["", ""]
    values[f"{KEY}token_type"] += [1, 1]
    assert make(values).n_vocab == 258
