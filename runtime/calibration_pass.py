"""A text going through a model's layers in turn, while what their matrices read is added up.

Between layers, hidden states lie in a file. All tokens go through a layer as far as they all do;
then through each expert of a mixture those that have chosen it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from headrace.exact_layers import ExactLayers, OpenLayer
from headrace.families.decoder import Decoder, Experts, FeedForward, Layer, Matrix
from headrace.kernels.experts import choose
from headrace.loaders.gguf import ModelFile, TensorReader
from headrace.loaders.progress import Progress
from headrace.mixture_steps import WEIGHTING
from headrace.row_file import RowFile
from headrace.rows import raw_row, raw_rows
from headrace.share import share
from headrace.sparse.format import Floats

# Called with a layer's index, the first of some tokens, what a mixture's experts read (hidden states
# before their norm), and which of them tokens choose; before the first layer with embeddings.
Listener = Callable[[int, int, Floats, np.ndarray | None], None]

_SQUARE = 512  # of sums, that a thread adds to at once


@dataclass(frozen=True)
class Unit:
    """What is in memory at a time: a layer, or one expert of a mixture.

    Attributes:
        index: of the layer.
        expert: of the mixture; None: the layer, as far as all tokens go through it.
        layer: with the feed-forward that is computed. A mixture without a shared expert has none
            that all tokens go through: then it is one that is not computed.
        readers: the matrices by what they read, in the order of a pass.
    """

    index: int
    expert: int | None
    layer: Layer
    readers: tuple[tuple[Matrix, ...], ...]

    @property
    def name(self) -> str:
        """Of what is kept of it."""
        expert = "" if self.expert is None else f"-expert-{self.expert}"
        return f"layer-{self.index}{expert}"

    @cached_property
    def sizes(self) -> list[int]:
        """Columns of each matrix of sums; the last one of an expert's counts its tokens."""
        sizes = [matrices[0].columns for matrices in self.readers]
        return sizes if self.expert is None else [*sizes, 1]

    @property
    def n_bytes(self) -> int:
        """Of its sums."""
        return sum(4 * n * n for n in self.sizes)

    @cached_property
    def matrices(self) -> frozenset[str]:
        """Those that are read while it runs."""
        return frozenset(m.name for matrices in self.readers for m in matrices)


def units_of(decoder: Decoder) -> list[Unit]:
    """All of a decoder's layers, in the order of a pass."""
    found = []
    for i, layer in enumerate(decoder.layers):
        a, f = layer.attention, layer.feed_forward
        attention = ((a.query, a.key, a.value), (a.output,))
        if not isinstance(f, Experts):
            found.append(Unit(i, None, layer, (*attention, *_readers(f))))
            continue
        of_all = () if f.shared is None else _readers(f.shared)
        common = replace(layer, feed_forward=f.shared or f.each[0])
        found.append(Unit(i, None, common, (*attention, *of_all)))
        for e, one in enumerate(f.each):
            found.append(Unit(i, e, replace(layer, feed_forward=one), _readers(one)))
    return found


def _readers(f: FeedForward) -> tuple[tuple[Matrix, ...], ...]:
    return (f.gate, f.up), (f.down,)


