"""What comes right behind a convolution or a sum becomes its last step: bounds, and a sum."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence

from headrace.kernels.sparse_product import ROWS, kernel_of
from headrace.networks.operation import Operation

# Kernels that can add something to what they make.
_ADDING = ("convolution_f32", *(kernel_of(rows) for rows in ROWS))
_BOUNDING = (*_ADDING, "depthwise_f32", "images_add")


def into_convolutions(operations: Sequence[Operation], wanted: Collection[str]) -> list[Operation]:
    """The operations, fewer of them; values of `wanted` are made whatever happens.

    Sums and bounds are formed in the same order, of the same values: nothing is rounded otherwise.
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


def _absorbed(one: Operation, only_user: object, maker: dict[str, int]) -> Operation | None:
    """What makes an operation's input, with the operation added to it; None: it cannot be."""
    assert callable(only_user)
    if one.kernel != "images_add":
        return None
    if len(one.reads) == 1:
        before: Operation | None = only_user(one.reads[0])
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
        ready = before is not None and before.kernel in _ADDING and before.adds is None
        if ready and before is not None and not before.clamps and one.reads[1 - i] != name:
            before.adds = one.reads[1 - i]
            before.least, before.most = one.least, one.most
            return before
    return None
