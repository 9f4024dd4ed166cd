"""Blocks of a matrix that suit what it reads: BitStack with signs rounded as GPTQ does.

With the inputs X of a matrix on some text and H = X^T X, what counts of a residual R is tr R H R^T,
the square of what it adds to the output. The paper scales inputs by how large they are, which is
the diagonal of H, and takes the signs of R. Here the rest of H counts, too:

- a sign is chosen after those before it, of the residual as these have mended it (`sparse/gptq.py`
  has it for grids: here a weight's two levels are its magnitude and that negated);
- then U is fitted to the signs by least squares, each row for itself.

On SmolLM2 a block so made leaves half as much as one without, at each level of the stack. What is
left is of the weights as they were, not as they were mended, so that the next block begins there.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from headrace.sparse.bitstack import Block, filled, leading
from headrace.sparse.format import Bytes, Floats
from headrace.sparse.gptq import BLOCK

_INNER = 32
_STEPS = 3  # of conjugate gradients: with a fourth, U is off no less


def decompose_for(
    w: Floats, h: Floats, factor: Floats, rank: int, levels: int
) -> Iterator[tuple[Block, Floats]]:
    """The blocks of float32 [m, n], each with what is left after it: float32 [m, n].

    Args:
        w: the matrix.
        h: sum of x x^T over its inputs, float32 [n, n].
        factor: `headrace.sparse.gptq.inverse_factor` of it.
        rank: vectors of a block.
        levels: blocks.
    """
    scale = _usable(np.sqrt(np.maximum(np.diag(h), 0)))
    left = w.astype(np.float32)
    rng = np.random.default_rng(0)
    for _ in range(levels):
        u, v = leading(np.abs(left * scale), min(rank, *left.shape), rng)
        # The paper has 1 / scale in what makes the inputs, which is the same but for matrices whose
        # inputs are shared with others.
        half = filled(v / scale, rank)
        v = half.astype(np.float32)
        u = filled(u.T, rank).T.astype(np.float32)
        positive = _signs(left, u @ v, factor)
        block = Block(positive, _fitted(left, positive, u, v, h).astype(np.float16), half)
        left = left - block.dense()
        yield block, left


def error(left: Floats, h: Floats | None) -> float:
    """The square of what weights add to an output: for inputs of which H is known, or all alike."""
    return float((left * (left if h is None else left @ h)).sum(dtype=np.float64))


def _usable(scale: Floats) -> Floats:
    """Scales around 1, none of them so near 0 that 1 / scale says nothing in float16."""
    scale = np.maximum(scale.astype(np.float32), 1e-3 * float(scale.mean()) + 1e-12)
    usable: Floats = scale / np.exp(np.log(scale).mean())
    return usable


def _signs(left: Floats, size: Floats, factor: Floats) -> Bytes:
    """Which weights are positive: bool [m, n]; `size` is what they then are."""
    m, n = left.shape
    w, levels = np.ascontiguousarray(left.T), np.ascontiguousarray(size.T)
    positive = np.empty((n, m), bool)
    errors = np.empty((BLOCK, m), np.float32)
    for begin in range(0, n, BLOCK):
        end = min(begin + BLOCK, n)
        for first in range(begin, end, _INNER):
            last = min(first + _INNER, end)
            if first > begin:
                w[first:last] -= factor[begin:first, first:last].T @ errors[: first - begin]
            for i in range(first, last):
                v, level = w[i], levels[i]
                if i > first:
                    v -= factor[first:i, i] @ errors[first - begin : i - begin]
                # Magnitudes of low rank may be negative.
                np.equal(v >= 0, level >= 0, out=positive[i])
                errors[i - begin] = (v - np.where(positive[i], level, -level)) / factor[i, i]
        if end < n:
            w[end:] -= factor[begin:end, end:].T @ errors[: end - begin]
    return np.ascontiguousarray(positive.T)


def _fitted(left: Floats, positive: Bytes, u: Floats, v: Floats, h: Floats) -> Floats:
    """U for these signs and V, float32 [m, k]: least squares by conjugate gradients from `u`.

    Rows do not depend on each other: each has steps of its own.
    """
    sign = np.where(positive, np.float32(1), np.float32(-1))
    # Vectors differ by orders of magnitude.
    scale = (v * v) @ np.diag(h)
    scale = 1 / np.maximum(scale, float(scale.max()) * 1e-12 + 1e-30)

    def down(residual: Floats) -> Floats:
        found: Floats = (sign * (residual @ h)) @ v.T
        return found

    gradient = down(left - sign * (u @ v))
    step = gradient * scale
    along = (gradient * step).sum(axis=1, dtype=np.float64)
    for _ in range(_STEPS):
        bent = down(sign * (step @ v))
        far = _ratio(along, (step * bent).sum(axis=1, dtype=np.float64))
        u = u + far * step
        gradient = gradient - far * bent
        towards = gradient * scale
        before, along = along, (gradient * towards).sum(axis=1, dtype=np.float64)
        step = towards + _ratio(along, before) * step
    return u


def _ratio(a: Floats, b: Floats) -> Floats:
    """a / b of each row, 0 where there is nothing left: float32 [m, 1]."""
    found = np.divide(a, b, out=np.zeros_like(a), where=b > 0)
    return found.astype(np.float32)[:, None]
