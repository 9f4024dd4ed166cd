"""What a layer becomes on a chip, before anything has an address: calls of kernels."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from headrace.micro.network import OWN

SCRATCH = f"{OWN}scratch"


@dataclass(frozen=True)
class At:
    """The address of a value, of a constant, or of `SCRATCH`; `offset` bytes behind its begin."""

    name: str
    offset: int = 0

    def behind(self, n_bytes: int) -> At:
        """The address so many bytes further on."""
        return At(self.name, self.offset + n_bytes)


@dataclass(frozen=True)
class Step:
    """A call of a kernel.

    Attributes:
        kernel: of `headrace.micro.kernels.table`.
        slots: the argument block.
    """

    kernel: str
    slots: tuple[int | float | At, ...]


@dataclass(frozen=True)
class Lowered:
    """A layer as calls of kernels.

    Attributes:
        constants: what stays in flash, by names that begin with the layer's.
        scratch_bytes: of memory that the layer needs for itself while it runs.
        over: names of values that are read, in whose place the result may lie.
    """

    steps: tuple[Step, ...]
    constants: dict[str, np.ndarray] = field(default_factory=dict)
    scratch_bytes: int = 0
    over: tuple[str, ...] = ()
