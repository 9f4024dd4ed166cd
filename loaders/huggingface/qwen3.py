"""Qwen3 (dense): RMS norms on queries and keys, heads of a width of their own."""

from __future__ import annotations

from headrace.loaders.huggingface.common import LAYER_NAMES, Description, rope, ropes, sizes
from headrace.loaders.huggingface.config import Config


def describe(config: Config) -> Description:
    """The model of a config with `model_type` "qwen3"."""
    config.expect("hidden_act", "silu", "swish", default="silu")
    config.expect("use_sliding_window", False, default=False)
    metadata = {
        **sizes(
            config, "qwen3", num_key_value_heads=32, head_dim=128, max_position_embeddings=32768
        ),
        **rope(ropes(config), "qwen3", 1e4),
    }
    layers = config.get("num_hidden_layers", int)
    return Description(
        metadata, LAYER_NAMES, layers, config.get("tie_word_embeddings", bool, False)
    )
