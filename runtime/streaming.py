"""Weights that are read from flash for every pass, and where they come to lie."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from headrace.memory import Arena
from headrace.offload.files import StreamedFile
from headrace.offload.modes import MODES
from headrace.offload.pieces import Piece, Residency
from headrace.offload.window import Read, Window
from headrace.placing import Placed
from headrace.weights import Part


def reads_of(placed: Mapping[str, Placed], pieces: Sequence[Piece]) -> list[Read]:
    """Where pieces lie in the model's files."""
    reads = []
    for piece in pieces:
        info = placed[piece.matrix].info
        reads.append(Read(info.path, info.name, info.offset + piece.start, piece.read_bytes))
    return reads


class Streaming:
    """A window over what `residency` streams.

    Args:
        placed: matrices by name.
        residency: something of it is streamed.
        addresses: kernels by name.
        files: the model's files, open; the caller closes them after `close`.
    """

    def __init__(
        self, placed: Mapping[str, Placed], residency: Residency,
        addresses: dict[str, int], files: Mapping[Path, StreamedFile],
    ) -> None:  # fmt: skip
        self.residency = residency
        reads = reads_of(placed, residency.streamed)
        self.window = Window(
            reads, residency.slots, residency.slot_bytes, addresses["window_read"], MODES[0],
            files,
        )  # fmt: skip
        staging = residency.staging_bytes
        self._staging = Arena({"0": staging, "1": staging}, huge=staging > 4 << 20)
        self._parts: dict[str, list[Part]] = {}
        for i, piece in enumerate(residency.streamed):
            p = placed[piece.matrix]
            row_bytes = 0 if piece.straight else p.info.n_bytes // p.matrix.rows
            self._parts.setdefault(piece.matrix, []).append(
                Part(piece.tile, piece.tiles, self.window.address(i), i, row_bytes)
            )

    def parts(self, name: str) -> list[Part]:
        """What is streamed of a matrix."""
        return self._parts.get(name, [])

    def staging(self, turn: int) -> int:
        """Address of one of two buffers that raw rows are tiled in."""
        return self._staging.address(str(turn % 2))

    def close(self) -> None:
        """End the readers."""
        self.window.halt()
