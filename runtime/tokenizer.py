"""Text to token ids and back, from the metadata of a GGUF file.

BPE goes through the `tokenizers` library and SentencePiece through a merge of our own; see
`headrace.bpe` for why. Special tokens are cut out here, because the library cannot do it as
llama.cpp does: the longest first whatever its place in the text, and user-defined ones even where
control tokens are to be read as plain text.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from functools import cached_property
from math import inf
from pathlib import Path
from typing import Any

from headrace.bpe import ALPHABET, merge, nfc
from headrace.errors import HeadraceError
from headrace.vocabulary import Vocabulary, read_vocabulary

_SPACE = "\u2581"  # SentencePiece writes a space as a lower one eighth block
_C_SPACES = " \t\n\v\f\r"
_CACHED_WORDS = 1 << 15
_CACHED_WORD_LENGTH = 64
_FROM_ALPHABET = {ord(letter): byte for byte, letter in enumerate(ALPHABET)}


class Tokenizer:
    """Encodes and decodes; immutable apart from a cache, so it may be shared between threads.

    Attributes:
        n_vocab: Number of tokens.
        bos_id, eos_id, eot_id, unk_id, pad_id: Ids of special tokens, or None.
        eos_ids: Every id that ends generation.
        add_bos, add_eos: Whether `encode` adds them.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._tokens = vocabulary.tokens
        self._bpe = vocabulary.bpe
        self._find = vocabulary.ids.get if self._bpe is None else self._bpe.id_of
        self._hidden = vocabulary.hidden
        self._special = vocabulary.special
        self.n_vocab = len(vocabulary.tokens)
        self.bos_id, self.eos_id = vocabulary.bos_id, vocabulary.eos_id
        self.eot_id, self.unk_id = vocabulary.eot_id, vocabulary.unk_id
        self.pad_id, self.eos_ids = vocabulary.pad_id, vocabulary.eos_ids
        self.add_bos, self.add_eos = vocabulary.add_bos, vocabulary.add_eos
        self._byte_level = vocabulary.kind == "gpt2"
        self._words: dict[str, list[int]] = {}
        # Longest first, as llama.cpp does: each is cut out of what the ones before it left.
        texts = [(self._tokens[each], each) for each in self._special]
        texts.sort(key=lambda each: (-len(each[0].encode("utf-8", "surrogateescape")), each[1]))
        self._cut_first = texts

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any], path: str | Path | None) -> Tokenizer:
        """Build the tokenizer that a GGUF file describes.

        Args:
            metadata: The file's metadata; keys `tokenizer.ggml.*` are read.
            path: The file, for error messages.

        Raises:
            ModelFileError: A key is missing or inconsistent; the message names it.
            UnsupportedError: The kind of tokenizer or pre-tokenizer is not known.
        """
        return cls(read_vocabulary(metadata, path))

    def id_of(self, text: str) -> int | None:
        """The id of the token with exactly this text (such as "<|im_start|>"), or None."""
        return self._find(text)

    # --- text to ids ---

    def encode(
        self, text: str, *, add_special: bool = True, parse_special: bool = True
    ) -> list[int]:
        """Turn text into token ids.

        Args:
            text: Any text that can be written as UTF-8.
            add_special: Add BOS and EOS where the model wants them.
            parse_special: Read "<|im_end|>" and the like in `text` as the control token. Pass
                False for text from somebody you do not trust.

        Raises:
            ValueError: `text` has a lone surrogate.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"the text has a lone surrogate (U+{ord(text[error.start]):04X}) at character"
                f" {error.start}; decode the bytes with errors='replace' first"
            ) from None
        out: list[int] = []
        if add_special and self.add_bos:
            out.append(self.bos_id)  # type: ignore[arg-type]
        after_special = first = True
        for part in self._partition(text, parse_special):
            if isinstance(part, int):
                out.append(part)
                after_special = True
            else:
                if after_special and self._wants_space(part, first):
                    part = " " + part
                self._encode_text(part, out)
                after_special = False
            first = False
        if add_special and self.add_eos:
            out.append(self.eos_id)  # type: ignore[arg-type]
        return out

    def _wants_space(self, part: str, first: bool) -> bool:
        """Whether a space goes in front of a text that begins here or follows a special token."""
        where = self._vocabulary.space_prefix
        if where in ("", "each"):
            return where == "each"
        return (first or where == "always") and not part.startswith((" ", _SPACE))

    def _partition(self, text: str, parse_special: bool) -> list[str | int]:
        parts: list[str | int] = [text] if text else []
        for special, token in self._cut_first:
            if special not in text or (not parse_special and token in self._hidden):
                continue
            swallow = token in self._vocabulary.swallows_space
            cut: list[str | int] = []
            for part in parts:
                if isinstance(part, int):
                    cut.append(part)
                    continue
                first, *rest = part.split(special)
                if first:
                    cut.append(first)
                for piece in rest:
                    cut.append(token)
                    if swallow:
                        piece = piece.lstrip(_C_SPACES)
                    if piece:
                        cut.append(piece)
            parts = cut
        return parts

    def _encode_text(self, text: str, out: list[int]) -> None:
        if self._vocabulary.normal_form == "NFC":
            text = nfc(text)
        if self._bpe is None:
            self._encode_sentencepiece(text.replace(" ", _SPACE), out)
        elif self._byte_level:
            out += self._bpe.encode(text, self._missing_byte)
        else:  # Gemma 4: a run of newlines is a token, and no merge makes it
            for part in re.split("(\n+)", text.replace(" ", _SPACE)):
                whole = self._find(part) if part.startswith("\n") else None
                if whole is None:
                    out += self._bpe.encode(part, self._missing_byte)
                else:
                    out.append(whole)

    def _missing_byte(self, byte: int) -> list[int]:
        """A byte without a token: the unknown token; byte-level vocabularies leave it out."""
        if self._byte_level:
            warnings.warn(
                f"the vocabulary has no token for byte 0x{byte:02x}; it is left out",
                RuntimeWarning,
                stacklevel=5,
            )
            return []
        if self.unk_id is None:
            raise HeadraceError(
                f"the vocabulary has no token for byte 0x{byte:02x} and no unknown token"
            )
        return [self.unk_id]

    def _encode_sentencepiece(self, text: str, out: list[int]) -> None:
        cache = self._words
        for word in self._spaced_words(text):
            found = cache.get(word)
            if found is None:
                found = self._encode_word(word)
                if len(word) <= _CACHED_WORD_LENGTH:
                    if len(cache) >= _CACHED_WORDS:
                        cache.clear()
                    cache[word] = found
            out += found

    def _spaced_words(self, text: str) -> list[str]:
        """SentencePiece has no words; cut where no token reaches across, so merges cannot."""
        if len(text) <= _CACHED_WORD_LENGTH or self._tokens_span_words:
            return [text]
        return re.findall(f"{_SPACE}*[^{_SPACE}]+|{_SPACE}+", text)

    @cached_property
    def _tokens_span_words(self) -> bool:
        """Whether any token has a space after something else."""
        pattern = re.compile(f"[^{_SPACE}]{_SPACE}")
        return any(map(pattern.search, self._tokens))

    def _encode_word(self, word: str) -> list[int]:
        ids, costs = self._vocabulary.ids, self._vocabulary.costs

        def rank(text: str) -> float | None:
            found = ids.get(text)
            return None if found is None or costs[found] == inf else costs[found]

        out: list[int] = []
        for symbol in merge(list(word), rank):
            whole = ids.get(symbol)
            if whole is not None:
                out.append(whole)
                continue
            for byte in symbol.encode():
                found = ids.get(f"<0x{byte:02X}>")
                out += self._missing_byte(byte) if found is None else [found]
        return out

    # --- ids to text ---

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Turn token ids into text; bytes that are not UTF-8 become U+FFFD.

        Args:
            ids: Token ids.
            skip_special: Leave control tokens out.

        Raises:
            ValueError: An id is outside the vocabulary.
        """
        pieces = []
        previous = None
        for token in ids:
            pieces.append(self.piece_bytes(token, after=previous, skip_special=skip_special))
            previous = token
        return b"".join(pieces).decode("utf-8", "replace")

    def token_bytes(self, token: int) -> bytes:
        """The exact bytes that a token stands for."""
        if not 0 <= token < self.n_vocab:
            raise ValueError(f"token id {token} is outside the vocabulary of {self.n_vocab} tokens")
        text = self._tokens[token]
        if token not in self._special:
            byte = self._vocabulary.bytes_of.get(token)
            if byte is not None:
                return bytes((byte,))
            if self._byte_level:
                try:
                    return text.translate(_FROM_ALPHABET).encode("latin-1")
                except UnicodeEncodeError:  # a letter outside the byte alphabet stands for itself
                    return _mixed_bytes(text)
            text = text.replace(_SPACE, " ")
        return text.encode("utf-8", "surrogateescape")

    def piece_bytes(self, token: int, *, after: int | None, skip_special: bool = True) -> bytes:
        """The bytes that a token adds to a text.

        Args:
            token: The token.
            after: The token before it, None at the beginning: SentencePiece models that put a
                space in front of every text do so after special tokens too; it is dropped there.
            skip_special: Whether control tokens add nothing.
        """
        piece = self.token_bytes(token)
        if token in self._special:
            return b"" if skip_special and token in self._hidden else piece
        return piece.removeprefix(b" ") if self.drops_space(after) else piece

    def drops_space(self, after: int | None) -> bool:
        """Whether a space that begins the text of the token behind this one is dropped."""
        where = self._vocabulary.space_prefix
        return bool(where) and (after is None or (where != "first" and after in self._special))


def _mixed_bytes(text: str) -> bytes:
    out = bytearray()
    for letter in text:
        byte = _FROM_ALPHABET.get(ord(letter))
        out += letter.encode("utf-8", "surrogateescape") if byte is None else bytes((byte,))
    return bytes(out)
