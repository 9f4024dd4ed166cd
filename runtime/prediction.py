"""How fast a model will be, from what the machine was measured to do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from headrace.offload.modes import FlashRate, ReadMode, Work, choose
from headrace.offload.pieces import Residency
from headrace.sizes import format_size

# What kernels reach of the read bandwidth.
DECODE_SHARE = 0.90
# Where weights stream, a step also writes what it has tiled, and reads it again from the cache.
TILED_PASSES = 2.0


@dataclass(frozen=True)
class Rates:
    """What this machine can do; None: not measured.

    Attributes:
        memory: bytes per second.
        flash: by mode.
        sample: the model's passes, computing.
        cores: for threads that compute or read.
    """

    memory: float | None = None
    flash: Mapping[ReadMode, FlashRate] | None = None
    sample: Sample | None = None
    cores: int = 1


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
        mode, flash: how tokens read what streams, and its bytes per second.
        advice: what would change the speed most.
    """

    tok_s: float | None = None
    flash_s: float | None = None
    compute_s: float | None = None
    first_token_s: float | None = None
    mode: ReadMode | None = None
    flash: float | None = None
    advice: str | None = None


@dataclass(frozen=True)
class Passes:
    """The passes of a model on a machine.

    Args:
        rates: of this machine.
        residency: what is kept and what streams; None: all is kept.
        read_bytes: of weights in memory's form for each token.
        threads: that compute.
        expert_bytes: of experts that a pass over so many tokens is expected to read.
    """

    rates: Rates
    residency: Residency | None
    read_bytes: int
    threads: int
    expert_bytes: Callable[[int], int] = lambda n_tokens: 0

    def flash_bytes(self, n_tokens: int) -> int:
        """Bytes of the file that a pass over so many tokens reads."""
        streamed = 0 if self.residency is None else self.residency.streamed_bytes
        return streamed + self.expert_bytes(n_tokens)

    def compute_s(self, n_tokens: int) -> float | None:
        """Seconds that a pass computes, at an empty context, with what is tiled; None: unknown."""
        sample, memory = self.rates.sample, self.rates.memory
        if sample is not None:
            one, many = sample.decode_s, sample.chunk_s / sample.chunk_tokens
            seconds = one if n_tokens == 1 else max(one, many * n_tokens)
        elif n_tokens == 1 and memory is not None:  # too little memory for a sample
            seconds = self.read_bytes / (memory * DECODE_SHARE)
        else:
            return None
        return seconds + self.tiled_s

    @property
    def tiled_s(self) -> float:
        """Seconds of a pass in which what was read is tiled."""
        if self.residency is None or self.rates.memory is None:
            return 0.0
        return TILED_PASSES * self.residency.staged_bytes / self.rates.memory

    def work(self, n_tokens: int) -> Work:
        """What a pass reads and computes."""
        n_bytes = self.flash_bytes(n_tokens)
        return Work(n_bytes, self.compute_s(n_tokens) or 0.0, self.threads, self.rates.cores)

    def mode(self, n_tokens: int) -> ReadMode | None:
        """How to read for a pass over so many tokens; None where flash was not measured."""
        return None if self.rates.flash is None else choose(self.rates.flash, self.work(n_tokens))

    def in_time(self, missed: float) -> float:
        """Share of the experts asked for ahead that are there when a token wants them.

        Flash brings all that a token reads in the time that it takes anyway: what it computes, or
        what streams, and the waiting for experts that were not asked for ahead, a share `missed`
        of the bytes of experts. What flash does not bring in that time is late. Where rates are not
        known nothing is.
        """
        mode, compute_s, experts = self.mode(1), self.compute_s(1), self.expert_bytes(1)
        if compute_s is None and self.residency is not None:
            compute_s = 0.0  # what streams takes longer
        if self.rates.flash is None or mode is None or compute_s is None or not experts:
            return 1.0
        flash_s = self.work(1).flash_s(self.rates.flash[mode])
        experts_s = flash_s * experts / self.flash_bytes(1)
        return min(1.0, (max(compute_s, flash_s - experts_s) + missed * experts_s) / flash_s)

    def seconds(self, n_tokens: int) -> float | None:
        """What a pass takes; None: unknown."""
        compute_s = self.compute_s(n_tokens)
        if not self.flash_bytes(n_tokens):
            return compute_s
        mode = self.mode(n_tokens)
        if self.rates.flash is None or mode is None or (compute_s is None and n_tokens > 1):
            return None
        return self.work(n_tokens).seconds(self.rates.flash[mode])

    def prediction(self, prompt_tokens: int) -> Speed:
        """Speed at an empty context, after a prompt of so many tokens."""
        sample, second = self.rates.sample, self.seconds(1)
        prompt_s = None
        if sample is not None:
            chunk = min(sample.chunk_tokens, prompt_tokens)
            of_chunk = self.seconds(chunk)
            prompt_s = None if of_chunk is None else of_chunk * prompt_tokens / chunk
        compute_s, mode = self.compute_s(1), self.mode(1)
        tok_s = None if second is None else 1 / second
        if not self.flash_bytes(1) or self.rates.flash is None or mode is None:
            return Speed(tok_s, compute_s=compute_s, first_token_s=prompt_s)
        rate = self.rates.flash[mode]
        flash_s = self.work(1).flash_s(rate)
        advice = self._advice(rate, flash_s, compute_s or 0.0)
        return Speed(tok_s, flash_s, compute_s, prompt_s, mode, rate.bytes_s, advice)

    def _advice(self, rate: FlashRate, flash_s: float, compute_s: float) -> str:
        work = self.work(1)
        if flash_s > compute_s:
            more = max(work.n_bytes // 4, 1)
            tok_s = 1 / replace(work, n_bytes=work.n_bytes - more).seconds(rate)
            return f"the disk binds: with {format_size(more)} more memory {tok_s:.2f} tok/s"
        if self.tiled_s > compute_s / 4:
            return "tiling what is read binds: a file that `headrace compress` wrote needs none"
        return "computing binds, not the disk: fewer bits a weight or more threads would help"
