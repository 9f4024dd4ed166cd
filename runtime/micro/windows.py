"""What a layer's windows see of an image of codes, for numpy."""

from __future__ import annotations

import numpy as np

from headrace.micro.network import Windows


def windows_of(
    image: np.ndarray, windows: Windows, made: tuple[int, int], outside: int
) -> np.ndarray:
    """int64 [made rows, made columns, rows, columns, channels] of int8 [rows, columns, channels].

    Args:
        made: rows and columns of what the layer makes.
        outside: what is around the image.
    """
    rows, columns, channels = image.shape
    grids = []
    for i, length in enumerate((rows, columns)):
        taps = np.arange(windows.taps[i]) * windows.dilations[i] - windows.pads[i]
        at = np.arange(made[i])[:, None] * windows.strides[i] + taps
        grids.append(np.where((at >= 0) & (at < length), at, length))
    padded = np.full((rows + 1, columns + 1, channels), outside, np.int64)
    padded[:rows, :columns] = image
    return padded[grids[0][:, None, :, None], grids[1][None, :, None, :]]
