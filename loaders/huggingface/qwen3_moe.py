"""Qwen3 mixtures of experts."""

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
    """The model of a config with `model_type` "qwen3_moe"."""
    config.expect("hidden_act", "silu", "swish", default="silu")
    config.expect("use_sliding_window", False, default=False)
    config.expect("decoder_sparse_step", 1, default=1)
    config.expect("mlp_only_layers", [], None, default=[])
    metadata = {
        **sizes(
            config, "qwen3moe", num_key_value_heads=4, head_dim=128, max_position_embeddings=32768
        ),
        **expert_sizes(config, "qwen3moe", "moe_intermediate_size"),
        **rope(ropes(config), "qwen3moe", 1e4),
        "qwen3moe.expert_weights_norm": config.get("norm_topk_prob", bool, False),
    }
    layers = config.get("num_hidden_layers", int)
    return Description(
        metadata, EXPERT_LAYER_NAMES, layers, config.get("tie_word_embeddings", bool, False)
    )
