"""In which order a file has the experts of mixtures: those that follow one another side by side."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from headrace.families.decoder import Decoder
from headrace.offload.route_statistics import RouteStatistics

Expert = tuple[int, int]  # mixture, number


def chains(learned: RouteStatistics) -> list[Expert]:
    """All experts, each followed by its likeliest successor in the next mixture that is left.

    After ExFlow (2401.08383), whose table says which experts should be on one device; here it says
    which ones should be near each other on one disk. A chain begins with the expert of the first
    mixture that is chosen most of those that are left; where mixtures differ in size, chains go on
    over those that have one left.
    """
    left = [set(range(int(n))) for n in learned.experts]
    found: list[Expert] = []
    while any(left):
        before: int | None = None
        for mixture, experts in enumerate(left):
            if not experts:
                before = None
                continue
            choose = learned.frequency[mixture]
            if before is not None and mixture > 0:
                choose = learned.affinity[mixture, before]
            numbers = np.array(sorted(experts))
            before = int(numbers[np.argmax(choose[numbers])])
            experts.remove(before)
            found.append((mixture, before))
    return found


def laid_out(names: Sequence[str], decoder: Decoder, learned: RouteStatistics | None) -> list[int]:
    """Numbers of tensors in the order of the file: experts behind the others that layers have.

    Args:
        names: of the tensors, in the order of a pass.
        learned: None: nothing is known of routes, and they stay as they are.
    """
    if learned is None:
        return list(range(len(names)))
    mixtures = list(decoder.mixtures().values())
    at = {name: i for i, name in enumerate(names)}
    experts = [
        at[matrix.name]
        for mixture, expert in chains(learned)
        for matrix in mixtures[mixture].each[expert].matrices()
        if matrix.name in at
    ]
    moved = set(experts)
    behind = max(experts, default=-1)
    before = [i for i in range(behind + 1) if i not in moved]
    return [*before, *experts, *range(behind + 1, len(names))]
