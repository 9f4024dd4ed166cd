"""What formats can hold, found out from how they round."""

from __future__ import annotations

import numpy as np
import pytest

from headrace.recipe import WRITTEN
from headrace.sparse.format import Floats, Format
from headrace.sparse.reach import ALWAYS, beyond

PATTERNS = ("normal", "one", "alike")


def blocks(fmt: Format, pattern: str) -> Floats:
    """Four blocks whose largest weight is 1."""
    rng = np.random.default_rng(3)
    x = rng.standard_normal((4, fmt.block))
    if pattern == "one":
        x *= 1e-6
        x[:, fmt.block // 3] = -1
    elif pattern == "alike":
        x = np.sign(x)
    return (x / np.abs(x).max(axis=1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name", sorted(WRITTEN))
@pytest.mark.filterwarnings("error")
def test_formats_hold_what_survives(name: str, pattern: str) -> None:
    fmt = WRITTEN[name]
    x = blocks(fmt, pattern)
    ways = [fmt.encode]
    if (grid := fmt.grid) is not None:
        ways.append(lambda w: grid.round(w, grid.fit(w, None)))
    for way in ways:
        # Where it looks it finds nothing, from what it does not look at on.
        assert beyond(x * np.float32(1.01 * ALWAYS), fmt, way) is None
        with np.errstate(all="ignore"):
            as_one = fmt.decode(way(x))
        for power in (4, 9, 13, *range(15, 30), 63, 126):
            large = np.ldexp(x, power)
            most = beyond(large, fmt, way)
            with np.errstate(all="ignore"):
                found = np.ldexp(fmt.decode(way(large)).astype(np.float64), -power)
            lost = ~(np.linalg.norm(found - as_one, axis=1) < np.linalg.norm(as_one, axis=1) / 4)
            if most is None:
                assert not lost.any(), power
            else:
                assert most == 2.0**power


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_hides_no_other(value: float) -> None:
    fmt = WRITTEN["i4_g32"]
    x = np.ones((2, 64), np.float32)
    x[0, 3] = value
    assert beyond(x, fmt, fmt.encode) is None
    x[1, 40] = -1e6
    assert beyond(x, fmt, fmt.encode) == 1e6
