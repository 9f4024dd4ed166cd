"""Weights that are read from flash for every pass, and where they come to lie."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from headrace.loaders.model_file import TensorInfo
from headrace.memory import Arena
from headrace.offload.files import StreamedFile
from headrace.offload.modes import MODES
from headrace.offload.pieces import Piece, Residency
from headrace.offload.window import Read, Window
from headrace.placing import Placed
from headrace.stack import BlockAt, matrix_of
from headrace.weights import Part


def reads_of(infos: Mapping[str, TensorInfo], pieces: Sequence[Piece]) -> list[Read]:
    """Where pieces of these tensors lie in the model's files."""
    reads = []
    for piece in pieces:
        info = infos[piece.matrix]
        reads.append(Read(info.path, info.name, info.offset + piece.start, piece.read_bytes))
    return reads


class Streaming:
    """A window over what `residency` streams.

    Args:
        infos: of the tensors that pieces are of, by name.
        placed: matrices by name; what is none of them is a block of a stack.
        residency: something of it is streamed.
        addresses: kernels by name.
        files: the model's files, open; the caller closes them after `close`.
    """

    def __init__(
        self, infos: Mapping[str, TensorInfo], placed: Mapping[str, Placed],
        residency: Residency, addresses: dict[str, int], files: Mapping[Path, StreamedFile],
    ) -> None:  # fmt: skip
        self.residency = residency
        reads = reads_of(infos, residency.streamed)
        self.window = Window(
            reads, residency.slots, residency.slot_bytes, addresses["window_read"], MODES[0],
            files,
        )  # fmt: skip
        staging = residency.staging_bytes
        self._staging = Arena({"0": staging, "1": staging}, huge=staging > 4 << 20)
        self._parts: dict[str, list[Part]] = {}
        self._blocks: dict[str, list[BlockAt]] = {}
        for i, piece in enumerate(residency.streamed):
            if piece.matrix not in placed:
                place = BlockAt(self.window.address(i), i)
                self._blocks.setdefault(matrix_of(piece.matrix), []).append(place)
                continue
            p = placed[piece.matrix]
            row_bytes = 0 if piece.straight else p.info.n_bytes // p.matrix.rows
            self._parts.setdefault(piece.matrix, []).append(
                Part(piece.tile, piece.tiles, self.window.address(i), i, row_bytes)
            )

    def parts(self, name: str) -> list[Part]:
        """What is streamed of a matrix."""
        return self._parts.get(name, [])

    def blocks(self, matrix: str) -> list[BlockAt]:
        """The blocks of a matrix that are streamed: those that memory does not have."""
        return self._blocks.get(matrix, [])

    def staging(self, turn: int) -> int:
        """Address of one of two buffers that raw rows are tiled in."""
        return self._staging.address(str(turn % 2))

    def close(self) -> None:
        """End the readers and give the memory back: steps may refer to it for some time yet."""
        self.window.close()
        self._staging.empty()
