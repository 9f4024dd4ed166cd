"""The memory of one model's forward pass and its programs, ready for the native loop."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from headrace.embedding import EmbeddingRows
from headrace.expert_layout import directory_of
from headrace.families.decoder import Decoder, Experts, Matrix, NeuronClusters, rope_table
from headrace.kernels import execute
from headrace.kernels.invoke import argument_block
from headrace.memory import Arena
from headrace.offload.expert_cache import ExpertCache
from headrace.plan import (
    ACTIVE,
    COUNT,
    ONE,
    OUT_COUNT,
    OUT_FIRST,
    POSITION,
    PREFILL,
    SHORT_TOKENS,
    Shape,
    buffer_sizes,
    check_mode,
    codebooks,
    input_activations,
    kv_bytes,
    modes,
    ropes_of,
    row_widths,
    table_sizes,
)
from headrace.stack import BlockAt
from headrace.step import Step
from headrace.steps import Forward
from headrace.streaming import Streaming
from headrace.targets.target import Target
from headrace.weights import Part, Weights

HUGE_TOKENS = 128  # chunks from here on run on huge pages
LOGITS_SLOT = 2  # of a product's argument block
PREFETCH_BYTES = 1 << 14  # smaller matrices are not worth asking for ahead


@dataclass(frozen=True)
class Program:
    """Steps ready to run, a few dozen bytes each: models that stream have tens of thousands.

    Attributes:
        table: int64 [n, 8] for the native loop.
        blocks: argument blocks, one behind the other.
        kernels: names, for reports.
        sizes: bytes of weights that each step reads, for reports.
        logits: where `blocks` has an address of logits, and which byte of them that is.
    """

    table: np.ndarray
    blocks: np.ndarray
    kernels: tuple[str, ...]
    sizes: np.ndarray
    logits: tuple[tuple[int, int], ...]


class Programs:
    """The buffers and programs of one model."""

    def __init__(
        self, decoder: Decoder, weights: Weights, target: Target, addresses: dict[str, int],
        shape: Shape, streaming: Streaming | None = None, rows: EmbeddingRows | None = None,
        cache: ExpertCache | None = None,
    ) -> None:  # fmt: skip
        self.shape = shape
        self._decoder = decoder
        self._weights = weights
        self._target = target
        self._addresses = addresses
        sizes = buffer_sizes(decoder, weights.placed.values(), target, shape, weights.stack)
        self.buffers = Arena(
            {n: k for n, k in sizes.items() if not n.startswith(PREFILL)}, huge=False
        )
        self._large = Arena({n: k for n, k in sizes.items() if n.startswith(PREFILL)}, huge=False)
        self._huge = False
        self._tables = Arena(table_sizes(decoder, shape, weights.placed.values()), huge=False)
        self.kv_cache = Arena({"kv": kv_bytes(decoder, shape.context)})
        self.state = self.buffers.view("state", "i8")
        self.state[ONE] = 1
        self.state[ACTIVE] = next((one.active for one in decoder.mixtures().values()), 0)
        self._directories: list[np.ndarray] = []
        self.ids = self.buffers.view("ids", "i8")
        self.logits = self.buffers.view("logits", "f4").reshape(target.most_tokens, -1)
        # Of each token that `check` reads.
        self.few_logits = self.buffers.view("few_logits", "f4").reshape(-1, self.logits.shape[1])
        for rope, name in ropes_of(decoder).items():
            factors = None
            if rope.factors is not None:
                factors = weights.vectors.view(rope.factors, "f4")[: rope.width // 2]
            table = self._tables.view(name, "f4").reshape(shape.context, rope.width)
            table[:] = rope_table(rope, factors, shape.context)
        for name, codebook in codebooks(weights.placed.values()).items():
            values = codebook()
            self._tables.view(name)[: values.size] = values
        self.link(streaming, rows, cache)

    def link(
        self, streaming: Streaming | None, rows: EmbeddingRows | None,
        cache: ExpertCache | None = None,
    ) -> None:  # fmt: skip
        """Make the programs for weights as they lie in memory now, with what is streamed.

        `rows` of the embedding are used where it does not lie in memory in one piece, and a
        `cache` where not all experts do.
        """
        self._streaming = streaming
        self._rows = rows
        self._cache = cache
        stack = self._weights.stack
        forward = Forward(
            self._decoder, self._weights.placed, self.shape, self, self._target,
            None if stack is None else stack.shapes,
        )  # fmt: skip
        in_parts = enumerate(self._decoder.in_parts())
        self._directories = [self._directory(i, one) for i, one in in_parts]
        by_name = modes(self._target)
        made = {name: self._program(forward.steps(mode)) for name, mode in by_name.items()}
        self.decode, self.short, self.prefill = (
            made["decode"], made["short"], made["prefill"],
        )  # fmt: skip
        # With what is in memory of a stack, and nothing that streams.
        part = stack is not None and streaming is not None
        self.guess = (
            self._program(forward.steps(by_name["decode"], resident=True)) if part else None
        )
        check = check_mode(self._target)
        inputs = input_activations(self._weights.placed.values(), stack)
        self.check = (
            self.short
            if check.alike(by_name["short"], inputs)
            else self._program(forward.steps(check))
        )

    # --- headrace.steps.Places --------------------------------------------------------------------

    def embedding(self) -> int:
        """Address of the embedding, or of its rows that tokens ask for."""
        if self._rows is not None:
            return self._rows.address
        return self._weights.parts(self._decoder.embedding.name)[0].address

    def parts(self, matrix: Matrix) -> list[Part]:
        """All tiles of a matrix: what is in memory, and what is streamed."""
        parts = self._weights.parts(matrix.name)
        if self._streaming is not None:
            parts += self._streaming.parts(matrix.name)
        return sorted(parts, key=lambda part: part.tile)

    def blocks(self, matrix: Matrix) -> list[BlockAt]:
        """The blocks of a matrix: those in memory, then what is streamed."""
        blocks = self._weights.blocks(matrix.name)
        if self._streaming is not None:
            blocks += self._streaming.blocks(matrix.name)
        return blocks

    def head(self, matrix: Matrix) -> int:
        """Address of the head of a group-sparse matrix."""
        return self._weights.head(matrix.name)

    def directory(self, mixture: int) -> int:
        """Address of the directory of a mixture's experts."""
        return int(self._directories[mixture].ctypes.data)

    def cache(self) -> ExpertCache | None:
        """Where experts are brought when they are wanted."""
        return self._cache

    def _directory(self, number: int, mixture: Experts | NeuronClusters) -> np.ndarray:
        cache = self._cache

        def places(expert: int) -> list[int]:
            if cache is not None:
                return cache.offsets(number, expert)
            names = [matrix.name for matrix in mixture.each[expert].matrices()]
            return [self._weights.parts(name)[0].address for name in names]

        if isinstance(mixture, NeuronClusters):
            found = np.array([places(c) for c in range(len(mixture.each))], np.int64)
            return np.ascontiguousarray(found.T)
        return directory_of(mixture, self._weights.placed, places)

    def routes(self, n_tokens: int) -> list[np.ndarray]:
        """Which experts the tokens of the last pass have chosen of each mixture, the best first:
        int64 [tokens, active].
        """
        routed = enumerate(self._decoder.mixtures().values())
        return [
            self.buffers.view(f"chosen{i}", "i8").reshape(-1, one.active)[:n_tokens]
            for i, one in routed
        ]

    def staging(self, turn: int) -> int:
        """Address of a buffer for raw rows that are tiled."""
        if self._streaming is None:
            raise AssertionError("nothing is streamed")
        return self._streaming.staging(turn)

    def vector(self, name: str) -> int:
        """Address of a padded float32 vector."""
        return self._weights.vectors.address(name)

    def table(self, name: str) -> int:
        """Address of a rotary embedding's table, or a codebook's."""
        return self._tables.address(name)

    def buffer(self, name: str, large: bool) -> int:
        """Address of a buffer; `large`: of the one for long chunks, where there are two."""
        if large and PREFILL + name in self._large:
            return self._large.address(PREFILL + name)
        return self.buffers.address(name)

    def floats(self, name: str) -> np.ndarray:
        """A buffer of long chunks as float32, a row for each token where it has such rows."""
        flat = self._large.view(PREFILL + name, "f4")
        width = row_widths(self._decoder).get(name)
        return flat if width is None else flat.reshape(-1, width)

    def kv(self) -> int:
        """Address of the KV cache."""
        return self.kv_cache.address("kv")

    # --- running ----------------------------------------------------------------------------------

    def for_tokens(self, n_tokens: int) -> Program:
        """The program that reads a text of so many tokens, all chunks of it.

        How long chunks are depends on memory; what comes out must not.
        """
        if n_tokens > SHORT_TOKENS:
            return self.prefill
        return self.decode if n_tokens == 1 else self.short

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

    def set_tokens(self, ids: Sequence[int]) -> None:
        """Say which tokens the next pass reads.

        Raises:
            ModelFileError: rows of the embedding are read from the file, and it cannot be read.
        """
        if self._rows is None:
            self.ids[: len(ids)] = ids
        else:
            self._rows.fetch(ids)
            self.ids[: len(ids)] = np.arange(len(ids))

    def say(self, n_tokens: int, position: int, wanted: int) -> None:
        """Say where the tokens of the next pass stand, and after how many of the last to look."""
        self.state[COUNT] = n_tokens
        self.state[POSITION] = position
        self.state[OUT_FIRST] = n_tokens - wanted
        self.state[OUT_COUNT] = wanted

    def write_logits_to(self, out: np.ndarray) -> None:
        """Let prefill write logits to float32 `out` [rows, padded vocabulary], which must live."""
        for program in (self.short, self.check, self.prefill):
            for slot, at in program.logits:
                program.blocks[slot] = out.ctypes.data + at

    def _program(self, steps: list[Step]) -> Program:
        starts = list(itertools.accumulate((len(step.slots) for step in steps), initial=0))
        tables = starts[-1]  # of addresses of slots, and what is called, behind the argument blocks
        called = sum(len(step.calls.slots) for step in steps if step.calls is not None)
        blocks = np.zeros(tables + called + sum(len(step.writes) for step in steps), np.int64)
        table = np.zeros((len(steps), execute.STEP_SLOTS), np.int64)
        ahead = (0, 0)
        for i in range(len(steps) - 1, -1, -1):
            if steps[i].barrier:
                table[i, 3:5] = ahead
            at = steps[i].slots[steps[i].weights]  # 0: it is not known yet
            if steps[i].n_bytes > PREFETCH_BYTES and steps[i].request is None and at:
                ahead = (at, steps[i].n_bytes)
        for i, step in enumerate(steps):
            blocks[starts[i] : starts[i + 1]] = argument_block(step.slots)
            table[i, 0] = self._addresses[step.kernel]
            table[i, 2] = (
                (execute.STEP_BARRIER if step.barrier else 0)
                | (execute.STEP_WAIT if step.waits else 0)
                | (execute.STEP_GIVE if step.gives else 0)
                | (execute.STEP_LOOP if step.loop else 0)
            )
            table[i, 6:8] = step.loop or 0
            if step.writes:
                blocks[starts[i] + step.table] = blocks.ctypes.data + 8 * tables
                for further, slot in step.writes:
                    blocks[tables] = blocks.ctypes.data + 8 * (starts[i + further] + slot)
                    tables += 1
            if step.calls is not None:
                blocks[starts[i]] = self._addresses[step.calls.kernel]
                blocks[starts[i] + 1] = blocks.ctypes.data + 8 * tables
                end = tables + len(step.calls.slots)
                blocks[tables:end] = argument_block(step.calls.slots)
                tables = end
            if step.request is not None and self._streaming is not None:
                table[i, 5] = self._streaming.window.request(step.request)
        table[:, 1] = blocks.ctypes.data + 8 * np.array(starts[:-1])
        return Program(
            table,
            blocks,
            tuple(sys.intern(step.kernel) for step in steps),
            np.array([step.n_bytes for step in steps]),
            tuple(
                (start + LOGITS_SLOT, step.logits_at)
                for start, step in zip(starts, steps, strict=False)
                if step.logits_at is not None
            ),
        )
