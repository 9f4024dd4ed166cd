"""Products of pixels with sparse constant weights: 1x1 convolutions and encoders' matrices.

After Elsen et al., "Fast Sparse ConvNets" (1911.09723): a vector holds one channel of 16 pixels, a
weight that is not zero multiplies it, and nothing is done for those that are. Images lie pixel by
pixel elsewhere, so a panel of pixels is turned before and its outputs are turned back, which costs
a few hundredths of what the dense product does. Blocks of 16 outputs need no turning and have a
kernel of their own (`headrace.kernels.sparse_tiles`), out of the same stream.

Weights are a stream (`pack`): channels read are cut into slabs, whose part of a panel stays in the
first cache; of each tile of 16 outputs, slab and block of `rows` outputs, for each channel that has
a weight, the bytes from the slab's begin to that channel (int32; of a panel, or of a pixel where
blocks have 16 outputs), and the weights of all rows of the block (float32). Apart from it (`front`)
are the bytes to each slab of each tile (int64), and the number of entries of each block (int32), so
that some tiles can be computed alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from headrace.kernels.finishes import INFINITE
from headrace.sparse.format import TILE_ROWS
from headrace.targets.simd import (
    arg_float,
    arg_int,
    arg_ptr,
    bcast_f32,
    fma_outer,
    get_i32,
    get_i64,
    larger,
    load_f32,
    load_f32_grid,
    load_turned,
    maximum,
    minimum,
    outer,
    repeat,
    smaller,
    splat_f32,
    store_f32,
    store_f32_grid,
    zeros_f32,
)
from headrace.targets.table import Case, Kernel, KernelFunction
from headrace.targets.target import Target

if TYPE_CHECKING:
    import numpy as np

ROWS = (1, 4, 16)  # of a block of outputs that have weights of the same channels
PANEL = 4  # vectors of 16 pixels
SLAB = 128  # channels read, of which a panel has 32 KiB
_VECTOR = 64
_CHANNEL = PANEL * _VECTOR  # bytes of a panel


def _tiles(written: int) -> int:
    return -(-written // TILE_ROWS)


def slabs(read: int) -> int:
    """Into how many the channels read are cut."""
    return max(1, -(-read // SLAB))


def scratch_bytes(read: int, written: int) -> int:
    """What a thread needs: a slab of a panel, its sums, and one vector of pixels."""
    tiles = _tiles(written) if slabs(read) > 1 else 1
    channels = -(-min(read, SLAB) // TILE_ROWS) * TILE_ROWS
    return (channels + tiles * TILE_ROWS) * _CHANNEL + 16 * _VECTOR


def counts_at(read: int, written: int) -> int:
    """Bytes from the begin of the front of weights to the counts; starts come first."""
    return 8 * slabs(read) * _tiles(written)


def front_bytes(read: int, written: int, rows: int) -> int:
    """Of the front of weights."""
    of_slab = 8 + 4 * (TILE_ROWS // rows)
    return of_slab * slabs(read) * _tiles(written)


def entry_bytes(rows: int) -> int:
    """Of a block of `rows` x 1 that is not zero."""
    return 4 + 4 * rows


def some_tiles(slots: list[Any], first: int, tiles: int, rows: int) -> list[Any]:
    """The argument block for some tiles, out of that for all."""
    found = [*slots]
    for slot in (2, 3, 4) if slots[4] else (2, 3):
        found[slot] += first * TILE_ROWS * 4
    found[6] = tiles
    before = first * slabs(slots[5])
    found[12] += before * (TILE_ROWS // rows) * 4
    found[13] += before * 8
    return found


def kept_blocks(w: np.ndarray, rows: int) -> np.ndarray:
    """Which blocks of weights [outputs, channels read] have any: bool [blocks, channels]."""
    import numpy as np

    there = np.zeros((_tiles(len(w)) * TILE_ROWS, w.shape[1]), bool)
    there[: len(w)] = w != 0
    blocks: np.ndarray = there.reshape(-1, rows, w.shape[1])
    found: np.ndarray = np.any(blocks, axis=1)
    return found


def entries_of(kept: np.ndarray, rows: int) -> np.ndarray:
    """How many blocks have any: [tiles, slabs, blocks of a tile]."""
    import numpy as np

    starts = range(0, slabs(kept.shape[1]) * SLAB, SLAB)
    counts = [kept[:, at : at + SLAB].sum(axis=1, dtype=np.int32) for at in starts]
    return np.stack([count.reshape(-1, TILE_ROWS // rows) for count in counts], axis=1)


def front(w: np.ndarray, rows: int) -> np.ndarray:
    """What tells where the entries of weights [outputs, channels read] are, int32."""
    import numpy as np

    counts = entries_of(kept_blocks(w, rows), rows)
    of_slab = counts.sum(axis=2, dtype=np.int64).reshape(-1)
    starts = (np.cumsum(of_slab) - of_slab) * entry_bytes(rows)
    return np.concatenate([starts.view(np.int32), counts.reshape(-1)])


def pack(w: np.ndarray, rows: int) -> np.ndarray:
    """Entries of weights [outputs, channels read] as the kernel reads them, int32."""
    import numpy as np

    kept = kept_blocks(w, rows)
    padded = np.zeros((len(kept) * rows, w.shape[1]), np.float32)
    padded[: len(w)] = w
    blocks = padded.reshape(-1, rows, w.shape[1])
    of_slab = []
    for first in range(0, slabs(w.shape[1]) * SLAB, SLAB):
        block, channel = np.nonzero(kept[:, first : first + SLAB])
        entry = np.empty((len(block), 1 + rows), np.int32)
        entry[:, 0] = channel * (4 if rows == TILE_ROWS else _CHANNEL)
        entry[:, 1:] = blocks[block, :, first + channel].view(np.int32)
        ends = np.searchsorted(block, np.arange(1, _tiles(len(w))) * (TILE_ROWS // rows))
        of_slab.append(np.split(entry, ends))
    return np.concatenate([tile for tiles in zip(*of_slab, strict=True) for tile in tiles])


def kernel_of(rows: int) -> str:
    """The kernel for blocks of `rows` x 1."""
    return f"sparse_product_{rows}x1_f32"


def _sparse(target: Target, rows: int) -> KernelFunction:
    """y = clamp(bias + sum over channels of w x, or with what is there added to it).

    Slots: 0 stream, 1 x, 2 y, 3 bias (of all tiles), 4 what is added before clamping (0: nothing;
    it lies as y does), 5 channels read, 6 tiles of 16 outputs, 7 least and 8 most value (float32),
    9 pixels, 10 bytes of a pixel that is read (of whole vectors), 11 of one that is written,
    12 counts, 13 starts, 14 scratch, 15 its bytes for each thread. Threads share the pixels, or,
    where these are few, the tiles.
    """
    most = max(1, target.vector_bytes // 16)  # vectors of 16 pixels at once
    fewer = max(2, most - 1)
    n_bytes = entry_bytes(rows)
    per_tile = TILE_ROWS // rows

    def of(vectors: int) -> Any:
        def tile(
            stream: Any, counts: Any, panel: Any, bias: Any, sums: Any, begins: Any
        ) -> None:  # fmt: skip
            """16 outputs of some vectors of a panel: sums [16][PANEL][16]."""
            p = stream
            for block in range(per_tile):
                to = sums + block * (rows * _CHANNEL)
                acc = load_f32_grid(to, rows, vectors, _CHANNEL, _VECTOR)
                if begins:
                    acc = outer(
                        bcast_f32(bias + block * (rows * 4), rows, 4),
                        repeat(splat_f32(1.0), vectors),
                    )
                left = get_i32(counts + block * 4)
                if rows == 1:
                    other = repeat(zeros_f32(1), vectors)
                    while left >= 2:  # two sums: the next product need not wait for the last
                        acc = fma_outer(
                            bcast_f32(p + 4, rows, 4),
                            load_f32(panel + get_i32(p), vectors, _VECTOR), acc,
                        )  # fmt: skip
                        other = fma_outer(
                            bcast_f32(p + 12, rows, 4),
                            load_f32(panel + get_i32(p + 8), vectors, _VECTOR), other,
                        )  # fmt: skip
                        p = p + 16
                        left -= 2
                    acc = acc + other
                while left > 0:
                    acc = fma_outer(
                        bcast_f32(p + 4, rows, 4),
                        load_f32(panel + get_i32(p), vectors, _VECTOR), acc,
                    )  # fmt: skip
                    p = p + n_bytes
                    left -= 1
                store_f32_grid(to, acc, vectors, _CHANNEL, _VECTOR)

        return tile

    whole, some, two, one = of(most), of(fewer), of(2), of(1)

    def turned(source: Any, pixel: Any, pixels: Any, to: Any, spare: Any) -> None:
        """16 channels of up to 16 pixels, each channel a vector."""
        if pixels < 16:
            for i in range(pixels):
                store_f32(spare + i * _VECTOR, load_f32(source + i * pixel, 1, 0), 0)
            for i in range(pixels, 16):
                store_f32(spare + i * _VECTOR, zeros_f32(1), 0)
            store_f32(to, load_turned(spare, _VECTOR), _CHANNEL)
        else:
            store_f32(to, load_turned(source, pixel), _CHANNEL)

    def written(
        sums: Any, to: Any, pixel: Any, pixels: Any, more: Any, adds: Any, least: Any,
        highest: Any, spare: Any,
    ) -> None:  # fmt: skip
        """16 outputs of up to 16 pixels, to where the pixels lie."""
        found = load_turned(sums, _CHANNEL)
        low, high = repeat(splat_f32(least), 16), repeat(splat_f32(highest), 16)
        if pixels == 16:
            if adds:
                found = found + load_f32(more, 16, pixel)
            store_f32(to, minimum(high, maximum(found, low)), pixel)
        else:
            store_f32(spare, found, _VECTOR)
            for i in range(pixels):
                value = load_f32(spare + i * _VECTOR, 1, 0)
                if adds:
                    value = value + load_f32(more + i * pixel, 1, 0)
                bounded = minimum(splat_f32(highest), maximum(value, splat_f32(least)))
                store_f32(to + i * pixel, bounded, 0)

    def sparse(args: Any, thread: Any, n_threads: Any) -> None:
        stream = arg_ptr(args, 0)
        x = arg_ptr(args, 1)
        y = arg_ptr(args, 2)
        bias = arg_ptr(args, 3)
        more = arg_ptr(args, 4)
        adds = arg_int(args, 4) != 0
        channels = arg_int(args, 5)
        n_tiles = arg_int(args, 6)
        least = arg_float(args, 7)
        highest = arg_float(args, 8)
        pixels = arg_int(args, 9)
        pixel = arg_int(args, 10)
        out_pixel = arg_int(args, 11)
        counts = arg_ptr(args, 12)
        starts = arg_ptr(args, 13)
        n_slabs = (channels + SLAB - 1) // SLAB
        spare = arg_ptr(args, 14) + arg_int(args, 15) * thread
        panel = spare + 16 * _VECTOR
        sums = panel + smaller((channels + 15) // 16 * 16, SLAB) * _CHANNEL
        keep = 0 if n_slabs == 1 else TILE_ROWS * _CHANNEL
        n_vectors = (pixels + 15) // 16
        # The last vector begins where it is full, if there is one: some pixels come twice.
        behind = larger(pixels - 16, 0)
        first = n_vectors * thread // n_threads
        last = n_vectors * (thread + 1) // n_threads
        t = 0
        end = n_tiles
        if n_vectors < most * n_threads:
            first = 0
            last = n_vectors
            t = n_tiles * thread // n_threads
            end = n_tiles * (thread + 1) // n_threads
        v = first
        while v < last:
            panels = (last - v + PANEL - 1) // PANEL
            n = (last - v + panels - 1) // panels  # all about as long
            for slab in range(n_slabs):
                begin = slab * SLAB
                width = smaller(channels - begin, SLAB)
                for i in range(n):
                    here = smaller((v + i) * 16, behind)
                    for c in range(0, width, 16):
                        turned(
                            x + (here * pixel + (begin + c) * 4), pixel,
                            smaller(pixels - here, 16),
                            panel + (c * _CHANNEL + i * _VECTOR), spare,
                        )  # fmt: skip
                for tile in range(t, end):
                    row = tile * n_slabs + slab
                    p = stream + get_i64(starts + row * 8)
                    count = counts + row * (per_tile * 4)
                    to = sums + (tile - t) * keep
                    begins = slab == 0
                    i = 0
                    while i < n:
                        at = panel + i * _VECTOR
                        sum_at = to + i * _VECTOR
                        if n - i >= most:
                            whole(p, count, at, bias + tile * 64, sum_at, begins)
                            i += most
                        elif n - i >= fewer:
                            some(p, count, at, bias + tile * 64, sum_at, begins)
                            i += fewer
                        elif n - i >= 2:
                            two(p, count, at, bias + tile * 64, sum_at, begins)
                            i += 2
                        else:
                            one(p, count, at, bias + tile * 64, sum_at, begins)
                            i += 1
                    if slab + 1 == n_slabs:
                        for i in range(n):
                            here = smaller((v + i) * 16, behind)
                            place = here * out_pixel + tile * 64
                            written(
                                to + i * _VECTOR, y + place, out_pixel, smaller(pixels - here, 16),
                                more + place, adds, least, highest, spare,
                            )  # fmt: skip
            v += n

    return sparse


# --- references and cases -------------------------------------------------------------------------


def sparse_weights(
    rng: np.random.Generator, shape: tuple[int, int], rows: int, density: float
) -> np.ndarray:
    """Random weights [outputs, channels read] of which blocks of `rows` x 1 are zero."""
    import numpy as np

    blocks = -(-shape[0] // rows)
    there = (rng.random((blocks, shape[1])) < density).repeat(rows, axis=0)[: shape[0]]
    found: np.ndarray = np.where(there, rng.standard_normal(shape), 0).astype(np.float32)
    return found


def cases_of(rows: int, target: Target, rng: np.random.Generator) -> Iterator[Case]:
    """Cases of the kernel for blocks of `rows` x 1."""
    import numpy as np

    for i, (pixels, read, written, density) in enumerate((
        (49, 37, 40, 0.3), (130, 16, 16, 0.1), (3, 20, 100, 0.5), (17, SLAB + 21, 32, 0.2),
            (30, 4 * SLAB, 16, 0.1),
        (65, 24, 33, 0.0),
    )):  # fmt: skip
        padded, out = -(-read // 16) * 16, -(-written // 16) * 16
        x = rng.standard_normal((pixels, padded)).astype(np.float32)
        x[0] *= 1000
        w = sparse_weights(rng, (written, read), rows, density)
        bias = np.zeros(out, np.float32)
        bias[:written] = rng.standard_normal(written)
        y = np.full((pixels, out), np.nan, np.float32)
        more = rng.standard_normal(y.shape).astype(np.float32) if i % 2 else None
        low, high = (-INFINITE, INFINITE) if i < 2 else (0.0, 6.0)
        exact, size = np.zeros((2, *y.shape))
        exact[:, :written] = x[:, :read].astype(np.float64) @ w.T
        size[:, :written] = np.abs(x[:, :read]).astype(np.float64) @ np.abs(w).T
        added = bias if more is None else bias + more.astype(np.float64)
        places, n_bytes = front(w, rows), scratch_bytes(read, written)
        counts = counts_at(read, written) // 4
        slots = [
            pack(w, rows), x, y, bias, 0 if more is None else more, read, out // 16, low,
            high, pixels, padded * 4, out * 4, places[counts:], places[:counts],
            np.zeros(8 * n_bytes, np.uint8), n_bytes,
        ]  # fmt: skip
        # Each product and sum is rounded once.
        bound = (size + np.abs(added)) * (read + 4) * 2.0**-24 + 1e-30
        expected = np.clip(exact + added, low, high).astype(np.float32)
        yield Case(slots, [(y, expected)], bound, f"{pixels}x{read}x{written}")


def all_kernels() -> list[Kernel]:
    """Every row of this module."""
    sources = (__name__, "headrace.sparse.format")
    return [
        Kernel(
            kernel_of(rows), partial(_sparse, rows=rows), sources, partial(cases_of, rows), __name__
        )
        for rows in ROWS
        if rows < TILE_ROWS
    ]  # fmt: skip


def kernel_named(name: str) -> Kernel:
    """The row of this name."""
    return next(row for row in all_kernels() if row.name == name)
