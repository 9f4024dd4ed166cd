"""Formats chosen by the matrix: how many weights share a scale, how 4-bit floats are split, or how
many weights of each run are stored.

Group sizes are chosen after FineQuant (arXiv 2308.09723).

Small groups follow a matrix's range more closely and take more bytes. FineQuant halves the group of
a matrix while that narrows its ranges by more than a threshold. Here the noise itself is looked at,
which ranges stand for, and the threshold is what the same bytes would do elsewhere: a bit more for
every weight takes 6 dB off.

Of exponent and mantissa LLM-FP4 (arXiv 2310.16836) tries every split for each matrix, with exponent
biases that are no integers. A scale of 2^-bias is the same: so `llm_fp4` takes the split with the
least noise, each having the best scales that are found for 128 weights of a row (there, for a row).
Activations are 8-bit integers with scales of 32 (there, 4-bit floats: `headrace.sparse.llm_fp4`).

Weights that are zeros already, any of them, are left out by `s_auto`: 2:4, 16 or 8 of 32, or none.
What a run has beyond that goes, its smallest weights, and counts as noise like what rounding loses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from headrace.sparse.format import Floats, Format
from headrace.sparse.fp4 import MAGNITUDES
from headrace.sparse.registry import FORMATS

# What may be asked for in the place of a format, and what each matrix is then given one of.
ADAPTIVE = {
    f"{kind}_auto": tuple(FORMATS[f"{kind}_g{group}"] for group in (16, 32, 64, 128))
    for kind in ("i4", "i4a")
}
ADAPTIVE["llm_fp4"] = tuple(FORMATS[f"{split}_g128"] for split in MAGNITUDES)
ADAPTIVE["s_auto"] = tuple(
    FORMATS[name] for name in ("i4_g32", "s24_g32", "s16of32_g32", "s8of32_g32")
)
SAMPLE_ROWS = 256
BIT_WORTH_DB = 6.02


@np.errstate(all="ignore")
def relative_noise(fmt: Format, w: Floats) -> float:
    """The sum of squared errors of the coded weights, over the sum of squared weights.

    Infinite where the format cannot hold them, or weights are no numbers.

    Args:
        fmt: the format.
        w: float32 [rows, n]; n must be a multiple of the format's block.
    """
    error = fmt.decode(fmt.encode(w)).astype(np.float64) - w
    power = float((w.astype(np.float64) ** 2).sum())
    noise = float((error**2).sum()) / power if power else 0.0
    return noise if math.isfinite(noise) else math.inf


def choose_format(w: Floats, formats: Sequence[Format], bit_worth: float = BIT_WORTH_DB) -> Format:
    """The format whose noise in dB is least, a bit of a weight counting as `bit_worth` dB.

    Of a matrix with many rows, evenly spaced ones decide: every row counts alike.

    Args:
        w: the weights, float32 [rows, n].
        formats: those to choose from; formats whose block does not divide n are passed over.
        bit_worth: 0 takes the least noise, whatever its bytes; 100 the fewest bits.

    Raises:
        ValueError: rows of n weights fit none of the formats.
    """
    n = w.shape[1]
    fitting = [fmt for fmt in formats if n % fmt.block == 0]
    if not fitting:
        names = ", ".join(fmt.name for fmt in formats)
        raise ValueError(f"a row of {n} weights fits the blocks of none of: {names}")
    some = w[:: -(-len(w) // SAMPLE_ROWS)] if len(w) else w

    def cost(fmt: Format) -> float:
        noise = max(relative_noise(fmt, some), 1e-30)  # of what is exact bytes decide
        return 10 * math.log10(noise) + bit_worth * fmt.bits_per_weight

    return min(fitting, key=cost)
