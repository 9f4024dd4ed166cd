"""Weights in memory: which format each tensor gets, how many bytes, and loading them tile by tile."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np

from headrace.families.decoder import Decoder, Matrix, Vector, tensor_of
from headrace.kernels.invoke import invoke
from headrace.loaders.gguf import ModelFile, TensorInfo, TensorReader
from headrace.memory import Arena
from headrace.sparse import linear
from headrace.sparse.format import TILE_ROWS, Format
from headrace.sparse.registry import FORMATS, by_ggml_type
from headrace.targets.table import Kernel

Activations = Literal["q8", "f32"]
Progress = Callable[[int, int, str], None]

PIECE_BYTES = 1 << 20  # raw bytes read at a time by each thread


def padded16(n: int) -> int:
    """n rounded up to a multiple of 16."""
    return -(-n // 16) * 16


@dataclass(frozen=True)
class PlacedMatrix:
    """A matrix of the file and the format that it has in memory."""

    matrix: Matrix
    info: TensorInfo
    format: Format

    @property
    def n_bytes(self) -> int:
        """Bytes in memory, tiled."""
        return self.format.tiled_bytes(self.matrix.rows, self.matrix.columns)

    @property
    def expanded(self) -> bool:
        """Whether memory holds another coding than the file."""
        return self.format.ggml_type != self.info.type


def place(model: ModelFile, decoder: Decoder, activations: Activations) -> list[PlacedMatrix]:
    """Choose a format for each matrix, from the header alone, in the order of a pass.

    With activations "f32", a switch for debugging, coded weights are expanded to float32.

    Raises:
        ModelFileError, UnsupportedError: a tensor is missing, misshapen or of an unusable type.
    """
    return [_place_one(model, m, activations) for m in decoder.matrices()]


def _place_one(model: ModelFile, matrix: Matrix, activations: Activations) -> PlacedMatrix:
    info = tensor_of(model, matrix)
    fmt = by_ggml_type(info.type)
    if fmt is None:
        from headrace.sparse.expand import plan_expansion

        fmt = plan_expansion(info.type)
    if fmt.activation == "q8" and (activations == "f32" or matrix.columns % fmt.block):
        fmt = FORMATS["f32"]
    return PlacedMatrix(matrix, info, fmt)


class Weights:
    """All weights of a decoder: matrices tiled in one arena, vectors as padded float32 in another."""

    def __init__(self, model: ModelFile, decoder: Decoder, placed: list[PlacedMatrix]) -> None:
        self._model = model
        self.placed = {p.matrix.name: p for p in placed}
        self.matrices = Arena({p.matrix.name: p.n_bytes for p in placed})
        vectors = {v.name: v for v in decoder.vectors()}
        self._vectors = list(vectors.values())
        self.vectors = Arena({v.name: padded16(v.size) * 4 for v in self._vectors}, huge=False)

    def load(
        self, addresses: dict[str, int], n_threads: int, progress: Progress | None = None
    ) -> None:
        """Read and tile everything; each thread holds one piece of the file at a time.

        Args:
            addresses: kernels by name; `tile_<format>` for each format in use.

        Raises:
            ModelFileError: the file cannot be read to the end.
        """
        total = sum(p.info.n_bytes for p in self.placed.values())
        done = 0
        lock = threading.Lock()
        with TensorReader() as reader, ThreadPoolExecutor(n_threads) as pool:
            for vector in self._vectors:
                self.vectors.view(vector.name, "f4")[: vector.size] = self._vector(reader, vector)

            def piece(job: tuple[PlacedMatrix, int, int]) -> int:
                self._piece(reader, addresses, *job)
                return job[2] - job[1]

            jobs = [job for p in self.placed.values() for job in _pieces(p)]
            try:
                for (placed, first, last), _ in zip(jobs, pool.map(piece, jobs), strict=True):
                    if progress is not None:
                        with lock:
                            done += (last - first) * placed.info.n_bytes // placed.matrix.rows
                        progress(min(done, total), total, "loading weights")
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        if progress is not None:
            progress(total, total, "loading weights")

    def _vector(self, reader: TensorReader, vector: Vector) -> np.ndarray:
        info = tensor_of(self._model, vector)
        raw = np.empty(info.n_bytes, np.uint8)
        reader.readinto(info, 0, raw)
        return _as_floats(raw[None], info.type)[0]

    def _piece(
        self,
        reader: TensorReader,
        addresses: dict[str, int],
        placed: PlacedMatrix,
        first: int,
        last: int,
    ) -> None:
        info, fmt, matrix = placed.info, placed.format, placed.matrix
        row_bytes = info.n_bytes // matrix.rows
        rows = last - first
        n_tiles = -(-rows // TILE_ROWS)
        raw = np.zeros((n_tiles * TILE_ROWS, row_bytes), np.uint8)
        reader.readinto(info, first * row_bytes, raw[:rows])
        if placed.expanded:
            raw = _expand(raw, info.type, fmt)
        invoke(
            addresses[f"tile_{fmt.name}"],
            [
                raw,
                raw.shape[1],
                self.matrices.address(matrix.name)
                + first // TILE_ROWS * fmt.tiled_bytes(TILE_ROWS, matrix.columns),
                matrix.columns // fmt.block,
                n_tiles,
            ],
        )


def _pieces(placed: PlacedMatrix) -> Iterable[tuple[PlacedMatrix, int, int]]:
    rows = placed.matrix.rows
    row_bytes = max(1, placed.info.n_bytes // rows)
    step = max(TILE_ROWS, PIECE_BYTES // row_bytes // TILE_ROWS * TILE_ROWS)
    return [(placed, first, min(first + step, rows)) for first in range(0, rows, step)]


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


def kernels_for(
    placed: Iterable[PlacedMatrix], embedding: str, operations: Mapping[str, Iterable[str]]
) -> list[Kernel]:
    """The kernels that these weights need, each once; `operations` by kind of activation."""
    found: dict[str, Kernel] = {}
    for p in placed:
        rows = linear.kernels(p.format)
        for operation in operations[p.format.activation]:
            found[rows[operation].name] = rows[operation]
        if p.matrix.name == embedding:
            found[rows["rows"].name] = rows["rows"]
    return list(found.values())
