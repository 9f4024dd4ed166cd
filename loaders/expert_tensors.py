"""Matrices of experts in GGUF files: one tensor of three dimensions for all experts of a layer.

Everywhere else an expert's matrix is a matrix like any other, by the name that it has where every
expert is a tensor of its own, as in old GGUF files of Mixtral:

    blk.0.ffn_gate.5.weight      experts' rows 5 of blk.0.ffn_gate_exps.weight
    blk.0.ffn_gate_inp_shexp     a vector in GGUF, here a matrix of one row
"""

from __future__ import annotations

import re
from dataclasses import replace

from headrace.errors import ModelFileError
from headrace.loaders.model_file import ModelFile, TensorInfo

_EXPERT = re.compile(r"(blk\.\d{1,6}\.ffn_(?:gate|up|down))\.(\d{1,6})\.weight")
_ROW = re.compile(r"blk\.\d{1,6}\.ffn_gate_inp_shexp\.weight")


def expert_name(block: int, part: str, expert: int) -> str:
    """What a matrix ("gate", "up", "down") of an expert is called."""
    return f"blk.{block}.ffn_{part}.{expert}.weight"


def whole_name(name: str) -> str:
    """The tensor of all experts that a matrix of one would be in; other names as they are."""
    found = _EXPERT.fullmatch(name)
    return f"{found[1]}_exps.weight" if found else name


def expert_slice(model: ModelFile, name: str) -> TensorInfo | None:
    """The place of an expert's matrix inside the tensor of all experts; None: there is none.

    Raises:
        ModelFileError: there are fewer experts, or they do not divide the tensor.
    """
    found = _EXPERT.fullmatch(name)
    whole = model.tensors.get(whole_name(name)) if found else None
    if found is None or whole is None:
        return None
    if len(whole.shape) != 3 or whole.n_bytes % whole.shape[0] or int(found[2]) >= whole.shape[0]:
        raise ModelFileError(
            f"has shape {list(whole.shape)}, in which there is no matrix of expert {found[2]}",
            path=whole.path, tensor=whole.name, offset=whole.offset,
        )  # fmt: skip
    n_bytes = whole.n_bytes // whole.shape[0]
    return replace(
        whole, name=name, shape=whole.shape[1:], offset=whole.offset + int(found[2]) * n_bytes,
        n_bytes=n_bytes,
    )  # fmt: skip


def as_matrix(info: TensorInfo) -> TensorInfo:
    """A vector that stands for a matrix of one row, as a matrix."""
    if _ROW.fullmatch(info.name) and len(info.shape) == 1:
        return replace(info, shape=(1, *info.shape))
    return info
