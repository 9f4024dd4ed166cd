"""From sums of products to int8 codes, for kernels to inline."""

from __future__ import annotations

from typing import Any

import numpy as np

from headrace.targets.simd import (
    add_rounded_high,
    doubling_high,
    get_u8,
    int32,
    least_i32,
    load_i32,
    most_i32,
    nearest_shift,
    put_u8,
    rounding_shift,
    sar_by,
    shl,
    shl_by,
    splat_i32,
    store_i8,
)
from headrace.targets.target import Target

# Shifts to the right with which what `plain_start` begins with leaves room for a sum's high half.
LEAST_SHIFT, MOST_SHIFT = 1, 22
PLAIN_REACH = 2**30


def lanes_of(target: Target) -> int:
    """Sums that a vector holds: 4, or one in a register of its own."""
    return 4 if target.vector_bytes == 16 else 1


def scaled(sums: Any, multipliers: Any, downs: Any) -> Any:
    """int32 lanes; see `headrace.micro.fixed_point.multiplied`. Shifts are no more than 0."""
    return rounding_shift(doubling_high(sums, multipliers), downs)


def are_plain(shifts: np.ndarray, ends: tuple[int, int, int], reach: int) -> bool:
    """Whether `plain` makes codes of sums.

    Args:
        shifts: of multipliers.
        ends: the zero point, the least and the greatest code.
        reach: what no sum's magnitude is more than.
    """
    downs = -shifts.astype(np.int64)
    fits = downs.min() >= LEAST_SHIFT and downs.max() <= MOST_SHIFT and reach < PLAIN_REACH
    return bool(fits and ends[1:] == (-128, 127))


def reach_of(weights: np.ndarray, bias: np.ndarray) -> int:
    """What the magnitude of no sum is more than, of weights [m, k] and biases [m]."""
    most = 128 * np.abs(weights.astype(np.int64)).sum(1) + np.abs(bias.astype(np.int64))
    return int(most.max())


def plain_start(zero: Any, shift: Any) -> Any:
    """What `plain` begins with: zero * 2**shift, and half of what is divided by."""
    return shl_by(zero + zero + splat_i32(1), shift - splat_i32(1))


def rounded(twice: Any, multipliers: Any, shift: Any, start: Any) -> Any:
    """`scaled` of half of this; `start` is half of 2**shift, a shift of 1 or more.

    Products whose sum is below 0 are rounded to the lower of two: one less before they are shifted.
    That of a sum which rounds to 0 stays 0, as there is a shift.
    """
    start = start + sar_by(twice, splat_i32(31))
    return sar_by(add_rounded_high(start, twice, multipliers), shift)


def plain(sums: Any, multipliers: Any, shift: Any, start: Any) -> Any:
    """`scaled` of sums below `PLAIN_REACH`, from `plain_start` on, and within -128..127."""
    codes = rounded(shl(sums, 1), multipliers, shift, start)
    return within(codes, splat_i32(-128), splat_i32(127))


def shifted_down(sums: Any, multipliers: Any, downs: Any) -> Any:
    """`scaled` by shifts that are less than 0."""
    high = doubling_high(sums, multipliers)
    return nearest_shift(high + sar_by(high, splat_i32(31)), downs)


def requantised(sums: Any, multipliers: Any, downs: Any, zero: Any, low: Any, high: Any) -> Any:
    """Codes in int32 lanes, with multipliers and shifts from memory."""
    return within(
        scaled(sums, load_i32(multipliers, 1, 0), load_i32(downs, 1, 0)) + zero, low, high
    )


def within(codes: Any, low: Any, high: Any) -> Any:
    """int32 lanes from low to high."""
    return most_i32(least_i32(codes, high), low)


def store_first(to: Any, codes: Any, count: Any, room: Any) -> None:
    """Store the low bytes of the first lanes, by way of `room`, which has room for all of them."""
    store_i8(room, codes, 0)
    i = int32(0)
    while i < count:
        put_u8(to + i, get_u8(room + i))
        i += 1


def by_lanes(array: np.ndarray, target: Target) -> np.ndarray:
    """An array by channel with as many elements as vectors read of it."""
    most = 4 * lanes_of(target)
    return np.pad(array, (0, -len(array) % most + (most > 4) * 4))
