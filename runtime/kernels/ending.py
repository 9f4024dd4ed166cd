"""What convolutions do last, and the slots that say so.

From `LAST` on: 0 whether it is done, 1 whether something is added then, 2 bytes between pixels of
that, 3 least and 4 most value (float32), 5 to 9 `Finish`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from headrace.kernels.finishes import (
    HARD_SWISH,
    INFINITE,
    NONE,
    SIGMOID,
    SILU,
    Finish,
    error_bound,
    finished,
    reference,
)
from headrace.targets.simd import arg_float, arg_int

if TYPE_CHECKING:
    import numpy as np

LAST = 24
NOTHING = Finish(NONE)


@dataclass(frozen=True)
class Ending:
    """What is done last: bounds, and before them an activation and a sum.

    Attributes:
        late: whether what is added is so behind the activation, or lies otherwise than results do.
        more_bytes: between pixels of what is added.
    """

    least: float = -INFINITE
    most: float = INFINITE
    finish: Finish = NOTHING
    late: bool = False
    more_bytes: int = 0

    @property
    def ends(self) -> bool:
        """Whether there is more to do than bounds, and something added that lies as results do."""
        return self.late or self.finish.kind != NONE

    def bounds(self) -> tuple[float, float]:
        """Of what is finished after that."""
        return (-INFINITE, INFINITE) if self.ends else (self.least, self.most)

    def slots(self) -> list[Any]:
        """Of an argument block."""
        return [
            int(self.ends), int(self.late), self.more_bytes, self.least, self.most,
            *self.finish.slots(),
        ]  # fmt: skip


def end_pixels(
    args: Any, y: Any, more: Any, pixels: Any, vectors: Any, y_step: Any
) -> None:  # fmt: skip
    """Finish pixels that lie at y, with what is added to them at `more`, as the slots say."""
    finished(
        y, more, pixels, vectors, y_step, arg_int(args, 26), arg_int(args, 29), arg_float(args, 30),
        arg_float(args, 31), arg_float(args, 32), arg_float(args, 33), arg_int(args, 25) != 0,
        arg_float(args, 27), arg_float(args, 28),
    )  # fmt: skip


# --- reference and cases --------------------------------------------------------------------------


ENDINGS = (  # of `geometry.SHAPES`, in turn
    Ending(), Ending(late=True, finish=Finish(SILU)), Ending(0.0, 6.0),
    Ending(0.0, 6.0, late=True), Ending(finish=Finish(HARD_SWISH, 1 / 6, 0.5, 1.5, -0.25)),
    Ending(finish=Finish(SIGMOID)),
)  # fmt: skip


def ended(
    exact: np.ndarray, bound: np.ndarray, ending: Ending, more: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """What comes out in float64, and how far it may be off, for sums that are off by `bound`."""
    import numpy as np

    if more is not None and not ending.late:
        exact = exact + more.astype(np.float64)
        bound = bound + np.abs(exact) * 2.0**-23 + np.abs(more) * 2.0**-23
    if ending.finish.kind != NONE:
        bound = bound * 2 * abs(ending.finish.scale) + error_bound(exact, ending.finish)
        exact = reference(exact, ending.finish)
    if more is not None and ending.late:
        exact = exact + more.astype(np.float64)
        bound = bound + np.abs(exact) * 2.0**-23 + np.abs(more) * 2.0**-23
    return np.clip(exact, ending.least, ending.most), bound + 1e-30
