"""OLMoE: norms over all heads of queries and keys together, experts whose weights do not sum to
one (2409.02060).
"""

from __future__ import annotations

from headrace.families import common
from headrace.families.decoder import Decoder
from headrace.loaders.gguf import ModelFile


def build(model: ModelFile) -> Decoder:
    """Describe a model of `general.architecture` "olmoe"."""
    sizes = common.read_sizes(model, "olmoe")
    rope = common.read_rope(model, sizes)
    layers = [
        common.layer(
            model,
            sizes,
            i,
            common.attention(model, sizes, i, rope, paired=False, norm_together=True),
            experts=common.experts(model, sizes, i, normalised=False),
        )
        for i in range(sizes.layers)
    ]
    return common.decoder(model, sizes, layers)
