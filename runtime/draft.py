"""Drafts from a small model of the same vocabulary, which is asked where the text itself is not.

Source: Y. Leviathan et al., "Fast Inference from Transformers via Speculative Decoding", 2023. The
small model's likeliest tokens are the draft; what is chosen is chosen by the large model alone.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Final, Literal

from headrace.errors import HeadraceError
from headrace.lookup import LONGEST, Draft, Lookup

if TYPE_CHECKING:
    from collections.abc import Iterable

    from headrace.model import Model

SELF: Final = "self"  # the model that is to be guessed for
SURE = 3  # tokens that must match for the text's own draft to be taken
FIRST_LENGTH = 4
LONGEST_PAUSE = 64  # passes


class ModelDraft:
    """Drafts of the text so far, and of `model` where the text has none.

    "self": of the blocks that `large`, a stack that streams, has in memory.

    Raises:
        ValueError: the vocabularies of the two models differ.
    """

    def __init__(
        self, model: Model | Literal["self"], large: Model, tokens: Iterable[int] = ()
    ) -> None:
        key = "tokenizer.ggml.tokens"
        if model is large or (model != SELF and model.metadata.get(key) != large.metadata.get(key)):
            raise ValueError("a draft comes from another model, with the same vocabulary")
        self._own = model == SELF
        self._context = large.context if model == SELF else model.context
        self._likeliest = large._guess if model == SELF else model.likeliest
        self._tokens = list(tokens)
        self._lookup = Lookup(self._tokens)
        self._length = FIRST_LENGTH
        self._guessed: list[int] = []  # by the model, for the pass that goes on
        self._pause = self._left = 0
        self._failed = False

    def push(self, token: int) -> None:
        """Add the next token."""
        if self._guessed:
            right = self._guessed.pop(0) == token
            if not right:
                # As many as were right this time, and one more to try.
                self._length = max(1, self._length - len(self._guessed))
                self._guessed = []
            elif not self._guessed:
                self._length *= 2
        self._tokens.append(token)
        self._lookup.push(token)

    def draft(self, most: int) -> Draft:
        """Up to `most` tokens that may follow."""
        own = self._lookup.draft(most)
        self._guessed = []
        if own.matched >= SURE or most < 1:
            return own
        if self._left > 0:
            self._left -= 1
            return own
        tokens = self._ask(min(most, self._length))
        if not tokens:
            return own
        self._guessed = list(tokens)
        return Draft(tokens, LONGEST)

    def unread(self) -> None:
        """A draft was not worth reading: ask less often, for asking takes time."""
        if self._guessed:
            self._guessed = []
            self._pause = min(LONGEST_PAUSE, max(1, 2 * self._pause))
            self._left = self._pause

    def _ask(self, n: int) -> list[int]:
        n = min(n, self._context - len(self._tokens))
        if n < 1 or self._failed:
            return []
        try:
            return self._likeliest(self._tokens, n)
        except HeadraceError as error:  # what is chosen does not depend on it
            if self._own:
                raise
            self._failed = True
            warnings.warn(f"going on without a draft: {error}", RuntimeWarning, stacklevel=2)
            return []
