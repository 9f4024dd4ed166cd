"""Whether a format can hold weights: what its scales cannot say comes out cut, zero or not finite.

How large a format's weights may be is in its scales, and each has its own. But all round alike what
differs by a power of two, as long as scales reach: so a block is held if it comes out as it does
when its largest weight is about 1, but for that power.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from headrace.sparse.format import Bytes, Floats, Format

ALWAYS = 8.0  # a magnitude that every format holds: up to it nothing is computed here
_CUT = 1 / 8  # of a block's norm, by which it may come out other than it would in reach


def beyond(x: Floats, fmt: Format, encode: Callable[[Floats], Bytes]) -> float | None:
    """The largest magnitude of weights that do not survive in a format; None: all do.

    Blocks with weights that are no finite numbers are not looked at.

    Args:
        x: float32 [rows, n].
        encode: float32 [rows, block] -> raw bytes of `fmt`, each block for itself.
    """
    blocks = x.reshape(-1, fmt.block)
    peak = np.maximum(blocks.max(axis=1, initial=0), -blocks.min(axis=1, initial=0))
    large = (peak > ALWAYS) & (peak < np.inf)
    if not large.any():
        return None
    blocks, peak = blocks[large], peak[large]
    power = np.ldexp(np.float32(1), np.frexp(peak)[1] - 1)[:, None]
    with np.errstate(all="ignore"):
        found = fmt.decode(encode(blocks)) / power.astype(np.float64)
        exact = blocks / power
        alike = fmt.decode(encode(exact)).astype(np.float64)
        changed = _square(found - alike) > _CUT**2 * _square(alike)
        worse = _square(found - exact) > _square(alike - exact)
    lost = (changed & worse) | ~np.isfinite(found).all(axis=1)
    return float(peak[lost].max()) if lost.any() else None


def _square(x: Floats) -> Floats:
    found: Floats = np.einsum("ij,ij->i", x, x)
    return found
