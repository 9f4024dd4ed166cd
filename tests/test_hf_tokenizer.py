"""tokenizer.json: the ids of the `tokenizers` library, and errors for what is not there."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import hf_directory as hf
import numpy as np
import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_tokenizer import byte_level, golden, sentencepiece

from headrace.errors import HeadraceError, ModelFileError
from headrace.loaders.folder import Folder
from headrace.loaders.huggingface.config import Config
from headrace.loaders.huggingface.pretokenizers import NAMES
from headrace.loaders.huggingface.tokenizer import read_tokenizer
from headrace.pretokenizers import PRE_TOKENIZERS
from headrace.tokenizer import Tokenizer

SPACES = "\u2581"
# Letters of the goldens' texts, what pre-tokenizers look at, and what NFC changes.
LETTERS = (
    "abcTheon 's'LL  \n\r\t12345 éÉſ'ſK日本\u2581Ωﬁe\u0301\u1ac0\u0323"
    "\u00a0\u2003😀👨\u200d👩<s></s>"
)


def texts() -> list[str]:
    """Those of the tokenizers' tests, long runs of spaces, and random ones."""
    files = ("tokenizer_smollm2.json", "tokenizer_tok512.json")
    found = [text for name in files for text, *_ in golden(name)["llama_cpp"]]
    found += [row["prompt"] for row in golden("tokenizer_smollm2.json")["prompts"]]
    found += [f"{' ' * n}a{' ' * (40 - n)}b" for n in range(40)]
    rng = random.Random(1)
    found += ["".join(rng.choices(LETTERS, k=rng.randrange(1, 30))) for _ in range(800)]
    return found


def load(folder: Path, config: dict[str, Any] | None = None, rows: int = 0) -> Tokenizer:
    values = read_tokenizer(Folder(folder), Config(config or {}, folder / "config.json"), rows)
    return Tokenizer.from_metadata(values, folder)


def check_equal(folder: Path, root: dict[str, Any]) -> Tokenizer:
    hf.write_json(folder, "tokenizer.json", root)
    library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    ours = load(folder)
    for text in texts():
        assert ours.encode(text) == library.encode(text).ids, repr(text)
        plain = library.encode(text, add_special_tokens=False).ids
        assert ours.encode(text, add_special=False) == plain, repr(text)
    return ours


KEY = "tokenizer.ggml."


@cache
def tok512() -> dict[str, Any]:
    keys = sentencepiece(golden("tokenizer_tok512.json")["pieces"])
    plain = {key: v.tolist() if isinstance(v, np.ndarray) else v for key, v in keys.items()}
    return {**plain, f"{KEY}pre": "default", f"{KEY}unknown_token_id": 0, f"{KEY}bos_token_id": 1}


def bytes_bpe(pre: str) -> dict[str, Any]:
    special = ("<s>", "</s>", "<|im_end|>")
    rules = (
        "t h", "h e", "th e", "o n", "Ġ T", "ĠT he", "1 2", "Ġ a", "Ã ©", "Ì ģ", "Ġ Ġ", "ĠĠ ĠĠ",
        "' Å", "'Å ¿",
    )  # fmt: skip
    keys = byte_level(*rules, special=special, pre=pre, add_bos_token=False)
    return {**keys, f"{KEY}bos_token_id": len(keys[f"{KEY}tokens"]) - 3}


# --- the same ids ---------------------------------------------------------------------------------


def test_smollm2(smollm2_path: Path, tmp_path: Path) -> None:
    keys = hf.fields(smollm2_path)
    hf.write_tokenizer(tmp_path, keys)
    ours = check_equal(tmp_path, hf.tokenizer_json(keys))
    source = Tokenizer.from_metadata(keys, smollm2_path)
    assert (ours.eos_ids, ours.bos_id, ours.eos_id) == (
        source.eos_ids, source.bos_id, source.eos_id,
    )  # fmt: skip
    assert not ours.add_bos


@pytest.mark.parametrize("style", ["legacy", "first", "always", "never"])
def test_sentencepiece(style: str, tmp_path: Path) -> None:
    ours = check_equal(tmp_path, hf.tokenizer_json(tok512(), style=style))
    assert ours.add_bos and ours.bos_id == 1
    ids = ours.encode("the end", add_special=False)
    assert ours.decode(ids) == "the end"
    assert ours.decode(ours.encode("a<s>b", add_special=False), skip_special=False) == "a<s>b"


