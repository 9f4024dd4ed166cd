"""MoE++ (2410.07348): a llama whose mixtures have experts that compute nothing.

The last four experts of a layer have no feed-forward: two constants, a copy and zero, in this
order. The router has two layers with a tanh between them, and what it says is added to what the
logits of the layer before are mapped to (the gating residual). A token takes two experts; the
weight of the zero expert is set to 0, then weights are divided by their sum. Experts read the
normalised activations times 2. The released model's config has flags for most of this.

There is no GGUF architecture for it, so this one is our own. Keys are those of other mixtures, and

    headrace_moepp.router_hidden_length   values between the router's layers; 0: it has one layer
    headrace_moepp.expert_input_scale     what experts read is the norm's output times this
    headrace_moepp.zero_expert_weight     whether the zero expert keeps its weight

Tensors of layer N, beside those of other mixtures:

    blk.N.ffn_gate_inp_hidden.weight   the router's first layer; ffn_gate_inp is then the second one
    blk.N.ffn_gate_inp_map.weight      of the gating residual; the first layer has none
    blk.N.ffn_gate_up.E.weight         gate and up of an expert, one behind the other; or both apart
    blk.N.ffn_const.E.weight, .bias    of a constant expert: two rows that weigh x and the constant

Verified against the source that its authors published (SkyworkAI/MoE-plus-plus at a5425c5:
modeling_moe_plus_plus.py, moe_plus_plus_layer.py, configuration_moe_plus_plus.py): order of
experts, router, residual (layer 0 has its map in the checkpoint and does not use it), weights,
scale of the input, SwiGLU with gate in front of up, names of tensors and flags. Tests compare with
numpy written from that. Not verified: the released weights (Chat-UniVi/MoE-Plus-Plus-7B), which
were not at hand, with them the values of the flags in their config, and bfloat16 rounding of the
original.
"""

from __future__ import annotations

from dataclasses import replace

from headrace.families import common
from headrace.families.decoder import Decoder, Experts, Matrix, Vector, ZeroComputation
from headrace.loaders.gguf import ModelFile

ARCHITECTURE = "headrace_moepp"
ACTIVE = 2
CONSTANTS = 2
IDLE = CONSTANTS + 2


def build(model: ModelFile) -> Decoder:
    """Describe a model of `general.architecture` "headrace_moepp".

    Raises:
        ModelFileError: see `headrace.families.common`.
        UnsupportedError: a token takes another number of experts than two.
    """
    sizes = common.read_sizes(model, ARCHITECTURE)
    rope = common.read_rope(model, sizes)
    layers = [
        common.layer(
            model,
            sizes,
            i,
            common.attention(model, sizes, i, rope, paired=False),
            experts=_mixture(model, sizes, i),
        )
        for i in range(sizes.layers)
    ]
    return common.decoder(model, sizes, layers)


def _mixture(model: ModelFile, sizes: common.Sizes, index: int) -> Experts:
    hidden = model.get(f"{ARCHITECTURE}.router_hidden_length", int, low=0, high=common.MAX_WIDTH)
    scale = model.get(f"{ARCHITECTURE}.expert_input_scale", float, 2.0, low=1e-3, high=1e3)
    weighed = model.get(f"{ARCHITECTURE}.zero_expert_weight", bool, False)
    found = common.experts(
        model, sizes, index, normalised=True, idle=IDLE, hidden=hidden, only=ACTIVE
    )
    first, block = len(found.each), f"blk.{index}"
    constants = (
        ZeroComputation(
            "constant",
            Vector(f"{block}.ffn_const.{e}.weight", 2 * sizes.width, rows=2),
            Vector(f"{block}.ffn_const.{e}.bias", sizes.width),
        )
        for e in range(first, first + CONSTANTS)
    )
    count = first + IDLE
    return replace(
        found,
        each=(*found.each, *constants, ZeroComputation("copy"), ZeroComputation("zero")),
        weighting="chosen" if weighed else "counted",
        router_map=Matrix(f"{block}.ffn_gate_inp_map.weight", count, count) if index else None,
        input_scale=scale,
    )
