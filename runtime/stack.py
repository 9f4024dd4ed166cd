"""The stack of a BitStack model: which blocks of which matrices a file has, and in what order.

A file of ours (`headrace.loaders.tiled`) has of a matrix "blk.0.ffn_up.weight" the tensors
"blk.0.ffn_up.weight.block0", ".block1" and so on, of the format "bitstack_k4": blocks of 4 vectors
(`headrace.sparse.bitstack`). They lie behind each other in the order in which they are worth
having, the first of every matrix before all others: what fits in memory is a prefix, one read.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from headrace.errors import ModelFileError, UnsupportedError
from headrace.families.decoder import Decoder, Matrix
from headrace.loaders.gguf import ModelFile, TensorInfo, TensorReader
from headrace.loaders.tiled import ALIGNMENT, format_name
from headrace.memory import Arena
from headrace.offload.pieces import Piece
from headrace.offload.prefix import Ranked
from headrace.sizes import format_size
from headrace.sparse.bitstack import RANKS, BlockShape

_NAME = re.compile(r"(.+)\.block(\d{1,3})")
MOST_LEVELS = 1000  # blocks of a matrix that a name can tell apart
_FORMAT = re.compile(r"bitstack_k(\d{1,4})")


def block_name(matrix: str, level: int) -> str:
    """The tensor that is block `level` of a matrix."""
    return f"{matrix}.block{level}"


def matrix_of(block: str) -> str:
    """The matrix that a tensor of this name is a block of."""
    return block.rpartition(".block")[0]


def block_format(rank: int) -> str:
    """The name of the format of blocks of `rank` vectors."""
    return f"bitstack_k{rank}"


def is_block(tensor: TensorInfo) -> bool:
    """Whether a tensor is a block of a stack."""
    return _FORMAT.fullmatch(format_name(tensor.type) or "") is not None


def is_first(tensor: TensorInfo) -> bool:
    """Whether a block is the first of its matrix."""
    return tensor.name.endswith(".block0")


@dataclass(frozen=True, repr=False)
class StackBlock:
    """A block of a matrix, and where it is in the file."""

    matrix: Matrix
    level: int
    info: TensorInfo
    shape: BlockShape

    def __repr__(self) -> str:
        return f"<block {self.level} of {self.matrix.name}, {format_size(self.info.n_bytes)}>"


class StackBlocks(tuple[StackBlock, ...]):
    """Blocks of a stack, in their order, which print as one line."""

    __slots__ = ()

    def __repr__(self) -> str:
        matrices = len({one.matrix.name for one in self})
        size = format_size(sum(one.info.n_bytes for one in self))
        return f"<{len(self):,} blocks of {matrices:,} matrices, {size}>"


@dataclass(frozen=True)
class Stack:
    """All blocks of a file, in their order.

    Attributes:
        matrices: names in the order in which a pass multiplies by them.
    """

    blocks: tuple[StackBlock, ...]
    matrices: tuple[str, ...]

    @property
    def shapes(self) -> dict[str, BlockShape]:
        """The blocks' shape, by matrix."""
        return {one.matrix.name: one.shape for one in self.blocks}

    @property
    def least(self) -> int:
        """Blocks that a model needs: the first of every matrix."""
        return len(self.shapes)

    def n_bytes(self, count: int) -> int:
        """Bytes of the first `count` blocks, as they lie in the file and in memory."""
        if count == 0:
            return 0
        last = self.blocks[count - 1].info
        return last.offset + last.n_bytes - self.blocks[0].info.offset

    def fitting(self, n_bytes: int) -> int:
        """How many blocks, of those that are worth most, fit in so many bytes."""
        low, high = 0, len(self.blocks)
        while low < high:
            middle = (low + high + 1) // 2
            if self.n_bytes(middle) <= n_bytes:
                low = middle
            else:
                high = middle - 1
        return low

    def ranked(self) -> Ranked:
        """All blocks for `headrace.offload.prefix`; those of a matrix are a group."""
        pieces, turns = [], []
        index = {name: i for i, name in enumerate(self.matrices)}
        for one in self.blocks:
            info = one.info
            room = -(-info.n_bytes // ALIGNMENT) * ALIGNMENT
            tiles = one.shape.tiles
            pieces.append(Piece(info.name, 0, tiles, 0, info.n_bytes, info.n_bytes, room, True))
            turns.append(index[one.matrix.name] * MOST_LEVELS + one.level)
        groups = tuple(turn // MOST_LEVELS for turn in turns)
        return Ranked(tuple(pieces), tuple(turns), groups, self.least)

    def __len__(self) -> int:
        return len(self.blocks)

    @property
    def weights(self) -> int:
        """Weights of the matrices."""
        return sum(shape.rows * shape.columns for shape in self.shapes.values())


def refuse_stack(model: ModelFile, decoder: Decoder) -> None:
    """Make sure that the matrices of a model that is to be compressed are whole.

    Raises:
        UnsupportedError: they are stacks.
    """
    if block_name(decoder.layers[0].attention.query.name, 0) in model.tensors:
        raise UnsupportedError("is a stack already: take its source", path=model.paths[0])


def stack_of(model: ModelFile, decoder: Decoder) -> Stack | None:
    """The stack of a file; None if all its matrices are whole.

    Raises:
        ModelFileError: blocks are missing, out of order or of other sizes than their matrices.
        UnsupportedError: blocks of a kind that this release does not know.
    """
    matrices = {m.name: m for m in decoder.matrices()}
    found = []
    for info in sorted(model.tensors.values(), key=lambda info: info.offset):
        kind = format_name(info.type)
        if kind is None or not kind.startswith("bitstack"):
            continue
        name = _NAME.fullmatch(info.name)
        matrix = matrices.get(name[1]) if name else None
        if name is None or matrix is None:
            _bad("is a block of no matrix of this model", info)
        found.append(StackBlock(matrix, int(name[2]), info, _shape(matrix, kind, info)))
    if not found:
        return None
    _check(model, found)
    return Stack(tuple(found), tuple(matrices))


def _shape(matrix: Matrix, kind: str, info: TensorInfo) -> BlockShape:
    named = _FORMAT.fullmatch(kind)
    if named is None or int(named[1]) not in RANKS:
        raise UnsupportedError(
            f"this release has no weight format {kind!r}: update Headrace",
            path=info.path, tensor=info.name, offset=info.offset,
        )  # fmt: skip
    shape = BlockShape(matrix.rows, matrix.columns, int(named[1]))
    if info.shape != (matrix.rows, matrix.columns) or matrix.columns % 32:
        _bad(f"has shape {list(info.shape)}, not {[matrix.rows, matrix.columns]}", info)
    if info.n_bytes != shape.n_bytes:
        _bad(f"has {info.n_bytes:,} bytes, a block of this shape {shape.n_bytes:,}", info)
    return shape


def _check(model: ModelFile, blocks: list[StackBlock]) -> None:
    levels: Counter[str] = Counter()
    shapes: dict[str, BlockShape] = {}
    end = blocks[0].info.offset
    for one in blocks:
        name, info = one.matrix.name, one.info
        if name in model.tensors:
            _bad("is a block of a matrix that the file has whole, too", info)
        if one.level != levels[name]:
            _bad(f"comes before block {levels[name]} of its matrix", info)
        if one.level == 0 and len(levels) < sum(levels.values()):
            _bad("is the first block of its matrix, but second blocks of others come before", info)
        if shapes.setdefault(name, one.shape) != one.shape:
            _bad("has another number of vectors than the block before it", info)
        if info.path != blocks[0].info.path or info.offset != end:
            _bad("does not lie behind the block before it", info)
        levels[name] += 1
        end = -(-(info.offset + info.n_bytes) // ALIGNMENT) * ALIGNMENT


def _bad(problem: str, info: TensorInfo) -> NoReturn:
    where: dict[str, Any] = {"path": info.path, "tensor": info.name, "offset": info.offset}
    raise ModelFileError(
        f"{problem}: changed by another program or corrupt; write the file again", **where
    )


@dataclass(frozen=True)
class BlockAt:
    """Where a block is: at `address` in memory, or to be streamed.

    Attributes:
        request: number of the read that brings it, None if it is in memory.
    """

    address: int
    request: int | None = None


class StackMemory:
    """The first blocks of a stack in memory, as they lie in the file.

    Attributes:
        count: how many there are.
        limits: of how many blocks of a matrix `blocks` tells at most.
    """

    def __init__(self, stack: Stack) -> None:
        self.stack = stack
        self.count = 0
        self.limits: Mapping[str, int] = {}
        self._of: dict[str, list[tuple[int, int]]] = {}  # which they are, and where in the file
        for i, one in enumerate(stack.blocks):
            self._of.setdefault(one.matrix.name, []).append((i, one.info.offset))
        whole = stack.n_bytes(len(stack.blocks))
        first = stack.blocks[0].info
        self._file = TensorInfo("(the stack)", "I8", (whole,), first.path, first.offset, whole)
        self._arena = Arena({"stack": whole})

    def keep(self, count: int, reader: TensorReader) -> None:
        """Keep the first `count` blocks: read those that are missing, at once, or drop the last.

        Raises:
            ModelFileError: the file cannot be read; all is as before then.
        """
        now, then = self.stack.n_bytes(self.count), self.stack.n_bytes(count)
        if then > now:
            try:
                reader.readinto(self._file, now, self._arena.view("stack")[now:then])
            except BaseException:
                self._arena.release("stack", now, then - now)
                raise
        else:
            self._arena.release("stack", then, now - then)
        self.count = count

    def blocks(self, matrix: str) -> list[BlockAt]:
        """Where the blocks of a matrix lie that are in memory."""
        base = self._arena.address("stack") - self._file.offset
        found = [BlockAt(base + offset) for i, offset in self._of.get(matrix, []) if i < self.count]
        return found[: self.limits.get(matrix)]
