"""How fast a model will be, from what the machine was measured to do."""

from __future__ import annotations

from dataclasses import dataclass

from headrace.offload.modes import ReadMode
from headrace.offload.pieces import Residency
from headrace.sizes import format_size

# What kernels reach of the read bandwidth.
DECODE_SHARE = 0.90
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
    sample: Sample | None = None  # of the model, computing


@dataclass(frozen=True)
class Sample:
    """Seconds that passes take when all weights are in memory.

    Attributes:
        decode_s: a token, at an empty context.
        chunk_s: reading `chunk_tokens` tokens of a prompt, and the logits after the last one.
    """

    decode_s: float
    chunk_tokens: int
    chunk_s: float


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
    rates: Rates, residency: Residency | None, *, read_bytes: int, prompt_tokens: int
) -> Speed:
    """Speed at an empty context.

    Args:
        rates: of this machine.
        residency: what is kept and what streams; None: all is kept.
        read_bytes: of weights in memory's form for each token.
        prompt_tokens: of the prompt before the first token.
    """
    sample, memory = rates.sample, rates.memory
    compute_s = prompt_s = None
    passes = 1
    if sample is not None:
        compute_s = sample.decode_s
        passes = -(-prompt_tokens // sample.chunk_tokens)
        prompt_s = sample.chunk_s * prompt_tokens / sample.chunk_tokens
    elif memory is not None:  # too little of it for a sample
        compute_s = read_bytes / (memory * DECODE_SHARE)
    if residency is None:
        tok_s = None if compute_s is None else 1 / compute_s
        return Speed(tok_s, compute_s=compute_s, first_token_s=prompt_s)
    if rates.flash is None:
        return Speed()
    tiled_s = 0.0 if memory is None else TILED_PASSES * residency.staged_bytes / memory
    flash_s = residency.streamed_bytes / (rates.flash * FLASH_SHARE)
    if prompt_s is not None:
        prompt_s = max(flash_s * passes, prompt_s + tiled_s * passes)
    compute_s = tiled_s + (compute_s or 0.0)
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
