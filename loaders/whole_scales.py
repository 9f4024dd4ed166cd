"""NVFP4 matrices of GGUF files that have a scale of their own: another tensor, `NAME.scale`.

llama.cpp's converter writes it for checkpoints whose matrices have a float32 scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from headrace.loaders.model_file import Scales, TensorInfo


def with_whole_scales(tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """The tensors of a file, such matrices with their scales, which are among the tensors still.

    What is no float32 alone stays unknown: who reads such a matrix refuses it.
    """
    found = dict(tensors)
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
