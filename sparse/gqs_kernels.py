"""Kernels of group sparsity: see `headrace.sparse.gqs` for the weights' layout.

Activations ("x16") are 16-bit integers with one scale for a token: they are worth 15 bits below the
token's largest value, and a row's products need no factor for each group. For n inputs:
    bytes              what
    0..3               scale, float32
    64 .. 64+2n-1      codes, int16, -32767..32767

Products are whole numbers within a unit, exactly; units are summed as float32 in their order, so
every target gives the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from headrace.sparse.gqs import (
    CODE_BYTES,
    GROUPS,
    UNIT,
    pack_weights,
    units_offset,
    unpack,
    whole_numbers,
)
from headrace.sparse.linear import X16_HEAD_BYTES, activation_bytes
from headrace.targets.simd import (
    absolute,
    arg_int,
    arg_ptr,
    dot_words,
    get_f32,
    get_i64,
    get_u16,
    get_u32,
    group_words,
    lane0,
    larger,
    load_f32,
    load_halves,
    load_i32,
    max_f32,
    maximum,
    prefetch,
    put_f32,
    repeat,
    round_i32,
    select_lt,
    splat_f32,
    splat_i32,
    store_i16,
    sub_block,
    sum_f32,
    to_f32,
    zeros_f32,
)
from headrace.targets.table import Case, Kernel, KernelFunction
from headrace.targets.target import Target

if TYPE_CHECKING:
    import numpy as np

MOST = 32767
# A place of 16 bits cannot lead further than this from the beginning of a token's activations.
# Whoever has these keeps so many bytes readable, so that no file leads a kernel out of its memory.
REACH = X16_HEAD_BYTES + 8 * 0xFFFF + 128
AHEAD = 6144  # bytes: rows end where the CPU does not expect it, and it asks for too little
TOKENS = {64: 4}  # that are multiplied at once, by the bytes of a register; else 2
CACHED_UNITS = 2048  # of a thread: their 140 to 200 KB stay in its cache while tokens go by


def to_x16(row: Any, n: Any, out: Any, token: Any, group: Any) -> None:
    """Code a float32 row of `n` values, a multiple of 16; see `headrace.kernels.prepare`."""
    most = zeros_f32(1)
    for i in range(0, n, 16):
        most = maximum(most, absolute(load_f32(row + i * 4, 1, 0)))
    zero = zeros_f32(1)
    peak = splat_f32(max_f32(most))
    scale = select_lt(zero, peak, splat_f32(32767.0) / peak, zero)
    put_f32(out, lane0(peak * splat_f32(1.0 / 32767.0)))
    for i in range(0, n, 16):
        store_i16(out + (64 + i * 2), round_i32(load_f32(row + i * 4, 1, 0) * scale), 0)


def _put(tokens: int) -> Any:
    """y = start + sums of lanes by the scales of a row and of each token's activations."""
    if tokens == 1:

        def one(
            acc: Any, scale: Any, start: Any, x: Any, x_stride: Any, y: Any, y_stride: Any
        ) -> None:
            put_f32(y, sum_f32(acc) * (scale * get_f32(x)) + start)

        return one
    half = tokens // 2
    put = _put(half)

    def several(
        acc: Any, scale: Any, start: Any, x: Any, x_stride: Any, y: Any, y_stride: Any
    ) -> None:
        put(sub_block(acc, 0, half), scale, start, x, x_stride, y, y_stride)
        x = x + x_stride * half
        y = y + y_stride * half
        put(sub_block(acc, half, half), scale, start, x, x_stride, y, y_stride)

    return several


def first_row(first: Any, low: Any, rows: Any, unit: Any) -> Any:
    """Native: the first row from `low` on that begins at `unit` or behind it."""
    high = rows
    while low < high:
        middle = (low + high) // 2
        if get_u32(first + middle * 4) < unit:
            low = middle + 1
        else:
            high = middle
    return low


