"""What comes right behind a convolution or a sum becomes its last step: see `Ending`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace

import numpy as np

from headrace.kernels import sparse_product_u8
from headrace.kernels.finishes import Finish
from headrace.kernels.sparse_product import ROWS, kernel_of
from headrace.networks.operation import JOINED, NOTHING, Operation, Weight

_CONVOLUTIONS = ("convolution_f32", "depthwise_f32")
_SCALING = "images_scale"  # whose factors are those of each image
_ENDING = (*_CONVOLUTIONS, "images_map", _SCALING)  # kernels that end with an activation
# Kernels that can add something to what they make.
_ADDING = (*_CONVOLUTIONS, _SCALING, *(kernel_of(rows) for rows in ROWS), sparse_product_u8.NAME)
_BOUNDING = (*_ADDING, "images_map", "images_add", "images_combine")


def into_convolutions(operations: Sequence[Operation], wanted: Collection[str]) -> list[Operation]:
    """The operations, fewer of them; values of `wanted` are made whatever happens.

    Sums and bounds are formed in the same order, of the same values: nothing is rounded otherwise,
    but where factors of channels go into weights.
    """
    users = Counter(name for one in operations for name in one.inputs)
    found: list[Operation] = []
    maker: dict[str, int] = {}  # index in `found` of what makes a value

    def only_user(name: str) -> Operation | None:
        alone = users[name] == 1 and name not in wanted
        return found[maker[name]] if alone and name in maker else None

    for one in operations:
        before = _absorbed(one, only_user, maker)
        if before is None:
            found.append(one)
            maker[one.makes] = len(found) - 1
            continue
        # It is made where the later one was, as what is added is there only then.
        index = maker.pop(before.makes)
        del found[index]
        maker = {name: i - (i > index) for name, i in maker.items()}
        found.append(before)
        before.makes = one.makes
        before.nodes = [*before.nodes, *one.nodes]
        maker[one.makes] = len(found) - 1
    return found


def _absorbed(
    one: Operation, only_user: Callable[[str], Operation | None], maker: dict[str, int]
) -> Operation | None:
    """What makes an operation's input, with the operation added to it; None: it cannot be."""
    if one.kernel == "images_map":
        before = only_user(one.reads[0])
        if before is None:
            return None
        if before.source is None:
            return before if _takes(before, one.finish, one.affine) else None
        maker_of, there = before.source
        affine = None if one.affine is None else (there(one.affine[0]), there(one.affine[1]))
        return before if _takes(maker_of, one.finish, affine) else None
    if one.kernel != "images_add":
        return None
    if len(one.reads) == 1:
        before = only_user(one.reads[0])
        if before is not None and before.kernel == JOINED and not one.clamps:
            return before  # under another name
        if before is None or before.kernel not in _BOUNDING:
            return None
        if one.clamps and before.clamps and not one.least <= before.least <= one.most:
            return None
        least, most = max(before.least, one.least), min(before.most, one.most)
        if least > most:
            return None
        before.least, before.most = least, most
        return before
    for i, name in enumerate(one.reads):
        before = only_user(name)
        if before is None or before.kernel not in _ADDING or before.adds is not None:
            continue
        if not before.clamps and not before.spreads and one.reads[1 - i] != name:
            before.adds = one.reads[1 - i]
            before.late = before.finish != NOTHING
            before.least, before.most = one.least, one.most
            return before
    return None


def _takes(before: Operation, finish: Finish, affine: tuple[np.ndarray, np.ndarray] | None) -> bool:
    """Let an operation end with factors or an activation, if it can."""
    if before.kernel not in _ENDING or before.clamps or before.adds is not None:
        return False
    if finish != NOTHING and (before.finish != NOTHING or affine is not None):
        return False
    if affine is None:
        before.finish = finish
        return True
    scale, shift = affine
    if before.finish != NOTHING:
        if np.ptp(scale) or np.ptp(shift):
            return False
        a, b = float(scale[0]), float(shift[0])
        end = before.finish
        before.finish = replace(end, scale=end.scale * a, shift=end.shift * a + b)
    elif before.kernel == _SCALING:
        return False
    elif before.kernel == "images_map":
        inner = before.affine
        before.affine = affine if inner is None else (inner[0] * scale, inner[1] * scale + shift)
    else:
        _scale_weights(before, scale, shift)
    return True


def _scale_weights(before: Operation, scale: np.ndarray, shift: np.ndarray) -> None:
    bias, weight = before.weights["bias"], before.weights["weights"]
    assert isinstance(bias, np.ndarray) and isinstance(weight, Weight)
    times = bias.size // scale.size  # a transposed convolution has all channels for each place
    scale, shift = np.tile(scale, times), np.tile(shift, times)
    before.weights["bias"] = bias * scale + shift
    # Depthwise weights are [tap][channel], others [tile][..][16].
    shape = (-1, scale.size) if before.kernel == "depthwise_f32" else (scale.size // 16, -1, 16)
    factor = scale if before.kernel == "depthwise_f32" else scale.reshape(-1, 1, 16)

    def scaled() -> np.ndarray:
        found: np.ndarray = (weight.make().reshape(shape) * factor).astype(np.float32)
        return found

    def runs() -> Iterator[tuple[int, np.ndarray]]:
        of_tile = weight.n_bytes // 64 // (scale.size // 16)  # rows of 16
        for at, part in weight.parts():
            rows = part.reshape(-1, 16)
            tiles = (at // 64 + np.arange(len(rows))) // of_tile
            yield at, (rows * scale.reshape(-1, 16)[tiles]).astype(np.float32)

    key = None if weight.key is None else (weight.key, scale.tobytes())
    part_wise = None if weight.runs is None else runs
    before.weights["weights"] = Weight(weight.n_bytes, scaled, key, part_wise)
