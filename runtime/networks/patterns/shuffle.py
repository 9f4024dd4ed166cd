"""Channels of images in another order, as reshapes and a transposition of their groups.

Networks whose convolutions are of groups mix them so (ShuffleNet, 1707.01083).
"""

from __future__ import annotations

import math

import numpy as np

from headrace.networks.graph import Node
from headrace.networks.patterns.match import Matcher, new_node


def found(matcher: Matcher, node: Node) -> list[Node] | None:
    """Gather of the channels, in place of the last reshape."""
    if node.op != "Reshape" or node.domain:
        return None
    turn = matcher.maker(node.inputs[0], "Transpose")
    before = None if turn is None else matcher.maker(turn.inputs[0], "Reshape")
    if turn is None or before is None:
        return None
    x, y = before.inputs[0], node.outputs[0]
    shape, between = matcher.shape(x), matcher.shape(turn.inputs[0])
    perm = turn.attribute("perm")
    if shape is None or between is None or perm is None or matcher.shape(y) != shape:
        return None
    if len(shape) != 4 or x in matcher.graph.constants:
        return None
    pixels = next((n for n in (1, 2) if math.prod(between[-n:]) == shape[2] * shape[3]), 0)
    groups = len(between) - pixels
    if pixels == 0 or list(perm[groups:]) != list(range(groups, len(between))):
        return None
    images, channels = shape[:2]
    places = np.arange(images * channels).reshape(between[:groups]).transpose(perm[:groups])
    places = places.reshape(images, channels)
    if (places != places[0] + channels * np.arange(images)[:, None]).any():
        return None  # they come from other images
    if (np.diff(places[0]) == 1).all():
        return None  # nothing moves
    table = matcher.new_constant(places[0].astype(np.int32))
    return [new_node("Gather", [x, table], y, axis=1)]
