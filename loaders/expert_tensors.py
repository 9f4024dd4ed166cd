"""Matrices of experts in GGUF files: one tensor of three dimensions for all experts of a layer.

Everywhere else an expert's matrix is a matrix like any other, by the name that it has where every
expert is a tensor of its own, as in old GGUF files of Mixtral:

    blk.0.ffn_gate.5.weight      experts' rows 5 of blk.0.ffn_gate_exps.weight
    blk.0.ffn_up.5.weight        the second half of the rows of blk.0.ffn_gate_up.5.weight, if the
                                 gate is the first half of the same tensor
    blk.0.ffn_gate_inp_shexp     a vector in GGUF, here a matrix of one row
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from headrace.errors import ModelFileError, UnsupportedError
from headrace.loaders.model_file import ModelFile, TensorInfo

MAX_EXPERTS = 1 << 12  # of a layer
_EXPERT = re.compile(r"(blk\.\d{1,6}\.ffn_(?:gate|up|down))\.(\d{1,6})\.weight")
_ROW = re.compile(r"blk\.\d{1,6}\.ffn_gate_inp_shexp\.weight")


def expert_name(block: int, part: str, expert: int) -> str:
    """What a matrix ("gate", "up", "down") of an expert is called."""
    return f"blk.{block}.ffn_{part}.{expert}.weight"


def whole_name(name: str) -> str:
    """The tensor of all experts that a matrix of one would be in; other names as they are."""
    found = _EXPERT.fullmatch(name)
    return f"{found[1]}_exps.weight" if found else name


def _fused_name(found: re.Match[str]) -> str:
    return f"{found[1].rpartition('_')[0]}_gate_up.{found[2]}.weight"


def holders(name: str) -> tuple[str, ...]:
    """The tensors that a matrix may be a part of."""
    found = _EXPERT.fullmatch(name)
    return () if found is None else (whole_name(name), _fused_name(found))


def expert_slice(model: ModelFile, name: str) -> TensorInfo | None:
    """The place of an expert's matrix inside a larger tensor; None: there is none.

    Raises:
        ModelFileError: there are fewer experts, or they do not divide the tensor.
        UnsupportedError: the tensor has scales of its own.
    """
    found = _EXPERT.fullmatch(name)
    whole = model.tensors.get(whole_name(name)) if found else None
    if found is not None and whole is None and not found[1].endswith("_down"):
        return _half(model, name, found)
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


def _half(model: ModelFile, name: str, found: re.Match[str]) -> TensorInfo | None:
    """Gate or up of a tensor of both."""
    both = model.tensors.get(_fused_name(found))
    if both is None:
        return None
    where: dict[str, Any] = {"path": both.path, "tensor": both.name, "offset": both.offset}
    if len(both.shape) != 2 or both.shape[0] % 2 or both.n_bytes % 2:
        raise ModelFileError(f"has shape {list(both.shape)}, which is no gate and up", **where)
    if both.scales is not None:
        raise UnsupportedError("gate and up in one tensor with scales are not supported", **where)
    n_bytes, second = both.n_bytes // 2, found[1].endswith("_up")
    shape = (both.shape[0] // 2, both.shape[1])
    offset = both.offset + (n_bytes if second else 0)
    return replace(both, name=name, shape=shape, offset=offset, n_bytes=n_bytes)


def as_matrix(info: TensorInfo) -> TensorInfo:
    """A vector that stands for a matrix of one row, as a matrix."""
    if _ROW.fullmatch(info.name) and len(info.shape) == 1:
        return replace(info, shape=(1, *info.shape))
    return info
