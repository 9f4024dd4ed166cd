"""Write a dense model as a mixture of experts: see `headrace.refactor_experts`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np

from headrace.calibration import LayerInputs
from headrace.errors import UnsupportedError
from headrace.families import headrace_moe as keys
from headrace.families.decoder import Decoder, FeedForward, Layer, Matrix
from headrace.least_memory import Need
from headrace.loaders.expert_tensors import expert_name
from headrace.loaders.gguf import ModelFile, TensorInfo, TensorReader
from headrace.loaders.tiled import Entry, tiled_type
from headrace.partial_file import PartialFile
from headrace.placing import dense
from headrace.pruning import PrunedMatrix
from headrace.recipe import Recipe
from headrace.refactor_experts import (
    ACTIVE,
    EXPERTS,
    SHARED,
    STEP,
    Cut,
    Parts,
    nearest_cut,
    needs,
    parts_of,
)
from headrace.rows import raw_rows, read_as_it_is, row_ranges
from headrace.sparse.format import Floats, Format
from headrace.sparse.reach import beyond
from headrace.sparse.registry import FORMATS

# What cutting takes for each weight of a matrix: float32 twice, and as it is written.
_BYTES_PER_WEIGHT = 12


@dataclass(frozen=True)
class _Router:
    """The router of a layer (or its bias), which is not in the source."""

    layer: int
    bias: bool = False


@dataclass(frozen=True)
class _Slice:
    """Some neurons of one matrix of a dense layer; `expert` None: those of the shared part."""

    layer: int
    part: str
    expert: int | None
    format: Format


_Source: TypeAlias = Recipe | TensorInfo | _Router | _Slice


def cut_of(
    model: ModelFile, decoder: Decoder, experts: int | None, active: int | None,
    shared: float | None, fit_shared: bool,
) -> Cut:  # fmt: skip
    """How a model is cut into experts; None: as usual.

    Raises:
        UnsupportedError: it cannot be: it is a mixture already, or its feed-forwards have biases,
            or no gate.
    """
    if decoder.mixtures():
        raise UnsupportedError("is a mixture of experts already", path=model.paths[0])
    for layer in decoder.layers:
        for matrix in layer.feed_forward.matrices():
            if matrix.bias is not None:
                raise UnsupportedError(
                    "feed-forwards with biases cannot be cut into experts",
                    path=model.paths[0], tensor=matrix.bias,
                )  # fmt: skip
    feed_forward = decoder.layers[0].feed_forward
    assert isinstance(feed_forward, FeedForward)
    if feed_forward.gate is None:
        raise UnsupportedError(
            "feed-forwards without a gate cannot be cut into experts", path=model.paths[0]
        )
    return nearest_cut(
        feed_forward.inner,
        EXPERTS if experts is None else experts,
        ACTIVE if active is None else active,
        SHARED if shared is None else shared,
        fit_shared,
    )


def _metadata(model: ModelFile, cut: Cut) -> dict[str, str | float]:
    return {
        "general.architecture": keys.ARCHITECTURE,
        keys.BASE_KEY: model.get("general.architecture", str),
        keys.COUNT_KEY: cut.experts,
        keys.USED_KEY: cut.active,
        keys.INNER_KEY: cut.inner,
        keys.SHARED_KEY: cut.shared,
    }


class Mixture:
    """A dense model to be written as a mixture.

    Attributes:
        entries: the tensors of the file.
        metadata: keys of the file that replace the source's or are new.
    """

    def __init__(
        self, model: ModelFile, decoder: Decoder, cut: Cut, entries: list[Entry],
        sources: list[Recipe | TensorInfo],
    ) -> None:  # fmt: skip
        """Lay out the file.

        Args:
            entries, sources: what the file would have if the model stayed dense.
        """
        self._decoder, self._cut = decoder, cut
        self.metadata = _metadata(model, cut)
        self._layer_of = {
            matrix.name: (i, part)
            for i, layer in enumerate(decoder.layers)
            for part, matrix in _parts(layer)
        }
        self._placed = {
            one.placed.matrix.name: dense(one.placed)
            for one in sources
            if isinstance(one, Recipe) and not isinstance(one.placed, PrunedMatrix)
        }
        self.entries, self._sources = list[Entry](), list[_Source]()
        for entry, source in zip(entries, sources, strict=True):
            i, part = self._layer_of.get(entry.name, (0, ""))
            if not part:
                self.entries.append(entry)
                self._sources.append(source)
            elif part == "gate":
                for more, made in self._of_layer(i):
                    self.entries.append(more)
                    self._sources.append(made)

    def _of_layer(self, index: int) -> list[tuple[Entry, _Source]]:
        """What becomes of a feed-forward, in the order of a pass."""
        cut, d, block = self._cut, self._decoder, f"blk.{index}"
        made: list[tuple[Entry, _Source]] = [
            _tiled(f"{block}.ffn_gate_inp.weight", cut.experts, d.width, "f32", _Router(index)),
            (
                Entry(f"{block}.ffn_gate_inp.bias", "F32", (cut.experts,), 4 * cut.experts),
                _Router(index, bias=True),
            ),
        ]
        kinds = {
            part: _kept(self._placed[matrix.name].format)
            for part, matrix in _parts(d.layers[index])
        }

        def add(name: str, part: str, expert: int | None, inner: int) -> None:
            rows, columns = (d.width, inner) if part == "down" else (inner, d.width)
            source = _Slice(index, part, expert, kinds[part])
            made.append(_tiled(name, rows, columns, kinds[part].name, source))

        for part in kinds:
            if cut.shared:
                add(f"{block}.ffn_{part}_shexp.weight", part, None, cut.shared)
        for expert in range(cut.experts):
            for part in kinds:
                add(expert_name(index, part, expert), part, expert, cut.inner)
        return made

    def needs(self, inputs: LayerInputs) -> list[Need]:
        """What the work takes at a time."""
        widest = max(m.rows * m.columns for one in self._decoder.layers for _, m in _parts(one))
        held = [(what, n) for what, n in needs(inputs, self._decoder.layers, self._cut)]
        return [*held, ("cutting a matrix into experts", _BYTES_PER_WEIGHT * widest)]

    def remarks(self, wanted: float | None) -> list[str]:
        """What is not as it was asked for."""
        share = self._cut.shared / self._cut.neurons
        if wanted is None or abs(share - wanted) < 0.5 / self._cut.neurons:
            return []
        return [
            f"the shared part has {self._cut.shared:,} of {self._cut.neurons:,} neurons (a share "
            f"of {share:.3f}): {self._cut.experts} experts get {self._cut.inner} each, a multiple "
            f"of {STEP}"
        ]

    def write(
        self, file: PartialFile, places: Mapping[int, int], inputs: LayerInputs,
        reader: TensorReader, n_threads: int, wrote: Callable[[int], None],
    ) -> None:  # fmt: skip
        """Write all tensors that `file` has not yet; a layer's experts are done together.

        Args:
            places: of the tensors in the file.
            wrote: called with the number of a tensor when it and all before it are written.
        """
        i = file.done
        while i < len(self.entries):
            source = self._sources[i]
            if isinstance(source, (_Router, _Slice)):
                layer = source.layer
                ours = [
                    at for at, one in enumerate(self._sources)
                    if isinstance(one, (_Router, _Slice)) and one.layer == layer
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

    def _write_layer(
        self, file: PartialFile, places: Mapping[int, int], ours: list[int], index: int,
        inputs: LayerInputs, reader: TensorReader, n_threads: int,
    ) -> None:  # fmt: skip
        layer = self._decoder.layers[index]
        matrices = dict(_parts(layer))
        down = self._whole(reader, matrices["down"])
        parts = parts_of(inputs, index, layer, down, self._cut, n_threads)
        del down
        for at in ours:
            source = self._sources[at]
            if isinstance(source, _Router):
                data = parts.bias if source.bias else _tiles(FORMATS["f32"], parts.router)
                file.write(places[at], np.ascontiguousarray(data).view(np.uint8).reshape(-1))
        for part, matrix in matrices.items():
            whole = self._whole(reader, matrix)
            for at in ours:
                source = self._sources[at]
                if isinstance(source, _Slice) and source.part == part:
                    neurons = _neurons(parts, source.expert)
                    some = whole[:, neurons] if part == "down" else whole[neurons]
                    if part == "down" and source.expert is None and parts.correction is not None:
                        some = some + parts.correction
                    self._refuse_beyond(some, source.format, matrix)
                    file.write(places[at], _tiles(source.format, some).reshape(-1))

    def _whole(self, reader: TensorReader, matrix: Matrix) -> Floats:
        """A matrix of the source: float32 [rows, columns]."""
        placed = replace(self._placed[matrix.name], format=FORMATS["f32"])
        found = np.empty((matrix.rows, matrix.columns), np.float32)
        for first, last in row_ranges(placed, 0, matrix.rows):
            raw = raw_rows(reader, placed, first, last).view(np.float32)
            found[first:last] = raw[: last - first]
        return found

    @staticmethod
    def _refuse_beyond(x: Floats, fmt: Format, matrix: Matrix) -> None:
        most = beyond(x, fmt, fmt.encode)
        if most is not None:
            raise UnsupportedError(
                f"a weight of {most:.6g} is beyond what {fmt.name} holds, in which experts are "
                "written", tensor=matrix.name,
            )  # fmt: skip


def _parts(layer: Layer) -> list[tuple[str, Matrix]]:
    f = layer.feed_forward
    assert isinstance(f, FeedForward) and f.gate is not None
    return [("gate", f.gate), ("up", f.up), ("down", f.down)]


def _kept(fmt: Format) -> Format:
    """In which floats slices of a matrix are written: those of the file, else float16."""
    return fmt if fmt.name in ("f32", "bf16") else FORMATS["f16"]


def _tiled(name: str, rows: int, columns: int, fmt: str, source: _Source) -> tuple[Entry, _Source]:
    n_bytes = FORMATS[fmt].tiled_bytes(rows, columns)
    return Entry(name, tiled_type(fmt), (rows, columns), n_bytes, fmt), source


def _tiles(fmt: Format, x: Floats) -> np.ndarray:
    return fmt.tile(fmt.encode(np.ascontiguousarray(x)))


def _neurons(parts: Parts, expert: int | None) -> np.ndarray:
    found: np.ndarray = parts.shared if expert is None else parts.experts[expert]
    return found
