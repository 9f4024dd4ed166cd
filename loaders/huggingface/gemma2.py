"""Gemma 2. Norms multiply by 1 + w, and files have w."""

from __future__ import annotations

from typing import Any

from headrace.loaders.huggingface.common import (
    LAYER_NAMES_POST_NORM,
    Description,
    query_scale,
    rope,
    ropes,
    sizes,
)
from headrace.loaders.huggingface.config import Config


def describe(config: Config) -> Description:
    """The model of a config with `model_type` "gemma2"."""
    config.expect("hidden_activation", "gelu_pytorch_tanh", default="gelu_pytorch_tanh")
    layers = config.get("num_hidden_layers", int)
    wanted = ["full_attention" if i % 2 else "sliding_attention" for i in range(min(layers, 9999))]
    config.expect("layer_types", wanted, default=wanted)
    metadata: dict[str, Any] = {
        **sizes(
            config, "gemma2", num_key_value_heads=4, head_dim=256, max_position_embeddings=8192
        ),
        **rope(ropes(config), "gemma2", 1e4),
        "gemma2.norm_offset": 1.0,
        "gemma2.attention.sliding_window": config.get("sliding_window", int, 4096),
        "gemma2.attention.scale": query_scale(config),
    }
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        # null is no cap; without the key there is one.
        usual = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}[key]
        default = 0.0 if key in config.values else usual
        metadata[f"gemma2.{key}"] = config.get(key, float, default)
    tied = config.get("tie_word_embeddings", bool, True)
    return Description(metadata, LAYER_NAMES_POST_NORM, layers, tied)
