"""Which format each matrix of a file gets in memory, and which of them can be streamed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np

from headrace.errors import ModelFileError, UnsupportedError
from headrace.families.decoder import Decoder, Matrix, tensor_of
from headrace.loaders.gguf import ModelFile, TensorInfo, TensorReader
from headrace.loaders.tiled import format_name
from headrace.offload.pieces import Cuttable, Piece, cut
from headrace.sparse import gqs, gqs_columns, gqs_kernels, linear
from headrace.sparse.format import TILE_ROWS, Format
from headrace.sparse.gqs import GROUP_FORMATS, GroupFormat, Head, Wrong
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
    expert: bool = False  # of a mixture
    router: bool = False  # or its shared expert's gate

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

    @property
    def packed_bytes(self) -> int:
        """Bytes in a file of ours."""
        return self.n_bytes

    @property
    def always_bytes(self) -> int:
        """Bytes of memory that it takes even where it streams."""
        return 0

    def run_bytes(self, tile: int, tiles: int) -> int:
        """Bytes in memory of so many tiles of 16 rows from `tile` on."""
        return self.format.tiled_bytes(tiles * TILE_ROWS, self.matrix.columns)


@dataclass(frozen=True)
class PlacedGroups:
    """A group-sparse matrix of the file; see `headrace.sparse.gqs`.

    Its units are what is kept or streamed, by runs of 16 rows; what comes before them, 8 bytes for
    each row, is read with the model's header and always in memory.
    """

    matrix: Matrix
    info: TensorInfo
    format: GroupFormat
    head: Head

    expanded = False
    straight = True
    expert = router = False

    @property
    def packed_bytes(self) -> int:
        """Bytes in a file of ours."""
        return self.info.n_bytes

    @property
    def always_bytes(self) -> int:
        """Bytes of memory that it takes even where it streams: those of the head."""
        return 8 * self.matrix.rows + 4

    @property
    def n_bytes(self) -> int:
        """Bytes in memory."""
        return self.always_bytes + self.run_bytes(0, self.tiles)

    @property
    def tiles(self) -> int:
        """Runs of 16 rows."""
        return padded16(self.matrix.rows) // TILE_ROWS

    def rows_of(self, tile: int, tiles: int) -> tuple[int, int]:
        """The rows of so many tiles: the first, and the end."""
        rows = self.matrix.rows
        return min(tile * TILE_ROWS, rows), min((tile + tiles) * TILE_ROWS, rows)

    def unit_at(self, row: int) -> int:
        """Bytes of units before those of a row."""
        return int(self.head.first[row]) * self.format.unit_bytes

    def run_bytes(self, tile: int, tiles: int) -> int:
        """Bytes of the units of so many tiles from `tile` on."""
        first, last = self.rows_of(tile, tiles)
        return self.unit_at(last) - self.unit_at(first)

    @property
    def units_offset(self) -> int:
        """Where the units begin in the tensor."""
        return gqs.units_offset(self.matrix.rows)


Placed: TypeAlias = PlacedMatrix | PlacedGroups


def dense(placed: Placed) -> PlacedMatrix:
    """For those who take tiles or rows: a group-sparse matrix as float32."""
    if isinstance(placed, PlacedMatrix):
        return placed
    return PlacedMatrix(placed.matrix, placed.info, FORMATS["f32"])


def place(
    model: ModelFile, decoder: Decoder, activations: Activations, stack: Stack | None = None
) -> list[Placed]:
    """Choose a format for each matrix, from the header alone, in the order of a pass.

    Of group-sparse ones their heads are read. Matrices that are in a stack have no format.

    With activations "f32", a switch for debugging, coded weights are expanded to float32.

    Raises:
        ModelFileError, UnsupportedError: a tensor is missing, misshapen or of an unusable type.
    """
    stacked = {} if stack is None else stack.shapes
    whole = (m for m in decoder.matrices() if m.name not in stacked)
    routed = decoder.mixtures().values()
    experts = {m.name for one in decoder.in_parts() for m in one.expert_matrices()}
    routers = {m.name for mixture in routed for m in mixture.routers()}
    ends = decoder.embedding.name, decoder.head.name
    with TensorReader() as reader:
        placed = [
            _place_one(
                model, m, activations, m.name in ends, m.name in experts, m.name in routers, reader
            )
            for m in whole
        ]
    for vector in decoder.vectors():
        _readable(tensor_of(model, vector))
    _check_clusters(decoder, placed)
    return placed


def _check_clusters(decoder: Decoder, placed: Iterable[Placed]) -> None:
    """Refuse clusters of neurons that one product cannot run through."""
    by_name = {p.matrix.name: p for p in placed}
    for clusters in decoder.clustered().values():
        first = clusters.each[0]
        for one in clusters.each:
            for matrix, model_of in zip(one.matrices(), first.matrices(), strict=True):
                p, wanted = dense(by_name[matrix.name]), dense(by_name[model_of.name]).format
                if p.format is not wanted or wanted.activation == "tables":
                    other = "" if p.format is wanted else f", the first one {wanted.name}"
                    raise UnsupportedError(
                        f"a cluster of neurons has the format {p.format.name}{other}; all clusters "
                        "of a layer need the same, which is none of bit planes: compress the "
                        "source to another format",
                        path=p.info.path, tensor=p.info.name, offset=p.info.offset,
                    )  # fmt: skip


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
    if own is not None and info.scales is None:
        return own
    from headrace.sparse.expand import plan_expansion, plan_scaled

    try:
        if info.scales is not None:
            return plan_scaled(info.type, info.scales.columns)
        return plan_expansion(info.type)
    except UnsupportedError as error:
        raise UnsupportedError(
            str(error), path=info.path, tensor=info.name, offset=info.offset
        ) from None


def _place_one(
    model: ModelFile,
    matrix: Matrix,
    activations: Activations,
    end: bool,
    expert: bool,
    router: bool,
    reader: TensorReader,
) -> Placed:
    info = tensor_of(model, matrix)
    groups = group_format(info)
    if groups is None:
        return PlacedMatrix(matrix, info, format_of(info, activations), expert, router)
    wrong = wrong_in(info)
    if expert:
        raise UnsupportedError(
            "group-sparse experts are not supported; compress the model to another format",
            path=info.path, tensor=info.name, offset=info.offset,
        )  # fmt: skip
    gqs.check_size(matrix.rows, matrix.columns, groups.group, info.n_bytes, wrong)
    if end or activations == "f32":  # rows of an embedding are looked up
        return PlacedMatrix(matrix, info, FORMATS["f32"])
    raw = np.empty(gqs.units_offset(matrix.rows), np.uint8)
    reader.readinto(info, 0, raw)
    size = matrix.rows, matrix.columns, groups.group, info.n_bytes
    head = gqs.check_head(raw, *size, wrong)
    return PlacedGroups(matrix, info, groups, head)


def group_format(info: TensorInfo) -> GroupFormat | None:
    """The format of a matrix that the file has group-sparse; None for others."""
    return GROUP_FORMATS.get(format_name(info.type) or "")


def wrong_in(info: TensorInfo) -> Wrong:
    """Makes the errors of a group-sparse matrix's bytes."""

    def wrong(at: int, what: str) -> ModelFileError:
        where = {"path": info.path, "tensor": info.name, "offset": info.offset}
        return gqs.refusal(at, what, **where)

    return wrong


