"""float32 and halves by integers, for chips without a floating-point unit.

LLVM calls functions of Arm's run-time ABI there ("Run-time ABI for the Arm Architecture", chapter
4), and C's `fmaf`. These do what they say in words of bits: results are rounded to the nearest,
ties to even, subnormal numbers are numbers, a multiply-add is rounded once, and of a NaN comes what
a floating-point unit makes of it: the first signalling operand, else the first quiet one, made
quiet ("Arm Architecture Reference Manual", FPProcessNaNs and FPProcessNaNs3).

Before they are rounded, results are words whose highest bit is bit 30: 24 bits of a significand,
and below it 7, the lowest of which says, too, that something was lost ("jamming", as in Berkeley
SoftFloat).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from headrace.targets.simd import int32, leading_zeros, of_words, widened
from headrace.targets.table import Kernel, no_cases, same_for_all

_SIGN, _SIZE = 1 << 31, (1 << 31) - 1
_INFINITE, _QUIET, _NAN = 0x7F800000, 0x400000, 0x7FC00000
_HIDDEN, _FRACTION = 1 << 23, (1 << 23) - 1
_BIAS, _MOST = 127, 255


# --- parts ----------------------------------------------------------------------------------------


def _packed(sign: Any, exponent: Any, s: Any) -> Any:
    """A result of such an exponent (with its bias), rounded."""
    if exponent >= _MOST:
        return sign | _INFINITE
    if exponent <= 0:
        s = _jammed(s, 1 - exponent)
        exponent = int32(1)
    s = s + 63 + (s >> 7 & 1)
    # The hidden bit, if it is there, and a carry (to bit 31) make the exponent greater.
    return sign | ((exponent - 1 << 23) + int32(widened(s) >> 7))


def _jammed(s: Any, by: Any) -> Any:
    """s / 2**by; the lowest bit is set, too, where others are lost."""
    if by > 30:
        return int32(1 if s != 0 else 0)
    whole = s >> by
    return whole | int32(1 if whole << by != s else 0)


def _jammed_wide(wide: Any, by: Any) -> Any:
    """The same of 64 bits, by words."""
    if by > 31:
        return widened(_jammed(_word(wide), by - 32))
    high, low, up = int32(wide >> 32), int32(wide), 31 - by
    whole = int32(widened(low) >> widened(by & 31)) | high << 1 << up
    lost = int32(1 if low << 1 << up != 0 else 0)
    return widened(high >> by) << 32 | widened(whole | lost)


def _word(wide: Any) -> Any:
    """The upper half of 64 bits, jammed."""
    return int32(wide >> 32) | int32(1 if int32(wide) != 0 else 0)


def _split(x: Any) -> Any:
    """Significand and exponent of a finite number without its sign; a subnormal one's is short."""
    exponent = x >> 23
    if exponent == 0:
        return x, int32(1)
    return (x & _FRACTION) | _HIDDEN, exponent


def _normal(x: Any) -> Any:
    """The same of what is not zero, 24 bits."""
    exponent = x >> 23
    if exponent == 0:
        by = leading_zeros(x) - 8
        return x << by, 1 - by
    return (x & _FRACTION) | _HIDDEN, exponent


def _is_nan(a: Any) -> Any:
    return (a & _SIZE) > _INFINITE


def _is_signalling(a: Any) -> Any:
    return _is_nan(a) and a & _QUIET == 0


def _nan_of(a: Any, b: Any) -> Any:
    """Of two numbers, one of which is none."""
    if _is_signalling(a):
        return a | _QUIET
    if _is_signalling(b):
        return b | _QUIET
    return a if _is_nan(a) else b


# --- sums and products ----------------------------------------------------------------------------


def _add(a: Any, b: Any) -> Any:
    p, q = a, b
    if (a & _SIZE) < (b & _SIZE):
        p, q = b, a
    x, y, sign = p & _SIZE, q & _SIZE, p & _SIGN
    differ = (a ^ b) < 0
    if x >= _INFINITE:
        if x > _INFINITE:
            return _nan_of(a, b)
        return int32(_NAN) if y == _INFINITE and differ else p
    m, exponent = _split(x)
    n, less = _split(y)
    m, n = m << 6, _jammed(n << 6, exponent - less)
    s = m + n
    if differ:
        s = m - n
        sign = int32(0) if s == 0 else sign
    if s == 0:
        return sign
    by = leading_zeros(s) - 1
    return _packed(sign, exponent - by + 1, s << by)


