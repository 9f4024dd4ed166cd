"""Gemma 3 (text): QK norms, norms before and after each part, five local layers to a global one.

Technical report 2503.19786. Local layers attend to a sliding window with their own rotary base;
embeddings are scaled by sqrt(width); GGUF stores norm weights with 1 already added,
other files without (`norm_offset`).
"""

from __future__ import annotations

import math

from headrace.families import common
from headrace.families.decoder import Decoder, Rope
from headrace.loaders.gguf import ModelFile

GLOBAL_EVERY = 6
LAYERS_OF_27B = 62


def build(model: ModelFile) -> Decoder:
    """Describe a model of `general.architecture` "gemma3"."""
    sizes = common.read_sizes(model, "gemma3")
    everywhere = common.read_rope(model, sizes, base=1e6)
    local = Rope(
        base=model.get("gemma3.rope.freq_base_swa", float, 10000.0, low=1.0, high=1e12),
        width=sizes.rotated,
    )
    window = model.get("gemma3.attention.sliding_window", int, 0, low=0, high=common.MAX_CONTEXT)
    cap = model.get("gemma3.attn_logit_softcapping", float, 0.0, low=0.0)
    # The 27B model alone scales queries by the width per head instead of the head's own.
    of_27b = sizes.layers == LAYERS_OF_27B
    usual = (sizes.width / sizes.heads if of_27b else sizes.head) ** -0.5
    scale = common.query_scale(model, sizes, usual)
    layers = []
    for i in range(sizes.layers):
        is_global = (i + 1) % GLOBAL_EVERY == 0
        attending = common.attention(
            model,
            sizes,
            i,
            everywhere if is_global else local,
            paired=False,
            window=0 if is_global else window,
            scale=scale,
            soft_cap=cap,
        )
        layers.append(common.layer(model, sizes, i, attending, "gelu"))
    return common.decoder(
        model,
        sizes,
        layers,
        embedding_scale=math.sqrt(sizes.width),
        soft_cap=model.get("gemma3.final_logit_softcapping", float, 0.0, low=0.0),
    )
