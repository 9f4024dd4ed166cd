"""What is only quantised on its way in, or made floats on its way out, has no place in a region."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from headrace.networks.operation import Operation

Passing = tuple[dict[str, Operation], dict[str, Operation]]


def passing(operations: Sequence[Operation], inputs: Sequence[str], outputs: Sequence[str]) -> Passing:
    """Inputs, and outputs, with the one operation that takes or gives them as they lie outside."""
    users = Counter(name for one in operations for name in one.inputs)
    reading: dict[str, Operation] = {}
    making: dict[str, Operation] = {}
    for one in operations:
        if one.at_border is None:
            continue
        x, y = one.reads[0], one.makes
        if one.kernel == "images_from_floats" and x in inputs and users[x] == 1 and x not in outputs:
            reading[x] = one
        if one.kernel == "images_to_floats" and y in outputs and users[y] == 0:
            making[y] = one
    return reading, making
