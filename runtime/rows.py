"""Rows and vectors of a model's files, in the form that memory or a kernel takes them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from headrace.errors import ModelFileError
from headrace.families.decoder import Matrix, Vector, tensor_of
from headrace.kernels.invoke import invoke
from headrace.loaders.gguf import ModelFile, TensorInfo, TensorReader
from headrace.placing import (
    Placed,
    PlacedGroups,
    PlacedMatrix,
    group_format,
    tiled_format,
    wrong_in,
)
from headrace.sparse import gqs
from headrace.sparse.format import TILE_ROWS, Floats, Format
from headrace.sparse.registry import FORMATS, by_ggml_type

PIECE_BYTES = 1 << 20  # raw bytes read at a time by each thread
_COPY_BYTES = 8 << 20  # of tensors that are copied
STRAIGHT_BYTES = 4 << 20  # the same, when they go straight to their place


def row_ranges(placed: Placed, begin: int, end: int) -> list[tuple[int, int]]:
    """Rows from `begin` to `end` in the portions that are read at a time: (first, last + 1)."""
    row_bytes = max(1, placed.info.n_bytes // placed.matrix.rows)
    piece = STRAIGHT_BYTES if placed.straight else PIECE_BYTES
    step = max(TILE_ROWS, piece // row_bytes // TILE_ROWS * TILE_ROWS)
    return [(first, min(first + step, end)) for first in range(begin, end, step)]


def raw_rows(reader: TensorReader, placed: PlacedMatrix, first: int, last: int) -> np.ndarray:
    """Rows in the raw bytes of the format in memory, filled up to whole tiles with zero bytes."""
    info, fmt = placed.info, placed.format
    rows = last - first
    n_tiles = -(-rows // TILE_ROWS)
    groups = group_format(info)
    if groups is not None:
        weights = np.zeros((n_tiles * TILE_ROWS, placed.matrix.columns), np.float32)
        weights[:rows] = _dense_rows(reader, info, groups.group, first, last)
        return fmt.encode(weights)
    own = tiled_format(info)
    if own is None:
        row_bytes = info.n_bytes // placed.matrix.rows
        raw = np.zeros((n_tiles * TILE_ROWS, row_bytes), np.uint8)
        reader.readinto(info, first * row_bytes, raw[:rows])
        if not placed.expanded:
            return raw
        if info.scales is not None:
            return _expand_scaled(reader, raw, info, first, fmt)
        return _expand(raw, info.type, fmt)
    columns = placed.matrix.columns
    tiled = np.empty((n_tiles, columns // own.block, own.tile_block_bytes), np.uint8)
    reader.readinto(info, own.tiled_bytes(first, columns), tiled)
    return fmt.encode(own.decode(own.untile(tiled, n_tiles * TILE_ROWS)))


def _dense_rows(
    reader: TensorReader, info: TensorInfo, group: int, first: int, last: int
) -> np.ndarray:
    """The float32 weights of rows of a group-sparse matrix, which are checked."""
    rows, columns = info.shape
    wrong, begin = wrong_in(info), gqs.units_offset(rows)
    gqs.check_size(rows, columns, group, info.n_bytes, wrong)
    raw = np.empty(begin, np.uint8)
    reader.readinto(info, 0, raw)
    head = gqs.check_head(raw, rows, columns, group, info.n_bytes, wrong)
    some = gqs.Head(head.first[first : last + 1], head.row_scales[first:last])
    at, end = (begin + int(head.first[row]) * gqs.unit_bytes(group) for row in (first, last))
    units = np.empty(end - at, np.uint8)
    reader.readinto(info, at, units)
    keep = gqs.check_units(units, some.first, columns, group, at, wrong)
    return gqs.dense(gqs.groups_of(units, some, group, keep), columns, group)


def some_rows(reader: TensorReader, placed: Placed, n: int) -> np.ndarray:
    """About n rows, in tiles that lie evenly over the matrix: float32 [rows, columns]."""
    rows = placed.matrix.rows
    step = max(1, -(-rows // n)) * TILE_ROWS
    as_floats = PlacedMatrix(placed.matrix, placed.info, FORMATS["f32"])
    ranges = [(first, min(first + TILE_ROWS, rows)) for first in range(0, rows, step)]
    parts = [raw_rows(reader, as_floats, a, b)[: b - a].view(np.float32) for a, b in ranges]
    return np.concatenate(parts)


def raw_row(reader: TensorReader, placed: PlacedMatrix, row: int) -> np.ndarray:
    """The bytes of one row in the form that the kernel which tiles takes."""
    if tiled_format(placed.info) is None:
        return raw_rows(reader, placed, row, row + 1)[0]
    first = row // TILE_ROWS * TILE_ROWS  # a tiled file has whole tiles only
    if not placed.straight:
        last = min(first + TILE_ROWS, placed.matrix.rows)
        return raw_rows(reader, placed, first, last)[row - first]
    fmt, columns = placed.format, placed.matrix.columns
    tiled = np.empty((1, columns // fmt.block, fmt.tile_block_bytes), np.uint8)
    reader.readinto(placed.info, fmt.tiled_bytes(first, columns), tiled)
    return fmt.untile(tiled, TILE_ROWS)[row - first]


def read_vector(model: ModelFile, reader: TensorReader, vector: Vector) -> np.ndarray:
    """A vector of the file: float32 [size]."""
    info = tensor_of(model, vector)
    raw = np.empty(info.n_bytes, np.uint8)
    reader.readinto(info, 0, raw)
    floats = _as_floats(raw[None], info.type)[0]
    if vector.plus:
        floats = floats + np.float32(vector.plus)
    return floats if vector.times == 1.0 else floats * np.float32(vector.times)


def float_matrix(model: ModelFile, reader: TensorReader, matrix: Matrix) -> tuple[Floats, Floats]:
    """A small matrix of the file and its bias: float32 [rows, columns] and [rows]."""
    placed = PlacedMatrix(matrix, tensor_of(model, matrix), FORMATS["f32"])
    weights: Floats = raw_rows(reader, placed, 0, matrix.rows)[: matrix.rows].view(np.float32)
    if matrix.bias is None:
        return weights, np.zeros(matrix.rows, np.float32)
    return weights, read_vector(model, reader, Vector(matrix.bias, matrix.rows))


def read_tiled(reader: TensorReader, placed: Placed) -> Iterator[np.ndarray]:
    """The bytes of a matrix as a file of ours has it, piece by piece, made without kernels."""
    if isinstance(placed, PlacedGroups):
        for at in range(0, placed.info.n_bytes, STRAIGHT_BYTES):
            data = np.empty(min(STRAIGHT_BYTES, placed.info.n_bytes - at), np.uint8)
            reader.readinto(placed.info, at, data)
            yield data
        return
    fmt, columns = placed.format, placed.matrix.columns
    for first, last in row_ranges(placed, 0, placed.matrix.rows):
        if placed.straight:
            data = np.empty(fmt.tiled_bytes(last - first, columns), np.uint8)
            reader.readinto(placed.info, fmt.tiled_bytes(first, columns), data)
            yield data
        else:
            yield fmt.tile(raw_rows(reader, placed, first, last)).reshape(-1)


def read_as_it_is(reader: TensorReader, source: Placed | TensorInfo) -> Iterator[np.ndarray]:
    """The bytes of a matrix as a file of ours has it, or of another tensor, piece by piece."""
    if not isinstance(source, TensorInfo):
        yield from read_tiled(reader, source)
        return
    for start in range(0, source.n_bytes, _COPY_BYTES):
        raw = np.empty(min(_COPY_BYTES, source.n_bytes - start), np.uint8)
        reader.readinto(source, start, raw)
        yield raw


def tile_raw(
    addresses: dict[str, int], placed: PlacedMatrix, raw: np.ndarray, to: int, n_tiles: int
) -> None:
    """Tile raw rows [16 * n_tiles, bytes] to an address."""
    n_blocks = placed.matrix.columns // placed.format.block
    invoke(addresses[f"tile_{placed.format.name}"], [raw, raw.shape[1], to, n_blocks, n_tiles])


def _as_floats(raw: np.ndarray, ggml_type: str) -> np.ndarray:
    own = by_ggml_type(ggml_type)
    if own is not None:
        return own.decode(raw)
    from headrace.sparse.expand import expand, plan_expansion

    through = plan_expansion(ggml_type)
    return through.decode(expand(raw, ggml_type, through))


def _expand(raw: np.ndarray, ggml_type: str, fmt: Format) -> np.ndarray:
    if fmt.name == "f32":
        return fmt.encode(_as_floats(raw, ggml_type))
    from headrace.sparse.expand import expand

    return np.ascontiguousarray(expand(raw, ggml_type, fmt))


def _expand_scaled(
    reader: TensorReader, raw: np.ndarray, info: TensorInfo, first: int, fmt: Format
) -> np.ndarray:
    """Rows of a matrix from row `first` on, times their scales, in the bytes of `fmt`."""
    from headrace.sparse.expand import expand_scaled

    scales = info.scales
    assert scales is not None
    # Rows that fill up the last tile have a scale as well.
    of_row = np.minimum((first + np.arange(len(raw))) // scales.rows, scales.info.shape[0] - 1)
    begin, row_bytes = of_row[0], scales.info.n_bytes // scales.info.shape[0]
    coded = np.empty((of_row[-1] + 1 - begin, row_bytes), np.uint8)
    reader.readinto(scales.info, int(begin) * row_bytes, coded)
    values = _as_floats(coded, scales.info.type)
    if scales.whole is not None:
        whole = np.empty((1, scales.whole.n_bytes), np.uint8)
        reader.readinto(scales.whole, 0, whole)
        factor = _as_floats(whole, scales.whole.type)
        values = values / factor if scales.divided else values * factor
    of_row -= begin
    try:
        return expand_scaled(raw, info.type, fmt, values[of_row], scales.columns)
    except ModelFileError as error:
        raise type(error)(str(error), path=info.path, tensor=info.name) from None
