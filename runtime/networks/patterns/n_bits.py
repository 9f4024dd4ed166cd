"""MatMulNBits of 2 and 8 bits as products of weights of 4 bits, which say the same.

Codes of 2 bits are codes of 4 bits. Codes of 8 bits are 16 times their high half plus their low
one, and so are their zero points: two products, of which one has 16 times the scales.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from headrace.networks.graph import Node, TensorType
from headrace.networks.operation import BYTES
from headrace.networks.patterns.match import Matcher, new_node
from headrace.networks.quantisation import named

UINT8, FLOAT = BYTES[0], 1
MOST_SCALE = 1e37  # 16 times as much is still a number


def found(matcher: Matcher, node: Node) -> list[Node] | None:
    """Products of 4 bits in place of one of 2 or 8."""
    bits = node.attribute("bits", 4)
    if (node.domain, node.op) != ("com.microsoft", "MatMulNBits") or bits not in (2, 8):
        return None
    scales, order = named(node.inputs, 2), named(node.inputs, 4)
    if order or node.attribute("weight_prepacked", 0) or not _holds(matcher, node, bits):
        return None
    if bits == 2:
        return [_product(matcher, node, "codes", node.outputs[0], scales, lambda codes: codes)]
    if not np.abs(matcher.graph.constants.array(scales)).max() < MOST_SCALE:
        return None
    shape = matcher.shape(node.outputs[0])
    if shape is None:
        return None
    low, high = (matcher.new_value(node.outputs[0], role, shape) for role in ("low", "high"))
    times = f"{node.outputs[0]}/headrace/scales"
    constants = matcher.graph.constants
    constants.derive(
        times, constants.type(scales), [scales], lambda: constants.array(scales) * np.float32(16)
    )
    return [
        _product(matcher, node, "high", high, times, lambda codes: codes >> 4, biased=False),
        _product(matcher, node, "low", low, scales, lambda codes: codes & 15),
        new_node("Add", [high, low], node.outputs[0]),
    ]


def _holds(matcher: Matcher, node: Node, bits: int) -> bool:
    """Whether weights are constants of the sizes that they should have."""
    constants, groups = matcher.graph.constants, node.attribute("K") // node.attribute("block_size")
    rows = node.attribute("N")
    wanted = {
        1: (UINT8, rows * node.attribute("K") * bits // 8), 2: (FLOAT, rows * groups),
        3: (UINT8, rows * -(-groups * bits // 8)),
    }  # fmt: skip
    for i, (kind, count) in wanted.items():
        name = named(node.inputs, i)
        if i == 3 and not name:
            continue
        if name not in constants or constants.type(name).elem_type != kind:
            return False
        if int(np.prod(constants.type(name).shape or ())) != count:
            return False
    return bool(node.attribute("K") % node.attribute("block_size") == 0)


def _product(
    matcher: Matcher, node: Node, role: str, y: str, scales: str,
    part: Callable[[np.ndarray], np.ndarray], *, biased: bool = True,
) -> Node:  # fmt: skip
    """A product of 4 bits of a part of the codes and zero points."""
    constants, bits = matcher.graph.constants, node.attribute("bits")
    rows, inputs = node.attribute("N"), node.attribute("K")
    groups = inputs // node.attribute("block_size")
    codes, zeros = node.inputs[1], named(node.inputs, 3)

    def packed(name: str, count: int) -> np.ndarray:
        found = part(_codes(constants.array(name).reshape(rows, -1), bits)[:, :count])
        found = np.pad(found, ((0, 0), (0, found.shape[1] % 2)))
        both: np.ndarray = found[:, 0::2] | found[:, 1::2] << 4
        return both

    def zero_points() -> np.ndarray:
        if zeros:
            return packed(zeros, groups).reshape(-1)
        middle = int(part(np.array(1 << (bits - 1), np.uint8)))
        return np.full(rows * -(-groups // 2), middle | middle << 4, np.uint8)

    made = [f"{node.outputs[0]}/headrace/{role} {what}" for what in ("weights", "zeros")]
    shape = rows, groups, inputs // groups // 2
    constants.derive(
        made[0], TensorType(UINT8, shape), [codes], lambda: packed(codes, inputs).reshape(shape)
    )
    of_zeros = TensorType(UINT8, (rows * -(-groups // 2),))
    # Codes among the sources: those without zero points have them of others' sizes.
    constants.derive(made[1], of_zeros, [zeros or codes], zero_points)
    bias = named(node.inputs, 5) if biased else ""
    given = [node.inputs[0], made[0], scales, made[1], *(["", bias] if bias else [])]
    return new_node(
        "MatMulNBits", given, y, "com.microsoft", K=inputs, N=rows, bits=4,
        block_size=node.attribute("block_size"), accuracy_level=node.attribute("accuracy_level", 0),
    )  # fmt: skip


def _codes(packed: np.ndarray, bits: int) -> np.ndarray:
    """Codes of each row's bytes, those of the lowest bits first."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    found: np.ndarray = (packed[..., None] >> shifts & ((1 << bits) - 1)).reshape(len(packed), -1)
    return found.astype(np.uint8)