def test_gemmas_spaces_and_user_defined_tokens(tmp_path: Path) -> None:
    keys = copy.deepcopy(tok512()) | {f"{KEY}add_space_prefix": False}
    tokens, types = keys[f"{KEY}tokens"], keys[f"{KEY}token_type"]
    for text in ("\n", "\n\n", "\n\n\n", SPACES * 2, SPACES * 3, "<b>"):
        tokens.append(text)
        types.append(4)
        keys[f"{KEY}scores"].append(0.0)
    check_equal(tmp_path, hf.tokenizer_json(keys))


def test_runs_of_spaces_with_one_score(tmp_path: Path) -> None:
    """As Llama 2's: 2, 4, 8 and 16 have scores of their own, the rest the same."""
    keys = copy.deepcopy(tok512())
    for n in (2, 4, 8, 16, *(n for n in range(2, 16) if n not in (2, 4, 8))):
        keys[f"{KEY}tokens"].append(SPACES * n)
        keys[f"{KEY}token_type"].append(1)
        keys[f"{KEY}scores"].append(-n - 0.5 if n in (2, 4, 8, 16) else -1e9)
    check_equal(tmp_path, hf.tokenizer_json(keys))


@pytest.mark.parametrize("pre", ["smollm", "llama-bpe", "qwen2"])
def test_byte_level(pre: str, tmp_path: Path) -> None:
    check_equal(tmp_path, hf.tokenizer_json(bytes_bpe(pre)))


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(), pre=st.sampled_from(["smollm", "llama-bpe", "qwen2"]))
def test_any_text(text: str, pre: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    library, ours = pair(pre, tmp_path_factory.getbasetemp())
    assert ours.encode(text) == library.encode(text).ids


@cache
def pair(pre: str, folder: Path) -> tuple[Any, Tokenizer]:
    (folder / pre).mkdir()
    hf.write_json(folder / pre, "tokenizer.json", hf.tokenizer_json(bytes_bpe(pre)))
    return tokenizers.Tokenizer.from_file(str(folder / pre / "tokenizer.json")), load(folder / pre)


@pytest.mark.parametrize("row", NAMES.items(), ids=lambda row: row[1])
def test_words_are_those_of_the_files_own_expressions(row: Any) -> None:
    (expressions, whole_words), name = row
    assert PRE_TOKENIZERS[name].ignore_merges == whole_words
    steps = [
        tokenizers.pre_tokenizers.Split(tokenizers.Regex(each), "isolated") for each in expressions
    ]
    theirs = tokenizers.pre_tokenizers.Sequence(steps)
    ours = PRE_TOKENIZERS[name].folding() if "(?i:" in expressions[-1] else PRE_TOKENIZERS[name]
    mine = tokenizers.pre_tokenizers.Sequence(ours.steps())
    for text in texts():
        assert [word for word, _ in mine.pre_tokenize_str(text)] == [
            word for word, _ in theirs.pre_tokenize_str(text)
        ], text


# --- special tokens and settings ------------------------------------------------------------------


def test_ends_come_from_all_files(tmp_path: Path) -> None:
    hf.write_json(tmp_path, "tokenizer.json", hf.tokenizer_json(bytes_bpe("llama-bpe")))
    n = len(bytes_bpe("llama-bpe")[f"{KEY}tokens"])
    hf.write_json(tmp_path, "generation_config.json", {"eos_token_id": [n - 2, 10, 1 << 30]})
    hf.write_json(tmp_path, "special_tokens_map.json", {"eos_token": {"content": "</s>"}})
    ours = load(tmp_path, {"eos_token_id": 11})
    assert ours.eos_id == n - 2
    assert ours.eos_ids == {10, 11, n - 2, n - 1}  # <|im_end|> by its text


def test_ordinary_tokens_stay_ordinary(tmp_path: Path) -> None:
    """A GGUF file's "</s>" is taken for a control token; a checkpoint's only if it says so."""
    keys = bytes_bpe("qwen2")
    at = keys[f"{KEY}tokens"].index("</s>")
    keys[f"{KEY}token_type"][at] = 1
    hf.write_json(tmp_path, "tokenizer.json", hf.tokenizer_json(keys))
    assert at not in load(tmp_path).eos_ids
    assert at in Tokenizer.from_metadata(keys, None).eos_ids
    assert at not in load(tmp_path).encode("</s>")


def test_bos_by_the_config_wins(tmp_path: Path) -> None:
    hf.write_json(tmp_path, "tokenizer.json", hf.tokenizer_json(tok512()))
    assert load(tmp_path).encode("a")[0] == 1
    hf.write_json(tmp_path, "tokenizer_config.json", {"add_bos_token": False, "bos_token": "<s>"})
    assert load(tmp_path).encode("a")[0] != 1
    wanted = {"add_eos_token": True, "eos_token": "</s>"}
    hf.write_json(tmp_path, "tokenizer_config.json", wanted)
    assert load(tmp_path).encode("a")[-1] == 2


def test_chat_templates(tmp_path: Path) -> None:
    hf.write_json(tmp_path, "tokenizer.json", hf.tokenizer_json(bytes_bpe("qwen2")))

    def template() -> Any:
        values = read_tokenizer(Folder(tmp_path), Config({}, tmp_path / "config.json"), 0)
        return values.get("tokenizer.chat_template")

    assert template() is None
    named = [{"name": "tool_use", "template": "1"}, {"name": "default", "template": "2"}]
    hf.write_json(tmp_path, "tokenizer_config.json", {"chat_template": named})
    assert template() == "2"
    hf.write_json(tmp_path, "tokenizer_config.json", {"chat_template": "3"})
    assert template() == "3"
    (tmp_path / "chat_template.jinja").write_text("4é", "utf-8")
    assert template() == "4é"
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ModelFileError, match=r"chat_template\.jinja: not UTF-8"):
        template()


