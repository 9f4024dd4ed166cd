"""Mixtral: llama with a mixture of experts, as GGUF has it too; rotary pairs are halves apart."""

from __future__ import annotations

from headrace.loaders.huggingface.common import (
    LAYER_NAMES,
    Description,
    expert_sizes,
    rope,
    ropes,
    sizes,
)
from headrace.loaders.huggingface.config import Config

_NAMES = {
    **{name: ours for name, ours in LAYER_NAMES.items() if not name.startswith("mlp.")},
    "block_sparse_moe.gate": "ffn_gate_inp",
    "block_sparse_moe.experts.{}.w1": "ffn_gate.{}",
    "block_sparse_moe.experts.{}.w2": "ffn_down.{}",
    "block_sparse_moe.experts.{}.w3": "ffn_up.{}",
}


def describe(config: Config) -> Description:
    """The model of a config with `model_type` "mixtral"."""
    config.expect("hidden_act", "silu", "swish", default="silu")
    metadata = {
        **sizes(config, "llama", num_key_value_heads=8, max_position_embeddings=131072),
        **expert_sizes(config, "llama", "intermediate_size"),
        **rope(ropes(config), "llama", 1e6),
        "llama.rope.pairing": "halves",
    }
    window = config.get("sliding_window", int, None)
    if window is not None:
        metadata["llama.attention.sliding_window"] = window
    layers = config.get("num_hidden_layers", int)
    return Description(metadata, _NAMES, layers, config.get("tie_word_embeddings", bool, False))
