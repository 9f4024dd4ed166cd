"""From sums of products to int8 codes, for kernels to inline."""

from __future__ import annotations

from typing import Any

import numpy as np

from headrace.targets.simd import (
    doubling_high,
    get_u8,
    int32,
    least_i32,
    load_i32,
    most_i32,
    put_u8,
    rounding_shift,
    store_i8,
)
from headrace.targets.target import Target


def lanes_of(target: Target) -> int:
    """Sums that a vector holds: 4, or one in a register of its own."""
    return 4 if target.vector_bytes == 16 else 1


def scaled(sums: Any, multipliers: Any, downs: Any) -> Any:
    """int32 lanes; see `headrace.micro.fixed_point.multiplied`. Shifts are no more than 0."""
    return rounding_shift(doubling_high(sums, multipliers), downs)


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
