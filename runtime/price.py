"""The price tag of a compressed model: how far it is from its source, kept in the file itself.

Keys `headrace.price.*`: the means of `headrace.compare` on a held-out text, tokens that were
scored, and the text's SHA-256. All have the same size whatever they say, so that a header is
written before they are known, and again when they are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from headrace.loaders.model_file import ModelFile
from headrace.windows import scored_of

Progress = Callable[[int, int | None, str], None]

WINDOW = 512  # tokens
TOKENS = 64 * WINDOW  # unless told otherwise
_CHARACTERS = 16  # more than a token has on average
_PREFIX = "headrace.price."
_RESERVED = "headrace.later."  # of the room for it: as long, and no price
_RATES = ("kl_divergence", "top_agreement", "perplexity_ratio")


def text_digest(text: str) -> str:
    """SHA-256 of a text in UTF-8, in hexadecimal digits."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def price_keys(found: dict[str, Any] | None) -> dict[str, str | float]:
    """Metadata of a price; None: of the room for one that is not known yet, the same bytes."""
    prefix = _RESERVED if found is None else _PREFIX
    found = found or {"tokens": 0, "text_sha256": "0" * 64}
    return {
        **{prefix + name: float(found.get(name, 0)) for name in _RATES},
        prefix + "tokens": int(found["tokens"]),
        prefix + "text_sha256": found["text_sha256"],
    }


def price_of(model: ModelFile) -> dict[str, Any] | None:
    """The price that a file states; None: it states none.

    Raises:
        ModelFileError: what it states is none.
    """
    if _PREFIX + _RATES[0] not in model.metadata:
        return None
    return {
        "kl_divergence": model.get(_PREFIX + "kl_divergence", float, low=0),
        "top_agreement": model.get(_PREFIX + "top_agreement", float, low=0, high=1),
        "perplexity_ratio": model.get(_PREFIX + "perplexity_ratio", float, low=0),
        "tokens": model.get(_PREFIX + "tokens", int, low=1),
        "text_sha256": model.get(_PREFIX + "text_sha256", str)[:64],
    }


def price_options(source: Path, threads: int | None) -> dict[str, Any]:
    """How both models are loaded that `measure_price` compares."""
    from headrace.families import describe
    from headrace.loaders.tiled import open_model

    window = min(WINDOW, describe(open_model(source)).context)
    return {"context": window, "threads": threads, "logits_rows": scored_of(window)}


def measure_price(
    source: Path, compressed: Path, text: str, *, tokens: int, threads: int | None,
    memory: int | None, progress: Progress | None,
) -> dict[str, Any]:  # fmt: skip
    """Compare a compressed model with its source; `memory` is for both together.

    Raises:
        what `headrace.load` and `headrace.compare.compare` raise.
    """
    from headrace.compare import compare
    from headrace.pair import load_pair

    options = price_options(source, threads)
    window = options["context"]
    with load_pair(source, compressed, memory=memory, progress=progress, **options) as (a, b):
        chunks = max(1, tokens // window)
        # The library takes some hundred bytes for each token, also of a text that is not needed.
        part = text[: chunks * window * _CHARACTERS]
        found = compare(a, b, part, context=window, chunks=chunks, progress=progress)
    return {**{name: found[name] for name in (*_RATES, "tokens")}, "text_sha256": text_digest(text)}