def _subtract(a: Any, b: Any) -> Any:
    return _add(a, b if _is_nan(b) else b ^ _SIGN)


def _multiply(a: Any, b: Any) -> Any:
    x, y, sign = a & _SIZE, b & _SIZE, (a ^ b) & _SIGN
    if x >= _INFINITE or y >= _INFINITE:
        if _is_nan(a) or _is_nan(b):
            return _nan_of(a, b)
        return int32(_NAN) if x == 0 or y == 0 else sign | _INFINITE
    if x == 0 or y == 0:
        return sign
    m, one = _normal(x)
    n, other = _normal(y)
    s = _word(widened(m << 7) * widened(n << 8))
    exponent = one + other - (_BIAS - 1)
    if s >> 30 == 0:
        s, exponent = s << 1, exponent - 1
    return _packed(sign, exponent, s)


def _multiply_add(a: Any, b: Any, c: Any) -> Any:
    """a * b + c by sums of 64 bits; exponents are those of bit 60."""
    one, other, least = a >> 23 & 0xFF, b >> 23 & 0xFF, c >> 23 & 0xFF
    m, n, k = a << 8 | _SIGN, b << 8 | _SIGN, c << 8 | _SIGN
    differ, sign = (a ^ b ^ c) < 0, (a ^ b) & _SIGN
    if one == 0 or other == 0 or least == 0 or one == _MOST or other == _MOST or least == _MOST:
        if one == _MOST or other == _MOST or least == _MOST:
            return _not_finite(a, b, c)
        if a & _SIZE == 0 or b & _SIZE == 0:
            if c & _SIZE != 0:
                return c
            return int32(0) if differ else sign
        m, one = (a << 8, int32(1)) if one == 0 else (m, one)
        n, other = (b << 8, int32(1)) if other == 0 else (n, other)
        k, least = (c << 8, int32(1)) if least == 0 else (k, least)
    exponent = one + other - _BIAS
    ahead = exponent - least
    product, addend = widened(m) * (widened(n) >> 2), widened(k) >> 3 << 32
    if ahead >= 0:
        addend = _jammed_wide(addend, ahead)
    else:
        product, exponent = _jammed_wide(product, -ahead), exponent - ahead
    total = product + addend
    if differ:
        total = product - addend
        if total < 0:
            total, sign = -total, sign ^ _SIGN
    s = _word(total)
    if s >> 26 == 0:  # too few bits are left in the word
        if total == 0:
            return int32(0)
        by = leading_zeros(total) - 1
        s, exponent = _word(total << widened(by)), exponent - by
    by = leading_zeros(s) - 1
    return _packed(sign, exponent - by + 2, s << by)


def _not_finite(a: Any, b: Any, c: Any) -> Any:
    """a * b + c of what is infinite, or no number."""
    x, y, z, sign = a & _SIZE, b & _SIZE, c & _SIZE, (a ^ b) & _SIGN
    undefined = (x == _INFINITE and y == 0) or (y == _INFINITE and x == 0)
    if _is_nan(a) or _is_nan(b) or _is_nan(c):
        if _is_signalling(c):
            return c | _QUIET
        if _is_signalling(a) or _is_signalling(b):
            return _nan_of(a, b)
        if undefined:
            return int32(_NAN)
        return c if _is_nan(c) else _nan_of(a, b)
    infinite = x == _INFINITE or y == _INFINITE
    if undefined or (infinite and z == _INFINITE and (a ^ b ^ c) < 0):
        return int32(_NAN)
    return sign | _INFINITE if infinite else c


