"""Weights that are no finite numbers: what is made of them is of no use, and nobody would see."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from headrace.errors import ModelFileError
from headrace.families.decoder import Matrix, tensor_of
from headrace.loaders.gguf import ModelFile, TensorInfo, TensorReader
from headrace.placing import PlacedMatrix
from headrace.rows import raw_rows
from headrace.sparse.format import TILE_ROWS, Floats
from headrace.sparse.registry import FORMATS

_WEIGHTS = 1 << 20  # looked at at a time


def check_matrix(reader: TensorReader, matrix: Matrix, info: TensorInfo) -> None:
    """Look at the weights of a matrix.

    Raises:
        ModelFileError: one is no finite number, the first of which is named; or it cannot be read.
    """
    placed = PlacedMatrix(matrix, info, FORMATS["f32"])
    step = -(-max(1, _WEIGHTS // matrix.columns) // TILE_ROWS) * TILE_ROWS
    for first in range(0, matrix.rows, step):
        last = min(first + step, matrix.rows)
        rows = raw_rows(reader, placed, first, last).view(np.float32)[: last - first]
        if not np.isfinite(rows).all():
            raise not_finite(info, rows, first)


def not_finite(info: TensorInfo, weights: Floats, first: int = 0) -> ModelFileError:
    """The error of weights of which some are no finite numbers: it names the first one.

    Args:
        weights: float32 [n], or [rows, columns] from row `first` on.
    """
    at = [int(i) for i in np.argwhere(~np.isfinite(weights))[0]]
    value, at[0] = weights[tuple(at)], at[0] + first
    where = f"row {at[0]}, column {at[1]}" if len(at) == 2 else f"element {at[0]}"
    return ModelFileError(
        f"{where} is {value}, no finite number: the file is damaged, or something went wrong when "
        "it was made; get it again, or another one", path=info.path, tensor=info.name,
    )  # fmt: skip


def check_weights(model: ModelFile, matrices: Iterable[Matrix]) -> None:
    """Look at all weights of matrices.

    Raises:
        what `check_matrix` does.
    """
    with TensorReader() as reader:
        for matrix in matrices:
            check_matrix(reader, matrix, tensor_of(model, matrix))
