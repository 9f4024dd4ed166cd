"""What onnx's reference implementation would compute otherwise than nodes say."""

from __future__ import annotations

from headrace.errors import UnsupportedError
from headrace.loaders.onnx_model import subgraphs, type_name
from headrace.networks.graph import Graph, Node
from headrace.networks.quantisation import named

# Activations that the reference has, whatever a layer says.
_RECURRENT = {
    "RNN": [b"tanh"], "GRU": [b"sigmoid", b"tanh"], "LSTM": [b"sigmoid", b"tanh", b"tanh"],
}  # fmt: skip


def check_reference(graph: Graph, node: Node, why: str) -> None:
    """Look at a node that onnxruntime does not run.

    Args:
        why: what that says.

    Raises:
        UnsupportedError: nor does the reference compute it as it should.
    """
    _check_form(graph, node, why)
    _check_types(graph, node)
    _check_recurrent(graph, node, why)


def _check_form(graph: Graph, node: Node, why: str) -> None:
    """Raises UnsupportedError: its inputs or attributes are not as the operator's are."""
    import onnx

    if any(True for _ in subgraphs(node.proto)):
        return  # which read values that the checker does not know
    context = onnx.checker.C.CheckerContext()
    context.ir_version = graph.ir_version
    context.opset_imports = {"": 1, **graph.opsets}
    try:
        onnx.checker.check_node(node.proto, context)
    except Exception as error:  # of any kind: it is a native library's
        reason = str(error).strip().partition("\n")[0]
        raise UnsupportedError(
            f"nothing here runs {node.label}: onnxruntime says {why}, and onnx itself {reason}"
        ) from None


def _check_types(graph: Graph, node: Node) -> None:
    """Raises UnsupportedError: inputs of one type have several; numpy would make one of them."""
    import onnx

    try:
        schema = onnx.defs.get_schema(node.op, graph.opsets.get(node.domain, 1), node.domain)
    except onnx.defs.SchemaError:
        return
    found: dict[str, tuple[str, int]] = {}
    for i, name in enumerate(node.inputs[: len(schema.inputs)]):
        of = graph.types.get(name)
        if name in graph.constants:
            of = graph.constants.type(name)
        if of is None:
            continue
        first, elem_type = found.setdefault(schema.inputs[i].type_str, (name, of.elem_type))
        if elem_type != of.elem_type:
            raise UnsupportedError(
                f"{node.label} reads {first} of {type_name(elem_type)} and {name} of "
                f"{type_name(of.elem_type)}, which have to be of one type: export it again"
            )


def _check_recurrent(graph: Graph, node: Node, why: str) -> None:
    """Raises UnsupportedError: the reference leaves out something that a layer has."""
    usual = _RECURRENT.get(node.op) if not node.domain else None
    if usual is None:
        return
    shape = graph.shape(named(node.inputs, 0)) or ()
    if len(shape) == 3 and shape[1 if node.attribute("layout", 0) else 0] == 0:
        raise UnsupportedError(f"nothing here runs {node.label}: its input has no steps")
    names = [name.lower() for name in node.attribute("activations", [])]
    odd = {
        "activations": any(one != usual[i % len(usual)] for i, one in enumerate(names)),
        "hidden_size": node.attribute("hidden_size", 1) < 1,
        "clip": node.attribute("clip") is not None,
        "input_forget": bool(node.attribute("input_forget", 0)),
        "sequence_lens": bool(named(node.inputs, 4)),
    }
    if any(odd.values()):
        what = ", ".join(name for name, given in odd.items() if given)
        raise UnsupportedError(
            f"nothing here runs {node.label}: onnxruntime says {why}, and the "
            f"reference of onnx leaves {what} out"
        )
