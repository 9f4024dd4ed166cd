"""Functions that kernels share: exponential, gates, tanh. Over SIMD values; inlined."""

from __future__ import annotations

from typing import Any

from headrace.targets.simd import (
    absolute,
    bits_f32,
    fma,
    maximum,
    minimum,
    round_i32,
    select_lt,
    shl,
    splat_f32,
    splat_i32,
    to_f32,
)


def exp(x: Any) -> Any:
    """e**x on float32 lanes, relative error below 2e-7; exactly 0 below -87.

    Range reduction by the rounded multiple of ln 2 in two parts (Cody and Waite), degree-5 minimax
    polynomial with XNNPACK's constants (f32-raddextexp), power of two through the exponent bits.
    """
    x = minimum(x, splat_f32(88.0))
    return select_lt(x, splat_f32(-87.0), splat_f32(0.0), exp_down(x))


def exp_down(x: Any) -> Any:
    """As `exp` for x <= 88, but e**-87 (1.6e-38) for everything below -87: for softmax."""
    p, n = exp_parts(maximum(x, splat_f32(-87.0)))
    power = bits_f32(shl(n + splat_i32(127), 23))
    return p * power


def exp_parts(x: Any) -> Any:
    """e**x as p between 0.7 and 1.5 and n, an int32, of p * 2**n; for |x| up to 1e5."""
    n = round_i32(x * splat_f32(1.4426950408889634))
    nf = to_f32(n)
    t = fma(nf, splat_f32(-0.693145751953125), x)
    t = fma(nf, splat_f32(-1.428606765330187e-06), t)
    p = fma(splat_f32(0.008287994), t, splat_f32(0.0418978222))
    p = fma(p, t, splat_f32(0.166676521))
    p = fma(p, t, splat_f32(0.499991506))
    p = fma(p, t, splat_f32(0.999999762))
    return fma(p, t, splat_f32(1.0)), n


def silu(x: Any) -> Any:
    """x / (1 + e**-x)."""
    return x / (splat_f32(1.0) + exp(splat_f32(0.0) - x))


def tanh(x: Any) -> Any:
    """Hyperbolic tangent: 1 - 2 / (e**2|x| + 1), with x's sign; what is no number stays so."""
    e = exp(absolute(x) * splat_f32(2.0))
    t = splat_f32(1.0) - splat_f32(2.0) / (e + splat_f32(1.0))
    # `exp` bounds its input, which makes a number of what is none.
    t_or_none = select_lt(splat_f32(-1.0), x, t, x)
    return select_lt(x, splat_f32(0.0), splat_f32(0.0) - t, t_or_none)


def gelu_tanh(x: Any) -> Any:
    """GELU in its tanh form: x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x**3)))."""
    inner = splat_f32(0.7978845608028654) * fma(splat_f32(0.044715) * x * x, x, x)
    return splat_f32(0.5) * x * (splat_f32(1.0) + tanh(inner))
