"""Byte-pair merging: BPE vocabularies through the `tokenizers` library, SentencePiece's here.

A SentencePiece file has no merge rules: any two neighbours may join when the joined text is a
token, the best score first and the leftmost among equal scores. The library wants the rules
written out: every cut of every token into two tokens. For Llama 2 (32,000 tokens) that makes
61,249 rules, 0.17 s and 31 MB, against 17 ms and 8 MB for building the tokenizer around `merge`;
for Gemma 3 (262,144 tokens) 514,847 rules, 2.5 s and 231 MB, against 0.12 s and 60 MB. Gemma would
need `merge` all the same, so every SentencePiece vocabulary uses it. Nor can a list of rules say
"leftmost among equal scores", though 60,000 random texts for each of the two came out equal.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from heapq import heapify, heappop, heappush
from typing import Any

from headrace.errors import HeadraceError
from headrace.pretokenizers import PreTokenizer


def _byte_alphabet() -> list[str]:
    """GPT-2's printable stand-in for each byte."""
    shown = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in shown else next(others)) for byte in range(256)]


ALPHABET = _byte_alphabet()


PIECE = 1 << 16  # characters
_LINE = re.compile(r"(?<=\S\n)(?=[A-Za-z])|(?<=\n)(?= [A-Za-z])")


class Bpe:
    """A BPE vocabulary in the library.

    Args:
        ids: Id of each token's text: 0 to n - 1.
        merges: Merge rules "left right", best first; the first of two equal ones counts.
        pre: How text is cut into words.
        byte_level: Whether tokens spell bytes in GPT-2's alphabet. Otherwise they are plain text,
            and a character that is no token becomes its bytes, `<0xNN>`.

    Raises:
        ValueError: A rule is not two parts, or a part or their union is no token.
    """

    def __init__(
        self, ids: dict[str, int], merges: list[str], pre: PreTokenizer, *, byte_level: bool
    ) -> None:
        from tokenizers import Tokenizer, pre_tokenizers

        self.n_vocab = len(ids)
        # The library drops what it has no token for, and merges across the gap. So that it does
        # neither, bytes without a token get ids behind the vocabulary, which no rule touches.
        spelled = ALPHABET if byte_level else [f"<0x{byte:02X}>" for byte in range(256)]
        missing = {
            text: self.n_vocab + byte for byte, text in enumerate(spelled) if text not in ids
        }
        self._all_bytes = not missing
        self._odd: dict[str, int] = {}  # tokens that are not UTF-8: no text ever becomes one
        vocab = {**ids, **missing} if missing else ids
        rules = merges if len(set(merges)) == len(merges) else list(dict.fromkeys(merges))
        try:
            try:
                model = _model(vocab, rules, pre.ignore_merges, not byte_level)
            except TypeError:
                self._odd = {text: token for text, token in ids.items() if not _is_utf8(text)}
                vocab = {text: token for text, token in vocab.items() if text not in self._odd}
                for left, right in _Pairs([rule for rule in rules if not _is_utf8(rule)]):
                    if not {left, right, left + right} <= ids.keys():
                        raise ValueError(f"{left!r} and {right!r} make no token") from None
                rules = [rule for rule in rules if _is_utf8(rule)]
                model = _model(vocab, rules, pre.ignore_merges, not byte_level)
        except Exception as error:  # the library raises its own bare ones
            raise ValueError(str(error)) from None
        self._library = Tokenizer(model)
        steps = pre.steps()
        if byte_level:
            steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
        self._library.pre_tokenizer = pre_tokenizers.Sequence(steps)

    def id_of(self, text: str) -> int | None:
        """The id of the token with exactly this text, or None."""
        try:
            found = self._library.token_to_id(text)
        except UnicodeEncodeError:
            return self._odd.get(text)
        return found if found is not None and found < self.n_vocab else None

    def encode(self, text: str, missing: Callable[[int], list[int]]) -> list[int]:
        """Turn text into ids.

        Args:
            text: Valid text, special tokens already taken out.
            missing: What to write for a byte that the vocabulary has no token for.
        """
        ids: list[int] = []
        try:
            for piece in pieces_of(text):
                ids += self._library.encode(piece, add_special_tokens=False).ids
        except BaseException as error:
            # Oniguruma gives up at some ten million spaces in a row, and the library panics with
            # an exception that is no Exception.
            if type(error).__name__ != "PanicException":
                raise
            raise HeadraceError(f"the text cannot be cut into words: {error}") from None
        if self._all_bytes or max(ids, default=0) < self.n_vocab:
            return ids
        out: list[int] = []
        for token in ids:
            out += [token] if token < self.n_vocab else missing(token - self.n_vocab)
        return out


