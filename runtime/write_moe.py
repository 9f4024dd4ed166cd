"""Write a dense model as a mixture of experts: see `headrace.refactor_experts`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from headrace.calibration import LayerInputs
from headrace.cut_model import CutModel, Made, Slice, dense_parts, tiled
from headrace.cut_model import parts_of as matrices_of
from headrace.families import headrace_moe as keys
from headrace.families.decoder import Decoder
from headrace.least_memory import Need
from headrace.loaders.expert_tensors import expert_name
from headrace.loaders.gguf import ModelFile, TensorInfo, TensorReader
from headrace.loaders.tiled import Entry
from headrace.partial_file import PartialFile
from headrace.recipe import Recipe
from headrace.refactor_experts import (
    ACTIVE,
    EXPERTS,
    SHARED,
    STEP,
    Cut,
    nearest_cut,
    needs,
    parts_of,
)
from headrace.sparse.registry import FORMATS


@dataclass(frozen=True)
class _Router(Made):
    """The router of a layer (or its bias)."""

    bias: bool = False


def cut_of(
    model: ModelFile, decoder: Decoder, experts: int | None, active: int | None,
    shared: float | None, fit_shared: bool,
) -> Cut:  # fmt: skip
    """How a model is cut into experts; None: as usual.

    Raises:
        UnsupportedError: it cannot be; see `headrace.cut_model.dense_parts`.
    """
    return nearest_cut(
        dense_parts(model, decoder).inner,
        EXPERTS if experts is None else experts,
        ACTIVE if active is None else active,
        SHARED if shared is None else shared,
        fit_shared,
    )


class Mixture(CutModel):
    """A dense model to be written as a mixture.

    Args:
        wanted: the share of neurons that was asked for in the shared part, for remarks.
    """

    def __init__(
        self, model: ModelFile, decoder: Decoder, cut: Cut, wanted: float | None,
        entries: list[Entry], sources: list[Recipe | TensorInfo],
    ) -> None:  # fmt: skip
        self._cut, self._wanted = cut, wanted
        self.metadata = {
            "general.architecture": keys.ARCHITECTURE,
            keys.BASE_KEY: model.get("general.architecture", str),
            keys.COUNT_KEY: cut.experts,
            keys.USED_KEY: cut.active,
            keys.INNER_KEY: cut.inner,
            keys.SHARED_KEY: cut.shared,
        }
        super().__init__(decoder, entries, sources)

    def _of_layer(self, index: int) -> list[tuple[Entry, Made]]:
        cut, d, block = self._cut, self._decoder, f"blk.{index}"
        made: list[tuple[Entry, Made]] = [
            tiled(f"{block}.ffn_gate_inp.weight", cut.experts, d.width, "f32", _Router(index)),
            (
                Entry(f"{block}.ffn_gate_inp.bias", "F32", (cut.experts,), 4 * cut.experts),
                _Router(index, bias=True),
            ),
        ]
        kinds = {part: self._kept(matrix) for part, matrix in matrices_of(d.layers[index])}

        def add(name: str, part: str, expert: int | None, inner: int) -> None:
            rows, columns = (d.width, inner) if part == "down" else (inner, d.width)
            source = Slice(index, part, expert, kinds[part])
            made.append(tiled(name, rows, columns, kinds[part].name, source))

        for part in kinds:
            if cut.shared:
                add(f"{block}.ffn_{part}_shexp.weight", part, None, cut.shared)
        for expert in range(cut.experts):
            for part in kinds:
                add(expert_name(index, part, expert), part, expert, cut.inner)
        return made

    def needs(self, inputs: LayerInputs) -> list[Need]:
        """What the work takes at a time."""
        return [*needs(inputs, self._decoder.layers, self._cut), self._cutting()]

    def remarks(self) -> list[str]:
        """What is not as it was asked for."""
        share = self._cut.shared / self._cut.neurons
        if self._wanted is None or abs(share - self._wanted) < 0.5 / self._cut.neurons:
            return []
        return [
            f"the shared part has {self._cut.shared:,} of {self._cut.neurons:,} neurons (a share "
            f"of {share:.3f}): {self._cut.experts} experts get {self._cut.inner} each, a multiple "
            f"of {STEP}"
        ]

    def _write_layer(
        self, file: PartialFile, places: Mapping[int, int], ours: list[int], index: int,
        inputs: LayerInputs, reader: TensorReader, n_threads: int,
    ) -> None:  # fmt: skip
        layer = self._decoder.layers[index]
        down = self._whole(reader, dict(matrices_of(layer))["down"])
        parts = parts_of(inputs, index, layer, down, self._cut, n_threads)
        del down
        router = FORMATS["f32"]
        for at in ours:
            source = self._sources[at]
            if isinstance(source, _Router):
                data = parts.bias if source.bias else router.tile(router.encode(parts.router))
                file.write(places[at], np.ascontiguousarray(data).view(np.uint8).reshape(-1))

        def neurons(expert: int | None) -> np.ndarray:
            found: np.ndarray = parts.shared if expert is None else parts.experts[expert]
            return found

        self._write_slices(file, places, ours, index, reader, neurons, parts.correction)
