"""Which format each matrix of a file gets in memory, and which of them can be streamed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from headrace.errors import ModelFileError, UnsupportedError
from headrace.families.decoder import Decoder, Matrix, tensor_of
from headrace.loaders.gguf import ModelFile, TensorInfo
from headrace.loaders.tiled import format_name
from headrace.offload.pieces import Cuttable, Piece, cut
from headrace.sparse import linear
from headrace.sparse.float4 import PACKED, SCALED
from headrace.sparse.format import TILE_ROWS, Format
from headrace.sparse.registry import FORMATS, by_ggml_type
from headrace.stack import Stack
from headrace.targets.table import Kernel

Activations = Literal["q8", "f32"]


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
        as_it_is = self.format.ggml_type == self.info.type and self.info.scales is None
        return not (self.straight or as_it_is)

    @property
    def straight(self) -> bool:
        """Whether the file's bytes are those of memory."""
        return format_name(self.info.type) == self.format.name


def place(
    model: ModelFile, decoder: Decoder, activations: Activations, stack: Stack | None = None
) -> list[PlacedMatrix]:
    """Choose a format for each matrix, from the header alone, in the order of a pass.

    Matrices that are in a stack have none.

    With activations "f32", a switch for debugging, coded weights are expanded to float32.

    Raises:
        ModelFileError, UnsupportedError: a tensor is missing, misshapen or of an unusable type.
    """
    stacked = {} if stack is None else stack.shapes
    whole = (m for m in decoder.matrices() if m.name not in stacked)
    placed = [_place_one(model, m, activations) for m in whole]
    for vector in decoder.vectors():
        _readable(tensor_of(model, vector))
    return placed


def format_of(info: TensorInfo, activations: Activations = "q8") -> Format:
    """The format that a matrix has in memory, or that a vector is read as.

    Raises:
        ModelFileError, UnsupportedError: its type cannot be used.
    """
    fmt = tiled_format(info) or _readable(info)
    if fmt.activation != "f32" and (activations == "f32" or info.shape[-1] % fmt.block):
        fmt = FORMATS["f32"]
    return fmt


def _readable(info: TensorInfo) -> Format:
    """The format that a tensor of the file is read as, of those that are not tiled."""
    own = by_ggml_type(info.type)
    if info.scales is not None and info.type in (PACKED, "NVFP4"):
        return FORMATS[SCALED]
    if own is not None:
        return own
    from headrace.sparse.expand import plan_expansion

    try:
        return plan_expansion(info.type)
    except UnsupportedError as error:
        raise UnsupportedError(
            str(error), path=info.path, tensor=info.name, offset=info.offset
        ) from None


def _place_one(model: ModelFile, matrix: Matrix, activations: Activations) -> PlacedMatrix:
    info = tensor_of(model, matrix)
    return PlacedMatrix(matrix, info, format_of(info, activations))


def tiled_format(info: TensorInfo) -> Format | None:
    """The format of a matrix that the file has tiled, its size checked; None if it is not tiled.

    Raises:
        UnsupportedError: there is no such format.
        ModelFileError: the tensor's bytes are not those of a matrix of its shape.
    """
    name = format_name(info.type)
    if name is None:
        return None
    fmt = FORMATS.get(name)
    where: dict[str, Any] = {"path": info.path, "tensor": info.name, "offset": info.offset}
    if fmt is None:
        raise UnsupportedError(
            f"this release has no weight format {name!r}: update Headrace", **where
        )
    rows, columns = info.shape
    if columns % fmt.block or fmt.tiled_bytes(rows, columns) != info.n_bytes:
        raise ModelFileError(
            f"its {info.n_bytes:,} bytes are no {name} matrix of {rows} x {columns}: changed by "
            "another program or corrupt; write the file again",
            **where,
        )
    return fmt


def streamable(placed: PlacedMatrix) -> bool:
    """Whether native code alone can bring it from the file into the form that kernels read."""
    return not placed.expanded


def pieces_of(placed: Iterable[PlacedMatrix]) -> list[Piece]:
    """What of these may be streamed, cut into pieces."""
    return cut([_cuttable(p) for p in placed if streamable(p)])


def _cuttable(p: PlacedMatrix) -> Cuttable:
    kept = p.format.tiled_bytes(TILE_ROWS, p.matrix.columns)
    row_bytes = p.info.n_bytes // p.matrix.rows
    read = kept if p.straight else row_bytes * TILE_ROWS
    n_tiles = padded16(p.matrix.rows) // TILE_ROWS
    return Cuttable(p.matrix.name, n_tiles, read, kept, p.info.n_bytes, p.straight)


def kernels_for(
    placed: Iterable[PlacedMatrix], embedding: str, operations: Mapping[str, Iterable[str]]
) -> list[Kernel]:
    """The kernels that these weights need, each once; `operations` by kind of activation."""
    found: dict[str, Kernel] = {}
    for p in placed:
        rows = linear.kernels(p.format)
        for operation in operations[p.format.activation]:
            if operation == "tile" and p.straight:
                continue
            found[rows[operation].name] = rows[operation]
        if p.matrix.name == embedding:
            found[rows["rows"].name] = rows["rows"]
    return list(found.values())
