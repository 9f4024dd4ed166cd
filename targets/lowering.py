"""What each marker of `headrace.targets.simd` means: its Numba type and its LLVM code.

Importing this module imports Numba and registers the markers with it; only the compiler does so.
Those of inner products are in `headrace.targets.lowering_products`, of 16-bit integers in
`headrace.targets.lowering_words`, of bit planes in `headrace.targets.lowering_planes`, of images of
bytes in `headrace.targets.lowering_bytes`, of matrix registers in
`headrace.targets.lowering_matrix`, of sums in single registers in
`headrace.targets.lowering_sums`, of integers of 32 bits in `headrace.targets.lowering_int32`.
A target replaces single primitives through `Target.primitives` (see `headrace.targets.target`).
"""

from __future__ import annotations

import contextlib
import functools
import operator
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import llvmlite.ir as ir
from numba.core import cgutils, types

from headrace.targets import scalars, simd
from headrace.targets.constants import chosen, repeated, undefined
from headrace.targets.target import Target

LANES = 16  # of a tile, and of vectors in kernels that do not ask for fewer

_I1, _I8, _I16, _I32, _I64 = (ir.IntType(n) for n in (1, 8, 16, 32, 64))
_F32, _F16 = ir.FloatType(), ir.HalfType()
Parts: TypeAlias = ir.Value | list[ir.Value]  # a block of one vector is that vector
_ELEMENT = {"u8": _I8, "i32": _I32, "f16": _F16, "f32": _F32}


class PtrType(types.Type):
    """An address without an element type."""

    part_types = (_I8.as_pointer(),)

    def __init__(self) -> None:
        super().__init__(name="Ptr")


class StripType(types.Type):
    """An address, and which strip of a tile its vector loads give."""

    part_types = (_I8.as_pointer(), _I64)

    def __init__(self) -> None:
        super().__init__(name="Strip")


class VecType(types.Type):
    """A block of `count` vectors of `lanes()` lanes, of u8 4 times as many."""

    def __init__(self, element: str, count: int) -> None:
        self.element = element
        self.count = count
        self.llvm = vector_type(element)
        self.part_types = [self.llvm] * count
        super().__init__(name=f"Vec({element}, {count}, {self.llvm.count})")


class Q8Type(types.Type):
    """Entries of `count` tokens' "q8" activations: their address, or all of their words."""

    def __init__(self, count: int, in_registers: bool) -> None:
        self.count = count
        self.in_registers = in_registers
        quarters = [ir.VectorType(_I32, 4)] * (3 * count)
        self.part_types = quarters if in_registers else PtrType.part_types
        super().__init__(name=f"Q8({count}, {in_registers})")


class Int32Type(types.Type):
    """An integer of 32 bits, see `simd.int32`."""

    part_types = (_I32,)

    def __init__(self) -> None:
        super().__init__(name="Int32")


PTR = PtrType()
INT32 = Int32Type()
STRIP = StripType()


def vector_type(element: str) -> ir.VectorType:
    """The LLVM type of one vector."""
    return ir.VectorType(_ELEMENT[element], lanes() * (4 if element == "u8" else 1))


Q8_BYTES = 48
_PAIR_WORDS, _PAIR_CODES = 32, 64  # of two entries: see `headrace.sparse.token_pairs`


def part_types(ty: types.Type) -> Sequence[ir.Type]:
    """What LLVM values a value consists of: one, or a list of them."""
    found: Sequence[ir.Type] = getattr(ty, "part_types", ())
    return found or [scalars.llvm_type(ty)]


_current: list[Target] = []
_lanes: list[int] = []
_token_pairs: list[bool] = []


def lanes() -> int:
    """Lanes of a vector of 32-bit elements in the kernel that is being compiled."""
    return _lanes[-1]


def vector_bytes() -> int:
    """Bytes of a register of the target."""
    return current_target().vector_bytes


def current_target() -> Target:
    """The target that a kernel is being compiled for."""
    return _current[-1]


def token_pairs() -> bool:
    """Whether vectors hold two rows by two tokens; see `simd.with_lanes`."""
    return _token_pairs[-1]


@contextlib.contextmanager
def lowering_for(target: Target, n_lanes: int = LANES, token_pairs: bool = False) -> Iterator[None]:
    """Lower markers for `target` while the context is open; see `simd.with_lanes`."""
    _current.append(target)
    _lanes.append(n_lanes)
    _token_pairs.append(token_pairs)
    try:
        yield
    finally:
        _current.pop()
        _lanes.pop()
        _token_pairs.pop()


def primitive(name: str) -> Callable[..., Any] | None:
    return current_target().primitives.get(name)


# --- building blocks ------------------------------------------------------------------------------


def split(value: Parts) -> list[ir.Value]:
    """The vectors of a block, or whatever else a value consists of."""
    return value if isinstance(value, list) else [value]


def join(parts: list[ir.Value]) -> Parts:
    """The value that consists of these."""
    return parts[0] if len(parts) == 1 else parts


def splat(b: ir.IRBuilder, scalar: ir.Value, lanes: int) -> ir.Value:
    """A scalar in every lane."""
    undef = undefined(ir.VectorType(scalar.type, lanes))
    first = b.insert_element(undef, scalar, ir.Constant(_I32, 0))
    return b.shuffle_vector(first, undef, chosen((0,) * lanes))


def intrinsic_call(
    b: ir.IRBuilder, name: str, result: ir.Type, args: Sequence[ir.Value]
) -> ir.Value:
    """Call an LLVM intrinsic by its full name."""
    fn_type = ir.FunctionType(result, [a.type for a in args])
    return b.call(cgutils.get_or_insert_function(b.module, fn_type, name), list(args))


def stack_place(b: ir.IRBuilder, ty: ir.Type) -> ir.Value:
    """An address on the stack, the same each time that one gets here."""
    return cgutils.alloca_once(b, ty)


def _at(b: ir.IRBuilder, p: ir.Value, ty: ir.Type) -> ir.Value:
    return b.bitcast(p, ty.as_pointer())


def _offset(b: ir.IRBuilder, p: ir.Value, n_bytes: ir.Value) -> ir.Value:
    return b.gep(p, [n_bytes], inbounds=True)


def _element_bytes(ty: ir.Type) -> int:
    one = ty.element if isinstance(ty, ir.VectorType) else ty
    if isinstance(one, ir.HalfType):
        return 2
    return 4 if isinstance(one, ir.FloatType) else int(one.width) // 8


def _load(b: ir.IRBuilder, p: ir.Value, ty: ir.Type, align: int = 0) -> ir.Value:
    """Load a value whose elements are aligned, as all but raw file data are."""
    value = b.load(_at(b, p, ty))
    value.align = align or _element_bytes(ty)
    return value


def _store(b: ir.IRBuilder, p: ir.Value, value: ir.Value) -> None:
    b.store(value, _at(b, p, value.type)).align = _element_bytes(value.type)


def is_integer(ty: types.Type) -> bool:
    """Whether it is an integer, of 32 or 64 bits."""
    return isinstance(ty, types.Integer | Int32Type)


def as_i64(b: ir.IRBuilder, value: ir.Value) -> ir.Value:
    if isinstance(value.type, ir.IntType) and value.type.width < 64:
        return b.sext(value, _I64)
    return value


