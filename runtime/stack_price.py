"""What a stack of blocks is worth in a budget between those whose prices its file states.

A price is measured for some levels (`headrace.price`). Between two of them the divergence and the
logarithm of the perplexity's ratio fall about geometrically with the bytes of blocks: SmolLM2 with
5 blocks for each matrix has a divergence of 0.271, and 0.276 by those with 4 and 6.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import Any

import numpy as np

from headrace.families import describe
from headrace.loaders.model_file import ModelFile
from headrace.price import RATES, price_of
from headrace.stack import Stack, is_block, stack_of


def shown_price(model: ModelFile) -> dict[str, Any] | None:
    """The price that a file states; of a stack with all levels from the first that was measured on.

    Raises:
        ModelFileError: what it states is none.
    """
    price = price_of(model)
    if price is None or "levels" not in price:
        return price
    stack = stack_of(model, describe(model))
    if stack is None:  # levels of what?
        return {key: value for key, value in price.items() if key != "levels"}
    beside = sum(info.n_bytes for info in model.tensors.values() if not is_block(info))
    rows = []
    for level in range(1, len(stack) // stack.least + 1):
        blocks = level * stack.least
        found = price_at(price, stack, blocks)
        if found is not None:
            size = beside + stack.n_bytes(blocks)
            rows.append({"level": level, "weights_bytes": size} | _without_blocks(found))
    return {**price, "levels": rows}


def price_at(price: dict[str, Any], stack: Stack, blocks: int) -> dict[str, Any] | None:
    """The price of the first so many blocks; None: fewer than those of any that was measured.

    Args:
        price: as `headrace.price.price_of` gives it.
        blocks: of the stack.

    Returns:
        blocks, the rates of a price, and `how` they are known: "measured" or "interpolated".
    """
    measured = {
        row["level"] * stack.least: row
        for row in price.get("levels", [])
        if row["level"] * stack.least < len(stack)
    } | {len(stack): price}
    counts = sorted(measured)
    at = bisect_left(counts, blocks)
    if at == len(counts) or (at == 0 and counts[0] != blocks):
        return None
    high = measured[counts[at]]
    if counts[at] == blocks:
        return {"blocks": blocks, **{name: high[name] for name in RATES}, "how": "measured"}
    low, sizes = measured[counts[at - 1]], (stack.n_bytes(n) for n in (counts[at - 1], counts[at]))
    begin, end = sizes
    share = (stack.n_bytes(blocks) - begin) / (end - begin)
    return {
        "blocks": blocks,
        "kl_divergence": _between(low["kl_divergence"], high["kl_divergence"], share),
        "top_agreement": float(np.interp(share, (0, 1), [r["top_agreement"] for r in (low, high)])),
        "perplexity_ratio": _between(low["perplexity_ratio"], high["perplexity_ratio"], share),
        "how": "interpolated",
    }


def _between(low: float, high: float, share: float) -> float:
    """Geometrically, where neither is 0."""
    if min(low, high) <= 0:
        return low + share * (high - low)
    return float(np.exp(np.log(low) + share * (np.log(high) - np.log(low))))


def _without_blocks(found: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in found.items() if key != "blocks"}
