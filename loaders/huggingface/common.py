"""What the model types share: sizes and rope in GGUF's keys, tensors by GGUF's names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from headrace.loaders.expert_tensors import MAX_EXPERTS
from headrace.loaders.huggingface.config import Config

# Tensor names without ".weight" or ".bias": of a layer below `model.layers.N.`, and of the rest.
LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
# Of the Gemmas, which have norms behind attention and feed-forward, too.
LAYER_NAMES_POST_NORM = {
    **LAYER_NAMES,
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
OTHER_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
_NUMBER = re.compile(r"\.(0|[1-9]\d{0,5})(?=\.|$)")
# What follows from the config, and what only other programs read.
_NEVER_READ = re.compile(
    r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"
    r"|.*\.(?:input_scale|k_scale|v_scale|q_scale)"
)


@dataclass(frozen=True)
class Description:
    """What a model type makes of a config.

    Attributes:
        metadata: GGUF's keys and values.
        layer_names: as `LAYER_NAMES`; {} stands for the number of an expert in both names.
        layers: how many there are.
        tied: whether the head is the embedding.
        unread: names of tensors that are not needed, besides those that no model type needs.
        prefixes: beginnings of names to be replaced: (in the file, as in `OTHER_NAMES`).
        kinds: last parts of names besides "weight" and "bias", and which of the two they stand for.
    """

    metadata: dict[str, Any]
    layer_names: dict[str, str]
    layers: int
    tied: bool
    unread: re.Pattern[str] = field(default=re.compile(r"(?!)"))
    prefixes: tuple[tuple[str, str], ...] = ()
    kinds: Mapping[str, str] = field(default_factory=dict)

    def gguf_name(self, name: str) -> str | None:
        """GGUF's name of a tensor; "" if it is not needed; None if it is not known."""
        if self.unread.fullmatch(name):
            return ""
        for theirs, ours in self.prefixes:
            if name.startswith(theirs):
                name = ours + name.removeprefix(theirs)
                break
        if _NEVER_READ.fullmatch(name) or (self.tied and name.startswith("lm_head.")):
            return ""
        stem, _, kind = name.rpartition(".")
        kind = self.kinds.get(kind, kind)
        if kind not in ("weight", "bias"):
            return None
        found = re.fullmatch(r"model\.layers\.(0|[1-9]\d{0,5})\.(.+)", stem)
        if found is None:
            other = OTHER_NAMES.get(stem)
            return None if other is None else f"{other}.{kind}"
        number, inside = None, self.layer_names.get(found[2])  # where a number is no expert's
        if inside is None:
            number = _NUMBER.search(found[2])
            inside = self.layer_names.get(_NUMBER.sub(".{}", found[2], count=1))
        if inside is None or int(found[1]) >= self.layers:
            return None
        return f"blk.{found[1]}.{inside.format(number[1] if number else '')}.{kind}"


# Of most mixtures of experts.
EXPERT_LAYER_NAMES = {
    **{name: ours for name, ours in LAYER_NAMES.items() if not name.startswith("mlp.")},
    "mlp.gate": "ffn_gate_inp",
    "mlp.experts.{}.gate_proj": "ffn_gate.{}",
    "mlp.experts.{}.up_proj": "ffn_up.{}",
    "mlp.experts.{}.down_proj": "ffn_down.{}",
}


def expert_sizes(config: Config, architecture: str, inner: str) -> dict[str, Any]:
    """GGUF's keys for a mixture of experts; `inner`: the config's name of the width inside of one.

    Their number has two names, by family and version of transformers.
    """
    a = architecture
    name = "num_experts" if "num_experts" in config.values else "num_local_experts"
    count = config.get(name, int, low=1, high=MAX_EXPERTS)
    return {
        f"{a}.expert_count": count,
        f"{a}.expert_used_count": config.get("num_experts_per_tok", int, low=1, high=count),
        f"{a}.expert_feed_forward_length": config.get(inner, int, low=1),
    }


