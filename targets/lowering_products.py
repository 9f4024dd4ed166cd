"""What the markers of inner products mean: see `headrace.targets.lowering`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import llvmlite.ir as ir
from numba.core import types

from headrace.targets.lowering import (
    Q8Type,
    VecType,
    constant,
    current_target,
    fma_vectors,
    join,
    lanes,
    literal,
    load_rows_and_columns,
    marker,
    pair_loads,
    primitive,
    q8_words,
    shifted_words,
    shuffle,
    split,
    token_pairs,
    vector_type,
    zipped,
)

# A product of the target, the weights of its rows, and the activations of its tokens.
Step: TypeAlias = tuple[Callable[..., Any], list[Any], list[Any]]


class DotType(types.Type):
    """Sums of products in progress: int32 sums and, for targets that want them, 16-bit ones.

    `steps` of `dot4` are in the 16-bit sums, of a target that says how many may be (`dot_steps`).
    """

    def __init__(self, count: int, steps: int = 0) -> None:
        self.count = count
        self.steps = steps
        self.llvm = vector_type("i32")
        kind = primitive("dot_narrow")
        self.narrow = self.llvm if kind is None else kind(lanes())
        self.part_types = [self.llvm] * count + [self.narrow] * count
        super().__init__(name=f"Dot({count}, {steps}, {self.llvm.count}, {self.narrow})")

    def after(self, steps: int, bits: int) -> DotType:
        """The type after `steps` more of codes of `bits` bits."""
        most = _dot_steps(bits)
        return DotType(self.count, (self.steps + steps - 1) % most + 1) if most else self


def _dot_steps(bits: int) -> int:
    """Steps of `dot4` that 16-bit sums hold; 0: the target keeps other sums."""
    steps = primitive("dot_steps")
    return 0 if steps is None else int(steps(bits))


@marker("dot_start", lambda entry, offset, bits: VecType("i32", entry.count))
def _dot_start(b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
    offset, bits = (literal(t, "argument") for t in sig.args[1:])
    bias = current_target().dot_bias(bits)
    if not bias:
        return join([ir.Constant(vector_type("i32"), None)] * sig.return_type.count)
    return shifted_words(b, args[0], sig.args[0], offset, bias.bit_length() - 1)


@marker("dot_init", lambda start, rows: DotType(start.count * literal(rows, "rows")))
def _dot_init(b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
    n = sig.return_type.count
    start = split(args[0])
    narrow = ir.Constant(sig.return_type.narrow, None)
    return start * (n // len(start)) + [narrow] * n


@marker("eights", lambda first, second: VecType("u8", 2 * first.count))
def _eights(b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
    first, second = (split(v) for v in args)
    if not token_pairs():
        return join([*first, *second])
    # A register for rows 0 and 1 and one for rows 2 and 3, 8 inputs of each row in a run.
    words = [[b.bitcast(v, vector_type("i32")) for v in row] for row in (first, second)]
    rows = [zipped(b, x, y, half) for x, y in zip(*words, strict=True) for half in (0, 1)]
    return join([b.bitcast(v, vector_type("u8")) for v in rows])


def _dot8_pairs(
    b: ir.IRBuilder, acc: ir.Value, weights: list[ir.Value], entry: ir.Value, offset: int
) -> ir.Value:
    """Two rows by two tokens at a time: see `simd.with_lanes`."""
    tokens, sums = len(acc) // len(weights), list(acc)
    step = primitive("pair_products")
    for p, codes in enumerate(pair_loads(b, entry, tokens, True)):
        for r, w in enumerate(weights):
            i = r // 2 * tokens + 2 * p + r % 2
            sums[i] = step(b, sums[i], w, codes[offset // 8])
    return sums


def _activations(
    b: ir.IRBuilder, entry: ir.Value, ty: Q8Type, offset: int
) -> tuple[Callable[..., Any], list[Any]]:
    """`dot4` of the target, and what it takes of each entry's 4 codes at a byte offset."""
    lane_step = primitive("dot4_lane")
    if ty.in_registers and lane_step:  # by a lane of a register that holds 16 codes
        return lane_step, [(quarter, offset % 16 // 4) for quarter in entry[offset // 16 :: 3]]
    step = primitive("dot4") or primitive("dot8")
    if step is None:
        raise TypeError(f"target {current_target().name} has no dot4")
    return step, [b.bitcast(word, vector_type("u8")) for word in q8_words(b, entry, ty, offset)]


def _add_steps(
    b: ir.IRBuilder, acc: ir.Value, steps: list[Step], bits: int, kind: DotType,
    by_rows: bool = False,
) -> ir.Value:  # fmt: skip
    most, sums, n = _dot_steps(bits), list(acc), kind.count
    for k, (step, ws, xs) in enumerate(steps, kind.steps):
        full = most and k and k % most == 0  # of the 16-bit sums
        # Activations outermost: each broadcast is used R times at once, its register free again.
        places = [(r, t) for t in range(len(xs)) for r in range(len(ws))]
        for r, t in sorted(places) if by_rows else places:
            i = r * len(xs) + t
            wide, narrow = sums[i], sums[n + i]
            if full:
                wide = primitive("dot_result")(b, wide, narrow, bits)
                narrow = ir.Constant(narrow.type, None)
            sums[i], sums[n + i] = step(b, wide, narrow, ws[r], xs[t], bits)
    return sums


def _dot8s(
    b: ir.IRBuilder,
    acc: ir.Value,
    products: list[tuple[list[ir.Value], int]],
    entry: tuple[ir.Value, Q8Type],
    bits: int,
    kind: DotType,
) -> ir.Value:
    """`dot8` of each of `products`, (weights, byte offset in the entries), to one sum."""
    n, tokens = kind.count, entry[1].count
    if any(2 * n != len(weights) * tokens for weights, _ in products):
        raise TypeError("dot8: acc must have R * T vectors")
    if token_pairs():
        for weights, offset in products:
            acc = _dot8_pairs(b, acc, weights, entry[0], offset)
        return acc
    rows, prepare, whole = n // tokens, primitive("dot4_weights"), primitive("dot8")
    if prepare:
        products = [([prepare(b, w, bits) for w in ws], offset) for ws, offset in products]
    steps: list[Step] = []
    if whole:
        for ws, offset in products:
            halves = [_activations(b, *entry, offset + i)[1] for i in (0, 4)]
            xs = [list(two) for two in zip(*halves, strict=True)]
            steps.append((whole, [ws[r::rows] for r in range(rows)], xs))
    else:  # the first halves of all products come first: codes are unpacked from fewer registers
        for half in range(2):
            for ws, offset in products:
                one, xs = _activations(b, *entry, offset + 4 * half)
                steps.append((one, ws[half * rows :][:rows], xs))
    return _add_steps(b, acc, steps, bits, kind)


@marker("dot8", lambda acc, w, entry, offset, bits: acc.after(2, literal(bits, "bits")))
def _dot8(b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
    offset, bits = (literal(t, "argument") for t in sig.args[3:])
    weights = split(args[1])
    return _dot8s(b, args[0], [(weights, offset)], (args[2], sig.args[2]), bits, sig.args[0])


@marker("dot16", lambda acc, low, high, entry, offset, bits: acc.after(4, literal(bits, "bits")))
def _dot16(b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
    offset, bits = (literal(t, "argument") for t in sig.args[4:])
    low, high = (split(args[i]) for i in (1, 2))
    products = [(low, offset), (high, offset + 16)]
    return _dot8s(b, args[0], products, (args[3], sig.args[3]), bits, sig.args[0])


def _lanes_step(
    b: ir.IRBuilder, sig: Any, args: Any, codes: list[list[ir.Value]], halves: list[list[ir.Value]]
) -> ir.Value:
    """Sums of one or two codes of each row, times activations that each lane has for itself."""
    bits = literal(sig.args[-1], "bits")
    prepare, whole = primitive("dot4_weights"), primitive("dot8")
    if prepare:
        codes = [[prepare(b, w, bits) for w in row] for row in codes]
    if whole:
        if len(codes) == 1:  # the other half is worth nothing
            none = [[ir.Constant(v.type, None) for v in row] for row in (codes[0], halves[0])]
            codes, halves = [*codes, none[0]], [*halves, none[1]]
        ws, xs = ([list(two) for two in zip(*rows, strict=True)] for rows in (codes, halves))
        steps: list[Step] = [(whole, ws, xs)]
    else:
        one = primitive("dot4_lanes") or primitive("dot4")
        if one is None:
            raise TypeError(f"target {current_target().name} has no dot4")
        steps = [(one, ws, xs) for ws, xs in zip(codes, halves, strict=True)]
    # Here the codes are what is broadcast.
    return _add_steps(b, args[0], steps, bits, sig.args[0], by_rows=True)


def _blocks(b: ir.IRBuilder, sig: Any, args: Any, which: tuple[int, ...]) -> list[list[ir.Value]]:
    return [split(args[i]) for i in which]


@marker("dot8_lanes", lambda acc, *rest: acc.after(2, literal(rest[4], "bits")))
def _dot8_lanes(b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
    codes, halves = (_blocks(b, sig, args, which) for which in ((1, 2), (3, 4)))
    return _lanes_step(b, sig, args, codes, halves)


@marker("dot4_lanes", lambda acc, *rest: acc.after(2, literal(rest[2], "bits")))
def _dot4_lanes(b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
    codes, halves = (_blocks(b, sig, args, which) for which in ((1,), (2,)))
    return _lanes_step(b, sig, args, codes, halves)


@marker("dot_result", lambda acc, bits: VecType("i32", acc.count))
def _dot_result(b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
    bits = literal(sig.args[1], "bits")
    finish = primitive("dot_result")
    parts = []
    n = sig.args[0].count
    for wide, narrow in zip(args[0][:n], args[0][n:], strict=True):
        parts.append(wide if finish is None else finish(b, wide, narrow, bits))
    return join(parts)


def _row_by_column(b: ir.IRBuilder, rows: list[ir.Value], columns: list[ir.Value]) -> list[Any]:
    """(row vector, column vector) of each vector of sums, tokens innermost."""
    if not token_pairs():
        return [(r, t) for r in rows for t in columns]
    halves = [[zipped(b, r, r, half) for half in (0, 1)] for r in rows]
    return [(two[i % 2], t) for two in halves for i, t in enumerate(columns)]


@marker("outer", lambda a, x: VecType("f32", a.count * x.count))
def _outer(b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
    rows, columns = (split(v) for v in args)
    return join([b.fmul(r, t) for r, t in _row_by_column(b, rows, columns)])


@marker("fma_outer", lambda a, x, acc: acc)
def _fma_outer(b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
    rows, columns, sums = (split(v) for v in args)
    if len(sums) != len(rows) * len(columns):
        raise TypeError("fma_outer: the sum must have R * T vectors")
    pairs = _row_by_column(b, rows, columns)
    return join([fma_vectors(b, r, t, s) for (r, t), s in zip(pairs, sums, strict=True)])


@marker("fma_columns", lambda acc, *rest: acc)
def _fma_columns(b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
    n, rows, columns = (literal(sig.args[i], "count") for i in (3, 4, 6))
    sums = split(args[0])
    operands = load_rows_and_columns(
        b, args[1], sig.args[1], rows, args[5], args[2], columns, args[7], n
    )
    for a, x in operands:
        pairs = _row_by_column(b, a, x)
        sums = [fma_vectors(b, r, t, s) for (r, t), s in zip(pairs, sums, strict=True)]
    return join(sums)


@marker("add_pairs", lambda v: VecType("f32", v.count // 2))
def _add_pairs(b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
    parts = _by_token(b, split(args[0]))
    return join([b.fadd(x, y) for x, y in zip(parts[0::2], parts[1::2], strict=True)])


def _by_token(b: ir.IRBuilder, parts: list[ir.Value]) -> list[ir.Value]:
    if not token_pairs():
        return parts
    return [
        shuffle(b, x, y, list(range(t, 2 * x.type.count, 2)))
        for x, y in zip(parts[0::2], parts[1::2], strict=True)
        for t in (0, 1)
    ]


@marker("by_token", lambda v: v)
def _lower_by_token(b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
    return join(_by_token(b, split(args[0])))


def _round_to_bf16(b: ir.IRBuilder, v: ir.Value) -> ir.Value:
    """The upper 16 bits of each int32 lane become the rounded bfloat16; the rest is noise."""
    bits = b.bitcast(v, vector_type("i32"))
    odd = b.and_(b.lshr(bits, constant("i32", 16)), constant("i32", 1))
    return b.add(bits, b.add(odd, constant("i32", 0x7FFF)))


@marker("bf16_pairs", lambda x, y: VecType("i32", 1))
def _bf16_pairs(b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
    own = primitive("bf16_pairs")
    if own is not None:
        return own(b, *args)
    low = b.lshr(_round_to_bf16(b, args[0]), constant("i32", 16))
    high = b.and_(_round_to_bf16(b, args[1]), constant("i32", 0xFFFF0000))
    return b.or_(low, high)


@marker("bf16_dot", lambda acc, x, y: acc)
def _bf16_dot(b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
    step = primitive("bf16_dot")
    if step is None:
        raise TypeError(f"target {current_target().name} has no bf16_dot")
    sums, rows, columns = (split(v) for v in args)
    pairs = [(r, t) for r in rows for t in columns]
    return join([step(b, s, r, t) for (r, t), s in zip(pairs, sums, strict=True)])