def tiled_format(info: TensorInfo) -> Format | None:
    """The format of a matrix that the file has tiled, its size checked; None if it is not tiled.

    Group-sparse ones are not.

    Raises:
        UnsupportedError: there is no such format.
        ModelFileError: the tensor's bytes are not those of a matrix of its shape.
    """
    name = format_name(info.type)
    if name is None or name in GROUP_FORMATS:
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


def streamable(placed: Placed) -> bool:
    """Whether native code alone can bring it from the file into the form that kernels read.

    Experts come in another way, and routers stay: they say ahead which experts will be wanted.
    """
    if placed.expert or placed.router:
        return False
    return not placed.expanded and placed.n_bytes > placed.always_bytes


def cacheable(placed: Iterable[Placed]) -> bool:
    """Whether native code alone can bring every expert among these from the file."""
    experts = [p for p in placed if p.expert]
    return bool(experts) and not any(p.expanded for p in experts)


def pieces_of(placed: Iterable[Placed]) -> list[Piece]:
    """What of these may be streamed, cut into pieces."""
    return cut([_cuttable(p) for p in placed if streamable(p)])


def _cuttable(p: Placed) -> Cuttable:
    if isinstance(p, PlacedGroups):
        rows = [min(tile * TILE_ROWS, p.matrix.rows) for tile in range(p.tiles + 1)]
        begins = tuple(p.units_offset + p.unit_at(row) for row in rows)
        return Cuttable(p.matrix.name, p.tiles, 0, 0, begins[-1], True, begins)
    kept = p.format.tiled_bytes(TILE_ROWS, p.matrix.columns)
    row_bytes = p.info.n_bytes // p.matrix.rows
    read = kept if p.straight else row_bytes * TILE_ROWS
    n_tiles = padded16(p.matrix.rows) // TILE_ROWS
    return Cuttable(p.matrix.name, n_tiles, read, kept, p.info.n_bytes, p.straight)


def kernels_for(
    placed: Iterable[Placed], embedding: str, operations: Mapping[str, Iterable[str]]
) -> list[Kernel]:
    """The kernels that these weights need, each once; `operations` by kind of activation."""
    found: dict[str, Kernel] = {}
    for p in placed:
        if isinstance(p, PlacedGroups):
            for row in (
                gqs_kernels.kernel_named(f"gemm_{p.format.name}"),
                gqs_columns.kernel_named(f"columns_{p.format.name}"),
            ):
                found[row.name] = row
            continue
        rows = linear.kernels(p.format)
        for operation in operations[p.format.activation]:
            if operation == "tile" and p.straight:
                continue
            found[rows[operation].name] = rows[operation]
        if p.matrix.name == embedding:
            found[rows["rows"].name] = rows["rows"]
    return list(found.values())
