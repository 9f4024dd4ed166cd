"""Groups of 4-bit integers: bytes against a definition in plain Python; the search of scales."""

from __future__ import annotations

import math

import numpy as np
import pytest

from headrace.sparse.format import Format
from headrace.sparse.int4_zeros import search_zeros
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


def noise(x: np.ndarray, found: np.ndarray) -> float:
    """Signal to noise in dB."""
    return float(-10 * np.log10(((found - x) ** 2).sum() / (x.astype(np.float64) ** 2).sum()))


def without_a_search(fmt: Format, x: np.ndarray, group: int) -> np.ndarray:
    """The weights with every one in range, none cut; symmetric codes are then -7..7."""
    assert fmt.grid is not None
    groups, zeros, codes = fields(fmt, group)
    blocks = fmt.grid.fit(x, None).reshape(len(x), -1, fmt.block_bytes).copy()
    if zeros:
        d, z = search_zeros(x, None, group, (15.0,), 0)
        blocks[..., 2 * groups : codes] = (
            z.astype(np.int8).view(np.uint8).reshape(*blocks.shape[:2], -1)
        )
    else:
        d = np.abs(x.reshape(len(x), -1, group)).max(axis=2) / 7
    halves = d.astype(np.float16).reshape(*blocks.shape[:2], groups)
    blocks[..., : 2 * groups] = halves.view(np.uint8)
    return fmt.decode(fmt.grid.round(x, blocks.reshape(len(x), -1)))


@pytest.mark.parametrize(("group", "expected"), [(16, 21.39), (32, 20.26), (128, 18.61)])
def test_noise_without_a_search(group: int, expected: float) -> None:
    x = np.random.default_rng(0).standard_normal((1024, 1024)).astype(np.float32)
    found = noise(x, without_a_search(FORMATS[f"i4_g{group}"], x, group))
    assert abs(found - expected) <= 0.05


@every_int4
def test_groups_gain_by_the_search(name: str, group: int) -> None:
    fmt, rng = FORMATS[name], np.random.default_rng(1)
    x = rng.standard_t(3, (100, 512)).astype(np.float32) + rng.normal(0, 1, (100, 1)).astype("f4")

    def errors(found: np.ndarray) -> np.ndarray:
        return ((found - x) ** 2).reshape(100, -1, group).sum(axis=2)

    plain, searched = errors(without_a_search(fmt, x, group)), errors(fmt.decode(fmt.encode(x)))
    assert (searched <= plain * (1 + 2.0**-10)).mean() > 0.99
    assert searched.sum() < 0.95 * plain.sum()


@pytest.mark.parametrize("group", GROUPS)
def test_zeros_follow_importance(group: int) -> None:
    """Inputs that count more get less noise."""
    fmt = FORMATS[f"i4a_g{group}"]
    assert fmt.grid is not None
    x = np.random.default_rng(6).standard_normal((200, 256)).astype(np.float32)
    importance = np.where(np.arange(256) % 4, 0.01, 1).astype(np.float32)
    plain, weighted = (
        fmt.decode(fmt.grid.round(x, fmt.grid.fit(x, one))) - x for one in (None, importance)
    )
    assert (weighted**2 @ importance).sum() < 0.8 * (plain**2 @ importance).sum()


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
