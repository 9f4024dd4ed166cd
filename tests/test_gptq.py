"""GPTQ beside its definition, and the search of scales."""

from __future__ import annotations

import numpy as np
import pytest

from headrace.sparse.gptq import (
    DAMPING,
    further,
    gptq,
    inverse_factor,
    largest_first,
    output_errors,
    unmade,
)
from headrace.sparse.grid import nearest
from headrace.sparse.registry import FORMATS

GRIDS = sorted(name for name, fmt in FORMATS.items() if fmt.grid is not None)
N = 512


def data(seed: int, rows: int = 48, n: int = N) -> tuple[np.ndarray, np.ndarray]:
    """Weights [rows, n], and H of inputs that depend on each other."""
    rng = np.random.default_rng(seed)
    few = rng.standard_normal((1024, n // 8)) @ rng.standard_normal((n // 8, n))
    x = (few + rng.standard_normal((1024, n))).astype(np.float32)
    x *= np.exp(rng.standard_normal(n)).astype(np.float32)
    w = (rng.standard_normal((rows, n)) * 0.1).astype(np.float32)
    return w, x.T @ x


@pytest.mark.parametrize("n", [1, 5, 64, 65, 300])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_factor_is_of_the_inverse(n: int, dtype: type) -> None:
    _, h = data(1, 1, 512)
    h = np.ascontiguousarray(h[:n, :n])
    u = inverse_factor(h, dtype).astype(np.float64)
    assert (np.tril(u, -1) == 0).all()
    damped = h.astype(np.float64) + DAMPING * np.diag(h).astype(np.float64).mean() * np.eye(n)
    assert np.abs(u.T @ u @ damped - np.eye(n)).max() < (1e-3 if dtype is np.float64 else 1e-2)


def test_inputs_that_never_come() -> None:
    _, h = data(2, 1, 64)
    h[7] = h[:, 7] = 0
    assert np.isfinite(inverse_factor(h)).all()
    assert np.isfinite(inverse_factor(np.zeros((8, 8), np.float32))).all()


@pytest.mark.parametrize("name", GRIDS)
def test_outputs_are_nearer_than_by_rounding(name: str) -> None:
    fmt = FORMATS[name]
    assert fmt.grid is not None
    w, h = data(3)
    importance = np.diag(h).copy()
    errors = {
        how: output_errors(h, fmt.decode(raw) - w).sum()
        for how, raw in {
            "encode": fmt.encode(w),
            "search": fmt.grid.round(w, fmt.grid.fit(w, importance)),
            "gptq": gptq(w, fmt.grid, inverse_factor(h), fmt.grid.fit(w, importance)),
        }.items()
    }
    assert errors["gptq"] < 0.6 * errors["search"]
    assert errors["gptq"] < 0.6 * errors["encode"]


@pytest.mark.parametrize("name", GRIDS)
def test_inputs_that_do_not_depend_on_each_other_are_rounded_as_they_are(name: str) -> None:
    grid = FORMATS[name].grid
    assert grid is not None
    w, h = data(4)
    importance = np.diag(h).copy()
    found = gptq(w, grid, inverse_factor(np.diag(importance)), grid.fit(w, importance))
    assert found.tobytes() == grid.round(w, grid.fit(w, importance)).tobytes()


@pytest.mark.parametrize("name", GRIDS)
def test_rows_do_not_depend_on_each_other(name: str) -> None:
    fmt = FORMATS[name]
    assert fmt.grid is not None
    w, h = data(5, 32)
    u = inverse_factor(h)
    whole = fmt.decode(gptq(w, fmt.grid, u, fmt.grid.fit(w, None)))
    some = (w[:16], w[16:])
    parts = [fmt.decode(gptq(v, fmt.grid, u, fmt.grid.fit(v, None))) for v in some]
    # Sums of products may be taken in another order: a tie here and there goes the other way.
    assert (whole == np.concatenate(parts)).mean() > 0.99


def test_gptq_as_it_is_defined() -> None:
    """Every input in turn, all later ones mended at once, in float64."""
    fmt = FORMATS["q4_0"]
    assert fmt.grid is not None
    w, h = data(6, 16, 256)
    damped = h.astype(np.float64) + DAMPING * np.diag(h).astype(np.float64).mean() * np.eye(256)
    u = np.linalg.cholesky(np.linalg.inv(damped)).T
    scale, _ = fmt.grid.scales(fmt.grid.fit(w, None))
    left, expected = w.astype(np.float64), np.empty(w.shape)
    for i in range(256):
        s = scale[:, i // 32].astype(np.float64)
        expected[:, i] = np.clip(np.rint(left[:, i] / s), -8, 7) * s
        error = (left[:, i] - expected[:, i]) / u[i, i]
        left[:, i + 1 :] -= np.outer(error, u[i, i + 1 :])
    found = fmt.decode(gptq(w, fmt.grid, inverse_factor(h), fmt.grid.fit(w, None)))
    assert (np.abs(found - expected) < 1e-6).mean() > 0.98
    off = output_errors(h, (expected - w).astype(np.float32))
    assert output_errors(h, found - w).sum() / off.sum() == pytest.approx(1, abs=0.02)


def closely_tied(seed: int, rows: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """Weights whose groups differ in size, and X^T X of 256 inputs with two sources."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((2000, 2)) @ rng.standard_normal((2, 256))
    x = x * np.exp(1.5 * rng.standard_normal(256)) + rng.standard_normal((2000, 256)) / 100
    size = np.exp(2 * rng.standard_normal((rows, 8))).repeat(32, axis=1)
    return (rng.standard_normal((rows, 256)) * size).astype("f4"), (x.T @ x).astype("f4")


def test_rows_that_are_further_off_are_known() -> None:
    """What later inputs should make good is beyond their scales, in a few rows of these."""
    fmt = FORMATS["q4_0"]
    assert fmt.grid is not None
    w, h = closely_tied(7, 512)
    raw = fmt.grid.fit(w, None)
    moved = fmt.decode(gptq(w, fmt.grid, inverse_factor(h), raw))
    nearest = fmt.decode(fmt.grid.round(w, raw))
    found = further(w, h, moved, nearest)
    off = [
        (((one - w).astype("f8") @ h.astype("f8")) * (one - w)).sum(axis=1)
        for one in (moved, nearest)
    ]
    assert np.array_equal(found, off[0] > off[1])
    assert 0 < found.sum() < 20
    moved[3, 5], moved[4, 6] = np.inf, np.nan
    assert further(w, h, moved, nearest)[[3, 4]].all()


@pytest.mark.parametrize("name", GRIDS)
def test_searched_scales_are_no_worse_than_the_encoder(name: str) -> None:
    fmt = FORMATS[name]
    assert fmt.grid is not None
    w, _ = data(7)
    encoded = ((fmt.decode(fmt.encode(w)) - w) ** 2).sum()
    searched = ((fmt.decode(fmt.grid.round(w, fmt.grid.fit(w, None))) - w) ** 2).sum()
    assert searched <= encoded * 1.01  # some encoders search, too


@pytest.mark.parametrize("name", GRIDS)
def test_codes_and_scales_are_where_the_grid_says(name: str) -> None:
    fmt = FORMATS[name]
    grid = fmt.grid
    assert grid is not None
    w, _ = data(8, 4)
    raw = grid.fit(w, None)
    codes = np.random.default_rng(0).integers(0, len(grid.levels), w.shape, np.uint8)
    scale, offset = grid.scales(raw)
    expected = grid.table[codes] * np.repeat(scale, grid.group, axis=1)
    if offset is not None:
        expected = expected + np.repeat(offset, grid.group, axis=1)
    np.testing.assert_allclose(fmt.decode(grid.put(raw, codes)), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", GRIDS)
def test_extreme_weights(name: str) -> None:
    fmt = FORMATS[name]
    assert fmt.grid is not None
    for value in (0.0, 1e-30, 1e-8, 1.0, -1.0):
        w = np.full((2, N), value, np.float32)
        found = fmt.decode(fmt.grid.round(w, fmt.grid.fit(w, None)))
        assert np.isfinite(found).all()
        assert np.abs(found - w).max() <= abs(value)
    one = np.zeros((1, N), np.float32)
    one[0, 5] = -3.0
    found = fmt.decode(fmt.grid.round(one, fmt.grid.fit(one, None)))
    if 0.0 in fmt.grid.levels:
        np.testing.assert_allclose(found, one, rtol=0.02, atol=0.05)


def test_nearest_levels() -> None:
    x = np.array([-9, -8, -0.6, 0.4, 0.6, 7.4, 99], np.float32)
    assert nearest(tuple(range(-8, 8)))(x).tolist() == [0, 0, 7, 8, 9, 15, 15]
    assert nearest((-3.0, 0.0, 0.5, 4.0))(x).tolist() == [0, 0, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("name", ["i4_g64", "i3_g64", "i4a_g32"])
def test_an_order_of_inputs_is_that_of_inputs_that_change_places(name: str) -> None:
    """With a scale for each row, weights and H in another order give the same weights there."""
    fmt = FORMATS[name]
    assert fmt.grid is not None
    n = fmt.grid.group
    w, h = data(8, 32, N)
    w, h = np.ascontiguousarray(w[:, :n]), np.ascontiguousarray(h[:n, :n])
    order = largest_first(h)
    assert (np.diff(np.diag(h)[order]) <= 0).all()
    raw = fmt.grid.fit(w, None)
    found = fmt.decode(gptq(w, fmt.grid, inverse_factor(h, order=order), raw, order=order))
    moved, moved_h = w[:, order], np.ascontiguousarray(h[order][:, order])
    wanted = fmt.decode(gptq(moved, fmt.grid, inverse_factor(moved_h), raw))
    assert np.array_equal(found[:, order], wanted)


def test_inputs_far_larger_than_the_others_come_first() -> None:
    """As in down of experts: for some tokens all inputs are large, the last ones most of all."""
    rng, fmt = np.random.default_rng(9), FORMATS["i4_g64"]
    assert fmt.grid is not None
    w = (rng.standard_normal((48, 64)) * 0.1).astype(np.float32)
    x = rng.standard_normal((512, 64)).astype(np.float32)
    large = np.where(np.arange(64) < 60, 3, 100).astype(np.float32)
    x += large * rng.standard_normal((512, 1)).astype(np.float32)
    h, errors = x.T @ x, []
    for order in (None, largest_first(h)):
        u = inverse_factor(h, order=order)
        importance = np.empty(64, np.float32)
        importance[slice(None) if order is None else order] = unmade(u)
        raw = gptq(w, fmt.grid, u, fmt.grid.fit(w, importance), order=order)
        errors.append(output_errors(h, fmt.decode(raw) - w).sum())
    assert errors[1] < 0.5 * errors[0]
