"""SoftmaxMean: the mean of values that are as likely as a softmax says, for groups of channels.

Detectors predict so where the sides of a box are: 16 bins for each, of which a convolution with the
bins' numbers makes a distance (generalised focal loss, Li et al. 2020, arXiv:2006.04388).
"""

from __future__ import annotations

from headrace.networks.graph import Node
from headrace.networks.operators.softmax import axis_of
from headrace.networks.patterns.match import Matcher, new_node


def found(matcher: Matcher, node: Node) -> list[Node] | None:
    """headrace.SoftmaxMean in place of Reshape, Transpose, Softmax, Conv and this Reshape."""
    mean = matcher.maker(node.inputs[0], "Conv") if node.op == "Reshape" else None
    likely = None if mean is None else matcher.maker(mean.inputs[0], "Softmax")
    turned = None if likely is None else matcher.maker(likely.inputs[0], "Transpose")
    groups = None if turned is None else matcher.maker(turned.inputs[0], "Reshape")
    if mean is None or likely is None or turned is None or groups is None:
        return None
    x, (weights, *bias) = groups.inputs[0], mean.inputs[1:]
    split, made = matcher.shape(groups.outputs[0]), matcher.shape(node.outputs[0])
    if split is None or made is None or len(split) != 4 or any(bias):
        return None
    images, count, bins, pixels = split
    right = (
        made == (images, count, pixels)
        and matcher.shape(x) == (images, count * bins, pixels)
        and matcher.shape(mean.outputs[0]) == (images, 1, count, pixels)
        and weights in matcher.graph.constants
        and matcher.shape(weights) == (1, bins, 1, 1)
        and turned.attribute("perm") == [0, 2, 1, 3]
        and axis_of(matcher.graph, likely, (images, bins, count, pixels)) == 1
    )
    if not right:
        return None
    return [new_node("SoftmaxMean", [x, weights], node.outputs[0], "headrace", groups=count)]


# For the table in docs/onnx.md: which of them.
WHICH = {
    "Reshape, Transpose, Softmax, Conv, Reshape": (
        "the mean under a softmax of 16 bins (or a multiple) of each channel, as detectors "
        "have distances"
    ),
}
