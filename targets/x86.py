"""x86 primitives, in LLVM's IR builder; the target files pick from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import llvmlite.ir as ir

from headrace.targets.fallbacks import (
    f32_to_half_by_bits,
    half_to_f32_by_bits,
    separate_multiply_add,
)
from headrace.targets.lowering import (
    fma_vectors,
    intrinsic_call,
    lanes,
    nibbles,
    splat,
    stack_place,
    unknown,
)
from headrace.targets.lowering_bytes import saturated_sum
from headrace.targets.pieces import concat, cut
from headrace.targets.simd import SMALL

_I8, _I16, _I32, _I64 = (ir.IntType(n) for n in (8, 16, 32, 64))


def _vec(element: ir.Type, n: int) -> ir.VectorType:
    return ir.VectorType(element, n)


def _pause(b: ir.IRBuilder) -> None:
    intrinsic_call(b, "llvm.x86.sse2.pause", ir.VoidType(), [])


def _clock(b: ir.IRBuilder) -> ir.Value:
    return intrinsic_call(b, "llvm.x86.rdtsc", _I64, [])


def _halves_of(b: ir.IRBuilder, v: ir.Value) -> list[ir.Value]:
    """Lanes through memory: loads are cheaper than shuffles, of which each takes one otherwise.

    LLVM would see through it, if it knew that the address is the same.
    """
    place = stack_place(b, v.type)
    place.align = 2 * v.type.count
    b.store(v, place).align = place.align
    first = b.gep(b.bitcast(place, _I8.as_pointer()), [unknown(b, 0)], inbounds=True)
    words = b.bitcast(first, _I16.as_pointer())
    lanes = (ir.Constant(_I32, i) for i in range(v.type.count))
    return [b.load(b.gep(words, [lane], inbounds=True)) for lane in lanes]


COMMON: Mapping[str, Callable[..., Any]] = {
    "spin_pause": _pause,
    "clock": _clock,
    "halves_of": _halves_of,
}


def _group_words(width: int) -> Callable[..., ir.Value]:
    """`pmaddubsw` of (nibble, 16) and (scale, offset)."""
    name = {512: "avx512.pmaddubs.w.512", 256: "avx2.pmadd.ub.sw", 128: "ssse3.pmadd.ub.sw.128"}
    n_bytes = width // 8

    def group_words(
        b: ir.IRBuilder, value: ir.Value, index: int, scales: ir.Value, groups: Sequence[int]
    ) -> ir.Value:
        def every(n: int) -> ir.Constant:
            return ir.Constant(value.type, [n] * value.type.count)

        nibbles = b.and_(b.lshr(value, every(4 * index)), every(15))
        codes = b.or_(nibbles, every(0x1000))
        order = ir.Constant(_vec(_I32, len(groups)), list(groups))
        spread = b.shuffle_vector(scales, ir.Constant(scales.type, ir.Undefined), order)
        ty, bytes_of = _vec(_I16, n_bytes // 2), _vec(_I8, 2 * value.type.count)
        rows = zip(*(cut(b, b.bitcast(v, bytes_of), n_bytes) for v in (codes, spread)), strict=True)
        full = f"llvm.x86.{name[width]}"
        return concat(b, [intrinsic_call(b, full, ty, list(row)) for row in rows])

    return group_words


# --- tables, in registers of 512 bits -------------------------------------------------------------


def _load_constant(b: ir.IRBuilder, table: ir.Value, at: int, ty: ir.VectorType) -> ir.Value:
    place = b.gep(table, [ir.Constant(_I64, at)], inbounds=True)
    value = b.load(b.bitcast(place, ty.as_pointer()))
    value.align = 16
    value.set_metadata("invariant.load", b.module.add_metadata([]))
    return value


def _chosen(b: ir.IRBuilder, words: Sequence[ir.Value], index: ir.Value, bit: int) -> ir.Value:
    """Of the words that two registers at a time gave, those that bits from `bit` on choose."""
    if len(words) == 1:
        return words[0]
    mask = ir.Constant(index.type, [1 << bit] * index.type.count)
    upper = b.icmp_unsigned("!=", b.and_(index, mask), ir.Constant(index.type, None))
    pairs = zip(words[0::2], words[1::2], strict=True)
    return _chosen(b, [b.select(upper, y, x) for x, y in pairs], index, bit + 1)


def _load_entries_512(
    b: ir.IRBuilder, table: ir.Value, index: ir.Value, n_bytes: int, n_entries: int
) -> list[ir.Value]:
    """`vpermi2w` chooses from 64 of the packed entries at a time, `vpshufb` makes them bytes."""
    words, codes = _vec(_I16, 32), _vec(_I8, 64)
    halves = b.bitcast(index, words)
    packed = n_entries * n_bytes
    name = "llvm.x86.avx512.vpermi2var.hi.512"
    found = []
    for at in range(packed, packed + 2 * n_entries, 128):
        pair = [_load_constant(b, table, at + k, words) for k in (0, 64)]
        found.append(intrinsic_call(b, name, words, [pair[0], halves, pair[1]]))
    entries = b.bitcast(_chosen(b, found, halves, 6), codes)
    meant = []
    for at in (0, 16):
        one = _load_constant(b, table, packed + 2 * n_entries + at, _vec(_I8, 16))
        order = ir.Constant(_vec(_I32, 64), list(range(16)) * 4)
        meant.append(b.shuffle_vector(one, ir.Constant(one.type, ir.Undefined), order))
    second = ir.Constant(_vec(ir.IntType(1), 64), [0, 1] * 32)  # of two codes in a byte
    parts = []
    for half in (0, 1):
        order = [i // 4 * 4 + 2 * half + i % 4 // 2 for i in range(64)]
        twice = b.shuffle_vector(
            entries, ir.Constant(codes, ir.Undefined), ir.Constant(_vec(_I32, 64), order)
        )
        low, high = (nibbles(b, twice, shift) for shift in (0, 4))
        if n_bytes == 4:
            parts.append(_shuffled(b, meant[0], b.select(second, high, low)))
        else:
            for nibble in (low, high):
                one, other = (_shuffled(b, values, nibble) for values in meant)
                parts.append(b.select(second, other, one))
    return parts


def _shuffled(b: ir.IRBuilder, table: ir.Value, codes: ir.Value) -> ir.Value:
    return intrinsic_call(b, "llvm.x86.avx512.pshuf.b.512", codes.type, [table, codes])


def _reciprocal_512(b: ir.IRBuilder, v: ir.Value) -> ir.Value:
    """`vrcp14ps` and a step of Newton's: a division takes as long as 16 other instructions."""
    ty, one = v.type, ir.Constant(v.type, [1.0] * v.type.count)
    if ty.count != 16:
        return b.fdiv(one, v)
    none, every = ir.Constant(ty, ir.Undefined), ir.Constant(_I16, 0xFFFF)
    near = intrinsic_call(b, "llvm.x86.avx512.rcp14.ps.512", ty, [v, none, every])
    off = fma_vectors(b, b.fneg(v), near, one)
    return fma_vectors(b, off, near, near)


