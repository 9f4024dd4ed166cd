"""Tensors in attributes of nodes, and in graphs that are attributes: branches, loops, functions.

Sessions of onnxruntime are made of bytes, and would look for their files in the process's working
directory, so data that is beside the model is brought into it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx

from headrace.errors import ModelFileError
from headrace.loaders.model_file import TensorInfo
from headrace.loaders.reader import TensorReader

MOST_BYTES = 1 << 30  # of all of them: what is parsed stays in memory


def inner_tensors(proto: Any) -> Iterator[Any]:
    """Every TensorProto of a ModelProto but the initialisers of its main graph."""
    yield from _of_sparse(proto.graph.sparse_initializer)
    yield from _of_nodes(proto.graph.node)
    for function in proto.functions:
        yield from _of_nodes(function.node)


def _of_nodes(nodes: Any) -> Iterator[Any]:
    for node in nodes:
        for one in node.attribute:
            if one.HasField("t"):
                yield one.t
            yield from one.tensors
            if one.HasField("sparse_tensor"):
                yield from _of_sparse([one.sparse_tensor])
            yield from _of_sparse(one.sparse_tensors)
            for graph in (*([one.g] if one.HasField("g") else []), *one.graphs):
                yield from graph.initializer
                yield from _of_sparse(graph.sparse_initializer)
                yield from _of_nodes(graph.node)


def _of_sparse(tensors: Any) -> Iterator[Any]:
    for one in tensors:
        yield one.values
        yield one.indices


def bring_in(path: Path | None, proto: Any, place_of: Callable[[Any], TensorInfo]) -> None:
    """Give all of them their data where that is in other files.

    Args:
        path: of the model, for messages.
        proto: ModelProto, which is changed.
        place_of: where the data of a tensor is, checked.

    Raises:
        ModelFileError: it cannot be read, or is more than `MOST_BYTES`.
    """
    beside = [t for t in inner_tensors(proto) if t.data_location == onnx.TensorProto.EXTERNAL]
    places = [place_of(tensor) for tensor in beside]
    n_bytes = sum(place.n_bytes for place in places)
    if n_bytes > MOST_BYTES:
        raise ModelFileError(
            f"weights inside its branches, loops and attributes have {n_bytes} bytes in other "
            f"files, and {MOST_BYTES} are read; export them as initialisers of the main graph",
            path=path,
        )
    reader = TensorReader()
    try:
        for tensor, place in zip(beside, places, strict=True):
            raw = bytearray(place.n_bytes)
            reader.readinto(place, 0, raw)
            tensor.ClearField("external_data")
            tensor.ClearField("data_location")
            tensor.raw_data = bytes(raw)
    finally:
        reader.close()
