"""OLMoE: norms over all heads of queries and keys together."""

from __future__ import annotations

from headrace.loaders.huggingface.common import (
    EXPERT_LAYER_NAMES,
    Description,
    expert_sizes,
    rope,
    ropes,
    sizes,
)
from headrace.loaders.huggingface.config import Config


def describe(config: Config) -> Description:
    """The model of a config with `model_type` "olmoe"."""
    config.expect("hidden_act", "silu", "swish", default="silu")
    config.expect("clip_qkv", None, default=None)
    config.expect("attention_bias", False, default=False)
    metadata = {
        **sizes(config, "olmoe", num_attention_heads=16, max_position_embeddings=4096),
        **expert_sizes(config, "olmoe", "intermediate_size"),
        **rope(ropes(config), "olmoe", 1e4),
        "olmoe.expert_weights_norm": config.get("norm_topk_prob", bool, False),
    }
    layers = config.get("num_hidden_layers", int)
    return Description(
        metadata, EXPERT_LAYER_NAMES, layers, config.get("tie_word_embeddings", bool, False)
    )