def _divide(a: Any, b: Any) -> Any:
    x, y, sign = a & _SIZE, b & _SIZE, (a ^ b) & _SIGN
    if x >= _INFINITE or y >= _INFINITE:
        if _is_nan(a) or _is_nan(b):
            return _nan_of(a, b)
        if x == y:
            return int32(_NAN)
        return sign if y == _INFINITE else sign | _INFINITE
    if y == 0:
        return int32(_NAN) if x == 0 else sign | _INFINITE
    if x == 0:
        return sign
    m, one = _normal(x)
    n, other = _normal(y)
    exponent = one - other + _BIAS
    if m < n:
        m, exponent = m << 1, exponent - 1
    # The first bit of the quotient, and three times 8 more: the chip divides 32 bits.
    rest, quotient = m - n, int32(1)
    for _ in range(3):
        rest = rest << 8
        digit = int32(widened(rest) // widened(n))
        rest, quotient = rest - digit * n, (quotient << 8) + digit
    return _packed(sign, exponent, (quotient << 6) | int32(1 if rest != 0 else 0))


# --- comparisons ----------------------------------------------------------------------------------


def _in_order(a: Any) -> Any:
    """An integer: the greater, the greater a number is; 0 of both zeros."""
    size, negative = a & _SIZE, a >> 31
    return (size ^ negative) - negative


def _compared(test: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """1 where a test of two integers says so of two numbers, else 0."""

    def compare(a: Any, b: Any) -> Any:
        if _is_nan(a) or _is_nan(b):
            return int32(0)
        return int32(1 if test(_in_order(a), _in_order(b)) else 0)

    return compare


def _equal(x: Any, y: Any) -> Any:
    return x == y


def _less(x: Any, y: Any) -> Any:
    return x < y


def _at_most(x: Any, y: Any) -> Any:
    return x <= y


def _greater(x: Any, y: Any) -> Any:
    return x > y


def _at_least(x: Any, y: Any) -> Any:
    return x >= y


def _unordered(a: Any, b: Any) -> Any:
    return int32(1 if _is_nan(a) or _is_nan(b) else 0)


# --- conversions ----------------------------------------------------------------------------------


def _of_integer(a: Any) -> Any:
    if a == 0:
        return a
    size = -a if a < 0 else a
    by = leading_zeros(size)
    high = size << by
    return _packed(a & _SIGN, _BIAS + 31 - by, int32(widened(high) >> 1) | (high & 1))


def _of_half(a: Any) -> Any:
    x, sign = a & 0x7FFF, (a & 0x8000) << 16
    if x >= 0x7C00:
        return sign | _INFINITE | (x & 0x3FF) << 13 | (_QUIET if x > 0x7C00 else 0)
    if x >= 0x400:
        return sign | ((x << 13) + (112 << 23))
    if x == 0:
        return sign
    by = leading_zeros(x) - 21
    return sign | ((112 - by << 23) + (x << by << 13))


def _to_half(a: Any) -> Any:
    x, sign = a & _SIZE, a >> 16 & 0x8000
    if x > _INFINITE:
        return sign | 0x7E00 | (x >> 13 & 0x3FF)
    if x >= 0x477FF000:  # nearer to 2**16 than to the largest half
        return sign | 0x7C00
    if x >= 113 << 23:
        x = x - (112 << 23)
        return sign | (x + 0xFFF + (x >> 13 & 1) >> 13)
    by = 126 - (x >> 23)
    if by > 24:
        return sign
    m = (x & _FRACTION) | _HIDDEN
    return sign | (m + (1 << by - 1) - 1 + (m >> by & 1) >> by)


# --- names ----------------------------------------------------------------------------------------


def _row(name: str, words: int, fn: Callable[..., Any]) -> Kernel:
    build = same_for_all(of_words(fn, words))
    return Kernel(f"float_{name}", build, (__name__,), no_cases, owner=__name__)


# By the names that LLVM calls them by.
ROUTINES = {
    "__aeabi_fadd": _row("add", 2, _add),
    "__aeabi_fsub": _row("subtract", 2, _subtract),
    "__aeabi_fmul": _row("multiply", 2, _multiply),
    "fmaf": _row("multiply_add", 3, _multiply_add),
    "__aeabi_fdiv": _row("divide", 2, _divide),
    "__aeabi_fcmpeq": _row("equal", 2, _compared(_equal)),
    "__aeabi_fcmplt": _row("less", 2, _compared(_less)),
    "__aeabi_fcmple": _row("at_most", 2, _compared(_at_most)),
    "__aeabi_fcmpgt": _row("greater", 2, _compared(_greater)),
    "__aeabi_fcmpge": _row("at_least", 2, _compared(_at_least)),
    "__aeabi_fcmpun": _row("unordered", 2, _unordered),
    "__aeabi_i2f": _row("of_integer", 1, _of_integer),
    "__aeabi_h2f": _row("of_half", 1, _of_half),
    "__aeabi_f2h": _row("to_half", 1, _to_half),
}
_BY_NAME = {row.name: row for row in ROUTINES.values()}


def kernel_named(name: str) -> Kernel:
    """One of them by its own name."""
    return _BY_NAME[name]
