"""Checkpoints in packed 4-bit floats: NVFP4 (scales of 16 weights) and MXFP4 (of 32).

    ModelOpt, NVFP4        compressed-tensors      what
    X.weight               X.weight_packed         U8 [rows, n / 2]: E2M1, the even input low
    X.weight_scale         X.weight_scale          F8_E4M3 [rows, n / 16]
    X.weight_scale_2       X.weight_global_scale   F32, one: a factor; of the latter a divisor

    MXFP4 as gpt-oss's     compressed-tensors      what
    X_blocks               X.weight_packed         U8 [rows, n / 32, 16] or [rows, n / 2]: as above
    X_scales               X.weight_scale          U8 or F8_E8M0 [rows, n / 32]

Scales of activations are left unread: ours are coded as they come.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from headrace.errors import ModelFileError, UnsupportedError
from headrace.loaders.model_file import Scales, TensorInfo

PACKED = "F4_E2M1"
EXPONENT = "F8_E8M0"
GROUP, MX_GROUP = 16, 32
_BLOCKS, _SCALES = "_blocks", "_scales"
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
        scales = _scales_of(t, by_name)
        if scales is None:
            continue
        used |= {t.name, scales.name}
        if t.name.endswith(_BLOCKS) or scales.type in ("U8", EXPONENT):
            found[t.name] = _mx_matrix(t, scales)
            continue
        name = _plain(t.name)
        divided = f"{name}_global_scale" in by_name
        whole = by_name.get(f"{name}_global_scale" if divided else f"{name}_scale_2")
        if whole is None:
            raise ModelFileError(
                f"4-bit weights without their scale '{name}_scale_2', or those of MXFP4: "
                "incomplete; download the model again",
                path=t.path,
                tensor=t.name,
            )
        used.add(whole.name)
        found[t.name] = _matrix(t, name, scales, whole, divided)
    stems = {info.name.removesuffix(".weight") for info in found.values()}
    for t in tensors:
        for suffix in _OF_ACTIVATIONS:
            if t.name.endswith(suffix) and t.name.removesuffix(suffix) in stems:
                used.add(t.name)
    return [found.get(t.name, t) for t in tensors if t.name in found or t.name not in used]


def _plain(name: str) -> str:
    """The name of the matrix that packed weights stand for."""
    if name.endswith(_BLOCKS):
        return name.removesuffix(_BLOCKS).removesuffix(".weight") + ".weight"
    return name.removesuffix("_packed")


def _scales_of(t: TensorInfo, by_name: Mapping[str, TensorInfo]) -> TensorInfo | None:
    """The scales of packed weights; None: it is something else."""
    if t.type != "U8":
        return None
    if t.name.endswith(_BLOCKS):
        return by_name.get(t.name.removesuffix(_BLOCKS) + _SCALES)
    name = _plain(t.name)
    return by_name.get(f"{name}_scale") if name.endswith(".weight") else None


def _mx_matrix(packed: TensorInfo, scales: TensorInfo) -> TensorInfo:
    shape = packed.shape
    if packed.name.endswith(_BLOCKS) and len(shape) == 3 and shape[-1] == MX_GROUP // 2:
        shape = shape[0], shape[1] * shape[2]
    if len(shape) != 2 or 0 in shape:
        raise ModelFileError(
            f"has scales, but shape {list(packed.shape)} of no matrix (experts that lie "
            "together are not read in this form)",
            path=packed.path,
            tensor=packed.name,
        )
    rows, columns = shape[0], 2 * shape[1]
    _check(scales, ("U8", EXPONENT), [(rows, columns // MX_GROUP)], rows, columns, MX_GROUP)
    found = Scales(replace(scales, type=EXPONENT), 1, MX_GROUP)
    name = _plain(packed.name)
    return replace(packed, name=name, type=PACKED, shape=(rows, columns), scales=found)


def _matrix(
    packed: TensorInfo, name: str, scales: TensorInfo, whole: TensorInfo, divided: bool
) -> TensorInfo:
    if len(packed.shape) != 2 or 0 in packed.shape:
        raise ModelFileError("has scales, but is no matrix", path=packed.path, tensor=packed.name)
    rows, columns = packed.shape[0], 2 * packed.shape[1]
    _check(scales, ("F8_E4M3",), [(rows, columns // GROUP)], rows, columns, GROUP)
    _check(whole, ("F32",), [(), (1,), (1, 1)], rows, columns, GROUP)
    of_all = replace(whole, shape=(1, 1))
    found = Scales(scales, 1, GROUP, of_all, divided)
    return replace(packed, name=name, type=PACKED, shape=(rows, columns), scales=found)


def _check(
    info: TensorInfo, kinds: tuple[str, ...], shapes: list[tuple[int, ...]], rows: int,
    columns: int, group: int,
) -> None:  # fmt: skip
    """Refuse scales of another type or shape than those of a matrix."""
    where: dict[str, Any] = {"path": info.path, "tensor": info.name}
    if info.type not in kinds:
        raise UnsupportedError(
            f"scales of type {info.type}; expected {' or '.join(kinds)}", **where
        )
    if info.shape not in shapes or columns % group:
        raise ModelFileError(
            f"shape {list(info.shape)} for a matrix of {rows} x {columns}; expected "
            f"{list(shapes[-1])}",
            **where,
        )