def _as_f32(b: ir.IRBuilder, value: ir.Value, ty: types.Type) -> ir.Value:
    ty = types.unliteral(ty)
    if isinstance(ty, types.Integer):
        convert = b.sitofp if ty.signed else b.uitofp
        return convert(value, _F32)
    return b.fptrunc(value, _F32) if ty == types.float64 else value


def literal(ty: types.Type, what: str) -> int:
    if not isinstance(ty, types.Literal):
        raise TypeError(f"{what} must be a constant at compile time, not {ty}")
    return int(ty.literal_value)


# --- registration ---------------------------------------------------------------------------------

Typer = Callable[..., types.Type | None]
Lower = Callable[[ir.IRBuilder, Any, Sequence[Any]], Any]


class Signature(NamedTuple):
    """Types of a call."""

    return_type: types.Type
    args: tuple[types.Type, ...]


# What markers mean, and operators on what is no number; these are asked in turn.
MEANINGS: dict[Callable[..., Any], tuple[Typer, Lower]] = {}
_OPERATORS: dict[Any, list[tuple[Typer, Lower]]] = {}


def marker(name: str, typer: Typer) -> Callable[[Lower], Lower]:
    def wrap(lower: Lower) -> Lower:
        MEANINGS[simd.MARKERS[name]] = typer, lower
        return lower

    return wrap


def on_operator(op: Any, typer: Typer) -> Callable[[Lower], Lower]:
    def wrap(lower: Lower) -> Lower:
        _OPERATORS.setdefault(op, []).append((typer, lower))
        return lower

    return wrap


def operation(op: Any, arguments: tuple[types.Type, ...]) -> tuple[types.Type, Lower] | None:
    """The type of an operator on addresses and vectors, and its code; None: it is not on these."""
    for typer, lower in _OPERATORS.get(op, ()):
        result = typer(*arguments)
        if result is not None:
            return result, lower
    return None


def _vec(element: str, count: types.Type | int) -> VecType:
    n = count if isinstance(count, int) else literal(count, "count")
    return VecType(element, n)


# --- pointers -------------------------------------------------------------------------------------


def _moves(kind: type[types.Type]) -> Typer:
    return lambda a, b: a if isinstance(a, kind) and is_integer(b) else None


