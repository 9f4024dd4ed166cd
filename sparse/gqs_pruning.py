"""Which groups a group-sparse matrix keeps, and how the rest makes up for those that go.

With the Hessian H of the outputs' squared error (X^T X of calibration inputs) a group's score is
what it costs to leave it out if all other weights of the row make up for it (optimal brain
surgeon): w^T ([H^-1]_gg)^-1 w. Then columns are taken from left to right, and what a column loses
is put on those behind it, as SparseGPT (arXiv 2301.00774) and GPTQ (2210.17323) do: once for
pruning, which settles the rows' scales, and once for rounding.

All rows keep about the same: of each the best groups fill the first unit of 128 weights, the next
best the second, and so on up to the same unit in all rows, and of the units that come next those
stay that are worth most. To let rows compete for more than that lowers the error of the matrix, but
ruins models: small outputs count, too. So no unit is half empty but where a row ends, and the size
of a matrix follows from its shape and the rate.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from headrace.sparse import gqs
from headrace.sparse.format import Bytes, Floats
from headrace.sparse.gptq import inverse_factor
from headrace.sparse.gqs import Groups, Mask

_BLOCK = 128  # inputs after which those behind are mended, by one product

# What an input's weights become, (its number, weights [rows]) -> weights.
Become = Callable[[int, Floats], Floats]


def scores(weights: Floats, group: int, cost: Floats | None = None) -> Floats:
    """What it costs to leave out each group: float32 [rows, n / group].

    Args:
        weights: float32 [rows, n].
        cost: what a column's error costs [n], such as the mean square of its inputs; or
            `group_costs`; None: as much for all columns.
    """
    rows, n = weights.shape
    columns = gqs.columns_of(n, group)
    blocks = np.asarray(weights, np.float32).reshape(rows, columns, group)
    if cost is None:
        times = blocks
    elif cost.ndim == 1:
        times = blocks * cost.reshape(columns, group)
    else:
        times = np.matmul(blocks.transpose(1, 0, 2), cost).transpose(1, 0, 2)
    found: Floats = (times * blocks).sum(axis=2)
    return found


def group_costs(upper: Floats, group: int) -> Floats:
    """([H^-1]_gg)^-1 of each group of columns, float32 [n / group, G, G].

    Args:
        upper: U with U^T U = H^-1: see `headrace.sparse.gptq`.
    """
    n = len(upper)
    found = np.empty((gqs.columns_of(n, group), group, group), np.float32)
    for c in range(len(found)):
        some = upper[: (c + 1) * group, c * group : (c + 1) * group].astype(np.float64)
        found[c] = np.linalg.inv(some.T @ some)
    return found


def n_units(rows: int, n: int, group: int, rate: float) -> int:
    """Units of a matrix of `rows` x `n` weights of which the share `rate` at least is left out.

    Raises:
        ValueError: the rate is not in 0..1.
    """
    if not 0 <= rate <= 1:
        raise ValueError(f"a share of weights to leave out is 0 to 1, not {rate}")
    most = rows * -(-gqs.columns_of(n, group) * group // gqs.UNIT)
    return most if rate == 0 else int((1 - rate) * rows * n / gqs.UNIT + 1e-6)


def kept(score: Floats, group: int, rate: float) -> Mask:
    """The groups that stay, of those scored [rows, columns]: the best units of each row."""
    rows, columns = score.shape
    per_unit = gqs.UNIT // group
    every, more = divmod(n_units(rows, columns * group, group, rate), rows)
    order = np.argsort(-score, axis=1, kind="stable")
    best = np.take_along_axis(score, order, axis=1)
    value = best[:, every * per_unit : (every + 1) * per_unit].sum(axis=1)
    counts = np.full(rows, every * per_unit)
    counts[np.argsort(-value, kind="stable")[:more]] += per_unit
    keep = np.zeros(score.shape, bool)
    np.put_along_axis(keep, order, np.arange(columns) < counts[:, None], axis=1)
    return keep


def _sweep(w: Floats, upper: Floats, inner: int, become: Become) -> None:
    """Replace the weights `w` [n, rows] of each input, and put what is lost on those behind it.

    What `inner` inputs from a multiple of it on have is up to date when the first of them is taken.
    """
    n, rows = w.shape
    errors = np.empty((_BLOCK, rows), np.float32)
    for begin in range(0, n, _BLOCK):
        end = min(begin + _BLOCK, n)
        for first in range(begin, end, inner):
            last = min(first + inner, end)
            if first > begin:
                w[first:last] -= upper[begin:first, first:last].T @ errors[: first - begin]
            for i in range(first, last):
                v = w[i]
                if i > first:
                    v -= upper[first:i, i] @ errors[first - begin : i - begin]
                value = become(i, v)
                np.subtract(v, value, out=errors[i - begin])
                errors[i - begin] /= upper[i, i]
                w[i] = value
        if end < n:
            w[end:] -= upper[begin:end, end:].T @ errors[: end - begin]


def encode_rows(weights: Floats, keep: Mask, group: int, upper: Floats | None = None) -> Groups:
    """Prune and code some rows of a matrix; rows do not depend on each other.

    Args:
        weights: float32 [rows, n], of finite numbers.
        keep: groups that stay [rows, n / group].
        upper: U of the inputs' Hessian (`headrace.sparse.gptq.inverse_factor`); moves the weights
            that stay. None: they are rounded to nearest.
    """
    if upper is None:
        return gqs.code(weights, keep, group)
    rows, columns = keep.shape
    w = np.array(weights.T, np.float32, order="C")
    stays = np.ascontiguousarray(keep.T)

    def prune(i: int, values: Floats) -> Floats:
        return np.where(stays[i // group], values, np.float32(0))

    _sweep(w, upper, group, prune)
    row, column = np.nonzero(keep)
    d = gqs.row_scales(w.T.reshape(rows, columns, group)[row, column], row, rows)
    scales = np.zeros((columns, rows), np.uint8)
    offsets = np.zeros((columns, rows), np.int8)
    codes = np.zeros((columns, group, rows), np.uint8)
    inverse = np.where(d > gqs.SMALLEST, 1 / np.maximum(d, gqs.SMALLEST), 0).astype(np.float32)

    def code(i: int, values: Floats) -> Floats:
        c, j = divmod(i, group)
        if j == 0:
            now = np.ascontiguousarray(w[i : i + group].T) * inverse[:, None]
            scales[c], offsets[c] = gqs.fit(now)
        s, o = scales[c].astype(np.float32), 16 * offsets[c].astype(np.float32)
        q = np.rint((values * inverse - o) / np.maximum(s, 1)).clip(0, 15)
        codes[c, j] = q
        return np.where(stays[c], (q * s + o) * d, np.float32(0))

    _sweep(w, upper, group, code)
    counts = keep.sum(axis=1).astype(np.int64)
    return Groups(
        counts, d, column, scales[column, row], offsets[column, row], codes[column, :, row]
    )


def encode(
    weights: Floats, rate: float, group: int, *,
    mean_square: Floats | None = None, hessian: Floats | None = None,
) -> Bytes:  # fmt: skip
    """Prune and code a matrix; see `headrace.sparse.gqs` for the bytes.

    Args:
        weights: float32 [rows, n].
        rate: share of the weights that are left out, at least.
        group: 16, 32 or 64.
        mean_square: of the inputs [n]; weights are then scored by it.
        hessian: X^T X of the inputs [n, n]; scores weights, and moves those that stay.
    """
    upper = None if hessian is None else inverse_factor(np.asarray(hessian, np.float32))
    cost = mean_square if upper is None else group_costs(upper, group)
    keep = kept(scores(weights, group, cost), group, rate)
    return gqs.pack(encode_rows(weights, keep, group, upper), group)
