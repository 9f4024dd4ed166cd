"""GPTQ: rounding that lets later inputs make good what earlier ones were rounded by.

Source: Frantar et al., "GPTQ" (2210.17323). With the inputs X of a matrix on some text and
H = X^T X, what rounding one input's weights does to X W^T is undone as far as the inputs that are
still to be rounded can: the rows of U, where U^T U is the inverse of H, say how. Scales are those
that the format fits to the weights beforehand ("static groups"). Inputs keep their order, or come
in another, for which U is then made: those that are largest first ("act order").

The weights of a block of inputs are mended in place, those beyond it by one product at its end, so
that BLAS does the work.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from headrace.sparse.format import Bytes, Floats
from headrace.sparse.grid import Grid, inverse

DAMPING = 0.01  # of the mean of H's diagonal, added to it
BLOCK = 128
_INNER = 32
_LEAST = 64  # triangles up to this size are inverted directly


def largest_first(h: Floats) -> NDArray[np.intp]:
    """The inputs by their mean squares: those that errors matter most in, while others are left."""
    found: NDArray[np.intp] = np.argsort(-np.diag(h), kind="stable")
    return found


def inverse_factor(
    h: Floats, dtype: type = np.float64, order: NDArray[np.intp] | None = None
) -> Floats:
    """U, upper triangular float32 [n, n] with U^T U = (H + damping)^-1.

    Args:
        h: float32 [n, n], symmetric, of finite numbers.
        dtype: of the work, which takes three matrices of it.
        order: in which inputs come; None: as they are.

    Raises:
        numpy.linalg.LinAlgError: H is not positive definite.
    """
    back: Any = slice(None, None, -1) if order is None else order[::-1]
    a: Floats = h[back][:, back].astype(dtype)
    diagonal = np.einsum("ii->i", a)  # a view
    mean = float(diagonal.mean())
    diagonal[diagonal == 0] = mean or 1.0  # inputs that never came
    diagonal += DAMPING * (mean or 1.0)
    # H = R R^T with R upper triangular is a Cholesky decomposition from the end; U = R^-1.
    lower = np.linalg.cholesky(a)
    del a, diagonal
    _invert_lower(lower)
    return np.ascontiguousarray(lower[::-1, ::-1], np.float32)


def _invert_lower(a: Floats) -> None:
    """Invert a lower triangular matrix in place."""
    n = len(a)
    if n <= _LEAST:
        a[:] = np.tril(np.linalg.inv(a))
        return
    k = n // 2
    first, last = a[:k, :k], a[k:, k:]
    _invert_lower(first)
    _invert_lower(last)
    a[k:, :k] = -(last @ (a[k:, :k] @ first))


def gptq(
    x: Floats, grid: Grid, u: Floats, raw: Bytes, stays: NDArray[np.bool_] | None = None,
    order: NDArray[np.intp] | None = None,
) -> Bytes:  # fmt: skip
    """Round some rows of a matrix; rows do not depend on each other.

    Args:
        x: float32 [rows, n], of finite numbers.
        u: `inverse_factor` of the matrix's H.
        raw: bytes of the format whose scales suit the weights: `Grid.fit`.
        stays: which weights may be other than zero [rows, n], on a grid without offsets that has
            that level; None: all.
        order: that `u` was made for.

    Returns:
        raw bytes of the format, uint8 [rows, row_bytes].
    """
    rows, n = x.shape
    scale, offset = grid.scales(raw)
    scale = np.ascontiguousarray(scale.T)  # [groups, rows]
    step = inverse(scale)
    shift = None if offset is None else np.ascontiguousarray(offset.T)
    at_input = np.arange(n) if order is None else order
    w = x.T[at_input]  # [n, rows], a copy: the weights of an input lie side by side
    codes = np.empty((n, rows), np.uint8)
    goes = None if stays is None else ~stays.T[at_input]
    zero = grid.nearest(np.zeros(1, np.float32))[0]
    table, nearest, groups = grid.table, grid.nearest, at_input // grid.group
    errors = np.empty((BLOCK, rows), np.float32)
    for begin in range(0, n, BLOCK):
        end = min(begin + BLOCK, n)
        for first in range(begin, end, _INNER):
            last = min(first + _INNER, end)
            if first > begin:
                w[first:last] -= u[begin:first, first:last].T @ errors[: first - begin]
            columns = np.ascontiguousarray(u[first:last, first:last].T)
            for i in range(first, last):
                v, g = w[i], groups[i]
                if i > first:
                    v -= columns[i - first, : i - first] @ errors[first - begin : i - begin]
                at = v if shift is None else v - shift[g]
                codes[i] = nearest(at * step[g])
                if goes is not None:
                    codes[i, goes[i]] = zero
                q = table[codes[i]]
                q *= scale[g]
                if shift is not None:
                    q += shift[g]
                np.subtract(v, q, out=q)
                np.divide(q, u[i, i], out=errors[i - begin])
        if end < n:
            w[end:] -= u[begin:end, end:].T @ errors[: end - begin]
    found = np.empty((rows, n), np.uint8)
    found[:, at_input] = codes.T
    return grid.put(raw, found)


def unmade(u: Floats) -> Floats:
    """How much an error in each input matters for scales, the largest being 1: float32 [n].

    It is what those behind it cannot make good: of inputs that go together closely, or that are
    all large at once, little, however large they are.

    Args:
        u: `inverse_factor` of H.

    Returns:
        in the order that `u` was made for.
    """
    left = 1 / np.square(np.diag(u))
    found: Floats = left / left.max()
    return found


def output_errors(h: Floats, difference: Floats) -> NDArray[np.float64]:
    """The sums of squares of X D^T for a difference D of weights, float32 [rows, n]: [rows]."""
    found: NDArray[np.float64] = np.einsum("ij,ij->i", difference @ h, difference, dtype=np.float64)
    return found


def further(weights: Floats, h: Floats, moved: Floats, nearest: Floats) -> NDArray[np.bool_]:
    """The rows whose outputs are further off with weights that were moved: bool [rows].

    Where inputs go together closely, what makes good for others may be beyond what scales that
    were fitted before can say. Then it is cut, and what is lost is lost for all inputs behind it.

    Args:
        weights, moved, nearest: those of the source, and as two ways of rounding leave them,
            float32 [rows, n].
        h: X^T X of the inputs.
    """
    with np.errstate(all="ignore"):  # what is beyond a format may come out as no finite number
        found = output_errors(h, moved - weights)
        return ~(found <= output_errors(h, nearest - weights))
