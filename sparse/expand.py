"""GGML types that have no kernels here load as one that has, with no fewer bits per weight.

The target is Q8_0 unless a smaller format holds the same weights exactly. What happens to them:

    type                    becomes  weights
    I8, I16                 F16, F32 exact
    F8_E4M3, F8_E5M2        F16      exact; with scales (`expand_scaled`) rounded to float16
    NVFP4, F4_E2M1, scaled  e2m1_g16 codes exact, scale of 16 weights rounded to float16 (2^-11)
    F4_E2M1, E8M0 scales    MXFP4    exact
    I2_S                    TQ2_0    codes exact, the scale rounded to float16
    F8_E8M0                 F32      exact (scales are of this type, no weights)
    F64                     F32      rounded
    others gguf can decode  Q8_0     rounded: at most 1/225 of the largest of 32 weights

The gguf package decodes all types but the plain ones; it is imported when first needed.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from headrace.errors import ModelFileError, UnsupportedError
from headrace.sparse import e8m0, float4, float8, i2_s
from headrace.sparse.format import Bytes, Floats, Format
from headrace.sparse.registry import FORMATS, by_ggml_type

CHUNK_BYTES = 256 * 1024  # of raw bytes that are recoded at once
_LARGEST_HALF = 65504.0
_LARGEST_Q8 = 127 * 65504.0
_PLAIN = {"I8": ("f16", np.int8), "I16": ("f32", np.int16), "F64": ("f32", np.float64)}


def plan_expansion(ggml_type: str) -> Format:
    """Give the format in which a tensor of `ggml_type` is kept; its own, if that is one of ours.

    Raises:
        UnsupportedError: nothing here can decode the type.
    """
    own = by_ggml_type(ggml_type)
    if own is not None:
        return own
    if ggml_type in _PLAIN:
        return FORMATS[_PLAIN[ggml_type][0]]
    if ggml_type in _RECODERS:
        return FORMATS[_RECODERS[ggml_type][0]]
    _decode(np.zeros((1, _block_bytes(ggml_type)), np.uint8), ggml_type)
    return FORMATS["q8_0"]


def plan_scaled(name: str, columns: int) -> Format:
    """As `plan_expansion`, of a matrix with scales for `columns` weights each.

    Raises:
        UnsupportedError: nothing here can decode the type.
    """
    if name in float4.NAMES:
        return FORMATS[float4.becomes(name, columns)]
    return FORMATS[i2_s.BECOMES] if name == i2_s.NAME else plan_expansion(name)


def expand(raw: Bytes, ggml_type: str, target: Format) -> Bytes:
    """Recode a matrix, some rows at a time.

    Args:
        raw: uint8 [rows, row_bytes] of `ggml_type`.
        ggml_type: GGML's name of the type, such as "IQ3_S".
        target: `plan_expansion(ggml_type)`, or another format that the decoded weights go through.

    Raises:
        UnsupportedError: nothing here can decode the type, or a weight is too large for `target`.
    """
    if ggml_type == target.ggml_type:
        return raw
    rows = raw.shape[0]
    step = max(1, CHUNK_BYTES // max(1, raw.shape[1]))
    first = _expand_rows(raw[:step], ggml_type, target)
    out = np.empty((rows, first.shape[1]), np.uint8)
    out[:step] = first
    for at in range(step, rows, step):
        out[at : at + step] = _expand_rows(raw[at : at + step], ggml_type, target)
    return out


@np.errstate(all="ignore")
def _expand_rows(raw: Bytes, ggml_type: str, target: Format) -> Bytes:
    name, recode = _RECODERS.get(ggml_type, ("", None))
    if recode is not None and name == target.name:
        return recode(raw, ggml_type)
    own = by_ggml_type(ggml_type)
    x = own.decode(raw) if own is not None else _decode(raw, ggml_type)
    # NaN and infinity in the file stay what they are; a finite weight must not become one.
    if target.name == "q8_0" and _LARGEST_Q8 < np.abs(x).max(initial=0) < np.inf:
        raise UnsupportedError(
            f"a {ggml_type} weight is beyond what Q8_0 holds ({_LARGEST_Q8:.0f}); "
            "convert the file to F32 or BF16"
        )
    return target.encode(x)


@np.errstate(all="ignore")
def expand_scaled(raw: Bytes, name: str, target: Format, scales: Floats, columns: int) -> Bytes:
    """Recode rows of FP8, FP4 or ternary weights times their scales.

    Args:
        raw: uint8 [rows, n], or as `headrace.sparse.float4` and `i2_s` have them.
        name: "F8_E4M3", "F8_E5M2", "F4_E2M1", "NVFP4" or "I2_S".
        scales: float32 [rows, blocks]; each is for `columns` weights, the last for what is left.

    Raises:
        UnsupportedError: a weight is too large for `target`, or its code is none.
        ModelFileError: a weight is no finite number.
    """
    if name in float4.NAMES:
        return float4.expand(raw, name, target, scales, columns)
    if name == i2_s.NAME:
        return i2_s.expand(raw, target, scales)
    rows, n = raw.shape
    out = np.empty((rows, target.row_bytes(n)), np.uint8)
    step = max(1, CHUNK_BYTES // max(1, n))
    for at in range(0, rows, step):
        x = float8.decode(raw[at : at + step], name)
        x *= np.repeat(scales[at : at + step], columns, axis=1)[:, :n]
        if not np.isfinite(x).all():
            raise ModelFileError(
                f"a scaled {name} weight, or its scale, is no finite number; fetch the file again"
            )
        if target.name == "f16" and (np.abs(x) > _LARGEST_HALF).any():
            raise UnsupportedError(
                f"a scaled {name} weight is beyond what float16 holds ({_LARGEST_HALF:.0f}); "
                "take the checkpoint before it was quantised"
            )
        out[at : at + step] = target.encode(x)
    return out


def _decode(raw: Bytes, ggml_type: str) -> Floats:
    if ggml_type in float8.NAMES:
        return float8.decode(raw, ggml_type)
    if ggml_type in _PLAIN:
        plain = np.ascontiguousarray(raw).view(_PLAIN[ggml_type][1])
        return plain.astype(np.float32)
    from gguf import GGMLQuantizationType, quants

    try:
        return quants.dequantize(np.ascontiguousarray(raw), GGMLQuantizationType[ggml_type])
    except (KeyError, NotImplementedError) as error:
        raise _unsupported(ggml_type) from error


def _block_bytes(ggml_type: str) -> int:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        return GGML_QUANT_SIZES[GGMLQuantizationType[ggml_type]][1]
    except KeyError as error:
        raise _unsupported(ggml_type) from error


def _unsupported(ggml_type: str) -> UnsupportedError:
    return UnsupportedError(
        f"no decoder for tensors of type {ggml_type}, neither here nor in the installed gguf "
        "package; update gguf, or convert the file, for example to Q8_0"
    )


def _of_exponents(raw: Bytes, ggml_type: str) -> Bytes:
    return FORMATS["f32"].encode(2 * e8m0.half_scales(raw))


_RECODERS: dict[str, tuple[str, Callable[[Bytes, str], Bytes]]] = {
    **{name: ("f16", float8.to_halves) for name in float8.NAMES},
    "F8_E8M0": ("f32", _of_exponents),
}
