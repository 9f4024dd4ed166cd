"""BitStack's decomposition: signs and magnitudes come back, and each block leaves less."""

from __future__ import annotations

import numpy as np
import pytest

from headrace.sparse.bitstack import BlockShape, decompose, pack, rank_for, rebuild, unpack

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
    assert [rank_for(n) for n in (64, 288, 576, 896, 2048, 4096, 8192)] == [1, 1, 2, 4, 8, 16, 16]


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


def test_scaled_inputs_count_for_more() -> None:
    w = _normal(64, 128)
    scale = np.exp(np.random.default_rng(1).standard_normal(128)).astype(np.float32)
    x = np.random.default_rng(2).standard_normal((256, 128)).astype(np.float32) * scale

    def error(blocks: list) -> float:
        return float(np.linalg.norm(x @ (w - rebuild([block for block, _ in blocks])).T))

    with_scale, without = list(decompose(w, 2, 3, scale)), list(decompose(w, 2, 3))
    assert error(with_scale) < 0.8 * error(without)
    left = (w - rebuild([block for block, _ in with_scale])) * scale
    assert np.allclose(left, with_scale[-1][1], atol=1e-4)
