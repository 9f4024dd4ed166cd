"""The memory of one model's forward pass and its programs, ready for the native loop."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from headrace.families.decoder import Decoder, rope_table
from headrace.kernels import execute
from headrace.kernels.invoke import argument_block
from headrace.memory import Arena
from headrace.plan import (
    ONE,
    PREFILL,
    SHORT_TOKENS,
    Shape,
    buffer_sizes,
    check_mode,
    kv_bytes,
    modes,
    ropes_of,
    table_sizes,
)
from headrace.steps import Forward, Step
from headrace.targets.target import Target
from headrace.weights import Weights

HUGE_TOKENS = 128  # chunks from here on run on huge pages
PREFETCH_BYTES = 1 << 14  # smaller matrices are not worth asking for ahead


@dataclass
class Program:
    """Steps ready to run: `table` [n, 6] for the native loop; the rest is kept alive, or shown."""

    steps: list[Step]
    table: np.ndarray
    blocks: np.ndarray = field(repr=False)


class Programs:
    """The buffers and programs of one model."""

    def __init__(
        self, decoder: Decoder, weights: Weights, target: Target, addresses: dict[str, int],
        shape: Shape,
    ) -> None:  # fmt: skip
        self.shape = shape
        self._weights = weights
        sizes = buffer_sizes(decoder, weights.placed.values(), target, shape)
        self.buffers = Arena(
            {n: k for n, k in sizes.items() if not n.startswith(PREFILL)}, huge=False
        )
        self._large = Arena({n: k for n, k in sizes.items() if n.startswith(PREFILL)}, huge=False)
        self._huge = False
        self._tables = Arena(table_sizes(decoder, shape), huge=False)
        self.cache = Arena({"kv": kv_bytes(decoder, shape.context)})
        self.state = self.buffers.view("state", "i8")
        self.state[ONE] = 1
        self.ids = self.buffers.view("ids", "i8")
        self.logits = self.buffers.view("logits", "f4").reshape(target.most_tokens, -1)
        self._few_logits: np.ndarray | None = None
        for rope, name in ropes_of(decoder).items():
            factors = None
            if rope.factors is not None:
                factors = weights.vectors.view(rope.factors, "f4")[: rope.width // 2]
            table = self._tables.view(name, "f4").reshape(shape.context, rope.width)
            table[:] = rope_table(rope, factors, shape.context)
        forward = Forward(decoder, weights.placed, shape, self)
        by_name = modes(target)
        made = {name: _program(forward.steps(mode), addresses) for name, mode in by_name.items()}
        self.decode, self.short, self.prefill = (
            made["decode"], made["short"], made["prefill"],
        )  # fmt: skip
        check = check_mode(target)
        self.check = (
            self.short if check == by_name["short"] else _program(forward.steps(check), addresses)
        )

    # --- headrace.steps.Places --------------------------------------------------------------------

    def matrix(self, name: str) -> int:
        """Address of a tiled matrix."""
        return self._weights.matrices.address(name)

    def vector(self, name: str) -> int:
        """Address of a padded float32 vector."""
        return self._weights.vectors.address(name)

    def table(self, name: str) -> int:
        """Address of a rotary embedding's table."""
        return self._tables.address(name)

    def buffer(self, name: str, large: bool) -> int:
        """Address of a buffer; `large`: of the one for long chunks, where there are two."""
        if large and PREFILL + name in self._large:
            return self._large.address(PREFILL + name)
        return self.buffers.address(name)

    def kv(self) -> int:
        """Address of the KV cache."""
        return self.cache.address("kv")

    # --- running ----------------------------------------------------------------------------------

    def expect(self, n_tokens: int) -> None:
        """Call before a chunk: long ones run over megabytes of activations, faster on huge pages.

        A short one would touch as many of those as there are buffers, for a few rows of each.
        """
        if n_tokens >= HUGE_TOKENS and not self._huge:
            self._huge = True
            self._large.change_to_huge_pages()

    def restore(self) -> None:
        """Clear what a run that was cut short left half done: attention counts chunks."""
        self.buffers.view("counters")[:] = 0

    @property
    def few_logits(self) -> np.ndarray:
        """Room for the logits of each token that `check` reads; allocated on first use."""
        if self._few_logits is None:
            rows, width = self.logits.shape
            # Kernels write whole groups of tokens, none longer than `logits`.
            self._few_logits = np.empty((SHORT_TOKENS + rows - 1, width), np.float32)
        return self._few_logits

    def write_logits_to(self, out: np.ndarray) -> None:
        """Let prefill write logits to float32 `out` [rows, padded vocabulary], which must live."""
        for program in (self.short, self.check, self.prefill):
            program.blocks[-1, 2] = out.ctypes.data


def _program(steps: list[Step], addresses: dict[str, int]) -> Program:
    width = max(len(step.slots) for step in steps)
    blocks = np.zeros((len(steps), width), np.int64)
    table = np.zeros((len(steps), execute.STEP_SLOTS), np.int64)
    ahead = (0, 0)
    for i in range(len(steps) - 1, -1, -1):
        if steps[i].barrier:
            table[i, 3:5] = ahead
        if steps[i].n_bytes > PREFETCH_BYTES:
            ahead = (steps[i].slots[0], steps[i].n_bytes)
    for i, step in enumerate(steps):
        block = argument_block(step.slots)
        blocks[i, : len(block)] = block
        table[i, 0] = addresses[step.kernel]
        table[i, 1] = blocks[i].ctypes.data
        table[i, 2] = execute.STEP_BARRIER if step.barrier else 0
    return Program(steps, table, blocks)