# --- VNNI: unsigned by signed bytes, four at a time, into 32 bits ---------------------------------


def _flip_sign(b: ir.IRBuilder, w: ir.Value, bits: int) -> ir.Value:
    # Signed codes become unsigned ones with 128 added: that is the target's signed_dot_bias.
    return b.xor(w, ir.Constant(w.type, [0x80] * w.type.count)) if bits == 8 else w


def _lookup16(width: int, flip: int = 0) -> Callable[..., ir.Value]:
    """`pshufb`: each 128 bits look up in a table of their own.

    Tables of negative values may be kept with `flip`, which LLVM finds flipped twice then.
    """
    name = {512: "avx512.pshuf.b.512", 256: "avx2.pshuf.b", 128: "ssse3.pshuf.b.128"}[width]
    n, piece = width // 8, _vec(_I8, width // 8)

    def lookup16(b: ir.IRBuilder, table: ir.Constant, v: ir.Value, shift: int) -> ir.Value:
        values = [one.constant for one in table.constant]
        flipped = flip if max(values) > 0x7F else 0
        repeated = ir.Constant(piece, [value ^ flipped for value in values] * (n // 16))
        codes = cut(b, nibbles(b, v, shift), n)
        rows = [intrinsic_call(b, f"llvm.x86.{name}", piece, [repeated, one]) for one in codes]
        found = concat(b, rows)
        return b.xor(found, ir.Constant(v.type, [flipped] * v.type.count))

    return lookup16


def _looked_up_sums(width: int) -> Callable[..., ir.Value]:
    """`pshufb`. Two rows lie in a word of 16 bits: their sum is kept, and that of the upper one."""
    name = {512: "avx512.pshuf.b.512", 256: "avx2.pshuf.b", 128: "ssse3.pshuf.b.128"}[width]
    n, words = width // 8, _vec(_I16, width // 16)

    def folded(b: ir.IRBuilder, v: ir.Value) -> ir.Value:
        while v.type.count > 8:
            v = b.add(*cut(b, v, v.type.count))
        return v

    def every(ty: ir.VectorType, value: int) -> ir.Constant:
        return ir.Constant(ty, [value] * ty.count)

    def looked_up_sums(
        b: ir.IRBuilder, planes: Sequence[Sequence[tuple[ir.Value, ir.Value]]]
    ) -> ir.Value:
        totals = [ir.Constant(words, None)] * 2
        for p, products in reversed(list(enumerate(planes))):
            if p + 1 < len(planes):
                totals = [b.add(one, one) for one in totals]
            for pair in products:
                for table, codes in zip(*(cut(b, v, n) for v in pair), strict=True):
                    found = intrinsic_call(b, f"llvm.x86.{name}", table.type, [table, codes])
                    both = b.bitcast(found, words)
                    upper = b.lshr(both, every(words, 8))
                    totals = [b.add(totals[0], both), b.add(totals[1], upper)]
        both, upper = (folded(b, one) for one in totals)
        lower = b.sub(both, b.shl(upper, every(upper.type, 8)))
        order = [i // 2 + 8 * (i % 2) for i in range(16)]
        return b.shuffle_vector(lower, upper, ir.Constant(_vec(_I32, 16), order))

    return looked_up_sums


def _to_bytes(width: int) -> Callable[..., ir.Value]:
    """Packing saturates."""
    level = {512: "avx512", 256: "avx2", 128: "sse2"}[width]
    end = {512: ".512", 256: "", 128: ".128"}[width]
    n, words, codes = width // 32, _vec(_I16, width // 16), _vec(_I8, width // 8)

    def rounded(b: ir.IRBuilder, value: ir.Value) -> ir.Value:
        ty = _vec(_I32, n)
        if width == 512:
            mask = ir.Constant(_I16, 0xFFFF)
            row = [value, ir.Constant(ty, None), mask, ir.Constant(_I32, 4)]
            return intrinsic_call(b, "llvm.x86.avx512.mask.cvtps2dq.512", ty, row)
        name = "avx.cvt.ps2dq.256" if width == 256 else "sse2.cvtps2dq"
        return intrinsic_call(b, f"llvm.x86.{name}", ty, [value])

    def every(b: ir.IRBuilder, value: ir.Value, ty: ir.VectorType) -> ir.Value:
        first = b.extract_element(value, ir.Constant(_I32, 0))
        return splat(b, b.trunc(first, ty.element), ty.count)

    def to_bytes(
        b: ir.IRBuilder, four: list[ir.Value], zero: ir.Value, least: ir.Value, most: ir.Value
    ) -> ir.Value:
        zeros = every(b, zero, words)
        lows, highs = every(b, least, codes), every(b, most, codes)
        found = []
        for row in zip(*(cut(b, one, width // 8) for one in four), strict=True):
            whole = [rounded(b, one) for one in row]
            pack = f"llvm.x86.{level}.packssdw{end}"
            two = [intrinsic_call(b, pack, words, whole[i : i + 2]) for i in (0, 2)]
            two = [saturated_sum(b, one, zeros) for one in two]
            packed = intrinsic_call(b, f"llvm.x86.{level}.packuswb{end}", codes, two)
            packed = b.select(b.icmp_unsigned("<", packed, lows), lows, packed)
            found.append(b.select(b.icmp_unsigned("<", packed, highs), packed, highs))
        return concat(b, found)

    return to_bytes


_ONLY_512: Mapping[str, Callable[..., Any]] = {
    "load_entries": _load_entries_512,
    "reciprocal": _reciprocal_512,
}


def vnni(width: int) -> Mapping[str, Callable[..., Any]]:
    """`vpdpbusd` at 512 or 256 bits."""
    lanes, n_bytes = width // 32, width // 8

    def dot4(
        b: ir.IRBuilder, wide: ir.Value, narrow: ir.Value, w: ir.Value, x: ir.Value, bits: int
    ) -> tuple[ir.Value, ir.Value]:
        out = [
            intrinsic_call(b, f"llvm.x86.avx512.vpdpbusd.{width}", _vec(_I32, lanes), list(row))
            for row in zip(*(cut(b, v, n_bytes) for v in (wide, w, x)), strict=True)
        ]
        return concat(b, out), narrow

    def dot_words(b: ir.IRBuilder, acc: ir.Value, x: ir.Value, y: ir.Value) -> ir.Value:
        name, ty = f"llvm.x86.avx512.vpdpwssd.{width}", _vec(_I32, lanes)
        rows = zip(*(cut(b, v, n_bytes) for v in (acc, x, y)), strict=True)
        return concat(b, [intrinsic_call(b, name, ty, list(row)) for row in rows])

    return {
        **COMMON,
        "dot4": dot4,
        "dot4_each": dot4,
        "dot4_weights": _flip_sign,
        "to_bytes": _to_bytes(width),
        "dot_words": dot_words,
        "group_words": _group_words(width),
        "lookup16": _lookup16(width, flip=0x80),
        **(_ONLY_512 if width == 512 else {}),
        "looked_up_sums": _looked_up_sums(width),
    }


# --- without VNNI: byte products to 16 bits, pairs to 32 ------------------------------------------


def multiply_add(width: int) -> Mapping[str, Callable[..., Any]]:
    """`pmaddubsw` and `pmaddwd` at 256 (AVX2) or 128 bits (SSSE3)."""
    n16, n8 = width // 16, width // 8
    maddubs = {256: "llvm.x86.avx2.pmadd.ub.sw", 128: "llvm.x86.ssse3.pmadd.ub.sw.128"}[width]
    maddwd = {256: "llvm.x86.avx2.pmadd.wd", 128: "llvm.x86.sse2.pmadd.wd"}[width]
    psign = {256: "llvm.x86.avx2.psign.b", 128: "llvm.x86.ssse3.psign.b.128"}[width]
    ones = ir.Constant(_vec(_I16, n16), [1] * n16)

    def pairs(b: ir.IRBuilder, words: ir.Value) -> ir.Value:
        return intrinsic_call(b, maddwd, _vec(_I32, n16 // 2), [words, ones])

    def weights(b: ir.IRBuilder, w: ir.Value, bits: int) -> Any:
        if bits != 8:
            return w
        zero = ir.Constant(w.type, None)
        magnitude = b.select(b.icmp_signed("<", w, zero), b.sub(zero, w), w)
        return magnitude, w

    def steps(bits: int) -> int:
        # 8 steps of 2 products of 15 x 127 are 30480; 4 of 31 and 2 of 63 fit as well.
        return {4: 8, 5: 4, SMALL: 4, 6: 2, 8: 0}[bits]

    def dot4(
        b: ir.IRBuilder, wide: ir.Value, narrow: ir.Value, w: Any, x: ir.Value, bits: int
    ) -> tuple[ir.Value, ir.Value]:
        xs = cut(b, x, n8)
        if bits == 8:
            # |w| <= 128 and |x| <= 127: a pair sums to at most 32512, so nothing saturates.
            magnitude, signed = w
            us = cut(b, magnitude, n8)
            xs = [
                intrinsic_call(b, psign, _vec(_I8, n8), [one, s])
                for one, s in zip(xs, cut(b, signed, n8), strict=True)
            ]
        else:
            us = cut(b, w, n8)
        products = [
            intrinsic_call(b, maddubs, _vec(_I16, n16), [u, one])
            for u, one in zip(us, xs, strict=True)
        ]
        if bits == 8:
            return b.add(wide, concat(b, [pairs(b, p) for p in products])), narrow
        words = b.bitcast(narrow, _vec(_I16, narrow.type.count * 2))
        return wide, b.bitcast(b.add(words, concat(b, products)), narrow.type)

    def result(b: ir.IRBuilder, wide: ir.Value, narrow: ir.Value, bits: int) -> ir.Value:
        if bits == 8:
            return wide
        words = cut(b, b.bitcast(narrow, _vec(_I16, narrow.type.count * 2)), n8)
        return b.add(wide, concat(b, [pairs(b, w) for w in words]))

    def dot_words(b: ir.IRBuilder, acc: ir.Value, x: ir.Value, y: ir.Value) -> ir.Value:
        words = (b.bitcast(v, _vec(_I16, 2 * v.type.count)) for v in (x, y))
        rows = zip(*(cut(b, v, n8) for v in words), strict=True)
        ty = _vec(_I32, n16 // 2)
        return b.add(acc, concat(b, [intrinsic_call(b, maddwd, ty, list(row)) for row in rows]))

    def shifted(b: ir.IRBuilder, word: ir.Value, bits: int) -> ir.Value:
        # The word fits 16 bits. LLVM would shift it before it is broadcast, outside of the vectors.
        n = lanes()
        factors = ir.Constant(_vec(_I16, 2 * n), [1 << bits, 0] * n)
        words = b.bitcast(splat(b, word, n), factors.type)
        rows = zip(cut(b, words, n8), cut(b, factors, n8), strict=True)
        return concat(
            b, [intrinsic_call(b, maddwd, _vec(_I32, n16 // 2), list(row)) for row in rows]
        )

    return {
        **COMMON,
        "dot4": dot4,
        "dot4_each": dot4,
        "dot4_weights": weights,
        "to_bytes": _to_bytes(width),
        "dot_steps": steps,
        "dot_result": result,
        "shifted_word": shifted,
        "dot_words": dot_words,
        "group_words": _group_words(width),
        "lookup16": _lookup16(width),
        "looked_up_sums": _looked_up_sums(width),
    }


# --- bfloat16 pairs -------------------------------------------------------------------------------


class _BFloat(ir.Type):
    """`bfloat`, which llvmlite's builder does not know."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash("bfloat")


def _bf16_dot(b: ir.IRBuilder, acc: ir.Value, x: ir.Value, y: ir.Value) -> ir.Value:
    pairs = ir.VectorType(_BFloat(), 32)
    return intrinsic_call(
        b,
        "llvm.x86.avx512bf16.dpbf16ps.512",
        acc.type,
        [acc, b.bitcast(x, pairs), b.bitcast(y, pairs)],
    )


def _bf16_pairs(b: ir.IRBuilder, low: ir.Value, high: ir.Value) -> ir.Value:
    packed = intrinsic_call(
        b, "llvm.x86.avx512bf16.cvtne2ps2bf16.512", ir.VectorType(_BFloat(), 32), [high, low]
    )
    words = b.bitcast(packed, _vec(_I16, 32))
    order = [i // 2 + 16 * (i % 2) for i in range(32)]
    undef = ir.Constant(words.type, ir.Undefined)
    return b.bitcast(
        b.shuffle_vector(words, undef, ir.Constant(_vec(_I32, 32), order)), _vec(_I32, 16)
    )


BF16: Mapping[str, Callable[..., Any]] = {"bf16_dot": _bf16_dot, "bf16_pairs": _bf16_pairs}


# --- before F16C and FMA --------------------------------------------------------------------------

BEFORE_V3: Mapping[str, Callable[..., Any]] = {
    "half_to_f32": half_to_f32_by_bits,
    "f32_to_half": f32_to_half_by_bits,
    "fma": separate_multiply_add,
}
