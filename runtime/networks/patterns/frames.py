"""Conv of one channel, as of samples of sound: windows of a row, which may overlap."""

from __future__ import annotations

from headrace.networks.graph import Node
from headrace.networks.patterns.match import Matcher, new_node

# What makes rows; a convolution before it would make pixels.
_MAKERS = ("Reshape", "Unsqueeze", "Pad")


def found(matcher: Matcher, node: Node) -> list[Node] | None:
    """headrace.Frames: inputs are those of the Conv, one row without pads."""
    if node.domain or node.op != "Conv":
        return None
    x, w, *_ = node.inputs
    shape, taps = matcher.shape(x), matcher.shape(w)
    if shape is None or taps is None or len(shape) != 3 or len(taps) != 3 or shape[:2] != (1, 1):
        return None
    if x in matcher.makers and matcher.maker(x, *_MAKERS) is None:
        return None
    if node.attribute("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID"):
        return None
    if any(node.attribute("pads", [0, 0])) or node.attribute("dilations", [1]) != [1]:
        return None
    if taps[1] != 1 or node.attribute("group", 1) != 1:
        return None
    strides = node.attribute("strides", [1])
    return [new_node("Frames", node.inputs, node.outputs[0], "headrace", strides=strides)]
