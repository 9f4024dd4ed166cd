"""NVFP4 checkpoints: packed 4-bit floats, a float8 scale for 16 weights, a float32 one for all.

    ModelOpt               compressed-tensors      what
    X.weight               X.weight_packed         U8 [rows, n / 2]: E2M1, the even input low
    X.weight_scale         X.weight_scale          F8_E4M3 [rows, n / 16]
    X.weight_scale_2       X.weight_global_scale   F32, one: a factor; of the latter a divisor

Scales of activations are left unread: ours are coded as they come.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from headrace.errors import ModelFileError, UnsupportedError
from headrace.loaders.model_file import Scales, TensorInfo

PACKED = "F4_E2M1"
GROUP = 16
_OF_ACTIVATIONS = (".input_scale", ".input_global_scale")


def with_float4(tensors: list[TensorInfo]) -> list[TensorInfo]:
    """The tensors of a model, packed matrices with their scales, as type `PACKED`.

    Raises:
        ModelFileError: a scale is missing or of another shape.
        UnsupportedError: scales of another type.
    """
    by_name = {t.name: t for t in tensors}
    found: dict[str, TensorInfo] = {}  # by the name of what it stands for
    used: set[str] = set()
    for t in tensors:
        name = t.name.removesuffix("_packed")
        scales = by_name.get(f"{name}_scale")
        if t.type != "U8" or not name.endswith(".weight") or scales is None:
            continue
        divided = f"{name}_global_scale" in by_name
        whole = by_name.get(f"{name}_global_scale" if divided else f"{name}_scale_2")
        if whole is None:
            raise ModelFileError(
                f"4-bit weights without their scale '{name}_scale_2': incomplete, or MXFP4 (which "
                "is read from GGUF files)",
                path=t.path,
                tensor=t.name,
            )
        used |= {t.name, scales.name, whole.name}
        found[t.name] = _matrix(t, name, scales, whole, divided)
    stems = {info.name.removesuffix(".weight") for info in found.values()}
    for t in tensors:
        for suffix in _OF_ACTIVATIONS:
            if t.name.endswith(suffix) and t.name.removesuffix(suffix) in stems:
                used.add(t.name)
    return [found.get(t.name, t) for t in tensors if t.name in found or t.name not in used]


def _matrix(
    packed: TensorInfo, name: str, scales: TensorInfo, whole: TensorInfo, divided: bool
) -> TensorInfo:
    if len(packed.shape) != 2 or 0 in packed.shape:
        raise ModelFileError("has scales, but is no matrix", path=packed.path, tensor=packed.name)
    rows, columns = packed.shape[0], 2 * packed.shape[1]
    for info, kind, shapes in (
        (scales, "F8_E4M3", [(rows, columns // GROUP)]),
        (whole, "F32", [(), (1,), (1, 1)]),
    ):
        where: dict[str, Any] = {"path": info.path, "tensor": info.name}
        if info.type != kind:
            raise UnsupportedError(f"scales of type {info.type}; expected {kind}", **where)
        if info.shape not in shapes or columns % GROUP:
            raise ModelFileError(
                f"shape {list(info.shape)} for a matrix of {rows} x {columns}; expected "
                f"{list(shapes[-1])}",
                **where,
            )
    of_all = replace(whole, shape=(1, 1))
    found = Scales(scales, 1, GROUP, of_all, divided)
    return replace(packed, name=name, type=PACKED, shape=(rows, columns), scales=found)
