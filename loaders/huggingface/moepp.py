"""MoE++, whose `model_type` is "MoE++": llama with experts that compute nothing.

Names and flags are those of the source that its authors published; see
`headrace.families.headrace_moepp`, which says what was verified.
"""

from __future__ import annotations

import re

from headrace.loaders.expert_tensors import MAX_EXPERTS
from headrace.loaders.huggingface.common import LAYER_NAMES, Description, rope, ropes, sizes
from headrace.loaders.huggingface.config import Config

ARCHITECTURE = "headrace_moepp"
_HIDDEN = 8  # values between the layers of a router, for each expert
_NAMES = {
    **{name: ours for name, ours in LAYER_NAMES.items() if not name.startswith("mlp.")},
    "mlp.moe.gate.gate_map": "ffn_gate_inp_map",
    "mlp.moe.experts.experts.{}.up_proj": "ffn_gate_up.{}",
    "mlp.moe.experts.experts.{}.down_proj": "ffn_down.{}",
    "mlp.moe.experts.experts.{}.wg": "ffn_const.{}",
    "mlp.moe.experts.experts.{}": "ffn_const.{}",
}
_TWO_LAYERS = {
    "mlp.moe.gate.wg.0": "ffn_gate_inp_hidden",
    "mlp.moe.gate.wg.2": "ffn_gate_inp",
}
_ONE_LAYER = {"mlp.moe.gate.wg": "ffn_gate_inp"}
# The first layer has no logits before it.
_UNREAD = re.compile(r"model\.layers\.0\.mlp\.moe\.gate\.gate_map\.weight")


def describe(config: Config) -> Description:
    """The model of a config with `model_type` "MoE++"."""
    # What is between gate and down is SwiGLU whatever `hidden_act` says; it is for dense layers.
    config.expect("moe_expert_interval", 1, default=1)
    config.expect("moe_use_logits_norm", False, default=False)
    counts = config.values.get("num_experts", [32])
    if not (isinstance(counts, list) and counts):
        raise config.bad("num_experts", f"is {repr(counts)[:40]}, expected a list of numbers")
    count = Config({"num_experts": counts[0]}, config.path, config.prefix).get(
        "num_experts", int, low=1, high=MAX_EXPERTS
    )
    two_layers = config.get("moe_2layer_gate", bool, True)
    mixtral = config.get("moe_use_mixtral_gating", bool, False)
    scaled = not (mixtral or config.get("moe_feature_no_mul_topk", bool, False))
    a = ARCHITECTURE
    metadata = {
        **sizes(config, a),
        **rope(ropes(config), a, 1e4),
        f"{a}.expert_count": count,
        f"{a}.expert_used_count": 2,
        f"{a}.expert_feed_forward_length": config.get("intermediate_size", int, low=1),
        f"{a}.router_hidden_length": _HIDDEN * count if two_layers else 0,
        f"{a}.expert_input_scale": 2.0 if scaled else 1.0,
        f"{a}.zero_expert_weight": mixtral,
    }
    return Description(
        metadata,
        {**_NAMES, **(_TWO_LAYERS if two_layers else _ONE_LAYER)},
        config.get("num_hidden_layers", int),
        config.get("tie_word_embeddings", bool, False),
        unread=_UNREAD,
        kinds={"constant": "bias"},
    )
