"""Gemma 3 without images. Norms multiply by 1 + w, and files have w."""

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

GLOBAL_EVERY = 6  # layers, as in `headrace.families.gemma3`


def describe(config: Config) -> Description:
    """The model of a config with `model_type` "gemma3_text"."""
    config.expect("hidden_activation", "gelu_pytorch_tanh", default="gelu_pytorch_tanh")
    config.expect("use_bidirectional_attention", False, default=False)
    layers = config.get("num_hidden_layers", int)
    for key in ("sliding_window_pattern", "_sliding_window_pattern"):
        config.expect(key, GLOBAL_EVERY, default=GLOBAL_EVERY)
    wanted = [
        "sliding_attention" if (i + 1) % GLOBAL_EVERY else "full_attention"
        for i in range(min(layers, 9999))
    ]
    config.expect("layer_types", wanted, default=wanted)
    everywhere, local = ropes(config, "full_attention"), ropes(config, "sliding_attention")
    if "rope_parameters" not in config.values:  # then local layers have a key for their base
        base = {"rope_theta": config.get("rope_local_base_freq", float, 1e4)}
        local = Config(base, config.path, config.prefix)
    local.expect("rope_type", "default", default="default")
    metadata: dict[str, Any] = {
        **sizes(
            config,
            "gemma3",
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=256,
            max_position_embeddings=131072,
        ),
        **rope(everywhere, "gemma3", 1e6),
        "gemma3.rope.freq_base_swa": local.get("rope_theta", float, 1e4),
        "gemma3.norm_offset": 1.0,
        "gemma3.attention.sliding_window": config.get("sliding_window", int, 4096),
        "gemma3.attention.scale": query_scale(config),
        "gemma3.attn_logit_softcapping": config.get("attn_logit_softcapping", float, 0.0),
        "gemma3.final_logit_softcapping": config.get("final_logit_softcapping", float, 0.0),
    }
    tied = config.get("tie_word_embeddings", bool, True)
    return Description(metadata, LAYER_NAMES_POST_NORM, layers, tied)
