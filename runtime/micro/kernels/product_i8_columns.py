"""Rows of bytes times weights on chips whose vectors multiply by a single number.

A vector has the sums of 16 columns of weights, which lie side by side for each input in turn
(`vwmacc.vx` of RISC-V's vectors): 4 rows share what is loaded of them. Rows are copied first, so
that codes may be written over them.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from headrace.micro.kernels.copying import BEHIND, copy_of
from headrace.micro.kernels.product_i8 import Product
from headrace.micro.kernels.requantise import scaled, store_first, within
from headrace.targets.simd import (
    add_products,
    get_i8,
    int32,
    load_i32,
    ptr_to_int,
    shl_by,
    store_i8,
)
from headrace.targets.target import Target

ROWS, COLUMNS, PIECE = 4, 16, 16
_BIASES = 4 * COLUMNS  # bytes
_copy = copy_of(COLUMNS)


def packed(weights: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """Blocks of 16 columns: their biases, then the weights of each input in turn; uint8."""
    m, k = weights.shape
    whole = np.pad(weights, ((0, -m % COLUMNS), (0, -k % PIECE)))
    in_turn = whole.reshape(-1, COLUMNS, whole.shape[1]).swapaxes(1, 2)
    flat = np.ascontiguousarray(in_turn).reshape(len(in_turn), -1)
    biases = np.pad(bias.astype(np.int32), (0, -m % COLUMNS)).reshape(-1, COLUMNS).view(np.int8)
    return np.concatenate([biases, flat], axis=1).view(np.uint8)


def _step(
    rows: int, i: int, stream: Any, x: Any, y: Any, z: Any, v: Any, s0: Any, s1: Any, s2: Any,
    s3: Any,
) -> Any:  # fmt: skip
    """The products of input i from where all are."""
    at = stream + i * COLUMNS
    s0 = add_products(s0, at, int32(get_i8(x + i)))
    if rows == 4:
        s1 = add_products(s1, at, int32(get_i8(y + i)))
        s2 = add_products(s2, at, int32(get_i8(z + i)))
        s3 = add_products(s3, at, int32(get_i8(v + i)))
    return s0, s1, s2, s3


def _put(
    c: Any, sums: Any, multipliers: Any, downs: Any, ups: Any, zero: Any, low: Any, high: Any,
    count: Any, room: Any,
) -> None:  # fmt: skip
    if ptr_to_int(ups) != 0:
        sums = shl_by(sums, load_i32(ups, 1, 0))
    sums = scaled(sums, load_i32(multipliers, 1, 0), load_i32(downs, 1, 0))
    codes = within(sums + zero, low, high)
    if count >= COLUMNS:
        store_i8(c, codes, 0)
    else:
        store_first(c, codes, count, room)


def _multiply(
    rows: int, a: Any, a_row: Any, stream: Any, c: Any, c_row: Any, k: Any, m: Any,
    multipliers: Any, downs: Any, ups: Any, copied: Any, zero: Any, low: Any, high: Any,
) -> None:  # fmt: skip
    room = copied + (4 * k + BEHIND)
    _copy(copied, a, k)
    if rows == 4:
        _copy(copied + k, a + a_row, k)
        _copy(copied + 2 * k, a + 2 * a_row, k)
        _copy(copied + 3 * k, a + 3 * a_row, k)
    while m > 0:
        s0 = load_i32(stream, 1, 0)
        s1, s2, s3 = s0, s0, s0
        x, stream, end = copied, stream + _BIASES, ptr_to_int(copied + k)
        y, z, v = x + k, x + 2 * k, x + 3 * k
        while ptr_to_int(x) != end:
            s0, s1, s2, s3 = _step(rows, 0, stream, x, y, z, v, s0, s1, s2, s3)
            s0, s1, s2, s3 = _step(rows, 1, stream, x, y, z, v, s0, s1, s2, s3)
            s0, s1, s2, s3 = _step(rows, 2, stream, x, y, z, v, s0, s1, s2, s3)
            s0, s1, s2, s3 = _step(rows, 3, stream, x, y, z, v, s0, s1, s2, s3)
            x, y, z, v, stream = x + 4, y + 4, z + 4, v + 4, stream + 4 * COLUMNS
        _put(c, s0, multipliers, downs, ups, zero, low, high, m, room)
        if rows == 4:
            to = c + c_row
            _put(to, s1, multipliers, downs, ups, zero, low, high, m, room)
            to = to + c_row
            _put(to, s2, multipliers, downs, ups, zero, low, high, m, room)
            _put(to + c_row, s3, multipliers, downs, ups, zero, low, high, m, room)
        if ptr_to_int(ups) != 0:
            ups = ups + _BIASES
        c, m = c + COLUMNS, m - COLUMNS
        multipliers, downs = multipliers + _BIASES, downs + _BIASES


def product_of(target: Target) -> Product:
    """4 rows at once."""
    return Product(
        ROWS, COLUMNS, PIECE, packed,
        lambda k, m: ROWS * (-(-k // PIECE) * PIECE) + BEHIND + 4 * COLUMNS, _multiply, __name__,
    )  # fmt: skip
