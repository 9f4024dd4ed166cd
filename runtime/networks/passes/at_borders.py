"""What is only quantised on its way in, or made floats on its way out, has no place in a region."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from headrace.networks.operation import Operation


def passing(
    operations: Sequence[Operation], inputs: Sequence[str], outputs: Sequence[str]
) -> dict[str, Operation]:
    """Inputs, and outputs, with the one operation that takes or gives them as they lie outside."""
    users = Counter(name for one in operations for name in one.inputs)
    found = {}
    for one in operations:
        if not one.reads:
            continue
        x, y = one.reads[0], one.makes
        comes = x in inputs and users[x] == 1 and x not in outputs
        if one.kernel == "images_from_floats" and comes:
            found[x] = one
        if one.kernel == "images_to_floats" and y in outputs and users[y] == 0:
            found[y] = one
    return found
