"""Rows of the token embedding, read from the file when tokens come instead of held in memory."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from headrace.loaders.gguf import TensorReader
from headrace.memory import Arena
from headrace.placing import PlacedMatrix, padded16
from headrace.rows import raw_row, tile_raw
from headrace.sparse.format import TILE_ROWS


def embedding_bytes(placed: PlacedMatrix, tokens: int) -> int:
    """Memory for the rows of so many tokens."""
    return placed.format.tiled_bytes(padded16(tokens), placed.matrix.columns)


class EmbeddingRows:
    """Room for the rows of `tokens` tokens, tiled; `addresses` of kernels by name."""

    def __init__(
        self, placed: PlacedMatrix, tokens: int, addresses: dict[str, int], reader: TensorReader
    ) -> None:
        self._placed = placed
        self._addresses = addresses
        self._reader = reader
        self._arena = Arena({"rows": embedding_bytes(placed, tokens)}, huge=False)
        self.address = self._arena.address("rows")

    def fetch(self, ids: Sequence[int]) -> None:
        """Bring the rows of these tokens, in this order.

        Raises:
            ModelFileError: the file cannot be read.
        """
        rows = {i: raw_row(self._reader, self._placed, i) for i in dict.fromkeys(ids)}
        raw = np.zeros((padded16(len(ids)), len(rows[ids[0]])), np.uint8)
        for at, i in enumerate(ids):
            raw[at] = rows[i]
        tile_raw(self._addresses, self._placed, raw, self.address, len(raw) // TILE_ROWS)
