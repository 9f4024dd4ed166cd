"""Shapes and constants of a graph for inputs of certain shapes.

Exported models compute shapes with operators: where inputs have known shapes, these have known
values, and go. Of an `If` whose condition is known, the branch that is taken stays. What is
computed from weights alone is computed when somebody wants it. Weights that DequantizeLinear makes
stay as they are: kernels want them as the file has them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import numpy as np

from headrace.loaders.onnx_model import subgraphs, tensor_bytes
from headrace.networks.branches import taken_branch
from headrace.networks.fatal import check_values, completed
from headrace.networks.graph import SMALL_BYTES, Graph, Node, TensorType
from headrace.networks.microsoft_types import microsoft_types
from headrace.networks.quantisation import named
from headrace.networks.window_types import inferable, resized
from headrace.networks.without_moves import reading, without_moves

# What gives something else each time, or is asked for its effect; and weights as they are.
NOT_CONSTANT = {
    "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli",
    "Multinomial", "Dropout", "DequantizeLinear",
}  # fmt: skip
_KEPT = ("QuantizeLinear", "Identity")
# Of older operator sets onnx forgets dilations, or counts windows that begin behind the image, or
# overlooks axes below 0, which onnxruntime takes.
_SINCE = {"MaxPool": 22, "AveragePool": 22, "LpPool": 22, "Squeeze": 11, "Unsqueeze": 11}
_LIKE_FIRST = ("GroupNormalization",)  # what they make; onnx says nothing of its shape
_MOVES = ("Transpose", "Reshape")  # of codes, which TFLite files have in another order
FLOAT, BYTES, BOOL = 1, (2, 3), 9  # of TensorProto
MOST_DERIVED, LARGE_BYTES = 16, 64 << 20  # times a model's bytes, and beside these


def specialise(
    graph: Graph, inputs: Mapping[str, TensorType], decided: Iterable[tuple[str, bool]] = ()
) -> Graph:
    """The graph that is left for inputs of these types: shapes known as far as they can be.

    Args:
        decided: values of the graph that are conditions, and what they are.

    Raises:
        UnsupportedError: onnxruntime would end the process over a node.
    """
    found = Graph(
        [], graph.constants.without(), graph.inputs, graph.outputs, graph.opsets,
        graph.ir_version, dict(inputs), graph.sparse, target=graph.target,
        no_tensors=graph.no_tensors,
    )  # fmt: skip
    conditions = {name: _condition(name, value) for name, value in decided}
    found.constants.computed.update(conditions)
    waiting = list(reversed(graph.nodes))
    names, renamed = _names_for_names(graph), dict[str, str]()
    while waiting:
        node = completed(found, reading(waiting.pop(), renamed))
        if conditions.keys() >= set(node.outputs):
            continue
        branch = taken_branch(found, node)
        if branch is not None:
            waiting.extend(reversed(branch))
            continue
        check_values(found, node)
        if node.outputs and node.outputs[0] in names and node.inputs[0] in found.constants:
            renamed[node.outputs[0]] = node.inputs[0]  # a weight that several nodes share
            continue
        if _is_constant(found, node):
            values = _computed(found, node)
            if values is not None:
                found.constants.computed.update(values)
                found.types.update({name: found.constants.type(name) for name in values})
                continue
        if _is_large_constant(node):
            name, held = node.outputs[0], node.attribute("value")
            found.types[name] = TensorType(held.data_type, tuple(held.dims))
            found.constants.derive(name, found.types[name], (), partial(_array, held))
            continue
        types = _types(found, node)
        found.types.update(types)
        if _is_derived(found, node, types):
            for name, of in types.items():
                found.constants.derive(name, of, node.reads, _later(found, node, name))
            continue
        found.nodes.append(node)
    return without_moves(found.of(found.nodes))


def _names_for_names(graph: Graph) -> set[str]:
    """What Identity gives that nobody wants by this name."""
    fixed = {name for node in graph.nodes for name in node.captured}.union(graph.outputs)
    names = (n for n in graph.nodes if n.op == "Identity" and not n.domain and n.inputs)
    return {n.outputs[0] for n in names if n.outputs} - fixed


def _condition(name: str, value: bool) -> Any:
    import onnx

    return onnx.numpy_helper.from_array(np.array(value), name)


def _is_constant(graph: Graph, node: Node) -> bool:
    if node.op in NOT_CONSTANT or any(True for _ in subgraphs(node.proto)):
        return False
    if any(name in graph.sparse for name in node.reads):
        return False
    if node.op in ("Shape", "Size") and not node.domain:
        x = named(node.inputs, 0)
        return graph.shape(x) is not None or x in graph.constants
    return all(name in graph.constants and graph.constants.is_small(name) for name in node.reads)


def _is_large_constant(node: Node) -> bool:
    """Whether it is a weight that stands in the graph instead of among the initialisers."""
    held = _value(node)
    return held is not None and held.data_type == FLOAT and not held.external_data


def _array(tensor: Any) -> np.ndarray:
    import onnx

    found: np.ndarray = onnx.numpy_helper.to_array(tensor)
    return found


def _is_derived(graph: Graph, node: Node, types: Mapping[str, TensorType]) -> bool:
    if node.op in NOT_CONSTANT or node.op in _KEPT or not node.reads:
        return False
    if any(True for _ in subgraphs(node.proto)) or any(n in graph.sparse for n in node.reads):
        return False
    kinds = (FLOAT, *BYTES) if node.op in _MOVES else (FLOAT, BOOL)  # masks are made of those
    known = all(
        name in types and types[name].elem_type in kinds and types[name].shape is not None
        for name in node.outputs
    )
    if not known or not all(name in graph.constants for name in node.reads):
        return False
    # More than files hold is made while the network runs, where memory is counted.
    most = MOST_DERIVED * graph.constants.file_bytes + LARGE_BYTES
    sizes = (tensor_bytes(types[name].elem_type, types[name].shape or ()) for name in node.outputs)
    return sum(sizes) <= most


def _later(graph: Graph, node: Node, name: str) -> Callable[[], np.ndarray]:
    def compute() -> np.ndarray:
        from headrace.networks.host import HostRegion

        found: np.ndarray = HostRegion(graph, [node], [name], 1).run({})[name]
        return found

    return compute


def _computed(graph: Graph, node: Node) -> dict[str, Any] | None:
    """Outputs of a node whose inputs are known; None: they are large, or no tensors."""
    import onnx

    if node.op in ("Shape", "Size") and not node.domain:
        source = node.inputs[0]
        shape = graph.shape(source)
        if shape is None:
            shape = graph.constants.type(source).shape or ()
        value = np.array(_of_shape(node, shape), np.int64)
        return {node.outputs[0]: onnx.numpy_helper.from_array(value, node.outputs[0])}
    if (held := _held(node)) is not None:
        return {node.outputs[0]: held}
    if any(not _is_little(of) for of in _types(graph, node).values()):
        return None
    from headrace.networks.host import HostRegion

    outputs = [name for name in node.outputs if name]
    try:
        values = HostRegion(graph, [node], outputs, 1, budget=LARGE_BYTES).run({})
        tensors = {
            name: onnx.numpy_helper.from_array(np.asarray(value), name)
            for name, value in values.items()
            if isinstance(value, np.ndarray)
        }
    except Exception:  # it will be said when the node runs, if it ever does
        return None
    little = all(t.ByteSize() <= 2 * SMALL_BYTES for t in tensors.values())
    return tensors if little and len(tensors) == len(outputs) else None


def _held(node: Node) -> Any:
    """A small tensor that stands in a node: no session is made for it."""
    held = _value(node) if len(node.outputs) == 1 else None
    if held is None or held.external_data or held.ByteSize() > SMALL_BYTES:
        return None
    found = type(held)()
    found.CopyFrom(held)
    found.name = node.outputs[0]
    return found


def _value(node: Node) -> Any:
    """The tensor of a Constant; None: it is none, or has something else."""
    import onnx

    held = node.attribute("value") if node.op == "Constant" and not node.domain else None
    return held if isinstance(held, onnx.TensorProto) else None


def _of_shape(node: Node, shape: tuple[int, ...]) -> tuple[int, ...] | int:
    if node.op == "Size":
        return math.prod(shape)
    start, end = node.attribute("start", 0), node.attribute("end")
    return shape[slice(start, end)]


def _is_little(of: TensorType) -> bool:
    return of.shape is None or math.prod(of.shape) * 8 <= SMALL_BYTES


def _types(graph: Graph, node: Node) -> dict[str, TensorType]:
    """Types of a node's outputs, as far as they can be told from those of its inputs."""
    import onnx

    if node.domain == "com.microsoft":
        known = {name: of for name in node.reads if (of := graph.type(name)) is not None}
        return microsoft_types(node, known)
    if node.op in _LIKE_FIRST and not node.domain and len(node.outputs) == 1:
        of = graph.type(named(node.inputs, 0))
        return {} if of is None else {node.outputs[0]: of}
    version, proto = graph.opsets.get(node.domain), inferable(graph, node)
    if version is None or proto is None:
        return {}
    if not node.domain:
        version = max(version, _SINCE.get(node.op, 0))
    input_types, input_data = {}, {}
    for name in node.reads:
        of = graph.type(name)
        if of is None:
            if name in node.inputs:
                return {}
            continue
        input_types[name] = onnx.helper.make_tensor_type_proto(of.elem_type, of.shape)
        if name in graph.constants and graph.constants.is_small(name):
            input_data[name] = graph.constants.tensor(name)
    try:
        schema = onnx.defs.get_schema(node.op, version, node.domain)
        found = onnx.shape_inference.infer_node_outputs(
            schema, proto, input_types, input_data,
            opset_imports=[onnx.helper.make_opsetid(d, v) for d, v in graph.opsets.items()],
            ir_version=graph.ir_version,
        )  # fmt: skip
    except Exception:  # an operator that the library does not know, or that it cannot tell of
        return {}
    types = {}
    for name, proto in found.items():
        if name and proto.HasField("tensor_type") and proto.tensor_type.elem_type:
            types[name] = TensorType(proto.tensor_type.elem_type, _shape(proto.tensor_type))
    if node.op in ("Resize", "Upsample"):
        types = {name: resized(graph, node, of) for name, of in types.items()}
    return types


def _shape(tensor: Any) -> tuple[int, ...] | None:
    if not tensor.HasField("shape"):
        return None
    shape = tuple(d.dim_value if d.HasField("dim_value") else -1 for d in tensor.shape.dim)
    return None if any(d < 0 for d in shape) else shape