@on_operator(operator.add, _moves(PtrType))
def _ptr_add(b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
    return _offset(b, args[0], as_i64(b, args[1]))


@on_operator(operator.add, _moves(StripType))
def _strip_add(b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
    at, index = args[0]
    return [_offset(b, at, as_i64(b, args[1])), index]


def _slot(b: ir.IRBuilder, args: Any) -> ir.Value:
    return _offset(b, args[0], b.mul(as_i64(b, args[1]), ir.Constant(_I64, 8)))


@marker("arg_ptr", lambda p, slot: PTR)
def _arg_ptr(b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
    return _load(b, _slot(b, args), _I8.as_pointer(), 4)


@marker("arg_int", lambda p, slot: types.int64)
def _arg_int(b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
    return _load(b, _slot(b, args), _I64, 4)


@marker("arg_float", lambda p, slot: types.float32)
def _arg_float(b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
    return _load(b, _slot(b, args), _F32, 4)


@marker("ptr_to_int", lambda p: types.int64)
def _ptr_to_int(b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
    return b.ptrtoint(args[0], _I64)


@marker("int_to_ptr", lambda v: PTR)
def _int_to_ptr(b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
    return b.inttoptr(as_i64(b, args[0]), _I8.as_pointer())


# --- scalars --------------------------------------------------------------------------------------


def half_to_f32(b: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """IEEE halves, given as their 16-bit integers (scalar or vector), as float32."""
    own = primitive("half_to_f32")
    if own is not None:
        return own(b, value)
    if isinstance(value.type, ir.VectorType):
        n = value.type.count
        return b.fpext(b.bitcast(value, ir.VectorType(_F16, n)), ir.VectorType(_F32, n))
    return b.fpext(b.bitcast(value, _F16), _F32)


def f32_to_half(b: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """Float32 (scalar or vector) rounded to IEEE halves, as 16-bit integers."""
    own = primitive("f32_to_half")
    if own is not None:
        return own(b, value)
    if isinstance(value.type, ir.VectorType):
        n = value.type.count
        return b.bitcast(b.fptrunc(value, ir.VectorType(_F16, n)), ir.VectorType(_I16, n))
    return b.bitcast(b.fptrunc(value, _F16), _I16)


def _bf16_to_f32(b: ir.IRBuilder, value: ir.Value) -> ir.Value:
    if isinstance(value.type, ir.VectorType):
        n = value.type.count
        wide = b.zext(value, ir.VectorType(_I32, n))
        shift = ir.Constant(wide.type, [16] * n)
        return b.bitcast(b.shl(wide, shift), ir.VectorType(_F32, n))
    return b.bitcast(b.shl(b.zext(value, _I32), ir.Constant(_I32, 16)), _F32)


def _e4m3_to_f32(b: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """As halves, whose exponents are 8 greater; halves have subnormal numbers on every CPU."""
    n = value.type.count if isinstance(value.type, ir.VectorType) else 0
    wide = ir.VectorType(_I16, n) if n else _I16
    nan = ir.Constant(value.type, [0x7F] * n if n else 0x7F)
    seven = ir.Constant(wide, [7] * n if n else 7)
    zero = ir.Constant(value.type, [0] * n if n else 0)
    code = b.and_(b.select(b.icmp_unsigned("==", value, nan), zero, value), nan)
    return half_to_f32(b, b.shl(b.zext(code, wide), seven))


def _e8m0_to_f32(b: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """The exponent of a float32 is one less."""
    ty, wide = value.type, vector_type("i32")
    one = ir.Constant(ty, [1] * ty.count)
    less = intrinsic_call(b, f"llvm.usub.sat.v{ty.count}i8", ty, [value, one])
    return b.bitcast(b.shl(b.zext(less, wide), constant("i32", 23)), _f32_type())


def _get(
    name: str, result: types.Type, memory: ir.Type, convert: Callable[..., Any], align: int = 0
) -> None:
    @marker(name, lambda p: result)
    def _lower(b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        return convert(b, _load(b, args[0], memory, align))


_get("get_u8", types.int64, _I8, lambda b, v: b.zext(v, _I64))
_get("get_i8", types.int64, _I8, lambda b, v: b.sext(v, _I64))
_get("get_u16", types.int64, _I16, lambda b, v: b.zext(v, _I64), align=1)
_get("get_i32", types.int64, _I32, lambda b, v: b.sext(v, _I64))
_get("get_u32", types.int64, _I32, lambda b, v: b.zext(v, _I64), align=1)
_get("get_i64", types.int64, _I64, lambda b, v: v)
_get("get_f32", types.float32, _F32, lambda b, v: v)
_get("get_f16", types.float32, _I16, half_to_f32)
_get("get_e4m3", types.float32, _I8, _e4m3_to_f32)
_get("get_bf16", types.float32, _I16, _bf16_to_f32)


def _put_int(name: str, memory: ir.IntType) -> None:
    @marker(name, lambda p, v: types.none)
    def _lower(b: ir.IRBuilder, sig: Any, args: Any) -> None:
        value = as_i64(b, args[1])
        _store(b, args[0], value if memory.width == 64 else b.trunc(value, memory))


_put_int("put_u8", _I8)
_put_int("put_u16", _I16)
_put_int("put_i64", _I64)


@marker("put_f32", lambda p, v: types.none)
def _put_f32(b: ir.IRBuilder, sig: Any, args: Any) -> None:
    _store(b, args[0], _as_f32(b, args[1], sig.args[1]))


@marker("put_f16", lambda p, v: types.none)
def _put_f16(b: ir.IRBuilder, sig: Any, args: Any) -> None:
    _store(b, args[0], f32_to_half(b, _as_f32(b, args[1], sig.args[1])))


@marker("f32", lambda v: types.float32)
def _f32(b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
    return _as_f32(b, args[0], sig.args[0])


@marker("to_int", lambda v: types.int64)
def _to_int(b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
    return b.fptosi(args[0], _I64)


@marker("sqrt", lambda v: types.float32)
def _sqrt(b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
    return intrinsic_call(b, "llvm.sqrt.f32", _F32, [_as_f32(b, args[0], sig.args[0])])


def _scalar_pair(a: types.Type, b: types.Type) -> types.Type:
    both = types.unliteral(a), types.unliteral(b)
    return types.int64 if all(isinstance(t, types.Integer) for t in both) else types.float32


def _choose(name: str, take_second_when_less: bool) -> None:
    @marker(name, _scalar_pair)
    def _lower(b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        if sig.return_type == types.int64:
            x, y = (as_i64(b, v) for v in args)
            less = b.icmp_signed("<", x, y)
        else:
            x, y = (_as_f32(b, v, t) for v, t in zip(args, sig.args, strict=True))
            less = b.fcmp_ordered("<", x, y)
        return b.select(less, y, x) if take_second_when_less else b.select(less, x, y)


_choose("larger", True)
_choose("smaller", False)


# --- loads and stores -----------------------------------------------------------------------------


def _bits(ty: ir.Type) -> int:
    return 32 if isinstance(ty, ir.FloatType) else int(ty.width)


def first_of(b: ir.IRBuilder, p: ir.Value, ty: types.Type, memory: ir.Type) -> ir.Value:
    """Where a load begins: a strip of a tile is so many vectors ahead."""
    if not isinstance(ty, StripType):
        return p
    n_bytes = ir.Constant(_I64, _bits(memory.element) * memory.count // 8)
    at, index = p
    return _offset(b, at, b.mul(index, n_bytes))


def _load_block(
    name: str, element: str, memory: Callable[[], ir.Type], convert: Callable[..., Any]
) -> None:
    @marker(name, lambda p, count, stride: _vec(element, count))
    def _lower(b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        stride = as_i64(b, args[2])
        p = first_of(b, args[0], sig.args[0], memory())
        parts = []
        for i in range(sig.return_type.count):
            at = p if i == 0 else _offset(b, p, b.mul(stride, ir.Constant(_I64, i)))
            parts.append(convert(b, _load(b, at, memory())))
        return join(parts)


def _places(b: ir.IRBuilder, p: ir.Value, count: int, stride: ir.Value) -> list[ir.Value]:
    more = [_offset(b, p, b.mul(stride, ir.Constant(_I64, i))) for i in range(1, count)]
    return [p, *more]


def load_rows_and_columns(
    b: ir.IRBuilder, w: ir.Value, of: types.Type, rows: int, w_step: ir.Value, x: ir.Value,
    columns: int, x_step: ir.Value, n: int,
) -> list[tuple[list[ir.Value], list[ir.Value]]]:  # fmt: skip
    """Operands of n outer products: see `simd.fma_columns`; `of` is the type of w."""
    memory = _memory(_F32)()
    row_places = _places(b, first_of(b, w, of, memory), rows, as_i64(b, w_step))
    column_places = _places(b, x, columns, as_i64(b, x_step))

    def loaded(places: list[ir.Value], more: int, ty: ir.Type) -> list[ir.Value]:
        return [_load(b, _offset(b, p, ir.Constant(_I64, more)), ty) for p in places]

    return [
        (
            loaded(row_places, 64 * i, memory),
            [splat(b, v, lanes()) for v in loaded(column_places, 4 * i, _F32)],
        )
        for i in range(n)
    ]


def _widen(signed: bool) -> Callable[..., Any]:
    def convert(b: ir.IRBuilder, v: ir.Value) -> ir.Value:
        return (b.sext if signed else b.zext)(v, vector_type("i32"))

    return convert


def _memory(element: ir.Type) -> Callable[[], ir.Type]:
    return lambda: ir.VectorType(element, lanes())


_load_block("load_u8", "u8", lambda: vector_type("u8"), lambda b, v: v)
_load_block("load_u8_i32", "i32", _memory(_I8), _widen(False))
_load_block("load_i8_i32", "i32", _memory(_I8), _widen(True))
_load_block("load_i32", "i32", _memory(_I32), lambda b, v: v)
_load_block("load_f32", "f32", _memory(_F32), lambda b, v: v)
_load_block("load_f16", "f32", _memory(_I16), half_to_f32)
_load_block("load_e4m3", "f32", _memory(_I8), _e4m3_to_f32)
_load_block("load_e8m0", "f32", _memory(_I8), _e8m0_to_f32)
_load_block("load_bf16", "f32", _memory(_I16), _bf16_to_f32)
_load_block(
    "bcast_i8x4",
    "u8",
    lambda: _I32,
    lambda b, v: b.bitcast(splat(b, v, lanes()), vector_type("u8")),
)
_load_block("bcast_f32", "f32", lambda: _F32, lambda b, v: splat(b, v, lanes()))
_load_block("bcast_f16", "f32", lambda: _I16, lambda b, v: splat(b, half_to_f32(b, v), lanes()))
_load_block("load_half", "f16", _memory(_F16), lambda b, v: v)
_load_block("bcast_half", "f16", lambda: _F16, lambda b, v: splat(b, v, lanes()))
_load_block("bcast_i32", "i32", lambda: _I32, lambda b, v: splat(b, v, lanes()))


@marker("strip", lambda p, index: STRIP)
def _strip(b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
    return [args[0], as_i64(b, args[1])]


def _q8_type(p: types.Type, count: types.Type) -> Q8Type:
    by_parts = token_pairs() or _words_loader()
    return Q8Type(literal(count, "count"), current_target().q8_in_registers and not by_parts)


@marker("load_q8", _q8_type)
def _load_q8(b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
    if not sig.return_type.in_registers:
        return args[0]
    load, at, quarters = primitive("load_q8"), args[0], []
    for _ in range(sig.return_type.count):
        quarters += load(b, at)
        at = _offset(b, at, unknown(b, Q8_BYTES))
    return quarters


def unknown(b: ir.IRBuilder, n_bytes: int) -> ir.Value:
    """A number that LLVM does not know.

    Instructions that load several registers have no offsets, but can add a register to their
    address. LLVM makes no use of it where it can fold constant steps to one addition per load.
    """
    name = f"headrace_step_{n_bytes}"
    at = b.module.globals.get(name)
    if at is None:
        at = ir.GlobalVariable(b.module, _I64, name)
        at.linkage = "internal externally_initialized"
        at.initializer = ir.Constant(_I64, n_bytes)
    step = b.load(at)
    step.set_metadata("invariant.load", b.module.add_metadata([]))
    return step


def _words_loader() -> Callable[..., Any] | None:
    """Loads 4 words of an entry into every lane; pays where each is used by few registers."""
    return primitive("load_q8_words") if lanes() == 4 else None


def _q8_steps(count: int) -> tuple[int, ...]:
    """Bytes from load to load of the entries of `count` tokens; empty where each part is loaded."""
    if token_pairs():
        return (_PAIR_WORDS, _PAIR_CODES) * (count // 2)
    if _words_loader():
        return (Q8_BYTES // 3,) * (3 * count)
    return (Q8_BYTES,) * count if current_target().q8_in_registers else ()


@marker("past_q8", lambda x, count: PTR)
def _past_q8(b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
    at, count = args[0], literal(sig.args[1], "count")
    steps = _q8_steps(count)
    if not steps:
        return _offset(b, at, ir.Constant(_I64, count * Q8_BYTES))
    for n_bytes in steps:
        at = _offset(b, at, unknown(b, n_bytes))
    return at


def _q8_scalars(b: ir.IRBuilder, entry: ir.Value, ty: Q8Type, offset: int) -> list[ir.Value]:
    """The 32-bit word at a byte offset of each entry."""
    if ty.in_registers:
        lane = ir.Constant(_I32, offset % 16 // 4)
        return [b.extract_element(one, lane) for one in entry[offset // 16 :: 3]]
    places = (ir.Constant(_I64, i * Q8_BYTES + offset) for i in range(ty.count))
    return [_load(b, _offset(b, entry, place), _I32) for place in places]


def q8_words(b: ir.IRBuilder, entry: ir.Value, ty: Q8Type, offset: int) -> list[ir.Value]:
    """The 32-bit word at a byte offset of each entry, in every lane."""
    if load := _words_loader():
        found, at = [], entry
        for i, n_bytes in enumerate(_q8_steps(ty.count)):
            if i % 3 == offset // 16:
                found.append(load(b, at)[offset % 16 // 4])
            at = _offset(b, at, unknown(b, n_bytes))
        return found
    return [splat(b, word, lanes()) for word in _q8_scalars(b, entry, ty, offset)]


def pair_loads(b: ir.IRBuilder, entry: ir.Value, count: int, codes: bool) -> list[Any]:
    """What a target loads of each pair of entries: the words, or the codes.

    Loads are written where a part of them is used; LLVM finds again what was loaded before.
    """
    load = primitive("load_pair_codes" if codes else "load_pair_words")
    found, words = [], entry
    for _ in range(count // 2):
        behind = _offset(b, words, unknown(b, _PAIR_WORDS))
        found.append(load(b, behind if codes else words))
        words = _offset(b, behind, unknown(b, _PAIR_CODES))
    return found


def _pair_parts(b: ir.IRBuilder, entry: ir.Value, count: int, offset: int) -> list[ir.Value]:
    """What `q8_f32` and `q8_i32` give of each pair, for both of its tokens in turn."""
    if offset == 44:
        step, minus = primitive("pair_products"), constant("u8", 0xFF)
        first = []
        for vectors in pair_loads(b, entry, count, True):
            total = ir.Constant(vector_type("i32"), None)
            for codes in vectors[:2]:
                total = step(b, total, minus, codes)
            first += [total] * 2
        return first
    parts = []
    for sums, again, scales, products in pair_loads(b, entry, count, False):
        if offset == 40:
            parts += [b.ashr(one, constant("i32", 3)) for one in (sums, again)]
        else:
            parts += [{32: scales, 36: products}[offset]] * 2
    return parts


def _q8_part(name: str, element: str) -> None:
    @marker(name, lambda entry, offset: VecType(element, entry.count))
    def _lower(b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        offset = literal(sig.args[1], "offset")
        if token_pairs():
            parts = _pair_parts(b, args[0], sig.args[0].count, offset)
            return join([b.bitcast(v, vector_type(element)) for v in parts])
        words = q8_words(b, args[0], sig.args[0], offset)
        return join([b.bitcast(v, vector_type(element)) for v in words])


_q8_part("q8_f32", "f32")
_q8_part("q8_i32", "i32")


@marker("q8_shifted", lambda entry, offset, bits: VecType("i32", entry.count))
def _q8_shifted(b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
    offset, bits = (literal(t, "argument") for t in sig.args[1:])
    return shifted_words(b, args[0], sig.args[0], offset, bits)


def shifted_words(b: ir.IRBuilder, entry: ir.Value, ty: Q8Type, offset: int, bits: int) -> ir.Value:
    if token_pairs():
        if offset == 44:
            parts = _pair_parts(b, entry, ty.count, offset)
            return join([b.shl(v, constant("i32", bits)) for v in parts])
        sums = [v for words in pair_loads(b, entry, ty.count, False) for v in words[:2]]
        shift = b.shl if bits >= 3 else b.ashr
        return join([shift(v, constant("i32", abs(bits - 3))) for v in sums])
    shift = primitive("shifted_word")
    if shift is None or _words_loader():
        words = q8_words(b, entry, ty, offset)
        return join([b.shl(one, constant("i32", bits)) for one in words])
    return join([shift(b, word, bits) for word in _q8_scalars(b, entry, ty, offset)])


def _store_block(name: str, convert: Callable[..., Any]) -> None:
    @marker(name, lambda p, value, stride: types.none)
    def _lower(b: ir.IRBuilder, sig: Any, args: Any) -> None:
        p, stride = args[0], as_i64(b, args[2])
        for i, one in enumerate(split(args[1])):
            at = p if i == 0 else _offset(b, p, b.mul(stride, ir.Constant(_I64, i)))
            _store(b, at, convert(b, one))


_store_block("store_f32", lambda b, v: v)
_store_block("store_half", lambda b, v: v)
_store_block("store_i32", lambda b, v: v)
_store_block("store_i8", lambda b, v: b.trunc(v, ir.VectorType(_I8, lanes())))
_store_block("store_i16", lambda b, v: b.trunc(v, ir.VectorType(_I16, lanes())))


@marker("store_i8_halves", lambda p, value, apart, stride: types.none)
def _store_i8_halves(b: ir.IRBuilder, sig: Any, args: Any) -> None:
    apart, stride = literal(sig.args[2], "apart"), as_i64(b, args[3])
    for i, one in enumerate(split(args[1])):
        codes = b.trunc(one, ir.VectorType(_I8, LANES))
        at = args[0] if i == 0 else _offset(b, args[0], b.mul(stride, ir.Constant(_I64, i)))
        for half in range(2):
            eight = range(8 * half, 8 * half + 8)
            to = _offset(b, at, ir.Constant(_I64, apart * half))
            _store(b, to, shuffle(b, codes, ir.Constant(codes.type, ir.Undefined), eight))


def _grid(b: ir.IRBuilder, p: ir.Value, row: ir.Value, column: ir.Value, r: int, c: int) -> Any:
    at = p if r == 0 else _offset(b, p, b.mul(row, ir.Constant(_I64, r)))
    return at if c == 0 else _offset(b, at, b.mul(column, ir.Constant(_I64, c)))


@marker(
    "load_f32_grid",
    lambda p, rows, columns, rs, cs: _vec(
        "f32", literal(rows, "rows") * literal(columns, "columns")
    ),
)
def _load_grid(b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
    rows, columns = literal(sig.args[1], "rows"), literal(sig.args[2], "columns")
    rs, cs = as_i64(b, args[3]), as_i64(b, args[4])
    places = [(r, k) for r in range(rows) for k in range(columns)]
    return join([_load(b, _grid(b, args[0], rs, cs, r, k), vector_type("f32")) for r, k in places])


@marker("store_f32_grid", lambda p, value, columns, rs, cs: types.none)
def _store_grid(b: ir.IRBuilder, sig: Any, args: Any) -> None:
    columns = literal(sig.args[2], "columns")
    rs, cs = as_i64(b, args[3]), as_i64(b, args[4])
    for i, one in enumerate(split(args[1])):
        _store(b, _grid(b, args[0], rs, cs, i // columns, i % columns), one)


_store_block("store_f16", f32_to_half)


@marker("store_u8", lambda p, value: types.none)
def _store_u8(b: ir.IRBuilder, sig: Any, args: Any) -> None:
    for i, one in enumerate(split(args[1])):
        _store(b, _offset(b, args[0], ir.Constant(_I64, 64 * i)), one)


@marker("store_u8_quarters", lambda p, value, stride: types.none)
def _store_u8_quarters(b: ir.IRBuilder, sig: Any, args: Any) -> None:
    stride = as_i64(b, args[2])
    for i in range(4):
        at = _offset(b, args[0], b.mul(stride, ir.Constant(_I64, i)))
        _store(b, at, shuffle(b, args[1], args[1], range(16 * i, 16 * i + 16)))


def _end_to_end(b: ir.IRBuilder, parts: list[ir.Value]) -> ir.Value:
    """One vector of 2**n."""
    while len(parts) > 1:
        both = range(2 * parts[0].type.count)
        parts = [shuffle(b, x, y, both) for x, y in zip(parts[0::2], parts[1::2], strict=True)]
    return parts[0]


def _transposed_runs(b: ir.IRBuilder, p: ir.Value, stride: ir.Value, run: int) -> list[ir.Value]:
    n = 16 // run  # runs of a row, and vectors of so many in each group of 128 bits
    sixteen = ir.VectorType(_I8, 16)
    places = [_offset(b, p, b.mul(stride, ir.Constant(_I64, i))) for i in range(16)]
    rows = [_load(b, at, sixteen) for at in places]
    # A group of 128 bits for every n-th row. Then n groups are a square of runs, which log2(n)
    # steps transpose: each takes turns between two vectors, as x86 and ARM do within such groups.
    target = current_target()
    groups = min(run, (target.shuffle_bytes or target.vector_bytes) // 16)
    runs = ir.VectorType(ir.IntType(8 * run), n * groups)
    parts = []
    for first in range(0, run, groups):
        square = [
            b.bitcast(_end_to_end(b, rows[i + first * n :: n][:groups]), runs) for i in range(n)
        ]
        for _ in range(n.bit_length() - 1):
            pairs = zip(square[: n // 2], square[n // 2 :], strict=True)
            square = [zipped(b, x, y, half, n) for x, y in pairs for half in (0, 1)]
        parts.append(square)
    ordered = [part[k] for k in range(n) for part in parts]
    each = len(ordered) // 4
    whole = [_end_to_end(b, ordered[i * each : (i + 1) * each]) for i in range(4)]
    return [b.bitcast(v, vector_type("u8")) for v in whole]


@marker("load_runs", lambda p, row_bytes, run: VecType("u8", 4))
def _load_runs(b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
    run = literal(sig.args[2], "run")
    return join(_transposed_runs(b, args[0], as_i64(b, args[1]), run))


@marker("copy_runs", lambda dst, src, row_bytes, run: types.none)
def _copy_runs(b: ir.IRBuilder, sig: Any, args: Any) -> None:
    dst, src, stride = args[0], args[1], as_i64(b, args[2])
    run, own = literal(sig.args[3], "run"), primitive("copy_runs")
    if own is not None:
        own(b, dst, src, stride, run)
        return
    for i, one in enumerate(_transposed_runs(b, src, stride, run)):
        _store(b, _offset(b, dst, ir.Constant(_I64, 64 * i)), one)


# --- making vectors -------------------------------------------------------------------------------


@marker("zeros_f32", lambda count: _vec("f32", count))
def _zeros_f32(b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
    return join([ir.Constant(vector_type("f32"), None)] * sig.return_type.count)


@marker("zeros_half", lambda count: _vec("f16", count))
def _zeros_half(b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
    return join([ir.Constant(vector_type("f16"), None)] * sig.return_type.count)


@marker("splat_f32", lambda v: _vec("f32", 1))
def _splat_f32(b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
    return splat(b, _as_f32(b, args[0], sig.args[0]), lanes())


@marker("splat_half", lambda v: _vec("f16", 1))
def _splat_half(b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
    return splat(b, b.fptrunc(_as_f32(b, args[0], sig.args[0]), _F16), lanes())


@marker("splat_i32", lambda v: _vec("i32", 1))
def _splat_i32(b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
    return splat(b, b.trunc(as_i64(b, args[0]), _I32), lanes())


@marker("iota_i32", lambda: _vec("i32", 1))
def _iota(b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
    return ir.Constant(vector_type("i32"), list(range(lanes())))


@marker("repeat", lambda v, n: _vec(v.element, v.count * literal(n, "count")))
def _repeat(b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
    parts = split(args[0])
    return join(parts * (sig.return_type.count // len(parts)))


@marker("part", lambda v, i: _vec(v.element, 1))
def _part(b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
    return split(args[0])[literal(sig.args[1], "index")]


@marker("join4", lambda a, x, y, z: VecType(a.element, 4))
def _join4(b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
    return join(list(args))


@marker("join", lambda a, x: VecType(a.element, 2 * a.count))
def _join_two(b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
    return join([*split(args[0]), *split(args[1])])


@marker("sub_block", lambda v, start, n: _vec(v.element, n))
def _sub_block(b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
    start = literal(sig.args[1], "start")
    parts = split(args[0])
    return join(parts[start : start + sig.return_type.count])


@marker("lane0", lambda v: types.float32)
def _lane0(b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
    return b.extract_element(args[0], ir.Constant(_I32, 0))


def _pick(name: str, first: int) -> None:
    @marker(name, lambda a, v: _same(a, v))
    def _lower(b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        index = ir.Constant(ir.VectorType(_I32, LANES), list(range(first, 2 * LANES, 2)))
        return b.shuffle_vector(args[0], args[1], index)


_pick("evens", 0)
_pick("odds", 1)


# --- lane by lane ---------------------------------------------------------------------------------


def _same(*args: types.Type) -> VecType | None:
    """Blocks of one element type; a single vector goes with a block of any count."""
    if not all(isinstance(a, VecType) for a in args):
        return None
    if len({a.element for a in args}) != 1:
        return None
    counts = {a.count for a in args}
    if len(counts - {1}) > 1:
        raise TypeError(f"blocks of different shapes: {args}")
    return VecType(args[0].element, max(counts))


def _map(b: ir.IRBuilder, sig: Any, args: Any, fn: Callable[..., ir.Value]) -> ir.Value:
    columns = []
    for value, ty in zip(args, sig.args, strict=True):
        parts = split(value)
        columns.append(parts * sig.return_type.count if ty.count == 1 else parts)
    return join([fn(*row) for row in zip(*columns, strict=False)])


def _operator(op: Any, integer: str, floating: str | None) -> None:
    @on_operator(op, lambda *a: _same(*a) if len(a) == 2 else None)
    def _lower(b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        name = floating if sig.return_type.element in ("f32", "f16") else integer
        if name is None:
            raise TypeError(f"{op.__name__} has no meaning for float lanes")
        return _map(b, sig, args, getattr(b, name))


_operator(operator.add, "add", "fadd")
_operator(operator.sub, "sub", "fsub")
_operator(operator.mul, "mul", "fmul")
_operator(operator.truediv, "sdiv", "fdiv")
_operator(operator.and_, "and_", None)
_operator(operator.or_, "or_", None)
_operator(operator.xor, "xor", None)


def _f32_type() -> ir.Type:
    return vector_type("f32")


def fma_vectors(b: ir.IRBuilder, x: ir.Value, y: ir.Value, z: ir.Value) -> ir.Value:
    if isinstance(x.type.element, ir.HalfType):
        return intrinsic_call(b, f"llvm.fma.v{lanes()}f16", x.type, [x, y, z])
    own = primitive("fma")
    if own is not None:
        return own(b, x, y, z)
    return intrinsic_call(b, f"llvm.fma.v{lanes()}f32", _f32_type(), [x, y, z])


def _fma_type(*args: types.Type) -> types.Type | None:
    if all(isinstance(types.unliteral(a), types.Float) for a in args):
        return types.float32
    return _same(*args)


@marker("reciprocal", lambda v: v)
def _reciprocal(b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
    def divided(v: ir.Value) -> ir.Value:
        return b.fdiv(ir.Constant(v.type, [1.0] * v.type.count), v)

    own = primitive("reciprocal")
    return _map(b, sig, args, divided if own is None else functools.partial(own, b))


@marker("fma", _fma_type)
def _fma(b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
    if sig.return_type == types.float32:
        scalars = [_as_f32(b, v, t) for v, t in zip(args, sig.args, strict=True)]
        return intrinsic_call(b, "llvm.fma.f32", _F32, scalars)
    return _map(b, sig, args, lambda x, y, z: fma_vectors(b, x, y, z))


def _unary(name: str, result: str | None, fn: Callable[..., ir.Value]) -> None:
    @marker(name, lambda v, *rest: VecType(result or v.element, v.count))
    def _lower(b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        constants = [literal(t, "argument") for t in sig.args[1:]]
        parts = split(args[0])
        return join([fn(b, v, *constants) for v in parts])


def constant(element: str, value: int) -> ir.Constant:
    ty = vector_type(element)
    return repeated(ty.element, ty.count, value)


def _round(b: ir.IRBuilder, v: ir.Value) -> ir.Value:
    # Adding 1.5 * 2**23 leaves the rounded integer in the low bits of the mantissa: one addition
    # in the default rounding mode, the same on every target.
    magic = ir.Constant(_f32_type(), [12582912.0] * lanes())
    bits = b.bitcast(b.fadd(v, magic), vector_type("i32"))
    return b.sub(bits, constant("i32", 0x4B400000))


def _third(b: ir.IRBuilder, v: ir.Value) -> ir.Value:
    # Comparisons, since few CPUs multiply bytes; AVX2 compares signed ones only.
    above = (b.icmp_signed(">", v, constant("u8", n)) for n in (85 - 128, 170 - 128))
    one, two = (b.sext(found, v.type) for found in above)
    return b.sub(b.sub(constant("u8", 0), one), two)


_unary("to_f32", "f32", lambda b, v: b.sitofp(v, _f32_type()))
_unary("round_i32", "i32", _round)
_unary("bits_f32", "f32", lambda b, v: b.bitcast(v, _f32_type()))
_unary("bits_i32", "i32", lambda b, v: b.bitcast(v, vector_type("i32")))
_unary("bits_u8", "u8", lambda b, v: b.bitcast(v, vector_type("u8")))
_unary("shl", None, lambda b, v, n: b.shl(v, constant("i32", n)))
_unary("shr", None, lambda b, v, n: b.lshr(v, constant("i32", n)))
marker("shl_by", lambda v, bits: v)(lambda b, sig, args: b.shl(*args))
marker("shr_by", lambda v, bits: v)(lambda b, sig, args: b.lshr(*args))
marker("sar_by", lambda v, bits: v)(lambda b, sig, args: b.ashr(*args))
_unary("shr_u8", None, lambda b, v, n: b.lshr(v, constant("u8", n)))
_unary("shl_u8", None, lambda b, v, n: b.shl(v, constant("u8", n)))
_unary("and_u8", None, lambda b, v, mask: b.and_(v, constant("u8", mask)))
_unary("xor_u8", None, lambda b, v, mask: b.xor(v, constant("u8", mask)))
_unary("third_u8", None, lambda b, v: _third(b, v))
_unary(
    "absolute", None, lambda b, v: intrinsic_call(b, f"llvm.fabs.v{lanes()}f32", _f32_type(), [v])
)
_unary(
    "square_root",
    None,
    lambda b, v: intrinsic_call(b, f"llvm.sqrt.v{lanes()}f32", _f32_type(), [v]),
)


def nibbles(b: ir.IRBuilder, v: ir.Value, shift: int) -> ir.Value:
    """Bits shift .. shift + 3 of each byte."""
    by, last = (ir.Constant(v.type, [n] * v.type.count) for n in (shift, 15))
    return b.and_(b.lshr(v, by), last)


def _looked_up_by_ones(b: ir.IRBuilder, table: ir.Constant, v: ir.Value, shift: int) -> ir.Value:
    """For CPUs that look up no bytes in registers."""
    place = ir.GlobalVariable(b.module, ir.ArrayType(_I8, 16), b.module.get_unique_name("table"))
    place.linkage, place.global_constant = "internal", True
    place.initializer = ir.Constant(place.type.pointee, [one.constant for one in table.constant])
    codes, found = nibbles(b, v, shift), ir.Constant(v.type, ir.Undefined)
    for i in range(v.type.count):
        code = b.zext(b.extract_element(codes, ir.Constant(_I32, i)), _I32)
        one = b.load(b.gep(place, [ir.Constant(_I32, 0), code], inbounds=True))
        found = b.insert_element(found, one, ir.Constant(_I32, i))
    return found


@marker("lookup16", lambda v, *rest: v)
def _lookup16(b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
    shift, low, high, bits = (literal(t, "argument") for t in sig.args[1:])
    bias = current_target().dot_bias(bits) if bits == simd.SMALL else 0
    values = [byte + bias & 0xFF for byte in struct.pack("<2q", low, high)]
    table = ir.Constant(ir.VectorType(_I8, 16), values)
    look = primitive("lookup16") or _looked_up_by_ones
    return join([look(b, table, v, shift) for v in split(args[0])])


def _halves_of(b: ir.IRBuilder, v: ir.Value) -> list[ir.Value]:
    """The 16-bit halves of int32 lanes as scalars, all low ones first."""
    halves = b.bitcast(v, ir.VectorType(_I16, 2 * lanes()))
    order = [2 * i + half for half in (0, 1) for i in range(lanes())]
    own = primitive("halves_of")
    if own is not None:
        ones = own(b, halves)
        return [ones[k] for k in order]
    return [b.extract_element(halves, ir.Constant(_I32, k)) for k in order]


@marker(
    "load_entries",
    lambda p, index, n, entries: VecType("u8", literal(n, "n_bytes") // 2),
)
def _load_entries(b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
    n_bytes, n_entries = (literal(t, "argument") for t in sig.args[2:])
    own = primitive("load_entries")
    if own is not None:
        return join(own(b, args[0], args[1], n_bytes, n_entries))
    entry, parts = ir.IntType(8 * n_bytes), []
    table, halves = _at(b, args[0], entry), _halves_of(b, args[1])
    for some in (halves[: lanes()], halves[lanes() :]):
        found = ir.Constant(ir.VectorType(entry, lanes()), ir.Undefined)
        for i, index in enumerate(some):
            one = b.load(b.gep(table, [b.zext(index, _I64)], inbounds=True))
            one.align = 4
            found = b.insert_element(found, one, ir.Constant(_I32, i))
        words = b.bitcast(found, ir.VectorType(_I32, lanes() * n_bytes // 4))
        step = n_bytes // 4
        quads = [shuffle(b, words, words, range(k, step * lanes(), step)) for k in range(step)]
        parts += [b.bitcast(v, vector_type("u8")) for v in quads]
    return join(parts)


@marker("negate_bytes", lambda v, bits, shift: v)
def _negate_bytes(b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
    shift, value = literal(sig.args[2], "shift"), args[0]
    bits = b.bitcast(args[1], value.type)
    each = range(value.type.count)
    spread = shuffle(b, bits, bits, [i // 4 * 4 + shift // 8 for i in each])
    mask = ir.Constant(value.type, [1 << (shift % 8 + i % 4) for i in each])
    zero = ir.Constant(value.type, None)
    return b.select(b.icmp_unsigned("!=", b.and_(spread, mask), zero), b.sub(zero, value), value)


def _compare(b: ir.IRBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
    if isinstance(x.type.element, ir.IntType):
        return b.icmp_signed("<", x, y)
    return b.fcmp_ordered("<", x, _hidden(b, y))


def _hidden(b: ir.IRBuilder, y: ir.Value) -> ir.Value:
    """The same floats, as an order with NaN can be told where LLVM has it wrong."""
    own = primitive("hidden")
    return y if own is None else own(b, y)


def _minmax(name: str, keep_first_when_less: bool) -> None:
    @marker(name, lambda x, y: _same(x, y))
    def _lower(b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        # Compare-and-select: one instruction on x86, and no NaN rules that differ by target.
        def one(x: ir.Value, y: ir.Value) -> ir.Value:
            y = _hidden(b, y)  # also where it is taken: else it is in two registers
            less = b.fcmp_ordered("<", x, y)
            return b.select(less, x, y) if keep_first_when_less else b.select(less, y, x)

        return _map(b, sig, args, one)


_minmax("minimum", True)
_minmax("maximum", False)


@marker("select_lt", lambda a, b, yes, no: _same(yes, no))
def _select_lt(b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
    return _map(b, sig, args, lambda x, y, yes, no: b.select(_compare(b, x, y), yes, no))


@marker("select_nan", lambda x, yes, no: _same(yes, no))
def _select_nan(b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
    own = primitive("is_nan")

    def one(x: ir.Value, yes: ir.Value, no: ir.Value) -> ir.Value:
        nan = b.fcmp_unordered("uno", x, x) if own is None else own(b, x)
        return b.select(nan, yes, no)

    return _map(b, sig, args, one)


# --- across lanes ---------------------------------------------------------------------------------


def _reduce(name: str, result: types.Type, fn: Callable[..., ir.Value]) -> None:
    @marker(name, lambda v: result)
    def _lower(b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        value = args[0]
        if sig.args[0].count != 1:
            raise TypeError(f"{name} takes one vector")
        width = value.type.count
        while width > 1:  # fold the upper half onto the lower one
            width //= 2
            undef = ir.Constant(value.type, ir.Undefined)
            index = ir.VectorType(_I32, width)
            low = b.shuffle_vector(value, undef, ir.Constant(index, list(range(width))))
            high = b.shuffle_vector(value, undef, ir.Constant(index, list(range(width, 2 * width))))
            value = fn(b, low, high)
        scalar = b.extract_element(value, ir.Constant(_I32, 0))
        return b.sext(scalar, _I64) if result == types.int64 else scalar


_reduce("sum_f32", types.float32, lambda b, x, y: b.fadd(x, y))
_reduce("sum_i32", types.int64, lambda b, x, y: b.add(x, y))
_reduce("max_f32", types.float32, lambda b, x, y: b.select(b.fcmp_ordered("<", x, y), y, x))


def shuffle(b: ir.IRBuilder, x: ir.Value, y: ir.Value, lanes: Sequence[int]) -> ir.Value:
    return b.shuffle_vector(x, y, chosen(tuple(lanes)))


def zipped(b: ir.IRBuilder, x: ir.Value, y: ir.Value, half: int, group: int = 0) -> ir.Value:
    """The lower or upper halves of two vectors, or of each `group` lanes, lane by lane in turn."""
    n = x.type.count
    size = group or n
    lanes = range(half * size // 2, (half + 1) * size // 2)
    return shuffle(b, x, y, [g + i + v for g in range(0, n, size) for i in lanes for v in (0, n)])


def _reduce_rows(b: ir.IRBuilder, rows: list[ir.Value], fn: Callable[..., ir.Value]) -> ir.Value:
    """Fold pairs of vectors into one until one is left, then fold within it."""
    width = LANES  # lanes that still belong to one row
    while len(rows) > 1:
        half = width // 2
        first = [i for i in range(LANES) if i % width < half]
        second = [i + half for i in first]
        # Rows of `width` lanes become rows of half as many: x's in the lower lanes, y's above.
        rows = [
            fn(
                b,
                shuffle(b, x, y, first + [i + LANES for i in first]),
                shuffle(b, x, y, second + [i + LANES for i in second]),
            )
            for x, y in zip(rows[0::2], rows[1::2], strict=True)
        ]
        width = half
    value = rows[0]
    while width > 1:
        half = width // 2
        undef = ir.Constant(value.type, ir.Undefined)
        # Every lane i of the lower half of its row gets its partner; the others do not matter.
        partner = [min(i + half, LANES - 1) for i in range(LANES)]
        value = fn(b, value, shuffle(b, value, undef, partner))
        width = half
    return value


def _row_reduction(name: str, element: str, fn: Callable[..., ir.Value]) -> None:
    @marker(name, lambda v: VecType(element, 1))
    def _lower(b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        n = sig.args[0].count
        value = _reduce_rows(b, split(args[0]), fn)
        undef = ir.Constant(value.type, ir.Undefined)
        lanes = _merged_order(n)
        return shuffle(b, value, undef, [lanes[i] if i < n else 0 for i in range(LANES)])


def _merged_order(n: int) -> list[int]:
    """Where `_reduce_rows` leaves the result of each of n rows."""
    places = [[i] for i in range(n)]
    width = LANES
    while len(places) > 1:
        places = [x + y for x, y in zip(places[0::2], places[1::2], strict=True)]
        width //= 2
    return [places[0].index(i) * width for i in range(n)]


@marker("transpose16", lambda v: v if v.count == LANES else None)
def _transpose16(b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
    rows = split(args[0])
    width = LANES // 2
    while width:
        # Swap the upper `width` lanes of each run of x with the lower ones of its partner y.
        out = list(rows)
        low = [i if i % (2 * width) < width else i - width + LANES for i in range(LANES)]
        high = [i + width if i % (2 * width) < width else i + LANES for i in range(LANES)]
        for i in range(LANES):
            if i % (2 * width) < width:
                x, y = rows[i], rows[i + width]
                out[i], out[i + width] = shuffle(b, x, y, low), shuffle(b, x, y, high)
        rows = out
        width //= 2
    return join(rows)


@marker("load_turned", lambda p, stride: VecType("f32", lanes()))
def _load_turned(b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
    # Quarters of rows 4 apart make a vector, and 4 vectors are turned within their quarters: half
    # the shuffles of `transpose16`, as vectors are put together while they are loaded.
    quarter, stride, n = ir.VectorType(ir.FloatType(), 4), as_i64(b, args[1]), lanes()
    quarters = range(0, n, 4)
    found: list[ir.Value] = []
    for first in quarters:
        rows = []
        for k in range(4):
            at = ir.Constant(_I64, 4 * first)
            parts = [
                _load(
                    b, _offset(b, args[0], b.add(b.mul(ir.Constant(_I64, k + r), stride), at)),
                    quarter,
                )
                for r in quarters
            ]  # fmt: skip
            while len(parts) > 1:
                whole = list(range(2 * parts[0].type.count))
                parts = [
                    shuffle(b, x, y, whole) for x, y in zip(parts[::2], parts[1::2], strict=True)
                ]
            rows.append(parts[0])
        lower = [q + i // 2 + i % 2 * n for q in quarters for i in range(4)]
        upper = [one + 2 for one in lower]
        a, c_ = shuffle(b, rows[0], rows[1], lower), shuffle(b, rows[0], rows[1], upper)
        d, e = shuffle(b, rows[2], rows[3], lower), shuffle(b, rows[2], rows[3], upper)
        left = [q + i % 2 + i // 2 * n for q in quarters for i in range(4)]
        right = [one + 2 for one in left]
        found += [
            shuffle(b, a, d, left), shuffle(b, a, d, right), shuffle(b, c_, e, left),
            shuffle(b, c_, e, right),
        ]  # fmt: skip
    return join(found)


_row_reduction("row_sum_i32", "i32", lambda b, x, y: b.add(x, y))
_row_reduction("row_max_f32", "f32", lambda b, x, y: b.select(b.fcmp_ordered("<", x, y), y, x))


@marker("splat_lane", lambda v, lane: VecType(v.element, 1))
def _splat_lane(b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
    lane = literal(sig.args[1], "lane")
    return shuffle(b, args[0], ir.Constant(args[0].type, ir.Undefined), [lane] * LANES)


@marker("store_lanes", lambda p, a, x, y, z, count, stride: types.none)
def _store_lanes(b: ir.IRBuilder, sig: Any, args: Any) -> None:
    count, stride = literal(sig.args[5], "count"), as_i64(b, args[6])
    ints = [b.bitcast(v, vector_type("i32")) for v in args[1:5]]
    for i in range(count):
        low = shuffle(b, ints[0], ints[1], [i, i + LANES])
        high = shuffle(b, ints[2], ints[3], [i, i + LANES])
        at = args[0] if i == 0 else _offset(b, args[0], b.mul(stride, ir.Constant(_I64, i)))
        _store(b, at, shuffle(b, low, high, [0, 1, 2, 3]))


@marker("store_words", lambda p, a, count, stride: types.none)
def _store_words(b: ir.IRBuilder, sig: Any, args: Any) -> None:
    ints, stride = b.bitcast(args[1], vector_type("i32")), as_i64(b, args[3])
    for i in range(literal(sig.args[2], "count")):
        at = args[0] if i == 0 else _offset(b, args[0], b.mul(stride, ir.Constant(_I64, i)))
        _store(b, at, b.extract_element(ints, ir.Constant(_I32, i)))


# --- memory and threads ---------------------------------------------------------------------------


@marker("prefetch", lambda p: types.none)
def _prefetch(b: ir.IRBuilder, sig: Any, args: Any) -> None:
    _ask_for_line(b, args[0], locality=3)


@marker("prefetch_l2", lambda p: types.none)
def _prefetch_l2(b: ir.IRBuilder, sig: Any, args: Any) -> None:
    _ask_for_line(b, args[0], locality=2)


def _ask_for_line(b: ir.IRBuilder, p: ir.Value, locality: int) -> None:
    fn_type = ir.FunctionType(ir.VoidType(), [_I8.as_pointer(), _I32, _I32, _I32])
    fn = cgutils.get_or_insert_function(b.module, fn_type, "llvm.prefetch.p0")
    b.call(fn, [p, ir.Constant(_I32, 0), ir.Constant(_I32, locality), ir.Constant(_I32, 1)])


@marker("atomic_add", lambda p, v: types.int64)
def _atomic_add(b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
    return b.atomic_rmw("add", _at(b, args[0], _I64), as_i64(b, args[1]), "seq_cst")


@marker("atomic_get", lambda p: types.int64)
def _atomic_get(b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
    return b.load_atomic(_at(b, args[0], _I64), "acquire", 8)


@marker("atomic_put", lambda p, v: types.none)
def _atomic_put(b: ir.IRBuilder, sig: Any, args: Any) -> None:
    b.store_atomic(as_i64(b, args[1]), _at(b, args[0], _I64), "release", 8)


@marker("spin_pause", lambda: types.none)
def _spin_pause(b: ir.IRBuilder, sig: Any, args: Any) -> None:
    own = primitive("spin_pause")
    if own is not None:
        own(b)


@marker("clock", lambda: types.int64)
def _clock(b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
    own = primitive("clock")
    return ir.Constant(_I64, 0) if own is None else own(b)


@marker("call_kernel", lambda f, args, t, n: types.none)
def _call_kernel(b: ir.IRBuilder, sig: Any, args: Any) -> None:
    fn_type = ir.FunctionType(ir.VoidType(), [_I8.as_pointer(), _I64, _I64])
    fn = b.bitcast(args[0], fn_type.as_pointer())
    b.call(fn, [args[1], as_i64(b, args[2]), as_i64(b, args[3])])


@marker("call_void", lambda f: types.none)
def _call_void(b: ir.IRBuilder, sig: Any, args: Any) -> None:
    b.call(b.bitcast(args[0], ir.FunctionType(ir.VoidType(), []).as_pointer()), [])


@marker("call_system", lambda f, x, y, z, n: types.int64)
def _call_system(b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
    word = ir.IntType(8 * current_target().word_bytes)
    fn = b.bitcast(args[0], ir.FunctionType(word, [word, word, word, _I64]).as_pointer())
    words = [_as_word(b, value, word) for value in args[1:4]]
    result = b.call(fn, [*words, as_i64(b, args[4])])
    return result if word.width == 64 else b.sext(result, _I64)


def _as_word(b: ir.IRBuilder, value: ir.Value, word: ir.IntType) -> ir.Value:
    if isinstance(value.type, ir.PointerType):
        return b.ptrtoint(value, word)
    value = as_i64(b, value)
    return value if word.width == 64 else b.trunc(value, word)
