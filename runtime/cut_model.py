"""A dense model written with its feed-forwards cut: into experts, or into clusters of neurons."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np

from headrace.calibration import LayerInputs
from headrace.errors import UnsupportedError
from headrace.families.decoder import Decoder, FeedForward, Layer, Matrix
from headrace.least_memory import Need
from headrace.loaders.gguf import ModelFile, TensorInfo, TensorReader
from headrace.loaders.tiled import Entry, tiled_type
from headrace.partial_file import PartialFile
from headrace.placing import dense
from headrace.pruning import PrunedMatrix
from headrace.recipe import Recipe
from headrace.rows import raw_rows, read_as_it_is, row_ranges
from headrace.sparse.format import Floats, Format
from headrace.sparse.reach import beyond
from headrace.sparse.registry import FORMATS

# What cutting takes for each weight of a matrix: float32 twice, and as it is written.
BYTES_PER_WEIGHT = 12


@dataclass(frozen=True)
class Made:
    """A tensor that is not in the source: how it comes about is the subclass's business."""

    layer: int


@dataclass(frozen=True)
class Slice(Made):
    """Some neurons of one matrix of a dense layer.

    Attributes:
        part: "gate", "up" or "down".
        number: of the expert or cluster that they are; None: they are of none.
        format: in which they are written.
    """

    part: str
    number: int | None
    format: Format


Source: TypeAlias = Recipe | TensorInfo | Made


class CutModel(ABC):
    """A dense model to be written with other feed-forwards.

    Attributes:
        entries: the tensors of the file.
        metadata: keys of the file that replace the source's or are new.
    """

    metadata: dict[str, str | float]

    def __init__(
        self, decoder: Decoder, entries: list[Entry], sources: list[Recipe | TensorInfo]
    ) -> None:
        """Lay out the file.

        Args:
            entries, sources: what the file would have if the model stayed as it is.
        """
        self._decoder = decoder
        self._layer_of = {
            matrix.name: (i, part)
            for i, layer in enumerate(decoder.layers)
            for part, matrix in parts_of(layer)
        }
        self._placed = {
            one.placed.matrix.name: dense(one.placed)
            for one in sources
            if isinstance(one, Recipe) and not isinstance(one.placed, PrunedMatrix)
        }
        self.entries, self._sources = list[Entry](), list[Source]()
        for entry, source in zip(entries, sources, strict=True):
            i, part = self._layer_of.get(entry.name, (0, ""))
            if not part:
                self.entries.append(entry)
                self._sources.append(source)
            elif part == "gate":
                for more, made in self._of_layer(i):
                    self.entries.append(more)
                    self._sources.append(made)

    @abstractmethod
    def _of_layer(self, index: int) -> list[tuple[Entry, Made]]:
        """What becomes of a feed-forward, in the order of a pass."""

    @abstractmethod
    def needs(self, inputs: LayerInputs) -> list[Need]:
        """What the work takes at a time."""

    @abstractmethod
    def remarks(self) -> list[str]:
        """What is not as it was asked for."""

    @abstractmethod
    def _write_layer(
        self, file: PartialFile, places: Mapping[int, int], ours: list[int], index: int,
        inputs: LayerInputs, reader: TensorReader, n_threads: int,
    ) -> None:  # fmt: skip
        """Write the tensors `ours` of a layer, which are all that are made for it."""

    def _write_slices(
        self, file: PartialFile, places: Mapping[int, int], ours: list[int], index: int,
        reader: TensorReader, neurons: Callable[[int | None], np.ndarray],
        correction: Floats | None = None,
    ) -> None:  # fmt: skip
        """Write the slices among the tensors of a layer, of one matrix after the other.

        Args:
            neurons: gives those of a slice by its number.
            correction: to be added to down of the slice that has no number.
        """
        for part, matrix in parts_of(self._decoder.layers[index]):
            whole = self._whole(reader, matrix)
            for at in ours:
                source = self._sources[at]
                if isinstance(source, Slice) and source.part == part:
                    those = neurons(source.number)
                    some = whole[:, those] if part == "down" else whole[those]
                    if part == "down" and source.number is None and correction is not None:
                        some = some + correction
                    file.write(places[at], tiles(some, source.format, matrix))

    def write(
        self, file: PartialFile, places: Mapping[int, int], inputs: LayerInputs,
        reader: TensorReader, n_threads: int, wrote: Callable[[int], None],
    ) -> None:  # fmt: skip
        """Write all tensors that `file` has not yet; what is made for a layer is done together.

        Args:
            places: of the tensors in the file.
            wrote: called with the number of a tensor when it and all before it are written.
        """
        i = file.done
        while i < len(self.entries):
            source = self._sources[i]
            if isinstance(source, Made):
                layer = source.layer
                ours = [
                    at for at, one in enumerate(self._sources)
                    if isinstance(one, Made) and one.layer == layer
                ]  # fmt: skip
                self._write_layer(file, places, ours, layer, inputs, reader, n_threads)
                i = ours[-1]
            else:
                at = places[i]
                kept = source.placed if isinstance(source, Recipe) else source
                assert not isinstance(kept, PrunedMatrix)
                for data in read_as_it_is(reader, kept):
                    file.write(at, data)
                    at += data.nbytes
            wrote(i)
            i += 1

    def _cutting(self) -> Need:
        """What cutting the largest matrix takes."""
        widest = max(m.rows * m.columns for one in self._decoder.layers for _, m in parts_of(one))
        return "cutting the matrices of a feed-forward", BYTES_PER_WEIGHT * widest

    def _kept(self, matrix: Matrix) -> Format:
        """In which floats parts of a matrix are written: those of the file, else float16."""
        fmt = self._placed[matrix.name].format
        return fmt if fmt.name in ("f32", "bf16") else FORMATS["f16"]

    def _whole(self, reader: TensorReader, matrix: Matrix) -> Floats:
        """A matrix of the source: float32 [rows, columns]."""
        placed = replace(self._placed[matrix.name], format=FORMATS["f32"])
        found = np.empty((matrix.rows, matrix.columns), np.float32)
        for first, last in row_ranges(placed, 0, matrix.rows):
            raw = raw_rows(reader, placed, first, last).view(np.float32)
            found[first:last] = raw[: last - first]
        return found


