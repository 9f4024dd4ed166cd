"""tokenizer.json as the keys that a GGUF file has for its tokenizer.

Two kinds are read: BPE over bytes (GPT-2, Llama 3, Qwen), and BPE over text with bytes for what is
no token, which is SentencePiece's own merging written as rules (Llama 2, Mistral, Gemma).

Some of what tokenizer.json can say has no key in GGUF; these are ours:

    tokenizer.headrace.normal_form    "NFC": text is normalised before it is cut
    tokenizer.headrace.space_prefix   "first" or "always": where a space is put in front of text
                                      that begins with none (GGUF's puts one everywhere)
    tokenizer.headrace.end_token_ids  ids that end an answer, besides those that are known by text
    tokenizer.headrace.fold_case      true: contractions are found in any case, not ASCII's only
    tokenizer.headrace.exact_types    true: ordinary tokens are ordinary, whatever their text
"""

from __future__ import annotations

import warnings
from operator import add
from pathlib import Path
from typing import Any

import numpy as np

from headrace.errors import ModelFileError, UnsupportedError
from headrace.loaders.folder import Folder, no_collection
from headrace.loaders.huggingface.config import Config
from headrace.loaders.huggingface.pretokenizers import FOLDED, NAMES, expressions_of
from headrace.loaders.huggingface.tokenizer_config import Settings, read_settings
from headrace.loaders.layout import AGAIN
from headrace.loaders.model_file import StringArray

TOKENIZER = "tokenizer.json"
MAX_BYTES = 64 << 20  # Gemma 3's has 33 MB
MAX_TOKENS = 1 << 21
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
_GGML, _OWN = "tokenizer.ggml.", "tokenizer.headrace."
_SPACE = "\u2581"


def read_tokenizer(folder: Folder, config: Config, rows: int) -> dict[str, Any]:
    """The tokenizer's metadata; none if there is no tokenizer.json.

    Args:
        rows: of the embedding: so many tokens there are, those without a text being unused.

    Raises:
        UnsupportedError: a kind of tokenizer that is not there.
        ModelFileError: a file is corrupt or hostile, or contradicts itself.
    """
    if not folder.has(TOKENIZER):
        return {}
    settings = read_settings(folder, config)
    root = folder.json(TOKENIZER, MAX_BYTES)
    with no_collection():
        return _Reader(root, folder.path / TOKENIZER, settings, rows).read()


