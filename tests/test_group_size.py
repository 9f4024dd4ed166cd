"""The format of a matrix, chosen by its noise."""

from __future__ import annotations

import numpy as np
import pytest

from headrace.sparse.group_size import SAMPLE_ROWS, choose_format, relative_noise
from headrace.sparse.registry import FORMATS

SYMMETRIC = [FORMATS[f"i4_g{group}"] for group in (16, 32, 64, 128)]


def weights(spread: float, run: int, rows: int = 40, n: int = 512) -> np.ndarray:
    """Normal weights whose size changes by the factor e^spread from run to run."""
    rng = np.random.default_rng(1)
    sizes = np.exp(spread * rng.standard_normal((rows, n // run)))
    return (rng.standard_normal((rows, n)) * np.repeat(sizes, run, axis=1)).astype(np.float32)


def test_noise_is_what_it_says() -> None:
    w = weights(0, 16)
    for fmt in SYMMETRIC:
        found = fmt.decode(fmt.encode(w))
        expected = np.mean((found - w) ** 2) / np.mean(w**2)
        assert relative_noise(fmt, w) == pytest.approx(expected, rel=1e-4)
    assert relative_noise(SYMMETRIC[0], np.zeros((2, 128), np.float32)) == 0


@pytest.mark.parametrize(
    ("spread", "run", "bit_worth", "expected"),
    [(0, 16, 6.02, 128), (1, 128, 6.02, 128), (1, 32, 6.02, 32), (1, 16, 6.02, 32), (1, 16, 3, 16)],
)
def test_groups_follow_the_matrix(spread: float, run: int, bit_worth: float, expected: int) -> None:
    """As small as the runs of like weights are, if that is worth the bytes."""
    assert choose_format(weights(spread, run), SYMMETRIC, bit_worth).name == f"i4_g{expected}"


def test_the_ends_of_the_worth() -> None:
    w = weights(0.5, 32)
    noise = {fmt.name: relative_noise(fmt, w) for fmt in SYMMETRIC}
    assert choose_format(w, SYMMETRIC, 0).name == min(noise, key=lambda name: noise[name])
    assert choose_format(w, SYMMETRIC, 100).name == "i4_g128"


def test_formats_that_do_not_fit_are_passed_over() -> None:
    w = weights(0, 32, n=192)
    assert choose_format(w, SYMMETRIC, 100).name == "i4_g64"
    assert choose_format(w[:, :96], SYMMETRIC, 100).name == "i4_g32"
    with pytest.raises(ValueError, match="i4_g16, i4_g32"):
        choose_format(w[:, :48], SYMMETRIC)


def test_zeros_take_the_fewest_bits() -> None:
    assert choose_format(np.zeros((3, 128), np.float32), SYMMETRIC).name == "i4_g128"


def test_rows_of_a_large_matrix_are_sampled() -> None:
    """From all over it: its last half is what needs small groups."""
    rows = 4 * SAMPLE_ROWS
    w = np.concatenate([weights(0, 16, rows, 128), weights(1, 16, rows, 128)])
    assert choose_format(w, SYMMETRIC, 3).name == "i4_g16"
    assert choose_format(w[:rows], SYMMETRIC, 3).name == "i4_g32"
