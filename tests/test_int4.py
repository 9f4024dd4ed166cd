"""Groups of 4-bit integers: bytes against a definition in plain Python; the search of scales."""

from __future__ import annotations

import math

import numpy as np
import pytest

from headrace.sparse.format import Format
from headrace.sparse.int4_search import search
from headrace.sparse.registry import FORMATS

GROUPS = (16, 32, 64, 128)
INT4 = [(name, g) for g in GROUPS for name in (f"i4_g{g}", f"i4a_g{g}")]
every_int4 = pytest.mark.parametrize(("name", "group"), INT4)


def fields(fmt: Format, group: int) -> tuple[int, int, int]:
    """Of a row block: groups, zeros, and the byte at which codes begin."""
    groups = fmt.block // group
    zeros = groups if fmt.name.startswith("i4a") else 0
    return groups, zeros, 2 * groups + zeros


def place(group: int, k: int) -> tuple[int, int]:
    """(byte, shift) of the code of input k, counted from the first code."""
    if group == 16:
        return 8 * (k // 16) + k % 8, 4 * (k % 16 // 8)
    return 16 * (k // 32) + k % 16, 4 * (k % 32 // 16)


@every_int4
def test_weights_by_definition(name: str, group: int) -> None:
    fmt = FORMATS[name]
    groups, zeros, codes = fields(fmt, group)
    raw = np.random.default_rng(4).integers(0, 256, (2, fmt.row_bytes(256)), dtype=np.uint8)
    raw[:, 1::2] &= 0xBF  # scales are numbers wherever they fall
    found = fmt.decode(raw)
    for row, weights in zip(raw, found, strict=True):
        for k, weight in enumerate(weights):
            block = row[k // fmt.block * fmt.block_bytes :][: fmt.block_bytes]
            g, (byte, shift) = k % fmt.block // group, place(group, k % fmt.block)
            d = float(block[2 * g : 2 * g + 2].view(np.float16)[0])
            z = int(block[2 * groups + g : 2 * groups + g + 1].view(np.int8)[0]) if zeros else 0
            code = int(block[codes + byte]) >> shift & 15
            assert weight == d * (code - 8 - z / 8) or math.isnan(d)


@every_int4
def test_tile_layout(name: str, group: int) -> None:
    fmt = FORMATS[name]
    groups, zeros, codes = fields(fmt, group)
    raw = np.random.default_rng(5).integers(0, 256, (16, fmt.block_bytes), dtype=np.uint8)
    tiled, expected = fmt.tile(raw)[0, 0], np.zeros(fmt.tile_block_bytes, np.uint8)
    for r, row in enumerate(raw):
        for g in range(groups):
            expected[32 * g + 2 * r : 32 * g + 2 * r + 2] = row[2 * g : 2 * g + 2]
        for g in range(zeros):
            expected[32 * groups + 16 * g + r] = row[2 * groups + g]
        for b in range(fmt.block // 2):
            expected[16 * codes + 64 * (b // 4) + 4 * r + b % 4] = row[codes + b]
    assert np.array_equal(tiled, expected)


def noise(x: np.ndarray, asymmetric: bool, levels: tuple[float, ...] = (), fits: int = 2) -> float:
    """Signal to noise in dB."""
    d, z, codes = search(x, asymmetric, levels, fits)
    off = 8 + z.astype(np.float64) / 8
    error = d[:, None].astype(np.float64) * (codes - off[:, None]) - x
    return float(-10 * np.log10((error**2).sum() / (x.astype(np.float64) ** 2).sum()))


# Of scales that leave every weight within range, codes -7..7.
@pytest.mark.parametrize(("group", "expected"), [(16, 21.39), (32, 20.26), (128, 18.61)])
def test_noise_without_a_search(group: int, expected: float) -> None:
    x = np.random.default_rng(0).standard_normal((1 << 20) // group * group).astype(np.float32)
    assert abs(noise(x.reshape(-1, group), False, (7.0,), 0) - expected) <= 0.05


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("group", GROUPS)
def test_no_group_is_worse_for_the_search(group: int, asymmetric: bool) -> None:
    rng = np.random.default_rng(1)
    x = rng.standard_t(3, (500, group)).astype(np.float32) + rng.normal(0, 1, (500, 1)).astype("f4")
    errors = []
    for levels, fits in (((15.0,) if asymmetric else (7.0,), 0), ((), 2)):
        d, z, codes = search(x, asymmetric, levels, fits)
        w = d[:, None] * (codes - (8 + z[:, None].astype(np.float32) / 8))
        errors.append(((w - x) ** 2).sum(axis=1))
    plain, searched = errors
    assert (searched <= plain * (1 + 2.0**-20)).all()
    assert searched.sum() < 0.95 * plain.sum()


@every_int4
def test_groups_that_are_exact(name: str, group: int) -> None:
    """All zero, one value, and what the format can say."""
    fmt = FORMATS[name]
    x = np.zeros((6, 256), np.float32)
    x[1], x[2], x[3, 7::group] = 5, -0.25, 3
    x[4] = 0.5 * (np.arange(256) % 16 - 8)
    x[5] = x[4] if fields(fmt, group)[1] == 0 else x[4] + 0.0625 * 31  # an odd eighth of a step
    found = fmt.decode(fmt.encode(x))
    assert np.allclose(found, x, rtol=2.0**-10, atol=0)
    assert np.array_equal(found[[0, 4, 5]], x[[0, 4, 5]])


@pytest.mark.parametrize("group", GROUPS)
def test_a_group_on_one_side(group: int) -> None:
    """Steps are as fine as the group's own range, or an eighth of its distance from zero."""
    fmt = FORMATS[f"i4a_g{group}"]
    span = np.linspace(0, 1, 256, dtype=np.float32)[None]
    for start in (-9.0, -5.0, -1.0, 0.0, 0.5, 4.0, 8.0):
        x = np.random.default_rng(2).permuted(span) + np.float32(start)
        error = np.abs(fmt.decode(fmt.encode(x)) - x).max()
        step = max(1 / 15, start / 8, -(start + 1) / 8)
        assert error <= 1.1 * step


@every_int4
def test_extremes_stay_finite(name: str, group: int) -> None:
    fmt = FORMATS[name]
    x = np.zeros((4, 256), np.float32)
    x[0], x[1] = 3e5, np.where(np.arange(256) % 2, 65504, -65504)
    x[2], x[3] = 1e-30, 6e-8  # below float16's least number, and about it
    found = fmt.decode(fmt.encode(x))
    assert np.isfinite(found).all()
    assert np.abs(found[0] - x[0]).max() <= 2.0**-10 * 3e5
    assert np.abs(found[1] - x[1]).max() <= 0.06 * 65504
    assert np.abs(found[2]).max() == 0
    assert np.abs(found[3] - x[3]).max() <= 6e-8


@every_int4
def test_chunks_do_not_show(name: str, group: int) -> None:
    fmt = FORMATS[name]
    x = np.random.default_rng(3).standard_normal((300, 512)).astype(np.float32)
    assert np.array_equal(fmt.encode(x)[290:], fmt.encode(x[290:]))
