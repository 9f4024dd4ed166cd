"""Llama 2 and 3, SmolLM2, Mistral (with a sliding window where the file gives one), Mixtral.

Llama 2: 2307.09288; Llama 3: 2407.21783; Mistral: 2310.06825; Mixtral: 2401.04088. Rotary pairs
lie side by side in GGUF's llama files, and halves of a head apart where `llama.rope.pairing` says
so.
"""

from __future__ import annotations

from headrace.errors import UnsupportedError
from headrace.families import common
from headrace.families.decoder import Decoder
from headrace.loaders.gguf import ModelFile


def build(model: ModelFile) -> Decoder:
    """Describe a model of `general.architecture` "llama".

    Raises:
        ModelFileError, UnsupportedError: see `headrace.families.common`.
    """
    sizes = common.read_sizes(model, "llama")
    rope = common.read_rope(model, sizes)
    pairing = model.get("llama.rope.pairing", str, "adjacent")
    if pairing not in ("adjacent", "halves"):
        raise UnsupportedError(
            f"llama.rope.pairing is {pairing[:40]!r}, expected 'adjacent' or 'halves'",
            path=model.paths[0],
        )
    window = model.get("llama.attention.sliding_window", int, 0, low=0, high=common.MAX_CONTEXT)
    mixture = model.get("llama.expert_count", int, 0, low=0) > 0
    layers = [
        common.layer(
            model,
            sizes,
            i,
            common.attention(model, sizes, i, rope, paired=pairing == "adjacent", window=window),
            experts=common.experts(model, sizes, i, normalised=True) if mixture else None,
        )
        for i in range(sizes.layers)
    ]
    return common.decoder(model, sizes, layers)
