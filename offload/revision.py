"""What modes of reading give while a model runs, where that is not what was measured at first.

The machine may have been busy when it was measured, or become so. A mode that passes wait for is
believed to give what they get; then `choose` may find another one better, which is judged in turn.
When one gives more again, the machine has changed back: the others are believed what they gave at
first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from statistics import median

from headrace.offload.modes import FLASH_SHARE, FlashRate, ReadMode

PASSES = 8  # in the same mode, before it is judged
STALLED_SHARE = 0.25  # of a pass: one that waited less tells nothing about flash
FACTOR = 1.5  # differences below this are noise


class Revision:
    """What each mode is believed to give: `rates`.

    Args:
        measured: what each gave at first.
    """

    def __init__(self, measured: Mapping[ReadMode, FlashRate]) -> None:
        self._measured = dict(measured)
        self.rates: dict[ReadMode, FlashRate] = dict(measured)
        self._mode: ReadMode | None = None
        self._seen: list[float] = []

    def add(self, mode: ReadMode, n_bytes: int, seconds: float, stall_s: float) -> bool:
        """Count a pass that read `n_bytes` in `mode`; tells whether `rates` changed."""
        if mode != self._mode:
            self._mode, self._seen = mode, []
        if stall_s < STALLED_SHARE * seconds:
            return False
        self._seen.append(n_bytes / seconds)
        if len(self._seen) < PASSES:
            return False
        gives, believed = median(self._seen) / FLASH_SHARE, self.rates[mode]
        self._seen = []
        if believed.bytes_s / FACTOR < gives < believed.bytes_s * FACTOR:
            return False
        if gives > believed.bytes_s:
            self.rates = dict(self._measured)
            gives = max(gives, self._measured[mode].bytes_s)
        self.rates[mode] = replace(believed, bytes_s=gives)
        return True
