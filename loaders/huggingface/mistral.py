"""Mistral 7B and its kin: Llama with a sliding window in all layers, where the config has one."""

from __future__ import annotations

from typing import Any

from headrace.loaders.huggingface.common import LAYER_NAMES, Description, rope, ropes, sizes
from headrace.loaders.huggingface.config import Config


def describe(config: Config) -> Description:
    """The model of a config with `model_type` "mistral"."""
    config.expect("hidden_act", "silu", "swish", default="silu")
    metadata: dict[str, Any] = {
        **sizes(config, "llama", num_key_value_heads=8, max_position_embeddings=4096 * 32),
        **rope(ropes(config), "llama", 1e4),
        "llama.rope.pairing": "halves",
    }
    # null is no window; without the key there is one.
    window = config.get("sliding_window", int, 0 if "sliding_window" in config.values else 4096)
    if window:
        metadata["llama.attention.sliding_window"] = window
    layers = config.get("num_hidden_layers", int)
    return Description(
        metadata, LAYER_NAMES, layers, config.get("tie_word_embeddings", bool, False)
    )
