"""Drafts from the text itself: what followed the last time that the latest tokens stood there.

Source: A. Saxena, "Prompt Lookup Decoding", 2023. No model is asked, so a draft costs nothing;
where a text repeats its prompt (edits, summaries, code), many of its tokens are right.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

SIZES = (8, 5, 3, 2, 1)  # tokens that must be equal, looked for in this order
LONGEST = 8  # beyond, it makes no difference how many are equal


@dataclass(frozen=True)
class Draft:
    """Tokens that may come next, and how many of the latest ones were found before them."""

    tokens: list[int]
    matched: int


class Lookup:
    """The tokens so far, by what they begin with."""

    def __init__(self, tokens: Iterable[int] = ()) -> None:
        self._tokens: list[int] = []
        # Where each run of tokens ended, the last time but for the very end.
        self._ends: dict[tuple[int, ...], int] = {}
        for token in tokens:
            self.push(token)

    def push(self, token: int) -> None:
        """Add the next token."""
        tokens, n = self._tokens, len(self._tokens)
        for size in SIZES:
            if size <= n:
                self._ends[tuple(tokens[n - size :])] = n
        tokens.append(token)

    def draft(self, most: int) -> Draft:
        """Up to `most` tokens that may follow; none if the latest token is new.

        What is drafted counts as text: a run that repeats itself is continued.
        """
        tokens, n = self._tokens, len(self._tokens)
        for size in SIZES:
            if size <= n and (at := self._ends.get(tuple(tokens[n - size :]))) is not None:
                found = tokens[at : at + most]
                while len(found) < most:
                    found.append(found[at + len(found) - n])
                return Draft(found[:most], self._matched(at))
        return Draft([], 0)

    def unread(self) -> None:
        """The last draft was not worth reading; it had cost nothing."""

    def _matched(self, at: int) -> int:
        tokens, equal = self._tokens, 0
        while equal < min(at, LONGEST) and tokens[at - 1 - equal] == tokens[-1 - equal]:
            equal += 1
        return equal
