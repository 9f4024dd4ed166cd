"""Kernels of BitStack matrices (`headrace.sparse.bitstack`): a product for few tokens, and tiles.

`spread` and `signs` multiply by the blocks as they are: S * (U V) x is U times (S (V[r] * x)) for
each r. The vectors V[r] * x are coded like k tokens ("q8"), so that signs are expanded to bytes
once for all of them. For one token every thread makes them for itself: that is cheaper than a
barrier.

`rebuild` makes tiles of Q8_0 of what the blocks stand for: for long chunks, in the cache of the
core that then multiplies them by all tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from headrace.kernels.prepare import consumer
from headrace.sparse import q8_0
from headrace.sparse.bitstack import (
    INPUTS,
    RANKS,
    SIGN_BYTES,
    BlockShape,
    decompose,
    pack,
    rebuild,
)
from headrace.sparse.interleaving import load_eights
from headrace.sparse.linear import (
    Q8_BLOCK,
    Q8_BLOCK_BYTES,
    dequantize_q8,
    quantize_q8,
)
from headrace.sparse.sums import by_columns
from headrace.sparse.token_pairs import pair_entries, separate_entries
from headrace.targets.simd import (
    absolute,
    and_u8,
    arg_int,
    arg_ptr,
    bcast_f32,
    bits_f32,
    bits_i32,
    by_token,
    dot8,
    dot_init,
    dot_result,
    fma,
    get_i64,
    load_f16,
    load_f32,
    load_i32,
    load_q8,
    maximum,
    outer,
    part,
    past_q8,
    q8_f32,
    q8_i32,
    repeat,
    round_i32,
    select_lt,
    shl,
    shl_u8,
    shr_u8,
    splat_f32,
    splat_i32,
    store_f16,
    store_f32,
    store_i32,
    strip,
    sub_block,
    to_f32,
    with_lanes,
    zeros_f32,
)
from headrace.targets.table import Case, Kernel, KernelFunction
from headrace.targets.target import Target

if TYPE_CHECKING:
    import numpy as np

Q8_0_BYTES = q8_0.FORMAT.tile_block_bytes
ALL = 1 << 16
FIRST_REBUILT = 9  # slot of the first block in `rebuild`


def group_of(rank: int, target: Target) -> int:
    """Vectors of a block that are multiplied at once; their codes lie side by side."""
    return min(rank, target.tokens("q8"))


def row_bytes(columns: int) -> int:
    """Bytes of a thread's scratch in `spread`."""
    return -(-columns // INPUTS) * INPUTS * 4


def code_bytes(rank: int, columns: int) -> int:
    """Bytes of the coded vectors of one token."""
    return rank * -(-columns // INPUTS) * (INPUTS // Q8_BLOCK) * Q8_BLOCK_BYTES


def rebuild_scratch_bytes(rank: int) -> int:
    """Bytes of a thread's scratch in `rebuild`: weights of 64 inputs, and V there."""
    return INPUTS * 64 + rank * INPUTS * 4


# --- signs by coded vectors -----------------------------------------------------------------------


def _first_half(acc: Any, w: Any, stride: Any, x: Any, tokens: Any, tiles: Any, group: Any) -> Any:
    """acc + the signs of inputs 0..31 of a block, times `tokens` vectors."""
    entry = load_q8(x, tokens)
    # Codes 0 and 2 instead of -1 and 1: what they have too much comes off as a sum.
    total = dot_init(q8_i32(entry, 40), tiles)
    v = load_eights(w, tiles, stride)
    total = dot8(total, and_u8(shl_u8(v, 1), 2), entry, 0, 4)
    total = dot8(total, and_u8(v, 2), entry, 8, 4)
    total = dot8(total, and_u8(shr_u8(v, 1), 2), entry, 16, 4)
    total = dot8(total, and_u8(shr_u8(v, 2), 2), entry, 24, 4)
    scale = outer(repeat(splat_f32(1.0), tiles), q8_f32(entry, 32))
    return fma(scale, to_f32(dot_result(total, 4)), acc)


def _second_half(acc: Any, w: Any, stride: Any, x: Any, tokens: Any, tiles: Any, group: Any) -> Any:
    """The same for inputs 32..63."""
    entry = load_q8(x, tokens)
    total = dot_init(q8_i32(entry, 40), tiles)
    v = load_eights(w, tiles, stride)
    total = dot8(total, and_u8(shr_u8(v, 3), 2), entry, 0, 4)
    total = dot8(total, and_u8(shr_u8(v, 4), 2), entry, 8, 4)
    total = dot8(total, and_u8(shr_u8(v, 5), 2), entry, 16, 4)
    total = dot8(total, and_u8(shr_u8(v, 6), 2), entry, 24, 4)
    scale = outer(repeat(splat_f32(1.0), tiles), q8_f32(entry, 32))
    return fma(scale, to_f32(dot_result(total, 4)), acc)


def _sum(count: int) -> Any:
    """Adds up `count` vectors (a power of two) of a block."""
    if count == 1:
        return lambda v: v
    half = count // 2
    rest = _sum(half)

    def add(v: Any) -> Any:
        return rest(sub_block(v, 0, half) + sub_block(v, half, half))

    return add


def _add_rows(tokens: int, tiles: int, u_tile: int) -> Any:
    """y = start + U * sums of `tiles` tiles, `tokens` vectors each."""
    add_up = _sum(tokens)
    left = tokens * (tiles - 1)

    def one(sums: Any, u: Any, start: Any, y: Any) -> None:
        store_f32(y, load_f32(start, 1, 0) + add_up(load_f16(u, tokens, 32) * sums), 0)

    if tiles == 1:
        return one
    others = _add_rows(tokens, tiles - 1, u_tile)

    def several(sums: Any, u: Any, start: Any, y: Any) -> None:
        one(sub_block(sums, 0, tokens), u, start, y)
        others(sub_block(sums, tokens, left), u + u_tile, start + 64, y + 64)

    return several


def _products(rank: int, tiles: int, tokens: int, columns: int) -> Any:
    """y = start + U * (signs * coded vectors) of some tiles or a strip, `tokens` at a time."""
    low = by_columns(_first_half, tokens, columns, tokens)
    high = by_columns(_second_half, tokens, columns, tokens)
    u_tile, u_group = 32 * rank, 32 * tokens
    in_columns = columns < tokens
    group_bytes = Q8_BLOCK_BYTES * tokens
    add_rows = _add_rows(tokens, tiles, u_tile)

    def after(x: Any) -> Any:
        return past_q8(x, tokens) if in_columns else x + group_bytes

    def products(w: Any, x: Any, u: Any, start: Any, y: Any, n_blocks: Any, stride: Any) -> None:
        for group in range(rank // tokens):
            acc = outer(zeros_f32(tiles), repeat(splat_f32(0.0), tokens))
            at = w
            codes = x + group * (2 * n_blocks * group_bytes)
            for _ in range(n_blocks):
                acc = low(acc, at, stride, codes, tiles)
                codes = after(codes)
                acc = high(acc, at, stride, codes, tiles)
                codes = after(codes)
                at = at + SIGN_BYTES
            add_rows(by_token(acc), u + group * u_group, start, y)
            start = y

    return products


def _spread(target: Target) -> KernelFunction:
    """V[r] * x of a block, coded: "q8" of `rank` tokens in groups.

    Slots: 0 x (float32), 1 bytes between the threads' own x (0: shared), 2 bytes between tokens of
    x, 3 V, 4 vectors of the block, 5 of a group of codes, 6 codes, 7 bytes between the threads' own
    codes (0: threads share the vectors), 8 bytes between tokens of codes, 9 address of the token
    count, 10 blocks of 64 inputs in a row, 11 inputs (a multiple of 32), 12 scratch row, 13 bytes
    between the threads' scratch.
    """
    code = consumer("q8", target.token_pairs)

    def spread(args: Any, thread: Any, n_threads: Any) -> None:
        x = arg_ptr(args, 0) + arg_int(args, 1) * thread
        rank = arg_int(args, 4)
        group = arg_int(args, 5)
        private = arg_int(args, 7)
        codes = arg_ptr(args, 6) + private * thread
        n = arg_int(args, 10) * INPUTS
        inputs = arg_int(args, 11)
        row = arg_ptr(args, 12) + arg_int(args, 13) * thread
        count = get_i64(arg_ptr(args, 9)) * rank
        first = count * thread // n_threads
        last = count * (thread + 1) // n_threads
        if private != 0:
            first = 0
            last = count
        for i in range(inputs, n, 16):
            store_f32(row + i * 4, zeros_f32(1), 0)
        for one in range(first, last):
            token = one // rank
            r = one % rank
            v = arg_ptr(args, 3) + r * n * 2
            of_token = x + token * arg_int(args, 2)
            for i in range(0, inputs, 16):
                product = load_f16(v + i * 2, 1, 0) * load_f32(of_token + i * 4, 1, 0)
                store_f32(row + i * 4, product, 0)
            out = codes + token * arg_int(args, 8)
            out = out + r // group * group * (n // Q8_BLOCK) * Q8_BLOCK_BYTES
            code(row, n, out, r % group, group)

    return spread


def _signs(rank: int, target: Target) -> KernelFunction:
    """y[token] = start[token] + U * (signs by the coded vectors of a block).

    Slots: 0 the block, 1 codes, 2 bytes between the threads' own codes (0: shared), 3 bytes between
    tokens of codes, 4 y, 5 bytes between tokens of y, 6 start (float32; may be y), 7 bytes between
    tokens of it, 8 address of the token count, 9 blocks of 64 inputs in a row, 10 tiles.
    Threads share the tiles.
    """
    tokens = group_of(rank, target)
    lanes = target.lanes("q8") if tokens > 1 else target.gemv_lanes
    paired = target.token_pairs and tokens > 1
    in_columns = lanes < 16 or target.q8_in_registers
    columns = (2 if paired else 1) if in_columns else ALL
    most = target.gemm_tiles if lanes == 16 else 1
    several = _products(rank, most, tokens, columns)
    single = _products(rank, 1, tokens, columns)
    strips = 16 // lanes
    u_tile = 32 * rank

    def signs(args: Any, thread: Any, n_threads: Any) -> None:
        w = arg_ptr(args, 0)
        codes = arg_ptr(args, 1) + arg_int(args, 2) * thread
        y = arg_ptr(args, 4)
        start = arg_ptr(args, 6)
        n_blocks = arg_int(args, 9)
        n_tiles = arg_int(args, 10)
        stride = n_blocks * SIGN_BYTES
        u = w + (n_tiles * stride + n_blocks * (2 * INPUTS * rank))
        first = n_tiles * thread // n_threads
        last = n_tiles * (thread + 1) // n_threads
        for _ in range(get_i64(arg_ptr(args, 8))):
            t = first
            if strips == 1:
                while t + most <= last:
                    several(
                        w + t * stride, codes, u + t * u_tile, start + t * 64, y + t * 64,
                        n_blocks, stride,
                    )  # fmt: skip
                    t += most
                while t < last:
                    single(
                        w + t * stride, codes, u + t * u_tile, start + t * 64, y + t * 64,
                        n_blocks, stride,
                    )  # fmt: skip
                    t += 1
            else:
                while t < last:
                    for s in range(strips):
                        at = t * 64 + s * lanes * 4
                        single(
                            strip(w + t * stride, s), codes, strip(u + t * u_tile, s),
                            start + at, y + at, n_blocks, stride,
                        )  # fmt: skip
                    t += 1
            codes = codes + arg_int(args, 3)
            start = start + arg_int(args, 7)
            y = y + arg_int(args, 5)

    return with_lanes(signs, lanes, in_order=in_columns, token_pairs=paired)


# --- tiles of what the blocks stand for -----------------------------------------------------------


def _chain(rank: int) -> Any:
    """u[0] * v[0] + ... + u[rank - 1] * v[rank - 1], one after the other."""
    if rank == 1:
        return lambda u, v: u * v
    last = rank - 1
    before = _chain(last)

    def chain(u: Any, v: Any) -> Any:
        first = before(sub_block(u, 0, last), sub_block(v, 0, last))
        return fma(part(u, last), part(v, last), first)

    return chain


def _to_q8_0(weights: Any, dst: Any) -> None:
    """Code the weights of 32 inputs by 16 rows, float32 [input][row], as a tile block of Q8_0."""
    zero = splat_f32(0.0)
    most = zero
    for i in range(Q8_BLOCK):
        most = maximum(most, absolute(load_f32(weights + i * 64, 1, 0)))
    store_f16(dst, most * splat_f32(1.0 / 127.0), 0)
    inverse = select_lt(zero, most, splat_f32(127.0) / most, zero)
    byte = splat_i32(255)
    for i in range(0, Q8_BLOCK, 4):
        at = weights + i * 64
        a = round_i32(load_f32(at, 1, 0) * inverse) & byte
        b = round_i32(load_f32(at + 64, 1, 0) * inverse) & byte
        c = round_i32(load_f32(at + 128, 1, 0) * inverse) & byte
        d = round_i32(load_f32(at + 192, 1, 0) * inverse)
        store_i32(dst + (32 + i * 16), a | shl(b, 8) | shl(c, 16) | shl(d, 24), 0)


def _rebuild(rank: int, target: Target) -> KernelFunction:
    """Tiles of Q8_0 of the sum of blocks.

    Slots: 0 tiles of Q8_0, 1 blocks of 64 inputs in a row, 2 inputs (a multiple of 32), 3 the first
    tile, 4 how many, 5 tiles of the whole matrix, 6 scratch, 7 bytes between the threads' scratch,
    8 number of blocks, 9.. their addresses. Threads share the tiles as in a product of them.
    """
    chain = _chain(rank)

    def add(signs: Any, v: Any, u: Any, v_row: Any, weights: Any, floats: Any) -> None:
        """Add 64 inputs of a block to float32 [input][row]."""
        for r in range(rank):
            for i in range(0, INPUTS, 16):
                at = floats + (r * INPUTS + i) * 4
                store_f32(at, load_f16(v + r * v_row + i * 2, 1, 0), 0)
        by_row = load_f16(u, rank, 32)
        top = splat_i32(-2147483648)
        for half in range(2):
            # Bit 8i + j of a row's word is input 8j + 4 * half + i; 0 is negative.
            negative = load_i32(signs + half * 64, 1, 0) ^ splat_i32(-1)
            for k in range(32):
                i = 4 * half + (31 - k) % 8 * 8 + (31 - k) // 8
                size = chain(by_row, bcast_f32(floats + i * 4, rank, 4 * INPUTS))
                value = bits_f32(bits_i32(size) ^ (negative & top))
                negative = shl(negative, 1)
                at = weights + i * 64
                store_f32(at, load_f32(at, 1, 0) + value, 0)

    def rebuild(args: Any, thread: Any, n_threads: Any) -> None:
        n_blocks = arg_int(args, 1)
        inputs = arg_int(args, 2)
        n_tiles = arg_int(args, 4)
        weights = arg_ptr(args, 6) + arg_int(args, 7) * thread
        signs_bytes = arg_int(args, 5) * n_blocks * SIGN_BYTES
        v_row = n_blocks * (2 * INPUTS)
        for t in range(n_tiles * thread // n_threads, n_tiles * (thread + 1) // n_threads):
            tile = arg_int(args, 3) + t
            dst = arg_ptr(args, 0) + t * (inputs // Q8_BLOCK) * Q8_0_BYTES
            for b in range(n_blocks):
                for i in range(INPUTS):
                    store_f32(weights + i * 64, zeros_f32(1), 0)
                for level in range(arg_int(args, 8)):
                    block = arg_ptr(args, FIRST_REBUILT + level)
                    v = block + signs_bytes
                    add(
                        block + (tile * n_blocks + b) * SIGN_BYTES,
                        v + b * (2 * INPUTS),
                        v + (rank * v_row + tile * (32 * rank)),
                        v_row,
                        weights,
                        weights + INPUTS * 64,
                    )
                _to_q8_0(weights, dst)
                dst = dst + Q8_0_BYTES
                if (b + 1) * INPUTS <= inputs:
                    _to_q8_0(weights + Q8_BLOCK * 64, dst)
                    dst = dst + Q8_0_BYTES

    return rebuild


# --- the rows of the table ------------------------------------------------------------------------


def _stack(rank: int, rng: np.random.Generator, m: int, n: int, levels: int) -> Any:
    """Blocks of a random matrix, packed at addresses that kernels may read whole cache lines of."""
    import numpy as np

    w = rng.standard_normal((m, n)).astype(np.float32)
    w[0] *= 100
    w[m // 2] = 0
    blocks = [block for block, _ in decompose(w, rank, levels)]
    return blocks, [pack(block) for block in blocks]


def _spread_cases(target: Target, rng: np.random.Generator) -> Iterator[Case]:
    import numpy as np

    for rank, n, n_tokens, private in ((1, 64, 1, 1), (4, 96, 3, 0), (16, 192, 2, 0)):
        blocks, packed = _stack(rank, rng, 16, n, 1)
        shape = BlockShape(16, n, rank)
        group = group_of(rank, target)
        x = rng.standard_normal((n_tokens, n)).astype(np.float32)
        x[0, :3] = (0, -1000, 1000)
        values = np.zeros((n_tokens, rank, shape.sign_blocks * INPUTS), np.float32)
        values[..., :n] = blocks[0].v.astype(np.float32) * x[:, None]
        expected = np.stack([quantize_q8(one, group) for one in values])
        paired = target.token_pairs and group > 1
        if paired:
            expected = pair_entries(expected)
        out = np.zeros_like(expected)
        own = np.zeros((8, *out.shape[1:]), np.uint8) if private else out
        if private:
            expected = np.concatenate([expected] * 8)
        row = np.zeros((8, shape.sign_blocks * INPUTS), np.float32)
        slots = [
            x, 0, x.strides[0], packed[0][shape.v_offset :], rank, group, own,
            own.strides[0] if private else 0, out.strides[0], np.array([n_tokens], np.int64),
            shape.sign_blocks, n, row, row.strides[0],
        ]  # fmt: skip
        close = _SameCodes(values, paired)
        yield Case(slots, [(own, expected)], close, f"{rank} vectors of {n}, {n_tokens} tokens")


class _SameCodes:
    """Do codes stand for the values? Of threads' own codes, those of the threads that ran."""

    def __init__(self, values: np.ndarray, paired: bool) -> None:
        self.values = values
        self.paired = paired

    def __call__(self, found: np.ndarray, expected: np.ndarray) -> bool:
        import numpy as np

        n_tokens, rank, n = self.values.shape
        if not found[0].any():
            return False
        for i, one in enumerate(found):
            if i >= n_tokens and not one.any():
                continue
            entries = separate_entries(one) if self.paired else one
            values = self.values[i % n_tokens]
            step = np.abs(values.reshape(rank, -1, Q8_BLOCK)).max(-1).repeat(Q8_BLOCK, -1) / 127
            if (np.abs(dequantize_q8(entries, n) - values) > step * 0.502).any():
                return False
            codes = entries[..., :32].view(np.int8).astype(np.int64)
            sums = np.ascontiguousarray(entries[..., 40:44]).view(np.int32)[..., 0]
            if (sums != -codes.sum(-1)).any():
                return False
        return True


def _sign_cases(rank: int) -> Any:
    def cases(target: Target, rng: np.random.Generator) -> Iterator[Case]:
        import numpy as np

        group = group_of(rank, target)
        for m, n, n_tokens, add in ((16, 64, 1, 0), (100, 96, 1, 0), (37, 192, 3, 1)):
            (block,), (packed,) = _stack(rank, rng, m, n, 1)
            shape = BlockShape(m, n, rank)
            width = shape.sign_blocks * INPUTS
            x = rng.standard_normal((n_tokens, rank, width)).astype(np.float32)
            x[0, 0, :3] = (0, -1000, 1000)
            x[..., n:] = 0
            entries = np.stack([quantize_q8(one, group) for one in x])
            coded = np.stack([dequantize_q8(one, width) for one in entries])[..., :n]
            if target.token_pairs and group > 1:
                entries = pair_entries(entries)
            start = np.zeros((n_tokens if add else 1, 16 * shape.tiles), np.float32)
            start[:, :m] = rng.standard_normal((len(start), m))
            y = start.copy() if add else np.zeros((n_tokens, 16 * shape.tiles), np.float32)
            signs = np.where(block.positive, 1.0, -1.0)
            u = block.u.astype(np.float64)
            expected, bound = np.zeros_like(y), np.zeros_like(y)
            expected[:, :m] = start[:, :m] + np.einsum("mn,tkn,mk->tm", signs, coded, u)
            size = np.abs(coded).sum(axis=-1) @ np.abs(u).T + np.abs(start[:, :m])
            bound[:, :m] = size * (n / 32 + rank + 8) * 2.0**-23
            slots = [
                packed, entries, 0, entries.strides[0], y, y.strides[0], y if add else start,
                y.strides[0] if add else 0, np.array([n_tokens], np.int64), shape.sign_blocks,
                shape.tiles,
            ]  # fmt: skip
            yield Case(slots, [(y, expected)], bound, f"{m}x{n}, {n_tokens} tokens")

    return cases


class _SameWeights:
    """Do two tiled Q8_0 matrices stand for the same weights, but for how halves are rounded?"""

    def __init__(self, rows: int, size: np.ndarray) -> None:
        self.rows = rows
        self.size = size  # of the largest weight of each block of 32: [rows, blocks]

    def __call__(self, found: np.ndarray, expected: np.ndarray) -> bool:
        import numpy as np

        a, b = (q8_0.decode(q8_0.untile(one, self.rows)) for one in (found, expected))
        bound = self.size.repeat(Q8_BLOCK, axis=1) * (1 / 127 + 2.0**-9)
        far = np.abs(a - b) > bound * 0.1
        return bool((np.abs(a - b) <= bound).all() and far.mean() < 0.01)


def _rebuild_cases(rank: int) -> Any:
    def cases(target: Target, rng: np.random.Generator) -> Iterator[Case]:
        import numpy as np

        for m, n, first, count, levels in ((16, 64, 0, 1, 1), (100, 96, 2, 4, 3)):
            blocks, packed = _stack(rank, rng, m, n, levels)
            shape = BlockShape(m, n, rank)
            rows = slice(16 * first, 16 * (first + count))
            whole = np.zeros((16 * shape.tiles, n), np.float32)
            whole[:m] = rebuild(blocks)
            expected = q8_0.tile(q8_0.encode(whole[rows]))
            out = np.zeros_like(expected)
            scratch = np.zeros((8, rebuild_scratch_bytes(rank) // 4), np.float32)
            slots = [
                out, shape.sign_blocks, n, first, count, shape.tiles, scratch, scratch.strides[0],
                levels, *packed,
            ]  # fmt: skip
            size = np.abs(whole[rows]).reshape(16 * count, -1, Q8_BLOCK).max(axis=-1)
            close = _SameWeights(16 * count, size)
            yield Case(slots, [(out, expected)], close, f"{m}x{n}, {levels} blocks")

    return cases


_SOURCES = (
    __name__,
    "headrace.kernels.prepare",
    "headrace.kernels.math",
    "headrace.sparse.bitstack",
    "headrace.sparse.interleaving",
    "headrace.sparse.linear",
    "headrace.sparse.sums",
    "headrace.sparse.q8_0",
    "headrace.sparse.format",
    "headrace.sparse.token_pairs",
)


def kernels(rank: int) -> dict[str, Kernel]:
    """The rows for blocks of `rank` vectors: "spread" (the same for all), "signs" and "rebuild"."""

    def row(name: str, build: Any, cases: Any) -> Kernel:
        return Kernel(name, build, _SOURCES, cases, __name__)

    return {
        "spread": row("spread", _spread, _spread_cases),
        "signs": row(f"signs_k{rank}", partial(_signs, rank), _sign_cases(rank)),
        "rebuild": row(f"rebuild_k{rank}", partial(_rebuild, rank), _rebuild_cases(rank)),
    }


def all_kernels() -> list[Kernel]:
    """Every row of this module."""
    found = {kernel.name: kernel for rank in RANKS for kernel in kernels(rank).values()}
    return list(found.values())


def kernel_named(name: str) -> Kernel:
    """The row of this name."""
    operation, _, rank = name.partition("_k")
    return kernels(int(rank or RANKS[0]))[operation]
