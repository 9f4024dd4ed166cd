"""The tokenizer's metadata (`tokenizer.ggml.*`), checked and gathered into one value."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from headrace.bpe import Bpe
from headrace.errors import ModelFileError, UnsupportedError
from headrace.pretokenizers import PRE_TOKENIZERS

PREFIX = "tokenizer.ggml."
OWN_PREFIX = "tokenizer.headrace."
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

# Texts that end a turn whatever the file says; the first list is also where a missing
# `eot_token_id` is looked for, in this order.
_END_OF_TURN = (
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "<｜end▁of▁sentence｜>",
    "<end_of_utterance>",
)
_END_OF_GENERATION = (
    *_END_OF_TURN,
    "<|return|>",
    "<|call|>",
    "<|flush|>",
    "<|calls|>",
    "</s>",
    "<|eom_id|>",
    "[EOS]",
    "<eos>",
    "<turn|>",
    "<|tool_response>",
    "[e~[",
)
# Code models stop after a completion at these: the id's key, then texts tried when it is absent.
_FILL_IN_MIDDLE = {
    "fim_pad_token_id": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    "fim_rep_token_id": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    "fim_sep_token_id": ("<|file_sep|>",),
}
_FILL_IN_MIDDLE_PARTS = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
    ("<PRE>", "<SUF>", "<MID>"),
    ("▁<PRE>", "▁<SUF>", "▁<MID>"),
    ("<|code_prefix|>", "<|code_suffix|>", "<|code_middle|>"),
    ("<|prefix|>", "<|suffix|>", "<|middle|>"),
)
_ALWAYS_SHOWN = ("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>")  # gpt-oss


@dataclass
class Vocabulary:
    """A validated vocabulary.

    Attributes:
        kind: "gpt2" (byte-level BPE), "llama" (SentencePiece) or "gemma4" (BPE on raw text).
        pre: Name of the pre-tokenizer; "" for SentencePiece.
        tokens: Text of each token, as in the file.
        bpe: The library's vocabulary; None for SentencePiece.
        ids: Id of each text; empty for BPE, where `bpe` has them.
        hidden: Control and unknown tokens: left out of decoded text.
        special: Those and the user-defined ones: found in a prompt before anything else.
        bytes_of: Byte tokens, id to value.
        costs: Minus the score of each token; empty for BPE. Infinite: never merged to.
        space_prefix: Where text gets a space in front: "" nowhere, "each" part between special
            tokens; "always" those parts that begin with none; "first" only at the very beginning.
        normal_form: Unicode's normal form that text is brought to; "": as it is.
    """

    kind: str
    pre: str
    tokens: Sequence[str]
    bpe: Bpe | None = None
    ids: dict[str, int] = field(default_factory=dict)
    hidden: frozenset[int] = frozenset()
    special: frozenset[int] = frozenset()
    bytes_of: dict[int, int] = field(default_factory=dict)
    costs: list[float] = field(default_factory=list)
    bos_id: int | None = None
    eos_id: int | None = None
    eot_id: int | None = None
    unk_id: int | None = None
    pad_id: int | None = None
    eos_ids: frozenset[int] = frozenset()
    add_bos: bool = False
    add_eos: bool = False
    space_prefix: str = ""
    normal_form: str = ""
    swallows_space: frozenset[int] = frozenset()


def read_vocabulary(metadata: Mapping[str, Any], path: str | Path | None) -> Vocabulary:
    """Read `tokenizer.ggml.*`; every fault raises ModelFileError naming the key."""
    return _Reader(metadata, path).read()


def has_tokenizer(metadata: Mapping[str, Any]) -> bool:
    """Whether a header describes one."""
    return PREFIX + "model" in metadata


class _Reader:
    def __init__(self, metadata: Mapping[str, Any], path: str | Path | None) -> None:
        self.metadata = metadata
        self.path = path
        self.ids: dict[str, int] = {}
        self.kept: Sequence[str] = ()  # the tokens, to keep
        self.ordinary: set[int] = set()

    def read(self) -> Vocabulary:
        kind = self.text("model")
        if kind is None:
            raise self.missing()
        if kind not in ("gpt2", "llama", "gemma4"):
            raise UnsupportedError(
                f"{PREFIX}model is {kind!r}; Headrace reads 'gpt2', 'llama' and 'gemma4'",
                path=self.path,
            )
        pre = self.pre_tokenizer(kind)
        tokens = self.tokens()
        ids = self.ids = dict(zip(tokens, range(len(tokens)), strict=True))
        if len(ids) != len(tokens):
            index = next(i for i, text in enumerate(tokens) if ids[text] != i)
            raise self.fault("tokens", f"[{index}] = {tokens[index]!r} is there twice")
        vocabulary = Vocabulary(kind=kind, pre=pre, tokens=self.kept)
        if kind == "llama":
            vocabulary.ids, vocabulary.costs = ids, self.costs(len(tokens))
        else:
            vocabulary.bpe = self.bpe(kind, pre)
        self.ordinary = self.ordinary_tokens(len(tokens))
        self.special_ids(vocabulary)
        self.kinds_of_token(vocabulary)
        self.flags(vocabulary)
        return vocabulary

    # --- single values ---

    def fault(self, key: str, what: str) -> ModelFileError:
        return ModelFileError(f"{PREFIX}{key} {what}", path=self.path)

    def missing(self) -> ModelFileError:
        """There is no tokenizer: of a directory that is a file, else a key."""
        without = (
            "; without one it takes token ids only (`headrace bench`, or in Python "
            "`model.likeliest([1, 2], 8)`)"
        )
        if self.path is not None and Path(self.path).name == "config.json":
            return ModelFileError(
                "this directory has no tokenizer.json, so the model reads no text: put the one "
                f"that it was published with beside the weights{without}",
                path=Path(self.path).parent,
            )
        return self.fault(
            "model",
            "is missing: the model has no tokenizer, so it reads no text. Convert it again from a "
            f"source that has one (a tokenizer.json, where that is a directory){without}",
        )

    def text(self, key: str) -> str | None:
        value = self.metadata.get(PREFIX + key)
        if value is not None and not isinstance(value, str):
            raise self.fault(key, f"is {type(value).__name__}, expected a string")
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self.metadata.get(PREFIX + key)
        if value is None:
            return default
        if not isinstance(value, (bool, np.bool_)):
            raise self.fault(key, f"is {value!r}, expected true or false")
        return bool(value)

    def choice(self, key: str, default: str, known: tuple[str, ...]) -> str:
        """One of our own keys, which stand for what GGUF has no key for."""
        value = self.metadata.get(OWN_PREFIX + key, default)
        if value != default and value not in known:
            raise UnsupportedError(
                f"{OWN_PREFIX}{key} is {str(value)[:40]!r}; this release knows {', '.join(known)}",
                path=self.path,
            )
        return str(value)

    def id(self, key: str, n_vocab: int) -> int | None:
        value = self.metadata.get(PREFIX + key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
            raise self.fault(key, f"is {value!r}, expected a token id")
        if not 0 <= value < n_vocab:
            raise self.fault(key, f"is {value}, outside the vocabulary of {n_vocab} tokens")
        return int(value)

    def pre_tokenizer(self, kind: str) -> str:
        if kind == "llama":
            return ""
        if kind == "gemma4":
            return "gemma4"
        pre = self.text("pre")
        if not pre:
            warnings.warn(
                f"{self.path}: {PREFIX}pre is missing; using 'default' (as llama.cpp does):"
                " tokens may differ from those the model was trained on",
                RuntimeWarning,
                stacklevel=5,
            )
            return "default"
        if pre not in PRE_TOKENIZERS:
            known = ", ".join(sorted(PRE_TOKENIZERS))
            raise UnsupportedError(
                f"{PREFIX}pre is {pre!r}, a pre-tokenizer that Headrace does not know;"
                f" it knows: {known}",
                path=self.path,
            )
        return pre

    # --- arrays ---

    def strings(self, key: str) -> list[str]:
        value = self.metadata.get(PREFIX + key)
        if value is None:
            raise self.fault(key, "is missing")
        if isinstance(value, (str, bytes)) or not isinstance(value, (Sequence, np.ndarray)):
            raise self.fault(key, f"is {type(value).__name__}, expected an array of strings")
        items = value if type(value) is list else list(value)
        if set(map(type, items)) - {str}:
            raise self.fault(key, "holds items that are not strings")
        return items

    def numbers(self, key: str, n_vocab: int, kinds: str) -> np.ndarray:
        try:
            array = np.asarray(self.metadata[PREFIX + key])
        except ValueError as error:
            raise self.fault(key, f"is not an array of numbers: {error}") from None
        if array.ndim != 1 or array.dtype.kind not in kinds:
            raise self.fault(key, f"is {array.dtype} {array.shape}, expected an array of numbers")
        if array.size != n_vocab:
            raise self.fault(key, f"has {array.size} entries for {n_vocab} tokens")
        return array

    def tokens(self) -> list[str]:
        tokens = self.strings("tokens")
        if not tokens:
            raise self.fault("tokens", "is empty")
        if "" in tokens:  # llama.cpp gives these the same name
            self.kept = tokens = [text or f"[EMPTY_{i}]" for i, text in enumerate(tokens)]
        else:  # a file's own array takes a third of a list's memory
            array = self.metadata[PREFIX + "tokens"]
            self.kept = array if isinstance(array, Sequence) else tokens
        return tokens

    def costs(self, n_vocab: int) -> list[float]:
        if PREFIX + "scores" not in self.metadata:
            raise self.fault("scores", "is missing")
        scores = self.numbers("scores", n_vocab, "fiu")
        if np.isnan(scores).any():
            raise self.fault("scores", f"[{int(np.isnan(scores).argmax())}] is not a number")
        costs: list[float] = np.negative(scores, dtype=np.float32).tolist()
        return costs

    def bpe(self, kind: str, pre: str) -> Bpe:
        merges = self.strings("merges")
        cut = PRE_TOKENIZERS[pre]
        if self.metadata.get(OWN_PREFIX + "fold_case") is True:
            cut = cut.folding()
        try:
            return Bpe(self.ids, merges, cut, byte_level=kind == "gpt2")
        except ValueError as error:
            self.blame_merge(merges)
            raise self.fault("merges", f"cannot be used: {error}") from None

    def blame_merge(self, merges: Sequence[str]) -> None:
        for index, rule in enumerate(merges):
            left, _, right = rule[1:].partition(" ")
            left = rule[:1] + left
            if not right:
                raise self.fault("merges", f"[{index}] = {rule!r} is not two parts")
            for part in (left, right, left + right):
                if part not in self.ids:
                    raise self.fault(
                        "merges", f"[{index}] = {rule!r}: {part!r} is not in {PREFIX}tokens"
                    )

    # --- special tokens ---

    def special_ids(self, vocabulary: Vocabulary) -> None:
        n_vocab, ids = len(vocabulary.tokens), self.ids

        def find(key: str, texts: Iterable[str] = ()) -> int | None:
            found = self.id(key, n_vocab)
            if found is not None:
                return found
            return next((ids[text] for text in texts if text in ids), None)

        vocabulary.bos_id = find("bos_token_id")
        vocabulary.eos_id = find("eos_token_id")
        vocabulary.unk_id = find("unknown_token_id")
        vocabulary.pad_id = find("padding_token_id")
        vocabulary.eot_id = find("eot_token_id", _END_OF_TURN)
        if vocabulary.kind == "llama":  # SentencePiece's own defaults
            for name, default in (("unk_id", 0), ("bos_id", 1), ("eos_id", 2)):
                if getattr(vocabulary, name) is None and default < n_vocab:
                    setattr(vocabulary, name, default)
        ends = {vocabulary.eos_id, vocabulary.eot_id, find("eom_token_id", ["<|eom_id|>"])}
        ends |= {find(key, texts) for key, texts in _FILL_IN_MIDDLE.items()}
        ends |= {ids.get(text) for text in _END_OF_GENERATION}
        ends -= self.ordinary
        ends |= self.own_ends(n_vocab)
        vocabulary.eos_ids = frozenset(each for each in ends if each is not None)

    def ordinary_tokens(self, n_vocab: int) -> set[int]:
        """Tokens that are ordinary whatever their text, where the types are known to be right."""
        if self.metadata.get(OWN_PREFIX + "exact_types") is not True:
            return set()
        types = self.numbers("token_type", n_vocab, "iu")
        return set(np.flatnonzero(types == NORMAL).tolist())

    def own_ends(self, n_vocab: int) -> set[int]:
        found = self.metadata.get(OWN_PREFIX + "end_token_ids")
        if found is None:
            return set()
        array = np.asarray(found)
        if array.ndim != 1 or array.dtype.kind not in "iu" or not (array < n_vocab).all():
            raise ModelFileError(f"{OWN_PREFIX}end_token_ids has no token ids", path=self.path)
        return {token for token in array.tolist() if token >= 0}

    def kinds_of_token(self, vocabulary: Vocabulary) -> None:
        ids, n_vocab = self.ids, len(vocabulary.tokens)
        by_kind: dict[int, set[int]] = {kind: set() for kind in range(7)}
        if PREFIX + "token_type" in self.metadata:
            types = self.numbers("token_type", n_vocab, "iu")
            for kind in (UNKNOWN, CONTROL, USER_DEFINED, BYTE):
                by_kind[kind] = set(np.flatnonzero(types == kind).tolist())
        control, shown = by_kind[CONTROL], by_kind[USER_DEFINED]
        # Some files mark these as ordinary text; they are control tokens all the same.
        markers = chain(_END_OF_GENERATION, *_FILL_IN_MIDDLE.values(), *_FILL_IN_MIDDLE_PARTS)
        control |= {ids[text] for text in markers if text in ids} - self.ordinary
        ordinary = self.exceptions(vocabulary, control, shown)
        control -= ordinary
        shown -= ordinary
        vocabulary.hidden = frozenset(control | by_kind[UNKNOWN])
        vocabulary.special = frozenset(control | by_kind[UNKNOWN] | shown)
        vocabulary.bytes_of = self.byte_tokens(vocabulary, by_kind[BYTE])

    def exceptions(self, vocabulary: Vocabulary, control: set[int], shown: set[int]) -> set[int]:
        """The models whose end-looking tokens mean something else; returns ordinary tokens."""
        ids = self.ids
        moved = {ids[text] for text in _ALWAYS_SHOWN if text in ids}
        call = "<|call|>" in ids or "<|calls|>" in ids
        if "<|end|>" in ids and call and ("<|return|>" in ids or "<|flush|>" in ids):
            moved.add(ids["<|end|>"])  # ends a channel, not the answer
            vocabulary.eos_ids -= {ids["<|end|>"]}
        control -= moved
        shown |= moved
        if "<|tool_response>" in ids and "</s>" in ids:
            vocabulary.eos_ids -= {ids["</s>"]}
            return {ids["</s>"]}
        return set()

    def byte_tokens(self, vocabulary: Vocabulary, marked: set[int]) -> dict[int, int]:
        values = {}
        for token in marked:
            text = vocabulary.tokens[token]
            try:
                if len(text) != 6 or text[:3] != "<0x" or text[5] != ">":
                    raise ValueError
                values[token] = int(text[3:5], 16)
            except ValueError:
                raise self.fault("tokens", f"[{token}] = {text!r} is not a byte <0xNN>") from None
        return values

    def flags(self, vocabulary: Vocabulary) -> None:
        spm = vocabulary.kind == "llama"
        default = spm or PRE_TOKENIZERS[vocabulary.pre].add_bos
        vocabulary.add_bos = self.flag("add_bos_token", default) or vocabulary.kind == "gemma4"
        vocabulary.add_eos = self.flag("add_eos_token", False)
        if spm and self.flag("add_space_prefix", True):
            vocabulary.space_prefix = self.choice("space_prefix", "each", ("first", "always"))
        vocabulary.normal_form = self.choice("normal_form", "", ("NFC",))
        for wanted, key, found in (
            (vocabulary.add_bos, "bos_token_id", vocabulary.bos_id),
            (vocabulary.add_eos, "eos_token_id", vocabulary.eos_id),
        ):
            if wanted and found is None:
                raise self.fault(key, "is missing, but prompts must carry that token")
        name = self.metadata.get("general.name")
        if isinstance(name, str) and ("phi-3" in name.lower() or "phi3" in name.lower()):
            kept = {self.ids.get(text) for text in ("<unk>", "<s>", "<|endoftext|>")}
            vocabulary.swallows_space = vocabulary.special - kept
