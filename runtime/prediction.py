"""How fast a model will be, from what the machine was measured to do."""

from __future__ import annotations

from dataclasses import dataclass

from headrace.offload.modes import ReadMode
from headrace.offload.pieces import Residency
from headrace.sizes import format_size

# What kernels reach of the read bandwidth, and a barrier's cost with the work around it.
DECODE_SHARE = 0.90
BARRIER_S = 1.5e-6
# What prefill reaches of the rate of its products alone: attention, norms and coding come on top.
PRODUCTS_SHARE = 0.8
# Where weights stream, a step also writes what it has tiled, and reads it again from the cache.
TILED_PASSES = 2.0
# What reading takes more than at the measured rate, for it shares the CPU with kernels.
FLASH_SHARE = 0.95


@dataclass(frozen=True)
class Rates:
    """What this machine can do, in bytes per second; None: not measured."""

    memory: float | None = None
    flash: float | None = None
    mode: ReadMode | None = None
    products: float | None = None  # multiply-adds per second


@dataclass(frozen=True)
class PrefillWork:
    """What reading a prompt takes: its multiply-adds, and passes over the weights."""

    tokens: int
    products: int
    passes: int


@dataclass(frozen=True)
class Speed:
    """A prediction; None where a rate is missing that it needs.

    Attributes:
        flash_s, compute_s: of a token, which takes the longer of the two.
        first_token_s: of the prompt.
        advice: what would change the speed most.
    """

    tok_s: float | None = None
    flash_s: float | None = None
    compute_s: float | None = None
    first_token_s: float | None = None
    advice: str | None = None


def prediction(
    rates: Rates, residency: Residency | None, *, read_bytes: int, layers: int, work: PrefillWork
) -> Speed:
    """Speed at an empty context.

    Args:
        rates: of this machine.
        residency: what is kept and what streams; None: all is kept.
        read_bytes: of weights in memory's form for each token.
        layers: of the model; each has five barriers.
        work: of a prompt.
    """
    compute_s = (5 * layers + 2) * BARRIER_S
    tiled_s = 0.0
    if rates.memory is not None:
        compute_s += read_bytes / (rates.memory * DECODE_SHARE)
    prompt_s = None
    if rates.products is not None:
        prompt_s = work.products / (rates.products * PRODUCTS_SHARE)
    if residency is None:
        tok_s = None if rates.memory is None else 1 / compute_s
        return Speed(tok_s, compute_s=compute_s, first_token_s=prompt_s)
    if rates.flash is None:
        return Speed()
    if rates.memory is not None:
        tiled_s = TILED_PASSES * residency.staged_bytes / rates.memory
    flash_s = residency.streamed_bytes / (rates.flash * FLASH_SHARE)
    if prompt_s is not None:
        prompt_s = max(flash_s * work.passes, prompt_s + tiled_s * work.passes)
    compute_s += tiled_s
    advice = _advice(residency, rates.flash, flash_s, compute_s, tiled_s)
    return Speed(1 / max(flash_s, compute_s), flash_s, compute_s, prompt_s, advice)


def _advice(
    residency: Residency, flash: float, flash_s: float, compute_s: float, tiled_s: float
) -> str:
    if flash_s > compute_s:
        more = max(residency.streamed_bytes // 4, 1)
        rate = 1 / max(compute_s, flash_s - more / (flash * FLASH_SHARE))
        return f"the disk binds: with {format_size(more)} more memory {rate:.2f} tok/s"
    if tiled_s > compute_s / 4:
        return "tiling what is read binds: a file that `headrace compress` wrote needs none"
    return "computing binds, not the disk: fewer bits a weight or more threads would help"
