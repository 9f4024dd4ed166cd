"""int8 weights of convolutions in tiles of 16 channels, with what ends the sums of each tile.

Channels that are written are computed in tiles of 16: groups of four, then a pair and a
single one, whose rows are in the order of `requantise.byte_order`. Where results are float32 there
are pairs only, and rows are as they come.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from headrace.kernels.requantise import byte_order
from headrace.sparse.format import TILE_ROWS

if TYPE_CHECKING:
    import numpy as np

QUAD = 4  # bytes of a tap that are multiplied at once
TAIL = 256  # bytes for each tile: bias, scales, 128 * sums of weights, bias of float32 results
FOUR = 4  # tiles whose results are stored together


def tile_groups(n_tiles: int, floats: bool) -> list[int]:
    """How tiles are taken together."""
    fours = 0 if floats else n_tiles // FOUR
    rest = n_tiles - fours * FOUR
    return [FOUR] * fours + [2] * (rest // 2) + [1] * (rest % 2)


def row_order(n_tiles: int, floats: bool) -> np.ndarray:
    """The channel of each row of each tile: [tiles, 16]."""
    import numpy as np

    if floats:
        return np.arange(n_tiles * TILE_ROWS).reshape(n_tiles, TILE_ROWS)
    groups = tile_groups(n_tiles, floats)
    starts = np.cumsum([0, *groups]) * TILE_ROWS
    rows = [start + byte_order(n) for start, n in zip(starts[:-1], groups, strict=True)]
    return np.concatenate(rows)


def tiled_weights(w: np.ndarray, floats: bool) -> np.ndarray:
    """int8 weights [down, across, channels, written] as `_dense` reads them.

    Tiles of a group side by side: [group][tap][quad][tile][16 rows][4 channels].
    """
    import numpy as np

    taps, channels, written = w.shape[0] * w.shape[1], w.shape[2], w.shape[3]
    n_tiles, quads = -(-written // TILE_ROWS), -(-channels // QUAD)
    padded = np.zeros((taps, quads * QUAD, n_tiles * TILE_ROWS), np.int8)
    padded[:, :channels, :written] = w.reshape(taps, channels, written)
    rows = padded[..., row_order(n_tiles, floats)]  # [tap][channel][tile][row]
    split = rows.reshape(taps, quads, QUAD, n_tiles, TILE_ROWS).transpose(3, 0, 1, 4, 2)
    found, at = [], 0
    for group in tile_groups(n_tiles, floats):
        found.append(split[at : at + group].transpose(1, 2, 0, 3, 4).reshape(-1))
        at += group
    return np.concatenate(found)


def tails(
    bias: np.ndarray, scale: np.ndarray, sums: np.ndarray, floats: bool,
    summands: np.ndarray | None = None,
) -> np.ndarray:  # fmt: skip
    """Of each tile int32 [4, 16]: bias (`folded_bias`), scales, 128 * sums of weights, summands.

    Summands are float32, and added to results that are; None: zeros.
    """
    import numpy as np

    n_tiles = -(-len(bias) // TILE_ROWS)
    padded = np.zeros((4, n_tiles * TILE_ROWS), np.int32)
    padded[0, : len(bias)] = bias
    padded[1, : len(bias)] = scale.astype(np.float32).view(np.int32)
    padded[2, : len(bias)] = 128 * sums.astype(np.int64)
    if summands is not None:
        padded[3, : len(bias)] = summands.astype(np.float32).view(np.int32)
    rows = padded[:, row_order(n_tiles, floats)]
    return np.ascontiguousarray(rows.transpose(1, 0, 2))
