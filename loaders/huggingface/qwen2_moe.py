"""Qwen1.5 and Qwen2 mixtures of experts, which have a shared expert."""

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

_NAMES = {
    **EXPERT_LAYER_NAMES,
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
}


def describe(config: Config) -> Description:
    """The model of a config with `model_type` "qwen2_moe"."""
    config.expect("hidden_act", "silu", "swish", default="silu")
    config.expect("use_sliding_window", False, default=False)
    config.expect("decoder_sparse_step", 1, default=1)
    config.expect("mlp_only_layers", [], None, default=[])
    metadata = {
        **sizes(config, "qwen2moe", num_key_value_heads=16, max_position_embeddings=32768),
        **expert_sizes(config, "qwen2moe", "moe_intermediate_size"),
        "qwen2moe.expert_shared_feed_forward_length": config.get(
            "shared_expert_intermediate_size", int, low=1
        ),
        **rope(ropes(config), "qwen2moe", 1e4),
        "qwen2moe.expert_weights_norm": config.get("norm_topk_prob", bool, False),
    }
    layers = config.get("num_hidden_layers", int)
    return Description(metadata, _NAMES, layers, config.get("tie_word_embeddings", bool, False))
