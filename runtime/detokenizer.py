"""Token ids to text while they arrive."""

from __future__ import annotations

import codecs

from headrace.tokenizer import Tokenizer


class Detokenizer:
    """Turns a stream of ids into text without ever showing half a character.

    The pieces, joined, equal `Tokenizer.decode` of all the ids (when `after` is None).

    Args:
        tokenizer: The model's tokenizer.
        after: The id before the first one pushed: the last of the prompt when the text continues
            it. None at the start of a text, where SentencePiece models put a space to be dropped.
        skip_special: Leave control tokens out.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, after: int | None = None, skip_special: bool = True
    ) -> None:
        self._tokenizer = tokenizer
        self._after = after
        self._skip_special = skip_special
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """Add a token; returns the text that is now certain (often "" inside a character)."""
        piece = self._tokenizer.piece_bytes(
            token, after=self._after, skip_special=self._skip_special
        )
        self._after = token
        return self._decoder.decode(piece)

    def finish(self) -> str:
        """End the stream: an unfinished character becomes U+FFFD."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest
