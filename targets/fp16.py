"""Short floats, computed as a chip does, bit for bit, in numpy.

An operation's exact result is rounded once, to the format's precision and range. Results that
float64 does not hold either (a sum of a large number and a small one) are rounded to odd first,
which keeps the second rounding right (Boldo and Melquiond, "Emulation of FMA and correctly rounded
sums", 2008). Values are float64 arrays whose numbers the format has; `stored` gives their bytes.
Rounding modes besides the nearest are for studies, as in Pychop.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]
Rounding = Literal["nearest", "zero", "up", "down", "stochastic"]
ROUNDINGS: tuple[str, ...] = get_args(Rounding)


@dataclass(frozen=True)
class FloatFormat:
    """A binary format of IEEE 754's kind.

    Attributes:
        precision: bits of a significand, the hidden one included.
        least, most: exponents of the smallest normal number and of the largest.
        dtype: of numpy, how it is stored.
    """

    name: str
    precision: int
    least: int
    most: int
    dtype: Any

    @property
    def largest(self) -> float:
        """The largest finite number."""
        return float(2.0**self.most * (2 - 2.0 ** (1 - self.precision)))


HALF = FloatFormat("half", 11, -14, 15, np.dtype(np.float16))
BFLOAT16 = FloatFormat("bfloat16", 8, -126, 127, np.dtype(ml_dtypes.bfloat16))
SINGLE = FloatFormat("single", 24, -126, 127, np.dtype(np.float32))


@dataclass(frozen=True)
class Arithmetic:
    """Operations of a format.

    Attributes:
        format: of operands and results.
        rounding: of results; "stochastic" rounds up as often as the result is near that number.
        flush: results that are no normal numbers become 0, and such operands count as 0, as on
            chips that do so. Of a result that is decided before it is rounded, as Arm has it.
        random: what stochastic rounding draws from.
    """

    format: FloatFormat = HALF
    rounding: Rounding = "nearest"
    flush: bool = False
    random: np.random.Generator | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if self.rounding not in ROUNDINGS:
            raise ValueError(f"rounding is one of {', '.join(ROUNDINGS)}, not {self.rounding!r}")
        if self.rounding == "stochastic" and self.random is None:
            raise ValueError("stochastic rounding needs a generator: random=default_rng(seed)")

    def round(self, x: Any) -> Values:
        """The numbers of the format that stand for `x`."""
        x = np.asarray(x, np.float64)
        of = self.format
        _, exponent = np.frexp(x)
        step = np.maximum(exponent - 1, of.least) - (of.precision - 1)
        with np.errstate(all="ignore"):
            found = np.ldexp(self._whole(np.ldexp(x, -step)), step)
            found = np.where(np.isfinite(x), found, x)
            beyond = np.isfinite(x) & (np.abs(found) > of.largest)
        if beyond.any():
            found = np.where(beyond, self._beyond(found), found)
        return self._flushed(found, x)

    def _whole(self, x: Values) -> Values:
        if self.rounding == "nearest":
            return np.rint(x)
        if self.rounding == "stochastic":
            assert self.random is not None
            return np.copysign(np.floor(x + self.random.random(x.shape)), x)
        found: Values = {"zero": np.trunc, "up": np.ceil, "down": np.floor}[self.rounding](x)
        return np.copysign(found, x)

    def _beyond(self, x: Values) -> Values:
        """What is too large: infinite, or the largest number where rounding goes towards 0."""
        keeps = {"zero": np.isfinite(x), "up": x < 0, "down": x > 0}.get(self.rounding)
        infinite = np.copysign(np.inf, x)
        if keeps is None:
            return infinite
        return np.where(keeps, np.copysign(self.format.largest, x), infinite)

    def _flushed(self, found: Values, exact: Values) -> Values:
        if not self.flush:
            return found
        return np.where(np.abs(exact) < 2.0**self.format.least, np.copysign(0.0, exact), found)

    def operand(self, x: Any) -> Values:
        """Stored numbers as they are computed with."""
        x = np.asarray(x).astype(np.float64)
        return self._flushed(x, x)

    def add(self, a: Any, b: Any) -> Values:
        """a + b, rounded once."""
        return self.round(_sum(self.operand(a), self.operand(b)))

    def subtract(self, a: Any, b: Any) -> Values:
        """a - b, rounded once."""
        return self.round(_sum(self.operand(a), -self.operand(b)))

    def multiply(self, a: Any, b: Any) -> Values:
        """a * b, rounded once: float64 holds the product of two numbers of 24 bits."""
        with np.errstate(all="ignore"):
            return self.round(self.operand(a) * self.operand(b))

    def fma(self, a: Any, b: Any, c: Any) -> Values:
        """a * b + c, rounded once."""
        with np.errstate(all="ignore"):
            return self.round(_sum(self.operand(a) * self.operand(b), self.operand(c)))

    def stored(self, x: Any) -> NDArray[Any]:
        """Numbers of the format in its bytes."""
        with np.errstate(all="ignore"):
            return np.asarray(x, np.float64).astype(self.format.dtype)

    def matmul(self, a: Any, b: Any, *, fused: bool = True) -> Values:
        """a [n, k] times b [k, m], products added one after the other to a sum that begins at 0.

        The order in which a chip adds that holds a vector of one row of the result.
        """
        a, b = self.operand(a), self.operand(b)
        sums = np.zeros((a.shape[0], b.shape[1]))
        for k in range(a.shape[1]):
            one = a[:, k : k + 1], b[k]
            sums = self.fma(*one, sums) if fused else self.add(self.multiply(*one), sums)
        return sums


def _sum(a: Values, b: Values) -> Values:
    """a + b in float64, of odd significand where it is not exact."""
    with np.errstate(all="ignore"):
        found = a + b
        part = found - a
        error = (a - (found - part)) + (b - part)
        inexact = np.isfinite(found) & (error != 0) & np.isfinite(error)
        even = (found.view(np.int64) & 1) == 0
        away = np.nextafter(found, np.copysign(np.inf, error))
    return np.where(inexact & even, away, found)
