"""Switch Transformers' layer (2101.03961) in a decoder: each token takes the one expert that its
router likes best, times the softmax's probability of it over all experts.

An expert has two matrices, and is p * W_o relu(W_i x): `blk.N.ffn_up.E.weight`, `ffn_down`, or
`blk.N.ffn_up_exps.weight` for all of them, and no `ffn_gate`. The router, `blk.N.ffn_gate_inp`, is
kept in the floats that it has in the file, as everywhere here. Everything else is as llama's.

The published models are encoders with decoders (T5), which Headrace does not run, so this is an
architecture of our own: keys are those of other mixtures behind "headrace_switch.". Left out is
what is there for training only: the capacity of experts (here no token is dropped) and jitter.
"""

from __future__ import annotations

from headrace.families import common
from headrace.families.decoder import Decoder
from headrace.loaders.gguf import ModelFile

ARCHITECTURE = "headrace_switch"


def build(model: ModelFile) -> Decoder:
    """Describe a model of `general.architecture` "headrace_switch".

    Raises:
        ModelFileError: see `headrace.families.common`.
        UnsupportedError: a token takes more than one expert, or the activation is not ReLU.
    """
    sizes = common.read_sizes(model, ARCHITECTURE)
    rope = common.read_rope(model, sizes)
    layers = [
        common.layer(
            model,
            sizes,
            i,
            common.attention(model, sizes, i, rope, paired=True),
            experts=common.experts(
                model, sizes, i, normalised=False, activation="relu", gated=False, only=1
            ),
        )
        for i in range(sizes.layers)
    ]
    return common.decoder(model, sizes, layers)
