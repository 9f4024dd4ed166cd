"""Dense ReLU models whose neurons were cut into clusters, by `headrace compress`.

After PowerInfer-2 (2406.06282): a neuron is a row of gate and up and a column of down, and where
its gate is not above 0 it adds nothing. All gates are one matrix; up and down of a cluster of
neurons lie together, and are read where one of them fires. All but the feed-forwards is as the
dense family has it, by its own keys:

    headrace_clusters.base_architecture    the dense family, such as "llama"
    headrace_clusters.cluster_count        clusters of a layer, of equal size

Tensors are `blk.N.ffn_gate.weight`, whose rows are in the order of clusters, and of cluster C
`blk.N.ffn_up.C.weight` and `blk.N.ffn_down.C.weight`. `blk.N.ffn_clusters.fired` has the share of
the tokens of a text that fired each cluster, the hottest first, `blk.N.ffn_neurons.fired` that of
each neuron; no pass reads them.
"""

from __future__ import annotations

from dataclasses import replace

from headrace.errors import ModelFileError, UnsupportedError
from headrace.families import dense_base
from headrace.families.decoder import (
    Cluster,
    Decoder,
    FeedForward,
    Layer,
    Matrix,
    NeuronClusters,
    Vector,
    tensor_of,
)
from headrace.loaders.expert_tensors import MAX_EXPERTS, expert_name
from headrace.loaders.gguf import ModelFile

ARCHITECTURE = "headrace_clusters"
BASE_KEY = f"{ARCHITECTURE}.base_architecture"
COUNT_KEY = f"{ARCHITECTURE}.cluster_count"
STEP = 32  # clusters have a multiple of so many neurons: blocks of most formats, and of activations


def build(model: ModelFile) -> Decoder:
    """Describe a model of `general.architecture` "headrace_clusters".

    Raises:
        ModelFileError: the neurons are no such clusters.
        UnsupportedError: there is no such dense family, or its feed-forwards are not gated by ReLU.
    """
    base, decoder = dense_base(model, BASE_KEY)
    count = model.get(COUNT_KEY, int, low=1, high=MAX_EXPERTS)

    def cut(index: int, layer: Layer) -> Layer:
        f = layer.feed_forward
        if not isinstance(f, FeedForward) or f.gate is None or f.activation != "relu":
            raise UnsupportedError(
                f"layer {index} of a {base!r} with clusters of neurons is not gated by ReLU",
                path=model.paths[0],
            )
        if f.gate.rows % (count * STEP):
            raise ModelFileError(
                f"inconsistent metadata: {f.gate.rows} neurons are no {count} clusters of a "
                f"multiple of {STEP}",
                path=model.paths[0],
            )
        size, width = f.gate.rows // count, f.gate.columns
        each = tuple(
            Cluster(
                Matrix(expert_name(index, "up", c), size, width),
                Matrix(expert_name(index, "down", c), width, size),
            )
            for c in range(count)
        )
        tensor_of(model, Vector(clusters_fired(index), count))  # before there are many
        return replace(layer, feed_forward=NeuronClusters(f.gate, each))

    layers = tuple(cut(i, one) for i, one in enumerate(decoder.layers))
    return replace(decoder, architecture=ARCHITECTURE, layers=layers)


def clusters_fired(index: int) -> str:
    """The tensor of how often clusters of a layer fired."""
    return f"blk.{index}.ffn_clusters.fired"


def neurons_fired(index: int) -> str:
    """The tensor of how often neurons of a layer fired."""
    return f"blk.{index}.ffn_neurons.fired"
