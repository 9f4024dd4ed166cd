"""How often clusters of neurons fire, as their file says, and what tokens read by that."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from headrace.errors import ModelFileError
from headrace.families.decoder import Decoder, Vector, tensor_of
from headrace.families.headrace_clusters import clusters_fired, neurons_fired
from headrace.loaders.gguf import ModelFile, TensorReader
from headrace.sparse.format import Floats


@dataclass(frozen=True)
class Fired:
    """Shares of the tokens of a text.

    Attributes:
        clusters: that fired each cluster: float32 [clusters] of each layer.
        neurons: the mean of what fired each neuron.
    """

    clusters: tuple[Floats, ...]
    neurons: float

    def share(self, n_tokens: int) -> Floats:
        """That a pass over so many tokens fires each cluster, of all layers."""
        return 1 - (1 - np.concatenate(self.clusters).astype(np.float64)) ** n_tokens

    def rate(self, slots: int) -> float:
        """Of what a token fires, the share that is in memory if so many of the hottest are."""
        total = float(self.share(1).sum())
        return 1.0 if total == 0 else 1 - self.read_clusters(slots, 1) / total

    def read_clusters(self, slots: int, n_tokens: int) -> float:
        """Clusters that a pass over so many tokens is expected to read."""
        order = np.argsort(-self.share(1), kind="stable")
        return float(self.share(n_tokens)[order[slots:]].sum())


def fired_of(model: ModelFile, decoder: Decoder) -> Fired | None:
    """What a file says; None: it has no clusters.

    Raises:
        ModelFileError: what it says are no shares, or it lacks them.
    """
    found = decoder.clustered()
    if not found:
        return None
    clusters, neurons = list[Floats](), list[Floats]()
    with TensorReader() as reader:
        for index, one in found.items():
            for name, n, to in (
                (clusters_fired(index), len(one.each), clusters),
                (neurons_fired(index), one.inner, neurons),
            ):
                to.append(_shares(model, reader, name, n))
    return Fired(tuple(clusters), float(np.mean([np.mean(one) for one in neurons])))


def _shares(model: ModelFile, reader: TensorReader, name: str, n: int) -> Floats:
    info = tensor_of(model, Vector(name, n))
    found = np.empty(n, np.float32)
    if info.type == "F32":
        reader.readinto(info, 0, found.view(np.uint8))
    if info.type != "F32" or not ((found >= 0) & (found <= 1)).all():
        raise ModelFileError(
            "expected F32 shares of tokens, from 0 to 1: write the file again",
            path=info.path, tensor=info.name, offset=info.offset,
        )  # fmt: skip
    return found
