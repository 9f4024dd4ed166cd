"""Write a dense ReLU model with its neurons in clusters: see `headrace.fired_clusters`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from headrace.calibration import LayerInputs
from headrace.cut_model import CutModel, Made, Slice, dense_parts, parts_of, tiled
from headrace.errors import UnsupportedError
from headrace.families import headrace_clusters as keys
from headrace.families.decoder import Decoder
from headrace.fired_clusters import clusters_of, nearest_count, needs
from headrace.least_memory import Need
from headrace.loaders.expert_tensors import expert_name
from headrace.loaders.gguf import ModelFile, TensorInfo, TensorReader
from headrace.loaders.tiled import Entry
from headrace.partial_file import PartialFile
from headrace.recipe import Recipe


@dataclass(frozen=True)
class _Fired(Made):
    """How often clusters, or neurons, of a layer fired."""

    neurons: bool


class ClusteredModel(CutModel):
    """A dense model to be written with its neurons in clusters.

    Raises:
        UnsupportedError: it cannot be; see `headrace.cut_model.dense_parts`.
    """

    def __init__(
        self, model: ModelFile, decoder: Decoder, wanted: int, entries: list[Entry],
        sources: list[Recipe | TensorInfo],
    ) -> None:  # fmt: skip
        f = dense_parts(model, decoder)
        if f.activation != "relu":
            raise UnsupportedError(
                f"its feed-forwards are gated by {f.activation}, whose neurons always fire; "
                "clusters are for models gated by ReLU (--to-moe takes others)",
                path=model.paths[0],
            )
        self._wanted, self._count = wanted, nearest_count(f.inner, wanted)
        self._size = f.inner // self._count
        self.metadata = {
            "general.architecture": keys.ARCHITECTURE,
            keys.BASE_KEY: model.get("general.architecture", str),
            keys.COUNT_KEY: self._count,
        }
        super().__init__(decoder, entries, sources)

    def _of_layer(self, index: int) -> list[tuple[Entry, Made]]:
        matrices = dict(parts_of(self._decoder.layers[index]))
        kinds = {part: self._kept(matrix) for part, matrix in matrices.items()}
        gate = matrices["gate"]
        source = Slice(index, "gate", None, kinds["gate"])
        made = [
            (Entry(name, "F32", (n,), 4 * n), _Fired(index, neurons))
            for name, n, neurons in (
                (keys.clusters_fired(index), self._count, False),
                (keys.neurons_fired(index), gate.rows, True),
            )
        ]
        found = [*made, tiled(gate.name, gate.rows, gate.columns, kinds["gate"].name, source)]
        for cluster in range(self._count):
            for part in ("up", "down"):
                rows, columns = self._size, gate.columns
                if part == "down":
                    rows, columns = columns, rows
                source = Slice(index, part, cluster, kinds[part])
                name = expert_name(index, part, cluster)
                found.append(tiled(name, rows, columns, kinds[part].name, source))
        return found

    def needs(self, inputs: LayerInputs) -> list[Need]:
        """What the work takes at a time."""
        return [*needs(inputs, self._decoder.layers), self._cutting()]

    def remarks(self) -> list[str]:
        """What is not as it was asked for."""
        if self._count == self._wanted:
            return []
        return [
            f"{self._count} clusters of {self._size} neurons instead of {self._wanted}: all have "
            f"as many, a multiple of {keys.STEP}"
        ]

    def _write_layer(
        self, file: PartialFile, places: Mapping[int, int], ours: list[int], index: int,
        inputs: LayerInputs, reader: TensorReader, n_threads: int,
    ) -> None:  # fmt: skip
        layer = self._decoder.layers[index]
        found = clusters_of(inputs, index, layer, self._count)
        for at in ours:
            source = self._sources[at]
            if isinstance(source, _Fired):
                shares = found.neurons_fired if source.neurons else found.clusters_fired
                file.write(places[at], shares.view(np.uint8))

        def neurons(cluster: int | None) -> np.ndarray:  # of the gate: all, in order
            return found.neurons.reshape(-1) if cluster is None else found.neurons[cluster]

        self._write_slices(file, places, ours, index, reader, neurons)
