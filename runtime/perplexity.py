"""Perplexity of a text, counted as llama.cpp does, so that numbers compare."""

from __future__ import annotations

from typing import Any

import numpy as np

from headrace.loaders.progress import Progress
from headrace.model import Model
from headrace.windows import cut_text


def perplexity(
    model: Model,
    text: str,
    *,
    context: int = 512,
    chunks: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """exp of the mean negative log-likelihood over the second half of each window.

    `headrace.windows.cut_text` says how the text is cut.

    Returns:
        perplexity, its standard error, tokens scored, windows, and the windows' own perplexities.

    Raises:
        HeadraceError: the text is shorter than one window.
        ValueError: the window is shorter than 4 tokens.
    """
    windows = cut_text(model.tokenizer, text, context, chunks)
    losses = []
    for ids, targets in windows:
        logits = model.logits(ids, last=windows.scored)[:-1]
        losses.append(losses_of(log_softmax(logits), targets))
        if progress is not None:
            progress(len(losses), len(windows), "windows")
    every = np.concatenate(losses)
    mean = float(every.mean())
    value = float(np.exp(mean))
    return {
        "perplexity": value,
        "standard_error": value * float(every.std()) / max(1, len(every) - 1) ** 0.5,
        "mean_nll": mean,
        "tokens": len(every),
        "windows": len(windows),
        "context": context,
        "window_perplexities": [float(np.exp(x.mean())) for x in losses],
    }


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities of float32 [n, vocabulary]; sums in float64, result float32."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    total = np.exp(shifted).sum(axis=1, dtype=np.float64)
    found: np.ndarray = shifted - np.log(total)[:, None].astype(np.float32)
    return found


def losses_of(log_p: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """-log p of each row's target: float64 [n]."""
    losses: np.ndarray = -log_p[np.arange(len(targets)), targets].astype(np.float64)
    return losses
