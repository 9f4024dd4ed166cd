"""Products of bytes with sparse constant int8 weights, in blocks of 4 outputs of one input.

After the 4x1 kernel of Shen et al., "An Efficient Sparse Inference Software Accelerator for
Transformer-based Language Models on CPUs" (2306.16601): of the inputs that a block of 4 outputs
has weights of, four at a time are interleaved, so that instructions that add products of 4
neighbouring bytes (`vpdpbusd`, `sdot`) multiply them by the 4 weights of each output.

Rows of activations (tokens) lie turned, in panels: `headrace.kernels.dynamic_columns`.

Weights are a stream (`pack`): of each block, for each four inputs, the bytes from the begin of a
panel to each of these (int32), and their weights, [output][input]. What fills the last four is
input 0 times zero. In front of it are the bytes to each tile of 16 outputs (int64), and the number
of fours of each block (int32).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from headrace.kernels.dynamic_columns import PANEL, in_columns
from headrace.kernels.finishes import INFINITE
from headrace.kernels.sparse_product import kept_blocks
from headrace.kernels.weights_u8 import tails
from headrace.sparse.format import TILE_ROWS
from headrace.targets.simd import (
    arg_float,
    arg_int,
    arg_ptr,
    bcast_i8x4,
    bits_f32,
    bits_i32,
    dot4_each,
    get_i32,
    get_i64,
    interleave4,
    join,
    join4,
    load_f32,
    load_i32,
    load_turned,
    load_u8,
    maximum,
    minimum,
    repeat,
    smaller,
    splat_f32,
    splat_i32,
    store_f32,
    store_f32_grid,
    sub_block,
    to_f32,
    with_lanes,
    xor_u8,
)
from headrace.targets.table import Case, Kernel, KernelFunction
from headrace.targets.target import Target

if TYPE_CHECKING:
    import numpy as np

NAME = "sparse_product_4x1_u8"
ROWS = 4  # outputs of a block
FOUR = 4  # inputs that are multiplied at once
ENTRY = 4 * FOUR + ROWS * FOUR  # bytes of four inputs
BLOCKS = TILE_ROWS // ROWS
_TAIL = 256  # bytes of a tile's tails
_SUMS = TILE_ROWS * PANEL * 4  # of a tile and a panel, at most
SCRATCH = _SUMS + TILE_ROWS * 64


def _tiles(written: int) -> int:
    return -(-written // TILE_ROWS)


def fours_of(kept: np.ndarray) -> np.ndarray:
    """Fours of inputs of each block, of which blocks have any: bool [blocks, inputs]."""
    found: np.ndarray = -(-kept.sum(axis=1) // FOUR)
    return found


def front_bytes(written: int) -> tuple[int, int]:
    """Bytes from the begin of the front of weights to the counts, and of all of it."""
    tiles = _tiles(written)
    return 8 * tiles, 8 * tiles + 4 * tiles * BLOCKS


def some_tiles(slots: list[Any], first: int, tiles: int) -> list[Any]:
    """The argument block for some tiles, out of that for all."""
    found = [*slots]
    for slot in (2, 11) if slots[11] else (2,):
        found[slot] += first * TILE_ROWS * 4
    found[3] += first * _TAIL
    found[5] = tiles
    found[8] += first * BLOCKS * 4
    found[9] += first * 8
    return found


def front(w: np.ndarray) -> np.ndarray:
    """Bytes to each tile's entries (int64) and fours of each block (int32), as bytes."""
    import numpy as np

    fours = fours_of(kept_blocks(w, ROWS)).astype(np.int32)
    starts = (np.cumsum(fours) - fours).reshape(-1, BLOCKS)[:, 0] * ENTRY
    return np.concatenate([starts.astype(np.int64).view(np.uint8), fours.view(np.uint8)])


def pack(w: np.ndarray) -> np.ndarray:
    """Entries of int8 weights [outputs, inputs] as the kernel reads them, bytes, tile by tile."""
    import numpy as np

    kept = kept_blocks(w, ROWS)
    padded = np.zeros((len(kept) * ROWS, w.shape[1]), np.int8)
    padded[: len(w)] = w
    blocks = padded.reshape(-1, ROWS, w.shape[1])
    fours = fours_of(kept)
    starts = np.cumsum(fours) - fours
    block, channel = np.nonzero(kept)
    first = np.cumsum(kept.sum(axis=1)) - kept.sum(axis=1)
    place = starts[block] * FOUR + np.arange(len(block)) - first[block]
    offsets = np.zeros(fours.sum() * FOUR, np.int32)
    offsets[place] = channel * PANEL
    weights = np.zeros((fours.sum() * FOUR, ROWS), np.int8)
    weights[place] = blocks[block, :, channel]
    entries = np.empty((fours.sum(), ENTRY), np.uint8)
    entries[:, : 4 * FOUR] = offsets.reshape(-1, FOUR).view(np.uint8)
    turned = weights.reshape(-1, FOUR, ROWS).transpose(0, 2, 1)
    entries[:, 4 * FOUR :] = turned.reshape(-1, ROWS * FOUR).view(np.uint8)
    return entries.reshape(-1)


