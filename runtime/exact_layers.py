"""Layers of a model by themselves, in float32, that stop where an input of matrices is ready.

A layer runs as a decoder that has this layer only, with the programs of `headrace.programs`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace

import numpy as np

from headrace import plan as plans
from headrace.families.decoder import Decoder, FeedForward, Layer, Matrix
from headrace.loaders.gguf import ModelFile, TensorReader
from headrace.loaders.progress import Progress
from headrace.placing import PlacedMatrix, dense, place, tiled_format
from headrace.programs import Programs
from headrace.rounding import too_little
from headrace.sparse.format import TILE_ROWS, Floats
from headrace.sparse.registry import FORMATS
from headrace.targets.cache import KernelStore
from headrace.targets.host import pick_target
from headrace.targets.pack import shipped
from headrace.targets.target import Target
from headrace.team import Team
from headrace.weights import Weights

_LOADING_BYTES = 16 << 20  # that a thread takes when it loads and decodes weights
_END_ROWS = TILE_ROWS  # of embedding and head in the decoder of one layer, which uses neither
_TO = 4  # the slot of what an input of products is written to


class ExactLayers:
    """The layers of a decoder, of which one is in memory at a time.

    Args:
        window: tokens that run at once.
        room: bytes that this may take; None: no limit.
    """

    def __init__(
        self, model: ModelFile, decoder: Decoder, window: int, n_threads: int, room: int | None
    ) -> None:
        self._model, self._decoder = model, decoder
        self._threads, self._room = n_threads, room
        self._shape = plans.Shape(window, window, n_threads)
        self._placed = {p.matrix.name: dense(p) for p in place(model, decoder, "f32")}
        self._target = replace(pick_target(None), bf16_dot=False)  # float32 throughout
        self._team: Team | None = None

    def close(self) -> None:
        """End the threads."""
        if self._team is not None:
            self._team.close()

    def placed(self, matrix: Matrix) -> PlacedMatrix:
        """A matrix of the decoder as float32."""
        return replace(self._placed[matrix.name], format=FORMATS["f32"])

    def open(
        self, layer: Layer, matrices: Collection[str], taken: int, progress: Progress | None
    ) -> OpenLayer:
        """A layer ready to run, with so many bytes `taken` beside it.

        Args:
            matrices: those that are loaded; what would read others must not run.

        Raises:
            BudgetError: it does not fit.
            KernelError: a kernel cannot be had.
            ModelFileError: the model cannot be read.
        """
        if self._team is None:
            needed = plans.kernels_of(self._decoder, self._placed.values(), self._target)
            store = shipped(needed, self._target) or KernelStore(self._target, self._threads)
            self._addresses = store.load(needed, progress)
            self._store = store  # the kernels go with it
            self._team = Team(self._addresses, self._threads)
        part, placed = self._part(layer)
        n_bytes = self.needed(layer, matrices, taken)
        if self._room is not None and n_bytes > self._room:
            raise too_little("calibrating a layer", n_bytes, self._room)
        weights = Weights(self._model, part, placed)
        with TensorReader() as reader:
            weights.load(reader, self._addresses, self._threads, only=matrices)
        programs = Programs(part, weights, self._target, self._addresses, self._shape)
        assert isinstance(layer.feed_forward, FeedForward)
        return OpenLayer(programs, layer.feed_forward, self._target, self._team)

    def needed(self, layer: Layer, matrices: Collection[str], taken: int) -> int:
        """Bytes that `open` takes."""
        part, placed = self._part(layer)
        sizes = plans.buffer_sizes(part, placed, self._target, self._shape)
        needed = taken + plans.kv_bytes(part, self._shape.context) + sum(sizes.values())
        needed += sum(p.n_bytes for p in placed if p.matrix.name in matrices)
        return needed + self._threads * _LOADING_BYTES

    def _part(self, layer: Layer) -> tuple[Decoder, list[PlacedMatrix]]:
        """The decoder that has this layer only, and its matrices."""
        d = self._decoder
        head, embedding = _cut(d.head), _cut(d.embedding)
        part = replace(d, layers=(layer,), head=head, embedding=embedding, vocabulary=head.rows)
        placed = []
        for matrix in part.matrices():
            whole = self._placed[matrix.name]
            placed.append(whole if whole.matrix == matrix else _cut_placed(whole, matrix))
        return part, placed


class OpenLayer:
    """A layer in memory.

    Attributes:
        x: the hidden states, and `block`: what attention or the feed-forward has made last,
            a row for each token, which is wider than the model where vectors end behind it.
    """

    # Where runs stop: when the inputs of these are ready.
    ATTENTION, OUTPUT, FEED_FORWARD, DOWN, END = range(5)

    def __init__(
        self, programs: Programs, feed_forward: FeedForward, target: Target, team: Team
    ) -> None:
        self._programs, self._target, self._team = programs, target, team
        self._runs = list(_runs(programs, feed_forward.producer))
        self._tokens = 0
        self.x, self.block = programs.floats("x"), programs.floats("block")
        self.x[:] = 0

    def begin(self, tokens: int) -> None:
        """So many tokens run, whose hidden states are the first rows of `x`."""
        self._programs.say(tokens, 0, tokens)
        self._tokens = tokens

    def run(self, to: int) -> None:
        """Go on to the next stop; at `END` what the layer has made is part of `x`."""
        self._team.run(self._runs[to], interruptible=True)

    def begin_behind_attention(self, tokens: int) -> None:
        """Go on at `FEED_FORWARD`: `x` has what attention has made already."""
        self.begin(tokens)
        self.block[:tokens] = 0
        steps = self._runs[self.FEED_FORWARD]
        self._team.run(np.ascontiguousarray(steps[-1:]), interruptible=True)

    def inputs(self, columns: int) -> Floats:
        """The input that lies ready for matrices: float32 [columns, tokens]."""
        group = self._target.tokens("f32")
        n = -(-self._tokens // group)
        flat = self._programs.floats("input_f32").reshape(-1)[: n * columns * group]
        by_column = flat.reshape(n, columns, group).transpose(1, 0, 2).reshape(columns, n * group)
        return np.ascontiguousarray(by_column[:, : self._tokens])


def _runs(programs: Programs, producer: str) -> Iterator[np.ndarray]:
    """The steps of a layer, cut behind those that make an input of matrices.

    The last run ends with the norm in front of the head, which adds what the layer made to x.
    """
    producers = {f"{name}_f32" for name in ("norm", "copy", producer)}
    program, begin = programs.prefill, 1  # behind the embedding
    made = programs.buffer("input_f32", True)
    for i, kernel in enumerate(program.kernels):
        slots = (int(program.table[i, 1]) - program.blocks.ctypes.data) // 8
        # Norms of queries and keys write to where they read.
        if kernel in producers and program.blocks[slots + _TO] == made:
            yield np.ascontiguousarray(program.table[begin : i + 1])
            begin = i + 1


def _cut(matrix: Matrix) -> Matrix:
    return replace(matrix, rows=min(matrix.rows, _END_ROWS))


def _cut_placed(placed: PlacedMatrix, matrix: Matrix) -> PlacedMatrix:
    """The first rows of a matrix of the file."""
    info, tiled = placed.info, tiled_format(placed.info)
    n_bytes = (
        info.n_bytes // placed.matrix.rows * matrix.rows
        if tiled is None
        else tiled.tiled_bytes(matrix.rows, matrix.columns)
    )
    cut = replace(info, shape=(matrix.rows, matrix.columns), n_bytes=n_bytes)
    return replace(placed, matrix=matrix, info=cut)
