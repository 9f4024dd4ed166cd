"""Values [images, channels, pixels] that lie as images do: what models do to all pixels at once.

A value of three dimensions lies as rows of its last one (`operation.image_of`), as encoders have
them. Heads of detectors put the pixels of an image, or of several, into one dimension: there it
lies as the image did, so that nothing moves. All that such values are made of, and made into, by
kernels of ours lies so, too.
"""

from __future__ import annotations

from headrace.networks.graph import Graph, Node
from headrace.networks.greatest import keep_those

_OF_ONE = (
    "Conv", "Gelu", "Sigmoid", "HardSigmoid", "HardSwish", "LeakyRelu", "Relu", "Clip",
    "headrace.Silu", "headrace.HardSwish", "headrace.SoftmaxMean", "Split", "Slice", "Pad",
    "Pow", "Sqrt", "Tanh", "Abs", "InstanceNormalization", "GroupNormalization",
)  # fmt: skip
_OF_SEVERAL = ("Add", "Sub", "Mul", "Div", "Max", "Min", "Concat")
_MOVES = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten")
FLOAT = 1  # of TensorProto


def channels_first(graph: Graph) -> frozenset[str]:
    """Names of these values; of none whose users take rows."""
    from headrace.networks.operators import OPERATORS, key_of
    from headrace.networks.operators.mean import averages_pixels

    found = {name for name, of in graph.types.items() if of.elem_type == FLOAT and _rank(of) == 3}
    makers = {name: node for node in graph.nodes for name in node.outputs if name in found}
    users = graph.users()

    def made_so(name: str) -> bool:
        node = makers.get(name)
        if node is None or key_of(node) not in OPERATORS or key_of(node) == "Transpose":
            return any(
                key_of(one) == "Conv" or _makes_image(graph, one) for one in users.get(name, [])
            )
        if key_of(node) == "headrace.Frames":
            return True
        if _keeps_channels(graph, node):
            return True
        if key_of(node) in ("Reshape", "Squeeze"):
            return _flattens(graph, node) or node.inputs[0] in found
        read = node.inputs[:1] if key_of(node) in _OF_ONE else node.inputs
        return takes_so(node) and all(n in found for n in read if n not in graph.constants)

    def takes_so(node: Node) -> bool:
        return key_of(node) in (*_OF_ONE, *_OF_SEVERAL) and found.issuperset(node.outputs)

    def used_so(name: str) -> bool:
        return all(
            takes_so(node)
            or key_of(node) in ("Reshape", "Transpose")
            or _keeps_channels(graph, node)
            or averages_pixels(graph, node)
            or key_of(node) not in OPERATORS
            for node in users.get(name, [])
        )

    keep_those(found, lambda name: made_so(name) and used_so(name), makers, users)
    return frozenset(found)


def _rank(of: object) -> int:
    return len(getattr(of, "shape", None) or ())


def _keeps_channels(graph: Graph, node: Node) -> bool:
    """Whether it gives or takes the dimension of a single pixel away, behind channels."""
    if node.domain or node.op not in _MOVES:
        return False
    before, after = graph.shape(node.inputs[0]) or (), graph.shape(node.outputs[0]) or ()
    short, long = sorted((before, after), key=len)
    return len(short) == 2 and len(long) == 3 and long == (*short, 1)


def _makes_image(graph: Graph, node: Node) -> bool:
    """Whether it makes rows and columns of pixels that lie in one dimension."""
    before, after = graph.shape(node.inputs[0]) or (), graph.shape(node.outputs[0]) or ()
    reshapes = node.op == "Reshape" and not node.domain
    return reshapes and len(before) == 3 and len(after) == 4 and before[:2] == after[:2]


def _flattens(graph: Graph, node: Node) -> bool:
    """Whether it puts rows and columns of an image into one dimension."""
    before, after = graph.shape(node.inputs[0]) or (), graph.shape(node.outputs[0]) or ()
    return len(before) == 4 and len(after) == 3 and before[:2] == after[:2]
