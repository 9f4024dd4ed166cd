"""Llama 2 and 3, SmolLM2 and all that call themselves `LlamaForCausalLM`.

Queries and keys are not permuted as GGUF's converter leaves them: rotary pairs are halves apart.
"""

from __future__ import annotations

from headrace.loaders.huggingface.common import LAYER_NAMES, Description, rope, ropes, sizes
from headrace.loaders.huggingface.config import Config


def describe(config: Config) -> Description:
    """The model of a config with `model_type` "llama"."""
    config.expect("hidden_act", "silu", "swish", "relu", default="silu")
    metadata = {
        **sizes(config, "llama"),
        **rope(ropes(config), "llama", 1e4),
        "llama.rope.pairing": "halves",
    }
    if config.get("hidden_act", str, "silu") == "relu":
        metadata["llama.feed_forward_activation"] = "relu"
    layers = config.get("num_hidden_layers", int)
    return Description(
        metadata, LAYER_NAMES, layers, config.get("tie_word_embeddings", bool, False)
    )