def pieces_of(text: str, least: int = PIECE) -> Iterator[str]:
    """Pieces of a text, of `least` characters or some more, that words do not reach across.

    The library takes some 700 bytes for each token until it is done: pieces bound that. Every
    expression of `headrace.pretokenizers` ends a word behind a line, if the next one begins with a
    letter or one space and a letter; but behind other spaces than the one line end it may go on.
    """
    at = 0
    while (cut := _LINE.search(text, at + least)) is not None:
        yield text[at : cut.start()]
        at = cut.start()
    if at < len(text):
        yield text[at:]


def nfc(text: str) -> str:
    """Text in Unicode's normal form C, by the library's tables."""
    from tokenizers.normalizers import NFC

    normal: str = NFC().normalize_str(text)
    return normal


class _Pairs(Sequence[tuple[str, str]]):
    """Merge rules cut in two one at a time: the library copies them, a list would take 10 MB."""

    def __init__(self, rules: list[str]) -> None:
        self._rules = rules

    def __len__(self) -> int:
        return len(self._rules)

    def __getitem__(self, index: Any) -> Any:
        raise NotImplementedError  # the library iterates

    def __iter__(self) -> Iterator[tuple[str, str]]:
        for rule in self._rules:
            at = rule.find(" ", 1)  # a part may begin with a space
            if at < 0:
                raise ValueError(f"{rule!r} is not two parts")
            yield rule[:at], rule[at + 1 :]


def _model(vocab: dict[str, int], rules: list[str], whole_words: bool, byte_fallback: bool) -> Any:
    from tokenizers.models import BPE

    return BPE(vocab, _Pairs(rules), ignore_merges=whole_words, byte_fallback=byte_fallback)


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def merge(symbols: list[str], rank: Callable[[str], float | None]) -> list[str]:
    """Join neighbours, lowest rank first and leftmost among equals, until nothing joins.

    A heap keeps a long word (a megabyte without a space is a legal prompt) at n log n.

    Args:
        symbols: The characters of one word; the list is consumed.
        rank: Rank of a joined text, or None when there is no such token.
    """
    count = len(symbols)
    heap: list[tuple[float, int, int, int]] = []  # (rank, left, right, characters in both)
    for left in range(count - 1):
        found = rank(symbols[left] + symbols[left + 1])
        if found is not None:
            size = len(symbols[left]) + len(symbols[left + 1])
            heap.append((found, left, left + 1, size))
    if not heap:
        return symbols
    heapify(heap)
    before = list(range(-1, count - 1))
    after = list(range(1, count + 1))

    def consider(left: int, right: int) -> None:
        found = rank(symbols[left] + symbols[right])
        if found is not None:
            heappush(heap, (found, left, right, len(symbols[left]) + len(symbols[right])))

    while heap:
        _, left, right, size = heappop(heap)
        # An entry is stale when either side has been joined since; sizes only grow or become 0.
        if not symbols[left] or len(symbols[left]) + len(symbols[right]) != size:
            continue
        if not symbols[right]:
            continue
        symbols[left] += symbols[right]
        symbols[right] = ""
        following = after[left] = after[right]
        if following < count:
            before[following] = left
            consider(left, following)
        if before[left] >= 0:
            consider(before[left], left)
    return [symbol for symbol in symbols if symbol]