def dense_parts(model: ModelFile, decoder: Decoder) -> FeedForward:
    """The feed-forward of the first layer of a model that can be cut: all have its sizes.

    Raises:
        UnsupportedError: it cannot be: it is cut already, or its feed-forwards have biases.
    """
    if decoder.mixtures():
        raise UnsupportedError("is a mixture of experts already", path=model.paths[0])
    if decoder.clustered():
        raise UnsupportedError("is cut into clusters of neurons already", path=model.paths[0])
    for layer in decoder.layers:
        for matrix in layer.feed_forward.matrices():
            if matrix.bias is not None:
                raise UnsupportedError(
                    "feed-forwards with biases cannot be cut",
                    path=model.paths[0], tensor=matrix.bias,
                )  # fmt: skip
    feed_forward = decoder.layers[0].feed_forward
    assert isinstance(feed_forward, FeedForward)
    if feed_forward.gate is None:
        raise UnsupportedError(
            "feed-forwards without a gate cannot be cut into experts", path=model.paths[0]
        )
    return feed_forward


def parts_of(layer: Layer) -> list[tuple[str, Matrix]]:
    """The matrices of a dense layer's feed-forward by part."""
    f = layer.feed_forward
    assert isinstance(f, FeedForward) and f.gate is not None
    return [("gate", f.gate), ("up", f.up), ("down", f.down)]


def tiled(name: str, rows: int, columns: int, fmt: str, source: Made) -> tuple[Entry, Made]:
    """A matrix of the file, tiled."""
    n_bytes = FORMATS[fmt].tiled_bytes(rows, columns)
    return Entry(name, tiled_type(fmt), (rows, columns), n_bytes, fmt), source


def tiles(x: Floats, fmt: Format, matrix: Matrix) -> np.ndarray:
    """The bytes of some of a matrix, tiled.

    Raises:
        UnsupportedError: a weight is beyond what the format holds.
    """
    most = beyond(x, fmt, fmt.encode)
    if most is not None:
        raise UnsupportedError(
            f"a weight of {most:.6g} is beyond what {fmt.name} holds, in which it is written",
            tensor=matrix.name,
        )
    return fmt.tile(fmt.encode(np.ascontiguousarray(x))).reshape(-1)
