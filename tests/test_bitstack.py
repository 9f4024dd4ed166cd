"""BitStack's decomposition: signs and magnitudes come back, and each block leaves less."""

from __future__ import annotations

import numpy as np
import pytest

from headrace.sparse.bitstack import (
    Block,
    BlockShape,
    decompose,
    pack,
    rank_for,
    rebuild,
    unpack,
)
from headrace.sparse.bitstack_fit import decompose_for, error
from headrace.sparse.gptq import inverse_factor

MIB = 1 << 20


def _normal(m: int, n: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((m, n)).astype(np.float32)


@pytest.mark.parametrize("shape", [(16, 64), (1, 1), (7, 13), (100, 96), (33, 160), (48, 576)])
@pytest.mark.parametrize("rank", [1, 4])
def test_packed_blocks_come_back(shape: tuple[int, int], rank: int) -> None:
    for block, _ in decompose(_normal(*shape), rank, 3):
        raw = pack(block)
        sizes = BlockShape(*shape, rank)
        assert len(raw) == sizes.n_bytes
        back = unpack(raw, sizes)
        assert (back.positive == block.positive).all()
        assert back.u.tobytes() == block.u.tobytes() and back.v.tobytes() == block.v.tobytes()


def test_zero_counts_as_positive() -> None:
    w = np.array([[0.0, -1.0], [2.0, -0.0]], np.float32)
    block, _ = next(decompose(w, 1, 1))
    assert block.positive.tolist() == [[True, False], [True, True]]


@pytest.mark.parametrize(
    ("rows", "columns", "mib"),
    [
        (4096, 4096, 2.25), (11008, 4096, 5.84), (4096, 11008, 5.84), (1024, 4096, 0.66),
        (14336, 4096, 7.56), (5120, 5120, 3.44), (8192, 28672, 29.13), (1024, 8192, 1.28),
    ],
)  # fmt: skip
def test_sizes_are_the_paper_s(rows: int, columns: int, mib: float) -> None:
    assert BlockShape(rows, columns, 16).n_bytes / MIB == pytest.approx(mib, abs=0.01)


def test_rank_follows_the_width() -> None:
    assert [rank_for(n) for n in (64, 288, 576, 896, 2048, 4096, 8192)] == [1, 2, 4, 4, 8, 16, 16]


@pytest.mark.parametrize(
    ("rank", "expected"),
    [(1, (0.602, 0.360, 0.241, 0.181, 0.150)), (16, (0.580, 0.336, 0.212, 0.145, 0.108))],
)
def test_what_is_left_of_a_normal_matrix(rank: int, expected: tuple[float, ...]) -> None:
    w = _normal(768, 768)
    size = float(np.linalg.norm(w))
    found = [np.linalg.norm(left) / size for _, left in decompose(w, rank, 5)]
    assert np.allclose(found, expected, atol=1e-3), found
    assert found == sorted(found, reverse=True)


def test_a_plain_decomposition_of_the_same_size_leaves_more() -> None:
    w = _normal(768, 768)
    values = np.linalg.svd(w, compute_uv=False)
    left = [np.linalg.norm(left) for _, left in decompose(w, 16, 3)]
    rank = 16 + 768 * 768 // (16 * (768 + 768))  # what a sign plane costs, as vectors
    for level, plain in enumerate((0.906, 0.822, 0.743), 1):
        rest = np.sqrt((values[rank * level :] ** 2).sum() / (values**2).sum())
        assert rest == pytest.approx(plain, abs=2e-3)
        assert left[level - 1] / np.linalg.norm(w) < rest - 0.2


def test_what_is_left_is_left_of_the_rounded_vectors() -> None:
    w = _normal(96, 128)
    blocks = []
    for block, left in decompose(w, 2, 4):
        blocks.append(block)
        assert np.allclose(w - rebuild(blocks), left, atol=1e-5)


def test_a_matrix_of_zeros_stays_one() -> None:
    found = list(decompose(np.zeros((20, 70), np.float32), 2, 3))
    assert not rebuild([block for block, _ in found]).any()


def _inputs(n: int) -> np.ndarray:
    """Inputs of very different sizes, some of which go together: float32 [512, n]."""
    rng = np.random.default_rng(2)
    x = rng.standard_normal((512, n)) @ (np.eye(n) + 0.2 * rng.standard_normal((n, n)))
    found: np.ndarray = (x * np.exp(rng.standard_normal(n))).astype(np.float32)
    return found


@pytest.mark.parametrize("n", [96, 192])
def test_blocks_that_suit_the_inputs_leave_less_of_the_output(n: int) -> None:
    w, x = _normal(64, n), _inputs(n)
    h = x.T @ x
    factor = inverse_factor(h)
    fitted = list(decompose_for(w, h, factor, 2, 4))
    blocks: list[Block] = []
    before = float(np.linalg.norm(x @ w.T))
    for level, (block, left) in enumerate(fitted, 1):
        blocks.append(block)
        assert np.allclose(w - rebuild(blocks), left, atol=1e-4)
        off = float(np.linalg.norm(x @ left.T))
        assert off**2 == pytest.approx(error(left, h), rel=1e-3)
        assert off < before
        plain = [one for one, _ in decompose(w, 2, level)]
        assert off < 0.9 * np.linalg.norm(x @ (w - rebuild(plain)).T)
        before = off


def test_u_is_fitted_to_the_signs() -> None:
    """No other U leaves less, but for what few steps and float16 leave to be done."""
    w, x = _normal(16, 96), _inputs(96)
    h = x.T @ x
    block, left = next(decompose_for(w, h, inverse_factor(h), 2, 1))
    sign, v = np.where(block.positive, 1.0, -1.0), block.v.astype(np.float64)
    for row in range(16):
        a = x.astype(np.float64) @ (sign[row] * v).T
        best = np.linalg.lstsq(a, x @ w[row].astype(np.float64), rcond=None)[0]
        least = np.linalg.norm(a @ best - x @ w[row])
        assert np.linalg.norm(x @ left[row]) <= 1.01 * least


def test_inputs_that_never_came_do_no_harm() -> None:
    w, x = _normal(20, 70), _inputs(70)
    x[:, 3:20] = 0
    w[5] = 0
    h = x.T @ x
    *_, (_, left) = decompose_for(w, h, inverse_factor(h), 2, 3)
    assert np.isfinite(left).all()
    assert error(left, h) < 0.05 * error(w, h)