def _gemm(group: int, target: Target) -> KernelFunction:
    """y[token, row] = bias[row] + sum over stored groups of w * x, for any number of tokens.

    Slots: 0 first units of the rows, 1 scales of the rows, 2 units, from that of the first row on,
    3 "x16" activations, 4 y, 5 rows, 6 address of the token count, 7 bytes between the threads' own
    activations (0: one for all), 8 bytes between tokens of y, 9 bias (float32), 10 bytes between
    tokens of the activations.

    Threads share the units: each takes the rows that begin in its share of them, so shares differ
    by a row at most. A row is summed by one thread: the number of threads changes no bit. Nor does
    that of the tokens, of which several are multiplied by a unit's weights when these are unpacked.
    """
    per_unit = UNIT // group
    bytes_per_unit = CODE_BYTES + 4 * per_unit
    several = TOKENS.get(target.vector_bytes, 2)
    # In pairs, units of many places gain 3 to 5% in the cache where a register holds half of one.
    by_pairs = group == 16 and target.vector_bytes == 64

    # Places are read before the vectors around them: LLVM would take a place out of a vector that
    # it has, which costs a CPU more than to load it, and eight of them bind groups of 16.
    def of_column(w: Any, x: Any, p: Any) -> Any:
        return x + get_u16(w + (2 * per_unit + 2 * p)) * 8

    def unit_of(tokens: int) -> Any:
        def add16(w: Any, x: Any, stride: Any) -> Any:
            x0 = load_halves(of_column(w, x, 0), of_column(w, x, 1), tokens, stride)
            x1 = load_halves(of_column(w, x, 2), of_column(w, x, 3), tokens, stride)
            x2 = load_halves(of_column(w, x, 4), of_column(w, x, 5), tokens, stride)
            x3 = load_halves(of_column(w, x, 6), of_column(w, x, 7), tokens, stride)
            s, v = load_halves(w, w, 1, 0), load_i32(w + 4 * per_unit, 1, 0)
            zero = repeat(splat_i32(0), tokens)
            a = dot_words(zero, repeat(group_words(v, 0, s, 0, 2), tokens), x0)
            a = dot_words(a, repeat(group_words(v, 1, s, 2, 2), tokens), x1)
            b = dot_words(zero, repeat(group_words(v, 2, s, 4, 2), tokens), x2)
            return a + dot_words(b, repeat(group_words(v, 3, s, 6, 2), tokens), x3)

        def add32(w: Any, x: Any, stride: Any) -> Any:
            x0 = load_i32(of_column(w, x, 0), tokens, stride)
            x1 = load_i32(of_column(w, x, 1), tokens, stride)
            x2 = load_i32(of_column(w, x, 2), tokens, stride)
            x3 = load_i32(of_column(w, x, 3), tokens, stride)
            s, v = load_halves(w, w, 1, 0), load_i32(w + 4 * per_unit, 1, 0)
            zero = repeat(splat_i32(0), tokens)
            a = dot_words(zero, repeat(group_words(v, 0, s, 0, 1), tokens), x0)
            a = dot_words(a, repeat(group_words(v, 1, s, 1, 1), tokens), x1)
            b = dot_words(zero, repeat(group_words(v, 2, s, 2, 1), tokens), x2)
            return a + dot_words(b, repeat(group_words(v, 3, s, 3, 1), tokens), x3)

        def add64(w: Any, x: Any, stride: Any) -> Any:
            p, q = of_column(w, x, 0), of_column(w, x, 1)
            s, v = load_halves(w, w, 1, 0), load_i32(w + 4 * per_unit, 1, 0)
            x0, x1 = load_i32(p, tokens, stride), load_i32(p + 64, tokens, stride)
            x2, x3 = load_i32(q, tokens, stride), load_i32(q + 64, tokens, stride)
            zero = repeat(splat_i32(0), tokens)
            a = dot_words(zero, repeat(group_words(v, 0, s, 0, 1), tokens), x0)
            a = dot_words(a, repeat(group_words(v, 1, s, 0, 1), tokens), x1)
            b = dot_words(zero, repeat(group_words(v, 2, s, 1, 1), tokens), x2)
            return a + dot_words(b, repeat(group_words(v, 3, s, 1, 1), tokens), x3)

        return {16: add16, 32: add32, 64: add64}[group]

    def sums(tokens: int) -> Any:
        unit = unit_of(tokens)

        def one_by_one(acc: Any, w: Any, x: Any, stride: Any, n: Any) -> Any:
            for _ in range(n):
                prefetch(w + AHEAD)
                if bytes_per_unit > 80:  # every line of 64 bytes: one a unit would pass over some
                    prefetch(w + (AHEAD + 64))
                acc = acc + to_f32(unit(w, x, stride))
                w = w + bytes_per_unit
            return acc

        def sums_of(w: Any, x: Any, stride: Any, n: Any) -> Any:
            return one_by_one(zeros_f32(tokens), w, x, stride, n)

        def sums_of_pairs(w: Any, x: Any, stride: Any, n: Any) -> Any:
            acc = zeros_f32(tokens)
            for _ in range(n // 2):
                prefetch(w + AHEAD)
                prefetch(w + (AHEAD + 64))
                prefetch(w + (AHEAD + 128))
                acc = acc + to_f32(unit(w, x, stride))
                acc = acc + to_f32(unit(w + bytes_per_unit, x, stride))
                w = w + 2 * bytes_per_unit
            return one_by_one(acc, w, x, stride, n % 2)

        return sums_of_pairs if by_pairs and tokens == 1 else sums_of

    one, many = sums(1), sums(several)
    put_one, put_many = _put(1), _put(several)

    def gemm(args: Any, thread: Any, n_threads: Any) -> None:
        first = arg_ptr(args, 0)
        scales = arg_ptr(args, 1)
        units = arg_ptr(args, 2)
        x = arg_ptr(args, 3) + arg_int(args, 7) * thread
        rows = arg_int(args, 5)
        n_tokens = get_i64(arg_ptr(args, 6))
        y_stride = arg_int(args, 8)
        bias = arg_ptr(args, 9)
        x_stride = arg_int(args, 10)
        base = get_u32(first)
        n_units = get_u32(first + rows * 4) - base
        row = first_row(first, 0, rows, base + n_units * thread // n_threads)
        last = rows
        if thread + 1 < n_threads:
            last = first_row(first, 0, rows, base + n_units * (thread + 1) // n_threads)
        while row < last:
            # Rows that stay in the cache while all tokens go by.
            end = last
            if n_tokens > several:
                begin = get_u32(first + row * 4)
                end = larger(row + 1, first_row(first, row, last, begin + CACHED_UNITS))
            token = 0
            while token < n_tokens:
                at = x + token * x_stride
                y = arg_ptr(args, 4) + token * y_stride
                together = token + several <= n_tokens
                for r in range(row, end):
                    begin = get_u32(first + r * 4)
                    n = get_u32(first + r * 4 + 4) - begin
                    w = units + (begin - base) * bytes_per_unit
                    scale = get_f32(scales + r * 4)
                    start = get_f32(bias + r * 4)
                    if together:
                        acc = many(w, at + 64, x_stride, n)
                        put_many(acc, scale, start, at, x_stride, y + r * 4, y_stride)
                    else:
                        put_one(one(w, at + 64, 0, n), scale, start, at, 0, y + r * 4, 0)
                token += several if together else 1
            row = end

    return gemm


# --- the rows of the table ------------------------------------------------------------------------


def code_x16(x: np.ndarray) -> np.ndarray:
    """Reference of the "x16" activations: float32 [tokens, n] -> uint8 [tokens, bytes]."""
    import numpy as np

    x = np.ascontiguousarray(x, np.float32)
    peak = np.abs(x).max(axis=1)
    inverse = np.where(peak > 0, np.float32(MOST) / np.where(peak > 0, peak, 1), 0).astype("f4")
    out = np.zeros((len(x), activation_bytes("x16", x.shape[1])), np.uint8)
    out[:, :4] = (peak * np.float32(1 / MOST))[:, None].view(np.uint8)
    out[:, X16_HEAD_BYTES:] = np.rint(x * inverse[:, None]).astype("<i2").view(np.uint8)
    return out


def multiply(raw: np.ndarray, rows: int, n: int, group: int, coded: np.ndarray) -> np.ndarray:
    """Reference of the products, bit for bit: float32 [tokens, rows], without a bias."""
    import numpy as np

    groups = unpack(raw, rows, n, group)
    codes = np.ascontiguousarray(coded[:, X16_HEAD_BYTES:]).view("<i2").astype(np.int64)
    by_group = codes.reshape(len(coded), n // group, group)[:, groups.columns]
    products = by_group * whole_numbers(groups).astype(np.int64)
    out = np.zeros((len(coded), rows), np.float32)
    per_unit, ends = UNIT // group, np.cumsum(groups.counts)
    for row, (count, end) in enumerate(zip(groups.counts, ends, strict=True)):
        units = -(-int(count) // per_unit)
        whole = np.zeros((len(coded), units * per_unit, group), np.int64)
        whole[:, :count] = products[:, end - count : end]
        # Lane i of 16 has weights 2i and 2i + 1 of each 32.
        lanes = whole.reshape(len(coded), units, 4, 16, 2).sum(axis=(2, 4))
        total = np.zeros((len(coded), 16), np.float32)
        for one in lanes.astype(np.float32).transpose(1, 0, 2):
            total = total + one
        while total.shape[1] > 1:
            half = total.shape[1] // 2
            total = total[:, :half] + total[:, half:]
        scales = groups.row_scales[row] * np.ascontiguousarray(coded[:, :4]).view(np.float32)
        out[:, row] = (total * scales)[:, 0]
    return out


def example(
    rng: np.random.Generator, rows: int, columns: int, group: int, tokens: int
) -> tuple[np.ndarray, np.ndarray]:
    """A matrix of the extremes and activations of `columns` groups: raw bytes, [tokens, n]."""
    import numpy as np

    n = columns * group
    w = rng.standard_normal((rows, n)).astype(np.float32)
    w[0] = np.where(np.arange(n) % 2, 3.0, -3.0)
    w[-1] = 1 + w[-1] / 100  # far from zero
    keep = rng.random((rows, columns)) < 0.5
    keep[0] = keep[-1] = True
    keep[rows // 2] = rows == 1  # an empty row
    x = rng.standard_normal((tokens, n)).astype(np.float32)
    x[0] = np.where(np.arange(n) % 2, 5.0, -5.0)  # the largest products
    return pack_weights(w, keep, group), x


def _gemm_cases(group: int) -> Any:
    def cases(target: Target, rng: np.random.Generator) -> Iterator[Case]:
        import numpy as np

        for rows, columns, tokens in ((1, 1, 1), (5, 2, 1), (37, 23, 1), (19, 9, 21)):
            n = columns * group
            raw, x = example(rng, rows, columns, group, tokens)
            coded = code_x16(x)
            bias = rng.standard_normal(rows).astype(np.float32)
            y = np.zeros((tokens, rows), np.float32)
            head = raw[: 8 * rows + 4].view(np.uint32).copy()
            slots = [
                head[: rows + 1].copy(), head[rows + 1 :].view(np.float32).copy(),
                raw[units_offset(rows) :].copy(), coded, y, rows, np.array([tokens], np.int64), 0,
                y.strides[0], bias, coded.strides[0],
            ]  # fmt: skip
            expected = multiply(raw, rows, n, group, coded) + bias
            yield Case(slots, [(y, expected)], 0, f"{rows}x{n}, {tokens} tokens")

    return cases


_SOURCES = (__name__, "headrace.sparse.gqs")


def _gemm_row(group: int) -> Kernel:
    name = f"gemm_gqs_g{group}"
    return Kernel(name, lambda target: _gemm(group, target), _SOURCES, _gemm_cases(group), __name__)


def all_kernels() -> list[Kernel]:
    """Every row of the table that belongs to group sparsity."""
    return [_gemm_row(group) for group in GROUPS]


def kernel_named(name: str) -> Kernel:
    """The row of this name."""
    return next(row for row in all_kernels() if row.name == name)
