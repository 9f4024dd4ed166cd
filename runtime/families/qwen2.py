"""Qwen2 and Qwen2.5: biases on queries, keys and values; half-split rotary pairs (2407.10671)."""

from __future__ import annotations

from headrace.families import common
from headrace.families.decoder import Decoder
from headrace.loaders.gguf import ModelFile


def build(model: ModelFile) -> Decoder:
    """Describe a model of `general.architecture` "qwen2"."""
    sizes = common.read_sizes(model, "qwen2")
    rope = common.read_rope(model, sizes)
    layers = [
        common.layer(model, sizes, i, common.attention(model, sizes, i, rope, paired=False))
        for i in range(sizes.layers)
    ]
    return common.decoder(model, sizes, layers)