def test_tokens_that_strip_spaces_are_warned_of(tmp_path: Path) -> None:
    root = hf.tokenizer_json(bytes_bpe("qwen2"))
    root["added_tokens"][0]["rstrip"] = True
    hf.write_json(tmp_path, "tokenizer.json", root)
    with pytest.warns(RuntimeWarning, match="the added token '<s>' has 'rstrip' set"):
        load(tmp_path)


# --- what is refused ------------------------------------------------------------------------------

Change = Callable[[dict[str, Any]], Any]


def second_cut(root: dict[str, Any]) -> int:
    """Where a rule is that makes the same token as the one before it, late in the list."""
    made = ["".join(rule) for rule in root["model"]["merges"]]
    return max(i for i in range(1, len(made)) if made[i] == made[i - 1])


BPE: list[tuple[Change, str]] = [
    (lambda r: r.pop("model"), "there is no 'model'"),
    (lambda r: r["model"].update(type="Unigram"), "model.type is 'Unigram', which is not"),
    (lambda r: r["model"].update(type="WordPiece"), "model.type is 'WordPiece'"),
    (lambda r: r["model"].update(dropout=0.1), "model.dropout is '0.1'"),
    (lambda r: r["model"].update(end_of_word_suffix="</w>"), "model.end_of_word_suffix"),
    (lambda r: r["model"].update(byte_fallback=True), "model.byte_fallback is true"),
    (lambda r: r["model"]["vocab"].update(a="1"), "an id that is none"),
    (lambda r: r["model"]["vocab"].update(a=1 << 40), "an id that is none"),
    (lambda r: r["model"]["vocab"].update(zz=5), "one id to two tokens"),
    (lambda r: r["model"].update(vocab={}), "model.vocab has 0 tokens"),
    (lambda r: r["model"].pop("merges"), "there is no 'model.merges'"),
    (lambda r: r["model"]["merges"].append(["a"]), "a rule that is not two parts"),
    (lambda r: r["model"]["merges"].append(["a", 1]), "a rule that is not two parts"),
    (lambda r: r["model"]["merges"].append(["a b", "c"]), "a rule that is not two parts"),
    (lambda r: r["model"].update(merges=["a b c"]), "a rule that is not two parts"),
    (lambda r: r["model"].update(merges=["a q", "q zz"]), "is not in tokenizer.ggml.tokens"),
    (lambda r: r["added_tokens"].append({"id": 5, "content": "<x>"}), "the id of another token"),
    (lambda r: r["added_tokens"].append({"id": -5, "content": "<x>"}), "has the id -5"),
    (lambda r: r["added_tokens"].append({"id": 1 << 30, "content": "<x>"}), "has the id 1073"),
    (lambda r: r["added_tokens"].append({"id": 7, "content": "<s>"}), "'<s>' has two ids"),
    (lambda r: r["added_tokens"].append(3), "'added_tokens' has 3"),
    (lambda r: r.update(added_tokens=3), "'added_tokens' is no list"),
    (lambda r: r.update(normalizer={"type": "Lowercase"}), "the normalizer is ['Lowercase']"),
    (lambda r: r.update(normalizer={"type": "Sequence"}), "a sequence without steps"),
    (lambda r: r.update(pre_tokenizer={"type": "Whitespace"}), "the pre-tokenizer is"),
    (lambda r: r["pre_tokenizer"]["pretokenizers"][0].update(pattern={"Regex": "(a+)+b"}),
     "the pre-tokenizer is"),
    (lambda r: r["pre_tokenizer"]["pretokenizers"][0].update(invert=True), "the pre-tokenizer is"),
    (lambda r: r["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True),
     "the pre-tokenizer is"),
    (lambda r: r.update(post_processor={"type": "BertProcessing"}), "is 'BertProcessing'"),
    (lambda r: r.update(post_processor={"type": "TemplateProcessing", "single": [
        {"SpecialToken": {"id": "<y>"}}, {"Sequence": {"id": "A"}}]}), "which is no token"),
    (lambda r: r.update(post_processor={"type": "TemplateProcessing", "single": [
        {"SpecialToken": {"id": "<s>"}}, {"SpecialToken": {}}, {"Sequence": {"id": "A"}}]}),
     "several tokens are put before"),
    (lambda r: r.update(post_processor={"type": "TemplateProcessing", "single": [3]}),
     "no list of"),
    (lambda r: r["model"]["vocab"].update({"\ud800": 400}), "no text|no valid JSON"),
]  # fmt: skip
SPM: list[tuple[Change, str]] = [
    (lambda r: r["model"].update(byte_fallback=False), "model.byte_fallback is false"),
    (lambda r: r["model"]["merges"].pop(second_cut(r)), "rules where SentencePiece's would be"),
    (lambda r: r["model"]["merges"].append(r["model"]["merges"][-1]), "rules where SentencePiece"),
    (lambda r: r["model"]["merges"].insert(0, r["model"]["merges"].pop(second_cut(r))),
     "rules for"),
    (lambda r: r["model"]["merges"].append(["a", "zz"]), "make no token of two"),
    (lambda r: r.update(pre_tokenizer={"type": "Metaspace", "replacement": "_"}, normalizer=None),
     "the pre-tokenizer is"),
]  # fmt: skip


def check_refused(root: dict[str, Any], change: Change, message: str, folder: Path) -> None:
    root = copy.deepcopy(root)
    change(root)
    (folder / "tokenizer.json").write_text(json.dumps(root))
    with pytest.raises(ModelFileError) as caught:
        load(folder)
    assert any(one in str(caught.value) for one in message.split("|"))
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(("change", "message"), BPE)
def test_byte_level_files_that_are_refused(change: Change, message: str, tmp_path: Path) -> None:
    check_refused(hf.tokenizer_json(bytes_bpe("qwen2")), change, message, tmp_path)


@pytest.mark.parametrize(("change", "message"), SPM)
def test_sentencepiece_files_that_are_refused(change: Change, message: str, tmp_path: Path) -> None:
    check_refused(hf.tokenizer_json(tok512()), change, message, tmp_path)


def test_more_tokens_than_rows(tmp_path: Path) -> None:
    hf.write_json(tmp_path, "tokenizer.json", hf.tokenizer_json(bytes_bpe("qwen2")))
    with pytest.raises(ModelFileError, match="the embedding has 100 rows"):
        load(tmp_path, rows=100)
    assert load(tmp_path, rows=1000).n_vocab == 1000


def test_added_tokens_without_a_row_are_left_out(tmp_path: Path) -> None:
    root = hf.tokenizer_json(bytes_bpe("qwen2"))
    rows = len(root["model"]["vocab"])
    root["added_tokens"].append({"id": rows, "content": "<image>", "special": True})
    hf.write_json(tmp_path, "tokenizer.json", root)
    assert load(tmp_path, rows=rows).id_of("<image>") is None
    assert load(tmp_path, rows=rows + 1).id_of("<image>") == rows


@pytest.mark.parametrize(
    ("key", "value"),
    [("space_prefix", "second"), ("normal_form", "NFD"), ("end_token_ids", "x"),
     ("end_token_ids", np.array([1 << 20]))],
)  # fmt: skip
def test_bad_keys_of_our_own(key: str, value: Any) -> None:
    keys = {**tok512(), f"tokenizer.headrace.{key}": value}
    with pytest.raises(HeadraceError, match=f"tokenizer.headrace.{key}"):
        Tokenizer.from_metadata(keys, "x.gguf")


def test_without_a_tokenizer(tmp_path: Path) -> None:
    assert read_tokenizer(Folder(tmp_path), Config({}, tmp_path / "config.json"), 5) == {}
    with pytest.raises(ModelFileError, match="the model has no tokenizer"):
        load(tmp_path)
