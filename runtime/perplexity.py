"""Perplexity of a text, counted as llama.cpp does, so that numbers compare."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from headrace.errors import HeadraceError
from headrace.model import Model

Progress = Callable[[int, int | None, str], None]


def perplexity(
    model: Model,
    text: str,
    *,
    context: int = 512,
    chunks: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """exp of the mean negative log-likelihood over the second half of each window.

    The text is tokenised once and cut into windows of `context` tokens (the rest is dropped); each
    is read from an empty context, its first token replaced by the begin-of-text token where the
    model wants one; positions context / 2 .. context - 2 predict their successors.

    Returns:
        perplexity, its standard error, tokens scored, windows, and the windows' own perplexities.

    Raises:
        HeadraceError: the text is shorter than one window.
        ValueError: the window is shorter than 4 tokens.
    """
    if context < 4:
        raise ValueError(f"a window must have at least 4 tokens, not {context}")
    tokenizer = model.tokenizer
    # As plain text: a corpus may spell <unk> or <eos>, which are no control tokens there.
    ids = tokenizer.encode(text, add_special=True, parse_special=False)
    windows = len(ids) // context
    if chunks is not None:
        if chunks < 1:
            raise ValueError(f"chunks must be at least 1, not {chunks}")
        windows = min(windows, chunks)
    if windows < 1:
        raise HeadraceError(
            f"the text has {len(ids)} tokens, less than one window of {context}; "
            "use a longer text or a smaller --context"
        )
    first = context // 2
    losses = []
    for w in range(windows):
        window = list(ids[w * context : (w + 1) * context])
        targets = np.array(window[first + 1 :])
        if tokenizer.add_bos and tokenizer.bos_id is not None:
            window[0] = tokenizer.bos_id
        logits = model.logits(window, last=context - first)[:-1]
        losses.append(_losses(logits, targets))
        if progress is not None:
            progress(w + 1, windows, "windows")
    every = np.concatenate(losses)
    mean = float(every.mean())
    value = float(np.exp(mean))
    return {
        "perplexity": value,
        "standard_error": value * float(every.std()) / max(1, len(every) - 1) ** 0.5,
        "mean_nll": mean,
        "tokens": len(every),
        "windows": windows,
        "context": context,
        "window_perplexities": [float(np.exp(x.mean())) for x in losses],
    }


def _losses(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """-log softmax(logits)[target] for each row; float64 sums."""
    top = logits.max(axis=1, keepdims=True)
    total = np.exp(logits - top).sum(axis=1, dtype=np.float64)
    chosen = logits[np.arange(len(targets)), targets] - top[:, 0]
    losses: np.ndarray = np.log(total) - chosen
    return losses
