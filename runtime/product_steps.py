"""Steps that multiply by weight matrices, and those that make the inputs of products.

Of weights in one piece, in parts that stream, in raw rows that are tiled when they are used, of
group-sparse ones, and of stacks of blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from headrace.families.decoder import Decoder, FeedForward, Matrix, Vector
from headrace.kernels import bitstack
from headrace.placing import Placed, PlacedGroups, dense
from headrace.plan import (
    COUNT,
    ONE,
    OUT_COUNT,
    OUT_FIRST,
    REBUILT,
    ZERO,
    Mode,
    Shape,
    input_kind,
    records_bytes,
    round_up,
    row_widths,
    stack_room,
    staged_tiles,
    unpacked_bytes,
)
from headrace.sparse.bitstack import BlockShape
from headrace.sparse.format import TILE_ROWS, Format
from headrace.sparse.linear import activation_bytes
from headrace.stack import BlockAt
from headrace.step import Places, Step
from headrace.targets.target import Target
from headrace.weights import Part


def gated_rows(f: FeedForward) -> tuple[str, str]:
    """The buffers of rows that what down reads is made of; "": there is no second one."""
    return ("up", "") if f.gate is None else ("gate", "up")


class ProductSteps:
    """Products of a decoder's matrices for a target.

    Weights have the formats of `placed`, or are stacks of blocks of such shapes, by matrix name.
    With `resident`, those blocks of a stack are left out that are streamed.
    """

    def __init__(
        self, decoder: Decoder, placed: Mapping[str, Placed], shape: Shape, places: Places,
        target: Target, stacked: Mapping[str, BlockShape],
    ) -> None:  # fmt: skip
        self._decoder = decoder
        self._placed = placed
        self._target = target
        self._stacked = stacked
        self._shape = shape
        self._places = places
        # Asked for at every step: worked out once.
        self._row_widths = row_widths(decoder)
        self._widest = decoder.widest_input
        self._unpacked_bytes = unpacked_bytes(placed.values(), target)
        self._records_bytes = records_bytes(placed.values())
        self.resident = False
        self._turn = 0  # of the two buffers for staging, or for codes
        shapes = stacked.values()
        self._room = stack_room(shapes, target, shape.threads) if shapes else None

    def address(self, mode: Mode, name: str) -> int:
        """Of the buffer that a mode uses."""
        return self._places.buffer(name, mode.large)

    def word(self, word: int) -> int:
        """Address of a word of the state."""
        return self._places.buffer("state", False) + 8 * word

    def vector(self, vector: Vector | None) -> int:
        """Its address; 0: there is none."""
        return 0 if vector is None else self._places.vector(vector.key)

    def row_bytes(self, name: str) -> int:
        """Bytes between rows of a buffer of floats."""
        return self._row_widths[name] * 4

    def prepare(
        self, mode: Mode, producer: str, kind: str, a: str, b: str, n: int,
        weight: int = 0, post: int = 0, add: int = 0, last: bool = False, tokens: int | None = None,
    ) -> Step:  # fmt: skip
        """Make an input of products of the rows `a` (and `b`), of as many as the word `tokens` has.

        Without it, of all tokens of the pass, or, where `mode` says so, by each thread for itself.
        """
        group = mode.group(kind)
        private = mode.private and tokens is None
        place = activation_bytes(kind, n)
        a_bytes, b_bytes = self.row_bytes(a), self.row_bytes(b or a)
        x_private = a_bytes if private and a == "x" else 0
        count = self.word(ONE if private else (OUT_COUNT if last else COUNT))
        start = OUT_FIRST if last and not private else ZERO
        slots = [
            self.address(mode, a), self.address(mode, b or a), weight, post,
            self.address(mode, f"input_{kind}"), n, count if tokens is None else tokens,
            self.word(start), a_bytes, b_bytes, place * group, group, x_private,
            self.private_bytes(kind) if private else 0, self.address(mode, "row"),
            self.row_bytes("row"), float(self._decoder.eps), add,
        ]  # fmt: skip
        name = f"{producer}_{input_kind(kind)}"
        return Step(name, slots, not private, f"{producer} to {kind}")

    def private_bytes(self, kind: str) -> int:
        """Bytes between the inputs that threads make for themselves."""
        return round_up(activation_bytes(kind, round_up(self._widest, 32)), 64)

    def kinds(self, mode: Mode, matrices: list[Matrix]) -> list[str]:
        """The activations that matrices are multiplied by."""
        return sorted({mode.kind(self._activation(m)) for m in matrices})

    def _activation(self, matrix: Matrix) -> str:
        stacked = matrix.name in self._stacked
        return "rows" if stacked else self._placed[matrix.name].format.activation

    def norm(
        self, mode: Mode, norm: Vector, add: tuple[str, Vector | None] | None,
        readers: list[Matrix], last: bool = False,
    ) -> list[Step]:  # fmt: skip
        """x += what the last block made; the normalised x as input, once per kind of activation."""
        steps = []
        for kind in self.kinds(mode, readers):
            b, post = add if add is not None else ("", None)
            how = 0 if add is None else (1 if post is None else 2)
            at = self.vector(norm), self.vector(post)
            steps.append(
                self.prepare(mode, "norm", kind, "x", b, self._decoder.width, *at, how, last)
            )
            add = None  # a second kind of activation reads the x that the first one updated
        return steps

    def input(self, mode: Mode, producer: str, a: str, b: str, reader: Matrix) -> list[Step]:
        """The input of a matrix made of rows `a` (and `b`)."""
        (kind,) = self.kinds(mode, [reader])
        return [self.prepare(mode, producer, kind, a, b, reader.columns)]

    def products(self, mode: Mode, outputs: dict[str, Matrix], last: bool = False) -> list[Step]:
        """Products by matrices, each into the buffer of its name; the inputs lie ready."""
        steps = []
        for name, matrix in outputs.items():
            if matrix.name in self._stacked:
                make = self._rebuilt if mode.large else self._blocks
                steps += make(mode, name, matrix)
                continue
            placed = self._placed[matrix.name]
            if isinstance(placed, PlacedGroups):
                steps += self._sparse(mode, name, placed)
                continue
            for part in self._places.parts(matrix):
                steps += self._product(mode, name, matrix, part, last)
        steps[-1] = replace(steps[-1], barrier=True)
        return steps

    def _product(self, mode: Mode, name: str, matrix: Matrix, part: Part, last: bool) -> list[Step]:
        fmt = dense(self._placed[matrix.name]).format
        kind = mode.kind(fmt.activation)
        group = mode.group(kind)
        bias = self._bias(mode, matrix)
        count = ONE if mode.private else (OUT_COUNT if last else COUNT)
        weights, steps = part.address, []
        n_blocks = matrix.columns // fmt.block
        n_bytes = fmt.tiled_bytes(part.tiles * TILE_ROWS, matrix.columns)
        at = 4 * TILE_ROWS * part.tile
        if part.row_bytes:
            # Threads tile what they multiply. A buffer is used again when all have passed the
            # barrier behind its neighbour, so when none reads it any more.
            weights, self._turn = self._places.staging(self._turn), self._turn + 1
            slots = [part.address, part.row_bytes, weights, n_blocks, part.tiles]
            steps.append(
                Step(
                    f"tile_{fmt.name}", slots, True, f"tile {matrix.name}", n_bytes,
                    part.request, waits=True, gives=True,
                )
            )  # fmt: skip
        slots = [
            weights, self.address(mode, f"input_{kind}"), self.address(mode, name) + at,
            n_blocks, part.tiles, self.word(count),
            self.private_bytes(kind) if mode.private else 0, self.row_bytes(name), bias + at,
            activation_bytes(kind, matrix.columns) * group, *self.unpacking(fmt),
        ]  # fmt: skip
        streamed = part.request is not None and not part.row_bytes
        steps.append(
            Step(
                f"{mode.operation(fmt.activation)}_{fmt.name}", slots, False, matrix.name,
                0 if part.row_bytes else n_bytes,
                part.request if streamed else None, streamed, streamed, at if last else None,
            )
        )  # fmt: skip
        return steps

    def _sparse(self, mode: Mode, name: str, placed: PlacedGroups) -> list[Step]:
        """Products by a group-sparse matrix; its parts begin with the units of their rows."""
        matrix, kind = placed.matrix, mode.kind(placed.format.activation)
        kernel = f"{mode.operation(placed.format.activation)}_{placed.format.name}"
        head, steps = self._places.head(matrix), list[Step]()
        scales = head + 4 * matrix.rows + 4
        for part in self._places.parts(matrix):
            first, last = placed.rows_of(part.tile, part.tiles)
            slots = [
                head + 4 * first, scales + 4 * first, part.address,
                self.address(mode, f"input_{kind}"), self.address(mode, name) + 4 * first,
                last - first, self.word(ONE if mode.private else COUNT),
                self.private_bytes(kind) if mode.private else 0, self.row_bytes(name),
                self._bias(mode, matrix) + 4 * first,
                activation_bytes(kind, matrix.columns) * mode.group(kind),
            ]  # fmt: skip
            if kind == "columns":
                slots[7] = matrix.columns
                slots += [self._places.buffer("records", False), self._records_bytes]
            streamed = part.request is not None
            steps.append(
                Step(
                    kernel, slots, False, matrix.name,
                    placed.run_bytes(part.tile, part.tiles), part.request, streamed, streamed,
                    weights=2,
                )
            )  # fmt: skip
        return steps

    def unpacking(self, fmt: Format) -> list[int]:
        """The slots that products and rows of an unpacked format have more than others."""
        if fmt.unpacked is None:
            return []
        return [
            self._places.buffer("unpacked", False), self._unpacked_bytes,
            self._places.table(fmt.name) if fmt.unpacked.table else 0,
        ]  # fmt: skip

    def _blocks(self, mode: Mode, name: str, matrix: Matrix) -> list[Step]:
        """Products by the blocks of a matrix, one after the other."""
        room = self._room
        assert room is not None
        shape, steps = self._stacked[matrix.name], list[Step]()
        group = bitstack.group_of(shape.rank, self._target)
        count = self.word(ONE if mode.private else COUNT)
        private = room.codes if mode.private else 0
        y, y_bytes = self.address(mode, name), self.row_bytes(name)
        start, start_bytes = self._bias(mode, matrix), 0
        for at in self._blocks_of(matrix):
            block, request = at.address, at.request
            streamed = request is not None
            # As with staging, a buffer is used again when nobody reads it any more.
            half = self._turn % 2 * room.tokens * room.codes
            codes, self._turn = self.address(mode, "codes") + half, self._turn + 1
            slots = [
                self.address(mode, "input_rows"),
                self.private_bytes("rows") if mode.private else 0,
                activation_bytes("rows", shape.columns), block + shape.v_offset, shape.rank, group,
                codes, private, room.codes, count, shape.sign_blocks, shape.columns,
                self.address(mode, "spread"), room.row,
            ]  # fmt: skip
            label = f"vectors of {matrix.name}"
            steps.append(
                Step("spread", slots, not mode.private, label, request=request, waits=streamed)
            )
            slots = [
                block, codes, private, room.codes, y, y_bytes, start, start_bytes, count,
                shape.sign_blocks, shape.tiles,
            ]  # fmt: skip
            kernel = f"signs_k{shape.rank}"
            steps.append(
                Step(
                    kernel, slots, False, matrix.name, shape.n_bytes, request=request,
                    gives=streamed,
                )
            )  # fmt: skip
            start, start_bytes = y, y_bytes
        return steps

    def _blocks_of(self, matrix: Matrix) -> list[BlockAt]:
        found = self._places.blocks(matrix)
        return [one for one in found if one.request is None or not self.resident]

    def _bias(self, mode: Mode, matrix: Matrix) -> int:
        return self._places.vector(matrix.bias) if matrix.bias else self.address(mode, "zeros")

    def _rebuilt(self, mode: Mode, name: str, matrix: Matrix) -> list[Step]:
        """Products by what the blocks of a matrix stand for, some tiles at a time."""
        room = self._room
        assert room is not None
        shape, steps = self._stacked[matrix.name], list[Step]()
        blocks = self._blocks_of(matrix)
        n_blocks = shape.columns // REBUILT.block
        at_once = staged_tiles(shape.columns, self._target, self._shape.threads)
        kind = mode.kind("rows")
        kernel = f"rebuild_k{shape.rank}"
        # A step waits for one request: for each block that streams there is a step of no tiles that
        # waits for it, and one that gives it back behind all others.
        none = [0, shape.sign_blocks, shape.columns, 0, 0, shape.tiles, 0, 0, 0]
        requests = [block.request for block in blocks if block.request is not None]
        steps += [
            Step(kernel, none, False, f"wait for {matrix.name}", request=one, waits=True)
            for one in requests
        ]
        for tile in range(0, shape.tiles, at_once):
            tiles = min(at_once, shape.tiles - tile)
            staging = self.address(mode, "staging") + self._turn % 2 * room.staging
            self._turn += 1
            slots = [
                staging, shape.sign_blocks, shape.columns, tile, tiles, shape.tiles,
                self.address(mode, "rebuild"), room.rebuild, len(blocks),
                *(block.address for block in blocks),
            ]  # fmt: skip
            steps.append(Step(kernel, slots, True, f"rebuild {matrix.name}"))
            at = 4 * TILE_ROWS * tile
            slots = [
                staging, self.address(mode, f"input_{kind}"), self.address(mode, name) + at,
                n_blocks, tiles, self.word(COUNT), 0, self.row_bytes(name),
                self._bias(mode, matrix) + at,
                activation_bytes(kind, shape.columns) * mode.group(kind),
            ]  # fmt: skip
            steps.append(Step(f"gemm_{REBUILT.name}", slots, False, matrix.name))
        steps += [
            Step(kernel, none, False, f"give back {matrix.name}", request=one, gives=True)
            for one in requests
        ]
        return steps

    def gated(self, mode: Mode, f: FeedForward, output: str) -> list[Step]:
        """A feed-forward whose input lies ready."""
        return [
            *self.products(mode, ({"gate": f.gate} if f.gate is not None else {}) | {"up": f.up}),
            *self.input(mode, f.producer, *gated_rows(f), f.down),
            *self.products(mode, {output: f.down}),
        ]
