"""An output of one channel that comes pixel by pixel is written as ONNX has it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from headrace.networks.operation import PADDED, Image, Operation


def write_planes(
    operations: Sequence[Operation], images: Mapping[str, Image], outputs: Collection[str]
) -> None:
    """Say so, where nobody else reads it."""
    read = {name for one in operations for name in one.inputs}
    for one in operations:
        if one.kernel != "images_spread" or one.makes not in outputs or one.makes in read:
            continue
        of = images[one.makes]
        count = of.images * of.pixels
        if of.channels == 1 and count % PADDED == 0:
            one.steps[one.makes] = 4
            one.image = Image(1, 1, 1, count)
