"""A text cut into windows that are scored one by one, as llama.cpp cuts it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from headrace.errors import HeadraceError
from headrace.tokenizer import Tokenizer


def scored_of(context: int) -> int:
    """How many of the last logits of a window are looked at; what follows its last is not known."""
    return context - context // 2


@dataclass(frozen=True)
class Windows:
    """Windows of `context` tokens, each read from an empty context.

    Its first token is replaced by the begin-of-text token where the model wants one; positions
    context / 2 .. context - 2 predict their successors.
    """

    ids: np.ndarray  # int64 [windows, context], as the text has them
    first_token: int | None  # instead of each window's first

    @property
    def context(self) -> int:
        """Tokens of a window."""
        n: int = self.ids.shape[1]
        return n

    @property
    def scored(self) -> int:
        """See `scored_of`."""
        return scored_of(self.context)

    @property
    def first(self) -> int:
        """The first position of a window whose successor is to be predicted."""
        return self.context - self.scored

    def __len__(self) -> int:
        return len(self.ids)

    def __iter__(self) -> Iterator[tuple[list[int], np.ndarray]]:
        """The tokens to read, and int64 [scored - 1] that were to be predicted."""
        for row in self.ids:
            window = [int(i) for i in row]
            if self.first_token is not None:
                window[0] = self.first_token
            yield window, row[self.context // 2 + 1 :]


def check_length(tokenizer: Tokenizer, text: str, context: int, option: str) -> None:
    """Make sure before long work that `cut_text` will find a window.

    Args:
        option: of the command, that gave the text.

    Raises:
        HeadraceError: the text is shorter than one window.
    """
    n = len(tokenizer.encode(text, add_special=True, parse_special=False))
    if n < context:
        raise HeadraceError(
            f"the text of {option} has {n:,} tokens, less than one window of {context}; use a "
            "longer one"
        )


def cut_text(tokenizer: Tokenizer, text: str, context: int, most: int | None) -> Windows:
    """Tokenise a text once and cut it; what is left over is dropped.

    Args:
        context: tokens of a window.
        most: only the first so many windows; None: all.

    Raises:
        HeadraceError: the text is shorter than one window.
        ValueError: the window is shorter than 4 tokens, or `most` below 1.
    """
    if context < 4:
        raise ValueError(f"a window must have at least 4 tokens, not {context}")
    if most is not None and most < 1:
        raise ValueError(f"chunks must be at least 1, not {most}")
    # As plain text: a corpus may spell <unk> or <eos>, which are no control tokens there.
    ids = tokenizer.encode(text, add_special=True, parse_special=False)
    windows = len(ids) // context
    if windows < 1:
        raise HeadraceError(
            f"the text has {len(ids)} tokens, less than one window of {context}; "
            "use a longer text or a smaller --context"
        )
    windows = windows if most is None else min(windows, most)
    return Windows(
        np.array(ids[: windows * context], np.int64).reshape(windows, context),
        tokenizer.bos_id if tokenizer.add_bos else None,
    )
