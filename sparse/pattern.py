"""Formats that keep n of each m weights of a row: which ones stay, and how they make up for others.

What stays is rounded to a grid like that of any format (`headrace.sparse.grid`), in which the
others have the level zero. With the Hessian of the inputs those go whose loss costs least if all
other weights of the row make up for it, by the diagonal of its inverse (optimal brain surgeon); the
rest is fitted by `headrace.sparse.gqs_pruning.refit`, and rounded by GPTQ, which puts on inputs
behind what both have lost.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from headrace.sparse.block_grid import scaled_grid
from headrace.sparse.format import Bytes, Floats
from headrace.sparse.gptq import gptq
from headrace.sparse.gqs_pruning import Hessian, refit
from headrace.sparse.grid import Grid

Mask: TypeAlias = NDArray[np.bool_]
# Writes which weights stay and the codes of all, -8..7 and 0 for the others, [rows, blocks, block].
PutKept: TypeAlias = Callable[[Bytes, Mask, NDArray[Any]], None]


@dataclass(frozen=True, kw_only=True)
class Pattern:
    """Of each `of` weights of a row `kept` stay.

    Args:
        grid: of what stays. Its `put` keeps of any codes the largest.
    """

    kept: int
    of: int
    grid: Grid

    def encode(self, x: Floats, importance: Floats | None = None) -> Bytes:
        """Keep the larger weights, rounded to nearest with searched scales: raw bytes.

        Args:
            x: float32 [rows, n].
            importance: of each input, such as its mean square [n]; None: all the same.
        """
        size = np.abs(x) if importance is None else np.abs(x) * np.sqrt(importance)
        some = np.where(stays(size, self.kept, self.of), x, np.float32(0))
        return self.grid.round(some, self.grid.fit(some, importance))

    def encode_fitted(self, x: Floats, hessian: Hessian, importance: Floats | None) -> Bytes:
        """Keep what costs most to leave out; what stays makes up for the rest: raw bytes.

        Args:
            x: float32 [rows, n], of finite numbers.
            hessian: of the inputs.
            importance: of each input when scales are searched [n].
        """
        keep = stays(loss(x, hessian), self.kept, self.of)
        best = refit(x, keep, hessian.h)
        return gptq(best, self.grid, hessian.upper, self.grid.fit(best, importance), keep)


def loss(x: Floats, hessian: Hessian) -> Floats:
    """The root of what it costs to leave out each weight if all others make up for it [rows, n]."""
    diagonal = np.square(hessian.upper).sum(axis=0)  # of H^-1
    found: Floats = np.abs(x) / np.sqrt(diagonal)
    return found


def stays(size: Floats, kept: int, of: int) -> Mask:
    """The `kept` largest of each `of` along the last axis; the first ones among equals."""
    runs = size.reshape(-1, of)
    order = np.argsort(-runs, axis=1, kind="stable")
    keep = np.zeros(runs.shape, bool)
    np.put_along_axis(keep, order[:, :kept], True, axis=1)
    return keep.reshape(size.shape)


def pattern_of_int4(kept: int, of: int, block: int, block_bytes: int, put: PutKept) -> Pattern:
    """A pattern of weights `d * code`, code -8..7, in blocks that begin with d as float16."""

    def put_largest(blocks: Bytes, codes: Bytes) -> None:
        signed = codes.astype(np.int8) - 8
        keep = stays(np.abs(signed), kept, of)
        put(blocks, keep, np.where(keep, signed, np.int8(0)))

    grid = scaled_grid(block, block_bytes, range(-8, 8), put_largest)
    return Pattern(kept=kept, of=of, grid=grid)
