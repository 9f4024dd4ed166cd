"""Quantised checkpoints: FP8 weights and the scales that belong to them.

A matrix `X.weight` of type F8_E4M3 or F8_E5M2 may have `X.weight_scale_inv` (DeepSeek's and Qwen's:
a scale for each block, of 128 x 128 weights usually) or `X.weight_scale` (one in all, or one for
each row). Both are factors, the name of the first notwithstanding.
"""

from __future__ import annotations

from dataclasses import replace

from headrace.errors import ModelFileError, UnsupportedError
from headrace.loaders.huggingface.config import Config
from headrace.loaders.model_file import Scales, TensorInfo

FLOAT8 = ("F8_E4M3", "F8_E5M2")
_METHODS = ("fp8", "fbgemm_fp8", "compressed-tensors", "modelopt", "mxfp4")
_SUFFIXES = ("_scale_inv", "_scale")
_SCALE_TYPES = ("F32", "F16", "BF16")
MAX_BLOCK = 1 << 20


def check_quantization(config: Config) -> tuple[int, int]:
    """Rows and columns of the blocks that have a scale each.

    Raises:
        UnsupportedError: weights are quantised in another way.
    """
    quantization = config.inner("quantization_config")
    if quantization is None:
        return 128, 128
    method = quantization.get("quant_method", str)
    if method not in _METHODS:
        raise quantization.unsupported(
            "quant_method",
            f"is {method[:40]!r}; of quantised checkpoints only FP8, NVFP4 and MXFP4 ones are "
            "supported. Take the original checkpoint, or a GGUF file",
        )
    block = quantization.get("weight_block_size", list, [128, 128])
    if len(block) != 2 or not all(type(n) is int and 0 < n <= MAX_BLOCK for n in block):
        raise quantization.bad("weight_block_size", f"is {str(block)[:40]}, expected two sizes")
    return block[0], block[1]


def with_scales(tensors: list[TensorInfo], block: tuple[int, int]) -> list[TensorInfo]:
    """The tensors of a file without those that are scales, which others have instead.

    Raises:
        ModelFileError: scales of no FP8 matrix, two for one, or of a shape that does not fit it.
    """
    by_name = {t.name: t for t in tensors}
    scales: dict[str, TensorInfo] = {}
    for t in tensors:
        suffix = next((s for s in _SUFFIXES if t.name.endswith(f".weight{s}")), None)
        if suffix is None:
            continue
        name = t.name.removesuffix(suffix)
        if name not in by_name or by_name[name].type not in FLOAT8:
            raise ModelFileError(
                f"scales, and their file has no FP8 matrix {name!r}", path=t.path, tensor=t.name
            )
        if name in scales:
            raise ModelFileError("has two kinds of scales", path=t.path, tensor=name)
        scales[name] = t
    drop = {t.name for t in scales.values()}
    return [
        replace(t, scales=_scales(t, scales[t.name], block)) if t.name in scales else t
        for t in tensors
        if t.name not in drop
    ]


def _scales(matrix: TensorInfo, scales: TensorInfo, block: tuple[int, int]) -> Scales:
    if len(matrix.shape) != 2 or 0 in matrix.shape:
        raise ModelFileError("has scales, but is no matrix", path=matrix.path, tensor=matrix.name)
    if scales.type not in _SCALE_TYPES:
        raise UnsupportedError(
            f"scales of type {scales.type}; expected {', '.join(_SCALE_TYPES)}",
            path=scales.path,
            tensor=scales.name,
        )
    rows, columns = matrix.shape
    blocks = -(-rows // block[0]), -(-columns // block[1])
    if scales.shape == blocks and scales.name.endswith("_inv"):
        size = block
    elif scales.shape in ((), (1,), (1, 1)):
        blocks, size = (1, 1), (rows, columns)
    elif scales.shape in ((rows,), (rows, 1)):
        blocks, size = (rows, 1), (1, columns)
    else:
        raise ModelFileError(
            f"scales of shape {list(scales.shape)} for a matrix of {rows} x {columns}: expected "
            f"one in all, one for each row, or {blocks[0]} x {blocks[1]} for blocks",
            path=scales.path,
            tensor=scales.name,
        )
    return Scales(replace(scales, shape=blocks), *size)
