"""Which groups a group-sparse matrix keeps, and how the rest makes up for those that go.

With the Hessian of the outputs' squared error (X^T X of calibration inputs) a group's score is what
it costs to leave out one of its weights, w^2 / [H^-1]_jj (optimal brain surgeon), on average. Then
columns are taken from left to right, and what a column loses is put on those behind it, as
SparseGPT (arXiv 2301.00774) and GPTQ (2210.17323) do: once for pruning, which settles the rows'
scales, and once for rounding.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from headrace.sparse import gqs
from headrace.sparse.format import Bytes, Floats
from headrace.sparse.gptq import inverse_factor
from headrace.sparse.gqs import Mask

# For a block of columns and its first one: what column i of it becomes, (i, values) -> values.
Block = Callable[[int, Floats], Callable[[int, Floats], Floats]]


def scores(weights: Floats, group: int, variance: Floats | None = None) -> Floats:
    """The mean of w^2 * variance over each group: float32 [rows, n / group].

    Args:
        weights: float32 [rows, n].
        variance: what a column's error costs [n]: the mean square of its inputs, or 1 / [H^-1]_jj;
            None: as much for all columns.
    """
    rows, n = weights.shape
    cost = np.square(weights, dtype=np.float32)
    if variance is not None:
        cost *= variance
    mean: Floats = cost.reshape(rows, gqs.columns_of(n, group), group).mean(axis=2)
    return mean


def kept(score: Floats, rate: float, *, by_row: bool = False) -> Mask:
    """The groups that stay: all but the `rate` with the lowest scores, of all or of each row.

    Raises:
        ValueError: the rate is not in 0..1.
    """
    if not 0 <= rate <= 1:
        raise ValueError(f"a share of groups to leave out is 0 to 1, not {rate}")
    flat = score if by_row else score.reshape(1, -1)
    order = np.argsort(flat, axis=1, kind="stable")
    keep = np.ones(flat.shape, bool)
    np.put_along_axis(keep, order[:, : round(rate * flat.shape[1])], False, axis=1)
    return keep.reshape(score.shape)


def _sweep(w: Floats, upper: Floats, width: int, block: Block) -> None:
    """Replace the columns of `w` [rows, n], and put what each loses on those behind it."""
    for at in range(0, w.shape[1], width):
        end = at + width
        errors = np.empty((len(w), width), np.float32)
        become = block(at, w[:, at:end])
        for i in range(width):
            column = at + i
            value = become(i, w[:, column])
            errors[:, i] = (w[:, column] - value) / upper[column, column]
            w[:, column + 1 : end] -= np.outer(errors[:, i], upper[column, column + 1 : end])
            w[:, column] = value
        w[:, end:] -= errors @ upper[at:end, end:]


def encode(
    weights: Floats,
    rate: float,
    group: int,
    *,
    mean_square: Floats | None = None,
    hessian: Floats | None = None,
    by_row: bool = False,
) -> Bytes:
    """Prune and code a matrix; see `headrace.sparse.gqs` for the bytes.

    Args:
        weights: float32 [rows, n].
        rate: share of the groups that are left out.
        group: 16, 32 or 64.
        mean_square: of the inputs [n]; weights are then scored by it.
        hessian: X^T X of the inputs [n, n]; scores weights, and moves those that stay.
        by_row: prune every row alike; else the whole matrix's groups compete.
    """
    w = np.array(weights, np.float32)
    if hessian is None:
        return gqs.pack_weights(w, kept(scores(w, group, mean_square), rate, by_row=by_row), group)
    upper = inverse_factor(np.asarray(hessian, np.float32))
    cost = 1 / np.square(upper).sum(axis=0)  # 1 / [H^-1]_jj
    keep = kept(scores(w, group, cost), rate, by_row=by_row)

    def prune(at: int, now: Floats) -> Callable[[int, Floats], Floats]:
        stays = keep[:, at // group]
        return lambda i, values: np.where(stays, values, 0)

    _sweep(w, upper, group, prune)
    rows, columns = keep.shape
    row, column = np.nonzero(keep)
    d = gqs.row_scales(w.reshape(rows, columns, group)[row, column], row, rows)
    scales = np.zeros((rows, columns), np.uint8)
    offsets = np.zeros((rows, columns), np.int8)
    codes = np.zeros((rows, columns, group), np.uint8)

    def code(at: int, now: Floats) -> Callable[[int, Floats], Floats]:
        c = at // group
        s, o = scales[:, c], offsets[:, c]
        s[:], o[:] = gqs.fit(gqs.in_steps(now, d))

        def nearest(i: int, values: Floats) -> Floats:
            q = gqs.codes_of(gqs.in_steps(values[:, None], d), s, o)[:, 0]
            codes[:, c, i] = q
            return np.where(keep[:, c], (q * s + 16 * o.astype(np.float32)) * d, 0)

        return nearest

    _sweep(w, upper, group, code)
    counts = keep.sum(axis=1).astype(np.int64)
    at = (row, column)
    return gqs.pack(gqs.Groups(counts, d, column, scales[at], offsets[at], codes[at]), group)
