"""Qwen3 (dense): RMS norms on queries and keys, head width of its own (2505.09388)."""

from __future__ import annotations

from headrace.families import common
from headrace.families.decoder import Decoder
from headrace.loaders.gguf import ModelFile


def build(model: ModelFile) -> Decoder:
    """Describe a model of `general.architecture` "qwen3"."""
    sizes = common.read_sizes(model, "qwen3")
    rope = common.read_rope(model, sizes, base=1e6)
    layers = [
        common.layer(model, sizes, i, common.attention(model, sizes, i, rope, paired=False))
        for i in range(sizes.layers)
    ]
    return common.decoder(model, sizes, layers)
