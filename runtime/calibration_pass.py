"""A text going through a model's layers in turn, while what their matrices read is added up.

Between layers, hidden states lie in a file. All tokens go through a layer as far as they all do;
then through each expert of a mixture those that have chosen it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np

from headrace.exact_layers import ExactLayers, OpenLayer
from headrace.families.decoder import (
    Decoder,
    Experts,
    FeedForward,
    Layer,
    Matrix,
    NeuronClusters,
    ZeroComputation,
)
from headrace.kernels.experts import choose
from headrace.loaders.gguf import ModelFile, TensorReader
from headrace.loaders.progress import Progress
from headrace.mixture_steps import WEIGHTING
from headrace.router_weights import read_router
from headrace.row_file import RowFile
from headrace.rows import float_matrix, raw_row, read_vector
from headrace.share import share
from headrace.sparse.format import Floats

# Called with a layer's index, the first of some tokens, what a mixture's experts read (hidden
# states before their norm), and which of them tokens choose; before all layers with embeddings.
Listener = Callable[[int, int, Floats, np.ndarray | None], None]

Read = Callable[[], Floats]
See = Callable[[int, int, Read], None]

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
        assert not isinstance(f, NeuronClusters)  # `compress` refuses them
        if not isinstance(f, Experts):
            found.append(Unit(i, None, layer, (*attention, *_readers(f))))
            continue
        of_all = () if f.shared is None else _readers(f.shared)
        common = replace(layer, feed_forward=f.shared or f.computed[0])
        found.append(Unit(i, None, common, (*attention, *of_all)))
        read = replace(layer, feed_forward_norm=layer.expert_norm)
        for e, one in enumerate(f.computed):
            found.append(Unit(i, e, replace(read, feed_forward=one), _readers(one)))
    return found


def _readers(f: FeedForward) -> tuple[tuple[Matrix, ...], ...]:
    return f.readers(), (f.down,)


def add_products(h: Floats, x: Floats, n_threads: int) -> None:
    """h += x x^T for float32 x [n, tokens], in squares of the upper triangle."""
    starts = range(0, len(h), _SQUARE)

    def add(square: tuple[int, int]) -> None:
        i, j = (slice(at, at + _SQUARE) for at in square)
        h[i, j] += x[i] @ x[j].T

    share([(i, j) for i in starts for j in starts if j >= i], add, n_threads, lambda: None)


def mirror(h: Floats) -> None:
    """Fill in what `add_products` leaves out."""
    for at in range(0, len(h), _SQUARE):
        h[at:, at : at + _SQUARE] = h[at : at + _SQUARE, at:].T


def _said(
    one: ZeroComputation, mix: Floats | None = None, constant: Floats | None = None
) -> Callable[[Floats], Floats]:
    """See `headrace.kernels.zero_computation`."""

    def said(x: Floats) -> Floats:
        if mix is None or constant is None:
            return x if one.kind == "copy" else np.zeros_like(x)
        above: Floats = x @ (mix[: x.shape[1]] - mix[x.shape[1] :])
        share = (1 / (1 + np.exp(-above)))[:, None]
        return share * x + (1 - share) * constant

    return said


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
        self._model, self._decoder = model, decoder
        self._ids, self._folder = ids, folder
        self._threads, self._listener = n_threads, listener
        self.layers = ExactLayers(model, decoder, ids.shape[1], n_threads, room)
        self._hidden: RowFile | None = None
        # Of a mixture: what experts read, which of them each token takes, and how much of each.
        self._read: RowFile | None = None
        self._chosen = np.empty((0, 0), np.int16)
        self._weights = np.empty((0, 0), np.float32)
        # Logits of the last mixture, where those of the next one are made of them, too.
        routed = decoder.mixtures().values()
        mapped = any(one.router_map is not None for one in routed)
        most = max((len(one.each) for one in routed), default=0)
        self._logits = np.zeros((ids.size if mapped else 0, most), np.float32)

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
        kept = choices * (self._chosen.itemsize + self._weights.itemsize)
        return unit.n_bytes + kept + self._logits.nbytes

    def run(
        self, unit: Unit, taken: int, see: See, report: Callable[[float], None],
        progress: Progress | None,
    ) -> None:  # fmt: skip
        """Bring all tokens through the next unit, and let `see` look at what its matrices read.

        Args:
            taken: bytes in use beside that.
            see: called with a window, the place of those that read among the unit's readers, and
                what gives what they do. Windows of an expert have tokens of several others.
            report: called with the share that is done.
            progress: of loading kernels.

        Raises:
            what `ExactLayers.open` raises; HeadraceError: hidden states cannot be kept.
        """
        if self._hidden is None:
            self._hidden = self._embedded()
        layer = self.layers.open(unit.layer, unit.matrices, taken, progress)
        f = self._decoder.layers[unit.index].feed_forward
        if unit.expert is not None:
            self._expert(unit, layer, self._hidden, see, report)
        elif isinstance(f, Experts):
            self._common(unit, f, layer, self._hidden, see, report)
        else:
            self._layer(unit, layer, self._hidden, see, report)

    def _layer(
        self, unit: Unit, layer: OpenLayer, hidden: RowFile, see: See,
        report: Callable[[float], None],
    ) -> None:  # fmt: skip
        n, window = self._ids.shape
        x = layer.x[:window, : self._decoder.width]
        for i in range(n):
            x[:] = hidden.read(i * window, window)
            layer.begin(window)
            for stop in range(layer.END):
                layer.run(stop)
                see(i, stop, partial(layer.inputs, unit.sizes[stop]))
            layer.run(layer.END)
            hidden.write(i * window, x)
            report((i + 1) / n)

    def _common(
        self, unit: Unit, mixture: Experts, layer: OpenLayer, hidden: RowFile, see: See,
        report: Callable[[float], None],
    ) -> None:  # fmt: skip
        """A layer up to its experts, and the shared one."""
        (n, window), width = self._ids.shape, self._decoder.width
        router, (gate, _) = read_router(self._model, mixture), self._weights_of(mixture.shared_gate)
        idle = self._idle_of(mixture)
        if self._read is None:
            self._read = RowFile(self._folder, width)
        self._chosen = np.empty((n * window, mixture.active), np.int16)
        self._weights = np.empty((n * window, mixture.active), np.float32)
        x = layer.x[:window, :width]
        for i in range(n):
            x[:] = hidden.read(i * window, window)
            layer.begin(window)
            for stop in (layer.ATTENTION, layer.OUTPUT, layer.FEED_FORWARD):
                layer.run(stop)
                if stop < len(unit.readers):
                    see(i, stop, partial(layer.inputs, unit.sizes[stop]))
            normal, here = layer.inputs(width).T, slice(i * window, (i + 1) * window)
            self._read.write(here.start, x)
            logits = router.logits(normal, self._logits[here] if len(self._logits) else None)
            if len(self._logits):
                self._logits[here] = logits
            self._chosen[here], self._weights[here] = choose(
                logits, mixture.active, WEIGHTING[mixture.weighting]
            )
            if self._listener is not None:
                self._listener(unit.index, here.start, x, self._chosen[here])
            out = x.copy()
            if mixture.shared is not None:
                layer.run(layer.DOWN)
                see(i, layer.DOWN, partial(layer.inputs, unit.sizes[layer.DOWN]))
                layer.run(layer.END)
                weight = 1.0 if not len(gate) else 1 / (1 + np.exp(-(normal @ gate.T)))
                out += weight * layer.block[:window, :width]
            for e, said in idle.items():
                tokens, place = np.nonzero(self._chosen[here] == e)
                weights = self._weights[here][tokens, place, None]
                out[tokens] += weights * said(normal[tokens] * np.float32(mixture.input_scale))
            hidden.write(here.start, out)
            report((i + 1) / n)

    def chosen(self, expert: int) -> tuple[np.ndarray, np.ndarray]:
        """The tokens of the last layer that choose an expert, and its weights for them."""
        tokens, place = np.nonzero(self._chosen == expert)
        return tokens, self._weights[tokens, place]

    def _expert(
        self, unit: Unit, layer: OpenLayer, hidden: RowFile, see: See,
        report: Callable[[float], None],
    ) -> None:  # fmt: skip
        """The tokens that have chosen an expert."""
        assert self._read is not None and unit.expert is not None
        tokens, shares = self.chosen(unit.expert)
        window, width = self._ids.shape[1], self._decoder.width
        for first in range(0, len(tokens), window):
            some = tokens[first : first + window]
            n = len(some)
            self._read.gather(some, layer.x[:n, :width])
            layer.begin_behind_attention(n)
            see(first // window, 0, partial(layer.inputs, unit.sizes[0]))
            layer.run(layer.DOWN)
            see(first // window, 1, partial(layer.inputs, unit.sizes[1]))
            layer.run(layer.END)
            weights = shares[first : first + window, None]
            hidden.add(some, weights * layer.block[:n, :width])
            report((first + n) / len(tokens))

    def _idle_of(self, mixture: Experts) -> dict[int, Callable[[Floats], Floats]]:
        """What experts without a feed-forward make of rows of inputs, by their numbers."""
        with TensorReader() as reader:
            return {
                e: _said(one, *(read_vector(self._model, reader, v) for v in one.vectors()))
                for e, one in enumerate(mixture.idle, len(mixture.computed))
            }

    def _weights_of(self, matrix: Matrix | None) -> tuple[Floats, Floats]:
        if matrix is None:
            return np.empty((0, self._decoder.width), np.float32), np.empty(0, np.float32)
        with TensorReader() as reader:
            return float_matrix(self._model, reader, matrix)

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