class CalibrationPass:
    """The pass of a text, a unit after the other.

    Args:
        ids: int64 [windows, tokens].
        room: bytes that this may take at a time; None: no limit.
        folder: for the files of hidden states.
        listener: is told what tokens choose.
    """

    def __init__(
        self, model: ModelFile, decoder: Decoder, ids: np.ndarray, n_threads: int,
        room: int | None, folder: Path, listener: Listener | None = None,
    ) -> None:  # fmt: skip
        self._decoder, self._ids, self._folder = decoder, ids, folder
        self._threads, self._listener = n_threads, listener
        self.layers = ExactLayers(model, decoder, ids.shape[1], n_threads, room)
        self._hidden: RowFile | None = None
        # Of a mixture: what experts read, which of them each token takes, and how much of each.
        self._read: RowFile | None = None
        self._chosen = np.empty((0, 0), np.int16)
        self._weights = np.empty((0, 0), np.float32)

    def close(self) -> None:
        """End the threads; the files are gone."""
        for file in (self._hidden, self._read):
            if file is not None:
                file.close()
        self.layers.close()

    def held(self, unit: Unit) -> int:
        """Bytes of what is in memory while the statistics of a unit are."""
        f = self._decoder.layers[unit.index].feed_forward
        choices = self._ids.size * f.active if isinstance(f, Experts) else 0
        return unit.n_bytes + choices * (self._chosen.itemsize + self._weights.itemsize)

    def run(
        self, unit: Unit, collect: bool, report: Callable[[float], None], progress: Progress | None
    ) -> list[Floats]:
        """Bring all tokens through the next unit: the sums of x x^T of what its readers read.

        Args:
            collect: without it sums are empty.
            report: called with the share that is done.
            progress: of loading kernels.

        Raises:
            what `ExactLayers.open` raises; HeadraceError: hidden states cannot be kept.
        """
        if self._hidden is None:
            self._hidden = self._embedded()
        sums = [np.zeros((n, n) if collect else (0, 0), np.float32) for n in unit.sizes]
        taken = self.held(unit) - (0 if collect else unit.n_bytes)
        layer = self.layers.open(unit.layer, unit.matrices, taken, progress)
        f = self._decoder.layers[unit.index].feed_forward
        if unit.expert is not None:
            self._expert(unit.expert, layer, self._hidden, sums, report)
        elif isinstance(f, Experts):
            self._common(unit.index, f, layer, self._hidden, sums, report)
        else:
            self._layer(layer, self._hidden, sums, report)
        for h in sums:
            for at in range(0, len(h), _SQUARE):
                h[at:, at : at + _SQUARE] = h[at : at + _SQUARE, at:].T
        return sums

    def _layer(
        self, layer: OpenLayer, hidden: RowFile, sums: Sequence[Floats],
        report: Callable[[float], None],
    ) -> None:  # fmt: skip
        n, window = self._ids.shape
        x = layer.x[:window, : self._decoder.width]
        for i in range(n):
            x[:] = hidden.read(i * window, window)
            layer.begin(window)
            for stop in range(layer.END):
                self._run_to(stop, layer, sums[stop])
            layer.run(layer.END)
            hidden.write(i * window, x)
            report((i + 1) / n)

    def _common(
        self, index: int, mixture: Experts, layer: OpenLayer, hidden: RowFile, sums: Sequence[Floats],
        report: Callable[[float], None],
    ) -> None:  # fmt: skip
        """A layer up to its experts, and the shared one."""
        (n, window), width = self._ids.shape, self._decoder.width
        router, gate = self._weights_of(mixture.router), self._weights_of(mixture.shared_gate)
        if self._read is None:
            self._read = RowFile(self._folder, width)
        self._chosen = np.empty((n * window, mixture.active), np.int16)
        self._weights = np.empty((n * window, mixture.active), np.float32)
        x, none = layer.x[:window, :width], np.empty((0, 0), np.float32)
        for i in range(n):
            x[:] = hidden.read(i * window, window)
            layer.begin(window)
            for stop in (layer.ATTENTION, layer.OUTPUT):
                self._run_to(stop, layer, sums[stop])
            shared = mixture.shared is not None
            self._run_to(layer.FEED_FORWARD, layer, sums[layer.FEED_FORWARD] if shared else none)
            normal, here = layer.inputs(width).T, slice(i * window, (i + 1) * window)
            self._read.write(here.start, x)
            logits = normal @ router.T
            self._chosen[here], self._weights[here] = choose(
                logits, mixture.active, WEIGHTING[mixture.weighting]
            )
            if self._listener is not None:
                self._listener(index, here.start, x, self._chosen[here])
            out = x.copy()
            if shared:
                self._run_to(layer.DOWN, layer, sums[layer.DOWN])
                layer.run(layer.END)
                weight = 1.0 if not len(gate) else 1 / (1 + np.exp(-(normal @ gate.T)))
                out += weight * layer.block[:window, :width]
            hidden.write(here.start, out)
            report((i + 1) / n)

    def _expert(
        self, expert: int, layer: OpenLayer, hidden: RowFile, sums: Sequence[Floats],
        report: Callable[[float], None],
    ) -> None:  # fmt: skip
        """The tokens that have chosen an expert."""
        assert self._read is not None
        tokens, place = np.nonzero(self._chosen == expert)
        of_inputs, of_down, count = sums
        count[:] = len(tokens)
        window, width = self._ids.shape[1], self._decoder.width
        for first in range(0, len(tokens), window):
            some = tokens[first : first + window]
            n = len(some)
            self._read.gather(some, layer.x[:n, :width])
            layer.begin_behind_attention(n)
            self._add(layer, of_inputs)
            self._run_to(layer.DOWN, layer, of_down)
            layer.run(layer.END)
            weights = self._weights[some, place[first : first + window], None]
            hidden.add(some, weights * layer.block[:n, :width])
            report((first + n) / len(tokens))

    def _run_to(self, stop: int, layer: OpenLayer, h: Floats) -> None:
        layer.run(stop)
        self._add(layer, h)

    def _add(self, layer: OpenLayer, h: Floats) -> None:
        """h += x x^T for the input x that lies ready, in squares of the upper triangle."""
        if not len(h):
            return
        x, starts = layer.inputs(len(h)), range(0, len(h), _SQUARE)

        def add(square: tuple[int, int]) -> None:
            i, j = (slice(at, at + _SQUARE) for at in square)
            h[i, j] += x[i] @ x[j].T

        jobs = [(i, j) for i in starts for j in starts if j >= i]
        share(jobs, add, self._threads, lambda: None)

    def _weights_of(self, matrix: Matrix | None) -> Floats:
        if matrix is None:
            return np.empty((0, self._decoder.width), np.float32)
        with TensorReader() as reader:
            rows = raw_rows(reader, self.layers.placed(matrix), 0, matrix.rows)
        found: Floats = rows[: matrix.rows].view(np.float32)
        return found

    def _embedded(self) -> RowFile:
        d = self._decoder
        placed = self.layers.placed(d.embedding)
        used, where = np.unique(self._ids, return_inverse=True)
        rows = np.empty((len(used), d.width), np.float32)
        with TensorReader() as reader:
            for at, row in enumerate(used.tolist()):
                rows[at] = raw_row(reader, placed, row).view(np.float32)
        rows *= np.float32(d.embedding_scale)
        file, window = RowFile(self._folder, d.width), self._ids.shape[1]
        for i, some in enumerate(where.reshape(self._ids.shape)):
            file.write(i * window, rows[some])
            if self._listener is not None:
                self._listener(-1, i * window, rows[some], None)
        return file
