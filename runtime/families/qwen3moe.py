"""Qwen3 mixtures of experts: RMS norms on queries and keys, heads of a width of their own, many
small experts whose weights sum to one (2505.09388).
"""

from __future__ import annotations

from headrace.families import common
from headrace.families.decoder import Decoder
from headrace.loaders.gguf import ModelFile


def build(model: ModelFile) -> Decoder:
    """Describe a model of `general.architecture` "qwen3moe"."""
    sizes = common.read_sizes(model, "qwen3moe")
    rope = common.read_rope(model, sizes, base=1e6)
    layers = [
        common.layer(
            model,
            sizes,
            i,
            common.attention(model, sizes, i, rope, paired=False),
            experts=common.experts(model, sizes, i, normalised=True),
        )
        for i in range(sizes.layers)
    ]
    return common.decoder(model, sizes, layers)
