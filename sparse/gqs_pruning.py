"""Which groups a group-sparse matrix keeps, and how the rest makes up for those that go.

With the Hessian H of the outputs' squared error (X^T X of calibration inputs) a group's score is
what it costs to leave it out if all other weights of the row make up for it (optimal brain
surgeon): w^T ([H^-1]_gg)^-1 w. What stays in a row then gets the weights with the least error of
the output, by conjugate gradients: the sweep of SparseGPT (arXiv 2301.00774), which puts what a
column loses on those behind it only, leaves half as much error again. Rounding goes from left to
right as in GPTQ (2210.17323).

All rows keep about the same: of each the best groups fill the first unit of 128 weights, the next
best the second, and so on up to the same unit in all rows, and of the units that come next those
stay that are worth most. To let rows compete for more than that lowers the error of the matrix, but
ruins models: small outputs count, too. So no unit is half empty but where a row ends, and the size
of a matrix follows from its shape and the rate.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from headrace.sparse import gqs
from headrace.sparse.format import Floats
from headrace.sparse.gptq import DAMPING, further
from headrace.sparse.gqs import Groups, Mask

_TINY = np.float32(1e-30)
_BLOCK = 128  # inputs after which those behind are mended, by one product

_STEPS = 20  # of conjugate gradients: more change the fourth digit of the error


class Hessian(NamedTuple):
    """H = X^T X of the inputs of a matrix [n, n], and U with U^T U = H^-1."""

    h: Floats
    upper: Floats


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


def left_out(rows: int, n: int, group: int, rate: float) -> float:
    """The share that really goes: rows that fill no whole units lose more than `rate`."""
    columns = gqs.columns_of(n, group)
    per_unit = gqs.UNIT // group
    every, more = divmod(n_units(rows, columns * group, group, rate), rows)
    stay = (rows - more) * min(every * per_unit, columns)
    stay += more * min((every + 1) * per_unit, columns)
    return 1 - stay / (rows * columns)


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


def refit(weights: Floats, stays: Mask, h: Floats) -> Floats:
    """The weights with the least error of the outputs, of those that are zero where none stays.

    Args:
        weights: float32 [rows, n].
        stays: bool [rows, n].
        h: X^T X of the inputs, float32 [n, n].
    """
    diagonal = np.diag(h)
    damping = np.float32(DAMPING * float(diagonal.mean()) or 1.0)
    scale = (1 / (diagonal + damping)).astype(np.float32)

    def gradient(v: Floats) -> Floats:
        return np.where(stays, v @ h + damping * v, np.float32(0))

    x = np.where(stays, weights, np.float32(0))
    left = gradient(weights - x)
    to: Floats = left * scale
    size = np.einsum("ij,ij->i", left, to)
    for _ in range(_STEPS):
        moved = gradient(to)
        along = size / np.maximum(np.einsum("ij,ij->i", to, moved), _TINY)
        x += along[:, None] * to
        left -= along[:, None] * moved
        now = np.einsum("ij,ij,j->i", left, left, scale)
        to = left * scale + (now / np.maximum(size, _TINY))[:, None] * to
        size = now
    return x


def _round(weights: Floats, keep: Mask, group: int, upper: Floats) -> Groups:
    """GPTQ of the groups that stay; what lies between them stays zero."""
    rows, columns = keep.shape
    w = np.array(weights.T, np.float32, order="C")
    stays = np.ascontiguousarray(keep.T)
    row, column = np.nonzero(keep)
    d = gqs.row_scales(weights.reshape(rows, columns, group)[row, column], row, rows)
    inverse = np.where(d > gqs.SMALLEST, 1 / np.maximum(d, gqs.SMALLEST), 0).astype(np.float32)
    scales = np.zeros((columns, rows), np.uint8)
    offsets = np.zeros((columns, rows), np.int8)
    codes = np.zeros((columns, group, rows), np.uint8)
    errors = np.empty((_BLOCK, rows), np.float32)
    n = len(w)
    for begin in range(0, n, _BLOCK):
        end = min(begin + _BLOCK, n)
        for first in range(begin, end, group):
            last, c = first + group, first // group
            if first > begin:
                w[first:last] -= upper[begin:first, first:last].T @ errors[: first - begin]
            now = np.ascontiguousarray(w[first:last].T) * inverse[:, None]
            scales[c], offsets[c] = gqs.fit(now)
            s, o = scales[c].astype(np.float32), 16 * offsets[c].astype(np.float32)
            for i in range(first, last):
                v = w[i]
                if i > first:
                    v -= upper[first:i, i] @ errors[first - begin : i - begin]
                q = np.rint((v * inverse - o) / np.maximum(s, 1)).clip(0, 15)
                codes[c, i - first] = q
                value = np.where(stays[c], (q * s + o) * d, np.float32(0))
                errors[i - begin] = (v - value) / upper[i, i]
        if end < n:
            w[end:] -= upper[begin:end, end:].T @ errors[: end - begin]
    at = (column, row)
    counts = keep.sum(axis=1).astype(np.int64)
    return Groups(counts, d, column, scales[at], offsets[at], codes[column, :, row])


def encode_rows(
    weights: Floats, keep: Mask, group: int, hessian: Hessian | None = None
) -> tuple[Groups, Mask]:
    """Prune and code some rows of a matrix; rows do not depend on each other.

    Args:
        weights: float32 [rows, n], of finite numbers.
        keep: groups that stay [rows, n / group].
        hessian: of the inputs; moves the weights that stay. None: they are rounded to nearest.

    Returns:
        the groups, and the rows [rows] that are rounded to nearest in spite of the Hessian, as
        their outputs are nearer to those of the source then.
    """
    nearest = gqs.code(weights, keep, group)
    if hessian is None:
        return nearest, np.zeros(len(weights), bool)
    with np.errstate(all="ignore"):  # weights that are moved may be beyond what rows can say
        best = refit(weights, np.repeat(keep, group, axis=1), hessian.h)
        moved = _round(best, keep, group, hessian.upper)
        n = weights.shape[1]
        back = further(weights, hessian.h, gqs.dense(moved, n, group), gqs.dense(nearest, n, group))
    of_group = back[np.repeat(np.arange(len(weights)), moved.counts)]
    return Groups(
        moved.counts, np.where(back, nearest.row_scales, moved.row_scales), moved.columns,
        np.where(of_group, nearest.scales, moved.scales),
        np.where(of_group, nearest.offsets, moved.offsets),
        np.where(of_group[:, None], nearest.codes, moved.codes),
    ), back  # fmt: skip
