"""Kernels of group sparsity: see `headrace.sparse.gqs` for the weights' layout.

Activations ("x16") are 16-bit integers with one scale for a token: a float32 scale, 60 bytes of
nothing, then the codes of -32767..32767. A group's activations lie where its column says. They are
worth 15 bits below the token's largest value, so that no other value needs a scale of its own, and
a row's products need no second factor for each group.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from headrace.sparse.gqs import CODE_BYTES, GROUPS, UNIT, columns_of, decode, pack_weights, units_offset
from headrace.targets.simd import (
    absolute,
    arg_int,
    arg_ptr,
    dot_words,
    fma,
    get_f32,
    get_i64,
    get_u16,
    get_u32,
    join4,
    lane0,
    load_f16,
    load_f32,
    load_halves,
    load_i32,
    load_u16_i32,
    max_f32,
    maximum,
    part,
    put_f32,
    round_i32,
    select_lt,
    shl,
    shr,
    splat_f32,
    splat_i32,
    spread,
    store_i16,
    sub_words,
    sum_f32,
    to_f32,
    zeros_f32,
)
from headrace.targets.table import Case, Kernel, KernelFunction
from headrace.targets.target import Target

if TYPE_CHECKING:
    import numpy as np

HEAD_BYTES = 64  # of a token's activations
MOST = 32767


def activation_bytes(inputs: int) -> int:
    """Bytes of one token's "x16" activations."""
    return HEAD_BYTES + 2 * inputs


def _code(args: Any, thread: Any, n_threads: Any) -> None:
    """Code activations. Slots: 0 x (float32), 1 "x16", 2 inputs (a multiple of 16), 3 address of
    the token count, 4 bytes between tokens of x, 5 between those of "x16", 6 bytes between the
    threads' own (0: threads share the tokens).
    """
    private = arg_int(args, 6)
    n = arg_int(args, 2)
    n_tokens = get_i64(arg_ptr(args, 3))
    x_stride = arg_int(args, 4)
    out_stride = arg_int(args, 5)
    first = n_tokens * thread // n_threads
    last = n_tokens * (thread + 1) // n_threads
    if private != 0:
        first = 0
        last = n_tokens
    for token in range(first, last):
        x = arg_ptr(args, 0) + token * x_stride
        out = arg_ptr(args, 1) + (private * thread + token * out_stride)
        most = zeros_f32(1)
        for i in range(0, n, 16):
            most = maximum(most, absolute(load_f32(x + i * 4, 1, 0)))
        zero = zeros_f32(1)
        peak = splat_f32(max_f32(most))
        scale = select_lt(zero, peak, splat_f32(32767.0) / peak, zero)
        put_f32(out, lane0(peak * splat_f32(1.0 / 32767.0)))
        for i in range(0, n, 16):
            store_i16(out + (64 + i * 2), round_i32(load_f32(x + i * 4, 1, 0) * scale), 0)


