"""What a network learned, as an ONNX file: the one that it came from, with other weights.

Layers are not always what a file has: batch norms and constants behind a convolution are in its
weights here. So a layer's weights are written where one initialiser of the layer's own node has
just the numbers that the layer began with; anything else is refused.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from headrace.atomic_file import check_replaceable, whole_file
from headrace.errors import HeadraceError, UnsupportedError
from headrace.loaders.onnx_model import subgraphs
from headrace.micro.learning import BIAS, WEIGHTS, Trained, short_names, with_weights
from headrace.micro.network import Convolution, Depthwise, MicroNetwork
from headrace.micro.reading import read_network

SUFFIX = ".onnx"
_PRODUCTS = ("Conv", "Gemm", "MatMul")


def check_onnx(source: Path, trained: Mapping[str, Trained], path: Path) -> None:
    """That `write_onnx` can write what is trained.

    Raises:
        HeadraceError: the file would replace the one that it is made of.
        OSError: it cannot be written.
        UnsupportedError: weights of a layer are not those of the file.
    """
    if source.suffix.lower() != SUFFIX:
        raise UnsupportedError(
            "of ONNX files only is a whole one written: name a folder", path=source
        )
    if not path.parent.is_dir():
        raise HeadraceError(f"{path.parent} is not a directory; make it first")
    check_replaceable(path)
    if path.exists() and path.samefile(source):
        raise HeadraceError(f"{path} is what is trained: name another file")
    _Source(source).places(trained)


def write_onnx(
    source: Path, network: MicroNetwork, trained: Mapping[str, Trained], path: Path
) -> None:
    """Write an ONNX file with what a network learned.

    Args:
        source: that the network was read from.
        network: with what it learned.
        trained: what is written, by the name of its layer.

    Raises:
        HeadraceError, OSError, UnsupportedError: as of `check_onnx`.
    """
    check_onnx(source, trained, path)
    file = _Source(source)
    layers = {layer.name: layer for layer in with_weights(network)}
    for (name, what), tensor in file.places(trained).items():
        array = _in_file(layers[name], what, tensor, file.nodes[name])
        tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    with whole_file(path) as out:
        out.write(file.proto.SerializeToString(deterministic=True))


class _Source:
    """An ONNX file, and the nodes of it that layers are, by the layers' names."""

    def __init__(self, path: Path) -> None:
        # Read first, which looks at what the file says before it is believed.
        self.layers = {one.name: one for one in with_weights(read_network(path))}
        self.path, self.proto = path, onnx.load(path)
        self.short = short_names([*self.layers.values()])
        self.tensors = {one.name: one for one in self.proto.graph.initializer}
        self.uses = Counter(_names_read(self.proto.graph))
        self.nodes: dict[str, Any] = {}
        for node in self.proto.graph.node:
            label = f"{node.op_type} {node.name or ', '.join(filter(None, node.output))}"
            if node.op_type in _PRODUCTS and label in self.layers:
                self.nodes.setdefault(label, node)

    def places(self, trained: Mapping[str, Trained]) -> dict[tuple[str, str], Any]:
        """Initialisers of what is trained: a layer's weights, or its bias.

        Raises:
            UnsupportedError: there is none.
        """
        found = {}
        for name, is_trained in trained.items():
            for what in (WEIGHTS, BIAS):
                if getattr(is_trained, what):
                    found[name, what] = self._place(name, what)
        return found

    def _place(self, name: str, what: str) -> Any:
        layer, node = self.layers[name], self.nodes.get(name)
        tensor = None if node is None else self.tensors.get(self._operand(node, what))
        if tensor is None:
            raise self._refused(name, what, "not in one constant of the layer's node")
        if self.uses[tensor.name] != 1:
            raise self._refused(name, what, f"{tensor.name!r}, which others read, too")
        known = onnx.numpy_helper.to_array(tensor)
        array = _in_file(layer, what, tensor, node)
        if known.dtype != np.float32 or not np.array_equal(known, array):
            raise self._refused(
                name, what,
                f"more than {tensor.name!r}: another node's constants, such as a batch norm's, "
                "went into them",
            )  # fmt: skip
        return tensor

    def _operand(self, node: Any, what: str) -> str:
        if what == WEIGHTS:
            return str(node.input[1])
        if len(node.input) > 2:
            return str(node.input[2])
        users = [one for one in self.proto.graph.node if node.output[0] in one.input]
        if len(users) != 1 or users[0].op_type != "Add" or self.uses[node.output[0]] != 1:
            return ""
        return next((str(one) for one in users[0].input if one != node.output[0]), "")

    def _refused(self, name: str, what: str, why: str) -> UnsupportedError:
        return UnsupportedError(
            f"{self.short[name]}: its {what} {'is' if what == BIAS else 'are'} {why}. No whole "
            "file is written of that: name a folder, or train other layers",
            path=self.path,
        )


def _names_read(graph: Any) -> Iterator[str]:
    """All that nodes and outputs of a graph and of those in it read."""
    yield from (one.name for one in graph.output)
    for node in graph.node:
        yield from node.input
        for inner in subgraphs(node):
            yield from _names_read(inner)


def _in_file(layer: Convolution | Depthwise, what: str, tensor: Any, node: Any) -> np.ndarray:
    """Weights or a bias as the file has them; of another shape, where they do not fit."""
    array: np.ndarray = getattr(layer, what).astype(np.float32)
    if what == WEIGHTS and isinstance(layer, Depthwise):
        array = array.transpose(2, 0, 1)
    elif what == WEIGHTS:
        array = array.transpose(0, 3, 1, 2)
        is_turned = any(one.name == "transB" and one.i for one in node.attribute)
        if node.op_type != "Conv":
            array = array.reshape(len(array), -1)
            array = array if is_turned else array.T
    shape = tuple(tensor.dims)
    return np.ascontiguousarray(array.reshape(shape) if array.size == np.prod(shape) else array)