def _lanes(target: Target) -> int:
    return max(4, min(16, target.vector_bytes // 4))


def _rows_at_once(target: Target) -> int:
    """Outputs whose sums of 4 vectors are in registers."""
    many = target.vector_bytes >= 64 or target.architecture in ("aarch64", "riscv64")
    return ROWS if many else ROWS // 2


def _sparse(target: Target) -> KernelFunction:
    """y = clamp((sum over inputs of w x) * scale + bias), or with what is there added, as float32.

    Slots: 0 stream, 1 x, 2 y, 3 tails of tiles (`weights_u8.tails`), 4 inputs, 5 tiles of 16
    outputs, 6 rows (tokens), 7 bytes of a row of y, 8 counts, 9 starts, 10 scratch of `SCRATCH`
    bytes for each thread, 11 what is added before clamping (0: nothing; it lies as y does),
    12 least and 13 most value (float32). Threads share the tiles of all panels.
    """
    lanes, at_once = _lanes(target), _rows_at_once(target)
    wide = 4 * lanes  # bytes of a vector
    signed = target.dot_bias(8) == 0

    def of(vectors: int) -> Any:
        def two_of(w: Any) -> Any:
            """Weights of two outputs, for each vector."""
            first, second = bcast_i8x4(w, 1, 0), bcast_i8x4(w + 4, 1, 0)
            return join(repeat(first, vectors), repeat(second, vectors))

        def block(stream: Any, count: Any, x: Any, sums: Any) -> None:
            """4 outputs of some vectors of rows: sums [4][4 vectors]."""
            for begin in range(0, ROWS, at_once):
                acc = repeat(splat_i32(0), vectors * at_once)
                p = stream
                for _ in range(count):
                    four = join4(
                        load_u8(x + get_i32(p), 1, 0), load_u8(x + get_i32(p + 4), 1, 0),
                        load_u8(x + get_i32(p + 8), 1, 0), load_u8(x + get_i32(p + 12), 1, 0),
                    )  # fmt: skip
                    codes = xor_u8(sub_block(interleave4(four), 0, vectors), 0x80)
                    w = p + (16 + begin * 4)
                    weights = two_of(w)
                    if at_once == ROWS:
                        weights = join(weights, two_of(w + 8))
                    acc = dot4_each(acc, repeat(codes, at_once), weights)
                    p = p + ENTRY
                to = sums + begin * (4 * wide)
                store_f32_grid(to, bits_f32(acc), vectors, 4 * wide, wide)

        return block

    four, three, two, one = of(4), of(3), of(2), of(1)

    def written(
        sums: Any, tail: Any, y: Any, more: Any, adds: Any, clamps: Any, least: Any, most: Any,
        row: Any, there: Any, spare: Any,
    ) -> None:  # fmt: skip
        """As many outputs as lanes of as many rows, or of those that are there."""
        start = load_i32(tail, 1, 0)
        if signed:
            start = start + load_i32(tail + 128, 1, 0)
        found = to_f32(bits_i32(load_turned(sums, 4 * wide)) + repeat(start, lanes))
        found = found * repeat(load_f32(tail + 64, 1, 0), lanes)
        found = found + repeat(load_f32(tail + 192, 1, 0), lanes)
        if there >= lanes:
            if adds:
                found = found + load_f32(more, lanes, row)
            if clamps:
                low = maximum(found, repeat(splat_f32(least), lanes))
                found = minimum(repeat(splat_f32(most), lanes), low)
            store_f32(y, found, row)
        else:
            store_f32(spare, found, wide)
            for i in range(there):
                value = load_f32(spare + i * wide, 1, 0)
                if adds:
                    value = value + load_f32(more + i * row, 1, 0)
                if clamps:
                    value = minimum(splat_f32(most), maximum(value, splat_f32(least)))
                store_f32(y + i * row, value, 0)

    def sparse(args: Any, thread: Any, n_threads: Any) -> None:
        stream = arg_ptr(args, 0)
        x = arg_ptr(args, 1)
        y = arg_ptr(args, 2)
        tails = arg_ptr(args, 3)
        inputs = arg_int(args, 4)
        n_tiles = arg_int(args, 5)
        rows = arg_int(args, 6)
        row = arg_int(args, 7)
        counts = arg_ptr(args, 8)
        starts = arg_ptr(args, 9)
        sums = arg_ptr(args, 10) + SCRATCH * thread
        spare = sums + _SUMS
        more = arg_ptr(args, 11)
        adds = arg_int(args, 11) != 0
        least = arg_float(args, 12)
        most = arg_float(args, 13)
        clamps = least > -INFINITE or most < INFINITE
        units = (rows + PANEL - 1) // PANEL * n_tiles
        for u in range(units * thread // n_threads, units * (thread + 1) // n_threads):
            panel = u // n_tiles
            tile = u - panel * n_tiles
            first = panel * PANEL
            vectors = smaller((rows - first + 15) // 16, 4)
            for part in range(0, PANEL // 4, lanes):  # of each 16 rows
                at = x + (first * inputs + part * 4)
                p = stream + get_i64(starts + tile * 8)
                for b in range(BLOCKS):
                    count = get_i32(counts + (tile * BLOCKS + b) * 4)
                    to = sums + b * (ROWS * 4 * wide)
                    if vectors == 4:
                        four(p, count, at, to)
                    elif vectors == 3:
                        three(p, count, at, to)
                    elif vectors == 2:
                        two(p, count, at, to)
                    else:
                        one(p, count, at, to)
                    p = p + count * ENTRY
                for v in range(vectors):
                    begin = first + v * 16 + part
                    for output in range(0, TILE_ROWS, lanes):
                        place = begin * row + (tile * TILE_ROWS + output) * 4
                        written(
                            sums + (output * 4 + v) * wide, tails + (tile * _TAIL + output * 4),
                            y + place, more + place, adds, clamps, least, most, row,
                            smaller(lanes, rows - begin), spare,
                        )  # fmt: skip

    return with_lanes(sparse, lanes)


# --- cases ----------------------------------------------------------------------------------------


def sparse_codes(rng: np.random.Generator, shape: tuple[int, int], density: float) -> np.ndarray:
    """Random int8 weights [outputs, inputs] of which blocks of 4 x 1 are zero."""
    import numpy as np

    there = rng.random((-(-shape[0] // ROWS), shape[1])) < density
    w = rng.integers(-127, 128, shape) * there.repeat(ROWS, axis=0)[: shape[0]]
    return w.astype(np.int8)


# Rows, inputs, outputs, share of blocks that are there.
_SHAPES = (
    (70, 37, 40, 0.3), (128, 64, 16, 1.0), (3, 130, 100, 0.1), (17, 96, 33, 0.0), (99, 40, 16, 0.5),
)  # fmt: skip


def _cases(target: Target, rng: np.random.Generator) -> Iterator[Case]:
    import numpy as np

    for i, (rows, inputs, outputs, density) in enumerate(_SHAPES):
        codes = rng.integers(0, 256, (rows, inputs), dtype=np.uint8)
        codes[0], codes[-1] = 0, 255
        w = sparse_codes(rng, (outputs, inputs), density)
        if density:
            w[:ROWS] = np.array([[127], [-127], [1], [0]])  # of all inputs
            w[ROWS : 2 * ROWS] = 0
        tiles = _tiles(outputs)
        scale = rng.uniform(0.001, 0.01, outputs).astype(np.float32)
        bias = rng.standard_normal(outputs).astype(np.float32)
        zero = int(rng.integers(0, 256))
        sums = w.astype(np.int32).sum(1)
        ends = tails(-zero * sums, scale, sums, True)
        ends[:, 3] = (
            np.pad(bias, (0, tiles * TILE_ROWS - outputs)).view(np.int32).reshape(tiles, -1)
        )
        y = np.full((rows, tiles * TILE_ROWS), np.nan, np.float32)
        expected = np.zeros_like(y)
        exact = (codes.astype(np.int32) - zero) @ w.astype(np.int32).T
        expected[:, :outputs] = exact.astype(np.float32) * scale + bias
        more = rng.standard_normal(y.shape).astype(np.float32) if i % 2 else None
        low, high = (-INFINITE, INFINITE) if i < 2 else (-1.0, 6.0)
        expected = np.clip(expected if more is None else expected + more, low, high)
        places = front(w)
        counts, _ = front_bytes(outputs)
        slots = [
            pack(w), in_columns(codes), y, ends, inputs, tiles, rows, 4 * y.shape[1],
            places[counts:], places[:counts], np.zeros(8 * SCRATCH, np.uint8),
            0 if more is None else more, low, high,
        ]  # fmt: skip
        yield Case(slots, [(y, expected)], 0, f"{rows}x{inputs}x{outputs}, {density}")


def all_kernels() -> list[Kernel]:
    """Every row of this module."""
    sources = (__name__, "headrace.sparse.format", "headrace.kernels.dynamic_columns")
    return [Kernel(NAME, _sparse, sources, _cases, __name__)]


def kernel_named(name: str) -> Kernel:
    """The row of this name."""
    return next(row for row in all_kernels() if row.name == name)
