"""What a file of ours takes over from its source: tensors, and what its header says of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from headrace.errors import UnsupportedError
from headrace.families.decoder import Decoder, tensor_of
from headrace.loaders.expert_tensors import holders
from headrace.loaders.ggml_types import BY_NAME
from headrace.loaders.gguf import ModelFile, TensorInfo
from headrace.loaders.tiled import Entry, format_name, tiled_type
from headrace.placing import Placed
from headrace.pruning import PrunedMatrix

Matrices: TypeAlias = Sequence[Placed | PrunedMatrix]


def others(
    model: ModelFile, decoder: Decoder, matrices: Matrices
) -> tuple[list[TensorInfo], list[TensorInfo]]:
    """The tensors beside all `matrices` of a model: vectors, and what no pass reads."""
    vectors = {v.name: tensor_of(model, v) for v in decoder.vectors()}
    scales = (one.info.scales for one in matrices)  # which matrices are rounded with
    known = {*vectors, *(one.info.name for one in scales if one is not None)}
    for one in matrices:
        known |= {one.matrix.name, *holders(one.matrix.name)}
    return list(vectors.values()), [i for n, i in model.tensors.items() if n not in known]


def entry_of(source: Placed | PrunedMatrix | TensorInfo) -> Entry:
    """What the header says of a matrix, or of a tensor that is copied.

    Raises:
        UnsupportedError: the tensor has a type that a file of ours cannot have.
    """
    if not isinstance(source, TensorInfo):
        m, name = source.matrix, source.format.name
        return Entry(m.name, tiled_type(name), (m.rows, m.columns), source.packed_bytes, name)
    kept = format_name(source.type)
    if kept is None and source.type not in BY_NAME:
        raise UnsupportedError(
            f"GGUF has no type for a {source.type} vector", path=source.path, tensor=source.name
        )
    if source.type == "I8" and len(source.shape) == 1:
        raise UnsupportedError(
            "a vector of type I8 would be taken for a tiled matrix; leave it out",
            path=source.path, tensor=source.name,
        )  # fmt: skip
    return Entry(source.name, source.type, source.shape, source.n_bytes, kept)
