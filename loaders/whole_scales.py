"""Matrices of GGUF files that have one scale for all of their weights.

NVFP4: another tensor, `NAME.scale`, which llama.cpp's converter writes for checkpoints whose
matrices have a float32 scale. I2_S: the first 4 of the 32 bytes behind the codes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from headrace.loaders.ggml_types import BY_NAME
from headrace.loaders.model_file import Scales, TensorInfo


def with_whole_scales(tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """The tensors of a file, such matrices with their scales, which are among the tensors still.

    What is no float32 alone stays unknown: who reads such a matrix refuses it.
    """
    found = {name: _with_tail(info) for name, info in tensors.items()}
    for scale in tensors.values():
        stem = scale.name.removesuffix(".scale")
        if stem == scale.name or scale.type != "F32" or scale.shape != (1,):
            continue
        for name in (f"{stem}.weight", stem):
            info = tensors.get(name)
            if info is not None and info.type == "NVFP4" and len(info.shape) == 2:
                rows, columns = info.shape
                one = replace(scale, shape=(1, 1))
                found[name] = replace(info, scales=Scales(one, rows, columns))
    return found


def _with_tail(info: TensorInfo) -> TensorInfo:
    """An I2_S matrix without the bytes behind its codes, in which its scale is."""
    if info.type != "I2_S" or len(info.shape) != 2:
        return info
    n_bytes = info.n_bytes - BY_NAME[info.type].tail
    scale = TensorInfo(info.name, "F32", (1, 1), info.path, info.offset + n_bytes, 4)
    return replace(info, n_bytes=n_bytes, scales=Scales(scale, *info.shape))