def sizes(config: Config, architecture: str, **defaults: Any) -> dict[str, Any]:
    """GGUF's keys for the sizes of a decoder.

    Args:
        defaults: what transformers takes where the config is silent: `num_attention_heads`,
            `num_key_value_heads`, `head_dim`, `max_position_embeddings`.
    """
    heads = config.get(
        "num_attention_heads",
        int,
        *(defaults[k] for k in ("num_attention_heads",) if k in defaults),
    )
    width = config.get("hidden_size", int)
    if heads < 1 or width < 1:
        raise config.bad("num_attention_heads", f"is {heads} for a hidden_size of {width}")
    head = config.get("head_dim", int, defaults.get("head_dim") or width // heads)
    config.expect("partial_rotary_factor", 1.0, 1, default=1.0)
    a = architecture
    return {
        "general.architecture": a,
        f"{a}.block_count": config.get("num_hidden_layers", int),
        f"{a}.context_length": config.get(
            "max_position_embeddings", int, defaults.get("max_position_embeddings", 2048)
        ),
        f"{a}.embedding_length": width,
        f"{a}.feed_forward_length": config.get("intermediate_size", int),
        f"{a}.attention.head_count": heads,
        f"{a}.attention.head_count_kv": config.get(
            "num_key_value_heads", int, defaults.get("num_key_value_heads") or heads
        ),
        f"{a}.attention.key_length": head,
        f"{a}.attention.value_length": head,
        f"{a}.attention.layer_norm_rms_epsilon": config.get("rms_norm_eps", float, 1e-6),
        f"{a}.rope.dimension_count": head,
    }


def ropes(config: Config, kind: str | None = None) -> Config:
    """The settings of rotary embeddings, wherever a version of transformers has put them.

    Args:
        kind: of a model with several, "full_attention" or "sliding_attention".
    """
    found = config.inner("rope_parameters")
    if found is not None:
        inner = found.inner(kind) if kind is not None and kind in found.values else None
        return inner or found
    scaling = config.inner("rope_scaling")
    values = dict(scaling.values) if scaling is not None else {}
    values.setdefault("rope_type", values.get("type"))
    if "rope_theta" in config.values:
        values["rope_theta"] = config.values["rope_theta"]
    return Config(values, config.path, f"{config.prefix}rope_scaling.")


def rope(settings: Config, architecture: str, base: float) -> dict[str, Any]:
    """GGUF's keys for rotary embeddings.

    Args:
        settings: see `ropes`.
        base: `rope_theta` where the config has none.

    Raises:
        UnsupportedError: a kind of scaling that is not there.
    """
    settings.expect("partial_rotary_factor", 1.0, 1, default=1.0)
    settings.expect("rope_type", "default", "linear", "llama3", default="default")
    kind = settings.get("rope_type", str, "default")
    key = f"{architecture}.rope"
    found: dict[str, Any] = {f"{key}.freq_base": settings.get("rope_theta", float, base)}
    if kind == "default":
        return found
    found[f"{key}.scaling.type"] = kind
    found[f"{key}.scaling.factor"] = settings.get("factor", float)
    if kind == "llama3":
        found[f"{key}.scaling.low_freq_factor"] = settings.get("low_freq_factor", float)
        found[f"{key}.scaling.high_freq_factor"] = settings.get("high_freq_factor", float)
        found[f"{key}.scaling.original_context_length"] = settings.get(
            "original_max_position_embeddings", int
        )
    return found


def query_scale(config: Config) -> float:
    """What the Gemmas multiply scores of attention by.

    Raises:
        ModelFileError: it has no root.
    """
    scalar: float = config.get("query_pre_attn_scalar", float, 256.0)
    if scalar <= 0:
        raise config.bad("query_pre_attn_scalar", f"is {scalar}, expected more than 0")
    return float(scalar**-0.5)
