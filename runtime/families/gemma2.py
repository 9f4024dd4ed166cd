"""Gemma 2: soft-capped scores and logits, norms around each part, every other layer local.

Technical report 2408.00118.
"""

from __future__ import annotations

import math

from headrace.families import common
from headrace.families.decoder import Decoder
from headrace.loaders.gguf import ModelFile

LAYERS_OF_27B = 46


def build(model: ModelFile) -> Decoder:
    """Describe a model of `general.architecture` "gemma2"."""
    sizes = common.read_sizes(model, "gemma2")
    rope = common.read_rope(model, sizes)
    window = model.get("gemma2.attention.sliding_window", int, 4096, low=0, high=common.MAX_CONTEXT)
    cap = model.get("gemma2.attn_logit_softcapping", float, 50.0, low=0.0)
    of_27b = sizes.layers == LAYERS_OF_27B
    usual = (sizes.width / sizes.heads if of_27b else sizes.head) ** -0.5
    scale = common.query_scale(model, sizes, usual)
    layers = []
    for i in range(sizes.layers):
        attending = common.attention(
            model,
            sizes,
            i,
            rope,
            paired=False,
            window=window if i % 2 == 0 else 0,
            scale=scale,
            soft_cap=cap,
        )
        layers.append(common.layer(model, sizes, i, attending, "gelu"))
    return common.decoder(
        model,
        sizes,
        layers,
        embedding_scale=math.sqrt(sizes.width),
        soft_cap=model.get("gemma2.final_logit_softcapping", float, 30.0, low=0.0),
    )
