"""Qwen1.5 and Qwen2 mixtures of experts: biases on queries, keys and values, and a shared expert
with a gate of its own beside those that are chosen, whose weights do not sum to one (2407.10671).
"""

from __future__ import annotations

from headrace.families import common
from headrace.families.decoder import Decoder
from headrace.loaders.gguf import ModelFile


def build(model: ModelFile) -> Decoder:
    """Describe a model of `general.architecture` "qwen2moe"."""
    sizes = common.read_sizes(model, "qwen2moe")
    rope = common.read_rope(model, sizes, base=1e6)
    shared = model.get(
        "qwen2moe.expert_shared_feed_forward_length", int, sizes.feed_forward,
        low=1, high=common.MAX_WIDTH,
    )  # fmt: skip
    layers = [
        common.layer(
            model,
            sizes,
            i,
            common.attention(model, sizes, i, rope, paired=False),
            experts=common.experts(model, sizes, i, normalised=False, shared=shared),
        )
        for i in range(sizes.layers)
    ]
    return common.decoder(model, sizes, layers)
