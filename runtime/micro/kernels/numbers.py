"""What kernels of real numbers are written over: how numbers are stored, and what adds them up.

Halves are computed with as such on chips that can, else as float32, which is rounded when it is
stored; float32 is float32 everywhere. What needs more precision (means, exponentials, updates of
weights) is computed in float32 on all chips.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from headrace.targets import simd
from headrace.targets.fp16 import HALF, SINGLE, Arithmetic, FloatFormat, Values
from headrace.targets.target import Target

Kind = Literal["half", "single"]
KINDS: tuple[Kind, ...] = get_args(Kind)
UNBOUNDED = (-np.inf, np.inf)
WIDE_LANES = 4  # of float32 where all chips compute in it

Marker = Callable[..., Any]


@dataclass(frozen=True)
class Numbers:
    """Numbers of a kernel.

    Attributes:
        kind: how they are stored.
        lanes: elements of a vector: of a register, or of registers for a number each.
        arithmetic: of each operation.
        load, bcast, zeros, splat, store: markers of vectors; `store` rounds to what is stored.
        get, put: of a number, as float32.
    """

    kind: Kind
    lanes: int
    arithmetic: Arithmetic
    load: Marker
    bcast: Marker
    zeros: Marker
    splat: Marker
    store: Marker
    get: Marker
    put: Marker

    @property
    def bytes(self) -> int:
        """Of a number."""
        return dtype_of(self.kind).itemsize

    def rounded(self, x: Values) -> Values:
        """What is stored of results."""
        return Arithmetic(storage_of(self.kind)).round(x)

    def stored(self, x: Values) -> NDArray[Any]:
        """Results as they are stored."""
        return Arithmetic(storage_of(self.kind)).stored(self.rounded(x))


def storage_of(kind: Kind) -> FloatFormat:
    """The format that numbers are stored in."""
    return HALF if kind == "half" else SINGLE


def dtype_of(kind: Kind) -> np.dtype[Any]:
    """The same of numpy."""
    return np.dtype(np.float16 if kind == "half" else np.float32)


def numbers_of(target: Target, kind: Kind, *, wide: bool = False) -> Numbers:
    """How a chip computes with numbers.

    Args:
        wide: in float32, whatever is stored, in vectors of `WIDE_LANES`.
    """
    vectors = target.vector_bytes == 16
    # A Cortex-M55's vectors of float32 know no numbers that are not normal.
    single = Arithmetic(SINGLE, flush=vectors and target.bare_metal)
    if kind == "half" and target.half and not wide:
        return Numbers(
            kind, 8 if vectors else 4, Arithmetic(HALF), simd.load_half, simd.bcast_half,
            simd.zeros_half, simd.splat_half, simd.store_half, simd.get_f16, simd.put_f16,
        )  # fmt: skip
    if kind == "half":
        return Numbers(
            kind, WIDE_LANES, single, simd.load_f16, simd.bcast_f16, simd.zeros_f32,
            simd.splat_f32, simd.store_f16, simd.get_f16, simd.put_f16,
        )  # fmt: skip
    return Numbers(
        kind, WIDE_LANES, single, simd.load_f32, simd.bcast_f32, simd.zeros_f32, simd.splat_f32,
        simd.store_f32, simd.get_f32, simd.put_f32,
    )  # fmt: skip


def constants_of(numbers: Numbers, constants: tuple[float, float]) -> tuple[Values, Values]:
    """Two constants of an argument block, which are float32, as a kernel computes with them."""
    first, second = (numbers.arithmetic.round(np.float32(one)) for one in constants)
    return first, second


def some_not_finite(rng: np.random.Generator, *arrays: NDArray[Any]) -> None:
    """Put infinities and NaN into arrays of tests, also behind the last whole vector."""
    for x in arrays:
        bad = np.array([np.inf, -np.inf, np.nan, -np.nan], x.dtype)
        where = rng.random(x.shape) < 1 / 16
        x[where] = rng.choice(bad, int(where.sum()))
        x.flat[-1] = rng.choice(bad)


def bounded(numbers: Numbers, x: Values, bounds: tuple[float, float]) -> Values:
    """Results within bounds, which are rounded to what they are computed in; NaN stays."""
    if bounds == UNBOUNDED:
        return x
    low, high = constants_of(numbers, bounds)
    x = np.where(x < low, low, x)
    return np.where(high < x, high, x)
