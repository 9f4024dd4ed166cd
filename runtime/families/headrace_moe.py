"""Dense models whose feed-forwards were cut into a shared part and experts, by `headrace compress`.

An architecture of its own, so that whatever knows the dense one only refuses the file instead of
computing something else. All but the feed-forwards is as the dense family has it, by its own keys:

    headrace_moe.base_architecture                    the dense family, such as "llama"
    headrace_moe.expert_count                         experts of a layer
    headrace_moe.expert_used_count                    of which a token takes so many
    headrace_moe.expert_feed_forward_length           values between gate and down of one of them
    headrace_moe.expert_shared_feed_forward_length    the same of the shared part; 0: there is none

Every chosen expert has weight one: with all of them the sum is that of the dense model. Tensors are
called as in other mixtures; `blk.N.ffn_gate_inp.bias` is added to the router's logits.
"""

from __future__ import annotations

from dataclasses import replace

from headrace.errors import ModelFileError, UnsupportedError
from headrace.families import common, dense_base
from headrace.families.decoder import Decoder, Experts, Layer
from headrace.loaders.expert_tensors import MAX_EXPERTS
from headrace.loaders.gguf import ModelFile

ARCHITECTURE = "headrace_moe"
BASE_KEY = f"{ARCHITECTURE}.base_architecture"
COUNT_KEY = f"{ARCHITECTURE}.expert_count"
USED_KEY = f"{ARCHITECTURE}.expert_used_count"
INNER_KEY = f"{ARCHITECTURE}.expert_feed_forward_length"
SHARED_KEY = f"{ARCHITECTURE}.expert_shared_feed_forward_length"


def build(model: ModelFile) -> Decoder:
    """Describe a model of `general.architecture` "headrace_moe".

    Raises:
        ModelFileError: experts and shared part do not have as many values as the dense model.
        UnsupportedError: there is no such dense family.
    """
    base, decoder = dense_base(model, BASE_KEY)
    if decoder.mixtures():
        raise UnsupportedError(
            f"{BASE_KEY} is {base!r}, of which this is a mixture already", path=model.paths[0]
        )
    sizes = replace(common.read_sizes(model, base), prefix=ARCHITECTURE)
    inner = model.get(INNER_KEY, int, low=1, high=common.MAX_WIDTH)
    shared = model.get(SHARED_KEY, int, low=0, high=common.MAX_WIDTH)
    count = model.get(COUNT_KEY, int, low=1, high=MAX_EXPERTS)
    if count * inner + shared != sizes.feed_forward:
        raise ModelFileError(
            f"inconsistent metadata: {count} experts of {inner} and {shared} shared are not the "
            f"{sizes.feed_forward} values of the dense model",
            path=model.paths[0],
        )

    def mixed(index: int, layer: Layer) -> Layer:
        dense = layer.feed_forward
        if isinstance(dense, Experts) or dense.gate is None:
            raise UnsupportedError(
                f"{BASE_KEY} is {base!r}, whose feed-forwards have no gate", path=model.paths[0]
            )
        found = common.experts(
            model, sizes, index, normalised=False, shared=shared, activation=dense.activation
        )
        return replace(layer, feed_forward=replace(found, weighting="one"))

    layers = tuple(mixed(i, one) for i, one in enumerate(decoder.layers))
    return replace(decoder, architecture=ARCHITECTURE, layers=layers)
