"""Matrices of one file turned into group-sparse ones, some rows at a time.

How many groups a row keeps depends on the other rows, so a matrix is read twice: once to score its
groups, once to code those that stay.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from headrace.errors import UnsupportedError
from headrace.families.decoder import Matrix
from headrace.loaders.gguf import TensorInfo
from headrace.share import share
from headrace.sparse import gqs, gqs_pruning
from headrace.sparse.format import Floats
from headrace.sparse.gqs import GroupFormat
from headrace.sparse.gqs_pruning import Hessian

Write = Callable[[int, np.ndarray], None]  # offset in the tensor, bytes
Read = Callable[[int, int], Floats]  # the first row, and the end -> float32 [rows, columns]


@dataclass(frozen=True)
class PrunedMatrix:
    """A matrix as it will be: of its weights at least the share `sparsity` is left out."""

    matrix: Matrix
    info: TensorInfo
    format: GroupFormat
    sparsity: float

    @property
    def packed_bytes(self) -> int:
        """Bytes in the file, which follow from the shape and the share."""
        rows, columns = self.matrix.rows, self.matrix.columns
        units = gqs_pruning.n_units(rows, columns, self.format.group, self.sparsity)
        return gqs.units_offset(rows) + units * self.format.unit_bytes


def choosing_bytes(matrix: Matrix, group: int) -> int:
    """Bytes that choosing the groups of a matrix takes."""
    return matrix.rows * (matrix.columns // group) * 32


def prune(
    wanted: PrunedMatrix, read: Read, step: int, n_threads: int, write: Write,
    cost: Floats | None = None, hessian: Hessian | None = None,
) -> int:  # fmt: skip
    """Write a group-sparse matrix; `write` is called from several threads at once.

    Args:
        read: gives rows of the source, all of them finite numbers.
        step: rows that a thread has in memory at a time.
        cost: of inputs or groups; see `headrace.sparse.gqs_pruning.scores`.
        hessian: of the inputs: weights that stay make up for those that go.

    Returns:
        in how many rows they could not.

    Raises:
        what `read` does.
        UnsupportedError: a weight is beyond what the format can hold.
    """
    rows, columns, group = wanted.matrix.rows, wanted.matrix.columns, wanted.format.group
    score = np.empty((rows, columns // group), np.float32)

    def rate(first: int) -> None:
        last = min(first + step, rows)
        weights = read(first, last)
        with np.errstate(all="ignore"):
            found = gqs_pruning.scores(weights, group, cost)
            most = np.abs(weights).max(initial=0)
        if not np.isfinite(found).all():
            raise UnsupportedError(
                f"a weight of {most:.6g} is beyond what {wanted.format.name} holds; use bf16 or "
                "f32", path=wanted.info.path, tensor=wanted.info.name,
            )  # fmt: skip
        score[first:last] = found

    share(range(0, rows, step), rate, n_threads, lambda: None)
    keep = gqs_pruning.kept(score, group, wanted.sparsity)
    row_scales = np.zeros(rows, np.float32)
    first_unit = np.zeros(rows + 1, np.int64)
    np.cumsum(-(-keep.sum(axis=1) // wanted.format.per_unit), out=first_unit[1:])
    unmoved = np.zeros(rows, bool)
    begin, unit = gqs.units_offset(rows), wanted.format.unit_bytes

    def work(first: int) -> None:
        last = min(first + step, rows)
        weights = read(first, last)
        groups, unmoved[first:last] = gqs_pruning.encode_rows(
            weights, keep[first:last], group, hessian
        )
        row_scales[first:last] = groups.row_scales
        write(begin + int(first_unit[first]) * unit, gqs.pack_units(groups, group)[1])

    share(range(0, rows, step), work, n_threads, lambda: None)
    write(0, gqs.pack_head(first_unit, row_scales))
    return int(unmoved.sum())
