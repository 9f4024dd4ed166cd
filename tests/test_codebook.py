"""Codebooks: their tables, every entry of them, any bytes, and what cannot be written."""

from __future__ import annotations

import numpy as np
import pytest
from gguf import quants
from kernel_harness import call
from targets_here import TARGETS, best

from headrace.errors import UnsupportedError
from headrace.sparse.codebook import table_of
from headrace.sparse.format import Format
from headrace.sparse.linear import kernels
from headrace.sparse.registry import FORMATS
from headrace.sparse.unpacking import unpacking_slots
from headrace.targets.cache import KernelStore

CODEBOOKS = [fmt for fmt in FORMATS.values() if not fmt.written]
every_codebook = pytest.mark.parametrize("fmt", CODEBOOKS, ids=lambda fmt: fmt.name)
TARGET_NAMES = [pytest.param(name, marks=best(name)) for name in TARGETS]
ROWS = 64
_stores = {name: KernelStore(target) for name, target in TARGETS.items()}


def looked_up(fmt: Format, raw: np.ndarray, target_name: str) -> np.ndarray:
    """All rows as the kernel gives them."""
    kernel = kernels(fmt)["rows"]
    address = _stores[target_name].load([kernel])[kernel.name]
    rows, n = len(raw), raw.shape[1] // fmt.block_bytes * fmt.block
    x = np.zeros((rows, n), np.float32)
    slots = [
        fmt.tile(raw), x, np.arange(rows), n // fmt.block, np.array([rows]), x.strides[0], 0, 1.0,
        n, *unpacking_slots(fmt, fmt.block, 1),
    ]  # fmt: skip
    call(address, slots, 2)
    return x


def test_all_seven_are_here() -> None:
    names = {f"IQ{name}" for name in ("1_S", "1_M", "2_XXS", "2_XS", "2_S", "3_XXS", "3_S")}
    assert {fmt.ggml_type for fmt in CODEBOOKS} == names
    for fmt in CODEBOOKS:
        assert fmt.tile_block_bytes == 16 * fmt.block_bytes  # memory is the bytes of the file


@every_codebook
def test_tables_say_the_same_twice(fmt: Format) -> None:
    assert fmt.unpacked is not None
    grid = getattr(quants, "IQ1_S" if fmt.name == "iq1_m" else str(fmt.ggml_type))
    grid.init_grid()
    n, width = grid.grid_shape
    times = 8 if fmt.name.startswith("iq1") else 1
    table = fmt.unpacked.table()
    assert table.size == n * width + 2 * n + 32
    entries = table[: n * width].view(np.int8).reshape(n, width)
    assert np.array_equal(entries, grid.grid.reshape(n, width) * times)
    packed = table[n * width : -32].view(np.uint16)
    meant = table[-32:].view(np.int8)
    for i in range(width):
        if width == 4:
            again = meant[packed >> (4 * i) & 15]
        else:
            again = meant[packed >> (0, 8, 4, 12)[i // 2] & 15 | np.uint16(16 * (i % 2))]
        assert np.array_equal(again, entries[:, i])


def test_a_table_holds_few_different_numbers() -> None:
    with pytest.raises(ValueError):
        table_of(np.arange(8, dtype=np.int8).reshape(1, 8))


@every_codebook
@pytest.mark.parametrize("target_name", TARGET_NAMES)
def test_every_entry_and_any_bytes(fmt: Format, target_name: str) -> None:
    # 64 rows of 8 blocks have 16,384 random entries of 8, eight times as many as there are.
    rng = np.random.default_rng(4)
    raw = rng.integers(0, 256, (ROWS, 8 * fmt.block_bytes), dtype=np.uint8)
    raw[0], raw[1] = 0xFF, 0
    found, expected = looked_up(fmt, raw, target_name), fmt.decode(raw)
    nan = np.isnan(expected)
    assert np.array_equal(np.isnan(found), nan)
    assert np.array_equal(found[~nan].view(np.uint32), expected[~nan].view(np.uint32))
    assert 0 < nan.mean() < 0.5


@every_codebook
def test_encoding_is_refused(fmt: Format) -> None:
    with pytest.raises(UnsupportedError, match="is read, not written"):
        fmt.encode(np.zeros((1, 256), np.float32))