def _gemv(group: int) -> KernelFunction:
    """y[token, row] = bias[row] + sum over stored groups of w * x.

    Slots: 0 first units of the rows, 1 units, 2 "x16" activations, 3 y, 4 rows, 5 address of the
    token count, 6 bytes between the threads' own activations (0: one for all), 7 bytes between
    tokens of y, 8 bias (float32), 9 bytes between tokens of the activations.
    Threads share the units: each takes the rows that begin in its share. A row is summed by one
    thread in one order, so results do not depend on their number.
    """
    per_unit = UNIT // group
    bytes_per_unit = CODE_BYTES + 4 * per_unit
    heads, codes = 2 * per_unit, 4 * per_unit
    row_share = 2 * group // 16  # bytes of activations from column to column, by 16

    def column(w: Any, x: Any, p: Any) -> Any:
        return x + (get_u16(w + (heads + 2 * p)) & 0xFFF0) * row_share

    def quarter(k: int) -> Any:
        """acc + 32 weights of 1 or 2 groups times their activations."""
        each = per_unit // 4
        at = each * k

        def halves(w: Any, x: Any) -> Any:
            return load_halves(column(w, x, at), column(w, x, at + 1))

        def whole(w: Any, x: Any) -> Any:
            return load_i32(column(w, x, at), 1, 0)

        inputs = halves if each == 2 else whole

        def add(acc: Any, w: Any, x: Any, scales: Any, zeros: Any, nibbles: Any) -> Any:
            q = sub_words(nibbles & splat_i32(0x000F000F), spread(zeros, at, each))
            total = dot_words(splat_i32(0), q, inputs(w, x))
            return fma(spread(scales, at, each), to_f32(total), acc)

        return add

    def half(k: int) -> Any:
        """acc + the 64 weights of a group times their activations."""

        def add(acc: Any, w: Any, x: Any, scales: Any, zeros: Any, low: Any, high: Any) -> Any:
            z = spread(zeros, k, 1)
            at = column(w, x, k)
            mask = splat_i32(0x000F000F)
            total = dot_words(splat_i32(0), sub_words(low & mask, z), load_i32(at, 1, 0))
            total = dot_words(total, sub_words(high & mask, z), load_i32(at + 64, 1, 0))
            return fma(spread(scales, k, 1), to_f32(total), acc)

        return add

    half0, half1 = half(0), half(1)

    def unit64(acc: Any, w: Any, x: Any, s: Any, z: Any, v: Any) -> Any:
        a = half0(part(acc, 0), w, x, s, z, v, shr(v, 4))
        b = half1(part(acc, 1), w, x, s, z, shr(v, 8), shr(v, 12))
        return join4(a, b, part(acc, 2), part(acc, 3))

    quarter0, quarter1, quarter2, quarter3 = (
        (quarter(0), quarter(1), quarter(2), quarter(3)) if group < 64 else (None,) * 4
    )

    def unit(acc: Any, w: Any, x: Any, s: Any, z: Any, v: Any) -> Any:
        a = quarter0(part(acc, 0), w, x, s, z, v)
        b = quarter1(part(acc, 1), w, x, s, z, shr(v, 4))
        c = quarter2(part(acc, 2), w, x, s, z, shr(v, 8))
        d = quarter3(part(acc, 3), w, x, s, z, shr(v, 12))
        return join4(a, b, c, d)

    add_unit = unit64 if group == 64 else unit

    def row_sum(w: Any, x: Any, n: Any) -> Any:
        acc = zeros_f32(4)
        for _ in range(n):
            v = load_i32(w + codes, 1, 0)
            s = load_f16(w, 1, 0)
            z = load_u16_i32(w + heads, 1, 0) & splat_i32(15)
            acc = add_unit(acc, w, x, s, z | shl(z, 16), v)
            w = w + bytes_per_unit
        return sum_f32((part(acc, 0) + part(acc, 1)) + (part(acc, 2) + part(acc, 3)))

    def search(first: Any, rows: Any, unit: Any) -> Any:
        """The first row that begins at `unit` or behind it."""
        low = 0
        high = rows
        while low < high:
            middle = (low + high) // 2
            if get_u32(first + middle * 4) < unit:
                low = middle + 1
            else:
                high = middle
        return low

    def gemv(args: Any, thread: Any, n_threads: Any) -> None:
        first = arg_ptr(args, 0)
        units = arg_ptr(args, 1)
        x = arg_ptr(args, 2) + arg_int(args, 6) * thread
        y = arg_ptr(args, 3)
        rows = arg_int(args, 4)
        n_tokens = get_i64(arg_ptr(args, 5))
        y_stride = arg_int(args, 7)
        bias = arg_ptr(args, 8)
        x_stride = arg_int(args, 9)
        n_units = get_u32(first + rows * 4)
        row = search(first, rows, n_units * thread // n_threads)
        last = rows
        if thread + 1 < n_threads:
            last = search(first, rows, n_units * (thread + 1) // n_threads)
        while row < last:
            unit = get_u32(first + row * 4)
            n = get_u32(first + row * 4 + 4) - unit
            w = units + unit * bytes_per_unit
            for token in range(n_tokens):
                at = x + token * x_stride
                total = row_sum(w, at + 64, n) * get_f32(at)
                put_f32(y + (row * 4 + token * y_stride), total + get_f32(bias + row * 4))
            row += 1

    return gemv


# --- the rows of the table ------------------------------------------------------------------------


def code_x16(x: np.ndarray) -> np.ndarray:
    """Reference of the "x16" activations: float32 [tokens, n] -> uint8 [tokens, bytes]."""
    import numpy as np

    x = np.ascontiguousarray(x, np.float32)
    peak = np.abs(x).max(axis=1)
    inverse = np.where(peak > 0, np.float32(MOST) / np.where(peak > 0, peak, 1), 0).astype("f4")
    out = np.zeros((len(x), activation_bytes(x.shape[1])), np.uint8)
    out[:, :4] = (peak * np.float32(1 / MOST))[:, None].view(np.uint8)
    out[:, HEAD_BYTES:] = np.rint(x * inverse[:, None]).astype("<i2").view(np.uint8)
    return out


def x16_values(coded: np.ndarray) -> np.ndarray:
    """What "x16" activations stand for: float64 [tokens, n]."""
    import numpy as np

    scales = np.ascontiguousarray(coded[:, :4]).view(np.float32).astype(np.float64)
    return np.ascontiguousarray(coded[:, HEAD_BYTES:]).view("<i2") * scales


def _code_cases(target: Target, rng: np.random.Generator) -> Iterator[Case]:
    import numpy as np

    for n, tokens in ((16, 1), (144, 3)):
        x = rng.standard_normal((tokens, n)).astype(np.float32)
        x[0, n // 2] = -1e4
        x[-1] *= 0 if tokens > 1 else 1
        expected = code_x16(x)
        out = np.zeros_like(expected)
        slots = [x, out, n, np.array([tokens], np.int64), x.strides[0], out.strides[0], 0]
        yield Case(slots, [(out, expected)], 0, f"{tokens} tokens of {n}")


def _gemv_cases(group: int) -> Any:
    def cases(target: Target, rng: np.random.Generator) -> Iterator[Case]:
        import numpy as np

        for rows, columns, tokens in ((1, 1, 1), (5, 2, 1), (37, 23, 1), (19, 9, 3)):
            n = columns * group
            w = rng.standard_normal((rows, n)).astype(np.float32)
            w[0] = np.where(np.arange(n) % 2, 3.0, -3.0)
            w[-1, :group] = np.abs(w[-1, :group])  # a zero point of 0
            w[-1, -group:] = -np.abs(w[-1, -group:])  # and one of 15
            keep = rng.random((rows, columns)) < 0.5
            keep[0] = keep[-1] = True
            keep[rows // 2] = rows == 1  # an empty row
            raw = pack_weights(w, keep, group)
            x = rng.standard_normal((tokens, n)).astype(np.float32)
            x[0, 0] = 100
            coded = code_x16(x)
            exact = decode(raw, rows, n, group).astype(np.float64)
            values = x16_values(coded)
            bias = rng.standard_normal(rows).astype(np.float32)
            y = np.zeros((tokens, rows), np.float32)
            size = np.abs(values) @ np.abs(exact).T + np.abs(bias)
            tolerance = size * ((n // UNIT * 4 + 16) * 2.0**-23)
            begin = units_offset(rows)
            units = raw[begin:] if len(raw) > begin else np.zeros(4, np.uint8)
            slots = [
                raw[:begin].view(np.uint32).copy(), units.copy(), coded, y, rows,
                np.array([tokens], np.int64), 0, y.strides[0], bias, coded.strides[0],
            ]  # fmt: skip
            yield Case(slots, [(y, values @ exact.T + bias)], tolerance, f"{rows}x{n}, {tokens}")

    return cases


_SOURCES = (__name__, "headrace.sparse.gqs")


def all_kernels() -> list[Kernel]:
    """Every row of the table that belongs to group sparsity."""
    rows = [Kernel("code_x16", lambda target: _code, _SOURCES, _code_cases, __name__)]
    for group in GROUPS:
        name, cases = f"gemv_gqs_g{group}", _gemv_cases(group)
        rows.append(Kernel(name, lambda t, g=group: _gemv(g), _SOURCES, cases, __name__))
    return rows


def kernel_named(name: str) -> Kernel:
    """The row of this name."""
    return next(row for row in all_kernels() if row.name == name)
