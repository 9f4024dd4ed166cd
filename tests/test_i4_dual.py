"""INT4 with dual-grained scales: INT8 without overflow, and what the scales are worth."""

from __future__ import annotations

import numpy as np

from headrace.sparse.i4_dual import BLOCK_BYTES, int8_weights
from headrace.sparse.registry import FORMATS

DUAL = FORMATS["i4_dual"]


def every_pair() -> np.ndarray:
    """Blocks with every s (0..15, though `encode` makes no 0) beside every code; d = 0.5."""
    raw = np.zeros((16, BLOCK_BYTES), np.uint8)
    raw[:, :2] = np.array([0.5], np.float16).view(np.uint8)
    raw[:, 2:6] = np.arange(16, dtype=np.uint8)[:, None] * 17
    raw[:, 6:] = np.tile(np.arange(16, dtype=np.uint8) * 17, 8)
    return raw


def test_int8_does_not_overflow() -> None:
    raw = every_pair()
    exact = np.arange(16)[:, None] * (np.tile(np.arange(16), 16) - 8)
    found = int8_weights(raw)
    assert found.dtype == np.int8
    assert np.array_equal(found, exact)
    assert (found.min(), found.max()) == (-120, 105)
    assert np.array_equal(DUAL.decode(raw), 0.5 * exact)


def test_int8_products_of_a_row_equal_the_floats() -> None:
    """A row of one block as one integer product: exactly what its decoded weights give."""
    rng = np.random.default_rng(0)
    raw = DUAL.encode(rng.standard_normal((50, 256)).astype(np.float32))
    x = rng.integers(-127, 128, 256)
    d = raw[:, :2].copy().view(np.float16)[:, 0].astype(np.float64)
    whole = int8_weights(raw).astype(np.int32) @ x.astype(np.int32)
    assert np.array_equal(d * whole, DUAL.decode(raw).astype(np.float64) @ x)


def test_weights_by_definition() -> None:
    raw = np.random.default_rng(1).integers(0, 256, (3, 2 * BLOCK_BYTES), dtype=np.uint8)
    raw[:, 1::BLOCK_BYTES] &= 0xBF
    for row, weights in zip(raw, DUAL.decode(raw), strict=True):
        for k, weight in enumerate(weights):
            block, g = row[k // 256 * BLOCK_BYTES :][:BLOCK_BYTES], k % 256 // 32
            s = int(block[2 + g // 2]) >> (4 * (g % 2)) & 15
            code = int(block[6 + 16 * g + k % 16]) >> (4 * (k % 32 // 16)) & 15
            assert weight == float(block[:2].view(np.float16)[0]) * (s * (code - 8))


def noise(name: str, x: np.ndarray) -> float:
    error = FORMATS[name].decode(FORMATS[name].encode(x)) - x
    return float(-10 * np.log10((error**2).sum() / (x**2).sum()))


def test_less_noise_than_groups_of_64_in_fewer_bits() -> None:
    rng = np.random.default_rng(2)
    assert DUAL.bits_per_weight < FORMATS["i4_g64"].bits_per_weight
    for x, gain in ((rng.standard_normal((128, 2048)), 0.2), (rng.standard_t(4, (128, 2048)), 0.5)):
        assert noise("i4_dual", x.astype("f4")) > noise("i4_g64", x.astype("f4")) + gain


def test_degenerate_blocks() -> None:
    x = np.zeros((5, 512), np.float32)
    x[1], x[2], x[3, 5], x[4, :256] = 3, -1e-3, 100, 6e4
    found = DUAL.decode(DUAL.encode(x))
    assert not found[0].any()
    assert np.allclose(found, x, rtol=2.0**-9, atol=0)