class _Reader:
    def __init__(self, root: dict[str, Any], path: Path, settings: Settings, rows: int) -> None:
        self.root = root
        self.path = path
        self.settings = settings
        self.rows = rows

    def bad(self, problem: str) -> ModelFileError:
        return ModelFileError(f"{problem}; {AGAIN}", path=self.path)

    def unsupported(self, problem: str) -> UnsupportedError:
        return UnsupportedError(f"{problem}, which is not supported", path=self.path)

    def read(self) -> dict[str, Any]:
        model = self.root.pop("model", None)
        if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict | list):
            raise self.bad("there is no 'model' with a 'vocab' in it")
        kind = model.get("type", "BPE")  # old files do not say
        if kind != "BPE" or not isinstance(model["vocab"], dict):
            raise self.unsupported(f"model.type is {str(kind)[:40]!r}")
        for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
            if model.get(key):
                raise self.unsupported(f"model.{key} is {str(model[key])[:40]!r}")
        vocab = self.vocabulary(model["vocab"])
        added = self.added(vocab)
        found = self.sentencepiece(model, vocab, added)
        if found is None:
            found = self.byte_level(model)
        found[f"{_GGML}tokens"] = self.tokens(vocab)
        types = np.full(len(found[f"{_GGML}tokens"]), UNUSED, np.int32)
        types[list(vocab.values())] = NORMAL
        for text, special in added.items():
            types[vocab[text]] = CONTROL if special else USER_DEFINED
        if found[f"{_GGML}model"] == "llama":
            for byte in range(256):
                if f"<0x{byte:02X}>" in vocab:
                    types[vocab[f"<0x{byte:02X}>"]] = BYTE
        found[f"{_GGML}token_type"] = types
        self.special(found, model, vocab, types)
        return found

    # --- tokens ---

    def vocabulary(self, given: dict[str, Any]) -> dict[str, int]:
        if not given or len(given) > MAX_TOKENS:
            raise self.bad(f"model.vocab has {len(given):,} tokens")
        if not all(type(token) is int and 0 <= token < MAX_TOKENS for token in given.values()):
            raise self.bad("model.vocab has an id that is none")
        if len(set(given.values())) != len(given):
            raise self.bad("model.vocab gives one id to two tokens")
        return given

    def added(self, vocab: dict[str, int]) -> dict[str, bool]:
        """Added tokens and whether they are special; those that are new go into `vocab`."""
        found: dict[str, bool] = {}
        used = set(vocab.values())
        entries = self.root.get("added_tokens") or []
        if not isinstance(entries, list) or len(entries) > MAX_TOKENS:
            raise self.bad("'added_tokens' is no list")
        for entry in entries:
            text, token = (
                entry.get(k) if isinstance(entry, dict) else None for k in ("content", "id")
            )
            if not isinstance(text, str) or not text or type(token) is not int:
                raise self.bad(f"'added_tokens' has {str(entry)[:80]}")
            if 0 < self.rows <= token < MAX_TOKENS and text not in vocab:
                continue  # Gemma 3's for images, which its text models have no row for
            if vocab.setdefault(text, token) != token:
                raise self.bad(f"the added token {text[:40]!r} has two ids")
            if text not in found and token not in used:
                if not 0 <= token < MAX_TOKENS:
                    raise self.bad(f"the added token {text[:40]!r} has the id {token}")
                used.add(token)
            odd = [key for key in ("lstrip", "rstrip", "single_word") if entry.get(key)]
            if odd:
                warnings.warn(
                    f"{self.path}: the added token {text[:40]!r} has {odd[0]!r} set, which is left "
                    "out: tokens beside it may differ from those the model was trained on",
                    RuntimeWarning,
                    stacklevel=2,
                )
            found[text] = bool(entry.get("special"))
        if len(set(vocab.values())) != len(vocab):
            raise self.bad("an added token has the id of another token")
        return found

    def tokens(self, vocab: dict[str, int]) -> StringArray:
        count = max(vocab.values()) + 1
        if self.rows and count > self.rows:
            raise self.bad(
                f"there are tokens up to id {count - 1}, and the embedding has {self.rows} rows"
            )
        count = max(count, min(self.rows, MAX_TOKENS))
        texts = [""] * count
        for text, token in vocab.items():
            texts[token] = text
        for i, text in enumerate(texts):
            if not text:
                texts[i] = f"[PAD{i}]"
        try:
            return StringArray.of(texts)
        except UnicodeEncodeError:
            raise self.bad("model.vocab has a token that is no text") from None

    # --- kinds ---

    def steps(self, key: str, inner: str) -> list[Any]:
        """A component of the pipeline as a flat list."""
        value = self.root.get(key)
        if value is None:
            return []
        if not isinstance(value, dict):
            raise self.bad(f"{key!r} is {str(value)[:40]}")
        if value.get("type") != "Sequence":
            return [value]
        steps = value.get(inner)
        if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
            raise self.bad(f"{key!r} is a sequence without steps")
        return steps

    def byte_level(self, model: dict[str, Any]) -> dict[str, Any]:
        steps = self.steps("pre_tokenizer", "pretokenizers")
        expressions = expressions_of(steps)
        whole_words = bool(model.get("ignore_merges"))
        name = None if expressions is None else NAMES.get((expressions, whole_words))
        if name is None:
            raise self.unsupported(
                f"the pre-tokenizer is {str(steps)[:300]}"
                + (" with ignore_merges" if whole_words else "")
            )
        if model.get("byte_fallback"):
            raise self.unsupported("model.byte_fallback is true, for bytes as tokens")
        found: dict[str, Any] = {
            f"{_GGML}model": "gpt2",
            f"{_GGML}pre": name,
            f"{_GGML}merges": self.strings(list(map(" ".join, self.merges(model)))),
            f"{_OWN}exact_types": True,
        }
        if expressions is not None and FOLDED in "".join(expressions):
            found[f"{_OWN}fold_case"] = True
        normalizers = [step.get("type") for step in self.steps("normalizer", "normalizers")]
        if normalizers == ["NFC"]:
            found[f"{_OWN}normal_form"] = "NFC"
        elif normalizers:
            raise self.unsupported(f"the normalizer is {str(normalizers)[:200]}")
        return found

    def strings(self, texts: list[str]) -> StringArray:
        try:
            return StringArray.of(texts)
        except UnicodeEncodeError:
            raise self.bad("model.merges has a rule that is no text") from None

    def merges(self, model: dict[str, Any]) -> list[list[str]]:
        """The merge rules; each has two parts. There are hundreds of thousands: no loop here."""
        rules = model.get("merges")
        if not isinstance(rules, list):
            raise self.bad("there is no 'model.merges'")
        if set(map(type, rules)) == {str}:  # as all were once
            rules = [rule.split(" ") for rule in rules]
        if set(map(type, rules)) - {list} or set(map(len, rules)) - {2}:
            raise self.bad("model.merges has a rule that is not two parts")
        for side in zip(*rules, strict=True):
            if set(map(type, side)) != {str} or "" in side or "".join(side).count(" "):
                raise self.bad("model.merges has a rule that is not two parts")
        return rules

    def sentencepiece(
        self, model: dict[str, Any], vocab: dict[str, int], added: dict[str, bool]
    ) -> dict[str, Any] | None:
        """The keys of a SentencePiece vocabulary; None if this is none."""
        prefix = self.space_prefix()
        if prefix is None:
            return None
        if not model.get("byte_fallback"):
            raise self.unsupported("model.byte_fallback is false, for text as tokens")
        if model.get("ignore_merges"):
            raise self.unsupported("model.ignore_merges is true, for text as tokens")
        scores = self.scores(self.merges(model), vocab, added)
        found = {
            f"{_GGML}model": "llama",
            f"{_GGML}scores": scores,
            f"{_GGML}add_space_prefix": prefix != "",
            f"{_OWN}exact_types": True,
        }
        if prefix in ("first", "always"):
            found[f"{_OWN}space_prefix"] = prefix
        return found

    def space_prefix(self) -> str | None:
        """Where text gets a space in front: "", "each", "first" or "always"; None: spaces stay."""
        replace = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
        normalizers = self.steps("normalizer", "normalizers")
        steps = self.steps("pre_tokenizer", "pretokenizers")
        kinds = [step.get("type") for step in steps]
        if not normalizers and kinds == ["Metaspace"]:
            step = steps[0]
            if step.get("replacement") != _SPACE or step.get("split", True) is not False:
                raise self.unsupported(f"the pre-tokenizer is {str(step)[:200]}")
            scheme = step.get("prepend_scheme", "always")
            if scheme not in ("first", "always", "never"):
                raise self.bad(f"Metaspace has the prepend_scheme {str(scheme)[:40]!r}")
            return "" if scheme == "never" else str(scheme)
        # Gemma cuts at spaces when there are none any more.
        if steps not in ([], [{"type": "Split", "pattern": {"String": " "},
                               "behavior": "MergedWithPrevious", "invert": False}]):  # fmt: skip
            return None
        if normalizers == [replace]:
            return ""
        if normalizers == [{"type": "Prepend", "prepend": _SPACE}, replace]:
            return "each"
        return None

    def scores(
        self, rules: list[list[str]], vocab: dict[str, int], added: dict[str, bool]
    ) -> np.ndarray:
        """Scores by which SentencePiece merges as the rules do; -inf: never merged to.

        Rules made from SentencePiece's scores are: for each token, best score first, every cut of
        it into two tokens. Then, and only then, joining whatever makes the best token is the same
        as following them. Rules of tokens with the same score are mixed; Llama 2 has such runs of
        spaces, of which the longer one lies to the left and is joined first either way.
        """
        lefts, rights = zip(*rules, strict=True) if rules else ((), ())
        joined = list(map(add, lefts, rights))
        made = np.array([vocab.get(text, -1) for text in joined], np.int64)
        if (made < 0).any() or not {*lefts, *rights} <= vocab.keys():
            raise self.bad("model.merges has rules that make no token of two tokens")
        n_tokens = max(max(vocab.values()) + 1, min(self.rows, MAX_TOKENS))
        ranks = np.arange(len(rules))
        first, last = np.full((2, n_tokens), -1)
        first[made[::-1]], last[made] = ranks[::-1], ranks
        order = np.argsort(first, kind="stable")
        order = order[first[order] >= 0]
        # A group of tokens ends where no rule of theirs is left.
        ends = np.maximum.accumulate(last[order])
        begins = np.concatenate([[True], first[order[1:]] > ends[:-1]]) if len(order) else order
        group = np.cumsum(begins)
        self.check_groups(group, [joined[rank] for rank in first[order]])
        scores = np.full(n_tokens, -np.inf, np.float32)
        scores[order] = -group.astype(np.float32)
        common = set(vocab) - set(added)
        cuts = sum(
            text[:at] in common and text[at:] in common
            for text in set(joined)
            for at in range(1, len(text))
        )
        known = sum(left in common and right in common for left, right in rules)
        places = made << 32 | np.array(list(map(len, lefts)), np.int64)
        if cuts != known or len(np.unique(places)) != len(rules):
            raise self.unsupported(
                f"model.merges has {known:,} rules where SentencePiece's would be {cuts:,}"
            )
        return scores

    def check_groups(self, group: np.ndarray, texts: list[str]) -> None:
        """Refuse rules of several tokens that stand apart, if they are no runs of a character."""
        counts = np.bincount(group) if len(group) else group
        letters: dict[int, set[str]] = {}
        for number, text in zip(group.tolist(), texts, strict=True):
            if counts[number] > 1:
                letters.setdefault(number, set()).update(text)
                if len(letters[number]) > 1:
                    raise self.unsupported(
                        f"model.merges has rules for {text[:40]!r} among those for other tokens, "
                        "as SentencePiece has not"
                    )

    # --- what is put around text ---

    def special(
        self, found: dict[str, Any], model: dict[str, Any], vocab: dict[str, int], types: np.ndarray
    ) -> None:
        settings = self.settings
        before, after = self.template(vocab)
        ids: dict[str, int | None] = {
            "bos": before if before is not None else self.id_of("bos", vocab),
            "eos": after if after is not None else self.id_of("eos", vocab),
            "padding": vocab.get(settings.tokens.get("pad") or ""),
        }
        unknown = model.get("unk_token") or settings.tokens.get("unk")
        ids["unknown"] = vocab.get(unknown) if isinstance(unknown, str) else None
        for name, token in ids.items():
            if token is not None:
                found[f"{_GGML}{name}_token_id"] = token
        if ids["unknown"] is not None and types[ids["unknown"]] == CONTROL:
            types[ids["unknown"]] = UNKNOWN
        for name, added in (("bos", before is not None), ("eos", after is not None)):
            wanted = settings.add.get(name)
            found[f"{_GGML}add_{name}_token"] = added if wanted is None else wanted
            if found[f"{_GGML}add_{name}_token"] and ids[name] is None:
                raise self.bad(f"text must carry the {name} token, and no file says which that is")
        ends = [token for token in settings.end_ids if token < len(types)]
        if ends:
            found[f"{_OWN}end_token_ids"] = np.array(ends, np.int32)
        if settings.chat_template is not None:
            found["tokenizer.chat_template"] = settings.chat_template

    def id_of(self, name: str, vocab: dict[str, int]) -> int | None:
        """The id of the token with a role: by its text, or as the model's configs have it."""
        if (text := self.settings.tokens.get(name)) is not None and text in vocab:
            return vocab[text]
        ids = self.settings.bos_ids if name == "bos" else self.settings.end_ids
        known = set(vocab.values())
        return next((token for token in ids if token in known), None)

    def template(self, vocab: dict[str, int]) -> tuple[int | None, int | None]:
        """The ids that the post-processor puts before and behind a text."""
        before: int | None = None
        after: int | None = None
        for step in self.steps("post_processor", "processors"):
            kind = step.get("type")
            if kind == "ByteLevel":
                continue
            single = step.get("single") if kind == "TemplateProcessing" else None
            if not isinstance(single, list):
                raise self.unsupported(f"the post-processor is {str(kind)[:40]!r}")
            kinds = [next(iter(p)) if isinstance(p, dict) and len(p) == 1 else "" for p in single]
            if kinds.count("Sequence") != 1 or set(kinds) - {"Sequence", "SpecialToken"}:
                raise self.bad("the post-processor's template is no list of a text and tokens")
            at = kinds.index("Sequence")
            if at > 1 or len(kinds) - at > 2 or before is not None or after is not None:
                raise self.unsupported("several tokens are put before or behind a text")
            before = self.named(single[0], vocab) if at == 1 else None
            after = self.named(single[-1], vocab) if len(kinds) > at + 1 else None
        return before, after

    def named(self, part: dict[str, Any], vocab: dict[str, int]) -> int:
        name = part["SpecialToken"].get("id") if isinstance(part["SpecialToken"], dict) else None
        if not isinstance(name, str) or name not in vocab:
            raise self.bad(f"the post-processor adds {str(name)[:40]!r}, which is no token")
        return vocab[name]
